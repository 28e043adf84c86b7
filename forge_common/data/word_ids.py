"""Tokenizing word by word, each different word once: on few cores three times as fast as the `tokenizers` library, with the same ids.

Byte-level BPE splits a text into words by a pattern, then each word into tokens by itself. The library spends nearly all its time on
the pattern. Here Python's `re` applies it, where it is certain to find the same words, and a dict has the ids of words seen before.
"""

import os
import re
from itertools import chain
from typing import Any

from tokenizers import Tokenizer as Backend

MAX_CORES = 4  # on more cores the library, which uses all of them, is as fast
MAX_CHARACTERS = 1 << 20  # of the words whose ids are kept: some 40 MB with the ids

# Texts of these characters alone are split here: ASCII, the letters of Latin scripts, punctuation and symbols. None of them is a number
# or a space of which Unicode and `re` could have different opinions.
LETTERS = "A-Za-z\u00aa\u00b5\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f"
SYMBOLS = "\u00a1-\u00a9\u00ab-\u00b1\u00b4\u00b6-\u00b8\u00bb\u00bf\u00d7\u00f7\u2010-\u2027\u2030-\u205e\u20a0-\u20bf\u2190-\u23ff\u2500-\u2775"
SPACES = "\t-\r "
PLAIN = re.compile(f"[{SPACES}\x21-\x7e{LETTERS}{SYMBOLS}]*")
# GPT-2's pattern (its encoder.py), as the library's ByteLevel has it.
WORD = re.compile(
    f"'(?:[sdmt]|ll|ve|re)| ?[{LETTERS}]+| ?[0-9]+| ?[^{SPACES}{LETTERS}0-9]+|[{SPACES}]+(?![^{SPACES}])|[{SPACES}]+"
)


class WordIds:
    """The ids of texts as `backend` gives them, without special tokens."""

    def __init__(self, backend: Backend):
        self._backend = backend
        self._ids: dict[str, list[int]] = {}
        self._characters = 0  # of the words in _ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text; texts with other characters than PLAIN go through the library."""
        plain = [PLAIN.fullmatch(text) is not None for text in texts]
        words = [WORD.findall(text) if is_plain else [] for text, is_plain in zip(texts, plain, strict=True)]
        self._add(set().union(*words))
        others = iter(self._encode([text for text, is_plain in zip(texts, plain, strict=True) if not is_plain]))
        ids_of = self._ids.__getitem__
        return [
            list(chain.from_iterable(map(ids_of, split))) if is_plain else next(others)
            for split, is_plain in zip(words, plain, strict=True)
        ]

    def _add(self, words: set[str]) -> None:
        if self._characters > MAX_CHARACTERS:
            self._ids.clear()
            self._characters = 0
        new = list(words - self._ids.keys())
        self._ids.update(zip(new, self._encode(new), strict=True))
        self._characters += sum(map(len, new))

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]


def word_ids(backend: Backend, parts: dict[str, Any]) -> WordIds | None:
    """None where the tokenizer, whose JSON `parts` is, does not split text like this, or the machine has more than MAX_CORES."""
    splits = parts["pre_tokenizer"] or {}
    if (
        splits.get("type") == "ByteLevel"
        and splits["use_regex"]
        and not splits["add_prefix_space"]
        and parts["normalizer"] is None
        and parts["model"]["type"] == "BPE"
        and not parts["model"]["dropout"]
        and all(token["special"] for token in parts["added_tokens"])
        and (os.cpu_count() or 1) <= MAX_CORES
    ):
        return WordIds(backend)
    return None
