"""Binary tables: .parquet and .arrow files (only the text column is read), and data sets on the Hugging Face hub."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import UserError
from .blocks import Block, messages, row_groups
from .document import MEMORY_LIMIT, PIECE, RECORD_LIMIT, Document, Reading, bad_line, from_rows, opened

ROWS = 256  # rows decoded at once, at most
BLOCK_LIMIT = MEMORY_LIMIT // 4  # bytes of a page or message: it is there compressed, decoded and, a part of it, copied

Rows = Iterator[tuple[str, dict[str, Any]]]
Batches = Iterator[tuple[Any, int, Any]]  # (schema, number of rows, the column of texts: None where it holds no text)


def documents(path: Path, reading: Reading, counts: Counter) -> Iterator[Document]:
    """Read a .parquet or .arrow file. Origin: 'path:row N', from 1."""
    return from_rows(_file_rows(path, reading, counts), reading, counts)


def hub_documents(spec: str, reading: Reading, counts: Counter) -> Iterator[Document]:
    """Stream hf:ID[:CONFIG[:SPLIT]]; the split is 'train' where none is named. Origin: hf:ID:row, from 1."""
    return from_rows(_hub_rows(spec), reading, counts)


def _file_rows(path: Path, reading: Reading, counts: Counter) -> Rows:
    import pyarrow

    number, column = 0, reading.text_column
    batches = _parquet_batches if path.suffix.lower() == ".parquet" else _arrow_batches
    try:
        for schema, rows, values in batches(path, column):
            if column not in schema.names:
                yield f"{path}:row 1", dict.fromkeys(schema.names)
                return
            if schema.names.count(column) > 1:
                raise UserError(f"{path}: two columns have the name {column!r}; rename one")
            if values is None:
                kind = f"holds values of type {schema.field(column).type} where text should be"
                bad_line(f"{path}:row {number + 1}: column {column!r} {kind}", reading, counts)
                number += rows
                counts["skipped_bad_line"] += rows - 1
                continue
            for value in _values(values):
                number += 1
                if value is not None and len(value) > RECORD_LIMIT:
                    too_long = f"{path}:row {number}: the value is longer than {RECORD_LIMIT >> 20} MiB"
                    bad_line(too_long, reading, counts)
                    continue
                yield f"{path}:row {number}", {column: None if value is None else _decoded(value)}
    except UserError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, LookupError, OverflowError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        message = f"{path}: broken, cut off or too large after row {number}: {reason}"
        if reading.on_bad_line == "refuse":
            mend = "write the file anew, in small row groups and pages or batches, or pass --on-bad-line skip"
            raise UserError(f"{message}; {mend}") from error
        counts["skipped_bad_file"] += 1


def _largest(blocks: Iterator[Block], row: int) -> tuple[int, int]:
    """(bytes of the largest block once decoded, the row after them); ValueError where one is too large."""
    largest = 0
    for block in blocks:
        size = max(block.stored, block.decoded)
        if size > BLOCK_LIMIT:
            which = f"rows {row + 1} to {row + block.rows} are" if block.rows else f"the dictionary of row {row + 1} is"
            raise ValueError(f"{which} one block of {size >> 20} MiB, {BLOCK_LIMIT >> 20} MiB are the most")
        largest, row = max(largest, block.decoded), row + block.rows
    return largest, row


def _parquet_batches(path: Path, column: str) -> Batches:
    """A row group at a time, in batches that are small where its pages are large: a row holds a page at most."""
    import pyarrow.parquet

    # Without a buffer pyarrow would read a row group's whole column at once.
    how = {"buffer_size": PIECE, "pre_buffer": False, "page_checksum_verification": True}
    with opened(path) as raw, pyarrow.parquet.ParquetFile(path, **how) as file:
        schema, metadata = file.schema_arrow, file.metadata
        if not _has_text(schema, column):
            if column not in schema.names or metadata.num_rows:
                yield schema, metadata.num_rows, None
            return
        first = 0
        for group, found in enumerate(row_groups(raw, column)):
            largest, first = _largest(found, first)
            rows = min(max(RECORD_LIMIT // max(largest, 1), 1), ROWS)
            for batch in file.iter_batches(batch_size=rows, row_groups=[group], columns=[column]):
                yield schema, len(batch), batch.column(0)


def _arrow_batches(path: Path, column: str) -> Batches:
    """Arrow's stream format (what `datasets` writes) or its file format (Feather), told apart by the first bytes."""
    import pyarrow

    with opened(path) as raw, pyarrow.OSFile(str(path)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        open_ = pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream
        schema = open_(source).schema
        source.seek(0)
        fields = [schema.names.index(column)] if column in schema.names else []
        raw.seek(8 if is_file else 0)  # a file is its magic bytes, a stream and an index of it
        _largest(messages(raw, BLOCK_LIMIT), 0)
        reader = open_(source, options=pyarrow.ipc.IpcReadOptions(included_fields=fields))
        has_text = _has_text(schema, column)
        if column not in schema.names:
            yield schema, 0, None
            return
        for batch in (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else reader:
            if len(batch):
                yield schema, len(batch), batch.column(0) if has_text else None


def _text_type(kind: Any) -> Any:
    """The type of a column's values, whether they are stored as they are or by their places in a dictionary."""
    import pyarrow

    return kind.value_type if pyarrow.types.is_dictionary(kind) else kind


def _has_text(schema: Any, column: str) -> bool:
    """Whether there is one column of that name, and of text."""
    import pyarrow

    kinds = [_text_type(field.type) for field in schema if field.name == column]
    return len(kinds) == 1 and kinds[0] in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view())


def _values(column: Any) -> Iterator[Any]:
    """The UTF-8 of each value of a text column, as buffers, one at a time: many rows may share one long value.

    As bytes, since Arrow checks UTF-8 for all rows or none, and a bad row must not hide others. What it does not check
    at all before it is asked to: whether the offsets of a file from elsewhere stay within its buffers.
    """
    import pyarrow

    raw = {
        pyarrow.string(): pyarrow.binary(),
        pyarrow.large_string(): pyarrow.large_binary(),
        pyarrow.string_view(): pyarrow.binary_view(),
    }[_text_type(column.type)]
    if pyarrow.types.is_dictionary(column.type):
        words = column.dictionary.view(raw)
        words.validate(full=True)
        column.indices.validate(full=True)
        for place in column.indices:
            yield words[place.as_py()].as_buffer() if place.is_valid else None
    else:
        column = column.view(raw)
        column.validate(full=True)
        for value in column:
            yield value.as_buffer()


def _decoded(value: Any) -> str:
    return str(value, "utf-8", "surrogateescape")


def _hub_rows(spec: str) -> Rows:
    identity, config, split = [*spec.removeprefix("hf:").split(":"), None, None][:3]
    if not identity or spec.count(":") > 3:
        raise UserError(f"{spec}: not of the form hf:ID[:CONFIG[:SPLIT]]")
    number = 0
    try:
        import datasets

        for row in datasets.load_dataset(identity, config or None, split=split or "train", streaming=True):
            number += 1
            yield f"hf:{identity}:{number}", row
    except Exception as error:  # the library and the network below it raise dozens of kinds, none of them common
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        mend = "check the name, the configuration, the split and the network, or download it and pass the files"
        raise UserError(f"{spec}: cannot be read after row {number}: {reason}; {mend}") from error
