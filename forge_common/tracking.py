"""What a run says of itself: metrics.jsonl, the console, memory and speed.

metrics.jsonl is always written and always complete; a tracker is a copy of it for people, and never worth a run.
"""

import errno
import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .files import is_full
from .trackers import Tracker

PARTS = ("nats", "tokens", "balance", "z")  # of loss.Sums, what an interval adds up
# Dense peak of the matrix units in bfloat16, FLOP/s, from the makers' data sheets.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "4090": 165e12,
    "V100": 125e12,
}


def peak_memory_mb(device: torch.device) -> float:
    """MiB at the highest: the device's allocator, or on a CPU the process's resident set (as the kernel counts it)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**20
    return process_peak_mb()


def process_peak_mb() -> float:
    """MiB of the process's resident set at its highest."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def peak_flops(device: torch.device) -> float:
    """FLOP/s that MFU is a share of: the data sheet's for known GPUs, else what a large float32 product reaches here."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, flops in PEAK_FLOPS.items():
            if part in name:
                return flops
    side = 1024 if device.type == "cpu" else 4096
    matrix = torch.ones(side, side, device=device)
    best = math.inf
    for _ in range(12):  # the best of a dozen: the first ones wake threads and clocks up
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def duration(seconds: float) -> str:
    """75 -> 1m15s."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


class Interval:
    """Sums since the log's last line, on the device; read from it once a line, not once a micro-batch."""

    def __init__(self, accelerator: Any, restored: list[float]):
        """`restored`: what `settle` gave when the run was left, or []."""
        self.accelerator = accelerator
        dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
        self.sums = torch.zeros(len(PARTS), dtype=dtype, device=accelerator.device)
        self._start_from(restored or [0.0] * len(PARTS))

    def add(self, update: list[Any]) -> None:
        """Takes the `Sums` of one update's micro-batches."""
        for part in update:
            self.sums += torch.stack([getattr(part, name).detach().to(self.sums) for name in PARTS])

    def settle(self) -> list[float]:
        """The sums over all processes, which the main process goes on with (the others from 0). A collective."""
        total = self.accelerator.reduce(self.sums, "sum").tolist()
        self._start_from(total)
        return total

    def _start_from(self, total: list[float]) -> None:
        """In the sums' own dtype: by way of torch's default one, float32, a save would round what is logged next."""
        self.sums = self.sums.new_tensor(total if self.accelerator.is_main_process else [0.0] * len(PARTS))

    def take(self) -> list[float]:
        """The sums over all processes; begins anew. A collective."""
        total = self.settle()
        self.sums.zero_()
        return total


