"""Checkpoints of a run: `accelerator.save_state`, made atomic and verified, and the run's progress as JSON.

OUTPUT/checkpoints/step-00000100/  model.safetensors (the trained tensors only), optimizer.bin, scaler.pt (fp16),
                                   random_states_*.pkl, progress.json, manifest.json (size and SHA-256 of every file)
The format is the same under every engine and for any number of processes: what an engine divides is gathered first
(run/engines.py). A folder gets its name only when it is complete and synced.

A folder with any other file is refused. The pickles among the files are opened only after the manifest was verified,
and with weights_only=True, so that a manipulated one is refused. Checkpoints are private to the run; artifacts are what
is published.
"""

import dataclasses
import pickle
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from .errors import UserError
from .files.tensors import Tensors
from .run import zero_state
from .run.checkpoint_folder import checkpoints_of, complete, fault, newest_intact, verify_or_rename
from .run.engines import engine_of, model_and_optimizer, trained_tensors, unwrap
from .run.progress import Progress, check_same, read_progress
from .run.totals import from_main_process
from .settings import differences

FILES = re.compile(r"model\.safetensors|optimizer\.bin|scaler\.pt|random_states_\d+\.pkl|progress\.json|manifest\.json")
# Entries of the optimizer's parameter groups that follow this run's settings, not the checkpoint: --accept-change lets
# them differ.
CONSTANTS = {"weight_decay", "betas", "eps"}


def full_tensors(accelerator: Any, model: torch.nn.Module) -> Tensors:
    """All tensors of the prepared `model`, whole, under the names that it had before.

    The main process alone gets them. A collective.
    """
    if accelerator.state.deepspeed_plugin:
        return zero_state.full_tensors(unwrap(accelerator, model), accelerator.is_main_process)
    return accelerator.get_state_dict(unwrap(accelerator, model), unwrap=False)


def _load_weights(accelerator: Any, models: list, folder: str) -> None:
    """A hook of load_state: loads the trained tensors, and empties `models`.

    load_state itself would look for all parameters of each model that is left in `models`, and a checkpoint holds only
    those that require a gradient. The names are those of the unwrapped model, so a checkpoint of one process loads into
    many and back.
    """
    while models:
        parameters = trained_tensors(unwrap(accelerator, models.pop()))
        stored = _stored_weights(Path(folder), parameters)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(stored[name])


def _stored_weights(folder: Path, parameters: Tensors) -> Tensors:
    """The tensors of a checkpoint, memory-mapped; UserError where the run trains others than `parameters`."""
    stored = load_file(folder / "model.safetensors")
    changed = differences(_shapes(parameters), _shapes(stored))
    if changed:
        name, (ours, theirs) = next(iter(changed.items()))
        raise UserError(
            f"{folder}: this run trains {name} as {ours}, the checkpoint holds it as {theirs}. "
            "Resume with the settings of the checkpoint, or name another --output-dir."
        )
    return stored


def _shapes(tensors: Tensors) -> dict[str, str]:
    return {name: f"{tuple(tensor.shape)} {tensor.dtype}" for name, tensor in tensors.items()}


def newest(accelerator: Any, folder: Path) -> Path | None:
    """The newest checkpoint that verifies, or None (`newest_intact`). A collective."""
    chosen: Path | None = None
    if accelerator.is_main_process and folder.is_dir():
        chosen = newest_intact(folder)
    return from_main_process(accelerator, chosen)


def resume(accelerator: Any, settings: Any, fresh: Progress) -> Progress:
    """Loads the newest checkpoint that verifies, if there is one, and returns its progress.

    fresh: the progress of a new run, before its first update; it is returned where there is nothing to resume. A dry
    run loads nothing. UserError, with the differences, where the checkpoint has other settings or data; nothing in
    memory has changed then. A collective.
    """
    folder = checkpoints_of(settings)
    path = None if settings.resume == "never" or settings.dry_run else newest(accelerator, folder)
    _check_resume_flag(settings, folder, path)
    if path is None:
        return fresh
    before = read_progress(path / "progress.json")
    check_same(before, fresh, settings, path)
    if settings.steps < before.global_step:
        raise UserError(
            f"{path} has {before.global_step} updates, more than the {settings.steps} of this run. Raise --steps (or "
            "--epochs), or start another run with another --output-dir."
        )
    constants = [{name: group[name] for name in CONSTANTS & group.keys()} for group in _groups(accelerator)]
    load(accelerator, path)
    for group, own in zip(_groups(accelerator), constants, strict=True):
        group.update(own)
    # accelerate counts micro-batches across runs; with another division of the batch it would be out of step.
    accelerator.step = 0
    accelerator.print(f"resumed     {path} at update {before.global_step} of {settings.steps}")
    return dataclasses.replace(before, settings=fresh.settings)


