"""The folder of a run's checkpoints: what a complete one is, which are kept, which is the newest that verifies.

A folder gets its name step-N only when its files are complete and synced. Everything here is for the main process, and
nothing knows models or processes.
"""

import hashlib
import shutil
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files.atomic import read_json, sync, sync_folder, write_json
from ..settings import differences


def checkpoints_of(settings: Any) -> Path:
    """OUTPUT/checkpoints."""
    return Path(settings.output_dir) / "checkpoints"


def commit(partial: Path, final: Path, progress: dict[str, Any]) -> None:
    """Adds progress.json and the manifest to a folder that holds a run's state, syncs all of it, and gives it its name."""
    write_json(partial / "progress.json", progress)
    write_json(partial / "manifest.json", manifest(partial))
    sync(partial)
    partial.rename(final)
    sync_folder(final.parent)


def manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file of a checkpoint, without manifest.json."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)} for path in files
    }


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def rotate(folder: Path, keep: int, best_step: int) -> None:
    """Deletes all but the `keep` newest and the best; a folder is renamed before its files are deleted."""
    for path in complete(folder)[:-keep]:
        if path.name != f"step-{best_step:08d}":
            removed = path.with_name(f".old-{path.name}")
            path.rename(removed)
            shutil.rmtree(removed, ignore_errors=True)


def complete(folder: Path) -> list[Path]:
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
    if not changed:
        return None
    name, (expected, actual) = next(iter(changed.items()))
    return f"{name}: {actual or 'missing'}, the manifest has {expected or 'no such file'}"


def newest_intact(folder: Path) -> Path | None:
    """The newest checkpoint that verifies, or None. Damaged ones are reported and renamed, partial ones deleted.

    UserError where all are damaged: a run that starts again would silently discard the old one.
    """
    for leftover in [*folder.glob(".tmp-step-*"), *folder.glob(".old-step-*")]:
        shutil.rmtree(leftover, ignore_errors=True)
    for path in reversed(complete(folder)):
        if verify_or_rename(path):
            return path
    broken = sorted(path.name for path in folder.glob("step-*.broken*"))
    if broken:
        raise UserError(
            f"{folder} holds only damaged checkpoints: {', '.join(broken)}. Restore one from a backup (under its name "
            "without .broken), delete them to start again, or name another --output-dir."
        )
    return None


def verify_or_rename(path: Path) -> bool:
    """Whether every file matches the manifest. A damaged checkpoint is reported and renamed to step-N.broken."""
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
