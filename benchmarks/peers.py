"""Our scripts beside other training loops: speed, memory, start-up, on the same model, windows, threads and updates.

    python benchmarks/peers.py [--rounds 3] [--only train_shared "bare loop"] [--small]
    python benchmarks/peers.py --show     (the table of what was measured, in Markdown)

docs/PERFORMANCE.md says what is compared and how. Each measurement is a new process; the rounds repeat the whole list.
Everything measured is kept in OUTPUT_DIR/peers.json: the same command continues an interrupted measurement. It ends
with the table, the goals, OUTPUT_DIR/peers.svg, and an error where contenders that train the same thing do not have the
same loss.
"""

import json
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import tyro
from script_process import BIN, ROOT, THREADS, rows, run, speed

sys.path.insert(0, str(ROOT))

from peers_table import report

from forge_common.files.atomic import write_json

LOOPS, BARE = "benchmarks/peers_loops.py", "benchmarks/engine_baseline.py"
SHARED, MODULE = "train_shared.py", "train_module.py"
COMPILED = {"ACCELERATE_DYNAMO_BACKEND": "inductor"}  # what `accelerate launch --dynamo_backend inductor` sets
MODEL = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
UPDATE = ("sequence_length", "batch_size", "micro_batch_size", "lr")


@dataclass(frozen=True)
class Work:
    """A model and its updates. The first `warm_up` updates are not timed, and the loss of the last one is compared."""

    vocabulary: int = 16_384
    tokens: int = 16_384  # of the tokenizer: the rest of a large vocabulary has no text
    hidden_size: int = 512
    intermediate_size: int = 1408
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    sequence_length: int = 512
    batch_size: int = 16
    micro_batch_size: int = 4
    lr: float = 1e-3
    warm_up: int = 2
    steps: int = 5

    def flags(self, *names: str) -> dict[str, object]:
        return {name: getattr(self, name) for name in names}


WORKS = {"standard": Work(), "large": Work(128_256, warm_up=1, steps=3)}
SMALL = {
    "standard": Work(2048, 2048, 128, 384, 2, 4, 2, 128, 4, 2),
    "large": Work(8192, 2048, 128, 384, 2, 4, 2, 128, 4, 2),
}


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
    """Measure nothing, print the tables in Markdown."""
    packages: Path = Path(".bench")
    """Folder with the packages of benchmarks/requirements.txt (`make bench` installs them)."""
    threads: int = THREADS
    """Threads of a contender, over all its processes."""
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
    "litgpt, compiled": Contender(LOOPS, "litgpt"),
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


def training(settings: Settings) -> dict[str, object]:
    """The flags of our scripts and of the bare loop: nothing but training. No decay: the projects differ in what they decay."""
    values: dict[str, object] = {"data": settings.data, "cache_dir": settings.output_dir.absolute() / "cache"}
    values |= {"schedule": "constant", "warmup_steps": 0, "weight_decay": 0, "val_fraction": 0}
    return values | {"save_every": 0, "tracker": "none", "statistics_tokens": 1000}


def prepare(settings: Settings, name: str, work: Work) -> None:
    """The checkpoint and the windows of one work, once."""
    folder = settings.output_dir.absolute() / name
    if not (folder / "work.json").exists():
        values = training(settings) | work.flags("vocabulary", "steps", *MODEL, *UPDATE)
        values |= {"tokenizer": f"train:{work.tokens}", "output_dir": folder}
        command = [str(BIN / "python"), str(ROOT / "benchmarks/peers_prepare.py"), "--cross-document-attention"]
        run(command, *flags_of(values), log=folder.with_suffix(".log"), threads=settings.threads)


