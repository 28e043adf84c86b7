"""Checkpoints of a run: `accelerator.save_state`, made atomic and verified, and the run's progress as JSON.

OUTPUT/checkpoints/step-00000100/  model.safetensors (the trained tensors only), optimizer.bin, scaler.pt (fp16),
                                   random_states_*.pkl, progress.json, manifest.json (size and SHA-256 of every file)
The format is the same under every engine and for any number of processes: what an engine divides is gathered first (run/engines.py).
A folder gets its name only when it is complete and synced. No other files are opened, and those that torch pickles only after the
manifest was verified, and with weights_only=True, so that a manipulated pickle is refused. Checkpoints are private to the
run; artifacts are what is published.
"""

import dataclasses
import errno
import hashlib
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .errors import UserError
from .files.atomic import is_full, lack_of_room, read_json, sync, sync_folder, write_json
from .files.tensors import Tensors
from .run import zero
from .run.engines import engine_of, trained
from .run.progress import Progress, check_same, read_progress
from .settings import differences

FILES = re.compile(r"model\.safetensors|optimizer\.bin|scaler\.pt|random_states_\d+\.pkl|progress\.json|manifest\.json")
# Of the optimizer: of this run's settings, not of the checkpoint, where --accept-change lets them differ.
CONSTANTS = {"weight_decay", "betas", "eps"}


def checkpoint_trainable_only(accelerator: Any) -> None:
    """Makes save_state write, and load_state expect, only the parameters that require a gradient.

    The names are those of the unwrapped model, so a checkpoint of one process loads into many and back.
    """

    def before_save(models: list, weights: list, folder: str) -> None:
        for model, state in zip(models, weights, strict=True):
            state.clear()
            state.update({name: parameter.detach() for name, parameter in trained(_bare(accelerator, model)).items()})

    def before_load(models: list, folder: str) -> None:
        while models:
            parameters = trained(_bare(accelerator, models.pop()))
            stored = _stored_weights(Path(folder), parameters)
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(stored[name])

    accelerator.register_save_state_pre_hook(before_save)
    accelerator.register_load_state_pre_hook(before_load)


def _bare(accelerator: Any, model: torch.nn.Module) -> torch.nn.Module:
    return accelerator.unwrap_model(model, keep_torch_compile=False)


def full_tensors(accelerator: Any, model: torch.nn.Module) -> Tensors:
    """All tensors of the prepared `model`, whole, under the names that it had before. A collective; on the main process only."""
    if accelerator.state.deepspeed_plugin:
        return zero.full_tensors(_bare(accelerator, model), accelerator.is_main_process)
    return accelerator.get_state_dict(_bare(accelerator, model))


def _stored_weights(folder: Path, parameters: Tensors) -> Tensors:
    """The tensors of a checkpoint, memory-mapped; UserError where the run trains others than `parameters`."""
    stored = load_file(folder / "model.safetensors")
    changed = differences(_shapes(parameters), _shapes(stored))
    for name, (ours, theirs) in changed.items():
        raise UserError(
            f"{folder}: this run trains {name} as {ours}, the checkpoint holds it as {theirs}. "
            "Resume with the settings of the checkpoint, or name another --output-dir."
        )
    return stored


def _shapes(tensors: Tensors) -> dict[str, str]:
    return {name: f"{tuple(tensor.shape)} {tensor.dtype}" for name, tensor in tensors.items()}


def size(model: torch.nn.Module) -> int:
    """Approximate bytes of a checkpoint of `model`: the trained parameters and AdamW's two moments of them."""
    return (1 << 16) + 3 * sum(parameter.numel() * parameter.element_size() for parameter in trained(model).values())


