"""Sources: what is read is exactly what is there, in bounded memory, and every fault names its file, its row and how to fix it."""

import csv
import hashlib
import itertools
import json
import shutil
import subprocess
import sys
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest

from forge_common.data import local, sources
from forge_common.data.readers import records
from forge_common.data.readers.document import PIECE, Reading
from forge_common.errors import UserError

TEXTS = ["one\ntwo\n", "  zwei — Übung\r\n", "三つ 🙂", 'quotes " and, commas\n\nand lines', "NA", "007", "\\u0041 \\n"]


def read(spec, counts=None, **settings):
    """[(origin, text)] of a source."""
    documents = sources.read(str(spec), Reading(**settings), counts)
    return [(document.origin, "".join(document.pieces)) for document in documents]


def texts(spec, **settings):
    return [text for _, text in read(spec, **settings)]


def refused(spec, *parts, **settings):
    """Reading raises a UserError that holds all of `parts`."""
    with pytest.raises(UserError) as caught:
        read(spec, **settings)
    message = str(caught.value)
    assert all(str(part) in message for part in parts), message


def write_jsonl(path):
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)))


def write_json(path):
    path.write_text(json.dumps([{"id": i, "text": text} for i, text in enumerate(TEXTS)], indent=1))


def write_csv(path):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "text"], *enumerate(TEXTS)])


def write_parquet(path):
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(TEXTS)), "text": TEXTS}), path, row_group_size=3)


def write_arrow_stream(path):
    table = pyarrow.table({"id": range(len(TEXTS)), "text": TEXTS})
    with pyarrow.ipc.new_stream(str(path), table.schema) as stream:
        stream.write_table(table)


def write_arrow_file(path):
    table = pyarrow.table({"id": range(len(TEXTS)), "text": pyarrow.array(TEXTS).dictionary_encode()})
    with pyarrow.ipc.new_file(str(path), table.schema) as file:
        file.write_table(table)


WRITERS = [
    ("jsonl", write_jsonl),
    ("json", write_json),
    ("csv", write_csv),
    ("parquet", write_parquet),
    ("arrow", write_arrow_stream),
    ("arrow", write_arrow_file),
]


@pytest.mark.parametrize(("suffix", "write"), WRITERS, ids=lambda value: getattr(value, "__name__", value))
def test_each_format_gives_back_the_texts(tmp_path, suffix, write):
    path = tmp_path / f"a.{suffix}"
    write(path)
    found = list(sources.read(str(path), Reading()))
    assert ["".join(document.pieces) for document in found] == TEXTS
    assert [document.digest for document in found] == [hashlib.sha256(text.encode()).digest() for text in TEXTS]
    assert len({document.origin for document in found}) == len(TEXTS)
    assert all(document.origin.startswith(f"{path}:") for document in found)


@pytest.mark.parametrize(("suffix", "write"), WRITERS, ids=lambda value: getattr(value, "__name__", value))
def test_a_wrong_column_is_named_with_the_nearest(tmp_path, suffix, write):
    path = tmp_path / f"a.{suffix}"
    write(path)
    for policy in ("refuse", "skip"):  # skipping every row would be silence
        refused(path, path, "'texts'", "id, text", "did you mean 'text'", text_column="texts", on_bad_line=policy)


@pytest.mark.parametrize(("suffix", "write"), WRITERS, ids=lambda value: getattr(value, "__name__", value))
def test_a_torn_file_is_refused_or_its_rest_counted(tmp_path, suffix, write):
    whole = tmp_path / f"whole.{suffix}"
    write(whole)
    torn = tmp_path / f"torn.{suffix}"
    cut = whole.read_bytes().index(b"commas") if suffix in ("csv", "json", "jsonl") else whole.stat().st_size // 2
    torn.write_bytes(whole.read_bytes()[:cut])
    refused(torn, torn, "--on-bad-line skip")
    counts = Counter()
    kept = texts(torn, on_bad_line="skip", counts=counts)
    assert kept == TEXTS[: len(kept)]
    assert counts["skipped_bad_line"] + counts["skipped_bad_file"] == 1


