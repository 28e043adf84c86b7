"""From documents to the files of a split: in pieces, batch by batch, so that memory does not grow with the text."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError
from .chat import Encoded
from .readers.document import PIECE, Document
from .tokenizer import Tokenizer

# Tokenized at once: enough for all cores, little in memory (about 45 bytes a character until the batch is written).
BATCH_PIECES = 1024
BATCH_CHARACTERS = 4 * PIECE
ENOUGH_PIECES = 64  # of short documents
ENOUGH_CHARACTERS = PIECE


def position(digest: bytes) -> float:
    """The first 8 bytes of a document's digest as a fraction of 2**64: the place of its text among all texts."""
    return int.from_bytes(digest[:8], "big") / 2**64


def in_validation(digest: bytes, fraction: float) -> bool:
    """Whether a document is held out: its position is below `fraction`."""
    return position(digest) < fraction


class Piece(NamedTuple):
    document: Document
    text: str
    first: bool
    last: bool


def batches(documents: Iterable[Document]) -> Iterator[list[Piece]]:
    """Pieces of documents, in order, in batches of bounded size."""
    batch = []
    characters = 0
    for document in documents:
        for piece in _pieces(document):
            batch.append(piece)
            characters += len(piece.text)
            is_full = len(batch) >= BATCH_PIECES or characters >= BATCH_CHARACTERS
            if is_full or (len(batch) >= ENOUGH_PIECES and characters >= ENOUGH_CHARACTERS):
                yield batch
                batch = []
                characters = 0
    if batch:
        yield batch


def _pieces(document: Document) -> Iterator[Piece]:
    previous = None
    for text in document.pieces:
        if previous is not None:
            yield previous
        previous = Piece(document, text, first=previous is None, last=False)
    if previous is not None:
        yield previous._replace(last=True)


class SplitWriter:
    """Appends documents to one split's files."""

    def __init__(self, folder: Path, split: str, dtype: str, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.dtype = dtype
        self.hash = hashlib.sha256()
        self.offset_hash = hashlib.sha256()
        self.documents = self.tokens = self.bytes = 0
        suffix = tokenizer.suffix
        self.end = suffix if suffix[-1:] == (tokenizer.eos_token_id,) else (*suffix, tokenizer.eos_token_id)
        # Open as long as the writer; close() syncs them.
        kinds = ("tokens", "offsets", "origins")
        files = [open(folder / f"{split}.{kind}", "wb", buffering=PIECE) for kind in kinds]  # noqa: SIM115
        self.token_file, self.offset_file, self.origin_file = files
        self.context_path = folder / f"{split}.context"
        self.context_file = None

    def add(self, piece: Piece, ids: list[int]) -> None:
        if piece.first:
            self._begin(piece.document)
            ids = [*self.tokenizer.prefix, *ids]
        if piece.last:
            ids = [*ids, *self.end]
        self._append(piece.document, ids, len(piece.text.encode()))

    def add_conversation(self, document: Document, conversation: Encoded) -> None:
        """Append a conversation and, where it does not end with one, an EOS; that is scored where nothing else ends the
        last answer.
        """
        self._begin(document)
        ids = conversation.ids
        is_context = ~conversation.scored
        if ids[-1] != self.tokenizer.eos_token_id:
            ids = [*ids, self.tokenizer.eos_token_id]
            is_context = np.append(is_context, not conversation.is_open)
        if self.context_file is None:
            self.context_file = open(self.context_path, "wb")  # noqa: SIM115 (as the others)
        self.context_file.seek(self.tokens)  # what it jumps over reads as zeros
        self.context_file.write(is_context.astype(np.uint8).tobytes())
        self._append(document, ids, conversation.bytes)

    def _begin(self, document: Document) -> None:
        self.documents += 1
        self._write_offset()
        line = document.origin.replace("\n", "\\n") + "\n"
        self.origin_file.write(line.encode("utf-8", "surrogateescape"))

    def _append(self, document: Document, ids: list[int], num_bytes: int) -> None:
        array = np.array(ids, dtype=np.int64)
        self._check(document, array)
        data = array.astype(self.dtype).tobytes()
        self.hash.update(data)
        self.token_file.write(data)
        self.tokens += len(ids)
        self.bytes += num_bytes

    def _check(self, document: Document, ids: np.ndarray) -> None:
        if ids.size and ids.max() >= self.tokenizer.vocab_size:
            raise UserError(
                f"{document.origin}: token {ids.max()} is beyond the vocabulary of {self.tokenizer.vocab_size}. Fix tokenizer.json."
            )
        if self.tokenizer.pad_token_id is not None and (ids == self.tokenizer.pad_token_id).any():
            raise UserError(
                f"{document.origin}: its text yields PAD, token {self.tokenizer.pad_token_id}. Mark PAD as special in "
                "tokenizer.json, or declare another one."
            )

    def close(self) -> dict[str, Any]:
        self._write_offset()
        facts = {"documents": self.documents, "tokens": self.tokens, "bytes": self.bytes}
        facts |= {"digest": self.hash.hexdigest(), "offsets_digest": self.offset_hash.hexdigest()}
        files = [self.token_file, self.offset_file, self.origin_file]
        if self.context_file:
            self.context_file.truncate(self.tokens)
            files.append(self.context_file)
        for file in files:
            with file:
                file.flush()
                os.fsync(file.fileno())
        if self.context_file:
            with open(self.context_path, "rb") as file:
                facts["context_digest"] = hashlib.file_digest(file, "sha256").hexdigest()
        return facts

    def _write_offset(self) -> None:
        data = self.tokens.to_bytes(8, "little")
        self.offset_hash.update(data)
        self.offset_file.write(data)
