"""Binary tables: .parquet and .arrow files (only the text column is read), and data sets on the Hugging Face hub."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError
from .document import Document, Reading, from_rows

ROWS = 256  # rows decoded at once

Rows = Iterator[tuple[str, dict[str, Any]]]


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
        for names, values in batches(path, column):
            if column not in names:
                yield f"{path}:row 1", dict.fromkeys(names)
                return
            for value in _values(values):
                number += 1
                yield f"{path}:row {number}", {column: value}
    except (pyarrow.ArrowException, OSError) as error:
        message = f"{path}: broken or cut off after row {number}: {str(error).splitlines()[0]}"
        if reading.on_bad_line == "refuse":
            raise UserError(f"{message}; write the file anew, or pass --on-bad-line skip") from error
        counts["skipped_bad_file"] += 1


def _parquet_batches(path: Path, column: str) -> Iterator[tuple[list[str], Any]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if column not in names:
            yield names, None
            return
        for batch in file.iter_batches(batch_size=ROWS, columns=[column]):
            yield names, batch.column(0)


def _arrow_batches(path: Path, column: str) -> Iterator[tuple[list[str], Any]]:
    """Arrow's stream format (what `datasets` writes) or its file format (Feather), told apart by the first bytes."""
    import pyarrow

    with pyarrow.OSFile(str(path)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        reader = pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source)
        names = reader.schema.names
        if column not in names:
            yield names, None
            return
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else reader
        for batch in batches:
            values = batch.column(names.index(column))
            for start in range(0, len(values), ROWS):
                yield names, values.slice(start, ROWS)


def _values(column: Any) -> list[Any]:
    """A column's values. Text goes through bytes: Arrow does not check UTF-8, and a bad row must not hide others."""
    import pyarrow

    kind = column.type
    if pyarrow.types.is_dictionary(kind):
        column, kind = column.dictionary_decode(), kind.value_type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        return column.to_pylist()
    values = column.cast(pyarrow.large_binary()).to_pylist()
    return [None if value is None else value.decode("utf-8", "surrogateescape") for value in values]


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
