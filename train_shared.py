"""Phase 1: trains the trunk, on which modules are trained later, on a broad corpus.

    accelerate launch train_shared.py --data my_corpus/ --output-dir runs/trunk --steps 10000

`main` reads from top to bottom. To experiment, edit this file; RunSettings has the flags that only operate a run.
"""

from dataclasses import dataclass

from forge_common.command_line import read_settings, run_main
from forge_common.run.stop import StopRequest
from forge_common.settings import RunSettings, UpdateSettings, accumulation_steps
from forge_common.settings_checks import problems


@dataclass(frozen=True, kw_only=True)
class Settings(UpdateSettings, RunSettings):
    # -- data --
    data: tuple[str, ...]
    """Sources: file, folder, glob, hf:ID[:CONFIG[:SPLIT]] or local:python|cpp|docs|perl. SOURCE@0.7 weights one."""
    tokenizer: str = "train:4096"
    """Folder, tokenizer.json, train:VOCAB (a BPE trained on the data, VOCAB tokens) or bytes."""
    sequence_length: int = 512
    """Tokens in a window."""

    # -- model --
    trunk_from: str | None = None
    """Transformers checkpoint to continue from, with its sizes and tokenizer: folder or hub id (org/name@revision)."""
    preset: str = "auto"
    """Sizes: tiny, small, base, large (1, 25, 110, 350 M parameters). auto: as the run's tokens and --budget allow."""
    hidden_size: int | None = None
    """Width of the residual stream; None: the preset's."""
    intermediate_size: int | None = None
    """Width of the feed-forward; None: the preset's."""
    num_hidden_layers: int | None = None
    """Layers; None: the preset's."""
    num_attention_heads: int | None = None
    """Query heads; None: the preset's."""
    num_key_value_heads: int | None = None
    """Key and value heads; None: the preset's."""
    tie_word_embeddings: bool = True
    """Use the embedding as the output head."""
    cross_document_attention: bool = False
    """Let a token attend to the earlier documents in its window."""
    num_experts: int = 0
    """Experts of a sparse feed-forward (Mixtral's); 0: dense."""
    experts_per_token: int = 2
    """Experts that serve a token."""
    router_aux_loss_coef: float = 0.01
    """Weight of the balance loss."""
    router_z_loss_coef: float = 0.001
    """Weight of the router's z loss."""

    # -- updates --
    lr: float = 3e-4
    """Peak learning rate."""


