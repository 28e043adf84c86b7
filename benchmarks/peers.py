"""Our scripts beside other training loops: speed, memory, start-up, on the same model, windows, threads and updates.

    python benchmarks/peers.py [--rounds 3] [--only train_shared "bare loop"] [--small]
    python benchmarks/peers.py --show     (the table of what was measured, in Markdown)

docs/PERFORMANCE.md says what is compared and how. Each measurement is a new process; the rounds repeat the whole list.
Everything measured is kept in OUTPUT_DIR/peers.json: the same command continues an interrupted measurement. It ends with the
table, the goals, OUTPUT_DIR/peers.svg, and an error where contenders that train the same thing do not have the same loss.
"""

import json
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import tyro
from script_process import BIN, ROOT, THREADS, rows, run, speed

sys.path.insert(0, str(ROOT))

from peers_table import report

from forge_common.files.atomic import write_json

LOOPS, BARE, SHARED, MODULE = "peers_loops.py", "engine_baseline.py", "train_shared.py", "train_module.py"
COMPILED = {"ACCELERATE_DYNAMO_BACKEND": "inductor"}  # what `accelerate launch --dynamo_backend inductor` sets


@dataclass(frozen=True)
class Work:
    """Sizes of the model and of an update."""

    vocabulary: int = 16_384
    large_vocabulary: int = 128_256
    hidden_size: int = 512
    intermediate_size: int = 1408
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    sequence_length: int = 512
    batch_size: int = 16
    micro_batch_size: int = 4
    warm_up: int = 2
    """Updates that are not timed; torch.compile compiles in them."""
    timed: int = 4
    """Updates that are timed, a multiple of the warm-up; one more, timed too, has the loss that is compared."""


SMALL = Work(2048, 4096, 128, 384, 2, 4, 2, 128, 4, 2, 2, 4)


@dataclass(frozen=True)
class Settings:
    output_dir: Path = Path("runs/peers")
    rounds: int = 3
    """Measurements of each contender."""
    only: tuple[str, ...] = ()
    """Contenders to measure; none: all."""
    small: bool = False
    """A tiny model, to test the benchmark; use another --output-dir."""
    show: bool = False
    """Measure nothing, print the table in Markdown."""
    packages: Path = Path(".bench")
    """Folder with the packages of benchmarks/requirements.txt (`make bench` installs them)."""
    threads: int = THREADS
    """Threads of a process, over all processes of a contender."""
    data: str = "local:docs"
    """Source of the text."""


class Contender(NamedTuple):
    script: str
    flags: str = ""
    variables: dict[str, str] = {}  # noqa: RUF012 (never changed)
    trains: str = "whole"  # those with the same value, on the same work, must have the same loss
    work: str = "standard"
    processes: int = 1
    start: bool = False  # one update, to measure the time until it begins


CONTENDERS = {
    "matrix products": Contender(LOOPS, "products", trains=""),
    "train_shared": Contender(SHARED),
    "bare loop": Contender(BARE),
    "Accelerate": Contender(LOOPS, "accelerate"),
    "HF Trainer": Contender(LOOPS, "trainer"),
    "train_shared, compiled": Contender(SHARED, variables=COMPILED),
    "bare loop, compiled": Contender(BARE, variables=COMPILED),
    "Accelerate, compiled": Contender(LOOPS, "accelerate", COMPILED),
    "HF Trainer, compiled": Contender(LOOPS, "trainer --compile"),
    "litgpt, compiled": Contender(LOOPS, "litgpt --compile"),
    "train_module ffn": Contender(MODULE, "--kind ffn", trains="ffn"),
    "train_module ffn+head": Contender(MODULE, "--kind ffn+head", trains="ffn+head"),
    "train_module lora": Contender(MODULE, "--kind lora", trains="lora"),
    "PEFT LoRA": Contender(LOOPS, "peft", trains="lora"),
    "train_shared, 2 processes": Contender(SHARED, processes=2),
    "train_shared, large vocabulary": Contender(SHARED, work="large"),
    "bare loop, large vocabulary": Contender(BARE, work="large"),
    "start of train_shared": Contender(SHARED, trains="", start=True),
    "start of train_module": Contender(MODULE, "--kind ffn", trains="", start=True),
    "start of HF Trainer": Contender(LOOPS, "trainer", trains="", start=True),
}


