"""Compressed and remote files, and the hub: the same documents as from a plain local file, or an error that names the file."""

import bz2
import gzip
import json
import lzma
import random
import subprocess
import sys

import fsspec
import launch
import pyarrow
import pyarrow.parquet
import pytest

from forge_common.data import sources
from forge_common.data.readers.document import PIECE, Reading
from forge_common.data.store import prepare
from forge_common.data.tokenizer import byte_tokenizer
from forge_common.errors import UserError

TEXTS = [f"text {i} é 三つ " + "word " * (i % 40) for i in range(400)]


def zstd(data: bytes) -> bytes:
    """One frame with a checksum of its content, as the zstd command writes it. (pyarrow writes none.)"""
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


COMPRESS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}
ROWS = {
    "jsonl": "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode(),
    "json": json.dumps([{"text": text} for text in TEXTS]).encode(),
    "csv": ("text\n" + "".join(f'"{text}"\n' for text in TEXTS)).encode(),
    "txt": "|".join(TEXTS).encode(),
}
READING = Reading(document_separator="|")


def read(spec, reading=READING):
    return [(document.origin, "".join(document.pieces)) for document in sources.read(str(spec), reading)]


def refused(spec, *parts):
    with pytest.raises(UserError) as caught:
        read(spec)
    assert all(str(part) in str(caught.value) for part in parts), caught.value


@pytest.fixture
def memory():
    """fsspec's file system in memory, empty: remote files without a network."""
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", ROWS)
def test_a_compressed_file_gives_the_documents_and_origins_of_the_plain_one(tmp_path, suffix, compression):
    plain, packed = tmp_path / f"a.{suffix}", tmp_path / f"a.{suffix}.{compression}"
    plain.write_bytes(ROWS[suffix])
    packed.write_bytes(COMPRESS[compression](ROWS[suffix]))
    expected = read(plain)
    assert [text for _, text in expected] == TEXTS
    assert read(packed) == [(origin.replace(str(plain), str(packed)), text) for origin, text in expected]
    plain.unlink()
    assert read(tmp_path) == read(tmp_path / "*.*") == read(packed)


@pytest.mark.parametrize("compression", COMPRESS)
def test_several_streams_in_one_file_are_all_read(tmp_path, compression):
    """As pbzip2, pigz and `cat a.zst b.zst` write them."""
    compress, data = COMPRESS[compression], ROWS["jsonl"]
    path = tmp_path / f"a.jsonl.{compression}"
    half = len(data) // 2
    path.write_bytes(compress(data[:half]) + compress(data[half:]))
    assert [text for _, text in read(path)] == TEXTS


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", ROWS)
def test_a_compressed_file_that_is_cut_off_is_never_read_as_a_shorter_one(tmp_path, suffix, compression):
    path = tmp_path / f"a.{suffix}.{compression}"
    compress, data = COMPRESS[compression], ROWS[suffix]
    half = len(data) // 2
    whole = compress(data[:half]) + compress(data[half:])
    first = len(compress(data[:half]))
    generator = random.Random(0)
    cuts = {1, 5, 12, len(whole) - 1, len(whole) - 4, first + 1, first + 3, first + 8}
    for cut in cuts | {generator.randrange(1, len(whole)) for _ in range(10)} - {first}:
        path.write_bytes(whole[:cut])
        for policy in ("refuse", "skip"):
            with pytest.raises(UserError, match="copy it again") as caught:
                read(path, Reading(document_separator="|", on_bad_text=policy, on_bad_line=policy))
            assert str(path) in str(caught.value)


@pytest.mark.parametrize("compression", ["gz", "bz2", "xz"])
def test_a_flipped_bit_in_a_compressed_file_is_refused(tmp_path, compression):
    """Anywhere, in the first stream or the second one: these formats check the content."""
    path, compress, data = tmp_path / f"a.txt.{compression}", COMPRESS[compression], ROWS["txt"]
    half = len(data) // 2
    whole = compress(data[:half]) + compress(data[half:])
    first = len(compress(data[:half]))
    generator = random.Random(1)
    for at in [0, first, first + 2, *(generator.randrange(len(whole)) for _ in range(40))]:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            assert [text for _, text in read(path)] == TEXTS  # a time or a name in gzip's header
        except UserError as error:
            assert str(path) in str(error)


