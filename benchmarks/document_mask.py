"""The effect of --cross-document-attention, on and off: whether a token attends to the earlier documents in its window.

    python benchmarks/document_mask.py [--steps 300] [--seeds 1 2]

Both train on the same windows with the same seeds and the same number of updates, by train_shared.py as users run it.
The trunks are then scored by `python -m forge_common.evaluate` on held-out documents, each alone in its windows, so
that the scoring is the same for both. Results are kept in OUTPUT_DIR/results.json. The same command continues where it
was interrupted, an interrupted run from its last checkpoint (its tokens/s is then measured at two different times).
Only windows that contain the end of a document can differ: count them before you interpret a difference.
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
LOG_EVERY = 10  # updates; the first interval is warm-up
SOURCES = {"docs": "local:docs", "python": "local:python"}  # equally many windows of each


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
    val_fraction: float = 0.02
    """Share of the documents that is held out and scored."""
    max_tokens: int = 0
    """Tokens of a source that are scored, at most; 0: all."""


def flags(settings: Settings) -> list[object]:
    """The flags of all runs."""
    values: dict[str, object] = {
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
    return [*mixed, *(part for name, value in values.items() for part in (f"--{name}", value))]


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
        raise SystemExit(
            f"--steps must be at least {2 * LOG_EVERY}: the first {LOG_EVERY} are not counted for tokens/s"
        )
    kept = settings.output_dir / "results.json"
    same = {k: str(v) for k, v in vars(settings).items() if k not in ("output_dir", "seeds")}
    content: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {"settings": same, "results": {}}
    if content["settings"] != same:
        raise SystemExit(f"{kept} holds the results of other settings. Choose another --output-dir.")
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
                partial = kept.with_suffix(".tmp")
                partial.write_text(json.dumps(content, indent=2) + "\n")
                os.replace(partial, kept)
            print(line(attention, seed, results[name]), flush=True)
    print(differences(settings.seeds, results))


def line(attention: str, seed: int, result: dict[str, Any]) -> str:
    """A row of the table: each source's loss and its standard error over documents, all tokens' loss, tokens/s."""
    cells = "".join(f"{loss['loss']:>11.4f} ± {loss['stderr'] or 0:.4f}" for loss in result["losses"].values())
    return f"{attention:<10}{seed:>5}{cells}{result['loss']:>10.4f}{result['tokens/s']:>11,.0f}"


def differences(seeds: tuple[int, ...], results: dict[str, Any]) -> str:
    """off - on of each seed, where the documents and the windows are the same, and the mean over seeds."""
    pairs = [(results[f"off-{seed}"], results[f"on-{seed}"]) for seed in seeds]
    gains = {
        name: [off["losses"][name]["loss"] - on["losses"][name]["loss"] for off, on in pairs] for name in SOURCES
    } | {"all": [off["loss"] - on["loss"] for off, on in pairs]}
    lines = ["", f"nats per token on {pairs[0][0]['tokens']:,} tokens of documents, each alone, off - on:"]
    for name, values in gains.items():
        each = ", ".join(f"seed {seed} {value:+.4f}" for seed, value in zip(seeds, values, strict=True))
        lines.append(f"  {name:<8}{statistics.fmean(values):+.4f}  ({each})")
    ratios = [off["tokens/s"] / on["tokens/s"] for off, on in pairs]
    each = ", ".join(f"seed {seed} {ratio:.3f}" for seed, ratio in zip(seeds, ratios, strict=True))
    lines.append(f"tokens/s, off / on: {statistics.fmean(ratios):.3f}  ({each})")
    return "\n".join(lines)


if __name__ == "__main__":
    os.chdir(ROOT)  # --output-dir and --config are the repository's
    main(tyro.cli(Settings, description=__doc__))
