"""metrics.jsonl: a JSON row for each line of the log, with its step. It is never older than a checkpoint."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files.atomic import is_full, write_text
from .folder import check_still_there


class MetricsFile:
    def __init__(self, folder: Path, print_line: Callable[[str], None]):
        self.path = folder / "metrics.jsonl"
        self.print_line = print_line
        self._unwritten: list[str] = []  # rows for which the disk had no space

    def append(self, step: int, values: dict[str, Any]) -> dict[str, Any]:
        """Writes a row. Returns its values, in which NaN and Inf are None."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._unwritten.append(json.dumps({"step": step, **finite}) + "\n")
        self.write_pending()
        return finite

    def write_pending(self) -> None:
        """Appends the rows that are not written yet, and syncs the file.

        On a full disk they are kept for the next call, and a partial row is removed.
        """
        if not self._unwritten:
            return
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(self._unwritten))
                file.flush()
                os.fsync(file.fileno())
        except OSError as reason:
            check_still_there(self.path.parent)
            if not is_full(self.path.parent, reason):
                raise
            if self.path.exists():
                os.truncate(self.path, size)
            self.print_line(
                f"metrics.jsonl: the disk is full; {len(self._unwritten)} row(s) are kept in memory until there is space"
            )
        else:
            self._unwritten.clear()

    def drop_rows_after(self, step: int, validation_due: bool) -> None:
        """Removes what a resumed run writes again: the rows after `step`, a partial last row and, if it is due, the
        validation of `step`. UserError, with the line, for what the log never writes.
        """
        if not self.path.exists():
            return
        kept = []
        for number, line in enumerate(self.path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise UserError(f"{self.path}:{number} is no row with an integer `step`. Remove this line.")
            is_due = validation_due and "val/loss" in row
            if row["step"] < step or (row["step"] == step and not is_due):
                kept.append(line)
        write_text(self.path, "".join(f"{line}\n" for line in kept))
