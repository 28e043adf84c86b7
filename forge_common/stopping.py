"""How a run is asked to stop: SIGTERM, SIGINT, or the launcher's death. All ranks stop at the same update."""

import os
import signal
import time
from typing import Any


class StopRequest:
    """Listens from its making on. `exit_code` is 143 or 130 once asked (128 + the signal), else 0.

    A second signal leaves at once, with nothing torn (a checkpoint has its name only when it is whole). Signals within a
    second of the first are the same wish: a terminal and a launcher both pass Ctrl-C on.
    """

    def __init__(self):
        self.exit_code = 0
        self._first = 0.0
        self._parent = os.getppid()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: Any) -> None:
        if self.exit_code and time.monotonic() - self._first > 1:
            os._exit(128 + number)
        if not self.exit_code:
            self._first = time.monotonic()
        self.exit_code = self.exit_code or 128 + number

    def __call__(self, accelerator: Any) -> bool:
        """Whether any rank was asked. A collective: call it at the same update on all ranks.

        A launcher that was killed leaves its trainers behind (accelerate #929); they notice that their parent is gone.
        """
        if os.getppid() != self._parent:
            self.exit_code = self.exit_code or 128 + signal.SIGTERM
        if self.exit_code:
            accelerator.set_trigger()
        asked = accelerator.check_trigger()
        if asked:
            self.exit_code = self.exit_code or 128 + signal.SIGTERM
        return asked
