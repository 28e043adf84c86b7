"""Phase 2: trains a module for one domain on a frozen trunk.

    accelerate launch train_module.py --trunk runs/trunk/trunk --name law --data law/ --output-dir runs/law --steps 2000

`main` reads from top to bottom. To experiment, edit this file; RunSettings has the flags that only operate a run.
"""

from dataclasses import dataclass
from typing import Literal

from forge_common.command_line import read_settings, run_main
from forge_common.model.module_settings import ModuleSettings
from forge_common.run.stop import StopRequest
from forge_common.settings import RunSettings, UpdateSettings, accumulation_steps
from forge_common.settings_checks import problems


@dataclass(frozen=True, kw_only=True)
class Settings(ModuleSettings, UpdateSettings, RunSettings):
    # -- data --
    trunk: str
    """Trunk of train_shared.py or another Transformers checkpoint: folder or hub id (org/name@revision)."""
    trunk_dtype: Literal["bf16"] | None = None
    """Type of the frozen matrices in memory. None: --dtype. bf16 needs the launcher's --mixed_precision bf16."""
    name: str
    """Name of the module."""
    data: tuple[str, ...]
    """Sources: file, folder, glob, hf:ID[:CONFIG[:SPLIT]] or local:python|cpp|docs|perl. SOURCE@0.7 weights one."""
    general_data: tuple[str, ...] = ("local:docs",)
    """Sources of a general sample: the module's loss on it is measured before and after training."""
    general_tokens: int = 16_384
    """Held-out tokens of the general sample at most; 0: none."""
    sequence_length: int = 512
    """Tokens in a window."""

    # -- module --
    # forge_common/model/module_settings.py has its sizes
    kind: str = "auto"
    """ffn, attention+ffn, narrow, lora, expert; any with +head. auto: ffn+head; lora on dense trunks by others."""
    module_dtype: Literal["bf16"] | None = None
    """Type that the published tensors are rounded to; None: that of --dtype, in which they are trained."""
    licence: str | None = None
    """Licence of the module, for its metadata, such as apache-2.0."""

    # -- updates --
    lr: float = 3e-3
    """Peak learning rate. 3e-3 suits kind lora, and a domain that the trunk hardly saw; else 1e-3 to 3e-4."""
    weight_decay: float = 0.0
    """Decay of matrices to zero, which is away from the trunk's weights; norms, biases and embeddings have none."""


def main(settings: Settings) -> int:
    """Trains a module; returns the exit code (0, or 128 + its number after a signal)."""
    stop = StopRequest(settings.hang_timeout)

    # Heavy imports come after the settings were checked, so that a wrong flag is reported at once.
    from datetime import timedelta

    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, set_seed

    from forge_common import checkpoint, optimizers, schedule
    from forge_common.artifacts.publish import TrainedModule, losses_line, publish_module, round_tensors
    from forge_common.artifacts.trunk_folder import read_trunk
    from forge_common.artifacts.upload import upload
    from forge_common.data.corpora import general_sample, open_corpora
    from forge_common.data.order import updates
    from forge_common.files.tensors import digest
    from forge_common.model.config import check_context
    from forge_common.model.modules import kind_and_layers, plug_in
    from forge_common.model.trunk import load_of, starting_load
    from forge_common.run import checkpoint_writer, engines
    from forge_common.run.folder import claim, prepare_output, release
    from forge_common.run.kernels import choose_kernels
    from forge_common.run.launch_checks import check_launch
    from forge_common.run.length import with_length
    from forge_common.run.log import Interval, RunLog
    from forge_common.run.plan import plan, show
    from forge_common.run.progress import PENDING, due, new_progress, update_outcome
    from forge_common.run.totals import update_totals
    from forge_common.run.trackers import choose_tracker
    from forge_common.validation import domain_losses, validate

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
        dtype = settings.trunk_dtype or settings.dtype
        trunk, tokenizer, trunk_metadata = read_trunk(settings.trunk, settings.eos_token, dtype)
        check_context(settings, trunk.config)
        settings, layers = kind_and_layers(settings, trunk.config, trunk_metadata, accelerator.print)
        corpora = open_corpora(settings, tokenizer, trunk.config, accelerator.print)
        general = general_sample(settings, tokenizer, trunk.config.ignore_index, accelerator.print)
    domains = {"own": corpora.held_out, "general": general}
    config = trunk.config  # of the trunk without the module
    module_names = plug_in(trunk, settings.kind, layers, **settings.sizes)
    frozen = [name for name, parameter in trunk.named_parameters() if not parameter.requires_grad]
    frozen_before = digest({name: engines.rounded(accelerator, trunk.get_parameter(name)) for name in frozen})
    trunk.activation_checkpointing = settings.activation_checkpointing
    choose_kernels(trunk, settings, accelerator)
    settings = with_length(settings, corpora, trunk, accelerator)
    optimizer = optimizers.make(trunk, settings, accelerator)
    show(accelerator, settings, plan(trunk, optimizer, settings, corpora, accumulation, accelerator, tracker_report))
    fresh = new_progress(accelerator, settings, corpora, tokenizer, trunk_metadata, general)  # compares processes
    model, optimizer = engines.prepare(accelerator, trunk, optimizer)
    writer = checkpoint_writer.Writer(accelerator, model, settings)

    # ---- Resume ----
    progress = checkpoint.resume(accelerator, settings, fresh)
    if progress.global_step == 0 and not settings.dry_run:
        progress.losses_before = domain_losses(accelerator, model, domains, settings.micro_batch_size)
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
        round_tensors(engines.trained_tensors(model), settings.module_dtype)  # the losses are of what will be stored
        losses_after = domain_losses(accelerator, model, domains, settings.micro_batch_size, log.print_line)
        tensors = checkpoint.full_tensors(accelerator, model)
        if accelerator.is_main_process:
            if digest({name: tensors[name] for name in frozen}) != frozen_before:
                raise AssertionError("a frozen tensor of the trunk has changed; the module was not published")
            log.print_line(f"frozen      {len(frozen)} tensors, digest {frozen_before[:12]} before and after")
            module = TrainedModule(tensors, module_names, layers, losses_after)
            path, module_digest = publish_module(settings, progress, corpora, config, module, trunk_metadata, device)
            log.print_line(losses_line(progress.losses_before, losses_after))
            log.print_line(f"published   {path} (digest {module_digest[:12]}, read back and verified)")
            if settings.push_to_hub:
                upload(path, settings.push_to_hub, log.print_line)
        accelerator.wait_for_everyone()
    exit_code = stop.end()
    log.close(exit_code)
    release(lock)
    return exit_code


if __name__ == "__main__":
    run_main(main, read_settings(Settings, __doc__, problems))
