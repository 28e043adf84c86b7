"""train_shared.py beside a plain PyTorch loop around the same model: tokens per second and peak memory.

    python benchmarks/engine.py [--seconds 600] [--config accelerate_configs/single_gpu.yaml]

"ours" is train_shared.py as users run it, without validation; "baseline" is benchmarks/engine_baseline.py. Both are
launched the same way (threads, device, precision) and make the same updates on the same windows. They alternate, each
measurement in a new process. A pair gives one ratio, and the result is the median of the ratios. Run it on a machine
that does nothing else. All measurements are kept in OUTPUT_DIR/engine.json.

speed   all log intervals except the first, in both; saving and publishing come after the last one. memory  on a CPU the
peak of the process's resident set, in total (some hundreds of MB of it are libraries) and above its
        value just before the first update (model built, windows open), read from outside; on a GPU the
        allocator's peak.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import tyro
from script_process import ROOT, THREADS, launched, rows, run, speed, spread

SPEED_GOAL = 0.93  # ours / baseline, at least
MEMORY_GOAL = 0.83  # at most
SCRIPTS = {"ours": "train_shared.py", "baseline": "benchmarks/engine_baseline.py"}


@dataclass(frozen=True)
class Settings:
    output_dir: Path = Path("runs/engine")
    config: Path = Path("accelerate_configs/cpu.yaml")
    """Configuration of accelerate for one process: device and precision."""
    pairs: int = 5
    """Pairs of measurements, at least."""
    seconds: float = 0.0
    """More pairs are measured until this many seconds have passed."""
    threads: int = THREADS
    """Threads of a process."""
    preset: str = "tiny"
    vocabulary: int = 4096
    sequence_length: int = 256
    batch_size: int = 32
    micro_batch_size: int = 16
    """Times sequence_length x vocabulary x 4 bytes: 64 MiB of logits."""
    steps: int = 30
    log_every: int = 10
    """Updates of an interval; the first interval is not counted."""


def flags(settings: Settings) -> list[object]:
    """The flags of both scripts: a constant rate without warm-up, and nothing but training."""
    values: dict[str, object] = {
        "data": "local:docs",
        "cache-dir": (settings.output_dir / "cache").absolute(),
        "tokenizer": f"train:{settings.vocabulary}",
        "preset": settings.preset,
        "sequence-length": settings.sequence_length,
        "batch-size": settings.batch_size,
        "micro-batch-size": settings.micro_batch_size,
        "steps": settings.steps,
        "log-every": settings.log_every,
        "schedule": "constant",
        "warmup-steps": 0,
        "val-fraction": 0,
        "save-every": 0,
        "tracker": "none",
    }
    return [part for name, value in values.items() for part in (f"--{name}", value)]


def measure(settings: Settings, name: str) -> dict[str, float]:
    """One run in a new process: tokens/s, peak MiB, peak MiB above the start, and the mean loss of the intervals."""
    folder = (settings.output_dir / name).absolute()
    shutil.rmtree(folder, ignore_errors=True)
    before = run(
        launched(settings.config, SCRIPTS[name]),
        *flags(settings),
        "--output-dir",
        folder,
        log=settings.output_dir / f"{name}.log",
        threads=settings.threads,
        started=folder / "settings.json",
    )
    training = rows(folder)
    losses = [row["train/loss"] for row in training[1:]]
    result = {"tokens/s": speed(training), "loss": sum(losses) / len(losses)}
    if "use_cpu: true" not in settings.config.read_text():
        return result | {"peak": training[-1]["memory/peak_mb"]}
    peak = training[-1]["memory/process_peak_mb"]
    return result | {"peak": peak, "above start": peak - before}


def main(settings: Settings) -> None:
    if not 1 <= settings.log_every < settings.steps or settings.steps % settings.log_every:
        raise SystemExit(
            "--steps must be a multiple of --log-every, and at least twice as large: the first interval is not counted"
        )
    print(
        f"{settings.preset}, {settings.batch_size} windows of {settings.sequence_length} per update, {settings.threads} "
        f"thread(s), {settings.config.name}; load before the start {os.getloadavg()[0]:.2f}",
        flush=True,
    )
    preparation = [*flags(settings), "--output-dir", settings.output_dir / "prepared", "--dry-run"]
    run(
        launched(settings.config, SCRIPTS["ours"]),
        *preparation,
        log=settings.output_dir / "prepared.log",
        threads=settings.threads,
    )

    start, pairs = perf_counter(), []
    while len(pairs) < settings.pairs or perf_counter() - start < settings.seconds:
        pairs.append({name: measure(settings, name) for name in SCRIPTS})
        content = {"settings": {k: str(v) for k, v in vars(settings).items()}, "pairs": pairs}
        (settings.output_dir / "engine.json").write_text(json.dumps(content, indent=2) + "\n")
        print(pair_line(len(pairs), pairs[-1]), flush=True)

    difference = max(abs(pair["ours"]["loss"] - pair["baseline"]["loss"]) for pair in pairs)
    print(
        f"\nloss, ours {pairs[0]['ours']['loss']:.6f}; largest difference from the baseline's {difference:.1e} (small if the updates are the same)"
    )
    print(f"tokens/s ratio ours/baseline: {spread(ratios(pairs, 'tokens/s'))}  [goal >= {SPEED_GOAL}]")
    if "above start" in pairs[0]["ours"]:
        print(
            f"peak memory ratio: {spread(ratios(pairs, 'peak'))} whole process, including libraries  [goal <= {MEMORY_GOAL}]"
        )
        print(f"peak memory ratio: {spread(ratios(pairs, 'above start'))} above the start  [goal <= {MEMORY_GOAL}]")
    else:
        print(f"peak memory ratio: {spread(ratios(pairs, 'peak'))} the device's allocator  [goal <= {MEMORY_GOAL}]")


def ratios(pairs: list[dict[str, Any]], key: str) -> list[float]:
    """ours / baseline of each pair."""
    return [pair["ours"][key] / pair["baseline"][key] for pair in pairs]


def pair_line(number: int, pair: dict[str, dict[str, float]]) -> str:
    """The line of a pair: each value of ours and of the baseline, and their ratio."""
    parts = [f"pair {number}"]
    for key in ("tokens/s", "peak", "above start"):
        if key in pair["ours"]:
            unit = "" if key == "tokens/s" else " MiB"
            parts.append(
                f"{key} {pair['ours'][key]:,.0f} / {pair['baseline'][key]:,.0f}{unit} = {ratios([pair], key)[0]:.3f}"
            )
    return "   ".join(parts)


if __name__ == "__main__":
    os.chdir(ROOT)  # --output-dir and --config are the repository's
    main(tyro.cli(Settings, description=__doc__))
