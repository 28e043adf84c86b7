"""Phase 2: a frozen trunk and the text of one domain -> a module.

    accelerate launch train_module.py --trunk runs/trunk/trunk --name law --data law/ --output-dir runs/law --steps 2000

Everything that can be set stands in Settings; main reads from top to bottom. To experiment, edit this file.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from forge_common import config
from forge_common.errors import UserError


@dataclass(frozen=True)
class Settings:
    # -- what is read --

    trunk: str  # a folder that train_shared.py published, or another Transformers checkpoint (or its hub id)
    name: str  # what the module is called
    data: tuple[
        str, ...
    ]  # file, folder, glob, hf:ID[:CONFIG[:SPLIT]] or local:python|cpp|docs|perl; SOURCE@0.7 weights it
    output_dir: Path  # settings, metrics, checkpoints, and at the end module/
    val_data: tuple[str, ...] = ()  # sources to validate on; none: a part of --data
    val_fraction: float = 0.01  # of the documents of --data is held out, by hash of content (without --val-data)
    general_data: tuple[str, ...] = ("local:docs",)  # a general sample: what the module does to text not its own
    general_tokens: int = 65_536  # at most so many held-out tokens of it; 0: none
    eos_token: str | None = None  # the end of a document, where the tokenizer's files do not say it
    sequence_length: int = 512  # tokens a window
    pack: bool = True  # fill windows with documents end to end; --no-pack: one document a window, cut or padded
    text_column: str = "text"  # of jsonl, json, csv, parquet, arrow and hub data
    document_separator: str | None = None  # splits text files into documents; none: a file is a document
    on_bad_text: Literal["refuse", "replace", "skip"] = "refuse"  # bytes that are not UTF-8
    on_bad_line: Literal["refuse", "skip"] = "refuse"  # rows that cannot be read
    cache_dir: Path = Path("~/.cache/forge")  # tokens, once made

    # -- what is trained --

    # copies of the feed-forward, and an output head; a narrow one beside the trunk's; of low rank; a rival (FlexOlmo's)
    kind: Literal["ffn", "ffn+head", "narrow", "narrow+head", "lora", "lora+head", "expert"] = "ffn+head"
    layers: str = "all"  # of which layers: all, top:N, or numbers from 0 such as 2,5
    width: int = 0  # of kind narrow; 0: a quarter of the trunk's feed-forward
    rank: int = 16  # of kind lora
    licence: str | None = None  # of the module, for its passport
    statistics_tokens: int = 1_000_000  # of the training text at most, for the router's counts
    statistics_min_documents: int = 2  # what fewer of the sampled documents hold is not counted (docs/PRIVACY.md)
    dtype: Literal["float32", "float64"] = "float32"  # of the weights; bf16 is the launcher's --mixed_precision

    # -- how --

    steps: int = 1_000  # updates of the optimizer
    batch_size: int = 64  # windows an update, over all processes
    micro_batch_size: int = 16  # windows a device holds at once
    lr: float = 3e-3  # for a domain that the trunk hardly saw; 1e-3 to 3e-4 for one that it knows (docs/RESULTS.md)
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_steps: int = 100
    min_lr_ratio: float = 0.0
    weight_decay: float = 0.1  # on matrices; not on norms, biases and embeddings
    max_grad_norm: float = 1.0
    max_bad_updates: int = 10  # stop after so many updates in a row with NaN or Inf
    hang_timeout: float = (
        60.0  # seconds: a standstill so long ends the run (at its start or in a save ten times); 0: never
    )
    seed: int = 42

    # -- what is told and kept --

    val_every: int = 250  # updates; 0: at the end alone
    save_every: int = 250  # updates; 0: at the end alone (and whenever validation improves)
    keep: int = 2  # newest checkpoints; the best by validation stays besides
    on_full_disk: Literal["continue", "stop"] = "continue"  # when a checkpoint finds no room; the last one must
    patience: int = 0  # stop after so many validations without a better one; 0: never
    log_every: int = 10
    tracker: Literal["auto", "none", "wandb", "trackio", "tensorboard"] = "auto"
    project: str = "forge"
    run_name: str | None = None
    resume: Literal["auto", "never", "require"] = "auto"
    accept_change: tuple[str, ...] = ()  # settings that may differ from the checkpoint's, such as steps
    dry_run: bool = False  # print the plan, time a few updates, write nothing


def main(settings: Settings) -> int:
    """Trains a module; returns the exit code (0, or 143 or 130 when it was asked to stop)."""
    from forge_common.stopping import StopRequest

    stop = StopRequest(settings.hang_timeout)

    # Heavy, so only after the settings were checked.
    import secrets
    from datetime import timedelta

    import torch
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, set_seed

    from forge_common import artifact, checkpoint, output, schedule, statistics, trackers, tracking
    from forge_common.data.corpora import general_sample, held_out_fraction, open_corpora
    from forge_common.data.order import updates
    from forge_common.files import write_json
    from forge_common.launching import check_launch
    from forge_common.model import even_load, load_of, parameter_groups
    from forge_common.modules import chosen_layers, plug_in
    from forge_common.progress import begin
    from forge_common.validation import validate

    # ---- Set up ----
    tracker, tracked = trackers.choose(settings.tracker)
    accumulation = config.accumulation_steps(settings)
    accelerator = Accelerator(
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulation, sync_with_dataloader=False),
        log_with=tracker,
        project_dir=settings.output_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],  # the main process may tokenize that long
    )
    check_launch(accelerator, accumulation)
    claimed = None if settings.dry_run else output.claim(accelerator, settings.output_dir)  # no other run writes there
    if accelerator.state.deepspeed_plugin:  # there is no prepared loader that it could read the size off
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = (
            settings.micro_batch_size
        )
    rank, processes, device = accelerator.process_index, accelerator.num_processes, accelerator.device

    # ---- Data, model, optimizer ----
    set_seed(settings.seed)
    with accelerator.local_main_process_first():
        trunk, tokenizer, origin = artifact.read_trunk(settings.trunk, settings.eos_token)
        corpora = open_corpora(settings, tokenizer, trunk.config.ignore_index, accelerator.print)
        general = general_sample(settings, tokenizer, trunk.config.ignore_index, accelerator.print)
    config.check_context(settings, trunk.config)
    trunk = trunk.to(getattr(torch, settings.dtype))
    layers = chosen_layers(settings.layers, trunk.config.num_hidden_layers)
    trained = plug_in(trunk, settings.kind, layers, width=settings.width, rank=settings.rank)
    frozen = [name for name, parameter in trunk.named_parameters() if not parameter.requires_grad]
    frozen_before = artifact.digest({name: trunk.state_dict()[name] for name in frozen})
    optimizer = torch.optim.AdamW(
        parameter_groups(trunk, settings.weight_decay), lr=settings.lr, betas=(0.9, 0.95), fused=device.type != "mps"
    )
    flops = trunk.flops_per_token(settings.sequence_length)
    plan = tracking.plan(trunk, settings, corpora.training, accumulation, processes)
    accelerator.print("\n".join([*corpora.report, plan, f"tracking    {tracked}"]))
    model, optimizer = accelerator.prepare(trunk, optimizer)
    checkpoint.keep_only_trained(accelerator)

    # ---- Where were we? ----
    checkpoints = settings.output_dir / "checkpoints"
    digests = {**corpora.digests, "tokenizer": tokenizer.digest, "trunk": origin.get("digest")}
    progress = begin(settings, digests, secrets.token_hex(4))
    found = checkpoint.newest(accelerator, checkpoints) if settings.resume != "never" and not settings.dry_run else None
    if found:
        progress = checkpoint.resume(accelerator, found, progress, settings.accept_change)
        accelerator.print(f"resumed     {found} at update {progress.global_step} of {settings.steps}")
    checkpoint.check_fresh(settings, found)
    if not found and not settings.dry_run:
        for domain, windows in (("own", corpora.held_out), ("general", general)):
            result = validate(accelerator, model, windows, settings.micro_batch_size)
            progress.notes[domain] = {"tokens": result.tokens, "before": result.loss if result.tokens else None}
    if accelerator.is_main_process and not settings.dry_run:
        output.check_room(settings.output_dir, checkpoint.size(model), settings.keep)
        write_json(settings.output_dir / "settings.json", config.to_json(settings))

    # ---- Train ----
    # This chapter is the same text in train_shared.py and train_module.py; a test holds them together.
    last = min(settings.steps, 4) if settings.dry_run else settings.steps
    folder = None if settings.dry_run else settings.output_dir
    log = tracking.RunLog(accelerator, folder, progress, steps=last)
    log.start_tracker(tracker, settings, progress.run_id)
    peak, interrupted = tracking.peak_flops(device), False
    interval = tracking.Interval(accelerator, progress.interval)
    load = even_load(trunk.config, device)  # f of the balance loss; from the second update on, the last update's own
    if progress.expert_counts:
        load = load_of(torch.tensor(progress.expert_counts, device=device))
    sizes = {"batch_size": settings.batch_size, "micro_batch_size": settings.micro_batch_size}
    shares = updates(
        corpora.training, start=progress.global_step, rank=rank, processes=processes, device=device, **sizes
    )
    model.train()
    stop.working = not settings.dry_run  # from here on a signal waits for the end of the update
    if progress.validation_due:  # its run was asked to stop before it was through
        result = validate(accelerator, model, corpora.held_out, settings.micro_batch_size, stop)
        log.validation(result, progress)
        interrupted = progress.validation_due
    stopping = interrupted or log.patience_is_over(progress, settings.patience)  # what had stopped early stays stopped
    log.lap(progress.global_step)
    while progress.global_step < last and not stopping:
        windows = next(shares)  # [micro-batches, micro_batch_size, sequence_length + 1]
        step = progress.global_step + 1
        set_seed(settings.seed + step * processes + rank)  # for dropout, should you add some: a resume draws the same
        curve = {"warmup_steps": settings.warmup_steps, "steps": settings.steps, "floor": settings.min_lr_ratio}
        rate = settings.lr * schedule.factor(settings.schedule, step, **curve)
        for group in optimizer.param_groups:
            group["lr"] = rate

        # backward divides by the micro-batches and DDP by the processes; sum x P * N / n undoes both, so that the
        # gradient is the mean over the n scored tokens of the whole update, however it was divided.
        labels = accelerator.reduce((windows[..., 1:] != trunk.config.ignore_index).sum(), "sum")
        scored = labels.clamp(min=1)
        scale, sums = processes * accumulation / scored, []
        for micro_batch in windows:
            with accelerator.accumulate(model):
                sums.append(model(micro_batch, load))
                accelerator.backward(sums[-1].objective * scale)
                if accelerator.sync_gradients:
                    grad_norm = float(accelerator.clip_grad_norm_(model.parameters(), settings.max_grad_norm))
                    loss = float(accelerator.reduce(sum(part.objective.detach() for part in sums), "sum"))
                    finite = math.isfinite(grad_norm) and math.isfinite(loss)
                    apply = (finite and labels > 0) or accelerator.scaler  # fp16's scaler skips by itself
                if not accelerator.sync_gradients or apply:
                    optimizer.step()
                optimizer.zero_grad()
            stop.alive()

        progress.global_step = step
        progress.epoch = corpora.training.epoch(step * settings.batch_size)
        if finite:
            progress.tokens += int(labels)
            progress.empty_updates += not labels
            progress.bad_in_a_row = 0
            interval.add(sums)
            if load is not None:
                counts = accelerator.reduce(sum(part.expert_counts for part in sums), "sum")
                progress.expert_counts, load = counts.tolist(), load_of(counts)
        elif accelerator.scaler and math.isfinite(loss):
            progress.scaler_skips += 1
        else:
            progress.bad_updates += 1
            progress.bad_in_a_row += 1
            log.say(f"update {step}: loss {loss}, gradient {grad_norm}: not applied ({progress.bad_updates} so far)")
            if progress.bad_in_a_row >= settings.max_bad_updates:
                positions = range((step - progress.bad_in_a_row) * settings.batch_size, step * settings.batch_size)
                raise UserError(tracking.diverged(step, progress.bad_in_a_row, corpora.training.origins(positions)))
        if settings.dry_run:
            continue

        interrupted = stopping = stop(accelerator)
        if step % settings.log_every == 0 or step == last:
            log.training(interval, progress, rate=rate, grad_norm=grad_norm, flops=flops, peak=peak)
        better = False
        if corpora.held_out and (step == last or (settings.val_every and step % settings.val_every == 0)):
            with log.aside(), stop.patient():
                result = validate(accelerator, model, corpora.held_out, settings.micro_batch_size, stop)
            better = log.validation(result, progress)
            interrupted = interrupted or progress.validation_due
            stopping = interrupted or log.patience_is_over(progress, settings.patience)
        ended = stopping or step == last
        if better or ended or (settings.save_every and step % settings.save_every == 0):
            with log.aside(), stop.patient():
                progress.interval = interval.settle()
                how = {"must": ended or settings.on_full_disk == "stop", "say": log.say}
                checkpoint.save(accelerator, model, checkpoints, progress, settings.keep, **how)
    shares.close()
    stop.working = False  # all is saved: from here on a signal ends the run at once

    # ---- Publish ----
    if settings.dry_run:
        log.timing(last, settings.steps)
    elif interrupted:  # what all ranks agreed on; a signal that comes later finds the work done
        log.say(f"stopped at update {progress.global_step} of {settings.steps}; the same command goes on from there")
    else:
        checkpoint.load_best(accelerator, checkpoints, progress, log.say)
        losses = dict(progress.notes)  # nats a token on held-out text: before (the trunk's) and after
        for domain, windows in (("own", corpora.held_out), ("general", general)):
            result = validate(accelerator, model, windows, settings.micro_batch_size)
            losses[domain] = {**losses[domain], "after": result.loss if result.tokens else None}
        tensors = accelerator.get_state_dict(model)
        if accelerator.is_main_process:
            if artifact.digest({name: tensors[name] for name in frozen}) != frozen_before:
                raise AssertionError("a frozen tensor of the trunk has moved; the module was not published")
            plain, _, _ = artifact.read_trunk(settings.trunk, settings.eos_token)
            sample = list(statistics.sample(corpora.training.shares(), settings.statistics_tokens))
            counts, sampled = statistics.count(
                sample, plain.config.vocab_size, tokenizer.eos_token_id, settings.statistics_min_documents
            )
            moments = statistics.moments(plain.to(device), sample, settings.sequence_length, device)
            facts = {
                "kind": settings.kind,
                "name": settings.name,
                "layers": layers,
                "width": settings.width,
                "rank": settings.rank,
                "statistics": sampled,
                "trunk_digest": origin["digest"],
                "tokenizer_digest": origin["tokenizer_digest"],
                "data": corpora.digests,
                "sources": list(settings.data),
                "val_fraction": held_out_fraction(settings),
                "licence": settings.licence,
                "steps": progress.best_step or progress.global_step,
                "tokens_seen": progress.tokens,
                "bad_updates": progress.bad_updates,
                "losses": losses,
            }
            published = settings.output_dir / "module"
            own = {name: tensors[name] for name in trained}
            digest = artifact.write_module(published, own, facts, counts | moments)
            artifact.read_model(settings.trunk, published)
            log.say(f"frozen      {len(frozen)} tensors, digest {frozen_before[:12]} before and after")
            log.say(f"published   {published} (digest {digest[:12]}, read back and verified)")
        accelerator.wait_for_everyone()
    stop.done, exit_code = True, stop.exit_code if interrupted else 0
    log.close(exit_code)
    output.release(claimed)
    return exit_code


if __name__ == "__main__":
    config.run(main, config.read(Settings, __doc__, config.problems))
