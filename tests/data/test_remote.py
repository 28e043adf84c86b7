"""Compressed and remote files, and the hub: the same documents as from a plain local file, or an error that names the file."""

import bz2
import gzip
import json
import lzma
import random
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

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

OLD, NEW = "1" * 40, "2" * 40  # commits


def parquet(texts):
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "more": ["x" * 1000] * len(texts)}), sink)
    return sink.getvalue().to_pybytes()


FILES = {
    OLD: {"train.jsonl": b'{"text": "old one", "n": 1}\n{"text": "old two", "n": 2}\n'},
    NEW: {"train.jsonl": b'{"text": "new", "n": 1}\n'},
}
TABLES = {OLD: {"train.parquet": parquet(["old one", "old two"])}, NEW: {"train.parquet": parquet(["new"])}}


class Hub(ThreadingHTTPServer):
    """The endpoints of the Hugging Face hub that reading one data set asks for: its commit, its tree and its files."""

    def __init__(self, commits):
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.commits, self.head = commits, OLD
        self.moves_to = None  # the commit that `head` becomes once it has been asked for
        self.asked = 0  # how often `head` was asked for
        self.commits_read = set()


class HubRequest(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, (_, *parts) = self.server, self.path.split("?")[0].split("/")
        match parts:
            case ["api", "datasets", "org", "tiny"]:
                self.answer_json(self.dataset_info(hub.head))
                hub.head, hub.moves_to = hub.moves_to or hub.head, None
                hub.asked += 1
            case ["api", "datasets", "org", "tiny", "revision", commit]:
                self.answer_json(self.dataset_info(commit))
            case ["api", "datasets", "org", "tiny", "tree", commit]:
                files = hub.commits[commit].items()
                self.answer_json(
                    [{"type": "file", "path": name, "size": len(data), "oid": name} for name, data in files]
                )
            case ["datasets", "org", "tiny", "resolve", commit, name] if name in hub.commits[commit]:
                hub.commits_read.add(commit)
                self.answer_file(commit, hub.commits[commit][name])
            case _:
                self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def dataset_info(self, commit):
        return {
            "id": "org/tiny",
            "sha": commit,
            "siblings": [{"rfilename": name} for name in self.server.commits[commit]],
        }

    def answer_json(self, content):
        self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def answer_file(self, commit, data):
        headers = {"ETag": f'"{commit}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return self.answer(200, data, headers)
        first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
        self.answer(206, data[first : last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"})

    def answer(self, status, data, headers):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


PREPARE = """
import sys
from pathlib import Path
from forge_common.data.readers.document import Reading
from forge_common.data.store import prepare
from forge_common.data.tokenizer import byte_tokenizer
from forge_common.errors import UserError
tokenizer = byte_tokenizer()
try:
    corpus = prepare(sys.argv[1], tokenizer, Reading(), cache_dir=Path(sys.argv[2]), val_fraction=0.0, report=lambda _: None)
    print("ORIGINS", *corpus.train.origins(0, 9))
    print("TEXT", tokenizer.decode(corpus.train.tokens.tolist()))
    print("FOLDER", corpus.train.folder.name)
except UserError as error:
    print("REFUSED", error)
"""


@pytest.fixture
def hub(tmp_path):
    """hub(commits) starts a server; its `prepare` tokenizes a source in a process whose hub it is."""
    servers = []

    def start(commits):
        server = Hub(commits)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def run(spec, **environment):
            environment = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"} | environment
            environment |= {"HF_HOME": str(tmp_path / "hub"), "HF_TOKEN": ""}
            done = subprocess.run(
                [sys.executable, "-c", PREPARE, spec, tmp_path / "cache"],
                capture_output=True,
                text=True,
                cwd=launch.ROOT,
                env=launch.environment(**environment),
                timeout=120,
                check=False,
            )
            assert done.returncode == 0, done.stderr[-2000:]
            lines = (line.partition(" ") for line in done.stdout.splitlines())
            return {name: value for name, _, value in lines}

        return server, run

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("commits", [pytest.param(FILES, marks=pytest.mark.soak), TABLES], ids=["jsonl", "parquet"])
def test_a_new_commit_on_the_hub_is_a_new_fingerprint_and_a_new_text(hub, commits):
    server, prepared = hub(commits)
    old = prepared("hf:org/tiny")
    assert old["ORIGINS"].split() == ["hf:org/tiny:1", "hf:org/tiny:2"]
    assert old["TEXT"] == "old oneold two" and server.commits_read == {OLD}
    server.head = NEW
    new = prepared("hf:org/tiny")
    assert new["TEXT"] == "new" and new["FOLDER"] != old["FOLDER"] and server.commits_read == {OLD, NEW}
    server.head = OLD
    server.commits_read.clear()
    assert prepared("hf:org/tiny") == old and not server.commits_read  # from the cache
    assert server.asked == 3, "each of the three starts asks once"


def test_of_a_hub_data_set_that_moves_on_while_it_is_read_one_commit_is_read(hub):
    """The one that it was at when its commit was asked for."""
    server, prepared = hub(FILES)
    server.moves_to = NEW
    assert prepared("hf:org/tiny")["TEXT"] == "old oneold two" and server.commits_read == {OLD}
    assert prepared("hf:org/tiny")["TEXT"] == "new" and server.asked == 2


def test_faults_on_the_hub_say_what_to_do(hub):
    _, prepared = hub(FILES)
    for spec in ("hf:org/none", "hf:org/tiny::nosplit", "hf:org/tiny:noconfig"):
        message = prepared(spec)["REFUSED"]
        assert message.startswith(f"{spec}: ") and "hf download --repo-type dataset" in message
    prepared("hf:org/tiny")
    message = prepared("hf:org/tiny", HF_HUB_OFFLINE="1")["REFUSED"]  # although its tokens are in the cache
    assert "HF_HUB_OFFLINE" in message and "hf download --repo-type dataset org/tiny" in message
