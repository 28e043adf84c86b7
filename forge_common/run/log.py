"""The log of a run: rows of metrics.jsonl, lines on the console, and the tracker.

metrics.jsonl has every row. A tracker gets a copy of them; an error of the tracker never ends a run.
"""

import errno
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..reporting.runs import LiveReport
from .hardware import compute_dtype, peak_flops, peak_memory_mb, process_peak_mb
from .metrics_file import MetricsFile
from .pace import Pace, duration
from .samples import continuations
from .trackers import Tracker

WARM_UP = 2  # updates of a dry run that are not timed: they allocate memory, and torch.compile compiles in them
DRY_RUN_SECONDS = 20.0  # after which a dry run ends with the update it is in; torch.compile has more
PARTS = ("nats", "tokens", "balance", "z")  # the fields of loss.Sums that an interval adds up


class Interval:
    """Sums since the last row of the log. They are kept on the device, and read once for each row."""

    def __init__(self, accelerator: Any, restored: list[float]):
        """restored: the result of `sum_over_ranks` in the checkpoint that the run resumed from, or []."""
        self.accelerator = accelerator
        dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
        self.sums = torch.zeros(len(PARTS), dtype=dtype, device=accelerator.device)
        self._start_from(restored or [0.0] * len(PARTS))

    def add(self, update: list[Any]) -> None:
        """Adds the `Sums` of one update's micro-batches."""
        for part in update:
            self.sums += torch.stack([getattr(part, name).detach().to(self.sums) for name in PARTS])

    def sum_over_ranks(self) -> list[float]:
        """The sums over all processes; the main process continues from them, the others from 0. A collective."""
        total = self.accelerator.reduce(self.sums, "sum").tolist()
        self._start_from(total)
        return total

    def _start_from(self, total: list[float]) -> None:
        """Sets the sums, in their dtype: torch's default, float32, would round them at every checkpoint."""
        self.sums = self.sums.new_tensor(total if self.accelerator.is_main_process else [0.0] * len(PARTS))

    def take(self) -> list[float]:
        """The sums over all processes; resets them to 0. A collective."""
        total = self.sum_over_ranks()
        self.sums.zero_()
        return total


