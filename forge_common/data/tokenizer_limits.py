"""What a tokenizer.json by others may contain: limits that are checked before and after the tokenizers library builds it."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from ..errors import UserError
from ..files.atomic import unique

# Checked before the library builds it: that can take a hundred times the memory of the file.
FILE_BYTES = 64 << 20  # the largest known have 33 MB
FILE_VALUES = 3 << 20  # JSON values
VOCABULARY = 1 << 19  # entries
VOCABULARY_TEXT = 4 << 20  # bytes; a Unigram model takes up to 330 bytes for each
MERGES = 1 << 20
ADDED_TOKENS = 1 << 14
ADDED_TEXT = 2 << 20  # bytes
OTHER_VALUES = 1000  # JSON values in the other parts, such as the normalizer
OTHER_TEXT = 1 << 16  # bytes of all strings in them
LARGEST_VOCABULARY = 1 << 24  # ids may have gaps, and each takes a row of the embedding
LONGEST_REWRITING = 4096  # characters that a normalizer may make of one character


def bounded_parts(content: bytes, file: Path) -> dict[str, Any]:
    """The parts of a tokenizer.json. UserError where one of them is larger than in any tokenizer that is in use."""

    def limit(number: int, most: int, what: str) -> None:
        if number > most:
            raise UserError(f"{file}: it has {number:,} {what}, more than {most:,}. Use another tokenizer.")

    limit(sum(map(content.count, (b",", b"[", b"{"))), FILE_VALUES, "JSON values")
    limit(content.count(b":"), 2 * VOCABULARY, "JSON keys")
    parts = json.loads(content, object_pairs_hook=unique)  # the library may read another of two values of one key
    if not isinstance(parts, dict):
        raise UserError(f"{file}: it holds a {type(parts).__name__}, not an object. Use another tokenizer.")
    others = dict(parts)
    added = others.pop("added_tokens", None) or []
    model = others["model"] = dict(parts["model"]) if isinstance(parts.get("model"), dict) else {}
    vocabulary = model.pop("vocab", ())
    merges = model.pop("merges", ())
    limit(len(vocabulary), VOCABULARY, "entries in its vocabulary")
    limit(_text(vocabulary), VOCABULARY_TEXT, "bytes in its vocabulary")
    limit(len(merges or ()), MERGES, "merges")
    limit(len(added), ADDED_TOKENS, "added tokens")
    limit(_text(added), ADDED_TEXT, "bytes in its added tokens")
    limit(sum(1 for _ in _values(others)), OTHER_VALUES, "values in its other parts")
    limit(_text(others), OTHER_TEXT, "bytes in its other parts")
    return parts


def _values(part: Any) -> Iterator[Any]:
    """All keys and values in a JSON value, without SentencePiece's table of characters, a string that `_rewriting` limits."""
    waiting = [part]
    while waiting:
        value = waiting.pop()
        yield value
        if isinstance(value, dict):
            waiting += [inside for name, inside in value.items() if name != "precompiled_charsmap"]
            waiting += value
        elif isinstance(value, list):
            waiting += value


def _text(part: Any) -> int:
    """Bytes of the strings in a JSON value."""
    return sum(len(value.encode()) for value in _values(part) if isinstance(value, str))


def check_encoding(content: dict, backend: Backend, file: Path) -> None:
    """UserError, before any text is encoded, if encoding would need unbounded memory or lose the text."""
    greatest = max(backend.get_vocab().values(), default=-1)
    if not 0 <= greatest < LARGEST_VOCABULARY:
        raise UserError(f"{file}: the vocabulary's greatest id is {greatest}. Use a tokenizer of 1 to 16,777,216 ids.")
    if _rewriting(content.get("normalizer")) > LONGEST_REWRITING:
        raise UserError(f"{file}: its normalizer makes thousands of characters of one. Use another tokenizer.")
    if not backend.encode("x", add_special_tokens=False).ids:
        raise UserError(f"{file}: it makes no token of the text 'x': texts would be lost. Use another tokenizer.")


def _rewriting(normalizer: dict | None) -> int:
    """How many characters the normalizers, one after the other, can make of one."""
    if not normalizer:
        return 1
    inserted = len(normalizer.get("content") or normalizer.get("prepend") or "")
    inserted += len(normalizer.get("precompiled_charsmap") or "") >> 10  # a table: one character becomes one row of it
    return math.prod(map(_rewriting, normalizer.get("normalizers") or ()), start=1 + inserted)
