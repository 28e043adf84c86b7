"""The writer of checkpoints: the loop waits for a copy of the trained state, which a thread writes (docs/DESIGN.md)."""

import dataclasses
import errno
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from safetensors.torch import save_file

from ..errors import UserError
from ..files.atomic import is_full, lack_of_room, sync_folder
from ..files.tensors import Tensors
from .checkpoint_folder import checkpoints_of, commit, rotate
from .engines import engine_of, in_host_memory, model_and_optimizer, trained_tensors, unwrap
from .folder import check_still_there
from .progress import Progress

TENSORS = ("model.safetensors", "optimizer.bin")


class State(NamedTuple):
    """The content of TENSORS: the trained tensors by name, and torch's `optimizer.state_dict()`."""

    weights: Tensors
    optimizer: dict[str, Any]


NO_TENSORS = State({}, {})


@dataclass
class Save:
    """A checkpoint that is being written."""

    final: Path
    partial: Path
    """The folder's name until it is complete."""
    progress: dict[str, Any]
    """The content of progress.json."""
    num_bytes: int
    required: bool
    """Whether the run ends with an error if it cannot be written."""
    in_background: bool
    """Whether the loop goes on while it is written."""
    print_line: Callable[[str], None]
    state: State = NO_TENSORS
    """On the main process, once it is taken."""


def size(model: torch.nn.Module) -> int:
    """Approximate bytes of a checkpoint of `model`: the trained parameters and AdamW's two moments of them."""
    trained = trained_tensors(model).values()
    return (1 << 16) + 3 * sum(parameter.numel() * parameter.element_size() for parameter in trained)


