"""A run's own folder: claimed for one run at a time, swept of what a kill left, and large enough for what will come."""

import datetime
import fcntl
import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any, TextIO

import psutil

from .errors import UserError
from .files import MIB, amount, sync_folder


def claim(accelerator: Any, folder: Path) -> TextIO | None:
    """Takes `folder` for this run until the returned file is closed, by whatever ends the process. Main process only.

    UserError, naming pid and host, where another run has it; or where the folder cannot be made or written. The lock is the
    kernel's (flock): a dead owner's is gone with it, also over NFS (v3 with lockd, v4). It does not reach other machines
    where a mount keeps locks to itself (NFS with nolock or local_lock, Lustre with localflock); there, and where there are no
    locks at all, a living owner on this host is told by its pid, and one on another host is taken at its word.
    """
    if not accelerator.is_main_process:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 (it is open as long as the run)
    except OSError as reason:
        raise UserError(f"--output-dir {folder} cannot be written ({reason.strerror}). Name another folder.") from None
    file.seek(0)
    owner = _read(file.read())
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        taken = _lives_here(owner)
    except BlockingIOError:
        taken = True
    except OSError:  # no locks on this file system
        taken = bool(owner) and (owner["host"] != socket.gethostname() or _lives_here(owner))
    if taken:
        raise UserError(
            f"--output-dir {folder} is in use by another run: {_name(owner)}. Wait for it or stop it, or name another "
            f"folder. (Was it on a machine that is gone for good? Then delete {folder / '.lock'}.)"
        )
    if owner:
        print(f"{folder}: taken over from a run that did not end in order: {_name(owner)}", flush=True)
    _write(file, {"pid": os.getpid(), "host": socket.gethostname(), "started": _started(os.getpid())})
    _sweep(folder)
    return file


def release(file: TextIO | None) -> None:
    """The run has ended in order: nobody need be told of it."""
    if file:
        _write(file, None)
        file.close()


def _read(text: str) -> dict[str, Any] | None:
    """The owner that a lock names; a torn lock names one that nobody knows."""
    try:
        owner = json.loads(text) if text.strip() else None
        return owner and {"pid": int(owner["pid"]), "host": str(owner["host"]), "started": float(owner["started"])}
    except (ValueError, TypeError, KeyError):
        return None


def _write(file: TextIO, owner: dict[str, Any] | None) -> None:
    file.seek(0)
    file.truncate()
    file.write(json.dumps(owner) + "\n" if owner else "")
    file.flush()


def _started(pid: int) -> float:
    """When a process began, in seconds since the epoch; 0 where there is none. A pid alone is used again."""
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return 0.0


def _lives_here(owner: dict[str, Any] | None) -> bool:
    if not owner or owner["host"] != socket.gethostname() or owner["pid"] == os.getpid():
        return False
    return abs(_started(owner["pid"]) - owner["started"]) < 1


def _name(owner: dict[str, Any] | None) -> str:
    if not owner:
        return "its lock does not say which"
    since = datetime.datetime.fromtimestamp(owner["started"]).isoformat(" ", "seconds")
    return f"pid {owner['pid']} on host {owner['host']}, started {since}"


def _sweep(folder: Path) -> None:
    """Removes what a kill left half-written; what was about to be replaced by it gets its name back."""
    for leftover in folder.glob(".tmp-*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    for old in folder.glob(".old-*"):
        final = old.with_name(old.name.removeprefix(".old-"))
        shutil.rmtree(old) if final.exists() else old.rename(final)
    sync_folder(folder)


def check_room(folder: Path, checkpoint: int, keep: int) -> None:
    """Refuses, before update 1, a disk without room for what the run will write. checkpoint: bytes of one.

    At once there are the `keep` newest, the best, one that is being written, and what is published: a third of one.
    """
    kept, published = keep + 2, checkpoint // 3 + MIB
    needed = kept * checkpoint + published
    here = sum(path.stat().st_size for path in folder.glob("checkpoints/step-*/**/*") if path.is_file())
    free = shutil.disk_usage(folder).free
    if free + here < needed:
        raise UserError(
            f"{folder} needs about {amount(needed)} ({kept} checkpoints of {amount(checkpoint)} and what is published, "
            f"{amount(published)}), but {amount(free)} are free: {amount(needed - free - here)} are missing. Free some, lower "
            "--keep, or name another --output-dir."
        )
