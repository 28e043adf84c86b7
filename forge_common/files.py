"""Files that are whole or absent: written under another name, synced, renamed."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import UserError


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
    """A JSON object from a file; anything else is the user's to mend."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist. Name a folder that holds it.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as reason:
        raise UserError(f"{path} is not JSON ({reason}). Fetch or export it again.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not an object. Fetch or export it again.")
    return content


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