def flags_of(values: dict[str, object]) -> list[object]:
    return [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", value)]


def updates_of(work: Work, steps: int, log_every: int) -> dict[str, object]:
    """The flags of the updates, which every script has. Without decay, since the projects differ in what they decay."""
    sizes = {"batch_size": work.batch_size, "micro_batch_size": work.micro_batch_size}
    return {**sizes, "steps": steps, "log_every": log_every, "lr": 1e-3}


def training(settings: Settings, work: Work) -> dict[str, object]:
    """The flags of our scripts and of the bare loop: nothing but training."""
    values: dict[str, object] = {"data": settings.data, "cache_dir": settings.output_dir.absolute() / "cache"}
    values |= {"sequence_length": work.sequence_length, "schedule": "constant", "warmup_steps": 0, "weight_decay": 0}
    return values | {"val_fraction": 0, "save_every": 0, "tracker": "none", "statistics_tokens": 1000}


def prepare(settings: Settings, name: str, work: Work) -> None:
    """The checkpoint and the windows of one work, once."""
    folder = settings.output_dir.absolute() / name
    if (folder / "work.json").exists():
        return
    steps = work.warm_up + work.timed + 1
    values = training(settings, work) | updates_of(work, steps, 1) | {"output_dir": folder}
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    values |= {size: getattr(work, size) for size in sizes} | {"tokenizer": f"train:{settings_vocabulary(settings)}"}
    flags = [*flags_of(values), "--vocabulary", work.vocabulary, "--cross-document-attention"]
    command = [str(BIN / "python"), str(ROOT / "benchmarks/peers_prepare.py")]
    run(command, *flags, log=settings.output_dir / f"{name}.log", threads=settings.threads)


def settings_vocabulary(settings: Settings) -> int:
    """Tokens of the tokenizer, of both works: with the large vocabulary most rows of the embedding have no token."""
    return (SMALL if settings.small else Work()).vocabulary


def measure(settings: Settings, name: str, work: Work) -> dict[str, float]:
    """One contender in a new process: tokens/s, peak MiB, peak MiB above the start, the last update's loss, seconds."""
    contender = CONTENDERS[name]
    prepared = settings.output_dir.absolute() / contender.work
    folder = settings.output_dir.absolute() / "runs" / name.replace(", ", "-").replace(" ", "_")
    shutil.rmtree(folder, ignore_errors=True)
    steps, log_every = (1, 1) if contender.start else (work.warm_up + work.timed + 1, work.warm_up)
    values = updates_of(work, steps, log_every) | {"output_dir": folder}
    variables = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no"} | contender.variables
    command = [str(BIN / "python")]
    if contender.processes > 1:
        command = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", str(contender.processes)]
    if contender.script == LOOPS:
        values |= {"work": prepared}
        if contender.flags.split()[0] in ("litgpt", "peft"):
            variables["PYTHONPATH"] = f"{ROOT}{os.pathsep}{settings.packages.absolute()}"
    else:
        values |= training(settings, work)
        module = {"trunk": prepared / "checkpoint", "name": "module", "general_tokens": 0}
        module |= {"layers": f"top:{work.num_hidden_layers // 2}"}
        values |= module if contender.script == MODULE else {"trunk_from": prepared / "checkpoint"}
    script = ROOT / contender.script if contender.script in (SHARED, MODULE) else ROOT / "benchmarks" / contender.script
    started = time.time()
    before = run(
        [*command, str(script)],
        *contender.flags.split(),
        *flags_of(values),
        log=folder.with_suffix(".log"),
        threads=settings.threads // contender.processes,
        started=None if contender.script == LOOPS and contender.flags == "products" else folder / "settings.json",
        variables=variables,
    )
    if contender.flags == "products":
        return json.loads((folder / "products.json").read_text(encoding="utf-8"))
    found = rows(folder)
    if contender.start:  # the row was written at the end of the update, whose duration it has
        ended = (folder / "metrics.jsonl").stat().st_mtime
        return {"start": ended - started - found[0]["train/tokens"] / found[0]["train/tokens_per_second"]}
    result = {"tokens/s": speed(found), "loss": found[-1]["train/loss"]}
    if contender.processes > 1:  # the row has the peak of one process
        return result
    peak = found[-1]["memory/process_peak_mb"]
    return result | {"peak": peak, "above start": peak - before}


def main(settings: Settings) -> None:
    standard = SMALL if settings.small else Work()
    works = {"standard": standard, "large": replace(standard, vocabulary=standard.large_vocabulary)}
    stored = {"works": {name: asdict(work) for name, work in works.items()}}
    stored |= {"threads": settings.threads, "data": settings.data}
    file = settings.output_dir / "peers.json"
    kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else stored | {"found": {}}
    if any(kept[key] != value for key, value in stored.items()):
        raise SystemExit(f"{file} has measurements of other settings. Choose another --output-dir, or remove it.")
    unknown = set(settings.only) - CONTENDERS.keys()
    if unknown:
        raise SystemExit(f"--only {', '.join(unknown)}: the contenders are {', '.join(CONTENDERS)}")
    if not settings.show:
        settings.output_dir.mkdir(parents=True, exist_ok=True)
        for name, work in works.items():
            prepare(settings, name, work)
        kept["flops"] = json.loads((settings.output_dir / "standard/work.json").read_text())["flops_per_token"]
        for number in range(settings.rounds):
            for name in settings.only or CONTENDERS:
                results = kept["found"].setdefault(name, [])
                if len(results) <= number:
                    results.append(measure(settings, name, works[CONTENDERS[name].work]))
                    write_json(file, kept)
                    values = "".join(f"  {key} {value:,.4g}" for key, value in results[-1].items())
                    print(f"{number + 1}/{settings.rounds} {name:<31}{values}", flush=True)
    groups = {name: f"{contender.work} {contender.trains}" for name, contender in CONTENDERS.items()}
    table, chart, wrong = report(kept, {name: group for name, group in groups.items() if CONTENDERS[name].trains})
    print(table)
    (settings.output_dir / "peers.svg").write_text(chart, encoding="utf-8")
    if wrong:
        raise SystemExit(wrong)


if __name__ == "__main__":
    os.chdir(ROOT)  # --output-dir and --packages are the repository's
    main(tyro.cli(Settings, description=__doc__))
