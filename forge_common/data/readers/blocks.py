"""What the blocks of a table will take in memory once decoded, read off their headers: a small file may hold a lot.

pyarrow has no limit of its own: it allocates what a Parquet page's header or an Arrow buffer's first bytes say.
Sources: parquet.thrift (PageHeader) in Thrift's compact protocol; Message.fbs (RecordBatch) in FlatBuffers, and
"Encapsulated message format" and "Compressed buffers" of Arrow's columnar format.
"""

import io
import os
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

STRING_LIMIT = 64 << 20  # bytes of a string in a Parquet header: the least or greatest value of a page


class Block(NamedTuple):
    """A Parquet page or an Arrow message."""

    rows: int
    stored: int  # bytes in the file
    decoded: int  # bytes in memory


def row_groups(file: BinaryIO, column: str) -> Iterator[Iterator[Block]]:
    """The pages of a column without lists, row group by row group. ValueError or LookupError where a header is broken.

    Read from the file itself: pyarrow's own view of a column chunk ends the process on some damaged footers (26.0).
    """
    file.seek(-8, os.SEEK_END)
    length = struct.unpack("<I", file.read(4))[0]
    if length > STRING_LIMIT:
        raise ValueError(f"a footer of {length >> 20} MiB")
    file.seek(-8 - length, os.SEEK_END)
    footer = _struct(io.BytesIO(file.read(length)))
    try:
        groups = [[each[3] for each in group[1] if each[3][3] == [column.encode()]] for group in footer[4]]
    except (TypeError, KeyError) as error:
        raise ValueError("the footer is broken") from error
    for (chunk,) in groups:
        yield _pages(file, chunk)


def _pages(file: BinaryIO, chunk: dict[int, Any]) -> Iterator[Block]:
    """The pages of a ColumnMetaData: 5 num_values, 7 total_compressed_size, 9 and 11 data's and dictionary's offset."""
    rows, (count, stored, first, dictionary) = 0, _integers(chunk, 5, 7, 9, 11)
    at = dictionary if 0 < dictionary < first else first
    end = at + stored
    while at < end and rows < count:
        file.seek(at)
        header = _struct(file)
        decoded, stored = _integers(header, 2, 3)
        (held,) = _integers(header.get(5) or header.get(8) or {}, 1)  # a data page of version 1 or 2: its num_values
        yield Block(held, stored, decoded)
        rows, at = rows + held, file.tell() + stored


def _integers(found: Any, *fields: int) -> list[int]:
    """The integers of a struct, 0 where it has none."""
    values = [found.get(field, 0) for field in fields] if isinstance(found, dict) else [None]
    if not all(isinstance(value, int) and value >= 0 for value in values):
        raise ValueError("a header is broken")
    return values


def _struct(file: BinaryIO) -> dict[int, Any]:
    """A Thrift struct: the number of each field, and its value."""
    found: dict[int, Any] = {}
    field = 0
    while head := file.read(1)[0]:
        field = field + (head >> 4) if head >> 4 else _integer(file)
        found[field] = _value(file, head & 15)
    return found


def _value(file: BinaryIO, kind: int) -> Any:
    if kind in (1, 2):
        return kind == 1  # a truth value is in its kind
    if kind in (4, 5, 6):
        return _integer(file)
    if kind == 8:
        length = _varint(file)
        if length > STRING_LIMIT:
            raise ValueError("a header is broken")
        return file.read(length)
    if kind == 9:
        head = file.read(1)[0]
        size, inner = head >> 4, head & 15
        size = _varint(file) if size == 15 else size
        return [file.read(1)[0] if inner in (1, 2) else _value(file, inner) for _ in range(size)]
    if kind == 12:
        return _struct(file)
    raise ValueError("a header is broken")  # the format has no other kinds


def _varint(file: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)[0]
        value |= (byte & 127) << shift
        if byte < 128:
            return value
    raise ValueError("a header is broken")


def _integer(file: BinaryIO) -> int:
    value = _varint(file)
    return value >> 1 ^ -(value & 1)  # zigzag: 0, -1, 1, -2, ...


def messages(file: BinaryIO, largest: int) -> Iterator[Block]:
    """The messages of an Arrow stream from where the file stands; up to where it ends or is broken.

    ValueError for a header of more than `largest` bytes.
    """
    while True:
        head = file.read(4)
        head = file.read(4) if head == b"\xff" * 4 else head  # before Arrow 0.15 there was no such mark
        size = struct.unpack("<i", head)[0] if len(head) == 4 else 0
        if size <= 0:
            return
        if size > largest:
            raise ValueError(f"a header of {size >> 20} MiB")
        header, start = file.read(size), file.tell()
        try:
            rows, body, decoded = _message(file, header, start)
        except (struct.error, IndexError):
            return  # pyarrow will say what is broken
        yield Block(rows, body, decoded)
        file.seek(start + body)


def _message(file: BinaryIO, header: bytes, start: int) -> tuple[int, int, int]:
    """(rows, bytes of the body, bytes that its buffers take) of a message whose body begins at `start`."""
    message = _follow(header, 0)
    kind, batch = _field(header, message, 1), _field(header, message, 2)
    body = _read(header, "<q", _field(header, message, 3))
    if body < 0:
        raise struct.error
    kind = _read(header, "<B", kind)
    if kind not in (2, 3):  # neither a batch of dictionary values nor one of rows
        return 0, body, 0
    batch = _follow(header, batch)
    if kind == 2:
        batch = _follow(header, _field(header, batch, 1))
    rows = _read(header, "<q", _field(header, batch, 0)) if kind == 3 else 0
    if not _field(header, batch, 3):  # not compressed: the body is what it takes
        return rows, body, 0
    vector = _follow(header, _field(header, batch, 2))
    decoded = 0
    for index in range(struct.unpack_from("<I", header, vector)[0]):
        offset, length = struct.unpack_from("<qq", header, vector + 4 + 16 * index)
        if length >= 8 and offset >= 0:
            file.seek(start + offset)
            said = struct.unpack("<q", file.read(8))[0]
            decoded += length if said == -1 else max(said, 0)  # -1: this buffer is stored as it is
    return rows, body, decoded


def _follow(header: bytes, at: int) -> int:
    return at + struct.unpack_from("<I", header, at)[0]


def _field(header: bytes, table: int, index: int) -> int:
    """Where a table's field stands; 0 where the table does not have it."""
    fields = table - struct.unpack_from("<i", header, table)[0]
    if fields < 0 or 4 + 2 * index >= struct.unpack_from("<H", header, fields)[0]:
        return 0
    offset = struct.unpack_from("<H", header, fields + 4 + 2 * index)[0]
    return table + offset if offset else 0


def _read(header: bytes, kind: str, at: int) -> int:
    return struct.unpack_from(kind, header, at)[0] if at else 0
