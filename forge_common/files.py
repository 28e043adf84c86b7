"""Files that are whole or absent: written under another name, synced, renamed."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import UserError
from .untrusted import read_bounded


def write_json(path: Path, content: Any) -> None:
    """Writes JSON under another name, synced, then renamed: the file is whole or absent."""
    aside = path.with_name(f".tmp-{path.name}")
    with open(aside, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


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


def publish(folder: Path, write: Callable[[Path], None]) -> None:
    """Fills a folder beside `folder` by `write`, syncs it, and only then gives it the name; an older one is replaced."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside, old = folder.with_name(f".tmp-{folder.name}-{os.getpid()}"), folder.with_name(f".old-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        write(aside)
        sync(aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    aside.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(folder: Path) -> None:
    """Every file below `folder`, and the folders, down to the disk."""
    for root, _, names in os.walk(folder):
        for name in names:
            with open(Path(root, name), "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(root))


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