class RunLog:
    """The log of one run. Only the main process writes; the folder may be None (a dry run: nothing is written)."""

    def __init__(self, accelerator: Any, folder: Path | None, progress: Any, *, steps: int):
        self.accelerator, self.folder, self.steps = accelerator, folder, steps
        self.file = folder / "metrics.jsonl" if folder else None
        self.main = accelerator.is_main_process
        self.tracker: Tracker | None = None
        done = progress.global_step
        self._unwritten: list[str] = []
        self._mark, self._lap_step, self._bar = time.perf_counter(), done, None
        if self.main and self.file:
            _forget_after(self.file, done, progress.validation_due)
        if self.main and folder and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=done, unit="update", dynamic_ncols=True)

    def start_tracker(self, tracker: str | None, settings: Any, run_id: str) -> None:
        """Starts accelerate's tracker under the run's id; whatever it does, the run goes on with metrics.jsonl."""
        if tracker and self.main and self.folder:
            self.tracker = Tracker(self.accelerator, tracker, settings, run_id=run_id, folder=self.folder, say=self.say)

    def say(self, text: str) -> None:
        """A line on the console, above the progress bar where there is one. A console that is gone is not worth the run."""
        try:
            if self.main and self._bar is not None:
                self._bar.write(text)
            elif self.main:
                print(text, flush=True)
        except BrokenPipeError:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (to the end of the process)
        except OSError as reason:
            if reason.errno != errno.ENOSPC:
                raise

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Time that is not training's: validation, saving."""
        start = time.perf_counter()
        if self._unwritten:
            self._write()
        yield
        self._mark += time.perf_counter() - start

    def lap(self, step: int) -> float:
        """Seconds an update since the last lap, without what was spent aside."""
        now = time.perf_counter()
        seconds = (now - self._mark) / max(step - self._lap_step, 1)
        self._mark, self._lap_step = now, step
        return max(seconds, 1e-9)

    def row(self, step: int, values: dict[str, Any]) -> None:
        """A row of metrics.jsonl, flat, and the same to the tracker. A number that is no number becomes null."""
        if not self.main or self.file is None:
            return
        flat = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._unwritten.append(json.dumps({"step": step, **flat}) + "\n")
        self._write()
        if self.tracker:
            self.tracker.log({k: v for k, v in flat.items() if v is not None}, step=step)

    def _write(self) -> None:
        """Appends the rows that are not written yet, down to the disk: a checkpoint never knows more than the log.

        On a full disk they are kept for the next time, and no half of a row stays behind.
        """
        size = self.file.stat().st_size if self.file.exists() else 0
        try:
            with open(self.file, "a", encoding="utf-8") as file:
                file.write("".join(self._unwritten))
                file.flush()
                os.fsync(file.fileno())
        except OSError as reason:
            if not is_full(self.folder, reason):
                raise
            if self.file.exists():
                os.truncate(self.file, size)
            self.say(f"metrics.jsonl: the disk is full; {len(self._unwritten)} row(s) wait to be written")
        else:
            self._unwritten.clear()

    def training(
        self, interval: Interval, progress: Any, *, rate: float, grad_norm: float, flops: int, peak: float
    ) -> None:
        """A row and the console's line for the updates since the last one. A collective.

        flops: of the model a token. peak: FLOP/s of one device; MFU is the share of it that the model's own flops are.
        """
        step, before = progress.global_step, self._lap_step
        nats, tokens, balance, z = interval.take()
        updates, seconds = step - before, self.lap(step)
        count = max(tokens, 1.0)
        speed = tokens / (seconds * max(updates, 1))
        values = {
            "train/loss": nats / count,
            "train/grad_norm": grad_norm,
            "train/lr": rate,
            "train/tokens": progress.tokens,
            "train/epoch": progress.epoch,
            "train/tokens_per_second": speed,
            "train/mfu": speed * flops / (peak * self.accelerator.num_processes),
            "train/bad_updates": progress.bad_updates,
            "train/empty_updates": progress.empty_updates,
            "train/scaler_skips": progress.scaler_skips,
            "memory/peak_mb": peak_memory_mb(self.accelerator.device),
            "memory/process_peak_mb": process_peak_mb(),
        }
        if progress.expert_counts:
            values |= {"train/balance_loss": balance / count, "train/z_loss": z / count}
        self.row(step, values)
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
        self.say(
            f"step {step}/{self.steps}  loss {nats / count:.4f}  lr {rate:.2e}  grad {grad_norm:.3f}  {speed:,.0f} tok/s  "
            f"mfu {values['train/mfu']:.0%}  mem {values['memory/peak_mb']:,.0f} MB  "
            f"eta {duration((self.steps - step) * seconds)}"
        )

    def validation(self, result: Any, progress: Any) -> bool:
        """A row and a line for a validation; whether it is the best so far, which `progress` then knows.

        `result` None, one that was broken off, is due: the run that resumes begins with it.
        """
        progress.validation_due = result is None
        if result is None:
            return False
        best = math.inf if progress.best_val_loss is None else progress.best_val_loss
        better = result.loss < best
        if better:
            progress.best_val_loss, progress.best_step = result.loss, progress.global_step
        progress.validations_without_gain = 0 if better else progress.validations_without_gain + 1
        values = {
            "val/loss": result.loss,
            "val/tokens": result.tokens,
            "val/perplexity": result.perplexity,
            "val/bits_per_byte": result.bits_per_byte,
        }
        self.row(progress.global_step, values)
        self.say(
            f"step {progress.global_step}/{self.steps}  validation {result.loss:.4f} nats  perplexity "
            f"{result.perplexity:,.2f}  {result.bits_per_byte:.4f} bits/byte  {result.tokens:,} tokens"
            + ("  (best)" if better else "")
        )
        return better

    def patience_is_over(self, progress: Any, patience: int) -> bool:
        """Whether so many validations in a row brought no better one (0: never), and says so."""
        over = bool(patience) and progress.validations_without_gain >= patience
        if over:
            self.say(f"stopping early: {patience} validations without a better one")
        return over

    def timing(self, timed: int, steps: int) -> None:
        """The last line of a dry run: the time that all updates will take, and the memory that these took."""
        seconds = self.lap(timed)
        self.say(
            f"time        {seconds:.3f} s an update ({timed} timed), about {duration(seconds * steps)} for {steps:,} "
            f"without validation; peak memory {peak_memory_mb(self.accelerator.device):,.0f} MiB\n"
            "nothing was written but the cache of tokens"
        )

    def close(self, exit_code: int) -> None:
        """Ends the tracker and the process group; last. `exit_code`: what the process will end with."""
        if self._bar is not None:
            self._bar.close()
        if self.tracker:
            self.tracker.finish(exit_code)
        self.accelerator.trackers = []  # finished, or given up
        self.accelerator.end_training()


