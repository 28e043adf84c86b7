"""Fuzzing the readers: valid files are read exactly; a damaged one is an error that names it, or what is left out is counted.

FORGE_FUZZ=20 multiplies the examples. The expected texts come from strict parsers that read a whole file at once.
"""

import csv
import hashlib
import io
import json
import re
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from conftest import FUZZ
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forge_common.data import sources
from forge_common.data.readers.document import Reading
from forge_common.data.store import prepare
from forge_common.data.tokenizer import byte_tokenizer
from forge_common.errors import UserError

FIX = re.compile(r"[.?] (Write|Check|Fix|Name|Rename|Start again)\b.*\.$")
FORMATS = ("txt", "jsonl", "json", "csv", "parquet", "arrow")
ROWS = ("jsonl", "json", "csv", "parquet", "arrow")
SKIPPED = ("skipped_empty", "skipped_bad_text", "skipped_bad_line", "skipped_bad_file")

# Characters that some readers take for the end of a line or a cell, for a mark, or drop.
DELICATE = "\r\n\t\v\f\x1c\x1e\x85\u2028\u2029\ufeff\u00a0\"',;{}[]:\\/<|>aé三🙂\x7f\ufffd\ufffe\U0010ffff"
text = st.text(
    st.sampled_from(DELICATE) | st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20
)
policies = st.fixed_dictionaries(
    {"on_bad_text": st.sampled_from(["refuse", "replace", "skip"]), "on_bad_line": st.sampled_from(["refuse", "skip"])}
)