def _groups(accelerator: Any) -> list[dict[str, Any]]:
    """The parameter groups of the prepared optimizers; a load replaces them with those of the checkpoint."""
    return [group for optimizer in accelerator._optimizers for group in optimizer.param_groups]


def _check_resume_flag(settings: Any, folder: Path, path: Path | None) -> None:
    """UserError for --resume require without a checkpoint, and for --resume never with checkpoints of another run."""
    if settings.resume == "require" and path is None:
        would_resume = settings.dry_run and any(fault(candidate) is None for candidate in complete(folder))
        if not would_resume:
            raise UserError(
                f"--resume require, but {folder} holds no complete checkpoint. Use --resume auto to start a new run."
            )
    if settings.resume == "never" and not settings.dry_run and complete(folder):
        raise UserError(
            f"--resume never, but {folder} holds checkpoints of an earlier run. Name another --output-dir, or delete "
            "it."
        )


def load(accelerator: Any, path: Path) -> None:
    """Loads a verified checkpoint into what was prepared. A collective.

    UserError, before anything changes, where it holds files that this version does not write, or more than tensors.
    """
    foreign = sorted(file.name for file in path.iterdir() if not FILES.fullmatch(file.name))
    if foreign:  # accelerate and DeepSpeed would open them with weights_only=False
        raise UserError(
            f"{path / foreign[0]} is not part of a checkpoint of this version, and is not opened. If an earlier "
            "version wrote it under FSDP or DeepSpeed, finish the run with that version; otherwise do not use this "
            "checkpoint."
        )
    for file in sorted([*path.glob("*.bin"), *path.glob("*.pt")]):
        _tensors_only(file, map_location="meta")
    engine = engine_of(accelerator)
    if engine is None:
        hook = accelerator.register_load_state_pre_hook(partial(_load_weights, accelerator))
        try:
            accelerator.load_state(str(path))
        finally:
            hook.remove()
        return
    wrapped, optimizer = model_and_optimizer(accelerator)
    model = unwrap(accelerator, wrapped)
    weights = _stored_weights(path, trained_tensors(model))
    engine.scatter(model, optimizer, weights, _tensors_only(path / "optimizer.bin", map_location="cpu"))
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(_tensors_only(path / "scaler.pt", map_location="cpu"))


def _tensors_only(file: Path, map_location: str) -> Any:
    """Opens a file of torch.save, memory-mapped; UserError where it holds more than tensors."""
    try:
        return torch.load(file, map_location=map_location, mmap=True, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, KeyError, EOFError, OSError) as reason:
        first = str(reason).split(". ")[0]
        raise UserError(f"{file} holds objects other than tensors ({first}). Do not use this checkpoint.") from None


def load_best(accelerator: Any, settings: Any, progress: Progress, print_line: Callable[[str], None]) -> bool:
    """Loads the best weights by validation, unless they are the present ones or are damaged. A collective.

    Nothing is trained after it: the optimizer's state is freed, so that publishing needs no more memory than training.
    """
    if progress.best_step in (0, progress.global_step):
        _free_optimizer_state(accelerator)
        return False
    path = checkpoints_of(settings) / f"step-{progress.best_step:08d}"
    is_intact = accelerator.is_main_process and path.is_dir() and verify_or_rename(path)
    is_intact = from_main_process(accelerator, is_intact)
    if is_intact:
        load(accelerator, path)
        print_line(f"publishing the best weights by validation, those of update {progress.best_step}")
    else:
        lost = f"the best weights by validation, of update {progress.best_step}, are missing or damaged"
        print_line(f"{lost}; publishing the newest, of update {progress.global_step}")
        progress.best_step = progress.global_step
        progress.best_val_loss = None
        progress.best_tokens = progress.tokens
    _free_optimizer_state(accelerator)
    return is_intact


def _free_optimizer_state(accelerator: Any) -> None:
    """Drops the gradients and AdamW's two moments. DeepSpeed keeps them in its own partitions, where they stay."""
    if not accelerator.state.deepspeed_plugin:
        model, optimizer = model_and_optimizer(accelerator)
        optimizer.state.clear()
        model.zero_grad()
