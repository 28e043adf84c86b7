"""From tokens on disk to windows of T + 1 tokens: the inputs are all but the last, the labels all but the first.

Every token except the first of all (packed), or the first of each document (not packed), is a label exactly once.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..labels import CONTEXT

CHUNK = 1 << 20  # documents whose windows are counted at once


class Tokens:
    """One split, opened. UserError when its tokens or offsets are not those that were written.

    Both files are read for it, by each process: SHA-256 took 1.0 to 1.5 s of processor time a GB (AMD EPYC), so for 500
    M tokens of 2 bytes. A change while it is open is not found.
    """

    def __init__(self, folder: Path, split: str):
        facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        self.folder = folder
        self.split = split
        self.documents, self.bytes, self.digest = (facts[split][key] for key in ("documents", "bytes", "digest"))
        _verify(folder / f"{split}.tokens", self.digest)
        if "offsets_digest" in facts[split]:  # caches of earlier versions have none
            _verify(folder / f"{split}.offsets", facts[split]["offsets_digest"])
        self.tokens = _mapped(folder / f"{split}.tokens", facts["dtype"], facts[split]["tokens"])
        self.offsets = _mapped(folder / f"{split}.offsets", "<u8", self.documents + 1)
        self._ids = np.asarray(self.tokens)  # a view: each slice of a memory map costs 2 us more
        self._context: np.ndarray | None = None
        if "context_digest" in facts[split]:
            _verify(folder / f"{split}.context", facts[split]["context_digest"])
            self._context = np.asarray(_mapped(folder / f"{split}.context", "?", facts[split]["tokens"]))
            self.digest = hashlib.sha256((self.digest + facts[split]["context_digest"]).encode()).hexdigest()

    def read(self, start: int, end: int) -> np.ndarray:
        """Tokens start..end-1, int64; a token t that is not scored is CONTEXT - t."""
        ids = self._ids[start:end].astype(np.int64)
        if self._context is not None:
            np.subtract(CONTEXT, ids, out=ids, where=self._context[start:end])
        return ids

    @property
    def has_conversations(self) -> bool:
        return self._context is not None

    def num_context(self, start: int, end: int) -> int:
        """How many of the tokens start..end-1 are not scored."""
        return 0 if self._context is None else int(np.count_nonzero(self._context[start:end]))

    def num_first_context(self) -> int:
        """How many documents' first tokens are not scored."""
        return 0 if self._context is None else int(np.count_nonzero(self._context[self.offsets[:-1].astype(np.int64)]))

    def origins(self, first: int, last: int) -> list[str]:
        """Origins of documents first..last-1; reads the file of origins up to there."""
        with open(
            self.folder / f"{self.split}.origins", encoding="utf-8", errors="surrogateescape", newline="\n"
        ) as file:
            return [line.removesuffix("\n") for line in islice(file, first, last)]

    def origin(self, document_index: int) -> str:
        """Where a document came from. IndexError when there is no such document."""
        if not 0 <= document_index < self.documents:
            raise IndexError(f"document {document_index} of {self.documents}")
        return self.origins(document_index, document_index + 1)[0]


