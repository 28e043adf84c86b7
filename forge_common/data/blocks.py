"""What the blocks of a table will take in memory once decoded, read off their headers: a small file may hold a lot.

pyarrow has no limit of its own: it allocates what a Parquet page's header or an Arrow buffer's first bytes say.
Sources: parquet.thrift (PageHeader) in Thrift's compact protocol; Message.fbs (RecordBatch) in FlatBuffers, and
"Encapsulated message format" and "Compressed buffers" of Arrow's columnar format.
"""

import struct
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

FIELDS = 1000  # of one page header at most; the format knows some thirty


class Block(NamedTuple):
    """A Parquet page or an Arrow message. ValueError or IndexError where its header is broken."""

    rows: int
    stored: int  # bytes in the file
    decoded: int  # bytes in memory


def pages(file: BinaryIO, chunk: Any) -> Iterator[Block]:
    """The pages of a Parquet column chunk (pyarrow's ColumnChunkMetaData), of a column without lists: a value a row."""
    dictionary = chunk.dictionary_page_offset
    at = dictionary if dictionary and dictionary < chunk.data_page_offset else chunk.data_page_offset
    end, rows = at + chunk.total_compressed_size, 0
    while at < end and rows < chunk.num_values:
        file.seek(at)
        block = _page(file)
        yield block
        rows, at = rows + block.rows, file.tell() + block.stored


def _page(file: BinaryIO) -> Block:
    """Reads a page header; what is not needed of it is passed over."""
    found: dict[tuple[int, ...], int] = {}
    above: list[int] = []
    field = 0
    for _ in range(FIELDS):
        head = file.read(1)[0]
        step, kind = head >> 4, head & 15
        if head == 0:  # the end of a struct
            if not above:
                rows = found.get((5, 1), 0) + found.get((8, 1), 0)  # num_values of a data page of version 1 or 2
                return Block(_checked(rows), _checked(found.get((3,), -1)), _checked(found.get((2,), -1)))
            field = above.pop()
            continue
        field = field + step if step else _integer(file)
        if kind == 12:  # a struct
            above.append(field)
            field = 0
        elif kind in (4, 5, 6):  # integers
            found[(*above, field)] = _integer(file)
        elif kind == 8:  # a string
            file.seek(_varint(file), 1)
        elif kind not in (1, 2):  # true and false, which the kind itself says
            break
    raise ValueError("a page header is broken")


def _checked(size: int) -> int:
    if size < 0:
        raise ValueError("a page header is broken")
    return size


def _varint(file: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)[0]
        value |= (byte & 127) << shift
        if byte < 128:
            return value
    raise ValueError("a page header is broken")


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
