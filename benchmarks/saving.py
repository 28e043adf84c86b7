"""What a checkpoint costs a run: how long the loop waits for it, and how much later the updates beside it are done.

    python benchmarks/saving.py [--presets small base] [--output-dir runs/saving]

Each round trains the same number of updates of a trunk three times: without a checkpoint; with one that the loop waits
for (as every checkpoint was before, and the last one of a run is); and with one that a thread writes beside the
updates. Every checkpoint is verified. It runs on the device that accelerate chooses, with one window in an update. Run
it on a machine that does nothing else.
"""

import itertools
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from accelerate import Accelerator
from script_process import spread

from forge_common.model.config import PRESETS, ModelConfig
from forge_common.model.trunk import Trunk
from forge_common.run.checkpoint_folder import checkpoints_of, fault
from forge_common.run.checkpoint_writer import Writer
from forge_common.run.progress import Progress

VOCABULARY = {"tiny": 4096, "small": 16_384, "base": 32_768, "large": 32_768}
KINDS = ("no checkpoint", "in the loop", "beside")


@dataclass(frozen=True)
class Settings:
    output_dir: Path = Path("runs/saving")
    presets: tuple[str, ...] = ("small", "base")
    """Sizes of the trunk: tiny, small, base or large."""
    rounds: int = 5
    """Measurements of each kind."""
    sequence_length: int = 128
    """Tokens of the one window of an update."""
    keep: int = 1
    """Checkpoints that are kept."""


class Run:
    """A trunk that trains, and the writer of its checkpoints."""

    def __init__(self, settings: Settings, preset: str):
        self.accelerator = Accelerator()
        self.accelerator.free_memory()  # of the preset before
        vocabulary = VOCABULARY[preset]
        sizes: dict[str, Any] = PRESETS[preset]
        config = ModelConfig(vocab_size=vocabulary, max_position_embeddings=settings.sequence_length, **sizes)
        trunk = Trunk(config)
        self.size = sum(parameter.numel() for parameter in trunk.parameters())
        optimizer = torch.optim.AdamW(trunk.parameters(), lr=1e-4, fused=self.accelerator.device.type != "mps")
        self.model, self.optimizer = self.accelerator.prepare(trunk, optimizer)
        self.windows = torch.randint(1, vocabulary, (1, settings.sequence_length + 1), device=self.accelerator.device)
        self.folder = checkpoints_of(settings)
        self.writer = Writer(self.accelerator, self.model, settings)
        self.steps = itertools.count(1)

    def update(self) -> None:
        sums = self.model(self.windows)
        self.accelerator.backward(sums.objective / self.windows.numel())
        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0).item()  # waits for the device, as a run does
        self.optimizer.step()
        self.optimizer.zero_grad()

    def train(self, updates: int, kind: str) -> dict[str, float]:
        """Seconds of `updates` updates and a checkpoint after the first: all of them, the loop's waiting, the whole checkpoint."""
        progress = Progress("benchmark", {}, {}, global_step=next(self.steps))
        self.update()
        start = time.perf_counter()
        if kind != "no checkpoint":
            self.writer.save(progress, required=kind == "in the loop", print_line=print)
        waited = time.perf_counter() - start
        written = waited if kind != "beside" else 0.0
        final = self.folder / f"step-{progress.global_step:08d}"
        for _ in range(updates):
            self.update()
            if kind == "beside" and not written and final.exists():
                written = time.perf_counter() - start
        seconds = time.perf_counter() - start
        self.writer.wait()
        if kind != "no checkpoint" and (wrong := fault(final)):
            raise SystemExit(f"{final}: {wrong}")
        return {"seconds": seconds, "waited": waited, "written": written or time.perf_counter() - start}


def measure(settings: Settings, preset: str) -> list[str]:
    """The rows of the table for a trunk."""
    run = Run(settings, preset)
    run.train(2, "in the loop")  # memory and files are new
    first = run.train(2, "beside")["written"]
    updates = 1 + int(1.5 * first / (run.train(3, "no checkpoint")["seconds"] / 3))
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for _ in range(settings.rounds):
        for kind in KINDS:
            found[kind].append(run.train(updates, kind))
    rows = []
    whole = statistics.median(result["written"] for result in found["in the loop"])
    for kind in KINDS[1:]:
        waited = [1000 * result["waited"] for result in found[kind]]
        written = [1000 * result["written"] for result in found[kind]]
        late = [
            1000 * (result["seconds"] - plain["seconds"])
            for result, plain in zip(found[kind], found["no checkpoint"], strict=True)
        ]
        share = [wait / 10 / whole for wait in waited]
        rows.append(
            f"| {run.size / 1e6:.0f} M | {kind} | {spread(waited, 0)} | {spread(share, 0)} | {spread(written, 0)} | {spread(late, 0)} |"
        )
    return rows


def main(settings: Settings) -> None:
    shutil.rmtree(settings.output_dir, ignore_errors=True)
    print(
        "| parameters | checkpoint | the loop waits, ms | share of one in the loop, % | whole, ms | updates are late by, ms |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for preset in settings.presets:
        print("\n".join(measure(settings, preset)), flush=True)
    shutil.rmtree(settings.output_dir)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