def main(settings: Settings) -> int:
    """Trains a trunk; returns the exit code (0, or 128 + its number after a signal)."""
    stop = StopRequest(settings.hang_timeout)

    # Heavy imports come after the settings were checked, so that a wrong flag is reported at once.
    from datetime import timedelta

    import torch
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, set_seed

    from forge_common import checkpoint, optimizers, schedule
    from forge_common.artifacts.publish import publish_trunk
    from forge_common.artifacts.trunk_folder import read_trunk
    from forge_common.artifacts.upload import upload
    from forge_common.data.corpora import open_corpora, tokenizer_for
    from forge_common.data.order import updates
    from forge_common.model.config import check_context
    from forge_common.model.presets import model_config, preset_sizes
    from forge_common.model.trunk import Trunk, load_of, starting_load
    from forge_common.run import checkpoint_writer, engines
    from forge_common.run.folder import claim, prepare_output, release
    from forge_common.run.kernels import choose_kernels
    from forge_common.run.launch_checks import check_launch
    from forge_common.run.length import with_length, with_preset
    from forge_common.run.log import Interval, RunLog
    from forge_common.run.plan import plan, show
    from forge_common.run.progress import PENDING, due, new_progress, update_outcome
    from forge_common.run.totals import update_totals
    from forge_common.run.trackers import choose_tracker
    from forge_common.validation import validate

    # ---- Set up ----
    tracker, tracker_report = choose_tracker(settings.tracker)
    accumulation = accumulation_steps(settings)
    accelerator = Accelerator(
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulation, sync_with_dataloader=False),
        log_with=tracker,
        project_dir=settings.output_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],  # the main process may tokenize that long
    )
    check_launch(accelerator, accumulation, settings)
    lock = None if settings.dry_run else claim(accelerator, settings.output_dir)  # no other run writes there
    rank = accelerator.process_index
    processes = accelerator.num_processes
    device = accelerator.device

    # ---- Data, model, optimizer ----
    set_seed(settings.seed)
    with accelerator.local_main_process_first():
        trunk = None
        trunk_metadata = {}
        if settings.trunk_from:
            trunk, tokenizer, trunk_metadata = read_trunk(settings.trunk_from, settings.eos_token)
            config = trunk.config
            check_context(settings, config)
        else:
            tokenizer = tokenizer_for(settings, accelerator.print)
            config = model_config(settings, tokenizer)  # its sizes are chosen below, by the text
        corpora = open_corpora(settings, tokenizer, config, accelerator.print)
    if trunk is None:
        settings = with_preset(settings, corpora, preset_sizes(settings, tokenizer), accelerator)
        trunk = Trunk(model_config(settings, tokenizer))
    trunk = trunk.to(getattr(torch, settings.dtype))
    trunk.activation_checkpointing = settings.activation_checkpointing
    choose_kernels(trunk, settings, accelerator)
    settings = with_length(settings, corpora, trunk, accelerator)
    optimizer = optimizers.make(trunk, settings, accelerator)
    show(accelerator, settings, plan(trunk, optimizer, settings, corpora, accumulation, accelerator, tracker_report))
    fresh = new_progress(accelerator, settings, corpora, tokenizer, trunk_metadata)  # compares the processes
    model, optimizer = engines.prepare(accelerator, trunk, optimizer)
    writer = checkpoint_writer.Writer(accelerator, model, settings)

    # ---- Resume ----
    progress = checkpoint.resume(accelerator, settings, fresh)
    prepare_output(accelerator, settings, checkpoint_writer.size(model))  # free space, settings.json

    # ---- Train ----
    # This chapter is the same text in train_shared.py and train_module.py; a test compares them.
    last = min(settings.steps, 6) if settings.dry_run else settings.steps
    log = RunLog(accelerator, settings, progress, last, tracker, trunk, tokenizer)
    interval = Interval(accelerator, progress.interval)
    expert_load = starting_load(trunk.config, progress.expert_counts, device)  # f of the balance loss
    update_batches = updates(
        corpora.training, progress.global_step, settings.batch_size, settings.micro_batch_size, rank, processes, device
    )
    model.train()
    # From here on a signal takes effect at the end of an update.
    stop.begin_training(accelerator, trunk.model.layers, dry_run=settings.dry_run)
    if progress.validation_due:  # a signal interrupted the validation of this update before the resume
        with stop.slow_section():
            result = validate(accelerator, model, corpora.held_out, settings.micro_batch_size, stop)
        progress.record_validation(result)
        log.validation(result, progress)
    stop.end_early(progress.patience_is_over(settings.patience))
    following = next(update_batches)  # [micro-batches, micro_batch_size, sequence_length + 1]
    num_scored = int(accelerator.reduce(trunk.scored(following).sum(), "sum"))
    log.restart_clock(progress.global_step)
    while progress.global_step < last and not stop.reason:
        # -- take the update's windows --
        windows, following = following, next(update_batches)
        step = progress.global_step + 1
        set_seed(settings.seed + step * processes + rank)  # for dropout: a resumed run draws the same numbers
        rate = schedule.rate(settings, step)
        for group in optimizer.param_groups:
            group["lr"] = rate

        # -- forward and backward --
        # accelerate divides the gradient by the N micro-batches, DDP by the P processes. The factor P * N / n undoes
        # both and divides by the n scored tokens: the gradient is the mean over the update, however it is divided.
        scale = processes * accumulation / max(num_scored, 1)
        sums = []
        outcome = PENDING  # until the last micro-batch, where the gradients are synchronized
        for micro_batch in windows:
            with accelerator.accumulate(model):
                sums.append(model(micro_batch, expert_load))
                accelerator.backward(sums[-1].objective * scale)
                sums[-1] = sums[-1].detached()  # frees the graph: its nodes keep memory around them in use

                # -- apply or skip --
                if accelerator.sync_gradients:
                    grad_norm = accelerator.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
                    following_scored = trunk.scored(following).sum()
                    totals = update_totals(accelerator, sums, grad_norm, following_scored, stop)
                    outcome = update_outcome(totals.loss, totals.grad_norm, num_scored, accelerator.scaler)
                if not accelerator.sync_gradients or outcome.applied:
                    optimizer.step()
                optimizer.zero_grad()
            stop.heartbeat()
            log.advance(progress.global_step, len(sums), len(windows), outcome)
        progress.record(outcome, settings, corpora.training, log.print_line)
        num_scored = totals.following_scored
        if outcome.finite:
            interval.add(sums)
        if outcome.finite and expert_load is not None:
            progress.expert_counts = totals.expert_counts
            expert_load = load_of(totals.assignments)
        if settings.dry_run:
            last = log.end_warm_up(progress)
            continue

        # -- now and then: log, validate, save --
        stop.agree(totals.stop > 0)
        improved = False
        if due(step, settings.log_every, last):
            log.training(interval, progress, rate=rate, grad_norm=outcome.grad_norm)
        if corpora.held_out and due(step, settings.val_every, last):
            with log.clock_paused(), stop.slow_section():
                result = validate(accelerator, model, corpora.held_out, settings.micro_batch_size, stop)
            improved = progress.record_validation(result)
            log.validation(result, progress)
            stop.end_early(progress.patience_is_over(settings.patience))
        if improved or stop.reason or due(step, settings.save_every, last):
            with log.clock_paused(), stop.slow_section():
                progress.interval = interval.sum_over_ranks()
                required = bool(stop.reason) or step == last or settings.on_full_disk == "stop"
                writer.save(progress, required=required, print_line=log.print_line)
    update_batches.close()
    stop.phase = "publishing"  # everything is saved: from here on a signal ends the run at once

    # ---- Publish ----
    if settings.dry_run:
        log.dry_run_result(progress, settings.steps)
    elif stop.reason == "signal":  # only one that all ranks saw during training; a later one changes nothing
        log.print_line(f"stopped at update {progress.global_step} of {settings.steps}. Run the same command to resume.")
    else:
        checkpoint.load_best(accelerator, settings, progress, log.print_line)
        tensors = checkpoint.full_tensors(accelerator, model)
        if accelerator.is_main_process:
            path, digest = publish_trunk(settings, progress, corpora, trunk.config, tokenizer, tensors, trunk_metadata)
            log.print_line(f"published   {path} (digest {digest[:12]}, read back and verified)")
            if settings.push_to_hub:
                upload(path, settings.push_to_hub, log.print_line)
        accelerator.wait_for_everyone()
    exit_code = stop.end()
    log.close(exit_code)
    release(lock)
    return exit_code


if __name__ == "__main__":
    run_main(main, read_settings(Settings, __doc__, problems))
