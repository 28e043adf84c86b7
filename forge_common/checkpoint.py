"""A run's own memory: `accelerator.save_state`, made atomic and verified, and what it leaves out, as JSON.

OUTPUT/checkpoints/step-00000100/  model.safetensors (the trained tensors only), optimizer.bin, random_states_*.pkl,
                                   progress.json, manifest.json (size and SHA-256 of every file)
A folder has its name only when it is whole and on the disk. What accelerate pickles is opened only after the manifest
was verified. Checkpoints are private: nobody should load one from a stranger (an artifact is what one gives away).
"""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from .config import differences, to_json
from .errors import UserError
from .files import sync, sync_folder, write_json

# What a resumed run may change without a word: none of it changes what is learned, or in which order.
FREE = {"output_dir", "resume", "accept_change", "micro_batch_size", "log_every", "save_every", "val_every", "keep"}
FREE |= {"tracker", "project", "run_name", "cache_dir", "dry_run", "patience", "max_bad_updates"}
# What it may change by saying so (--accept-change): the data's order and the model's shape stay what they were.
ACCEPTABLE = {"steps", "lr", "schedule", "warmup_steps", "min_lr_ratio", "weight_decay", "max_grad_norm", "licence"}


@dataclasses.dataclass
class Progress:
    """Where a run is. Everything a resume needs and `save_state` does not keep."""

    run_id: str
    settings: dict[str, Any]
    data: dict[str, Any]  # digests of the tokens of each source, and of the tokenizer and the trunk
    global_step: int = 0  # updates done; the next one takes the windows from global_step * batch_size on
    epoch: float = 0.0
    tokens: int = 0  # scored tokens seen
    best_val_loss: float | None = None
    best_step: int = 0
    validations_without_gain: int = 0
    bad_updates: int = 0  # not applied, for a gradient that was NaN or Inf
    bad_in_a_row: int = 0
    scaler_skips: int = 0  # fp16: not applied while the loss scale was looking for its place
    seconds: float = 0.0  # spent in updates
    expert_counts: list[list[int]] = dataclasses.field(default_factory=list)  # of the last update; the balance loss's f
    interval: list[float] = dataclasses.field(default_factory=list)  # sums since the last line of the log
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)  # what a script wants to know again at its end


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
            if parameters.keys() != stored.keys():
                odd = sorted(parameters.keys() ^ stored.keys())
                raise UserError(f"{folder}: the checkpoint holds other tensors than this run trains, first {odd[0]}")
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(stored[name])

    accelerator.register_save_state_pre_hook(before_save)
    accelerator.register_load_state_pre_hook(before_load)


def save(accelerator: Any, folder: Path, progress: Progress, keep: int) -> None:
    """Writes OUTPUT/checkpoints/step-N beside its name, verifiable and synced, renames it, then rotates. A collective.

    Kept are the `keep` newest and the best by validation.
    """
    final = folder / f"step-{progress.global_step:08d}"
    aside = folder / f".tmp-{final.name}"
    if final.exists():
        return
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(aside))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(aside / "progress.json", dataclasses.asdict(progress))
        write_json(aside / "manifest.json", _manifest(aside))
        sync(aside)
        aside.rename(final)
        sync_folder(folder)
        _rotate(folder, keep, progress.best_step)
    accelerator.wait_for_everyone()


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
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        found = _manifest(folder)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as reason:
        return f"manifest.json: {reason}"
    changed = differences(manifest, found)
    for name, (stated, seen) in changed.items():
        return f"{name}: {seen or 'missing'}, the manifest says {stated or 'nothing of it'}"
    return None


def newest(accelerator: Any, folder: Path) -> Path | None:
    """The newest checkpoint that verifies, or None; damaged ones are named and set aside. A collective."""
    chosen: list[str | None] = [None]
    if accelerator.is_main_process and folder.is_dir():
        for leftover in [*folder.glob(".tmp-step-*"), *folder.glob(".old-step-*")]:
            shutil.rmtree(leftover, ignore_errors=True)
        for path in reversed(_found(folder)):
            wrong = fault(path)
            if wrong is None:
                chosen = [str(path)]
                break
            print(f"{path} is damaged ({wrong}); set aside as {path.name}.broken", flush=True)
            path.rename(path.with_name(f"{path.name}.broken"))
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(chosen, src=0)
    return Path(chosen[0]) if chosen[0] else None


def read_progress(path: Path) -> Progress:
    return Progress(**json.loads((path / "progress.json").read_text(encoding="utf-8")))


def resume(accelerator: Any, path: Path, fresh: Progress, accepted: tuple[str, ...]) -> Progress:
    """Loads a checkpoint into what was prepared, and returns its progress under the settings of `fresh`.

    Refuses, before anything in memory is changed, a run whose settings or data differ, with the difference.
    """
    progress = read_progress(path)
    changed = differences(progress.settings, fresh.settings) | {
        f"digest of {name}": (str(old)[:12], str(new)[:12])
        for name, (old, new) in differences(progress.data, fresh.data).items()
    }
    said = {name.replace("-", "_") for name in accepted} & ACCEPTABLE
    refused = {name: pair for name, pair in changed.items() if name not in FREE | said}
    if refused:
        lines = "\n".join(f"  {name}: {before!r} -> {now!r}" for name, (before, now) in refused.items())
        mend = [f"--accept-change {name.replace('_', '-')}" for name in refused if name in ACCEPTABLE]
        raise UserError(
            f"{path} is of a run with other settings or data:\n{lines}\n"
            + (f"Say so with {' '.join(mend)}, " if len(mend) == len(refused) else "Restore them, ")
            + "or start another run with another --output-dir."
        )
    accelerator.load_state(str(path))
    # accelerate counts micro-batches across runs; with another division of the batch it would be out of step.
    accelerator.step = 0
    progress.settings = fresh.settings
    return progress


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


def begin(settings: Any, data: dict[str, Any], run_id: str) -> Progress:
    """The progress of a run that has not begun."""
    return Progress(run_id=run_id, settings=to_json(settings), data=data)
