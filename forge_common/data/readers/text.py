"""Reader of plain text files: one document a file, or many with a separator. Memory does not grow with the file."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ...errors import UserError
from .document import PIECE, Document, Reading, bad_text, from_text
from .files import File, decompressed_copy, opened, suffixes

BOM = b"\xef\xbb\xbf"


def documents(path: File, reading: Reading, counts: Counter) -> Iterator[Document]:
    """Read a text file. Origin: the path, or path:line where a separator makes several documents of one file.

    Line ends are kept; a UTF-8 byte order mark is not part of the text. UserError for bytes that are not UTF-8 text, as
    path:line:byte (both counted from 1, the byte within its line), unless on_bad_text allows them.

    A long document is read several times instead of held in memory. A compressed or remote file is therefore copied
    first, decompressed, to a temporary file, which is deleted with the last of its documents.
    """
    separator = None if reading.document_separator is None else reading.document_separator.encode()
    local = isinstance(path, Path) and not suffixes(path)[1]
    copy = None if local else decompressed_copy(path)
    place = Path(copy.name if copy else path)
    line = 1
    read_to = 0
    # Two handles: the search for the next separator is up to a piece ahead of the reading.
    with opened(place) as search, opened(place) as file:
        for start, end in _spans(search, separator):
            line += _newlines(file, read_to, start)
            origin = f"{path}:{line}" if separator else str(path)
            pieces = _Pieces(path, place, copy, start, end, line, replace=reading.on_bad_text == "replace")
            read_to = start
            try:
                document = pieces.document(origin, file, reading, counts)
            except _BadText as error:
                if reading.on_bad_text == "refuse":
                    raise bad_text(str(error)) from None
                counts["skipped_bad_text"] += 1
                continue
            if document is not None:
                yield document


class _BadText(ValueError):
    """path:line:byte and what is wrong there."""


class _Pieces:
    """The text of bytes start..end of a file, read again each time it is iterated over."""

    def __init__(self, path: File, place: Path, copy: Any, start: int, end: int, line: int, replace: bool):
        self.path = path
        self.place = place
        self.start = start
        self.end = end
        self.line = line
        self.replace = replace
        self.copy = copy  # a temporary file, which must not be deleted before this
        self.digest: bytes | None = None
        self.replaced = False

    def document(self, origin: str, file: BinaryIO, reading: Reading, counts: Counter) -> Document | None:
        """Read it once, for its digest and its faults; only a short document stays in memory."""
        if self.end - self.start <= PIECE:
            file.seek(self.start)
            data = file.read(self.end - self.start)
            if len(data) < self.end - self.start:
                raise self._changed()
            text = self._decode(data, self.line, 0)
            counts["replaced_bad_text"] += self.replaced
            return from_text(origin, text, reading, counts)
        digest = hashlib.sha256()
        blank = True
        for text in self:
            digest.update(text.encode())
            blank = blank and not text.strip()
        counts["replaced_bad_text"] += self.replaced
        if blank:
            counts["skipped_empty"] += 1
            return None
        self.digest = digest.digest()
        return Document(origin, self.digest, self)

    def __iter__(self) -> Iterator[str]:
        digest = hashlib.sha256()
        line = self.line
        column = 0
        with opened(self.place) as file:
            file.seek(self.start)
            for data in _blocks(file, self.end - self.start):
                text = self._decode(data, line, column)
                line += data.count(b"\n")
                column = len(data) - data.rfind(b"\n") - 1 if b"\n" in data else column + len(data)
                digest.update(text.encode())
                yield text
        if self.digest not in (None, digest.digest()):
            raise self._changed()

    def _changed(self) -> UserError:
        return UserError(f"{self.path}: changed while it was being read. Start again when nothing writes to it.")

    def _decode(self, data: bytes, line: int, column: int) -> str:
        """Decode bytes that begin after `column` bytes of line `line`."""
        try:
            at = data.find(b"\0")
            if at < 0:
                return data.decode()
            reason = "a NUL byte: this is a binary file, or text in UTF-16, which `iconv -f utf-16 -t utf-8` converts"
        except UnicodeDecodeError as error:
            at = error.start
            reason = f"byte 0x{data[error.start]:02x} is not UTF-8"
        if self.replace:
            self.replaced = True
            return data.decode("utf-8", "replace").replace("\0", "\ufffd")
        line_start = data.rfind(b"\n", 0, at) + 1
        byte = at - line_start + 1 + (0 if line_start else column)
        line += data.count(b"\n", 0, at)
        raise _BadText(f"{self.path}:{line}:{byte}: {reason}")


def _spans(file: BinaryIO, separator: bytes | None) -> Iterator[tuple[int, int]]:
    """Byte ranges [start, end) of a file's documents; a separator at the end of the file starts no document."""
    start = len(BOM) if file.read(len(BOM)) == BOM else 0
    if separator is None:
        yield start, file.seek(0, 2)
        return
    position = file.seek(start)
    tail = b""  # the end of the last block: a separator may begin there
    while block := file.read(PIECE):
        searched = tail + block
        base, begin = position - len(tail), 0
        while (hit := searched.find(separator, begin)) >= 0:
            yield start, base + hit
            begin = hit + len(separator)
            start = base + begin
        position += len(block)
        tail = searched[max(begin, len(searched) - len(separator) + 1) :]
    if start < position:
        yield start, position


def _blocks(file: BinaryIO, size: int) -> Iterator[bytes]:
    """The next `size` bytes in blocks of at most PIECE, cut after a line end, else before a space or a character."""
    rest = b""
    while size or rest:
        block = rest + file.read(min(size, PIECE - len(rest)))
        if len(block) == len(rest) and size:
            return  # the file became shorter: its digest will differ
        size -= len(block) - len(rest)
        cut = len(block)
        if size:
            cut = block.rfind(b"\n") + 1 or max(block.rfind(b" "), 0) or _character_start(block)
        yield block[:cut]
        rest = block[cut:]


def _character_start(block: bytes) -> int:
    """Where the last UTF-8 character of a block begins, which the block's end may cut in two."""
    for back in range(1, 4):
        if block[-back] & 0xC0 != 0x80:
            return len(block) - back
    return len(block)


def _newlines(file: BinaryIO, start: int, end: int) -> int:
    """Line ends in bytes start..end."""
    file.seek(start)
    count = 0
    while start < end:
        block = file.read(min(PIECE, end - start))
        if not block:
            break
        count += block.count(b"\n")
        start += len(block)
    return count
