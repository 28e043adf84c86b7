"""Our engine against a bare PyTorch loop around the same model: tokens a second, and memory at the highest.

    python benchmarks/engine.py [--seconds 600] [--config accelerate_configs/single_gpu.yaml]

ours is train_shared.py as users run it, without validation; bare is benchmarks/engine_baseline.py. Both are launched alike (same
threads, device, precision) and make the same updates on the same windows; ours, bare, ours, bare, each measurement in a
process of its own. A pair gives one ratio; what counts is the median of the ratios. Run it on a machine that does nothing
else. Everything measured is kept in OUTPUT_DIR/engine.json.

speed   all log intervals but the first, in both; saving and publishing come after the last one.
memory  on a CPU the process's resident set at its highest, as a whole (some hundreds of MB of it are libraries) and above
        what it was just before the first update (model built, windows open), read from outside; on a GPU the
        allocator's highest.
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

SPEED_WANTED, MEMORY_WANTED = 0.93, 0.83  # ours / bare: at least, at most
SCRIPTS = {"ours": "train_shared.py", "bare": "benchmarks/engine_baseline.py"}


@dataclass(frozen=True)
class Settings:
    output_dir: Path = Path("runs/engine")
    config: Path = Path("accelerate_configs/cpu.yaml")  # one process: device and precision
    pairs: int = 5  # at least so many
    seconds: float = 0.0  # and more of them until so many seconds have passed
    threads: int = THREADS  # of a process
    preset: str = "tiny"
    vocabulary: int = 4096
    sequence_length: int = 256
    batch_size: int = 32
    micro_batch_size: int = 16  # x sequence_length x vocabulary x 4 bytes of logits: 64 MiB
    steps: int = 30
    log_every: int = 10  # updates of an interval; the first is not counted


def flags(settings: Settings) -> list[object]:
    """What both scripts are told: a constant rate without warm-up, and nothing aside of training."""
    said: dict[str, object] = {
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
    return [part for name, value in said.items() for part in (f"--{name}", value)]


def measure(settings: Settings, name: str) -> dict[str, float]:
    """One run in a fresh process: tokens/s, MiB at the highest, MiB above the start, and the mean loss of the intervals."""
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
            "--steps must be a multiple of --log-every, at least twice as many: the first interval is dropped"
        )
    print(
        f"{settings.preset}, {settings.batch_size} windows of {settings.sequence_length} an update, {settings.threads} "
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
        print(described(len(pairs), pairs[-1]), flush=True)

    apart = max(abs(pair["ours"]["loss"] - pair["bare"]["loss"]) for pair in pairs)
    print(
        f"\nloss, ours {pairs[0]['ours']['loss']:.6f}; furthest from bare's {apart:.1e} (the same updates, if this is small)"
    )
    print(f"tokens/s ratio ours/bare: {spread(ratios(pairs, 'tokens/s'))}  [wanted >= {SPEED_WANTED}]")
    if "above start" in pairs[0]["ours"]:
        print(
            f"peak memory ratio: {spread(ratios(pairs, 'peak'))} whole process, libraries and all  [wanted <= {MEMORY_WANTED}]"
        )
        print(f"peak memory ratio: {spread(ratios(pairs, 'above start'))} above the start  [wanted <= {MEMORY_WANTED}]")
    else:
        print(f"peak memory ratio: {spread(ratios(pairs, 'peak'))} the device's allocator  [wanted <= {MEMORY_WANTED}]")


def ratios(pairs: list[dict[str, Any]], key: str) -> list[float]:
    """ours / bare, pair by pair."""
    return [pair["ours"][key] / pair["bare"][key] for pair in pairs]


def described(number: int, pair: dict[str, dict[str, float]]) -> str:
    """A pair's line: each figure of ours and of bare, and their ratio."""
    parts = [f"pair {number}"]
    for key in ("tokens/s", "peak", "above start"):
        if key in pair["ours"]:
            unit = "" if key == "tokens/s" else " MiB"
            parts.append(
                f"{key} {pair['ours'][key]:,.0f} / {pair['bare'][key]:,.0f}{unit} = {ratios([pair], key)[0]:.3f}"
            )
    return "   ".join(parts)


if __name__ == "__main__":
    os.chdir(ROOT)  # --output-dir and --config are the repository's
    main(tyro.cli(Settings, description=__doc__))
