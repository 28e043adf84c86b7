"""Atomic writes: under a temporary name, synced, read back, then renamed. Strict JSON. Recognition of a full disk."""

import ctypes
import errno
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import UserError
from .untrusted import read_bounded, without_links

MIB = 1 << 20
AT_FDCWD = -100  # of Linux: a relative path is one from the working directory
RENAME_EXCHANGE = 2  # of Linux' renameat2; RENAME_SWAP of macOS' renamex_np is the same number


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, content: str) -> None:
    """Writes a file that is complete or absent, even after a crash. UserError if it cannot be written."""
    temp_path = path.with_name(f".tmp-{path.name}")
    try:
        with open(temp_path, "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp_path, path)
    except OSError as reason:
        with suppress(OSError):
            temp_path.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({reason.strerror}). Free space, or name another place.") from reason


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of at most 8 MiB.

    UserError for anything else, and for what JSON does not allow or does not define: NaN, Infinity, 1e999, a key twice.
    """
    content = read_bounded(path)
    try:
        parsed = json.loads(
            content.decode("utf-8"), object_pairs_hook=unique, parse_float=_finite, parse_constant=_finite
        )
    except (ValueError, RecursionError) as reason:
        raise UserError(f"{path} is not JSON ({reason}). Fetch or export it again.") from None
    if not isinstance(parsed, dict):
        raise UserError(f"{path} holds a {type(parsed).__name__}, not an object. Fetch or export it again.")
    return parsed


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `object_pairs_hook` of json.loads. ValueError for a key that is there twice."""
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("an object has a key twice")
    return content


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is not a JSON number, or too large")
    return value


def publish(
    folder: Path, write: Callable[[Path], None], read_back: Callable[[Path], Any], *, keep_existing: bool = False
) -> None:
    """Calls `write` with a temporary folder beside `folder`, syncs it, and renames it; an older `folder` is replaced.

    read_back: reads the temporary folder as a user will read `folder`. UserError where it cannot be read.
    keep_existing: an older one is kept instead, where every process writes the same content. If anything fails, the
    temporary folder is removed, and an older `folder` stays. UserError if the disk is full or cannot be written.
    """
    temp_dir = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    old_dir = folder.with_name(f".old-{folder.name}")
    try:
        shutil.rmtree(temp_dir, ignore_errors=True)
        temp_dir.mkdir(parents=True)
        write(temp_dir)
        _follow_umask(temp_dir)
        sync(temp_dir)
        with _as_not_written(folder, temp_dir):
            read_back(temp_dir)
    except BaseException as reason:
        shutil.rmtree(temp_dir, ignore_errors=True)
        if isinstance(reason, Exception) and folder.parent.is_dir() and is_full(folder.parent, reason):
            free = amount(shutil.disk_usage(folder.parent).free)
            raise UserError(
                f"{folder} was not written: the disk is full, {free} are free. Free some space."
            ) from reason
        if isinstance(reason, OSError):
            raise UserError(f"{folder} cannot be written ({reason.strerror}). Name another place.") from reason
        raise
    if keep_existing:
        rename_if_absent(temp_dir, folder)
        return
    if folder.exists() and _exchange(temp_dir, folder):
        old_dir = temp_dir
    else:
        if folder.exists():
            shutil.rmtree(old_dir, ignore_errors=True)
            folder.rename(old_dir)
        temp_dir.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(old_dir, ignore_errors=True)


def _follow_umask(folder: Path) -> None:
    """Gives the files below a new folder the mode that the umask leaves to any file: safetensors writes 0600."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


@contextmanager
def _as_not_written(folder: Path, temp_dir: Path) -> Iterator[None]:
    """Says of a UserError about the temporary folder that `folder` was not written."""
    try:
        yield
    except UserError as reason:
        first_sentence = str(reason).replace(str(temp_dir), folder.name).split(". ")[0]
        raise UserError(
            f"{folder} was not written, since what was read back is wrong ({first_sentence}). Check the disk, and run "
            "the same command again."
        ) from reason


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges the names of two folders in one step; False where the system or the file system cannot."""
    library = ctypes.CDLL(None)
    try:
        if sys.platform == "darwin":
            return library.renamex_np(os.fsencode(one), os.fsencode(other), RENAME_EXCHANGE) == 0
        return library.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0
    except AttributeError:  # an old C library
        return False


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
    """Flushes every file and folder below `folder`, and `folder` itself, to the disk."""
    for root, _, names in os.walk(folder):
        for name in names:
            with open(Path(root, name), "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(root))


def sync_folder(folder: Path) -> None:
    """Flushes a folder (the names in it) or a file to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_full(folder: Path, reason: Exception) -> bool:
    """Whether a write failed because of a full disk or quota. torch and safetensors give no errno, at most its text."""
    if isinstance(reason, OSError) and reason.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    messages = ("No space left", "quota exceeded", "File too large", "file write failed")
    return any(text in str(reason) for text in messages) or shutil.disk_usage(folder).free < MIB


def lack_of_room(folder: Path, needed: int) -> str:
    """The end of a message: how many bytes are missing of `needed`, and how to fix it."""
    free = shutil.disk_usage(folder).free
    missing = f"{amount(needed - free)} are missing" if needed > free else "the disk or a quota is full"
    return f"it needs {amount(needed)}, {amount(free)} are free on {folder}: {missing}. Free some space."


def amount(size: int) -> str:
    """1536 -> 1.5 KiB."""
    unit = min((max(size, 1).bit_length() - 1) // 10, 4)
    return f"{size / (1 << 10 * unit):,.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}"


def copy_files(source: Path, target: Path, names: tuple[str, ...], *, link: bool) -> None:
    """Copies the files that exist, or makes hard links. Refuses symbolic links, and files without room for them."""
    without_links(source)
    files = [source / name for name in names if (source / name).is_file()]
    target.mkdir(parents=True)
    size = sum(path.stat().st_size for path in files)
    if not link and size > shutil.disk_usage(target).free:
        raise UserError(f"{source} cannot be copied: {lack_of_room(target, size)}")
    for path in files:
        if link:
            with suppress(OSError):  # a file system may have no hard links
                os.link(path, target / path.name)
                continue
        shutil.copyfile(path, target / path.name)