def diverged(step: int, bad: int, origins: list[str]) -> str:
    """The message of a run that gave up: which updates, which documents, what to do."""
    named = ", ".join(origins[:20]) + (f" and {len(origins) - 20} more" if len(origins) > 20 else "")
    return (
        f"the gradient was NaN or Inf in updates {step - bad + 1} to {step}; none of them was applied. Their documents: "
        f"{named}. Lower --lr, raise --warmup-steps, or look at these documents; the run resumes from its last checkpoint."
    )


def _forget_after(file: Path, step: int, validation_due: bool) -> None:
    """Drops the rows after `step`, its validation where that is due, and a torn last one: all are written again, once."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["step"] < step or (row["step"] == step and not (validation_due and "val/loss" in row)):
            kept.append(line)
    aside = file.with_name(f".tmp-{file.name}")
    with open(aside, "w", encoding="utf-8") as out:
        out.write("".join(f"{line}\n" for line in kept))
        out.flush()
        os.fsync(out.fileno())
    os.replace(aside, file)


def plan(model: Any, settings: Any, training: Any, accumulation: int, processes: int) -> str:
    """What a run is about to do: parameters, updates, epochs, and the memory it should need on a device."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    config, T, B = model.config, settings.sequence_length, settings.micro_batch_size
    width = next(model.parameters()).element_size()
    tokens = B * T
    windows, labels = training.size, sum(source.labels for source in training.sources)
    # Kept for the way back, a layer: two norms' inputs, q, k, v and attention's result, two gates, their product.
    layer = 6 * config.hidden_size + 3 * config.intermediate_size + 2 * config.num_key_value_heads * config.head_dim
    states = width * (total + 3 * trained)
    activations = width * tokens * (layer * config.num_hidden_layers + 4 * config.hidden_size)
    logits = 2 * model.chunk_rows * config.vocab_size * 4
    return "\n".join(
        (
            f"model       {total:,} parameters, {trained:,} trained; vocabulary {config.vocab_size:,}, context {T}",
            f"update      {settings.batch_size} windows = up to {settings.batch_size * T:,} tokens: {processes} process(es) x "
            f"{accumulation} micro-batch(es) x {B}",
            f"run         {settings.steps:,} updates = {settings.steps * settings.batch_size:,} windows = "
            f"{settings.steps * settings.batch_size / windows:.2f} epochs of {windows:,} windows ({labels:,} tokens)",
            f"memory      about {(states + activations + logits) / 2**20:,.0f} MiB a device: {states / 2**20:,.0f} weights, "
            f"gradients and optimizer, {activations / 2**20:,.0f} activations, {logits / 2**20:,.0f} logits",
        )
    )