def save(
    accelerator: Any,
    model: torch.nn.Module,
    settings: Any,
    progress: Progress,
    *,
    required: bool,
    print_line: Callable[[str], None],
) -> None:
    """Writes OUTPUT/checkpoints/step-N under a temporary name, with a manifest, syncs and renames it. A collective.

    Then all but the settings.keep newest and the best by validation are deleted. Where the disk is full, the partial
    checkpoint is removed, the older ones stay, and the message says how much space is missing; if the checkpoint is
    `required`, that is a UserError on all ranks.
    """
    folder = checkpoints_of(settings)
    final = folder / f"step-{progress.global_step:08d}"
    partial = folder / f".tmp-{final.name}"
    if final.exists():
        return

    def begin() -> None:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            sync_folder(folder.parent)
            if shutil.disk_usage(folder).free < size(model):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(partial))

    def finish() -> None:
        if accelerator.is_main_process:
            write_json(partial / "progress.json", dataclasses.asdict(progress))
            write_json(partial / "manifest.json", manifest(partial))
            sync(partial)
            partial.rename(final)
            sync_folder(folder)
            _rotate(folder, settings.keep, progress.best_step)

    parts = (begin, lambda: _write(accelerator, partial), finish)
    if all(_has_room(accelerator, folder, part) for part in parts):
        return
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    message = f"the checkpoint of update {progress.global_step} was not saved: {lack_of_room(folder, size(model))}"
    if required:
        raise UserError(f"{message} The older ones are kept. Run the same command to resume from the newest.")
    print_line(f"{message} The older ones are kept, and the run continues (--on-full-disk).")


def _write(accelerator: Any, folder: Path) -> None:
    """Writes the state of what was prepared: by save_state, or on the main process alone what the engine gathers. A collective."""
    engine = engine_of(accelerator)
    if engine is None:
        accelerator.save_state(str(folder))
        return
    model, optimizer = _prepared(accelerator)
    weights, optimizer_state = engine.gather(_bare(accelerator, model), optimizer, accelerator.is_main_process)
    if accelerator.is_main_process:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        torch.save(optimizer_state, folder / "optimizer.bin")
        if accelerator.scaler is not None:
            torch.save(accelerator.scaler.state_dict(), folder / "scaler.pt")


def _prepared(accelerator: Any) -> tuple[torch.nn.Module, Any]:
    """The model and the optimizer that accelerate prepared, from where its save_state and load_state take them too."""
    return accelerator._models[0], accelerator._optimizers[0]


def _has_room(accelerator: Any, folder: Path, work: Callable[[], None]) -> bool:
    """Calls `work` on every rank; whether the disk had room for it on all of them. A collective."""
    full = False
    try:
        work()
    except Exception as reason:
        if not is_full(folder, reason):
            raise
        full = True
    return not accelerator.reduce(torch.tensor(float(full), device=accelerator.device), "sum").item()


def manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file of a checkpoint, without manifest.json."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)} for path in files
    }


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _rotate(folder: Path, keep: int, best_step: int) -> None:
    """Deletes all but the `keep` newest and the best; a folder is renamed before its files are deleted."""
    for path in _complete(folder)[:-keep]:
        if path.name != f"step-{best_step:08d}":
            removed = path.with_name(f".old-{path.name}")
            path.rename(removed)
            shutil.rmtree(removed, ignore_errors=True)


def _complete(folder: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit())


def fault(folder: Path) -> str | None:
    """The first file of a checkpoint that is missing, surplus or different from the manifest; None where it verifies."""
    try:
        expected_files = read_json(folder / "manifest.json")
        present = manifest(folder)
    except (OSError, UserError) as reason:
        return f"manifest.json: {reason}"
    changed = differences(expected_files, present)
    for name, (expected, actual) in changed.items():
        return f"{name}: {actual or 'missing'}, the manifest has {expected or 'no such file'}"
    return None


def newest(accelerator: Any, folder: Path) -> Path | None:
    """The newest checkpoint that verifies, or None; damaged ones are reported and renamed. A collective.

    UserError where all are damaged: a run that starts again would silently discard the old one.
    """
    chosen: list[str | None] = [None]
    if accelerator.is_main_process and folder.is_dir():
        for leftover in [*folder.glob(".tmp-step-*"), *folder.glob(".old-step-*")]:
            shutil.rmtree(leftover, ignore_errors=True)
        good = next((path for path in reversed(_complete(folder)) if verified(path)), None)
        broken = sorted(path.name for path in folder.glob("step-*.broken*"))
        if broken and good is None:
            raise UserError(
                f"{folder} holds only damaged checkpoints: {', '.join(broken)}. Restore one from a backup (under its name "
                "without .broken), delete them to start again, or name another --output-dir."
            )
        chosen = [str(good) if good else None]
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(chosen, src=0)
    return Path(chosen[0]) if chosen[0] else None


