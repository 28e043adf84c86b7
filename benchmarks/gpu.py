"""Speed and memory on one GPU in bf16: the scripts as users start them, beside a plain PyTorch loop around the same model.

    python benchmarks/gpu.py [--rounds 2] [--only compiled "plain loop, compiled"]

The scripts make dry runs: six updates, of which the last four are timed, and nothing is published. The plain loop is
benchmarks/engine_baseline.py, with the mask of documents as a tensor [T, T]. Each measurement is a new process; the
rounds repeat the whole list. MFU refers to the data sheet's dense 16-bit peak, with the FLOPs that the model needs (no
recomputation, nothing for frozen weights). All measurements are kept in OUTPUT_DIR/gpu.json.
"""

import json
import os
import re
import shlex
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from script_process import ROOT, launched, rows, run, speed

LOOP, SHARED, MODULE = "benchmarks/engine_baseline.py", "train_shared.py", "train_module.py"
COMPILED = ("--dynamo_backend", "inductor")
# name: the script, the launcher's flags, the script's flags
VARIANTS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "plain loop": (LOOP, (), ""),
    "plain loop, compiled": (LOOP, COMPILED, ""),
    "eager": (SHARED, (), ""),
    "compiled": (SHARED, COMPILED, ""),
    "compiled, any kernels": (SHARED, COMPILED, "--no-deterministic"),
    "compiled, across documents": (SHARED, COMPILED, "--cross-document-attention"),
    "compiled, activations again": (SHARED, COMPILED, "--activation-checkpointing"),
    "module ffn, compiled": (MODULE, COMPILED, "--kind ffn --trunk-dtype bf16"),
    "module lora, compiled": (MODULE, COMPILED, "--kind lora --trunk-dtype bf16"),
}


@dataclass(frozen=True)
class Settings:
    output_dir: Path = Path("runs/gpu")
    config: Path = Path("accelerate_configs/single_gpu.yaml")
    """Configuration of accelerate for one process: device and precision."""
    rounds: int = 1
    """Measurements of each variant."""
    only: tuple[str, ...] = ()
    """Variants to measure; none: all."""
    data: str = "local:python"
    vocabulary: int = 16_384
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 8
    num_attention_heads: int = 16
    num_key_value_heads: int = 8
    sequence_length: int = 2048
    batch_size: int = 64
    micro_batch_size: int = 8


def flags(settings: Settings, script: str) -> list[object]:
    """What every run of a script is given."""
    shape = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    values: dict[str, object] = {name: getattr(settings, name) for name in shape}
    values["tokenizer"] = f"train:{settings.vocabulary}"
    if script == MODULE:
        values = {"trunk": settings.output_dir.absolute() / "trunk" / "trunk", "name": "python", "general_tokens": 0}
    values |= {name: getattr(settings, name) for name in ("data", "sequence_length", "batch_size", "micro_batch_size")}
    values |= {"cache_dir": settings.output_dir.absolute() / "cache", "val_fraction": 0, "tracker": "none"}
    values |= {"schedule": "constant", "warmup_steps": 0, "log_every": 2}
    return [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", value)]


def measure(settings: Settings, name: str) -> dict[str, float]:
    """One run in a new process: tokens/s, MFU in percent (NaN for the plain loop) and the allocator's peak in MiB."""
    script, launcher, more = VARIANTS[name]
    command = launched(settings.config, script)
    command[-1:-1] = launcher
    folder = settings.output_dir.absolute() / name.replace(", ", "-").replace(" ", "_")
    log = folder.with_suffix(".log")
    if script == LOOP:
        run(command, *flags(settings, script), "--steps", 6, "--output-dir", folder, log=log, threads=8)
        training = rows(folder)
        return {"tokens/s": speed(training), "mfu": float("nan"), "peak": training[-1]["memory/peak_mb"]}
    run(command, *flags(settings, script), *shlex.split(more), "--dry-run", "--output-dir", folder, log=log, threads=8)
    line = re.search(r"^time .* ([\d,]+) tok/s, mfu (\d+)%.* ([\d,]+) MiB$", log.read_text(encoding="utf-8"), re.M)
    assert line, f"{log} has no time"
    tokens, mfu, peak = (float(value.replace(",", "")) for value in line.groups())
    return {"tokens/s": tokens, "mfu": mfu, "peak": peak}


def main(settings: Settings) -> None:
    unknown = set(settings.only) - VARIANTS.keys()
    if unknown:
        raise SystemExit(f"--only {', '.join(unknown)}: the variants are {', '.join(VARIANTS)}")
    chosen = settings.only or tuple(VARIANTS)
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    if any(VARIANTS[name][0] == MODULE for name in chosen):
        trunk = settings.output_dir.absolute() / "trunk"
        command = launched(settings.config, SHARED)
        run(
            command,
            *flags(settings, SHARED),
            "--steps",
            1,
            "--output-dir",
            trunk,
            log=trunk.with_suffix(".log"),
            threads=8,
        )
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    for _ in range(settings.rounds):
        for name in chosen:
            found[name].append(measure(settings, name))
            content = {"settings": {key: str(value) for key, value in vars(settings).items()}, "found": found}
            (settings.output_dir / "gpu.json").write_text(json.dumps(content, indent=2) + "\n")
            print(
                f"{name:<28}" + "".join(f"{key} {value:>9,.0f}  " for key, value in found[name][-1].items()), flush=True
            )
    print(f"\n{'median':<28}{'tokens/s':>10}{'MFU %':>7}{'peak MiB':>10}")
    for name, results in found.items():
        tokens, mfu, peak = (
            statistics.median(result[key] for result in results) for key in ("tokens/s", "mfu", "peak")
        )
        print(f"{name:<28}{tokens:>10,.0f}{mfu:>7.0f}{peak:>10,.0f}")


if __name__ == "__main__":
    os.chdir(ROOT)  # --output-dir and --config are the repository's
    main(tyro.cli(Settings, description=__doc__))
