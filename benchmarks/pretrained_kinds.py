"""Which kind, rate and layers suit a pretrained trunk: trains a module for each cell and domain, and scores it.

    OMP_NUM_THREADS=1 python benchmarks/pretrained_kinds.py --cells "lora 3e-3 all" "lora 3e-3 top:15" "ffn 1e-3 top:6"

A cell is KIND RATE LAYERS, and more flags of train_module.py if need be. Each module is trained in a process of its
own, of which are measured: the processor time of an update (the mean of all after the first) and the peak (the largest
resident set, to the end of publishing). Then it is scored on the same held-out windows as the trunk alone. The gain is
the trunk's loss minus the module's. The standard errors of it, and of how far a cell lies above the best of its domain,
are over the windows, of each one's own difference: they say nothing about other text or another seed. The same command
continues an interrupted comparison. All cells in OUTPUT_DIR are printed.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from script_process import ROOT, rows

sys.path.insert(0, str(ROOT))

import train_module
from forge_common.artifacts.module_folder import read_model
from forge_common.command_line import read_settings
from forge_common.data.corpora import open_corpora
from forge_common.labels import is_scored

POLL_SECONDS = 0.1
TRUNK = "trunk"  # the cell without a module


@dataclass(frozen=True)
class Settings:
    cells: tuple[str, ...]
    """KIND RATE LAYERS [FLAGS], such as "lora 3e-3 top:15 --rank 8"."""
    domains: tuple[str, ...] = ("perl", "docs")
    """Corpora local:NAME to train on."""
    trunk: Path = Path("runs/pretrained/trunk")
    """Folder of a Transformers checkpoint."""
    output_dir: Path = Path("runs/pretrained_kinds")
    """Folder for the modules and results.jsonl."""
    cache_dir: Path = Path("runs/pretrained/cache")
    """Folder for tokens."""
    updates: int = 60
    """Updates of 2 windows of 256 tokens."""
    val_tokens: int = 16_384
    """Held-out tokens that are scored, in windows of 256."""
    bf16: bool = False
    """Compute in bf16, with the frozen matrices in bf16: where the CPU has instructions for it, some three times as fast."""


def flags(settings: Settings, domain: str, cell: str, folder: Path) -> list[str]:
    """The command line of train_module.py without the script."""
    kind, rate, layers, *more = cell.split()
    values = {"trunk": settings.trunk, "name": domain, "data": f"local:{domain}", "output-dir": folder, "kind": kind}
    values |= {"lr": rate, "layers": layers, "cache-dir": settings.cache_dir, "sequence-length": 256}
    values |= {"batch-size": 2, "micro-batch-size": 2, "steps": settings.updates, "val-every": 0, "val-tokens": 256}
    values |= {"general-tokens": 0, "log-every": 1, "statistics-tokens": 20_000, "tracker": "none", "resume": "never"}
    more += ["--trunk-dtype", "bf16"] if settings.bf16 else []
    return [str(part) for name, value in values.items() for part in (f"--{name}", value)] + more


def trained(line: list[str], folder: Path, precision: str) -> dict[str, float]:
    """Trains a module; the processor time of an update (seconds) and the peak (MiB)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    times = []  # of the process, when it has written a row of the log
    with open(folder / "log.txt", "w", encoding="utf-8") as log:
        command = [sys.executable, str(ROOT / "train_module.py"), *line]
        environment = os.environ | {"ACCELERATE_MIXED_PRECISION": precision}
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        ended = status = 0
        while not ended:
            time.sleep(POLL_SECONDS)
            number = len(rows(folder)) if (folder / "metrics.jsonl").exists() else 0
            if number > len(times):
                fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
                times += [(int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")] * (number - len(times))
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {status}. See {folder}/log.txt.")
    return {"seconds": (times[-1] - times[0]) / (len(times) - 1), "peak": usage.ru_maxrss / 1024}


@torch.no_grad()
def scored(settings: Settings, domain: str, module: Path | None) -> dict[str, list[float]]:
    """Nats and tokens of each held-out window of a domain."""
    model, tokenizer, *_ = read_model(str(settings.trunk), module)
    sys.argv[1:] = flags(settings, domain, "lora 1e-3 all", settings.output_dir)
    sys.argv += ["--val-tokens", str(settings.val_tokens)]
    corpora = open_corpora(read_settings(train_module.Settings, None), tokenizer, model.config, print)
    nats: list[float] = []
    tokens: list[float] = []
    for window in (torch.from_numpy(store[i]) for store in corpora.held_out for i in range(len(store))):
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.bf16):
            sums = model.eval()(window[None])
        nats.append(float(sums.nats))
        tokens.append(int(is_scored(window[1:], model.config.ignore_index).sum()))
    return {"nats": nats, "tokens": tokens}


def ratio(nats: list[float], tokens: list[float]) -> tuple[float, float]:
    """Nats per token, and the standard error of this ratio over the windows."""
    loss, n = math.fsum(nats) / sum(tokens), len(nats)
    squares = math.fsum((part - loss * size) ** 2 for part, size in zip(nats, tokens, strict=True))
    return loss, math.sqrt(squares * n / (n - 1)) / sum(tokens)


def difference(row: dict[str, Any], other: dict[str, Any]) -> str:
    """The loss of a row minus that of another one on the same windows, and its standard error."""
    nats = [a - b for a, b in zip(row["nats"], other["nats"], strict=True)]
    return "{:.3f} ± {:.3f}".format(*ratio(nats, row["tokens"]))


def table(results: list[dict[str, Any]]) -> str:
    """The rows in Markdown, those of a domain by their loss."""
    lines = ["| domain | cell | loss | gain | above the best | module, MB | processor s an update | peak, MiB |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- | --- |"]
    trunks = {row["domain"]: row for row in results if row["cell"] == TRUNK}
    best: dict[str, dict[str, Any]] = {}
    for row in sorted(results, key=lambda row: (row["domain"], math.fsum(row["nats"]))):
        loss, error = ratio(row["nats"], row["tokens"])
        first = best.setdefault(row["domain"], row)
        if row["cell"] == TRUNK:
            lines.append(f"| {row['domain']} | trunk | {loss:.3f} ± {error:.3f} | | | | | |")
            continue
        above = "" if row is first else difference(row, first)
        measured = f"{row['bytes'] / 1e6:.1f} | {row['seconds']:.2f} | {row['peak']:,.0f}"
        gain = difference(trunks[row["domain"]], row)
        lines.append(f"| {row['domain']} | {row['cell']} | {loss:.3f} | {gain} | {above} | {measured} |")
    return "\n".join(lines)


def main(settings: Settings) -> None:
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    file = settings.output_dir / "results.jsonl"
    results = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(row["domain"], row["cell"]) for row in results}
    for cell in (TRUNK, *settings.cells):
        for domain in settings.domains:
            if (domain, cell) in done:
                continue
            folder = settings.output_dir / f"{domain} {cell}".replace(" ", "_")
            row: dict[str, Any] = {"domain": domain, "cell": cell}
            if cell == TRUNK:
                row |= scored(settings, domain, None)
            else:
                row |= trained(flags(settings, domain, cell, folder), folder, "bf16" if settings.bf16 else "no")
                row |= scored(settings, domain, folder / "module")
                row["bytes"] = (folder / "module" / "module.safetensors").stat().st_size
            with open(file, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
            results.append(row)
            print(f"{domain} {cell}: {statistics.fmean(row['nats']) / statistics.fmean(row['tokens']):.4f}", flush=True)
    print(table(results))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
