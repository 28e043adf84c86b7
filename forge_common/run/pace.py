"""What a console shows between the rows of the log: a bar for the micro-batches, and soon how long the run takes."""

import sys
import time
from collections.abc import Callable
from typing import Any

SLOW_UPDATE = 5.0  # seconds from which on the first micro-batch says how long an update takes
BAR = "{percentage:3.0f}%|{bar}| {n:.2f}/{total} updates [{elapsed}<{remaining}]"


def duration(seconds: float) -> str:
    """75 -> 1m15s."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


class Pace:
    """The bar, on the main process with a terminal, and the lines about the first micro-batch and the first update."""

    def __init__(self, accelerator: Any, settings: Any, last: int, step: int, print_line: Callable[[str], None]):
        """last: the update that the run ends with. step: updates that are done."""
        self.settings = settings
        self.print_line = print_line
        self.accelerator = accelerator
        self.is_first_micro_batch = True
        self.bar: Any = None
        if accelerator.is_main_process and not settings.dry_run and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=last, initial=step, bar_format=BAR, dynamic_ncols=True, mininterval=0.5)

    def advance(self, step: int, done: int, micro_batches: int, outcome: Any, row_start: float) -> None:
        """Moves the bar after a micro-batch, and prints how long the first one and the first update took.

        step: updates that are done. done: micro-batches of the one after it. outcome: its UpdateOutcome, or PENDING.
        row_start: the time.perf_counter at which the row of the log was begun.
        """
        if self.bar is not None:
            self.bar.update(step + done / micro_batches - self.bar.n)
        seconds = time.perf_counter() - row_start
        steps = self.settings.steps
        is_slow = self.settings.dry_run or seconds * micro_batches > SLOW_UPDATE
        on_cpu = self.accelerator.device.type == "cpu"  # other devices compute later than their calls return
        if self.is_first_micro_batch and on_cpu and is_slow:
            update = seconds * micro_batches
            self.print_line(
                f"speed       micro-batch 1 of {micro_batches} took {seconds:.1f} s: an update takes about "
                f"{duration(update)}, {steps - step:,} updates {duration(update * (steps - step))}"
            )
        self.is_first_micro_batch = False
        is_logged = self.settings.dry_run or self.settings.log_every == 1  # the log prints a line for it
        if step == 0 and done == micro_batches and outcome.num_scored and not is_logged:
            self.print_line(
                f"update 1    loss {outcome.loss / outcome.num_scored:.4f} after {seconds:.1f} s; {steps:,} updates at "
                f"this speed: {duration(seconds * steps)}. The next line comes after update "
                f"{min(self.settings.log_every, steps)}"
            )
