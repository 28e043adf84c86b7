"""The output directory of a run: its lock, removal of partial files, and the check of free space."""

import atexit
import datetime
import fcntl
import json
import os
import shutil
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import psutil

from ..errors import UserError
from ..files.atomic import MIB, amount, sync_folder, write_json
from ..settings import to_json

WAIT = 10.0  # seconds until a network file system has shown a file to other machines


def claim(accelerator: Any, folder: Path) -> TextIO | None:
    """Locks `folder` for this run until the returned file is closed, or the process ends. Main process only.

    UserError, with pid and host, where another run holds it, or where the folder cannot be created or written. The lock
    is the kernel's (flock): it ends with its owner, also over NFS (v3 with lockd, v4). It is not visible on other
    machines where a mount keeps locks local (NFS with nolock or local_lock, Lustre with localflock). There, and on file
    systems without locks, an owner on this host counts as alive if its pid is, and one on another host always does.
    """
    if not accelerator.is_main_process:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 (it is open as long as the run)
    except OSError as reason:
        raise UserError(f"--output-dir {folder} cannot be written ({reason.strerror}). Name another folder.") from None
    file.seek(0)
    owner = _parse_owner(file.read())
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        taken = _is_alive_here(owner)
    except BlockingIOError:
        taken = True
    except OSError:  # no locks on this file system
        taken = bool(owner) and (owner["host"] != socket.gethostname() or _is_alive_here(owner))
    if taken:
        raise UserError(
            f"--output-dir {folder} is in use by another run: {_describe(owner)}. Wait for it or stop it, or name "
            f"another folder. (Was it on a machine that is gone for good? Then delete {folder / '.lock'}.)"
        )
    if owner:
        previous = f"the previous run did not end normally: {_describe(owner)}"
        print(f"{folder}: {previous}. Its lock is taken over.", flush=True)
    _write_owner(file, {"pid": os.getpid(), "host": socket.gethostname(), "started": _started(os.getpid())})
    atexit.register(_release_at_exit, file, os.getpid())
    _remove_partial(folder)
    return file


def release(file: TextIO | None) -> None:
    """Marks the lock as released by a run that ended by itself, and closes it."""
    if file:
        _write_owner(file, None)
        file.close()


def _release_at_exit(file: TextIO, pid: int) -> None:
    """Also after an error that was printed.

    A process that is killed or ended by force does not get here, and forks do not count.
    """
    if not file.closed and os.getpid() == pid:
        with suppress(OSError):  # the disk is full or gone
            release(file)


def check_still_there(folder: Path) -> None:
    """UserError where the output directory, which the run has created, is gone or cannot be written; called after a
    write failed.
    """
    if not os.path.exists(folder):
        problem = "does not exist any more"
    elif not os.path.isdir(folder):
        problem = "is no longer a folder"
    elif not os.access(folder, os.W_OK):  # also for root, where it is read-only or immutable
        problem = "cannot be written any more"
    else:
        return
    raise UserError(
        f"--output-dir {folder} {problem}: it was changed during the run. Restore it, and run the same command to "
        "resume from the newest checkpoint in it."
    )


def _parse_owner(text: str) -> dict[str, Any] | None:
    """The owner that a lock file names; None where it is empty or incomplete."""
    if not text.strip():
        return None
    try:
        owner = json.loads(text)
        return {"pid": int(owner["pid"]), "host": str(owner["host"]), "started": float(owner["started"])}
    except (ValueError, TypeError, KeyError):
        return None


def _write_owner(file: TextIO, owner: dict[str, Any] | None) -> None:
    file.seek(0)
    file.truncate()
    file.write(json.dumps(owner) + "\n" if owner else "")
    file.flush()
    os.fsync(file.fileno())  # other machines read it


def sees_lock(accelerator: Any, settings: Any) -> bool:
    """Whether this process reads, in its --output-dir, the lock that the main process has written. A collective.

    If it does not, the machines have no common file system there. A dry run has no lock: True.
    """
    import torch

    path = settings.output_dir / ".lock"
    written = [_text(path) if accelerator.is_main_process and not settings.dry_run else None]
    torch.distributed.broadcast_object_list(written, src=0)
    deadline = time.monotonic() + WAIT
    while written[0] is not None and _text(path) != written[0]:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
        with suppress(OSError):  # an NFS client that did not find a name looks for it again when its folder is listed
            os.listdir(path.absolute().parent.parent)
            os.listdir(path.parent)
    return True


def _text(path: Path) -> str | None:
    """The content of a lock file; None where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def _started(pid: int) -> float:
    """Start time of a process, in seconds since the epoch, which tells two users of one pid apart; 0 without one."""
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return 0.0


def _is_alive_here(owner: dict[str, Any] | None) -> bool:
    if not owner or owner["host"] != socket.gethostname() or owner["pid"] == os.getpid():
        return False
    return abs(_started(owner["pid"]) - owner["started"]) < 1


def _describe(owner: dict[str, Any] | None) -> str:
    if not owner:
        return "its lock file does not name it"
    since = datetime.datetime.fromtimestamp(owner["started"]).isoformat(" ", "seconds")
    return f"pid {owner['pid']} on host {owner['host']}, started {since}"


def _remove_partial(folder: Path) -> None:
    """Removes partial files that a killed run left; what they were to replace gets its name back."""
    for leftover in folder.glob(".tmp-*"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
    for old in folder.glob(".old-*"):
        final = old.with_name(old.name.removeprefix(".old-"))
        if final.exists():
            shutil.rmtree(old)
        else:
            old.rename(final)
    sync_folder(folder)


def prepare_output(accelerator: Any, settings: Any, checkpoint_size: int) -> None:
    """Checks the free space and writes settings.json, on the main process of a run that is not a dry run."""
    if accelerator.is_main_process and not settings.dry_run:
        check_room(settings.output_dir, checkpoint_size, settings.keep)
        write_json(settings.output_dir / "settings.json", to_json(settings))


def check_room(folder: Path, checkpoint: int, keep: int) -> None:
    """UserError, before update 1, where the disk has no room for what the run will write. checkpoint: bytes of one.

    At most there are the `keep` newest, the best, one that is being written, and the artifact: a third of a checkpoint.
    """
    kept = keep + 2
    published = checkpoint // 3 + MIB
    needed = kept * checkpoint + published
    here = sum(path.stat().st_size for path in folder.glob("checkpoints/step-*/**/*") if path.is_file())
    free = shutil.disk_usage(folder).free
    if free + here < needed:
        raise UserError(
            f"{folder} needs about {amount(needed)} ({kept} checkpoints of {amount(checkpoint)} and the artifact, "
            f"{amount(published)}), but {amount(free)} are free: {amount(needed - free - here)} are missing. Free "
            "space, lower --keep, or name another --output-dir."
        )