def measure(settings: Settings, name: str, work: Work) -> dict[str, float]:
    """One contender in a new process: tokens/s, peak MiB, peak MiB above the start, the last update's loss, seconds."""
    contender = CONTENDERS[name]
    prepared = settings.output_dir.absolute() / contender.work
    folder = settings.output_dir.absolute() / "runs" / name.replace(", ", "-").replace(" ", "_")
    shutil.rmtree(folder, ignore_errors=True)
    values = work.flags(*UPDATE, "steps") | {"log_every": work.warm_up, "output_dir": folder}
    values |= {"steps": 1, "log_every": 1} if contender.start else {}
    if contender.trains == "lora":
        values["lr"] = 10 * work.lr  # so that other initial values would show in the loss
    variables = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no"} | contender.variables
    command = [str(BIN / "python"), str(ROOT / contender.script)]
    if contender.processes > 1:
        command[:1] = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", str(contender.processes)]
    if contender.script == LOOPS:
        del values["sequence_length"]  # the context of the checkpoint
        values |= {"work": prepared}
    else:
        values |= training(settings)
    if contender.script == MODULE:
        values |= {"trunk": prepared / "checkpoint", "name": "module", "general_tokens": 0}
        values |= {"layers": f"top:{work.num_hidden_layers // 2}"}
    elif contender.script != LOOPS:
        values |= {"trunk_from": prepared / "checkpoint"}
    if contender.flags in ("litgpt", "peft"):
        variables["PYTHONPATH"] = f"{ROOT}{os.pathsep}{settings.packages.absolute()}"
    started = time.time()
    before = run(
        command,
        *contender.flags.split(),
        *flags_of(values),
        log=folder.with_suffix(".log"),
        threads=max(1, settings.threads // contender.processes),
        started=None if contender.flags == "products" else folder / "settings.json",
        variables=variables,
    )
    if contender.flags == "products":
        return json.loads((folder / "products.json").read_text(encoding="utf-8"))
    found = rows(folder)
    if contender.start:  # the row was written at the end of the update, whose duration it has
        ended = (folder / "metrics.jsonl").stat().st_mtime
        return {"start": ended - started - found[0]["train/tokens"] / found[0]["train/tokens_per_second"]}
    result = {"tokens/s": speed(found), "loss": found[-1]["train/loss"]}
    if contender.work == "standard":  # where the matrix products are measured too
        flops = json.loads((prepared / "work.json").read_text(encoding="utf-8"))["flops_per_token"]
        result["FLOP/s"] = result["tokens/s"] * flops[contender.trains]
    if contender.processes > 1:  # the row has the peak of one process
        return result
    peak = found[-1]["memory/process_peak_mb"]
    return result | {"peak": peak, "above start": peak - before}


def main(settings: Settings) -> None:
    works = SMALL if settings.small else WORKS
    conditions = {"threads": settings.threads, "data": settings.data}
    conditions |= {"works": {name: asdict(work) for name, work in works.items()}}
    file = settings.output_dir / "peers.json"
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"conditions": conditions, "found": {}}
    if kept["conditions"] != conditions and not settings.show:
        raise SystemExit(f"{file} has measurements of other settings. Choose another --output-dir, or remove it.")
    if unknown := set(settings.only) - CONTENDERS.keys():
        raise SystemExit(f"--only {', '.join(unknown)}: the contenders are {', '.join(CONTENDERS)}")
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    for number in range(0 if settings.show else settings.rounds):
        for name in settings.only or CONTENDERS:
            work = CONTENDERS[name].work
            prepare(settings, work, works[work])
            results = kept["found"].setdefault(name, [])
            if len(results) <= number:
                results.append(measure(settings, name, works[work]))
                write_json(file, kept)
                values = "".join(f"  {key} {value:,.5g}" for key, value in results[-1].items())
                print(f"{number + 1}/{settings.rounds} {name:<31}{values}", flush=True)
    groups = {name: (contender.work, contender.trains) for name, contender in CONTENDERS.items() if contender.trains}
    table, chart, wrong = report(kept["found"], groups)
    print(table)
    (settings.output_dir / "peers.svg").write_text(chart, encoding="utf-8")
    if wrong:
        raise SystemExit(wrong)


if __name__ == "__main__":
    os.chdir(ROOT)  # --output-dir and --packages are the repository's
    main(tyro.cli(Settings, description=__doc__))
