"""report.html of a run, and of several beside each other, from the files that the runs wrote."""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files.atomic import read_json, write_text
from .charts import charts
from .page import cards, curves, page, section, table

SHARE = 0.01  # of the time of a run that its report may take
OPERATING = {"output_dir", "run_name", "resume", "cache_dir"}  # settings that say nothing about a difference


@dataclass(frozen=True)
class Run:
    folder: Path
    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    plan: str

    @property
    def steps(self) -> int:
        """Updates that the run was started for; 0: unknown."""
        return self.settings.get("steps") or 0

    @property
    def step(self) -> int:
        return self.rows[-1]["step"] if self.rows else 0

    def last(self, key: str) -> Any:
        """The newest value under a key of the log; None where it has none."""
        return next((row[key] for row in reversed(self.rows) if row.get(key) is not None), None)

    def best(self) -> dict[str, Any] | None:
        """The row of the best validation."""
        validations = [row for row in self.rows if isinstance(row.get("val/loss"), float)]
        return min(validations, key=lambda row: row["val/loss"], default=None)

    def numbers(self) -> dict[str, str]:
        """What a run has come to: name -> text, "" where it is not known."""
        loss = self.last("train/loss")
        best = self.best() or {}
        return {
            "update": f"{self.step:,}" + (f" of {self.steps:,}" if self.steps else ""),
            "training loss": "" if loss is None else f"{loss:.4f}",
            "best validation loss": f"{best['val/loss']:.4f} (update {best['step']:,})" if best else "",
            "perplexity": _number(best.get("val/perplexity"), ",.2f"),
            "bits per byte": _number(best.get("val/bits_per_byte"), ".4f"),
            "tokens": _number(self.last("train/tokens"), ","),
            "epochs": _number(self.last("train/epoch"), ".2f"),
            "tokens per second": _number(self.last("train/tokens_per_second"), ",.0f"),
            "model FLOPs utilization": _number(self.last("train/mfu"), ".0%"),
            "peak memory": _number(self.last("memory/peak_mb"), ",.0f", " MiB"),
            "updates not applied (NaN)": _number(self.last("train/bad_updates") or None, ","),
        }


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def is_run(folder: Path) -> bool:
    return (folder / "metrics.jsonl").is_file()


def read_run(folder: Path) -> Run:
    """The files of a run. An incomplete last row is left out.

    UserError where the folder is not that of a run, or where a row or the settings cannot be read.
    """
    file = folder / "metrics.jsonl"
    if not file.is_file():
        raise UserError(
            f"{folder} has no metrics.jsonl: it is no output directory of a run. Name one that a script wrote."
        )
    rows = []
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as reason:
            if number == len(lines) and not line.endswith("\n"):  # the run was killed while it wrote it, or writes it
                break
            raise UserError(f"{file}:{number} is not JSON ({reason}). Remove this line.") from None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise UserError(f"{file}:{number} is no row with an integer `step`. Remove this line.")
        rows.append(row)
    settings = {}
    if (folder / "settings.json").exists():
        try:
            settings = read_json(folder / "settings.json")
        except UserError as reason:
            raise UserError(
                f"{str(reason).split('. ')[0]}. Remove the file; the report then has no settings."
            ) from None
    plan = ""
    if (folder / "plan.txt").exists():
        plan = (folder / "plan.txt").read_text(encoding="utf-8", errors="replace")
    return Run(folder, settings, rows, plan)


def run_page(run: Run, *, running: bool = False) -> str:
    """The page of one run. running: it still trains."""
    parts = [
        section("Summary", cards({name: text for name, text in run.numbers().items() if text}), _written()),
        section("Curves", curves()),
    ]
    samples = _samples(run)
    if samples:
        parts.append(section("Samples", *samples))
    if run.plan:
        parts.append(section("Plan", f"<pre>{escape(run.plan)}</pre>"))
    named = [(name, _shown(value)) for name, value in run.settings.items()]
    opened = f"<details><summary>{len(named)} settings</summary>{table(('setting', 'value'), named)}</details>"
    parts.append(section("Settings", opened))
    return page(str(run.folder), parts, charts({run.folder.name: run.rows}), running=running)


def runs_page(runs: Sequence[Run]) -> str:
    """The page of several runs beside each other."""
    top = Path(os.path.commonpath([run.folder.absolute().parent for run in runs]))
    names = [str(run.folder.absolute().relative_to(top)) for run in runs]
    numbers = [run.numbers() for run in runs]
    columns = [column for column in numbers[0] if any(each[column] for each in numbers)]
    results = [[name, *(each[column] for column in columns)] for name, each in zip(names, numbers, strict=True)]
    keys = dict.fromkeys(key for run in runs for key in run.settings if key not in OPERATING)
    values = {key: [_shown(run.settings.get(key)) for run in runs] for key in keys}
    differing = [(key, *texts) for key, texts in values.items() if len(set(texts)) > 1]
    parts = [
        section("Summary", table(("run", *columns), results, kind="numbers"), _written()),
        section("Curves", curves()),
        section("Settings that differ", table(("setting", *names), differing) if differing else "<p>None.</p>"),
    ]
    return page(f"{len(runs)} runs", parts, charts(dict(zip(names, (run.rows for run in runs), strict=True))))


def _samples(run: Run) -> list[str]:
    """For each prompt its continuations, the newest first."""
    by_prompt: dict[str, list[tuple[str, str]]] = {}
    for row in reversed(run.rows):
        for sample in row.get("val/samples") or ():
            by_prompt.setdefault(sample["prompt"], []).append((f"{row['step']:,}", sample["continuation"]))
    return [
        f"<h3><q>{escape(prompt)}</q></h3>" + table(("update", "continuation"), rows, kind="samples")
        for prompt, rows in by_prompt.items()
    ]


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _written() -> str:
    return f"<p>Written {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC.</p>"


class LiveReport:
    """Writes report.html while a run trains, in at most SHARE of its time.

    An error is printed and does not end the run.
    """

    def __init__(self, folder: Path, steps: int, print_line: Callable[[str], None]):
        """steps: the update that the run ends with."""
        self._folder = folder
        self._steps = steps
        self._print_line = print_line
        self._next = 0.0  # the clock from which on the next one may be written
        self._failed = False

    def refresh(self, *, last: bool = False) -> None:
        """Called after each row of the log. last: at the end of the run, always."""
        start = time.perf_counter()
        if start < self._next and not last:
            return
        try:
            run = read_run(self._folder)
            write_text(self._folder / "report.html", run_page(run, running=not last and run.step < self._steps))
        except Exception as reason:  # noqa: BLE001 (a page to look at must not end a run)
            if not self._failed:
                self._print_line(f"report.html was not written ({reason}); the run goes on")
            self._failed = True
        now = time.perf_counter()
        self._next = now + (now - start) / SHARE
