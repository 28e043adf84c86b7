"""Reading takes a bounded amount of memory and ends, whatever is in a file."""

import json
import os
import platform
import socket
import subprocess
import sys

import launch
import pytest

from forge_common.data import sources, writer
from forge_common.data.readers import document, records, text
from forge_common.data.readers.document import MEMORY_LIMIT, PIECE, Document, Reading
from forge_common.data.store import prepare
from forge_common.data.tokenizer import Tokenizer, byte_tokenizer
from forge_common.errors import UserError

MIB = 1 << 20
# VmHWM, not ru_maxrss: that one starts at the size of pytest, and would hide what is below it.
READ = """
import json, re, resource, sys
from collections import Counter
import pyarrow.parquet
from forge_common.data import sources
from forge_common.data.readers.document import Reading
from forge_common.errors import UserError
resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))  # protects the machine if the bound does not hold
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
base, counts, message = peak(), Counter(), None
for policy in ("refuse", "skip"):
    sizes = []
    try:
        for document in sources.read(sys.argv[1], Reading(on_bad_line=policy), counts):
            sizes.append(sum(map(len, document.pieces)))
        break
    except UserError as error:
        message = message or str(error)
print(json.dumps({"documents": len(sizes), "size": sum(sizes), "message": message, "peak": peak() - base, "counts": counts}))
"""


