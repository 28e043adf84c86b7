"""The held-out windows of a source that a validation scores: all of them, or a fixed choice.

T time
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from ..labels import is_scored
from .byte_lengths import ByteLengths
from .order import permute
from .windows import Windows

CHUNK = 1024  # windows that are drawn at once


class HeldOut:
    """Windows of one source, `held_out[i] -> int64 [T + 1]`, of whose labels exactly `labels` are scored, each once."""

    def __init__(self, source: str, windows: Windows, chosen: Sequence[int], labels: int, byte_lengths: ByteLengths):
        """chosen: numbers of windows that have at least `labels` labels; what is too much is cut from the last of them."""
        self.source = source
        self.windows = windows
        self.tokens = windows.tokens
        self.labels = labels
        self.is_whole = labels == windows.labels
        self._chosen = chosen
        self._byte_lengths = byte_lengths

    @classmethod
    def whole(cls, source: str, windows: Windows, byte_lengths: ByteLengths) -> "HeldOut":
        return cls(source, windows, range(len(windows)), windows.labels, byte_lengths)

    @classmethod
    def first(cls, source: str, windows: Windows, labels: int, byte_lengths: ByteLengths) -> "HeldOut":
        """The first windows, as many as `labels` tokens fill (of conversations, fewer of these are scored)."""
        chosen = range(min(len(windows), -(-labels // windows.sequence_length)))
        return cls(source, windows, chosen, sum(map(windows.scored, chosen)), byte_lengths)

    @classmethod
    def drawn(cls, source: str, windows: Windows, labels: int, byte_lengths: ByteLengths) -> "HeldOut":
        """`labels` labels (at most windows.labels) in windows from all over the source, the same ones for any seed."""
        chosen: list[int] = []
        missing = labels
        while missing > 0:
            places = np.arange(len(chosen), min(len(chosen) + CHUNK, len(windows)))
            for index in permute(places, len(windows), "validation").tolist():
                if missing > 0:
                    chosen.append(index)
                    missing -= windows.scored(index)
        return cls(source, windows, chosen, labels, byte_lengths)

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> np.ndarray:
        window = self.windows[self._chosen[index]]
        if index == len(self) - 1 and self._surplus:
            scored = np.flatnonzero(is_scored(window[1:], self.windows.filler))
            window[1 + scored[-self._surplus] :] = self.windows.filler
        return window

    @cached_property
    def _surplus(self) -> int:
        """Labels of the last window that are not scored."""
        return 0 if self.is_whole else sum(map(self.windows.scored, self._chosen)) - self.labels

    @cached_property
    def bytes(self) -> int | None:
        """The bytes of the text that the scored labels stand for; None where the tokenizer does not tell."""
        windows = (self[index] for index in range(len(self)))
        return self._byte_lengths.count(self.tokens, windows, self.windows.filler)


def choose(stores: dict[str, Windows], labels: int, byte_lengths: ByteLengths) -> list[HeldOut]:
    """The held-out windows of each source, or `labels` labels of them in all, each source with its share of the labels.

    labels: 0 for all.
    """
    total = sum(windows.labels for windows in stores.values())
    if not labels or total <= labels:
        return [HeldOut.whole(source, windows, byte_lengths) for source, windows in stores.items()]
    parts = {source: labels * windows.labels // total for source, windows in stores.items()}
    remainders = {source: labels * windows.labels % total for source, windows in stores.items()}
    for source in sorted(parts, key=lambda source: -remainders[source])[: labels - sum(parts.values())]:
        parts[source] += 1
    return [HeldOut.drawn(source, stores[source], part, byte_lengths) for source, part in parts.items() if part]
