"""How far `evaluate` is: a bar on a terminal, otherwise a line for each text that was scored."""

import sys
import time
from typing import Any


class Progress:
    """Counts work in tokens of the trunk. A token of an assembled model with N candidates is about N times the work."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._name = ""
        self._work = 1.0
        self._began = time.monotonic()

    def start(self, total: float) -> None:
        """total: the work of all rows of the table."""
        if sys.stderr.isatty():
            from tqdm import tqdm

            layout = "{desc} {percentage:3.0f}% |{bar}| {elapsed}, {remaining} left"
            self._bar = tqdm(total=total, bar_format=layout, dynamic_ncols=True, leave=False)

    def begin(self, name: str, work: float) -> None:
        """name: what is scored from here on. work: of each of its tokens."""
        self._name = name
        self._work = work
        self._began = time.monotonic()
        if self._bar is not None:
            self._bar.set_description_str(name)

    def add(self, tokens: int) -> None:
        """Counts tokens that were scored."""
        if self._bar is not None:
            self._bar.update(tokens * self._work)

    def end(self, row: dict[str, Any]) -> None:
        """Ends the text that `begin` named. row: its row of the table."""
        if self._bar is None:
            seconds = time.monotonic() - self._began
            print(f"scored      {self._name}: {row['loss']:.3f} nats per token, {seconds:.1f} s", flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
