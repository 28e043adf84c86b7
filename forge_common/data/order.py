"""The order of the windows: a pure function of (seed, position), the same for any number of processes.

A position counts all windows of the training; update u of batch size B takes the positions u * B to u * B + B - 1.
Nothing is shuffled in memory: single places of a permutation are computed, in O(1) memory and start-up time.
"""

import hashlib
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch

from ..errors import UserError

ROUNDS = 6
BLOCK = 1024  # positions of a weighted mixture in which the weights hold exactly


class WindowStore(Protocol):
    """Windows of one source, int64 [T + 1] each, the origins of the documents in one, and the tokens they are cut from."""

    tokens: Any

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> np.ndarray: ...
    def documents_of(self, index: int) -> list[str]: ...


def _key(*parts: object) -> np.ndarray:
    """ROUNDS round keys, uint64, from anything that has a repr."""
    digest = hashlib.sha512(repr(parts).encode()).digest()
    return np.frombuffer(digest[: 8 * ROUNDS], dtype="<u8")


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele et al., 2014): each bit of x moves every bit of the result."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: np.ndarray, size: int, *key: object) -> np.ndarray:
    """The values of a permutation of range(size), chosen by `key`, at each of `index` (uint64, < size).

    A Feistel network over the next power of four, applied until the result is below size (at most four times on average).
    Source: Black & Rogaway, Ciphers with arbitrary finite domains, CT-RSA 2002.
    """
    half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    keys = _key("permutation", size, *key)
    result = index.astype(np.uint64)
    outside = np.ones(len(result), dtype=bool)
    with np.errstate(over="ignore"):
        while outside.any():
            left, right = result[outside] >> half, result[outside] & low
            for round_key in keys:
                left, right = right, left ^ (_mix(right ^ round_key) & low)
            result[outside] = (left << half) | right
            outside = result >= np.uint64(size)
    return result.astype(np.int64)


class Mixture:
    """The windows of several sources as one endless stream, `mixture[position] -> (source, window, pass)`.

    Without weights the sources are one corpus: every window comes once an epoch, in another order each epoch. With
    weights each source has its own order and its own epochs; the weights hold in every 1,024 positions (to 1 in 1,024), in
    an order that differs from block to block.
    """

    def __init__(self, sources: Sequence[WindowStore], weights: Sequence[float] | None, seed: int):
        self.sources, self.seed = list(sources), seed
        self.lengths = np.array([len(source) for source in sources], dtype=np.int64)
        self.size = int(self.lengths.sum())
        self._starts = np.concatenate(([0], np.cumsum(self.lengths)))
        self._pattern = None if weights is None else self._shares(np.asarray(weights, dtype=np.float64))

    @staticmethod
    def _shares(weights: np.ndarray) -> np.ndarray:
        """BLOCK source numbers, each as often as its weight asks, by largest remainder."""
        exact = weights / weights.sum() * BLOCK
        counts = np.floor(exact).astype(np.int64)
        counts[np.argsort(counts - exact, kind="stable")[: BLOCK - counts.sum()]] += 1
        if not counts.all():
            raise UserError(
                f"--data: a weight of {weights[counts.argmin()]:g} in {weights.sum():g} is too little for one window in "
                f"{BLOCK:,}: that source would never be seen. Raise its weight, or leave the source out."
            )
        return np.repeat(np.arange(len(weights)), counts)

    def shares(self) -> list[tuple[Any, float]]:
        """The tokens of each source and its fraction of the stream; the fractions sum to 1."""
        counts = self.lengths if self._pattern is None else np.bincount(self._pattern)
        return [(source.tokens, float(part)) for source, part in zip(self.sources, counts / counts.sum(), strict=True)]

    def locate(self, position: int) -> tuple[int, int, int]:
        """(source, window of that source, how often the source was seen whole before)."""
        position = int(position)  # a NumPy integer has another repr, so another key
        if self._pattern is None:
            epoch, place = divmod(position, self.size)
            window = int(permute(np.array([place]), self.size, self.seed, epoch)[0])
            source = int(np.searchsorted(self._starts, window, side="right") - 1)
            return source, window - int(self._starts[source]), epoch
        block, place = divmod(position, BLOCK)
        order = self._pattern[permute(np.arange(BLOCK), BLOCK, self.seed, "block", block)]
        source = int(order[place])
        drawn = block * int((self._pattern == source).sum()) + int((order[:place] == source).sum())
        epoch, place = divmod(drawn, int(self.lengths[source]))
        window = permute(np.array([place]), int(self.lengths[source]), self.seed, "source", source, epoch)
        return source, int(window[0]), epoch

    def __getitem__(self, position: int) -> np.ndarray:
        source, window, _ = self.locate(position)
        return self.sources[source][window]

    def epoch(self, positions: int) -> float:
        """Epochs after that many positions: positions / windows."""
        return positions / self.size

    def origins(self, positions: range) -> list[str]:
        """Origins of the documents in the windows at `positions`, each once."""
        origins: dict[str, None] = {}
        for position in positions:
            source, window, _ = self.locate(position)
            origins |= dict.fromkeys(self.sources[source].documents_of(window))
        return list(origins)


def rows_of(update: int, batch_size: int, micro_batch_size: int, rank: int, processes: int) -> np.ndarray:
    """The positions that a rank takes in an update counted from 0: [micro-batches, micro_batch_size]."""
    positions = np.arange(update * batch_size, (update + 1) * batch_size)
    return positions.reshape(-1, processes, micro_batch_size)[:, rank]


def updates(
    mixture: Mixture,
    start: int,
    batch_size: int,
    micro_batch_size: int,
    rank: int,
    processes: int,
    device: torch.device,
) -> Generator[torch.Tensor, None, None]:
    """This rank's windows of each update from the `start`-th on, endless: int64 [micro-batches, micro, T + 1] on `device`.

    A thread reads one update ahead, into pinned memory if the device is a GPU. A thread is enough: windows are slices of a
    memory map. It makes no copy, and ends with its process also after a kill.
    """
    pinned = device.type == "cuda"

    def read(update: int) -> torch.Tensor:
        places = rows_of(update, batch_size, micro_batch_size, rank, processes)
        windows = np.stack([mixture[int(position)] for position in places.ravel()])
        share = torch.from_numpy(windows).view(*places.shape, -1)
        return share.pin_memory() if pinned else share

    with ThreadPoolExecutor(1, thread_name_prefix="windows") as reader:
        ahead = reader.submit(read, start)
        while True:
            share, start = ahead.result(), start + 1
            ahead = reader.submit(read, start)
            yield share.to(device, non_blocking=True)
