"""The order of the windows: a pure function of (seed, position), the same for any number of processes.

A position counts all windows of the training; update u of batch size B takes the positions u * B to u * B + B - 1.
Nothing is shuffled in memory: single places of a permutation are computed, in O(1) memory and start-up time.
"""

import hashlib
import itertools
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
    """The values of a permutation of range(size), chosen by `key`, at each of `index` (uint64, < size)."""
    return _permute(index, np.zeros(len(index), dtype=np.int64), [(size, key)])


def _permute(
    index: np.ndarray, group: np.ndarray, permutations: Sequence[tuple[int, tuple[object, ...]]]
) -> np.ndarray:
    """The values of several permutations, each a (size, key), at once: of number `group[i]` at `index[i]`, int64 [N].

    A Feistel network over the next power of four, applied until the result is below the size (at most four times on
    average). Source: Black & Rogaway, Ciphers with arbitrary finite domains, CT-RSA 2002.
    """
    sizes = np.array([size for size, _ in permutations], dtype=np.uint64)
    halves = np.array([max(1, (max(size - 1, 1).bit_length() + 1) // 2) for size, _ in permutations], dtype=np.uint64)
    masks = (np.uint64(1) << halves) - np.uint64(1)
    round_keys = np.stack([_key("permutation", size, *key) for size, key in permutations], axis=1)
    result = index.astype(np.uint64)
    outside = np.arange(len(result))
    while len(outside):
        of = group[outside] if len(permutations) > 1 else np.zeros(1, dtype=np.int64)
        half, low = halves[of], masks[of]
        value = result[outside]
        left, right = value >> half, value & low
        for keys in round_keys[:, of]:
            left, right = right, left ^ (_mix(right ^ keys) & low)
        value = (left << half) | right
        result[outside] = value
        outside = outside[value >= sizes[of]]
    return result.astype(np.int64)


class Mixture:
    """The windows of several sources as one endless stream, `mixture[position] -> int64 [T + 1]`.

    Without weights the sources are one corpus: every window comes once an epoch, in another order each epoch. With
    weights each source has its own order and its own epochs; the weights hold in every 1,024 positions (to 1 in 1,024),
    in an order that differs from block to block.
    """

    def __init__(
        self,
        sources: Sequence[WindowStore],
        weights: Sequence[float] | None,
        seed: int,
        names: Sequence[str] | None = None,
    ):
        """names: of the sources, for `passes`; None: their numbers."""
        self.sources = list(sources)
        self.seed = seed
        self.names = list(names or map(str, range(len(self.sources))))
        self.lengths = np.array([len(source) for source in sources], dtype=np.int64)
        self.size = int(self.lengths.sum())
        self._starts = np.concatenate(([0], np.cumsum(self.lengths)))
        self._pattern = None if weights is None else self._block_of_sources(np.asarray(weights, dtype=np.float64))
        self._counts = self.lengths if self._pattern is None else np.bincount(self._pattern)
        self._last_block = (-1, np.empty(0, np.int64), np.empty(0, np.int64))

    @staticmethod
    def _block_of_sources(weights: np.ndarray) -> np.ndarray:
        """BLOCK numbers of sources, each as often as its weight says, rounded by largest remainder."""
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
        fractions = self._counts / self._counts.sum()
        return [(source.tokens, float(part)) for source, part in zip(self.sources, fractions, strict=True)]

    def locate(self, position: int) -> tuple[int, int, int]:
        """(source, window of that source, how many times all of the source came before)."""
        source, window, seen = self.places(np.array([position], dtype=np.int64))[0].tolist()
        return source, window, seen

    def places(self, positions: np.ndarray) -> np.ndarray:
        """`locate` of each of `positions` [N], int64: [N, 3]."""
        if self._pattern is None:
            epochs, place = np.divmod(positions, self.size)
            distinct, group = np.unique(epochs, return_inverse=True)
            permutations = [(self.size, (self.seed, epoch)) for epoch in distinct.tolist()]
            window = _permute(place, group, permutations)
            source = np.searchsorted(self._starts, window, side="right") - 1
            return np.stack((source, window - self._starts[source], epochs), axis=1)
        blocks, place = np.divmod(positions, BLOCK)
        source = np.empty(len(positions), dtype=np.int64)
        drawn = np.empty(len(positions), dtype=np.int64)
        for block in np.unique(blocks).tolist():
            order, before = self._block(block)
            here = blocks == block
            source[here] = order[place[here]]
            drawn[here] = block * self._counts[source[here]] + before[place[here]]
        epochs, place = np.divmod(drawn, self.lengths[source])
        distinct, group = np.unique(epochs * len(self.sources) + source, return_inverse=True)
        permutations = []
        for epoch, number in (divmod(value, len(self.sources)) for value in distinct.tolist()):
            permutations.append((int(self.lengths[number]), (self.seed, "source", number, epoch)))
        return np.stack((source, _permute(place, group, permutations), epochs), axis=1)

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The sources of a block of a weighted mixture, and how often each came before in the block: both [BLOCK]."""
        number, order, before = self._last_block  # read at once: the thread that reads ahead sets it too
        if number != block:
            assert self._pattern is not None
            order = self._pattern[permute(np.arange(BLOCK), BLOCK, self.seed, "block", block)]
            by_source = np.argsort(order, kind="stable")
            before = np.empty(BLOCK, dtype=np.int64)
            before[by_source] = np.arange(BLOCK) - np.repeat(np.cumsum(self._counts) - self._counts, self._counts)
            self._last_block = (block, order, before)
        return order, before

    def __getitem__(self, position: int) -> np.ndarray:
        source, window, _ = self.locate(position)
        return self.sources[source][window]

    def windows(self, positions: np.ndarray) -> np.ndarray:
        """The windows at `positions` [N], int64 [N, T + 1]."""
        return np.stack([self.sources[source][window] for source, window, _ in self.places(positions).tolist()])

    def epoch(self, positions: int) -> float:
        """Epochs after that many positions: positions / windows. With weights, `passes` tells what is repeated."""
        return positions / self.size

    def passes(self, positions: int) -> dict[str, float]:
        """How many times the first `positions` positions hold the windows of each source; {} without weights: `epoch` tells."""
        if self._pattern is None:
            return {}
        blocks, rest = divmod(positions, BLOCK)
        drawn = blocks * self._counts
        if rest:
            drawn = drawn + np.bincount(self._block(blocks)[0][:rest], minlength=len(self.sources))
        return dict(zip(self.names, (drawn / self.lengths).tolist(), strict=True))

    def origins(self, positions: range) -> list[str]:
        """Origins of the documents in the windows at `positions`, each once."""
        origins: dict[str, None] = {}
        for source, window, _ in self.places(np.arange(positions.start, positions.stop)).tolist():
            origins |= dict.fromkeys(self.sources[source].documents_of(window))
        return list(origins)


def positions_of(update: int, batch_size: int, micro_batch_size: int, rank: int, processes: int) -> np.ndarray:
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

    A thread reads one update ahead, into pinned memory if the device is a GPU. A thread is enough: windows are slices
    of a memory map. It makes no copy, and ends with its process also after a kill.
    """
    pinned = device.type == "cuda"

    def read(update: int) -> torch.Tensor:
        positions = positions_of(update, batch_size, micro_batch_size, rank, processes)
        windows = torch.from_numpy(mixture.windows(positions.ravel())).view(*positions.shape, -1)
        return windows.pin_memory() if pinned else windows

    with ThreadPoolExecutor(1, thread_name_prefix="windows") as reader:
        reading = reader.submit(read, start)
        for update in itertools.count(start + 1):
            windows = reading.result()
            reading = reader.submit(read, update)
            yield windows.to(device, non_blocking=True)
