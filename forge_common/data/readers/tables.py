"""Binary tables: .parquet and .arrow files (only the columns of the text are read), and data sets on the Hugging Face hub."""

from collections import Counter
from collections.abc import Iterator
from functools import cache, partial
from typing import Any, NamedTuple

from ...errors import UserError
from .document import PIECE, RECORD_LIMIT, Document, Reading, bad_line
from .files import File, opened, suffixes
from .rows import columns_of, from_rows

ROWS = 256  # rows decoded at once, at most

Rows = Iterator[tuple[str, dict[str, Any]]]


class Batch(NamedTuple):
    """Rows of a table."""

    schema: Any
    """Of the whole table."""
    num_rows: int
    columns: Any
    """An Arrow batch of the columns to read; None where there are none, or where the column of the text holds no text."""


def documents(path: File, reading: Reading, counts: Counter) -> Iterator[Document]:
    """Read a .parquet or .arrow file. Origin: 'path:row N', from 1."""
    return from_rows(_file_rows(path, reading, counts), reading, counts)


def hub_documents(spec: str, reading: Reading, counts: Counter) -> Iterator[Document]:
    """Stream hf:ID[:CONFIG[:SPLIT]]; the split is 'train' where none is named. Origin: hf:ID:row, from 1."""
    return from_rows(_hub_rows(spec, reading.text_column), reading, counts)


def _file_rows(path: File, reading: Reading, counts: Counter) -> Rows:
    import pyarrow

    number = 0
    column = reading.text_column
    batches = _parquet_batches if suffixes(path)[0] == ".parquet" else _arrow_batches
    try:
        for schema, num_rows, values in batches(path, column):
            columns = columns_of(schema.names, column)
            if not columns:
                yield f"{path}:row 1", dict.fromkeys(schema.names)
                return
            for name in columns:
                if schema.names.count(name) > 1:
                    raise UserError(f"{path}: two columns have the name {name!r}. Rename one.")
            if columns != (column,):
                values.validate(full=True)
                for place in range(num_rows):
                    number += 1
                    yield f"{path}:row {number}", values.slice(place, 1).to_pylist()[0]
                continue
            if values is None:
                kind = f"holds values of type {schema.field(column).type} where text should be"
                bad_line(f"{path}:row {number + 1}: column {column!r} {kind}", reading, counts)
                number += num_rows
                counts["skipped_bad_line"] += num_rows - 1  # bad_line has counted one
                continue
            for value in _values(values.column(0)):
                number += 1
                if value is not None and len(value) > RECORD_LIMIT:
                    too_long = f"{path}:row {number}: the value is longer than {RECORD_LIMIT >> 20} MiB"
                    bad_line(too_long, reading, counts)
                    continue
                yield f"{path}:row {number}", {column: None if value is None else _decoded(value)}
    except UserError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, LookupError, OverflowError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        message = f"{path}: broken or cut off after row {number}: {reason}"
        if reading.on_bad_line == "refuse":
            raise UserError(f"{message}. Write the file again, or pass --on-bad-line skip.") from error
        counts["skipped_bad_file"] += 1