def verified(path: Path) -> bool:
    """Whether every file matches the manifest; a damaged checkpoint is reported and renamed to step-N.broken."""
    wrong = fault(path)
    if wrong is None:
        return True
    renamed = path.with_name(f"{path.name}.broken")
    number = 1
    while renamed.exists():
        number += 1
        renamed = path.with_name(f"{path.name}.broken-{number}")
    print(f"{path} is damaged ({wrong}); renamed to {renamed.name}", flush=True)
    path.rename(renamed)
    return False


def resume(accelerator: Any, settings: Any, fresh: Progress) -> Progress:
    """Loads the newest checkpoint that verifies, if there is one, and returns its progress.

    fresh: the progress of this run before its first update, returned where there is nothing to resume. UserError, with the
    differences, where the checkpoint has other settings or data; nothing in memory has changed then. A dry run loads
    nothing. A collective.
    """
    folder = checkpoints_of(settings)
    path = None if settings.resume == "never" or settings.dry_run else newest(accelerator, folder)
    _check_fresh(settings, folder, path)
    if path is None:
        return fresh
    before = read_progress(path / "progress.json")
    check_same(before, fresh, settings, path)
    ours = [{name: group[name] for name in CONSTANTS & group.keys()} for group in _groups(accelerator)]
    load(accelerator, path)
    for group, constants in zip(_groups(accelerator), ours, strict=True):
        group.update(constants)
    # accelerate counts micro-batches across runs; with another division of the batch it would be out of step.
    accelerator.step = 0
    accelerator.print(f"resumed     {path} at update {before.global_step} of {settings.steps}")
    return dataclasses.replace(before, settings=fresh.settings)


def _groups(accelerator: Any) -> list[dict[str, Any]]:
    """The parameter groups of the prepared optimizers; a load replaces them with those of the checkpoint."""
    return [group for optimizer in accelerator._optimizers for group in optimizer.param_groups]


def _check_fresh(settings: Any, folder: Path, path: Path | None) -> None:
    """UserError for --resume require without a checkpoint, and for --resume never with checkpoints of another run."""
    if settings.resume == "require" and path is None:
        sound = settings.dry_run and any(fault(candidate) is None for candidate in _complete(folder))
        if not sound:
            raise UserError(
                f"--resume require, but {folder} holds no complete checkpoint. Use --resume auto to start a new run."
            )
    if settings.resume == "never" and not settings.dry_run and _complete(folder):
        raise UserError(
            f"--resume never, but {folder} holds checkpoints of an earlier run. Name another --output-dir, or delete it."
        )


def checkpoints_of(settings: Any) -> Path:
    """OUTPUT/checkpoints."""
    return Path(settings.output_dir) / "checkpoints"


def load(accelerator: Any, path: Path) -> None:
    """Loads a verified checkpoint into what was prepared. A collective.

    UserError, before anything changes, where it holds files that this version does not write, or more than tensors.
    """
    foreign = sorted(file.name for file in path.iterdir() if not FILES.fullmatch(file.name))
    if foreign:  # accelerate and DeepSpeed would open them with weights_only=False
        raise UserError(
            f"{path / foreign[0]} is not part of a checkpoint of this version, and is not opened. If an earlier version wrote it under "
            "FSDP or DeepSpeed, finish the run with that version; otherwise do not use this checkpoint."
        )
    for file in sorted([*path.glob("*.bin"), *path.glob("*.pt")]):
        _tensors_only(file, map_location="meta")
    engine = engine_of(accelerator)
    if engine is None:
        accelerator.load_state(str(path))
        return
    model, optimizer = _prepared(accelerator)
    bare = _bare(accelerator, model)
    weights = _stored_weights(path, trained(bare))
    engine.scatter(bare, optimizer, weights, _tensors_only(path / "optimizer.bin", map_location="cpu"))
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
    """Loads the best weights by validation, unless they are the present ones or are damaged. A collective."""
    if progress.best_step in (0, progress.global_step):
        return False
    path = checkpoints_of(settings) / f"step-{progress.best_step:08d}"
    loadable = [False]
    if accelerator.is_main_process:
        loadable = [path.is_dir() and verified(path)]
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(loadable, src=0)
    if loadable[0]:
        load(accelerator, path)
        print_line(f"publishing the best weights by validation, those of update {progress.best_step}")
    else:
        lost = f"the best weights by validation, of update {progress.best_step}, are missing or damaged"
        print_line(f"{lost}; publishing the newest, of update {progress.global_step}")
        progress.best_step, progress.best_val_loss = progress.global_step, None
        progress.best_tokens = progress.tokens
    return loadable[0]
