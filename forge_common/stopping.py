"""How a run ends before its time: a signal, its launcher's death, or a standstill. All ranks stop at the same update."""

import faulthandler
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # what accelerate launch and torchrun set
SIGNALS = (signal.SIGTERM, signal.SIGINT)
LOOK = 1.0  # seconds between two looks at the launcher and the clock
SAME_WISH = 1.0  # seconds: a terminal and a launcher both pass one Ctrl-C on
GRACE = 5.0  # seconds that a run that is not working has to clean up before it is ended all the same
PATIENCE = 10  # times --hang-timeout, for what is slow by nature: the first update (it may compile), a save


class StopRequest:
    """Listens from its making on. `exit_code` is 143 or 130 once asked (128 + the signal), else 0.

    While the run is `working`, a signal waits for the end of the update, or of a batch of validation. At other times
    (imports, data, publishing) there is nothing to save: it ends the run at once. A second signal always does, with
    nothing torn: what has its final name is whole. A thread listens too, so that it is heard when Python is not: in a
    collective, in a compiler. It also notices that the launcher is gone (a killed `accelerate launch` leaves its trainer
    behind, accelerate #929), and a standstill: `hang_timeout` seconds (0: never) without `alive()` while working.
    """

    def __init__(self, hang_timeout: float):
        self.exit_code = 0
        self.hang_timeout = hang_timeout
        self._working, self._idle, self._patience = False, 0.0, PATIENCE
        self.done = False  # then a signal ends nothing any more; a second one does
        self._told = False  # whether the main thread knows of a signal
        self._first: float | None = None  # when the thread heard the first
        self._leave_by: float | None = None  # when a run that was to end at once is ended by force
        self._parent = os.getppid() if any(name in os.environ for name in LAUNCHED) else None
        self._inbox, outbox = os.pipe()
        os.set_blocking(outbox, False)
        signal.set_wakeup_fd(outbox, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, self._hear)
        os.register_at_fork(after_in_child=_deaf)
        threading.Thread(target=self._listen, name="stop request", daemon=True).start()

    @property
    def working(self) -> bool:
        return self._working

    @working.setter
    def working(self, working: bool) -> None:
        self._idle, self._patience = 0.0, PATIENCE
        self._working = working

    def __call__(self, accelerator: Any) -> bool:
        """Whether any rank was asked. A collective: call it at the same update on all ranks."""
        if self.exit_code:
            accelerator.set_trigger()
        asked = accelerator.check_trigger()
        if asked:
            self.exit_code = self.exit_code or 128 + signal.SIGTERM
        return asked

    def alive(self) -> None:
        """Something was done: a micro-batch, a batch of validation."""
        self._idle, self._patience = 0.0, 1

    @contextmanager
    def patient(self) -> Iterator[None]:
        """What is done inside may take PATIENCE times as long."""
        self._idle, self._patience = 0.0, PATIENCE
        yield
        self.alive()

    def _hear(self, number: int, frame: Any) -> None:
        """In the main thread, once Python gets there: unwinds a run that is not working."""
        first, self._told = not self._told, True
        self.exit_code = self.exit_code or 128 + number
        if first and not self.working and not self.done:
            _tell("asked to stop: leaving, nothing of this run is lost")
            raise SystemExit(self.exit_code)

    def _listen(self) -> None:
        before = time.monotonic()
        while True:
            waiting, _, _ = select.select([self._inbox], [], [], LOOK)
            now = time.monotonic()
            for number in os.read(self._inbox, 64) if waiting else ():
                if number in SIGNALS:  # others are heard by whoever asked for them
                    self._heard(number, now)
            if self._leave_by and now > self._leave_by:
                os._exit(self.exit_code)
            if self._parent not in (None, os.getppid()):
                self._parent = None
                os.kill(os.getpid(), signal.SIGTERM)
            # A process that was halted (Ctrl-Z) and goes on has not been idle: a late look counts as one.
            self._idle += min(now - before, LOOK)
            before = now
            if self.working and self.hang_timeout and self._idle > self.hang_timeout * self._patience:
                self._abort()

    def _heard(self, number: int, now: float) -> None:
        if self._first is not None and now - self._first > SAME_WISH:
            os._exit(128 + number)
        self.exit_code = self.exit_code or 128 + number
        if self._first is None:
            self._first = now
            self._leave_by = None if self.working or self.done else now + GRACE

    def _abort(self) -> None:
        """Says where every thread stands, and ends the process: what waits in a collective cannot be woken."""
        rank = f"rank {os.environ.get('RANK', '0')} of {os.environ.get('WORLD_SIZE', '1')}"
        seconds = f"{self._idle:.0f} s (--hang-timeout {self.hang_timeout:g})"
        _tell(f"{rank}: nothing has moved for {seconds}. It hangs, or waits for one that does:")
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        _tell(
            f"{rank}: aborted; the same command goes on from the last checkpoint. Raise --hang-timeout if it was just slow."
        )
        os._exit(1)


def _tell(line: str) -> None:
    """On stderr, past Python's buffers: another thread, or what a signal interrupted, may be in the middle of a print."""
    os.write(2, f"{line}\n".encode())


def _deaf() -> None:
    """A forked child (a loader's worker, say) hears signals as any process does, and not in its parent's name."""
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
