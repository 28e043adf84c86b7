"""A run's own memory: `accelerator.save_state`, made atomic and verified, and what it leaves out, as JSON.

OUTPUT/checkpoints/step-00000100/  model.safetensors (the trained tensors only), optimizer.bin, random_states_*.pkl,
                                   progress.json, manifest.json (size and SHA-256 of every file)
A folder has its name only when it is whole and on the disk. What accelerate pickles is opened only after the manifest
was verified, and with weights_only=True: a planted pickle is refused, not run. Checkpoints are private all the same (an
artifact is what one gives away).
"""

import dataclasses
import errno
import hashlib
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from .config import differences
from .errors import UserError
from .files import is_full, lack_of_room, read_json, sync, sync_folder, write_json
from .progress import Progress, check_same, read_progress


def keep_only_trained(accelerator: Any) -> None:
    """Makes save_state write, and load_state expect, exactly the parameters that require a gradient.

    The names are the bare model's, so a checkpoint of one process loads into many and back. FSDP and DeepSpeed write their
    own sharded files instead (accelerate hands these hooks nothing there).
    """

    def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        bare = accelerator.unwrap_model(model, keep_torch_compile=False)
        return {name: parameter for name, parameter in bare.named_parameters() if parameter.requires_grad}

    def before_save(models: list, weights: list, folder: str) -> None:
        for model, state in zip(models, weights, strict=False):
            state.clear()
            state.update({name: parameter.detach() for name, parameter in trained(model).items()})

    def before_load(models: list, folder: str) -> None:
        while models:
            parameters, stored = trained(models.pop()), load_file(Path(folder, "model.safetensors"))
            odd = differences(_shapes(parameters), _shapes(stored))
            for name, (ours, theirs) in odd.items():
                raise UserError(f"{folder}: this run trains {name} as {ours}, the checkpoint holds it as {theirs}")
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(stored[name])

    accelerator.register_save_state_pre_hook(before_save)
    accelerator.register_load_state_pre_hook(before_load)


def _shapes(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    return {name: f"{tuple(tensor.shape)} {tensor.dtype}" for name, tensor in tensors.items()}


def size(model: torch.nn.Module) -> int:
    """Bytes that a checkpoint of `model` takes, about: what is trained, and AdamW's two moments of it."""
    return (1 << 16) + 3 * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def save(
    accelerator: Any,
    model: torch.nn.Module,
    folder: Path,
    progress: Progress,
    keep: int,
    *,
    must: bool,
    say: Callable[[str], None],
) -> None:
    """Writes OUTPUT/checkpoints/step-N beside its name, verifiable and synced, renames it, then rotates. A collective.

    Kept are the `keep` newest and the best by validation. Where the disk is full, what was written is removed, the older
    ones stay, and the message says how much was missing; if it `must` succeed, that is a UserError on all ranks.
    """
    final = folder / f"step-{progress.global_step:08d}"
    aside = folder / f".tmp-{final.name}"
    if final.exists():
        return

    def begin() -> None:
        if accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            sync_folder(folder.parent)
            if shutil.disk_usage(folder).free < size(model):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(aside))

    def finish() -> None:
        if accelerator.is_main_process:
            write_json(aside / "progress.json", dataclasses.asdict(progress))
            write_json(aside / "manifest.json", _manifest(aside))
            sync(aside)
            aside.rename(final)
            sync_folder(folder)
            _rotate(folder, keep, progress.best_step)

    work = (begin, lambda: accelerator.save_state(str(aside)), finish)
    if all(_found_room(accelerator, folder, part) for part in work):
        return
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
    said = f"the checkpoint of update {progress.global_step} was not saved: {lack_of_room(folder, size(model))}"
    if must:
        raise UserError(f"{said} The older ones are kept; the same command goes on from the newest.")
    say(f"{said} The older ones are kept; the run goes on (--on-full-disk).")


