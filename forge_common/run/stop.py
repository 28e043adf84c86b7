"""Early stop of a run: by a signal, the end of its launcher, or a standstill. All ranks stop at the same update."""

import faulthandler
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Literal

LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # what accelerate launch and torchrun set
# Batch systems announce the end of a job by SIGTERM, SIGUSR1, or SIGXCPU when its CPU time is used up; SIGHUP: the
# terminal closed.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU)
CHECK_INTERVAL = 1.0  # seconds between two checks of the launcher and the clock
SAME_REQUEST = 1.0  # seconds: a terminal and a launcher both forward one Ctrl-C
GRACE = 5.0  # seconds that a run outside training, or the other ranks of a hanging one, have before the end by force
SLOW_FACTOR = 10  # times as long for the first update (it may compile), a validation's first batch, and saving
NORMAL_FACTOR = 5  # times the longest update so far, where that is longer than --hang-timeout
BUSY = 0.02  # share of a CPU from which on a process without progress computes; a busy machine may give it little


Phase = Literal["starting", "dry run", "training", "publishing", "ended"]


class StopRequest:
    """Whether a run is to end before its last update, and why. Handles signals from its construction on.

    reason: None; "signal", once all ranks agreed in `check`; "patience", when validation no longer improves.
    exit_code: 128 + the number of the signal (143 for SIGTERM, 130 for SIGINT); 0 without one.
    phase: what a signal does. In "training" it takes effect at the end of the update, or of a batch of validation. In
    "ended" it has no effect. In the other phases (imports, data, publishing) there is nothing to save, and it ends the
    run at once.

    A second signal ends the run at once in any phase, except SIGXCPU, which the kernel repeats. Files with their final
    name are complete even then. A SIGHUP that the caller ignores (nohup) stays ignored.

    A thread does the rest, since Python runs no signal handler during a collective or a compilation:
    - It reads the signals too.
    - It detects that the launcher has ended: a killed `accelerate launch` does not end its trainer (accelerate #929).
    - It detects a standstill: no progress in training for `hang_timeout` seconds (0: no limit), or for NORMAL_FACTOR
      times the longest update. Progress is a layer, a micro-batch or a batch of validation. A process that uses the CPU
      without progress has SLOW_FACTOR times as long: it may compile, or a kernel may take long. (An endless loop and
      NCCL's waiting look the same.)
    """

    def __init__(self, hang_timeout: float):
        self.reason: Literal["signal", "patience"] | None = None
        self.exit_code = 0
        self.hang_timeout = hang_timeout
        self._phase: Phase = "starting"
        self._clock = 0.0  # seconds that the thread has counted
        self._last_progress = 0.0  # the clock at the last progress
        self._checked_progress = 0.0  # `_last_progress` at the thread's last check
        self._cpu: tuple[float, float] | None = None  # the clock and the CPU time at the first check without progress
        self._update_start = 0.0  # the clock at the end of the last update, where the present one began
        self._longest_update = 0.0  # seconds of the longest update; the older it is, the less it counts
        self._is_slow = True  # what runs now may take SLOW_FACTOR times as long
        self._in_section = False  # within slow_section
        self._handled_in_main_thread = False
        self._first_signal: float | None = None  # when the thread received the first signal
        self._forced_end: float | None = None  # when a run that was to end at once is ended by force
        self._parent = _launcher()
        self._inbox, outbox = os.pipe()
        os.set_blocking(outbox, False)
        signal.set_wakeup_fd(outbox, warn_on_full_buffer=False)
        handled = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        for number in handled:
            signal.signal(number, self._handle)
        os.register_at_fork(after_in_child=partial(_reset_signals, handled))
        threading.Thread(target=self._listen, name="stop request", daemon=True).start()

    @property
    def phase(self) -> Phase:
        return self._phase

    @phase.setter
    def phase(self, phase: Phase) -> None:
        self._last_progress = self._update_start = self._clock
        self._is_slow = True
        self._phase = phase

    def check(self, accelerator: Any) -> bool:
        """Whether any rank has received a signal. A collective: call it at the same update on all ranks."""
        if self.exit_code:
            accelerator.set_trigger()
        self.agree(accelerator.check_trigger())
        return self.reason == "signal"

    def agree(self, any_rank: bool) -> None:
        """Ends an update. The signal that any rank has received becomes the reason to stop, on all ranks at the same
        update.
        """
        if not self._in_section:
            self._longest_update = max(self._clock - self._update_start, 0.9 * self._longest_update)
            self._update_start = self._clock
            self._is_slow = False
        if any_rank:
            self.exit_code = self.exit_code or 128 + signal.SIGTERM
            self.reason = "signal"

    def end_early(self, patience_is_over: bool) -> None:
        """Ends the training before its last update when validation no longer improves; a signal has precedence."""
        if patience_is_over and self.reason is None:
            self.reason = "patience"

    def end(self) -> int:
        """Marks the run as ended: a signal has no effect from here on. Returns the exit code."""
        self.phase = "ended"
        return self.exit_code if self.reason == "signal" else 0

    def begin_training(self, accelerator: Any, layers: Iterable[Any], *, dry_run: bool) -> None:
        """From here on a signal takes effect at the end of an update, and each of `layers`, forward and backward, is
        progress.

        torch.compile would trace the hooks and compile one graph less: there only micro-batches are progress.
        """
        self.phase = "dry run" if dry_run else "training"
        if accelerator.state.dynamo_plugin.backend.value == "NO":
            for layer in layers:
                layer.register_forward_hook(self._layer_ended)

    def _layer_ended(self, layer: Any, inputs: Any, outputs: tuple[Any, ...]) -> None:
        self._last_progress = self._clock
        if outputs[0].requires_grad:
            outputs[0].register_hook(self._gradient_arrived)

    def _gradient_arrived(self, gradient: Any) -> None:
        self._last_progress = self._clock

    def heartbeat(self) -> None:
        """Counts as progress. Call it after each micro-batch and each batch of validation."""
        self._last_progress = self._clock
        if self._in_section:
            self._is_slow = False

    @contextmanager
    def slow_section(self) -> Iterator[None]:
        """The code inside may take SLOW_FACTOR times as long, until a heartbeat."""
        was_slow = self._is_slow
        start = self._clock
        self._in_section = True
        self._is_slow = True
        self._last_progress = start
        yield
        self._in_section = False
        self._is_slow = was_slow
        self._last_progress = self._clock
        self._update_start += self._clock - start  # it is no part of an update

    def _handle(self, number: int, frame: Any) -> None:
        """The signal handler, in the main thread: ends a run outside training by SystemExit."""
        first = not self._handled_in_main_thread
        self._handled_in_main_thread = True
        self.exit_code = self.exit_code or 128 + number
        if first and self.phase not in ("training", "ended"):
            _print_unbuffered("stop requested: ending now; there is nothing to save")
            raise SystemExit(self.exit_code)

    def _listen(self) -> None:
        before = time.monotonic()
        while True:
            waiting, _, _ = select.select([self._inbox], [], [], CHECK_INTERVAL)
            now = time.monotonic()
            received = os.read(self._inbox, 64) if waiting else b""
            for number in received:
                if number in SIGNALS:  # others have their own handlers
                    self._receive(number, now)
            if self._forced_end and now > self._forced_end:
                os._exit(self.exit_code)
            if self._first_signal is None and self._parent not in (None, os.getppid()):
                self._parent = None
                os.kill(os.getpid(), signal.SIGTERM)
            # A process that was suspended (Ctrl-Z) and continued has not been idle: a late check counts as one
            # interval.
            self._clock += min(now - before, CHECK_INTERVAL)
            before = now
            if self.phase == "training" and self.hang_timeout and self._stands_still():
                self._abort()

    def _receive(self, number: int, now: float) -> None:
        if self._first_signal is not None and now - self._first_signal > SAME_REQUEST and number != signal.SIGXCPU:
            os._exit(128 + number)
        self.exit_code = self.exit_code or 128 + number
        if self._first_signal is None:
            self._first_signal = now
            self._forced_end = None if self.phase in ("training", "ended") else now + GRACE

    def _stands_still(self) -> bool:
        """Whether there was no progress for too long. Reads the CPU time only if there was none since the last check."""
        if self._last_progress != self._checked_progress:
            self._checked_progress = self._last_progress
            self._cpu = None
            return False
        if self._cpu is None:
            self._cpu = self._clock, _cpu_seconds()
            return False
        start, cpu_before = self._cpu
        limit = max(self.hang_timeout * (SLOW_FACTOR if self._is_slow else 1), NORMAL_FACTOR * self._longest_update)
        if self._clock - start <= limit:
            return False
        cpu_now = _cpu_seconds()
        self._cpu = self._clock, cpu_now  # the next decision is after as long again
        computes = cpu_now - cpu_before > BUSY * (self._clock - start)
        return not computes or self._clock - self._last_progress > SLOW_FACTOR * limit

    def _abort(self) -> None:
        """Prints the stack of every thread and ends the process: nothing interrupts a thread in a collective."""
        rank = f"rank {os.environ.get('RANK', '0')} of {os.environ.get('WORLD_SIZE', '1')}"
        seconds = f"{self._clock - self._last_progress:.0f} s (--hang-timeout {self.hang_timeout:g})"
        _print_unbuffered(f"{rank}: no progress for {seconds}. It hangs, or waits for a rank that does:")
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        _print_unbuffered(
            f"{rank}: aborted. Run the same command to resume from the last checkpoint; raise --hang-timeout if it was "
            "only slow."
        )
        if os.environ.get("WORLD_SIZE", "1") != "1":
            time.sleep(GRACE)  # the end of one rank ends the others: each is to print its own stack first
        os._exit(1)