class Windows:
    """The windows of one split, `windows[i] -> int64 [T + 1]`; nothing of the corpus is held in memory.

    pack=True: window i is tokens[i*T : i*T + T + 1], across documents. The rest at the end, too short for a window, is
    dropped (`dropped` labels), or with `tail` becomes a last, partly filled window.
    pack=False: each document alone, in windows of stride T, the last one partly filled; nothing is dropped. A document
    of one token has no label and no window.

    A window's first `size(i)` labels are real; the rest of it is `filler`. `scored(i)` of them are scored, and a token
    t that is not is CONTEXT - t. `labels` and `dropped` count what is scored.
    """

    def __init__(self, tokens: Tokens, sequence_length: int, *, pack: bool, filler: int, tail: bool = False):
        if sequence_length < 1:
            raise UserError(f"--sequence-length is {sequence_length}; it must be at least 1")
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.pack = pack
        self.filler = filler
        total = len(tokens.tokens)
        if pack:
            possible = max(total - 1, 0)
            self._length = -(-possible // sequence_length) if tail else possible // sequence_length
            used = min(self._length * sequence_length, possible)
            self.labels = used - tokens.num_context(1, 1 + used)
            self.dropped = possible - used - tokens.num_context(1 + used, total)
        else:
            self._firsts = _first_windows(tokens, sequence_length)
            self._length = int(self._firsts[-1])
            self.labels = total - tokens.documents - tokens.num_context(0, total) + tokens.num_first_context()
            self.dropped = 0

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> np.ndarray:
        start, end = self._range(index)
        if end - start == self.sequence_length + 1:
            return self.tokens.read(start, end)
        window = np.full(self.sequence_length + 1, self.filler, dtype=np.int64)
        window[: end - start] = self.tokens.read(start, end)
        return window

    def size(self, index: int) -> int:
        """The number of real labels of the window, which are its first ones."""
        start, end = self._range(index)
        return end - start - 1

    def scored(self, index: int) -> int:
        """The number of labels of the window that are scored."""
        start, end = self._range(index)
        return end - start - 1 - self.tokens.num_context(start + 1, end)

    def before(self, index: int, length: int, eos_token_id: int) -> np.ndarray:
        """The ids before the window in its first document, int64 [length]: an EOS before its beginning, -1 further left."""
        start, _ = self._range(index)
        first = int(np.searchsorted(self.tokens.offsets, np.uint64(start), side="right")) - 1
        known = self.tokens.tokens[max(int(self.tokens.offsets[first]), start - length) : start]
        before = np.full(length, -1, dtype=np.int64)
        if len(known):
            before[-len(known) :] = known
        if len(known) < length:
            before[length - len(known) - 1] = eos_token_id
        return before

    def spans(self, index: int) -> list[tuple[int, int, int]]:
        """(document, start, end) of each document's part of the window, in places of the window (0 .. T + 1)."""
        start, end = self._range(index)
        offsets = self.tokens.offsets
        first = int(np.searchsorted(offsets, np.uint64(start), side="right")) - 1
        last = int(np.searchsorted(offsets, np.uint64(end), side="left"))
        bounds = np.clip(offsets[first : last + 1].astype(np.int64), start, end) - start
        return [(first + i, int(a), int(b)) for i, (a, b) in enumerate(pairwise(bounds))]

    def documents_of(self, index: int) -> list[str]:
        """Origins of the documents in the window, in order."""
        spans = self.spans(index)
        return self.tokens.origins(spans[0][0], spans[-1][0] + 1)

    def _range(self, index: int) -> tuple[int, int]:
        """The place of a window's real tokens in the corpus: [start, end)."""
        if not -self._length <= index < self._length:
            raise IndexError(f"window {index} of {self._length}")
        index = int(index) % self._length
        if self.pack:
            start = index * self.sequence_length
            stop = len(self.tokens.tokens)
        else:
            # In the array's own type: NumPy would turn all of a memory map into floats to compare it with an int.
            document = int(np.searchsorted(self._firsts, np.uint64(index), side="right")) - 1
            start = int(self.tokens.offsets[document])
            start += (index - int(self._firsts[document])) * self.sequence_length
            stop = int(self.tokens.offsets[document + 1])
        return start, min(start + self.sequence_length + 1, stop)


def _first_windows(tokens: Tokens, sequence_length: int) -> np.ndarray:
    """Each document's first window and, last, their number: uint64 [documents + 1], a file beside the tokens."""
    path = tokens.folder / f"{tokens.split}.windows-{sequence_length}"
    if not _is_written(path, tokens, sequence_length):
        partial = Path(f"{path}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
        try:
            with open(partial, "wb") as file:
                for counts in _window_counts(tokens, sequence_length):
                    counts.tofile(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise UserError(
                f"{path}: cannot be written ({error.strerror}). Free space, or choose another --cache-dir."
            ) from error
    return np.memmap(path, dtype="<u8", mode="r")


def _is_written(path: Path, tokens: Tokens, sequence_length: int) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        same = all(file.read(counts.nbytes) == counts.tobytes() for counts in _window_counts(tokens, sequence_length))
        return same and not file.read(1)


def _window_counts(tokens: Tokens, sequence_length: int) -> Iterator[np.ndarray]:
    """The numbers in the file of `_first_windows`, in parts."""
    before = np.uint64(0)
    yield np.zeros(1, dtype="<u8")
    for start in range(0, tokens.documents, CHUNK):
        lengths = np.diff(tokens.offsets[start : start + CHUNK + 1])
        windows = (lengths - np.uint64(1) + np.uint64(sequence_length - 1)) // np.uint64(sequence_length)
        total = np.cumsum(windows, dtype="<u8") + before
        yield total
        before = total[-1]


def _verify(path: Path, digest: str) -> None:
    """UserError where a file has another SHA-256. It is read, since a memory map would count as memory of this process."""
    with open(path, "rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != digest:
        raise UserError(
            f"{path}: not what was written (SHA-256 {actual}). Remove the folder: it will be written again."
        )


def _mapped(path: Path, dtype: str, length: int) -> np.ndarray:
    if path.stat().st_size != length * np.dtype(dtype).itemsize:
        raise UserError(f"{path}: not of the size that facts.json states. Remove the folder: it will be written again.")
    return np.memmap(path, dtype=dtype, mode="r") if length else np.empty(0, dtype=dtype)
