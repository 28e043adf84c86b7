"""What it is worth that a token does not see the documents before its own: --cross-document-attention, on against off.

    python benchmarks/document_mask.py [--steps 300] [--seeds 1 2]

Both train on the same windows with the same seeds and the same number of updates, by train_shared.py as users run it. The
trunks are then scored by `python -m forge_common.evaluate` on held-out documents, each standing alone (there are no
others in its window to see, whichever way the trunk was trained). Results are kept in OUTPUT_DIR/results.json; the same
command goes on where it was interrupted, a run in the middle from its last checkpoint. (Its tokens/s is then of two
times of day.) Only windows with a document's end inside can differ: count them before reading much into a difference.
"""

import json
import os
import shlex
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from script_process import ROOT, THREADS, launched, rows, run, speed

FLAGS = {"on": "--cross-document-attention", "off": "--no-cross-document-attention"}
LOG_EVERY = 10  # updates; the first interval is warming up
SOURCES = {"docs": "local:docs", "python": "local:python"}  # as many windows of each


@dataclass(frozen=True)
class Settings:
    output_dir: Path = Path("runs/documents")
    config: Path = Path("accelerate_configs/cpu.yaml")
    seeds: tuple[int, ...] = (1, 2)
    threads: int = THREADS
    preset: str = "tiny"
    vocabulary: int = 4096
    sequence_length: int = 256
    batch_size: int = 32
    micro_batch_size: int = 16
    steps: int = 300
    lr: float = 2e-3
    val_fraction: float = 0.02  # of the documents: what is scored
    max_tokens: int = 0  # scored of a source at most; 0: all


def flags(settings: Settings) -> list[object]:
    """What all runs are told."""
    said: dict[str, object] = {
        "cache-dir": cache(settings),
        "tokenizer": f"train:{settings.vocabulary}",
        "preset": settings.preset,
        "sequence-length": settings.sequence_length,
        "batch-size": settings.batch_size,
        "micro-batch-size": settings.micro_batch_size,
        "steps": settings.steps,
        "lr": settings.lr,
        "warmup-steps": settings.steps // 10,
        "val-fraction": settings.val_fraction,
        "log-every": LOG_EVERY,
        "val-every": 0,
        "save-every": 50,
        "keep": 1,
        "tracker": "none",
    }
    mixed = ["--data", *(f"{source}@1" for source in SOURCES.values())]
    return [*mixed, *(part for name, value in said.items() for part in (f"--{name}", value))]


def cache(settings: Settings) -> Path:
    return (settings.output_dir / "cache").absolute()


def result_of(settings: Settings, attention: str, seed: int) -> dict[str, Any]:
    """Trains a trunk and scores it: tokens/s, and each source's loss with its standard error."""
    name = f"{attention}-{seed}"
    folder = (settings.output_dir / name).absolute()
    chosen = [FLAGS[attention], "--seed", seed, "--output-dir", folder]
    log = settings.output_dir / f"{name}.log"
    run(launched(settings.config, "train_shared.py"), *flags(settings), *chosen, log=log, threads=settings.threads)
    scores = folder / "scores.json"
    run(
        [sys.executable, "-m", "forge_common.evaluate", "--model", str(folder / "trunk"), "--json", str(scores)],
        "--data",
        *(f"{name}={source}" for name, source in SOURCES.items()),
        "--cache-dir",
        cache(settings),
        "--max-tokens",
        settings.max_tokens,
        log=log.with_suffix(".scores.log"),
        threads=settings.threads,
    )
    scored = {row["domain"]: row for row in json.loads(scores.read_text())["rows"]}
    tokens = sum(row["tokens"] for row in scored.values())
    whole = sum(row["loss"] * row["tokens"] for row in scored.values()) / tokens
    losses = {source: {key: scored[source][key] for key in ("loss", "stderr", "documents")} for source in SOURCES}
    return {"losses": losses, "loss": whole, "tokens": tokens, "tokens/s": speed(rows(folder))}


def main(settings: Settings) -> None:
    if settings.steps < 2 * LOG_EVERY:
        raise SystemExit(f"--steps must be at least {2 * LOG_EVERY}: the first {LOG_EVERY} do not count for tokens/s")
    kept = settings.output_dir / "results.json"
    same = {k: str(v) for k, v in vars(settings).items() if k not in ("output_dir", "seeds")}
    content: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {"settings": same, "results": {}}
    if content["settings"] != same:
        raise SystemExit(f"{kept} holds the results of other settings; choose another --output-dir")
    dry = [*flags(settings), "--output-dir", settings.output_dir / "prepared", "--dry-run"]
    run(
        launched(settings.config, "train_shared.py"),
        *dry,
        log=settings.output_dir / "prepared.log",
        threads=settings.threads,
    )
    command = shlex.join(["train_shared.py", *map(str, flags(settings))])
    print(f"{command}\nload before the start {os.getloadavg()[0]:.2f}, {settings.threads} thread(s)\n", flush=True)
    print(f"{'attention':<10}{'seed':>5}{''.join(f'{name:>20}' for name in SOURCES)}{'all':>10}{'tokens/s':>11}")
    results = content["results"]
    for seed in settings.seeds:
        for attention in FLAGS:
            name = f"{attention}-{seed}"
            if name not in results:
                results[name] = result_of(settings, attention, seed)
                aside = kept.with_suffix(".tmp")
                aside.write_text(json.dumps(content, indent=2) + "\n")
                os.replace(aside, kept)
            print(line(attention, seed, results[name]), flush=True)
    print(differences(settings.seeds, results))


def line(attention: str, seed: int, result: dict[str, Any]) -> str:
    """A row of the table: each source's loss and its standard error over documents, all tokens' loss, tokens/s."""
    cells = "".join(f"{loss['loss']:>11.4f} ± {loss['stderr'] or 0:.4f}" for loss in result["losses"].values())
    return f"{attention:<10}{seed:>5}{cells}{result['loss']:>10.4f}{result['tokens/s']:>11,.0f}"


def differences(seeds: tuple[int, ...], results: dict[str, Any]) -> str:
    """off - on of each seed, where the documents and the windows are the same, and the mean over seeds."""
    pairs = [(results[f"off-{seed}"], results[f"on-{seed}"]) for seed in seeds]
    told = {
        name: [off["losses"][name]["loss"] - on["losses"][name]["loss"] for off, on in pairs] for name in SOURCES
    } | {"all": [off["loss"] - on["loss"] for off, on in pairs]}
    lines = ["", f"nats per token on {pairs[0][0]['tokens']:,} tokens of documents standing alone, off - on:"]
    for name, values in told.items():
        each = ", ".join(f"seed {seed} {value:+.4f}" for seed, value in zip(seeds, values, strict=True))
        lines.append(f"  {name:<8}{statistics.fmean(values):+.4f}  ({each})")
    ratios = [off["tokens/s"] / on["tokens/s"] for off, on in pairs]
    each = ", ".join(f"seed {seed} {ratio:.3f}" for seed, ratio in zip(seeds, ratios, strict=True))
    lines.append(f"tokens/s, off / on: {statistics.fmean(ratios):.3f}  ({each})")
    return "\n".join(lines)


if __name__ == "__main__":
    os.chdir(ROOT)  # --output-dir and --config are the repository's
    main(tyro.cli(Settings, description=__doc__))