def _parquet_batches(path: File, column: str) -> Iterator[Batch]:
    """A row group at a time, in batches that are small where its rows are large.

    By pyarrow and not by `datasets`, which decodes all texts of a row group at once.
    """
    import pyarrow.parquet

    # Without a buffer pyarrow would read a row group's whole column at once.
    how = {"buffer_size": PIECE, "pre_buffer": False, "page_checksum_verification": True}
    with opened(path) as source, pyarrow.parquet.ParquetFile(source, **how) as file:
        schema = file.schema_arrow
        metadata = file.metadata
        columns = columns_of(schema.names, column)
        if not columns or (columns == (column,) and not _has_text(schema, column)):
            if not columns or metadata.num_rows:
                yield Batch(schema, metadata.num_rows, None)
            return
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            size_of_row = group.total_byte_size // max(group.num_rows, 1)
            rows = min(max(RECORD_LIMIT // max(size_of_row, 1), 1), ROWS)
            for batch in file.iter_batches(batch_size=rows, row_groups=[number], columns=list(columns)):
                yield Batch(schema, len(batch), batch)


def _arrow_batches(path: File, column: str) -> Iterator[Batch]:
    """Arrow's stream format (what `datasets` writes) or its file format (Feather), told apart by the first bytes."""
    import pyarrow

    with opened(path) as source:
        is_file = source.read(6) == b"ARROW1"
        open_ = pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream
        source.seek(0)
        schema = open_(source).schema
        source.seek(0)
        columns = columns_of(schema.names, column)
        fields = [schema.names.index(name) for name in columns]
        reader = open_(source, options=pyarrow.ipc.IpcReadOptions(included_fields=fields))
        is_read = columns != (column,) or _has_text(schema, column)
        if not columns:
            yield Batch(schema, 0, None)
            return
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else reader
        for batch in batches:
            if len(batch):
                yield Batch(schema, len(batch), batch if is_read else None)


def _text_type(kind: Any) -> Any:
    """The type of a column's values, also where they are stored in a dictionary."""
    import pyarrow

    return kind.value_type if pyarrow.types.is_dictionary(kind) else kind


def _has_text(schema: Any, column: str) -> bool:
    """Whether there is exactly one column of that name, and it holds text."""
    import pyarrow

    kinds = [_text_type(field.type) for field in schema if field.name == column]
    return len(kinds) == 1 and kinds[0] in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view())


def _values(column: Any) -> Iterator[Any]:
    """The UTF-8 of each value of a text column, as buffers, one at a time: many rows may share one long value.

    As bytes, because Arrow checks the UTF-8 of all rows or none, and one bad row must not hide the others. The offsets
    of a file are not checked when it is opened: validate() refuses those that point outside of its buffers.
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


def _parts(spec: str) -> tuple[str, str | None, str]:
    """The repository, configuration and split of hf:ID[:CONFIG[:SPLIT]]."""
    identity, config, split = [*spec.removeprefix("hf:").split(":"), "", ""][:3]
    if not identity or spec.count(":") > 3:
        raise UserError(f"{spec}: not of the form hf:ID[:CONFIG[:SPLIT]]. Write it like hf:ORG/NAME:en:train.")
    return identity, config or None, split or "train"


@cache
def _commit_of(identity: str) -> str:
    """The hub is asked once: all that a process reads of a repository is of one commit."""
    from huggingface_hub import HfApi

    commit = HfApi().dataset_info(identity).sha
    if commit is None:
        raise ValueError("the hub names no commit")
    return commit


def hub_commit(spec: str) -> str:
    """The commit that the repository of hf:ID was at when this process first asked. UserError where the hub cannot be asked."""
    identity, _, _ = _parts(spec)
    try:
        return _commit_of(identity)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{spec}: its commit cannot be looked up on the Hugging Face hub ({reason}). Check the name, the network and "
            f"HF_HUB_OFFLINE, or download it (hf download --repo-type dataset {identity} --local-dir DIR) and pass DIR."
        ) from error


def _hub_rows(spec: str, column: str) -> Rows:
    """The rows at the repository's commit; `datasets` holds as much of a file as it reads at once."""
    identity, config, split = _parts(spec)
    commit = hub_commit(spec)
    number = 0
    try:
        import datasets

        load = partial(datasets.load_dataset, identity, config, split=split, streaming=True, revision=commit)
        rows = load()
        columns = list(columns_of(rows.column_names or (), column))
        if columns:
            if rows.info.builder_name == "parquet":  # then the other columns are not even fetched
                rows = load(columns=columns, batch_size=ROWS)
            rows = rows.select_columns(columns)
        for row in rows:
            number += 1
            yield f"hf:{identity}:{number}", row
    except Exception as error:  # the library and the network raise dozens of types without a common base
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{spec}: cannot be read after row {number} ({reason}). Check the configuration, the split and the network, or "
            f"download it (hf download --repo-type dataset {identity} --local-dir DIR) and pass the files."
        ) from error