def measured(path):
    """The error message (None: no fault), what skipping then reads and counts, and the peak memory of both in bytes."""
    done = subprocess.run([sys.executable, "-c", READ, path], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def written(path, *parts):
    """Write a file of parts (bytes, repetitions)."""
    with open(path, "wb") as file:
        for data, times in parts:
            for _ in range(times):
                file.write(data)
    return path


LONG = pytest.mark.soak  # another format or text has the same in `make test`
BLOCK = b"abc def " * (PIECE // 8)
LINES = b"abc def\n" * (PIECE // 8)


@pytest.mark.parametrize(
    ("suffix", "parts", "message"),
    [
        ("jsonl", [(b'{"text": "', 1), (BLOCK, 300), (b'"}\n', 1)], "a.jsonl:1: the line is longer than 32 MiB"),
        ("jsonl", [(b'{"text": "fine"}\n', 1), (b"[" * PIECE, 30)], "a.jsonl:2:1: broken JSON: nested too deeply"),
        ("json", [(b'[{"text": "', 1), (BLOCK, 300), (b'"}]', 1)], "a.json:1: broken or cut off JSON: a value longer"),
        ("json", [(b"[" * PIECE, 300)], "a.json:1: broken or cut off JSON"),
        pytest.param("json", [(b'[{"text": 1', 1), (b"0" * PIECE, 300)], "a.json:1: broken or cut off JSON: a value longer", marks=LONG),
        ("csv", [(b"text\n", 1), (BLOCK, 300)], "a.csv:2: the line is longer than 32 MiB"),
        ("csv", [(b"text\nfine\n", 1), (b'"', 1), (LINES, 300)], "a.csv:3: the record is longer than 32 MiB"),
        pytest.param("csv", [(b"text\nfine\n", 1), (b'"' + LINES + b'",', 300)], "a.csv:3: the record is longer than 32 MiB", marks=LONG),
        ("csv", [(b"abc," * PIECE, 7), (b"d\n1\n", 1)], "a.csv:1: two columns have the same name"),
    ],
)  # fmt: skip
def test_a_huge_record_is_named_within_the_bound(tmp_path, suffix, parts, message):
    path = written(tmp_path / f"a.{suffix}", *parts)
    found = measured(path)
    assert message in found["message"] and found["peak"] < MEMORY_LIMIT / 2
    assert found["counts"] == ({} if "same name" in message else {"skipped_bad_line": 1})


@pytest.mark.parametrize(
    ("suffix", "parts", "documents", "size", "peak"),
    [
        ("json", [(b"[", 1), (b'{"text": "' + b"x" * 490 + b'"},\n', 200_000), (b'{"text": "x"}]', 1)], 200_001, 490 * 200_000 + 1, 64 * MIB),
        ("jsonl", [(b'{"text": "', 1), ("🙂".encode() * (PIECE // 4), 31), (b'"}\n', 1)], 1, 31 * PIECE // 4, MEMORY_LIMIT),
        # the worst that JSON can become: a list for every two bytes
        ("jsonl", [(b'{"text": "x", "more": [', 1), (b"[[[[[[[[]]]]]]]]," * (PIECE // 17), 31), (b"0]}\n", 1)], 1, 1, MEMORY_LIMIT),
        ("csv", [(b"text", 1), (b"".join(b",%x" % i for i in range(10**6)), 1), (b"\nfine" + b"," * 10**6, 3)], 3, 12, MEMORY_LIMIT),
    ],
    ids=["a long array", "wide characters", "brackets", "a million columns"],
)  # fmt: skip
def test_large_files_are_read_within_the_bound(tmp_path, suffix, parts, documents, size, peak):
    found = measured(written(tmp_path / f"a.{suffix}", *parts))
    assert (found["documents"], found["size"], found["message"]) == (documents, size, None)
    assert found["peak"] < peak


# Written by another process, so that this one stays small. `word(n)` is a value of n MiB.
WRITE = """
import sys, pyarrow, pyarrow.parquet
word = lambda size: "lorem ipsum ." * ((size << 20) // 13)
def parquet(values, **how): pyarrow.parquet.write_table(pyarrow.table({"text": values}), sys.argv[1], **how)
def arrow(values, compression, start=pyarrow.ipc.new_stream):
    batch = pyarrow.record_batch({"text": values})
    with start(sys.argv[1], batch.schema, options=pyarrow.ipc.IpcWriteOptions(compression=compression)) as file:
        file.write_batch(batch)
def same(value, rows): return pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rows, "int32"), [value])
def plain(value, rows): return pyarrow.array([value] * rows)
"""


def table(tmp_path, suffix, code):
    path = tmp_path / f"a.{suffix}"
    subprocess.run([sys.executable, "-c", f"{WRITE}\n{code}", path], check=True, timeout=120)
    return path


@pytest.mark.parametrize(
    ("suffix", "code", "message"),
    [
        ("parquet", "parquet(same(word(50), 100))", "a.parquet:row 1: the value is longer than 32 MiB"),
        pytest.param("arrow", "arrow(same(word(40), 100), 'zstd')", "a.arrow:row 1: the value is longer than 32 MiB", marks=LONG),
    ],
)  # fmt: skip
def test_a_long_value_that_many_rows_share_is_named_within_the_bound(tmp_path, suffix, code, message):
    path = table(tmp_path, suffix, code)
    found = measured(path)
    assert message in found["message"] and f"a.{suffix}" in found["message"]
    assert found["peak"] < MEMORY_LIMIT / 4


def test_a_large_row_group_is_not_decoded_at_once(tmp_path):
    """160 MB of text in one row group, of which a batch of rows is in memory at a time."""
    code = (
        "import random; random.seed(0); words = '%x' % random.getrandbits(4 * 40_000)\n"
        "parquet([words[row : row + 11_000] for row in range(16_000)], use_dictionary=False, compression='none')"
    )
    found = measured(table(tmp_path, "parquet", code))
    assert (found["documents"], found["message"]) == (16_000, None)
    assert found["size"] > 160_000_000
    assert found["peak"] < MEMORY_LIMIT / 16


@pytest.mark.parametrize(
    ("suffix", "code"),
    [
        ("parquet", "parquet(same(word(10), 60))"),
        ("parquet", "parquet(plain(word(10), 60), use_dictionary=False, write_batch_size=1, compression='none')"),
        pytest.param("arrow", "arrow(same(word(10), 60), 'lz4')", marks=LONG),
    ],
)
def test_rows_that_share_a_long_value_are_all_read(tmp_path, suffix, code):
    """600 MiB if they were decoded at once."""
    found = measured(table(tmp_path, suffix, code))
    assert (found["documents"], found["message"]) == (60, None)
    assert found["size"] == 60 * (10 * MIB // 13 * 13)
    assert found["peak"] < MEMORY_LIMIT / 8


# ---- What is not a text file, or stops being one ----

SAY = """
import os, sys
from forge_common.data import sources
from forge_common.data.readers.document import Reading
from forge_common.errors import UserError
if sys.argv[1] == "as nobody":
    os.setuid(65534)
for name in sys.argv[2:]:
    try:
        print(f"{name} -> {len(list(sources.read(name, Reading())))} documents")
    except UserError as error:
        print(f"{name} -> {error}")
"""


def answers(*names, user="same user"):
    """The result of reading each, in a process that must end within 20 s."""
    command = [sys.executable, "-c", SAY, user, *map(str, names)]
    how = {"stdin": subprocess.DEVNULL, "env": launch.environment(), "timeout": 20}
    done = subprocess.run(command, capture_output=True, text=True, check=False, **how)
    assert done.returncode == 0, done.stderr
    return dict(line.split(" -> ", 1) for line in done.stdout.splitlines())


def odd_files(folder):
    """Entries that are not regular files, under names that a reader would accept."""
    os.mkfifo(folder / "pipe.txt")
    (folder / "zero.csv").symlink_to("/dev/zero")
    (folder / "loop.jsonl").symlink_to(folder / "loop.jsonl")
    (folder / "nowhere.md").symlink_to(folder / "nothing")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(folder / "socket.json"))
    listening.close()
    return [folder / name for name in ("pipe.txt", "zero.csv", "loop.jsonl", "nowhere.md", "socket.json")]


def test_pipes_devices_sockets_and_loops_are_named_and_not_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's path may not be long
    odd = odd_files(type(tmp_path)("."))
    for name, answer in answers(*odd, "/dev/zero", "/dev/stdin", "x" * 300).items():
        assert answer.startswith(f"{name}: ") and ("Name a file" in answer or "Check the path" in answer), answer
    for one in odd:  # in a folder they are not skipped silently
        folder = tmp_path / f"with {one.name}"
        folder.mkdir()
        (folder / "a.txt").write_text("fine")
        (tmp_path / one).rename(folder / one.name)
        (answer,) = answers(folder).values()
        assert answer.startswith(f"{folder / one.name}: ")


def test_a_folder_may_have_a_files_suffix(tmp_path):
    folder = tmp_path / "data.parquet"
    folder.mkdir()
    (folder / "part.jsonl").write_text('{"text": "fine"}\n')
    assert [found.pieces for found in sources.read(str(folder), Reading())] == [("fine",)]
    assert [found.pieces for found in sources.read(str(tmp_path), Reading())] == [("fine",)]


def test_a_link_to_a_folder_is_not_skipped_silently(tmp_path):
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "more").symlink_to(tmp_path)
    with pytest.raises(UserError, match="more: a link to a folder is not followed"):
        list(sources.read(str(tmp_path), Reading()))
    (tmp_path / "more").rename(tmp_path / ".more")
    assert len(list(sources.read(str(tmp_path), Reading()))) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may not read")
def test_what_may_not_be_read_is_named(tmp_path):
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    closed, below = tmp_path / "closed.txt", tmp_path / "folder" / "closed"
    closed.write_text("text")
    below.mkdir(parents=True)
    (tmp_path / "folder" / "a.txt").write_text("text")
    (tmp_path / "folder" / "unknown").write_text("text")
    for path in (closed, below, tmp_path / "folder" / "unknown"):
        path.chmod(0)
    names = (closed, tmp_path / "folder", below, below / "in.txt", tmp_path / "folder" / "unknown")
    results = answers(*names, user="as nobody")
    for name, answer in results.items():
        assert name in answer and "Permission denied" in answer and ". Check the path and its permissions." in answer
    assert len(results) == len(names)


def test_a_file_that_the_disk_cannot_read_is_named(tmp_path):
    """/proc/self/mem is a regular file; reading its first page is an error."""
    link = tmp_path / "a.jsonl"
    link.symlink_to("/proc/self/mem")
    with pytest.raises(UserError, match=r"a\.jsonl: "):
        list(sources.read(str(link), Reading()))


class Changing(Tokenizer):
    """The byte tokenizer; at its first use a file changes, as if another program wrote to it."""

    def encode_batch(self, texts, *, continued=False):
        while changes:
            changes.pop()()
        return super().encode_batch(texts, continued=continued)


changes: list = []
CHANGES = {
    "vanishes": os.unlink,
    "is emptied": lambda path: os.truncate(path, 0),
    "shrinks": lambda path: os.truncate(path, 30_000),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("second", [False, True], ids=["while it is read", "before it is read"])
@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json", "csv"])
def test_a_file_that_changes_while_it_is_read_is_named(tmp_path, monkeypatch, suffix, second, change):
    for module in (document, records, text):  # blocks so small that a file is not read at once
        monkeypatch.setattr(module, "PIECE", 4096)
    monkeypatch.setattr(writer, "BATCH_PIECES", 4)
    folder, cache = tmp_path / "texts", tmp_path / "cache"
    folder.mkdir()
    row = {"txt": "a line of it\n", "csv": "text\n"}.get(suffix, '{"text": "ab"}\n')
    for name in ("1", "2") if second else ("1",):
        (folder / f"{name}.{suffix}").write_text(row * 4000)
    changes.append(lambda: CHANGES[change](folder / f"{2 if second else 1}.{suffix}"))
    tokenizer = Changing(byte_tokenizer().backend, 1, 0)
    with pytest.raises(UserError) as caught:
        prepare(str(folder), tokenizer, Reading(), cache_dir=cache, val_fraction=0.0, report=lambda line: None)
    assert not changes and str(folder) in str(caught.value) and "Errno" not in str(caught.value)
    assert list(cache.iterdir()) == []


def test_a_text_that_shrinks_between_two_readings_is_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(LINES * 3)
    (whole,) = sources.read(str(path), Reading())
    os.truncate(path, 2 * PIECE)
    with pytest.raises(UserError, match=r"a\.txt: changed while it was being read"):
        list(whole.pieces)
    path.unlink()
    with pytest.raises(UserError, match=r"a\.txt: cannot be read"):
        list(whole.pieces)


def test_a_short_document_of_a_file_that_shrinks_is_not_cut(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"%%".join([LINES[: PIECE * 3 // 4]] * 4))
    reading = sources.read(str(path), Reading(document_separator="%%"))
    assert len(next(reading).pieces[0]) == len(next(reading).pieces[0]) == PIECE * 3 // 4
    os.truncate(path, PIECE * 5 // 4)  # before what the search for the next separator has seen
    with pytest.raises(UserError, match=r"a\.txt: changed while it was being read"):
        list(reading)


GIVE_BACK = """
import re
from forge_common.files.tensors import give_back_memory
resident = lambda: int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
blocks = [bytes(1000) for _ in range(64_000)]
last = bytes(1000)  # after them, so that they are not at the end of the heap
before = resident()
del blocks
give_back_memory()
print(before - resident())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc", reason="glibc")
def test_what_tokenizing_has_freed_is_given_back():
    done = subprocess.run([sys.executable, "-c", GIVE_BACK], capture_output=True, text=True, timeout=120, check=True)
    assert int(done.stdout) > 50_000_000


def test_short_documents_are_tokenized_in_small_batches():
    """And long ones in batches of several pieces, one for each core."""
    short = [Document("a", b"", ("ab " * 4000,)) for _ in range(1000)]
    long = [Document("a", b"", ("ab " * (PIECE // 3),) * 9)]
    sizes = [sum(len(piece.text) for piece in batch) for batch in writer.batches(short)]
    assert sum(sizes) == 1000 * 12_000 and max(sizes) < PIECE + 12_000
    assert [len(batch) for batch in writer.batches(long)] == [5, 4]
