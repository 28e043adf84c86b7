"""Runs a script in a new process, and reads its measurements from metrics.jsonl."""

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent  # not resolved: in a virtual environment it is a link
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes started here are ended too
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def launched(config: Path, script: str) -> list[str]:
    """The command that runs a script of this repository by `accelerate launch`."""
    return [str(BIN / "accelerate"), "launch", "--config_file", str(ROOT / config), str(ROOT / script)]


def run(
    command: list[str],
    *flags: object,
    log: Path,
    threads: int,
    started: Path | None = None,
    variables: dict[str, str] | None = None,
) -> float:
    """Runs a command to its end, its output into `log`; a failure ends this process with the last lines of it.

    `started`: a file that the script writes just before its first update; the result is then the resident set (MiB) of
    the launcher's child, or of the command if that is Python, as seen from outside when the file appears. Nothing is
    polled from then on. `variables`: more of the environment.
    """
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "WANDB_"))}
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    environment = plain | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    environment |= variables or {}
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [*command, *map(str, flags)],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            direct = Path(command[0]).name.startswith("python")
            resident = _resident_when(started, process, direct) if started else 0.0
            code = process.wait()
        except BaseException:
            _end(process)
            raise
    if code:
        tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-15:])
        raise SystemExit(f"exit code {code}; the end of {log}:\n{tail}")
    return resident


def _end(launcher: subprocess.Popen) -> None:
    """Stops the launcher and its children (it does not forward a signal), and waits until all have ended."""
    if launcher.poll() is None:
        children = psutil.Process(launcher.pid).children(recursive=True)
        os.killpg(launcher.pid, signal.SIGTERM)
        psutil.wait_procs(children, timeout=60)
        launcher.wait()


def _resident_when(started: Path, launcher: subprocess.Popen, direct: bool) -> float:
    """MiB of the launcher's child (direct: of itself) once `started` exists; NaN where it ended first."""
    child = psutil.Process(launcher.pid) if direct else None
    while not started.exists():
        if launcher.poll() is not None:
            return math.nan
        if child is None:  # the launcher takes seconds to start it, and searching for it costs processor time
            child = next(iter(psutil.Process(launcher.pid).children()), None)
        time.sleep(0.001 if child else 0.05)
    return child.memory_info().rss / 2**20 if child else math.nan


def rows(folder: Path) -> list[dict[str, Any]]:
    """The training rows of metrics.jsonl."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "train/loss" in row]


def speed(training: list[dict[str, Any]]) -> float:
    """Tokens per second over all log intervals except the first (warm-up): all their tokens / all their time."""
    kept = training[1:]
    tokens = [after["train/tokens"] - before["train/tokens"] for before, after in pairwise(training)]
    seconds = [count / row["train/tokens_per_second"] for count, row in zip(tokens, kept, strict=True)]
    return sum(tokens) / sum(seconds)


def spread(values: list[float], digits: int = 3) -> str:
    """median (min-max)."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"