def test_text_files_one_document_a_file(tmp_path):
    (tmp_path / "b.md").write_bytes(b"# B\r\n\r\nend without newline")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\n")
    (tmp_path / "code.zig").write_text("const x = 1;")  # an unknown suffix, but text
    (tmp_path / "picture").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    (tmp_path / "weights.pt").write_bytes(b"text by its content")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("no")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "c.txt").write_text("c")
    wanted = {
        "a.txt": "a\n",
        "b.md": "# B\r\n\r\nend without newline",
        "code.zig": "const x = 1;",
        "deep/er/c.txt": "c",
    }
    assert read(tmp_path) == [(str(tmp_path / name), text) for name, text in wanted.items()]
    assert texts(tmp_path / "*.md") == [wanted["b.md"]]
    assert texts(tmp_path / "**" / "c.*") == ["c"]


@pytest.mark.parametrize("separator", ["<|endoftext|>", "\n\n", "|", "aab"])
@pytest.mark.parametrize("shift", [*range(16), PIECE // 2])
def test_a_separator_is_found_wherever_blocks_end(tmp_path, separator, shift):
    path = tmp_path / "a.txt"
    parts = ["x" * (PIECE - shift), "short", "y" * 3, "é" * PIECE, "z"]
    path.write_text(separator.join(parts) + separator)
    assert texts(path, document_separator=separator) == parts


def test_origins_of_separated_documents_are_their_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("1\n2\n%%3\n%%\n%%5\n")
    counts = Counter()
    found = read(path, document_separator="%%", counts=counts)
    assert found == [(f"{path}:1", "1\n2\n"), (f"{path}:3", "3\n"), (f"{path}:5", "5\n")]
    assert +counts == {"skipped_empty": 1}


@pytest.mark.parametrize("line", ["word " * 20 + "\n", "no line end in it, ", "é🙂" * 1001])
def test_a_long_document_comes_in_pieces_that_join_to_it(tmp_path, line):
    text = line * (3 * PIECE // len(line.encode()) + 1)
    path = tmp_path / "a.txt"
    path.write_text(text)
    (document,) = sources.read(str(path), Reading())
    for _ in range(2):  # it can be read again
        pieces = list(document.pieces)
        assert "".join(pieces) == text
    assert len(pieces) > 3
    assert max(len(piece.encode()) for piece in pieces) <= PIECE
    assert all(piece.endswith("\n") for piece in pieces) == line.endswith("\n")
    assert document.digest == hashlib.sha256(text.encode()).digest()
    path.write_text(text.replace("o", "0").replace("é", "e"))
    with pytest.raises(UserError, match="changed while it was being read"):
        list(document.pieces)


def test_a_gigabyte_in_one_line_needs_little_memory(tmp_path):
    path = tmp_path / "a.txt"
    block = b"abc def " * (PIECE // 8)
    with open(path, "wb") as file:
        for _ in range(256):  # what a quarter does not need, the whole does not
            file.write(block)
    code = (
        "import sys, resource; from forge_common.data import sources\n"
        "from forge_common.data.readers.document import Reading\n"
        "base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "size = sum(len(p) for d in sources.read(sys.argv[1], Reading()) for p in d.pieces)\n"
        "print(size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)"
    )
    out = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True).stdout
    size, grown_kib = map(int, out.split())
    assert size == 256 * PIECE
    assert grown_kib < 40 * 1024


BAD_BYTES = {
    "first byte": (b"\xff", 1, 1),
    "line 3": (b"one\ntwo\nth\xc3ree\n", 3, 3),
    "nul": (b"one\nt\0wo\n", 2, 2),
    "second block": (b"x" * 99 + b"\n" + b"y" * PIECE + b"\xfe" + b"z" * PIECE, 2, PIECE + 1),
    "cut off character": ("é\n".encode() * 5 + b"\xe2\x82", 6, 1),
}


@pytest.mark.parametrize("name", BAD_BYTES)
def test_bad_bytes_are_named_replaced_or_left_out(tmp_path, name):
    data, line, byte = BAD_BYTES[name]
    path = tmp_path / "bad.txt"
    path.write_bytes(data)
    (tmp_path / "good.txt").write_text("good")
    refused(tmp_path, f"{path}:{line}:{byte}:", "--on-bad-text replace")
    counts = Counter()
    assert texts(tmp_path, on_bad_text="skip", counts=counts) == ["good"]
    assert +counts == {"skipped_bad_text": 1}
    counts = Counter()
    replaced, _ = texts(tmp_path, on_bad_text="replace", counts=counts)
    assert replaced == data.decode("utf-8", "replace").replace("\0", "\ufffd")
    assert +counts == {"replaced_bad_text": 1}


@pytest.mark.parametrize(
    ("suffix", "head", "row"),
    [
        ("jsonl", b"", b'{"text": "%s"}\n'),
        ("json", b"[", b'{"text": "%s"},\n'),
        ("csv", b"text\n", b'"%s"\n'),
    ],
)
def test_bad_bytes_in_rows(tmp_path, suffix, head, row):
    path = tmp_path / f"a.{suffix}"
    data = head + row % b"good" + row % "é\xff".encode("latin-1") + row % b"also"
    path.write_bytes(data.rstrip(b",\n") + b"]" * (suffix == "json"))
    at = data.index(b"\xe9")
    line, byte = data.count(b"\n", 0, at) + 1, at - data.rindex(b"\n", 0, at)
    refused(path, f"{path}:{line}:{byte}:", "0xe9 is not UTF-8")
    counts = Counter()
    assert texts(path, on_bad_text="skip", counts=counts) == ["good", "also"]
    assert counts["skipped_bad_text"] == 1
    assert texts(path, on_bad_text="replace") == ["good", "\ufffd\ufffd", "also"]


def test_bad_bytes_far_into_a_line_of_json(tmp_path):
    path = tmp_path / "a.json"
    head = b'[{"text": "a"},\n{"text": "' + b"x" * PIECE
    path.write_bytes(head + b'\xff"}]')
    refused(path, f"{path}:2:{len(head) - head.index(10)}:", "0xff is not UTF-8")


@pytest.mark.parametrize(
    ("suffix", "data"),
    [("txt", "a"), ("jsonl", '{"text": "a"}'), ("json", '[{"text": "a"}]'), ("csv", "text,n\na,1")],
)
def test_a_byte_order_mark_is_no_text(tmp_path, suffix, data):
    path = tmp_path / f"a.{suffix}"
    path.write_text(data, encoding="utf-8-sig")
    assert texts(path) == ["a"]


def test_text_that_utf8_cannot_hold_is_bad_text_too(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "half \\ud83d pair"}\n{"text": "nul \\u0000"}\n')
    refused(path, f"{path}:2", "--on-bad-text")
    assert texts(path, on_bad_text="skip") == ["fine"]
    assert texts(path, on_bad_text="replace") == ["fine", "half \ufffd pair", "nul \ufffd"]
    parquet = tmp_path / "a.parquet"
    broken = pyarrow.array([b"fine", b"\xff\xfe", b"too"]).cast(pyarrow.string(), safe=False)
    pyarrow.parquet.write_table(pyarrow.table({"text": broken}), parquet)
    refused(parquet, f"{parquet}:row 2", "--on-bad-text")
    assert texts(parquet, on_bad_text="skip") == ["fine", "too"]


@pytest.mark.parametrize("value", [None, 3, 2.5, True, ["a"], {"a": 1}])
@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_a_value_that_is_no_text_is_named(tmp_path, suffix, value):
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        column = ["fine", None, "too"] if value is None else [value]
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
        refused(path, f"{path}:row {2 if value is None else 1}", "'text'")
        assert texts(path, on_bad_line="skip") == (["fine", "too"] if value is None else [])
        return
    rows = [json.dumps({"text": text}) for text in ("fine", value, "too")]
    path.write_text("\n".join(rows) if suffix == "jsonl" else "[" + ",\n".join(rows) + "]")
    refused(path, f"{path}:2", "'text'", "null" if value is None else type(value).__name__)
    counts = Counter()
    assert texts(path, on_bad_line="skip", counts=counts) == ["fine", "too"]
    assert counts == {"skipped_bad_line": 1}


@pytest.mark.parametrize("broken", ['{"text": "a', "nonsense", '["text"]', '"text"', '{"text" "a"}', "[" * 100_000])
def test_a_broken_line_is_named_or_counted(tmp_path, broken):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n\n' + broken + '\n{"text": "too"}\n{"other": 1}\n')
    refused(path, f"{path}:3", "--on-bad-line skip")
    counts = Counter()
    assert texts(path, on_bad_line="skip", counts=counts) == ["fine", "too"]
    assert counts == {"skipped_bad_line": 2}


def test_a_line_longer_than_the_limit_is_named_and_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RECORD_LIMIT", 3 * PIECE)
    path = tmp_path / "a.jsonl"
    long = json.dumps({"text": "x" * 4 * PIECE})
    path.write_text('{"text": "fine"}\n' + long + '\n{"text": "too"}\n')
    refused(path, f"{path}:2", "longer than 3 MiB")
    counts = Counter()
    assert texts(path, on_bad_line="skip", counts=counts) == ["fine", "too"]
    assert counts == {"skipped_bad_line": 1}


def test_a_long_row_comes_in_pieces(tmp_path):
    text = "a line of it\n" * (3 * PIECE // 13)
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": text}, {"text": "next"}]))
    long, short = sources.read(str(path), Reading())
    assert "".join(long.pieces) == text
    assert len(long.pieces) > 1
    assert short.pieces == ("next",)


def test_json_objects_without_an_array_and_its_lines(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"text": "a"}\n\n{"text":\n"b"} {"text": "c"}\n')
    assert read(path) == [(f"{path}:1", "a"), (f"{path}:3", "b"), (f"{path}:4", "c")]
    path.write_text('[\n{"text": "a"},\n{"text": "b" "c"}]')
    refused(path, f"{path}:3", "broken")
    path.write_text('[{"text": "a"},\n{"text": "b"}')
    refused(path, f"{path}:2", "cut off")


@pytest.mark.parametrize(
    ("damage", "kept"),
    [
        ('[{"text": "a"}] {"text": "b"}', ["a"]),
        ('[{"text": "a"}][{"text": "b"}]', ["a"]),
        ('[{"text": "a"},,{"text": "b"}]', ["a"]),
        ('[{"text": "a"} {"text": "b"}]', ["a"]),
        ('[{"text": "a"},]', ["a"]),
        ('{"text": "a"},{"text": "b"}', ["a"]),
        ('[{"text": "a", "text": "b"}]', []),
    ],
)
def test_json_that_is_nearly_an_array_is_refused(tmp_path, damage, kept):
    """A document may be missing from such a file."""
    path = tmp_path / "a.json"
    path.write_text(damage)
    refused(path, f"{path}:1: broken or cut off JSON")
    counts = Counter()
    assert texts(path, on_bad_line="skip", counts=counts) == kept
    assert counts == {"skipped_bad_line": 1}


def test_numbers_of_any_length_and_at_any_place(tmp_path):
    row = json.dumps({"id": 1, "text": "fine"}).replace("1", "1" * 5000)
    (tmp_path / "a.jsonl").write_text(row)
    assert texts(tmp_path / "a.jsonl") == ["fine"]
    number = "7" * (PIECE + 10)  # where a block ends within it
    (tmp_path / "a.json").write_text(" " * (PIECE - 40) + "[" + row + "," + number + "," + row + "]")
    counts = Counter()
    assert texts(tmp_path / "a.json", on_bad_line="skip", counts=counts) == ["fine", "fine"]
    assert counts == {"skipped_bad_line": 1}
    (tmp_path / "a.json").write_text(" " * 3 * PIECE + "[" + row + "]")
    assert texts(tmp_path / "a.json") == ["fine"]


def test_a_text_that_is_there_twice_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "other": {"n": 1, "n": 2}}\n{"text": "a", "text": "b"}\n')
    refused(path, f"{path}:2", "'text' is there twice")
    assert texts(path, on_bad_line="skip") == ["a"]
    for suffix in ("parquet", "arrow"):
        path = tmp_path / f"a.{suffix}"
        table = pyarrow.table([["a"], ["b"]], names=["text", "text"])
        if suffix == "parquet":
            pyarrow.parquet.write_table(table, path)
        else:
            with pyarrow.ipc.new_file(str(path), table.schema) as file:
                file.write_table(table)
        refused(path, path, "two columns have the name 'text'", "Rename one")


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_column_of_numbers_is_refused_or_each_row_counted(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    table = pyarrow.table({"text": range(7)})
    if suffix == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_file(str(path), table.schema) as file:
            file.write_table(table, max_chunksize=3)
    refused(path, f"{path}:row 1: column 'text' holds values of type int64", "--on-bad-line skip")
    counts = Counter()
    assert texts(path, on_bad_line="skip", counts=counts) == []
    assert counts == {"skipped_bad_line": 7}


@pytest.mark.parametrize("places", [[0, 1 << 20, 3], [0, -5, 3], [0, 3, 1]], ids=["beyond", "before", "backwards"])
def test_an_arrow_file_with_offsets_outside_of_its_data_is_refused(tmp_path, places):
    """pyarrow does not check it by default: the text would be other memory of the process."""
    path = tmp_path / "a.arrow"
    offsets, data = pyarrow.array(places, pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"abc")
    column = pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, offsets, data])
    batch = pyarrow.record_batch({"text": column})
    with pyarrow.ipc.new_stream(str(path), batch.schema) as stream:
        stream.write_batch(batch)
    refused(path, f"{path}: broken", "--on-bad-line skip")


def test_a_flipped_bit_in_a_page_with_a_checksum_is_noticed(tmp_path):
    path = tmp_path / "a.parquet"
    how = {"write_page_checksum": True, "compression": "none", "use_dictionary": False, "write_statistics": False}
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a text to be damaged"]}), path, **how)
    path.write_bytes(path.read_bytes().replace(b"be damaged", b"be dbmaged", 1))
    refused(path, f"{path}: broken", "--on-bad-line skip")


def test_many_columns_and_odd_names_make_a_message_that_can_be_read(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("\x1b[2J,txt," + ",".join(f"c{i}" for i in range(10**5)) + "\n")
    with pytest.raises(UserError) as caught:
        read(path)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 2000
    assert "did you mean 'txt'" in message and "and 99902 more" in message


def test_csv_rows_of_another_width_and_open_quotes(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('text,n\nfine,1\n"two\nlines",2\ntoo few\nlast,3\n')
    refused(path, f"{path}:5", "1 cells", "2")
    assert read(path, on_bad_line="skip") == [(f"{path}:2", "fine"), (f"{path}:3", "two\nlines"), (f"{path}:6", "last")]
    path.write_text('text,n\nfine,1\n"never closed,2\n')
    refused(path, f"{path}:3", "broken CSV")


def test_nothing_to_read_is_refused(tmp_path):
    empty = tmp_path / "empty.txt"
    empty.touch()
    refused(empty, empty, "empty")
    refused(tmp_path / "none.txt", "none.txt", "no such file")
    refused(tmp_path / "*.nope", "*.nope", "matches nothing")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.pt").write_bytes(b"\0")
    refused(tmp_path / "folder", "folder", "no text")
    refused("", "empty")
    (tmp_path / "blank.txt").write_text(" \n\t\n")
    (tmp_path / "good.txt").write_text("good")
    counts = Counter()
    assert texts(tmp_path, counts=counts) == ["good"]
    assert +counts == {"skipped_empty_file": 1, "skipped_empty": 1}


@pytest.mark.parametrize("suffix", ["pt", "bin", "pkl", "pth", "pickle", "safetensors", "gguf", "PT"])
def test_weights_are_refused_by_name(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_text("harmless text")
    refused(path, path, "not text")
    refused(tmp_path / "*", path)


def test_settings_that_do_not_exist_are_refused(tmp_path):
    refused(tmp_path, "--on-bad-text", "refuse, replace, skip", on_bad_text="ignore")
    refused(tmp_path, "--on-bad-line", "refuse, skip", on_bad_line="replace")
    refused(tmp_path, "--document-separator", document_separator="")
    refused("local:cobol", "local:python, local:cpp, local:docs, local:perl")
    refused("hf:", "hf:ID")


def test_a_hub_data_set_that_cannot_be_reached_is_an_error_with_the_remedy(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code = (
        "from forge_common.data import sources\nfrom forge_common.data.readers.document import Reading\n"
        "from forge_common.errors import UserError\n"
        "try: next(sources.read('hf:nobody/nothing:en:test', Reading()))\nexcept UserError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=50)
    assert "hf:nobody/nothing:en:test" in run.stdout
    assert "Check the name" in run.stdout


def test_weights_of_sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sources.parse("data/*.txt@0.7") == ("data/*.txt", 0.7)
    assert sources.parse("hf:a/b:c:d@2") == ("hf:a/b:c:d", 2.0)
    assert sources.parse("user@host/x") == ("user@host/x", None)
    (tmp_path / "x@0.7").touch()
    assert sources.parse("x@0.7") == ("x@0.7", None)
    for bad in ("a@0", "a@-1", "a@1e999"):
        with pytest.raises(UserError, match="greater than 0"):
            sources.parse(bad)


def test_facts_change_with_the_files(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    before = sources.facts(str(tmp_path))
    assert sources.facts(str(tmp_path)) == before
    (tmp_path / "b.txt").write_text("b")
    assert sources.facts(str(tmp_path)) != before
    assert sources.facts("local:docs")["versions"]["python"]


@pytest.mark.soak
def test_local_corpora_are_large_disjoint_and_always_the_same():
    digests = {}
    corpora = {"python": 12e6, "cpp": 12e6, "docs": 4e6}
    if shutil.which("perl") and any(True for _ in local.documents("perl")):
        corpora["perl"] = 1e5  # a distribution may keep most of it in a package of its own
    for name, least in corpora.items():
        documents = list(sources.read(f"local:{name}", Reading()))
        found = [document.digest for document in documents]
        size = sum(len(piece) for document in documents for piece in document.pieces)
        assert least <= size <= local.CAP
        assert found == [document.digest for document in local.documents(name)]
        assert len(set(found)) == len(found)
        digests[name] = set(found)
    for one, other in itertools.combinations(digests.values(), 2):
        assert not one & other


def test_without_perl_its_corpus_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    refused("local:perl", "no perl on this machine", "another corpus")


def test_local_corpora_leave_out_copies_and_near_copies():
    body = "".join(f"def function_{letter}(argument):\n    return argument\n" for letter in "abcdefghij")
    near = "# another head\n" + body.replace("argument", "argument  ").replace("    ", "\t")
    other = "".join(f"class Thing{letter}:\n    things = 'the things of {letter}'\n" for letter in "klmnopqrst")
    parts = [[("a", body), ("other", other), ("copy", body)], [("near", near), ("tiny", "tiny")]]
    kept = [name for name, _, _ in local._distinct(parts)]
    assert sorted(kept) in (["a", "other"], ["copy", "other"])
