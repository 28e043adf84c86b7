"""What every reader yields, and the rules for all of them: what is text, what is a row, what is an error."""

import difflib
import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...errors import UserError
from ...flags import flag_of

PIECE = 1 << 20  # bytes of a file, or characters of a row, that are held and tokenized at once
RECORD_LIMIT = 32 << 20  # bytes of one line, record or value; a longer one is an error
# Bytes that reading text, JSON or CSV takes at most, besides the interpreter and its libraries
# (tests/data/test_memory.py). The worst record takes some fifty times its size: JSON of nothing but brackets becomes a
# list for every two bytes.
MEMORY_LIMIT = 2 << 30
POLICIES = {"on_bad_text": ("refuse", "replace", "skip"), "on_bad_line": ("refuse", "skip")}


class Message(NamedTuple):
    """A message of a conversation. scored: it is an answer that is learned; all else is only read."""

    role: str
    content: str
    scored: bool = False


class Document(NamedTuple):
    """One document: `pieces` joined are its text, each at most about 1 MiB and cut at line ends where there are any.

    Of a conversation they are the texts of its `messages`, which the tokenizer's chat template puts together.
    """

    origin: str  # path, path:line, path:row N, hf:ID:row or local:NAME:file
    digest: bytes  # SHA-256 of the whole text's UTF-8: copies of a text share it, wherever they come from
    pieces: Iterable[str]  # may be iterated over more than once
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True)
class Reading:
    """The settings of a reader. UserError when a policy does not exist or the separator is empty."""

    text_column: str = "text"
    document_separator: str | None = None
    on_bad_text: str = "refuse"
    on_bad_line: str = "refuse"

    def __post_init__(self):
        for name, allowed in POLICIES.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"{flag_of(name)} is {getattr(self, name)!r}. Use one of {', '.join(allowed)}.")
        if self.document_separator == "":
            raise UserError("--document-separator is empty. Leave the flag out to read one document a file.")


def reading_of(settings: Any) -> Reading:
    """The reading settings among a command's settings."""
    return Reading(
        text_column=settings.text_column,
        document_separator=settings.document_separator,
        on_bad_text=settings.on_bad_text,
        on_bad_line=settings.on_bad_line,
    )


def bad_text(message: str) -> UserError:
    return UserError(f"{message}. Fix the file, or pass --on-bad-text replace or --on-bad-text skip.")


def bad_line(message: str, reading: Reading, counts: Counter) -> None:
    """Refuse a row that cannot be used (UserError), or count it, as --on-bad-line says."""
    if reading.on_bad_line == "refuse":
        raise UserError(f"{message}. Fix it, or pass --on-bad-line skip.")
    counts["skipped_bad_line"] += 1


def cut(text: str) -> tuple[str, ...]:
    """Cut a text into pieces of at most PIECE characters, after line ends where there are any."""
    pieces = []
    start = 0
    while len(text) - start > PIECE:
        end = text.rfind("\n", start, start + PIECE) + 1 or start + PIECE
        pieces.append(text[start:end])
        start = end
    return (*pieces, text[start:])


def checked(origin: str, text: str, reading: Reading, counts: Counter) -> tuple[str, bytes] | None:
    """A text that is in memory, and its UTF-8. None, and counted, if --on-bad-text skip leaves it out.

    UserError if it holds a lone surrogate, which UTF-8 cannot encode (a byte that could not be decoded becomes one), or
    NUL, which means binary data.
    """
    try:
        at = text.find("\0")
        data = text.encode() if at < 0 else None
    except UnicodeEncodeError as error:
        at = error.start
        data = None
    if data is None:
        if reading.on_bad_text == "refuse":
            raise bad_text(f"{origin}: character {at + 1} of the text ({text[at]!a}) is not text")
        if reading.on_bad_text == "skip":
            counts["skipped_bad_text"] += 1
            return None
        counts["replaced_bad_text"] += 1
        data = text.encode("utf-8", "surrogatepass").replace(b"\0", "\ufffd".encode())
        text = "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in data.decode("utf-8", "surrogatepass"))
        data = text.encode()
    return text, data


def from_text(origin: str, text: str, reading: Reading, counts: Counter) -> Document | None:
    """Make a document of a text that is in memory. None, and counted, if it is only white space, or `checked` leaves it out."""
    found = checked(origin, text, reading, counts)
    if found is None:
        return None
    text, data = found
    if not text.strip():
        counts["skipped_empty"] += 1
        return None
    return Document(origin, hashlib.sha256(data).digest(), cut(text))


def nearest(wanted: str, names: Iterable[str]) -> str:
    """' (did you mean X?)' for the name closest to the wanted one, or nothing."""
    near = difflib.get_close_matches(wanted.lower(), [name.lower() for name in names], n=1, cutoff=0.5)
    return next((f" (did you mean {name!a}?)" for name in names if [name.lower()] == near), "")