def test_what_follows_a_compressed_stream_is_not_ignored(tmp_path):
    for compression, compress in COMPRESS.items():
        path = tmp_path / f"a.jsonl.{compression}"
        path.write_bytes(compress(ROWS["jsonl"]) + b"something else")
        refused(path, path, "damaged")


def test_faults_in_a_compressed_file_are_named_by_their_line(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n{"text": 3}\n'))
    refused(path, f"{path}:2")
    path = tmp_path / "a.txt.xz"
    path.write_bytes(lzma.compress(b"one\ntw\xffo\n"))
    refused(path, f"{path}:2:3")


def test_a_long_compressed_text_can_be_read_again_and_its_copy_is_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "temporary").mkdir()
    text = "a line of text\n" * (3 * PIECE // 15)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    documents = list(sources.read(str(tmp_path / "a.txt.gz"), Reading()))
    for _ in range(2):
        assert "".join(documents[0].pieces) == text
    assert len(list((tmp_path / "temporary").iterdir())) == 1
    del documents
    assert not list((tmp_path / "temporary").iterdir())


def test_archives_and_compressed_tables_are_refused_with_what_to_do(tmp_path):
    for name in ("a.zip", "a.tar", "a.tgz", "a.tar.gz", "a.7z"):
        (tmp_path / name).write_bytes(b"content")
        refused(tmp_path / name, name, "Unpack it")
    (tmp_path / "a.parquet.gz").write_bytes(b"content")
    refused(tmp_path / "a.parquet.gz", "a.parquet.gz", "Decompress it")
    (tmp_path / "a.txt").write_text("text")
    assert [text for _, text in read(tmp_path)] == ["text"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.jsonl.zst", "a.txt.gz"])
def test_a_remote_file_gives_the_documents_of_a_local_one(tmp_path, memory, name):
    data = ROWS[name.split(".")[1]]
    data = COMPRESS[name.split(".")[2]](data) if name.count(".") == 2 else data
    memory.pipe(f"/corpus/{name}", data)
    (tmp_path / name).write_bytes(data)
    url = f"memory://corpus/{name}"
    assert read(url) == [(origin.replace(str(tmp_path / name), url), text) for origin, text in read(tmp_path / name)]


def test_a_remote_folder_glob_and_table(memory):
    table = pyarrow.table({"n": range(3), "text": ["one", "two", "three"]})
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    memory.pipe("/corpus/b.parquet", sink.getvalue().to_pybytes())
    memory.pipe("/corpus/deep/a.txt", b"text")
    memory.pipe("/corpus/.hidden/a.txt", b"no")
    memory.pipe("/corpus/weights.pt", b"no")
    found = [(f"memory:///corpus/b.parquet:row {row}", text) for row, text in enumerate(["one", "two", "three"], 1)]
    assert read("memory://corpus/*.parquet") == found
    assert read("memory://corpus") == [*found, ("memory:///corpus/deep/a.txt:1", "text")]
    refused("memory://corpus/weights.pt", "weights.pt", "not text")
    refused("memory://corpus/none.txt", "memory://corpus/none.txt", "no such file")
    refused("memory://corpus/*.csv", "memory://corpus/*.csv", "no such file")


def test_a_remote_file_that_changes_is_tokenized_again(tmp_path, memory):
    def digest():
        corpus = prepare(
            "memory://a.txt",
            byte_tokenizer(),
            Reading(),
            cache_dir=tmp_path,
            val_fraction=0.0,
            report=lambda line: None,
        )
        return corpus.train.folder, corpus.train.digest

    memory.pipe("/a.txt", b"one")
    first = digest()
    assert digest() == first
    memory.pipe("/a.txt", b"two")
    assert digest()[0] != first[0] and digest()[1] != first[1]


def test_a_missing_package_or_protocol_is_named():
    refused("nonsense://bucket/a.txt", "nonsense://bucket/a.txt", "s3://")
    code = (
        "import sys; sys.modules['s3fs'] = None\n"  # as where it is not installed
        "from forge_common.data import sources\nfrom forge_common.errors import UserError\n"
        "try: sources.facts('s3://bucket/a.txt')\nexcept UserError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=launch.ROOT)
    assert "s3://bucket/a.txt" in run.stdout and "s3fs" in run.stdout and "pip" in run.stdout


# ---- The hub, played by a server on this machine ----
