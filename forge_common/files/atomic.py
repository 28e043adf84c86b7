"""Files that are whole or absent: written under another name, synced, renamed; and what a full disk says of itself."""

import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import UserError
from .untrusted import read_bounded

MIB = 1 << 20


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, content: str) -> None:
    """Writes under another name, synced, then renamed: the file is whole or absent. UserError where it cannot be written."""
    aside = path.with_name(f".tmp-{path.name}")
    try:
        with open(aside, "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as reason:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({reason.strerror}). Free space, or name another place.") from reason


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most 8 MiB; anything else is the user's to mend.

    Refused as well is what JSON knows not, or leaves open: NaN, Infinity, 1e999, and a key that stands twice.
    """
    content = read_bounded(path)
    try:
        parsed = json.loads(
            content.decode("utf-8"), object_pairs_hook=_once, parse_float=_finite, parse_constant=_finite
        )
    except (ValueError, RecursionError) as reason:
        raise UserError(f"{path} is not JSON ({reason}). Fetch or export it again.") from None
    if not isinstance(parsed, dict):
        raise UserError(f"{path} holds a {type(parsed).__name__}, not an object. Fetch or export it again.")
    return parsed


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in an object")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is no number of JSON's, or too large")
    return value


def publish(folder: Path, write: Callable[[Path], None], *, keep_existing: bool = False) -> None:
    """Fills a folder beside `folder` by `write`, syncs it, and only then gives it the name; an older one is replaced.

    keep_existing: an older one is kept instead, where every process writes the same content.
    UserError where the disk is full or cannot be written; nothing is left behind then.
    """
    aside, old = folder.with_name(f".tmp-{folder.name}-{os.getpid()}"), folder.with_name(f".old-{folder.name}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        write(aside)
        sync(aside)
    except BaseException as reason:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(reason, Exception) and folder.parent.is_dir() and is_full(folder.parent, reason):
            free = amount(shutil.disk_usage(folder.parent).free)
            raise UserError(f"{folder} was not written: the disk is full, {free} are free. Free some.") from reason
        if isinstance(reason, OSError):
            raise UserError(f"{folder} cannot be written ({reason.strerror}). Name another place.") from reason
        raise
    if keep_existing:
        rename_if_absent(aside, folder)
        return
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    aside.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def rename_if_absent(partial: Path, folder: Path) -> None:
    """Gives a synced folder its name. If another process gave the name to the same content first, theirs is kept."""
    try:
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(partial, ignore_errors=True)
    sync_folder(folder.parent)


def sync(folder: Path) -> None:
    """Every file below `folder`, and the folders, down to the disk."""
    for root, _, names in os.walk(folder):
        for name in names:
            with open(Path(root, name), "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(root))


def sync_folder(folder: Path) -> None:
    """A folder (its names), or a file, down to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_full(folder: Path, reason: Exception) -> bool:
    """Whether a write failed for want of room. torch and safetensors do not give errno, but its text or nothing at all."""
    if isinstance(reason, OSError) and reason.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    told = ("No space left", "quota exceeded", "File too large", "file write failed")
    return any(text in str(reason) for text in told) or shutil.disk_usage(folder).free < MIB


def lack_of_room(folder: Path, needed: int) -> str:
    """How much is missing for `needed` bytes, and the mend."""
    free = shutil.disk_usage(folder).free
    missing = f"{amount(needed - free)} are missing" if needed > free else "the disk or a quota is full"
    return f"it needs {amount(needed)}, {amount(free)} are free on {folder}: {missing}. Free some."


def amount(size: int) -> str:
    """1536 -> 1.5 KiB."""
    unit = min((max(size, 1).bit_length() - 1) // 10, 4)
    return f"{size / (1 << 10 * unit):,.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}"