def _found_room(accelerator: Any, folder: Path, work: Callable[[], None]) -> bool:
    """Does `work` on every rank; whether the disk had room for it on all of them. A collective."""
    full = False
    try:
        work()
    except Exception as reason:
        if not is_full(folder, reason):
            raise
        full = True
    return not accelerator.reduce(torch.tensor(float(full), device=accelerator.device), "sum").item()


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)} for path in files
    }


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _rotate(folder: Path, keep: int, best_step: int) -> None:
    """Deletes all but the `keep` newest and the best; a folder loses its name before it loses its files."""
    for path in _found(folder)[:-keep]:
        if path.name != f"step-{best_step:08d}":
            doomed = path.with_name(f".old-{path.name}")
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def _found(folder: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit())


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint: the first file that is missing, surplus or not what the manifest says."""
    try:
        manifest = read_json(folder / "manifest.json")
        found = _manifest(folder)
    except (OSError, UserError) as reason:
        return f"manifest.json: {reason}"
    changed = differences(manifest, found)
    for name, (stated, seen) in changed.items():
        return f"{name}: {seen or 'missing'}, the manifest says {stated or 'nothing of it'}"
    return None


def newest(accelerator: Any, folder: Path) -> Path | None:
    """The newest checkpoint that verifies, or None; damaged ones are named and set aside. A collective.

    UserError where there are damaged ones alone: to begin anew would be to lose the run in silence.
    """
    chosen: list[str | None] = [None]
    if accelerator.is_main_process and folder.is_dir():
        for leftover in [*folder.glob(".tmp-step-*"), *folder.glob(".old-step-*")]:
            shutil.rmtree(leftover, ignore_errors=True)
        good = next((path for path in reversed(_found(folder)) if verified(path)), None)
        broken = sorted(path.name for path in folder.glob("step-*.broken*"))
        if broken and good is None:
            raise UserError(
                f"{folder} holds damaged checkpoints only: {', '.join(broken)}. Restore one from a backup (under its name "
                "without .broken), delete them to begin anew, or name another --output-dir."
            )
        chosen = [str(good) if good else None]
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(chosen, src=0)
    return Path(chosen[0]) if chosen[0] else None


def verified(path: Path) -> bool:
    """Whether every file is what the manifest says; a checkpoint that is not is named and set aside."""
    wrong = fault(path)
    if wrong is None:
        return True
    aside, number = path.with_name(f"{path.name}.broken"), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.broken-{number}")
    print(f"{path} is damaged ({wrong}); set aside as {aside.name}", flush=True)
    path.rename(aside)
    return False


def resume(accelerator: Any, path: Path, fresh: Progress, accepted: tuple[str, ...]) -> Progress:
    """Loads a verified checkpoint into what was prepared, and returns its progress under the settings of `fresh`.

    Refuses, before anything in memory is changed, a run whose settings or data differ, with the difference.
    """
    before = read_progress(path / "progress.json")
    check_same(before, fresh, accepted, path)
    load(accelerator, path)
    # accelerate counts micro-batches across runs; with another division of the batch it would be out of step.
    accelerator.step = 0
    return dataclasses.replace(before, settings=fresh.settings)


def load(accelerator: Any, path: Path) -> None:
    """The tensors of a verified checkpoint into what was prepared; what cannot be opened is refused before anything changes."""
    custom = sorted(file.name for file in path.glob("custom_checkpoint_*"))
    if custom:  # accelerate opens these with weights_only=False
        raise UserError(f"{path / custom[0]} is not one of ours, and is not opened. Do not use this checkpoint.")
    for file in sorted([*path.glob("*.bin"), *path.glob("*.pt")]):
        try:
            torch.load(file, map_location="meta", mmap=True, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, ValueError, KeyError, EOFError, OSError) as reason:
            first = str(reason).split(". ")[0]
            raise UserError(f"{file} holds other things than tensors ({first}). Do not use this checkpoint.") from None
    accelerator.load_state(str(path))


def load_best(accelerator: Any, folder: Path, progress: Progress, say: Callable[[str], None]) -> bool:
    """Loads the best weights by validation, if they are others than the present ones and whole. A collective."""
    if progress.best_step in (0, progress.global_step):
        return False
    path, found = folder / f"step-{progress.best_step:08d}", [False]
    if accelerator.is_main_process:
        found = [path.is_dir() and verified(path)]
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(found, src=0)
    if found[0]:
        load(accelerator, path)
        say(f"publishing the best weights by validation, those of update {progress.best_step}")
    else:
        said = f"the best weights by validation, of update {progress.best_step}, are lost or damaged"
        say(f"{said}; publishing the newest, of update {progress.global_step}")
        progress.best_step, progress.best_val_loss = progress.global_step, None
    return found[0]


def check_fresh(settings: Any, found: Path | None) -> None:
    """Refuses --resume require without a checkpoint, and a fresh start among another run's checkpoints."""
    folder = Path(settings.output_dir) / "checkpoints"
    if settings.resume == "require" and not found:
        raise UserError(
            f"--resume require, but {folder} holds no complete checkpoint. Use --resume auto to start afresh."
        )
    if settings.resume == "never" and folder.is_dir() and _found(folder):
        raise UserError(
            f"--resume never, but {folder} holds checkpoints of an earlier run. Name another --output-dir, or delete it."
        )
