"""How many bytes of text each token stands for, so that bits per byte divide by the text that was scored, or are unknown.

V vocabulary, T time
"""

from collections.abc import Iterable

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

from ..labels import CONTEXT, is_scored
from .tokenizer import Tokenizer
from .windows import Tokens

CHUNK = 1 << 24  # tokens of a store whose lengths are added up at once


class ByteLengths:
    """Bytes of text per token, read from the vocabulary and checked against the size of each store's text.

    The vocabulary is read as a byte-level one (a character for each byte) and as SentencePiece's (a ▁ for each space,
    <0x0A> for a byte). A reading holds for a store if the lengths of all its tokens add up to the bytes of its text;
    SentencePiece may count one more for each document, the space that it puts before a text.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._before_text = tokenizer.prefix[-1] if tokenizer.prefix else tokenizer.eos_token_id
        self._known: dict[Tokens, tuple[np.ndarray, bool] | None] = {}

    def count(self, store: Tokens, windows: Iterable[np.ndarray], filler: int) -> int | None:
        """Bytes of the scored labels of windows [T + 1] of `store`, filled up with `filler`; None where it is unknown."""
        if store not in self._known:
            self._known[store] = self._lengths(store)
        known = self._known[store]
        if known is None:
            return None
        lengths, space = known
        total = 0
        for window in windows:
            labels = window[1:]
            scored = is_scored(labels, filler)
            total += int(lengths[labels[scored]].sum())
            if space:
                before = self._before_text
                total -= int((np.isin(window[:-1], (before, CONTEXT - before)) & scored).sum())
        return total

    def _lengths(self, store: Tokens) -> tuple[np.ndarray, bool] | None:
        """The lengths [V] that hold for a store, and whether the first token of a text counts a space that is not in it."""
        number = np.zeros(self._tokenizer.vocab_size, dtype=np.int64)
        for start in range(0, len(store.tokens), CHUNK):
            number += np.bincount(store.tokens[start : start + CHUNK], minlength=len(number))
        for lengths in self._readings():
            surplus = int(number @ lengths) - store.bytes
            if surplus in (0, store.documents):
                return lengths, surplus > 0
        return None

    def _readings(self) -> Iterable[np.ndarray]:
        """The vocabulary's lengths [V], read in each way; special tokens, which are not of the text, have 0."""
        backend = self._tokenizer.backend
        added = backend.get_added_tokens_decoder()
        outside = {self._tokenizer.eos_token_id, *self._tokenizer.prefix, *self._tokenizer.suffix}
        outside |= {number for number, token in added.items() if token.special}
        alphabet = set(ByteLevel.alphabet())

        def byte_level(token: str) -> int:
            return len(token) if alphabet.issuperset(token) else len(token.encode())

        def sentence_piece(token: str) -> int:
            is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
            return 1 if is_byte else len(token.replace("▁", " ").encode())

        for read in (byte_level, sentence_piece):
            lengths = np.zeros(self._tokenizer.vocab_size, dtype=np.int64)
            for token, number in backend.get_vocab(with_added_tokens=True).items():
                if number not in outside:
                    lengths[number] = len(token.encode()) if number in added else read(token)
            yield lengths