def fuzz(examples):
    """The same examples every time, so that a failure can be repeated."""
    return settings(
        max_examples=examples * FUZZ,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


# ---- Valid files, with every option of their writers ----


def plain(draw, rows):
    """Whether to write ASCII only; half a surrogate pair can only be written so."""
    return draw(st.booleans()) or "half \ud83d" in [row["text"] for row in rows]


def lines_of_json(draw, rows):
    ascii_only, end = plain(draw, rows), draw(st.sampled_from(["\n", "\r\n", "\n\n", " \n"]))
    data = "".join(json.dumps(row, ensure_ascii=ascii_only) + end for row in rows)
    return (data if draw(st.booleans()) else data.rstrip("\r\n ")).encode()


def array_of_json(draw, rows):
    ascii_only, indent = plain(draw, rows), draw(st.sampled_from([None, 0, 2]))
    if draw(st.booleans()):
        return json.dumps(rows, ensure_ascii=ascii_only, indent=indent).encode()
    between = draw(st.sampled_from(["", "\n", " \r\n"]))
    return between.join(json.dumps(row, ensure_ascii=ascii_only, indent=indent) for row in rows).encode()


def cells(draw, rows):
    file = io.StringIO(newline="")
    # With "\n" alone Python's writer would leave a carriage return unquoted, which its reader then refuses.
    options = [
        (csv.QUOTE_ALL, "\n"),
        (csv.QUOTE_NONNUMERIC, "\n"),
        (csv.QUOTE_ALL, "\r\n"),
        (csv.QUOTE_MINIMAL, "\r\n"),
    ]
    quoting, end = draw(st.sampled_from(options))
    writer = csv.writer(file, quoting=quoting, lineterminator=end)
    writer.writerow(rows[0])
    writer.writerows(row.values() for row in rows)
    return file.getvalue().encode()


def column(draw, values):
    kind = draw(st.sampled_from([pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()]))
    array = pyarrow.array(values, kind)
    return array.dictionary_encode() if kind != pyarrow.string_view() and draw(st.booleans()) else array


def parquet(draw, rows):
    table = pyarrow.table({"id": range(len(rows)), "text": column(draw, [row["text"] for row in rows])})
    file = io.BytesIO()
    pyarrow.parquet.write_table(
        table,
        file,
        row_group_size=draw(st.integers(1, 5)),
        compression=draw(st.sampled_from(["none", "snappy", "zstd", "gzip", "lz4", "brotli"])),
        use_dictionary=draw(st.booleans()),
        data_page_version=draw(st.sampled_from(["1.0", "2.0"])),
        data_page_size=draw(st.sampled_from([None, 1])),
        write_batch_size=1,
        write_page_checksum=draw(st.booleans()),
    )
    return file.getvalue()


def arrow(draw, rows):
    table = pyarrow.table({"id": range(len(rows)), "text": column(draw, [row["text"] for row in rows])})
    options = pyarrow.ipc.IpcWriteOptions(compression=draw(st.sampled_from([None, "lz4", "zstd"])))
    start = draw(st.sampled_from([pyarrow.ipc.new_stream, pyarrow.ipc.new_file]))
    file = io.BytesIO()
    with start(file, table.schema, options=options) as writer:
        for batch in table.to_batches(max_chunksize=draw(st.integers(1, 5))):
            writer.write_batch(batch)
    return file.getvalue()


WRITERS = {"jsonl": lines_of_json, "json": array_of_json, "csv": cells, "parquet": parquet, "arrow": arrow}


@st.composite
def valid(draw, suffix, values=text):
    """(bytes of a valid file, the texts of its rows); a .csv or a table always has a row."""
    found = draw(st.lists(values, min_size=1, max_size=8))
    if suffix == "txt":
        return found[0].encode(), found[:1]
    rows = [{"id": str(i), "text": value, "more": "x"} for i, value in enumerate(found)]
    return WRITERS[suffix](draw, rows), found


@st.composite
def edited(draw, suffix):
    """A valid file after one to four bit flips, cuts, insertions, deletions and doublings."""
    data = bytearray(draw(valid(suffix))[0])
    for _ in range(draw(st.integers(1, 4))):
        at, end = sorted(draw(st.tuples(*[st.integers(0, len(data))] * 2)))
        edit = draw(st.sampled_from(["flip", "flip", "cut off", "insert", "delete", "double"]))
        if edit == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif edit == "cut off":
            del data[end:]
        elif edit == "insert":
            data[at:at] = draw(
                st.binary(max_size=6) | st.sampled_from([b"\xff", b"\0", b"\n", b"\\ud800", b'"', b"1e999"])
            )
        elif edit == "delete":
            del data[at : min(end, at + 40)]
        else:
            data[at:at] = data[at:end]
    return bytes(data)


# ---- The texts of a file, read at once by the strict parser of its format ----


class Damaged(Exception):
    """The file's bytes are not what its format allows, or a row holds no text."""


def unique(pairs):
    if sum(name == "text" for name, _ in pairs) > 1:
        raise ValueError("two texts")
    return dict(pairs)


def json_values(data):
    decoder, found = json.JSONDecoder(object_pairs_hook=unique), []
    whole = data.decode("utf-8-sig").strip(" \t\r\n")
    if whole.startswith("["):
        return decoder.decode(whole)
    while whole:
        row, end = decoder.raw_decode(whole)
        found.append(row)
        whole = whole[end:].lstrip(" \t\r\n")
    return found


def jsonl_values(data):
    decoder = json.JSONDecoder(object_pairs_hook=unique)
    lines = [line.strip(" \t\r") for line in data.decode("utf-8-sig").split("\n")]
    return [decoder.decode(line) for line in lines if line]


def csv_values(data):
    lines = io.StringIO(data.decode("utf-8-sig"), newline="\n")  # a lone carriage return ends no row
    rows = [row for row in csv.reader(lines, strict=True) if row]
    if rows and (len(set(rows[0])) < len(rows[0]) or "text" not in rows[0]):
        raise ValueError("two columns of one name, or none of that name")
    return [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]


def table_values(table):
    table.validate(full=True)
    if table.schema.names.count("text") != 1 or not table.schema.field("text").type.equals(pyarrow.string()):
        kind = table.schema.field("text").type if table.schema.names.count("text") == 1 else None
        if kind not in (pyarrow.large_string(), pyarrow.string_view()) and not pyarrow.types.is_dictionary(kind):
            raise ValueError("no column of text")
    return [{"text": value} for value in table.column("text").to_pylist()]


def parquet_values(data):
    file = pyarrow.parquet.ParquetFile(io.BytesIO(data), page_checksum_verification=True)
    return table_values(file.read(columns=["text"]))


def arrow_values(data):
    opened = pyarrow.ipc.open_file if data.startswith(b"ARROW1") else pyarrow.ipc.open_stream
    text_alone = [opened(io.BytesIO(data)).schema.names.index("text")]
    options = pyarrow.ipc.IpcReadOptions(included_fields=text_alone)
    return table_values(opened(io.BytesIO(data), options=options).read_all())


VALUES = {
    "jsonl": jsonl_values,
    "json": json_values,
    "csv": csv_values,
    "parquet": parquet_values,
    "arrow": arrow_values,
}


def expected_texts(data, suffix):
    """The texts in the bytes. Damaged if a strict reader would stop, or a row holds no text."""
    try:
        rows = [{"text": data.decode("utf-8-sig")}] if suffix == "txt" else VALUES[suffix](data)
        found = [row["text"] for row in rows]
        if "\0" in "".join(found).encode().decode():  # encode: half a surrogate pair is no text
            raise Damaged("NUL")
        return found
    except (ValueError, TypeError, KeyError, AttributeError, LookupError, OSError, csv.Error, RecursionError) as error:
        raise Damaged(str(error)) from error
    except pyarrow.ArrowException as error:
        raise Damaged(str(error)) from error


# ---- Properties ----


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def check(message, path):
    """An error names the file and how to fix it, and can be printed."""
    assert str(path) in message and FIX.search(message), message
    message.encode()


def read(path, counts=None, **how) -> list[str]:
    """The texts of a file, after checks of each document: digest, origin, the same pieces twice."""
    found = []
    for document in sources.read(str(path), Reading(**how), counts):
        value = "".join(document.pieces)
        assert value == "".join(document.pieces) and value.strip()
        assert document.digest == hashlib.sha256(value.encode()).digest()
        assert document.origin.startswith(str(path)) and "\0" not in value
        found.append(value)
    return found


def outcome(path, **how):
    """(texts, counts, None), or (None, counts, the error message)."""
    counts = Counter()
    try:
        return read(path, counts, **how), counts, None
    except UserError as error:
        check(str(error), path)
        return None, counts, str(error)


def put(place, suffix, data) -> Path:
    path = place / f"a.{suffix}"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_valid_file_comes_back_exactly(place, suffix):
    @fuzz(60)
    @given(valid(suffix), policies)
    def holds(file, how):
        data, wanted = file
        if suffix == "txt":
            wanted = [wanted[0].removeprefix("\ufeff")]
        found, counts, refusal = outcome(put(place, suffix, data), **how)
        if not data:
            assert "empty" in refusal
            return
        assert refusal is None
        assert found == [value for value in wanted if value.strip()]
        assert +counts == ({"skipped_empty": len(wanted) - len(found)} if len(wanted) > len(found) else {})

    holds()


@pytest.mark.parametrize("suffix", ROWS)
def test_every_row_is_yielded_or_counted(place, suffix):
    """Rows with null, numbers and bad text among them: yielded + counted = rows, under every policy."""
    bad = st.sampled_from([None, "", " ", "nul \0", "fine"])
    if suffix in ("json", "jsonl"):
        bad |= st.sampled_from([3, 2.5, True, ["a"], {"text": "b"}, "half \ud83d", float("inf")])
    if suffix == "csv":
        bad = bad.filter(lambda value: value is not None)

    @fuzz(40)
    @given(valid(suffix, text | bad), policies)
    def holds(file, how):
        data, values = file
        found, counts, refusal = outcome(put(place, suffix, data), **how)
        strings = [value for value in values if isinstance(value, str)]
        clean = [value for value in strings if not re.search("[\0\ud800-\udfff]", value)]
        bad_line = len(strings) < len(values) and how["on_bad_line"] == "refuse"
        if bad_line or (len(clean) < len(strings) and how["on_bad_text"] == "refuse"):
            assert refusal
        else:
            kept = strings if how["on_bad_text"] == "replace" else clean
            replaced = [re.sub("[\0\ud800-\udfff]", "\ufffd", value) for value in kept]
            assert found == [value for value in replaced if value.strip()]
            assert len(found) + sum(counts[name] for name in SKIPPED) == len(values)
            assert counts["skipped_bad_line"] == len(values) - len(strings)
            bad_texts = counts["skipped_bad_text"] + counts["replaced_bad_text"]
            assert bad_texts == len(strings) - len(clean)

    holds()


def never_silent(path, data, suffix, how):
    """Check what must hold for any bytes in a file."""
    try:
        wanted = [value for value in expected_texts(data, suffix) if value.strip()]
    except Damaged:
        wanted = None
    found, _, refusal = outcome(path)
    # The headers of a table hold more than is needed to read it: damage there may be an error too.
    may_refuse = not data or suffix in ("parquet", "arrow")
    assert found == wanted or (may_refuse and refusal), (wanted, found, refusal)
    lenient, counts, refusal = outcome(path, **how)
    if wanted is not None and found is not None:
        assert lenient == wanted and sum(counts.values()) == counts["skipped_empty"]
    elif refusal is None and sum(counts.values()) == counts["skipped_empty"]:
        # Nothing else was left out: the bytes that are not UTF-8 are outside of the texts.
        repaired = re.sub("[\udc80-\udcff]", "\ufffd", data.decode("utf-8-sig", "surrogateescape"))
        assert lenient == [value for value in expected_texts(repaired.encode(), suffix) if value.strip()]
    elif refusal is not None:
        assert how["on_bad_text"] == "refuse" or how["on_bad_line"] == "refuse" or FATAL.search(refusal), refusal


FATAL = re.compile("no column|same name|file is empty")  # errors under every policy


@pytest.mark.parametrize("suffix", FORMATS)
def test_random_bytes_are_read_or_refused_never_silently_cut(place, suffix):
    start = st.sampled_from(
        [b"", b"\xef\xbb\xbf", b'{"text": "a"}\n', b'[{"text": "', b"id,text\n", b"PAR1", b"ARROW1\0\0"]
    )

    @fuzz(60)
    @given(start, st.binary(max_size=200), policies)
    def holds(head, tail, how):
        never_silent(put(place, suffix, head + tail), head + tail, suffix, how)

    holds()


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_damaged_file_is_read_or_refused_never_silently_cut(place, suffix):
    @fuzz(150)
    @given(edited(suffix), policies)
    def holds(data, how):
        never_silent(put(place, suffix, data), data, suffix, how)

    holds()


@fuzz(60)
@given(st.lists(st.binary(max_size=12), max_size=6), st.sampled_from(["\n\n", "|", "<SEP>", "aab"]), policies)
def test_separated_documents_add_up(place, parts, separator, how):
    path = put(place, "txt", separator.encode().join(parts))
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    spans = data.split(separator.encode())
    spans = spans[:-1] if not spans[-1] else spans
    found, counts, refusal = outcome(path, document_separator=separator, **how)
    if refusal:
        assert how["on_bad_text"] == "refuse" or not path.stat().st_size
    else:
        assert len(found) + sum(counts[name] for name in SKIPPED) == len(spans)


@fuzz(40)
@given(st.lists(text, min_size=1), st.sampled_from(ROWS), st.sampled_from(["texts", "Text", "", "id", "\udcff", "a.b"]))
def test_any_column_name(place, values, suffix, wanted):
    path = place / f"columns.{suffix}"
    if suffix == "csv":
        path.write_text("text,n\na,1\n")
    elif suffix in ("json", "jsonl"):
        path.write_text(json.dumps({"text": values[0], "n": 1}))
    else:
        table = pyarrow.table({"text": values, "n": range(len(values))})
        if suffix == "parquet":
            pyarrow.parquet.write_table(table, path)
        else:
            with pyarrow.ipc.new_file(str(path), table.schema) as file:
                file.write_table(table)
    with pytest.raises(UserError, match="text, n"):
        read(path, text_column=wanted, on_bad_line="skip")


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_cache_is_complete_or_absent(place, suffix, tmp_path):
    tokenizer = byte_tokenizer()

    @fuzz(25)
    @given(edited(suffix) | valid(suffix).map(lambda file: file[0]), policies)
    def holds(data, how):
        path, cache = put(place, suffix, data), tmp_path / "cache"
        before = set(cache.glob("*"))
        try:
            corpus = prepare(
                str(path),
                tokenizer,
                Reading(**how),
                cache_dir=cache,
                val_fraction=0.3,
                report=lambda line: line.encode(),
            )
        except UserError as error:
            check(str(error), path)
            assert set(cache.glob("*")) == before
            return
        found = read(path, **how)
        splits = (corpus.train, corpus.validation)
        assert sum(split.documents for split in splits) == len(found)
        assert sum(split.bytes for split in splits) == sum(len(value.encode()) for value in found)
        assert sum(len(split.tokens) for split in splits) == sum(len(value.encode()) + 1 for value in found)
        assert set(cache.glob("*")) - before <= {corpus.train.folder}
        assert not list(cache.glob(".*"))

    holds()