def _launcher() -> int | None:
    """The pid of the launcher; None without one; 0 if it had ended before this was called.

    torchrun's process would wait for the store of a launcher that has ended for as long as collectives may take. Process
    1 has adopted it then. In a container a launcher may be process 1 itself, which is a Python.
    """
    if not any(name in os.environ for name in LAUNCHED):
        return None
    parent = os.getppid()
    if parent != 1 or "TORCHELASTIC_RUN_ID" not in os.environ:  # the other variable may be set by hand
        return parent
    import psutil  # accelerate depends on it

    try:
        line = psutil.Process(parent).cmdline()
    except psutil.Error:  # of another user
        return 0
    return parent if line and "python" in os.path.basename(line[0]) else 0


def _cpu_seconds() -> float:
    """CPU time of this process and of those that it started, such as compilers, running or ended."""
    import psutil  # accelerate depends on it

    total = 0.0
    own = psutil.Process()
    for process in (own, *own.children(recursive=True)):
        with suppress(psutil.Error):  # it has ended: its parent counts its time
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def _print_unbuffered(line: str) -> None:
    """Prints on stderr without Python's buffers: a signal or another thread may have interrupted a print."""
    os.write(2, f"{line}\n".encode())


def _reset_signals(handled: list[signal.Signals]) -> None:
    """Restores the default handlers of these signals in a forked child process."""
    signal.set_wakeup_fd(-1)
    for number in handled:
        signal.signal(number, signal.SIG_DFL)