class Writer:
    """Writes the checkpoints of a run in a background thread.

    The loop waits for a copy of the trained state in host memory (12 bytes for a float32 parameter, on the main
    process, from the first copy to the end of the run). A thread writes, hashes, syncs and renames. The loop waits for
    the thread, and no copy is made, where the checkpoint is `required` or its copy would take more than half of the
    free memory.
    """

    def __init__(self, accelerator: Any, model: torch.nn.Module, settings: Any):
        self.accelerator = accelerator
        self.model = model
        self.settings = settings
        self._thread: Future[None] | None = None
        self._copy: State | None = None  # its memory is used again

    def save(self, progress: Progress, *, required: bool, print_line: Callable[[str], None]) -> None:
        """Writes OUTPUT/checkpoints/step-N under a temporary name, with a manifest, syncs and renames it. A collective.

        Waits for the checkpoint before this one. Returns when the state is copied or, without a copy, when this one has
        its name. Then all but the settings.keep newest and the best by validation are deleted. Where the disk is full,
        the partial checkpoint is removed, the older ones stay, and the message says how much space is missing; if the
        checkpoint is `required`, that is a UserError on all ranks. So is an output directory that is gone. Another
        error is raised on all ranks; one in the thread is printed at once and raised by the next `save`.
        """
        folder = checkpoints_of(self.settings)
        name = f"step-{progress.global_step:08d}"
        if (folder / name).exists():
            return
        content = dataclasses.asdict(progress)  # a copy: the loop changes the other
        save = Save(
            final=folder / name,
            partial=folder / f".tmp-{name}",
            progress=content,
            num_bytes=size(self.model),
            required=required,
            in_background=not required,
            print_line=print_line,
        )
        for step in (self._make_folder, self._take_state, self._start_thread):
            if not self._run_on_all_ranks(step, save):
                self._give_up(save)
                return

    def _make_folder(self, save: Save) -> None:
        if self.accelerator.is_main_process:
            self.wait()
            shutil.rmtree(save.partial, ignore_errors=True)
            # Without parents: an output directory that is gone is not made again.
            save.partial.parent.mkdir(exist_ok=True)
            save.partial.mkdir()
            sync_folder(save.partial.parent.parent)
            if shutil.disk_usage(save.partial).free < save.num_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(save.partial))

    def _take_state(self, save: Save) -> None:
        """Takes the trained state, copied if the loop goes on, and writes the random states and fp16's scale."""
        accelerator = self.accelerator
        wrapped, optimizer = model_and_optimizer(accelerator)
        model = unwrap(accelerator, wrapped)
        engine = engine_of(accelerator)
        if engine is not None:
            save.state = State(*engine.gather(model, optimizer, accelerator.is_main_process))
            if accelerator.is_main_process and accelerator.scaler is not None:
                torch.save(accelerator.scaler.state_dict(), save.partial / "scaler.pt")
            return
        _save_state(accelerator, save.partial, NO_TENSORS)  # the tensors follow
        if accelerator.is_main_process:
            weights = {name: tensor.detach() for name, tensor in trained_tensors(model).items()}
            present = State(weights, optimizer.state_dict())
            if self._copy is None and save.num_bytes >= psutil.virtual_memory().available / 2:
                save.in_background = False
            if save.in_background:
                present = self._copy = in_host_memory(present, self._copy)
            else:
                self._copy = None  # after a required one, the last of most runs, no copy is needed
            save.state = present

    def _start_thread(self, save: Save) -> None:
        if self.accelerator.is_main_process:
            pool = ThreadPoolExecutor(1, "checkpoint")
            self._thread = pool.submit(self._finish, save)
            pool.shutdown(wait=False)  # it ends with its work; the end of the process waits for it, os._exit does not
            if not save.in_background:
                self.wait()

    def wait(self) -> None:
        """Waits for the thread, and raises its error."""
        thread = self._thread
        self._thread = None
        if thread is not None:
            thread.result()

    def _finish(self, save: Save) -> None:
        """The work of the thread."""
        try:
            self._write_tensors(save)
            commit(save.partial, save.final, save.progress)
            rotate(save.final.parent, self.settings.keep, save.progress["best_step"])
        except Exception as error:
            if save.required:
                raise
            if not _is_full(save, error):
                save.print_line(f"{save.final} was not written ({error}). The run ends at its next checkpoint.")
                raise
            self._give_up(save)

    def _write_tensors(self, save: Save) -> None:
        """Writes the files TENSORS: by save_state, or one by one under an engine that divides the state."""
        if engine_of(self.accelerator) is not None:
            save_file(save.state.weights, save.partial / TENSORS[0], metadata={"format": "pt"})
            torch.save(save.state.optimizer, save.partial / TENSORS[1])
            return
        others = {path: path.read_bytes() for path in save.partial.iterdir() if path.name not in TENSORS}
        _save_state(self.accelerator, save.partial, save.state)
        for path, content in others.items():  # save_state has overwritten them with those of a later update
            path.write_bytes(content)

    def _give_up(self, save: Save) -> None:
        """Removes a checkpoint for which the disk has no room; UserError if it is required."""
        if self.accelerator.is_main_process:
            shutil.rmtree(save.partial, ignore_errors=True)
        message = f"the checkpoint of update {save.progress['global_step']} was not saved"
        message += f": {lack_of_room(save.partial.parent, save.num_bytes)} The older ones are kept"
        if save.required:
            raise UserError(f"{message}. Run the same command to resume from the newest.")
        save.print_line(f"{message}, and the run continues (--on-full-disk).")

    def _run_on_all_ranks(self, step: Callable[[Save], None], save: Save) -> bool:
        """Calls `step` on every rank; False if a disk is full. Another error is raised on all ranks. A collective."""
        error: Exception | None = None
        try:
            step(save)
        except Exception as reason:  # noqa: BLE001 (raised below: the other ranks wait for this one)
            error = reason
        full = error is not None and _is_full(save, error)
        counts = torch.tensor([full, error is not None and not full], dtype=torch.float32)
        full_ranks, failed_ranks = self.accelerator.reduce(counts.to(self.accelerator.device), "sum").tolist()
        if error is not None and not full:
            check_still_there(self.settings.output_dir)
        if failed_ranks:
            raise error or UserError("another process could not write the checkpoint, and prints why.")
        return not full_ranks


def _is_full(save: Save, error: Exception) -> bool:
    return save.final.parent.is_dir() and is_full(save.final.parent, error)


def _save_state(accelerator: Any, folder: Path, state: State) -> None:
    """`accelerator.save_state` with the tensors of `state` in place of the model's and the optimizer's."""

    def replace(models: list, weights: list, folder: str) -> None:
        for content in weights:
            content.clear()
            content.update(state.weights)

    _, optimizer = model_and_optimizer(accelerator)
    hooks = (
        accelerator.register_save_state_pre_hook(replace),
        optimizer.optimizer.register_state_dict_post_hook(lambda optimizer, present: state.optimizer),
    )
    try:
        accelerator.save_state(str(folder))
    finally:
        for hook in hooks:
            hook.remove()
