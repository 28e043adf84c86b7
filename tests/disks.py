"""Small and full disks, and the missing space that a message states."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A new file system in memory; it hides what is in an existing folder."""
    folder.mkdir(exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("only root may mount")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path, *, leaving: int) -> Path:
    """Takes up all but `leaving` bytes."""
    filler = disk / "filler"
    filler.write_bytes(bytes(max(shutil.disk_usage(disk).free - leaving, 0)))
    return filler


def missing_bytes(printed: str) -> int:
    """The bytes that a message states as missing."""
    number, unit = printed.split(" are missing")[0].split()[-2:]
    return int(float(number.replace(",", "")) * {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20}[unit])