class RunLog:
    """The log of one run. Only the main process writes, and nothing is written in a dry run."""

    def __init__(
        self,
        accelerator: Any,
        settings: Any,
        progress: Any,
        last: int,
        tracker: str | None = None,
        trunk: Any = None,
        tokenizer: Any = None,
    ):
        """last: the update that the run ends with. tracker: accelerate's name for it. trunk: for MFU and samples."""
        self.accelerator = accelerator
        self.folder: Path = settings.output_dir
        self.file = MetricsFile(self.folder, self.print_line)
        self.steps = last
        self.patience = settings.patience
        self.main = accelerator.is_main_process
        self.writes = self.main and not settings.dry_run
        self.tracker: Tracker | None = None
        self.sample: Callable[[], list[dict[str, str]]] = lambda: []
        if trunk:
            self.sample = partial(continuations, accelerator, trunk, tokenizer, settings.sample_prompt)
        self.flops_per_token = trunk.flops_per_token(settings.sequence_length) if trunk else 0
        self.dtype = compute_dtype(accelerator.mixed_precision, settings.dtype) if trunk else torch.float32
        self.peak_flops = peak_flops(accelerator.device, self.dtype) if trunk else math.inf
        self._row_start = self._start = time.perf_counter()
        self._row_start_step = progress.global_step
        self._row_start_tokens = progress.tokens
        self._report = LiveReport(self.folder, last, self.print_line)
        if self.writes:
            self.file.drop_rows_after(progress.global_step, progress.validation_due)
        self.pace = Pace(accelerator, settings, last, progress.global_step, self.print_line)
        if self.writes and tracker:
            self.tracker = Tracker(
                accelerator, tracker, settings, run_id=progress.run_id, folder=self.folder, print_line=self.print_line
            )

    def print_line(self, text: str) -> None:
        """Prints a line, above the progress bar where there is one. A closed console does not end the run."""
        try:
            if self.main and self.pace.bar is not None:
                self.pace.bar.write(text)
            elif self.main:
                print(text, flush=True)
        except BrokenPipeError:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (to the end of the process)
        except OSError as reason:
            if reason.errno != errno.ENOSPC:
                raise

    @contextmanager
    def clock_paused(self) -> Iterator[None]:
        """Excludes the time of validation and saving from the speed."""
        start = time.perf_counter()
        self.file.write_pending()
        yield
        self._row_start += time.perf_counter() - start

    def restart_clock(self, step: int) -> float:
        """Returns the seconds per update since the last call, without those in clock_paused."""
        now = time.perf_counter()
        seconds = (now - self._row_start) / max(step - self._row_start_step, 1)
        self._row_start = now
        self._row_start_step = step
        return max(seconds, 1e-9)

    def row(self, step: int, values: dict[str, Any]) -> None:
        """Writes a row to metrics.jsonl and passes it to the tracker. NaN and Inf become null."""
        if not self.writes:
            return
        written = self.file.append(step, values)
        self._report.refresh()
        if self.tracker:
            self.tracker.log({k: v for k, v in written.items() if v is not None}, step=step)

    def training(self, interval: Interval, progress: Any, *, rate: float, grad_norm: float) -> None:
        """Writes a row and a console line for the updates since the last one. A collective.

        rate: the learning rate. MFU is the model's own FLOP/s as a share of the device's peak. It counts scored tokens
        only, not padding, as tokens per second do.
        """
        step = progress.global_step
        nats, tokens, balance, z = interval.take()
        updates = step - self._row_start_step
        seconds = self.restart_clock(step)
        count = tokens or math.nan  # without an applied update there is no mean
        loss = nats / count
        shown = f"{loss:.4f}" if tokens else "- (no update applied)"
        trained = progress.tokens - self._row_start_tokens  # in this process: `tokens` also has those before a resume
        speed = trained / (seconds * max(updates, 1))
        self._row_start_tokens = progress.tokens
        values = {
            "train/loss": loss,
            "train/grad_norm": grad_norm,
            "train/lr": rate,
            "train/tokens": progress.tokens,
            "train/epoch": progress.epoch,
            "train/tokens_per_second": speed,
            "train/mfu": self._mfu(speed),
            "train/bad_updates": progress.bad_updates,
            "train/empty_updates": progress.empty_updates,
            "train/scaler_skips": progress.scaler_skips,
            "memory/peak_mb": peak_memory_mb(self.accelerator.device),
            "memory/process_peak_mb": process_peak_mb(),
        }
        values |= {f"train/passes/{source}": times for source, times in progress.passes.items()}
        if progress.expert_counts:
            values |= {"train/balance_loss": balance / count, "train/z_loss": z / count}
        self.row(step, values)
        self.print_line(
            f"step {step}/{self.steps}  loss {shown}  lr {rate:.2e}  grad {grad_norm:.3f}  {speed:,.0f} tok/s  "
            f"mfu {values['train/mfu']:.0%}  mem {values['memory/peak_mb']:,.0f} MiB  "
            f"eta {duration((self.steps - step) * seconds)}"
        )

    def _mfu(self, speed: float) -> float:
        """The MFU at `speed` tokens per second of all processes.

        An MFU above 1 shows that the peak was measured while the machine was busy: it is measured again, and set to at
        least the speed that was reached.
        """
        reached = speed * self.flops_per_token / self.accelerator.num_processes
        if reached > self.peak_flops:
            with self.clock_paused():
                self.peak_flops = max(reached, peak_flops(self.accelerator.device, self.dtype))
        return reached / self.peak_flops

    def validation(self, result: Any, progress: Any) -> None:
        """Writes a row and a console line for a `Validation`, with a continuation of each --sample-prompt. A
        collective.

        Nothing for None, an interrupted one.
        """
        if result is None:
            return
        with self.clock_paused():
            samples = self.sample()
        values = {
            "val/loss": result.loss,
            "val/tokens": result.tokens,
            "val/perplexity": result.perplexity,
            "val/bits_per_byte": result.bits_per_byte,
            "val/best_loss": progress.best_val_loss,
            "val/best_step": progress.best_step,
        }
        if len(result.losses) > 1:
            values |= {f"val/loss/{source}": loss for source, loss in result.losses.items()}
        if samples:
            values["val/samples"] = samples
        self.row(progress.global_step, values)
        perplexity = f"{result.perplexity:,.2f}" if result.perplexity < 1e6 else f"{result.perplexity:.2e}"
        per_byte = f"{result.bits_per_byte:.4f}" if math.isfinite(result.bits_per_byte) else "unknown"
        self.print_line(
            f"step {progress.global_step}/{self.steps}  validation {result.loss:.4f} nats  perplexity "
            f"{perplexity}  {per_byte} bits/byte  {result.tokens:,} tokens"
            + ("  (best)" if progress.best_step == progress.global_step else "")
        )
        for sample in samples:
            self.print_line(f"sample      {sample['prompt']!r} -> {sample['continuation']!r}")
        if progress.patience_is_over(self.patience):
            self.print_line(f"stopping early: no improvement in {self.patience} validations")

    def advance(self, step: int, done: int, micro_batches: int, outcome: Any) -> None:
        """Shows a micro-batch on the console (Pace.advance)."""
        self.pace.advance(step, done, micro_batches, outcome, self._row_start)

    def end_warm_up(self, progress: Any) -> int:
        """Restarts the clock of a dry run after the updates that are not timed.

        Returns the update that the dry run ends with. A collective.
        """
        step = progress.global_step
        if step == 1 and self.accelerator.state.dynamo_plugin.backend.value != "NO":
            self._start = time.perf_counter()  # the time before is that of torch.compile
        over = torch.tensor(float(time.perf_counter() - self._start > DRY_RUN_SECONDS), device=self.accelerator.device)
        if self.accelerator.num_processes > 1:
            over = self.accelerator.reduce(over, "sum")
        last = step if bool(over) else self.steps
        if step <= WARM_UP and step < last:
            self.restart_clock(step)
            self._row_start_tokens = progress.tokens
        return last

    def dry_run_result(self, progress: Any, steps: int) -> None:
        """The last line of a dry run: speed, the estimated time of `steps` updates, and the peak memory."""
        timed = progress.global_step - self._row_start_step
        seconds = self.restart_clock(progress.global_step)
        speed = (progress.tokens - self._row_start_tokens) / (timed * seconds)
        self.print_line(
            f"time        {seconds:.3f} s an update ({timed} timed), {speed:,.0f} tok/s, mfu {self._mfu(speed):.0%}, "
            f"about {duration(seconds * steps)} for {steps:,} without validation; peak memory "
            f"{peak_memory_mb(self.accelerator.device):,.0f} MiB\n"
            f"budget      in 10 minutes: --steps {max(1, int(600 / seconds)):,d}; in an hour: --steps "
            f"{max(1, int(3600 / seconds)):,d}\n"
            "only the token cache was written"
        )

    def close(self, exit_code: int) -> None:
        """Ends the progress bar, the report and the tracker. `exit_code`: that of the process."""
        if self.writes:
            self._report.refresh(last=True)
        if self.pace.bar is not None:
            self.pace.bar.close()
        if self.tracker:
            published = [self.folder / kind for kind in ("trunk", "module") if (self.folder / kind).is_dir()]
            self.tracker.finish(exit_code, published[0] if published and not exit_code else None)
        self.accelerator.trackers = []  # accelerate need not end them: they are finished or disabled
