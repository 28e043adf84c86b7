"""The store: every token of every document once, in its split; windows with each label once; a cache that notices changes."""

import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
import time
from types import SimpleNamespace

import launch
import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import normalizers, processors

from forge_common.data.corpora import open_corpora, tokenizer_for
from forge_common.data.readers.document import PIECE, Reading
from forge_common.data.store import Windows, in_validation, prepare
from forge_common.data.tokenizer import Tokenizer, byte_tokenizer
from forge_common.data.tokenizer_files import load_tokenizer
from forge_common.errors import UserError
from train_shared import Settings

FILLER = -100


def words(random_, count):
    return " ".join(random_.choice(["alpha", "Übung", "<pad>", "<eos>", "三つ", "x\n", "🙂"]) for _ in range(count))


def write(path, count=120, seed=0):
    """Documents of many lengths, the 7th of them three times."""
    random_ = random.Random(seed)
    texts = [words(random_, random_.choice([1, 2, 5, 30, 100])) + f" {i}" for i in range(count)]
    texts += [texts[7], texts[7]]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


def with_bos(end_too=False):
    """The byte tokenizer with a post-processor that puts a BOS before a document."""
    backend = Backend.from_str(byte_tokenizer().backend.to_str())
    backend.add_special_tokens(["<bos>"])
    single = "<bos> $A <eos>" if end_too else "<bos> $A"
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<bos>", 258), ("<eos>", 1)])
    return Tokenizer(backend, eos_token_id=1, pad_token_id=0)


def make(path, cache, tokenizer=None, val_fraction=0.2, report=lambda line: None, **settings):
    tokenizer = tokenizer or byte_tokenizer()
    reading = Reading(**settings)
    return prepare(str(path), tokenizer, reading, cache_dir=cache, val_fraction=val_fraction, report=report)


def documents_of(tokens):
    return [tokens.tokens[a:b].tolist() for a, b in itertools.pairwise(tokens.offsets.astype(int))]


@pytest.mark.parametrize(
    "tokenizer", [byte_tokenizer(), with_bos(), with_bos(end_too=True)], ids=["bytes", "bos", "both"]
)
def test_the_store_is_the_concatenation_of_the_encodings(tmp_path, tokenizer):
    texts = write(tmp_path / "a.jsonl")
    corpus = make(tmp_path / "a.jsonl", tmp_path / "cache", tokenizer)
    expected = {True: [], False: []}
    for line, (text, ids) in enumerate(zip(texts, tokenizer.encode_batch(texts), strict=True), 1):
        held_out = in_validation(hashlib.sha256(text.encode()).digest(), 0.2)
        ids = ids if ids[-1] == 1 else [*ids, 1]
        expected[held_out].append((f"{tmp_path}/a.jsonl:{line}", ids, len(text.encode())))
    for held_out, tokens in ((False, corpus.train), (True, corpus.validation)):
        origins, ids, sizes = zip(*expected[held_out], strict=True)
        assert documents_of(tokens) == list(ids)
        assert tokens.tokens.tolist() == list(itertools.chain(*ids))
        assert tokens.bytes == sum(sizes)
        assert [tokens.origin(i) for i in range(tokens.documents)] == list(origins)
        assert tokens.digest == hashlib.sha256(tokens.tokens.tobytes()).hexdigest()
        assert tokens.tokens.dtype == np.uint16
        assert 0 not in tokens.tokens
    assert corpus.facts["train"]["tokens"] == len(corpus.train.tokens)


def test_copies_of_a_document_are_in_one_split_of_about_the_right_size(tmp_path):
    texts = write(tmp_path / "a.jsonl", 1500)
    counts = [make(tmp_path / "a.jsonl", tmp_path, val_fraction=f).validation.documents for f in (0, 0.1, 0.5, 1)]
    assert counts[0] == 0
    assert counts[3] == len(texts)
    assert 90 < counts[1] < 220 and 600 < counts[2] < 900
    (tmp_path / "copy.txt").write_text(texts[7])
    corpus, alone = make(tmp_path / "a.jsonl", tmp_path), make(tmp_path / "copy.txt", tmp_path)
    held_out, kept = documents_of(corpus.validation), documents_of(corpus.train)
    copy = documents_of(alone.validation) + documents_of(alone.train)
    assert (copy[0] in held_out) != (copy[0] in kept)
    assert (copy[0] in held_out) == bool(alone.validation.documents)


def test_a_document_in_pieces_has_one_beginning_and_one_end(tmp_path):
    text = "a line of text\n" * (5 * PIECE // 15)
    (tmp_path / "a.txt").write_text(text + "<SEP>small<SEP>" + text[:-1] + "!")
    corpus = make(tmp_path / "a.txt", tmp_path, with_bos(), 0.0, document_separator="<SEP>")
    for ids, wanted in zip(documents_of(corpus.train), [text, "small", text[:-1] + "!"], strict=True):
        assert ids == [258, *(2 + byte for byte in wanted.encode()), 1]


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    backend = byte_tokenizer().backend
    backend.add_tokens([f"[token {i}]" for i in range(1 << 16)])
    (tmp_path / "a.txt").write_text(f"[token 0] and [token {(1 << 16) - 1}]")
    corpus = make(tmp_path / "a.txt", tmp_path, Tokenizer(backend, 1, 0), 0.0)
    assert corpus.train.tokens.dtype == np.uint32
    assert corpus.train.tokens.max() == 257 + (1 << 16)


def test_text_that_yields_pad_is_refused(tmp_path):
    backend = byte_tokenizer().backend
    backend.add_tokens(["PAD"])  # not special: the tokenizer finds it in text
    (tmp_path / "a.txt").write_text("some PAD here")
    with pytest.raises(UserError, match=r"a\.txt.*PAD"):
        make(tmp_path / "a.txt", tmp_path / "cache", Tokenizer(backend, 1, 258))
    assert not list((tmp_path / "cache").iterdir())


def test_a_hit_reads_nothing_and_a_change_is_noticed(tmp_path):
    path, cache = tmp_path / "a.jsonl", tmp_path / "cache"
    write(path)
    first = make(path, cache)
    folder = first.train.folder
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    stat = path.stat()
    path.write_bytes(b"\xff" * stat.st_size)  # unreadable, but of the same size and time: only reading would tell
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    again = make(path, cache)
    assert again.train.folder == folder
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    write(path, seed=1)
    changed = make(path, cache)
    assert changed.train.folder != folder
    assert changed.train.digest != first.train.digest
    folders = {changed.train.folder, make(path, cache, val_fraction=0.3).train.folder}
    folders |= {make(path, cache, with_bos()).train.folder, make(path, cache, on_bad_line="skip").train.folder}
    assert len(folders) == 4
    assert not list(cache.glob(".tmp*"))


def test_the_fingerprint_is_the_hash_of_what_decides_the_tokens(tmp_path):
    """Another version that hashes other JSON would tokenize every corpus again."""
    path, cache = tmp_path / "a.jsonl", tmp_path / "cache"
    path.write_text('{"body": "some text"}\n')
    os.utime(path, ns=(1, 1_700_000_000_000_000_123))
    files = {"files": [[str(path), 22, 1_700_000_000_000_000_123]]}
    reading = {"text_column": "body", "document_separator": "|", "on_bad_text": "skip", "on_bad_line": "skip"}
    corpus = make(path, cache, val_fraction=0.25, **reading)
    digest = byte_tokenizer().digest
    hashed = {"format": 1, "source": str(path), "files": files, "tokenizer": digest, "val_fraction": 0.25}
    hashed["reading"] = reading
    assert corpus.train.folder.name == hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()

    settings = Settings(
        data=(f"{path}@2",), output_dir=tmp_path, tokenizer="train:258", cache_dir=cache, val_fraction=0.0, **reading
    )
    tokenizer_for(settings)
    hashed = json.dumps(["train:258", 0.0, reading, 8192, files], sort_keys=True)
    assert os.listdir(cache / "tokenizers") == [hashlib.sha256(hashed.encode()).hexdigest()[:32]]


DAMAGE = {
    "facts halved": ("facts.json", lambda content: content[: len(content) // 2]),
    "tokens halved": ("train.tokens", lambda content: content[: len(content) // 2]),
    "tokens overwritten": ("train.tokens", lambda content: content[::-1]),
    "a bit of a token": ("validation.tokens", lambda content: content[:-2] + bytes([content[-2] ^ 1]) + content[-1:]),
    "offsets overwritten": ("train.offsets", lambda content: content[:8] + content[16:24] + content[16:]),
    "removed": ("train.tokens", None),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_written_again(tmp_path, damage):
    """Also one of the same size, which would be trained on under the digest of the original."""
    write(tmp_path / "a.jsonl")
    corpus = make(tmp_path / "a.jsonl", tmp_path)
    before = [(documents_of(part), part.digest) for part in (corpus.train, corpus.validation)]
    name, change = DAMAGE[damage]
    file = corpus.train.folder / name
    file.write_bytes(change(file.read_bytes())) if change else file.unlink()
    lines = []
    again = make(tmp_path / "a.jsonl", tmp_path, report=lines.append)
    assert [(documents_of(part), part.digest) for part in (again.train, again.validation)] == before
    assert "damaged" in lines[0]


def test_a_cache_of_an_earlier_version_opens(tmp_path):
    write(tmp_path / "a.jsonl")
    facts_file = make(tmp_path / "a.jsonl", tmp_path).train.folder / "facts.json"
    facts = json.loads(facts_file.read_text())
    for split in ("train", "validation"):
        del facts[split]["offsets_digest"]
    facts_file.write_text(json.dumps(facts))
    lines = []
    make(tmp_path / "a.jsonl", tmp_path, report=lines.append)
    assert not lines and json.loads(facts_file.read_text()) == facts


def test_a_damaged_index_of_windows_is_written_again(tmp_path):
    write(tmp_path / "a.jsonl")
    train = make(tmp_path / "a.jsonl", tmp_path).train
    before = [window.tolist() for window in Windows(train, 7, pack=False, filler=FILLER)]
    file = train.folder / "train.windows-7"
    content = file.read_bytes()
    for damaged in (content[:8] + content[16:24] + content[16:], content[:-8], content + bytes(8)):
        file.write_bytes(damaged)
        assert [window.tolist() for window in Windows(train, 7, pack=False, filler=FILLER)] == before
        assert file.read_bytes() == content


def test_a_refused_source_leaves_nothing_and_no_document_is_refused(tmp_path):
    path, cache = tmp_path / "a.jsonl", tmp_path / "cache"
    path.write_text('{"text": "fine"}\n{"text": 3}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:2"):
        make(path, cache)
    path.write_text('{"text": " "}\n{"text": ""}\n')
    with pytest.raises(UserError, match=r"a\.jsonl: no document.*skipped_empty 2"):
        make(path, cache)
    assert list(cache.iterdir()) == []
    with pytest.raises(UserError, match="--val-fraction"):
        make(path, cache, val_fraction=1.5)


def test_what_was_skipped_is_counted_and_reported(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"text": 3}\n{"text": " "}\n{"te')
    lines = []
    corpus = make(path, tmp_path, on_bad_line="skip", report=lines.append)
    assert corpus.facts["counters"] == {"skipped_bad_line": 2, "skipped_empty": 1}
    assert "skipped_bad_line 2" in lines[-1]


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a row of text"}\n' * 3000)

    class Growing(str):
        """A --text-column that lets the file grow when it is used, as if another program wrote to it."""

        def __hash__(self):
            with open(path, "a") as file:
                file.write("\n")
            return super().__hash__()

        __eq__ = str.__eq__

    with pytest.raises(UserError, match="changed while it was being read"):
        make(path, tmp_path / "cache", text_column=Growing("text"))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_file_name_that_is_not_utf8_is_accepted(tmp_path):
    (tmp_path / "texts").mkdir()
    with open(os.fsencode(tmp_path / "texts") + b"/caf\xe9.txt", "w") as file:
        file.write("text")
    for _ in range(2):  # written, then from the cache
        corpus = make(tmp_path / "texts", tmp_path / "cache", val_fraction=0.0)
        assert os.fsencode(corpus.train.origin(0)).endswith(b"/caf\xe9.txt")


def test_two_processes_at_once_make_one_cache(tmp_path):
    write(tmp_path / "a.jsonl", 3000)
    code = (
        "import sys; from pathlib import Path; from forge_common.data.store import prepare\n"
        "from forge_common.data.tokenizer import byte_tokenizer\n"
        "from forge_common.data.readers.document import Reading\n"
        "c = prepare(sys.argv[1], byte_tokenizer(), Reading(), cache_dir=Path(sys.argv[2]), val_fraction=0.1)\n"
        "print(c.train.digest, len(c.train.tokens))"
    )
    command = [sys.executable, "-c", code, tmp_path / "a.jsonl", tmp_path / "cache"]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    printed = {run.communicate(timeout=60)[0] for run in runs}
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert len(printed) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_tokenizer_that_another_process_published_first_is_kept(tmp_path, monkeypatch):
    """Both train it; the other one publishes it while this one still writes its own."""
    write(tmp_path / "a.jsonl")
    settings = Settings(
        data=(str(tmp_path / "a.jsonl"),), output_dir=tmp_path, tokenizer="train:300", cache_dir=tmp_path
    )
    code = (
        "import sys; from pathlib import Path; from forge_common.data.corpora import tokenizer_for\n"
        "from train_shared import Settings\n"
        "data, folder = sys.argv[1:]\n"
        "settings = Settings(data=(data,), output_dir=Path(folder), tokenizer='train:300', cache_dir=Path(folder))\n"
        "print(tokenizer_for(settings).digest)"
    )
    save, published = Tokenizer.save, []

    def save_after_the_other(tokenizer, folder):
        command = [sys.executable, "-c", code, tmp_path / "a.jsonl", tmp_path]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=launch.ROOT, timeout=60)
        (folder_of_the_other,) = (tmp_path / "tokenizers").glob("[!.]*")
        published.append((done.stdout.strip(), folder_of_the_other.stat().st_ino))
        save(tokenizer, folder)

    monkeypatch.setattr(Tokenizer, "save", save_after_the_other)
    digest = tokenizer_for(settings).digest
    (folder,) = (tmp_path / "tokenizers").iterdir()
    assert published == [(digest, folder.stat().st_ino)]
    assert load_tokenizer(folder).digest == digest


def test_a_cached_tokenizer_that_is_damaged_is_trained_again(tmp_path):
    write(tmp_path / "a.jsonl")
    data = (str(tmp_path / "a.jsonl"),)
    settings = Settings(data=data, output_dir=tmp_path, tokenizer="train:260", cache_dir=tmp_path / "cache")
    digest = tokenizer_for(settings).digest
    (file,) = (tmp_path / "cache" / "tokenizers").glob("*/tokenizer.json")
    file.write_text(file.read_text()[:100])
    lines: list[str] = []
    assert tokenizer_for(settings, lines.append).digest == digest == load_tokenizer(file.parent).digest
    assert str(file) in lines[0] and lines[0].endswith("It is in the cache, and is trained again")


def test_what_a_killed_run_left_is_removed_after_a_day(tmp_path):
    write(tmp_path / "a.jsonl")
    name = make(tmp_path / "a.jsonl", tmp_path / "other").train.folder.name
    for pid, age in ((1, 2 * 24 * 3600), (2, 60)):
        left = tmp_path / "cache" / f".tmp-{name}-{pid}"
        left.mkdir(parents=True)
        os.utime(left, (time.time() - age,) * 2)
    make(tmp_path / "a.jsonl", tmp_path / "cache")
    assert sorted(os.listdir(tmp_path / "cache")) == [f".tmp-{name}-2", name]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write(folder / "a.jsonl")
    return make(folder / "a.jsonl", folder / "cache")


LENGTHS = [1, 2, 3, 7, 64, 1000, 10**6]


@pytest.mark.parametrize("length", LENGTHS)
def test_packed_windows_score_every_token_but_the_first_once(corpus, length):
    tokens = corpus.train.tokens.astype(int)
    windows = Windows(corpus.train, length, pack=True, filler=FILLER)
    labels = [label for window in windows for label in window[1:]]
    assert labels == tokens[1 : 1 + len(labels)].tolist()
    assert (windows.labels, windows.dropped) == (len(labels), len(tokens) - 1 - len(labels))
    assert windows.dropped < length
    for window in windows:
        assert window.dtype == np.int64 and window.shape == (length + 1,)
        assert FILLER not in window
    tail = Windows(corpus.train, length, pack=True, filler=FILLER, tail=True)
    scored = [label for i in range(len(tail)) for label in tail[i][1 : 1 + tail.scored(i)]]
    assert scored == tokens[1:].tolist()
    assert sum(int((window[1:] != FILLER).sum()) for window in tail) == tail.labels == len(tokens) - 1
    assert tail.dropped == 0


@pytest.mark.parametrize("length", LENGTHS)
def test_windows_of_single_documents_lose_and_mix_nothing(corpus, length):
    windows = Windows(corpus.train, length, pack=False, filler=FILLER)
    found: dict[str, list[int]] = {}
    for i in range(len(windows)):
        ((document, start, end),) = windows.spans(i)
        assert start == 0 and end == windows.scored(i) + 1
        origin = corpus.train.origin(document)
        assert windows.documents_of(i) == [origin]
        assert (windows[i][end:] == FILLER).all()
        before = found.setdefault(origin, [int(windows[i][0])])
        assert before[-1] == windows[i][0]
        before += windows[i][1:end].tolist()
    assert list(found.values()) == documents_of(corpus.train)
    assert windows.labels == sum(windows.scored(i) for i in range(len(windows)))
    assert windows.labels == len(corpus.train.tokens) - corpus.train.documents
    assert windows.dropped == 0


def test_spans_of_packed_windows_are_the_documents(corpus):
    windows = Windows(corpus.train, 64, pack=True, filler=FILLER, tail=True)
    documents = documents_of(corpus.train)
    for i in range(len(windows)):
        place = 0
        for document, start, end in windows.spans(i):
            assert start == place < end
            place = end
            first = i * 64 + start - int(corpus.train.offsets[document])
            assert documents[document][first : first + end - start] == windows[i][start:end].tolist()
        assert place == windows.scored(i) + 1
        assert windows.documents_of(i) == [corpus.train.origin(document) for document, _, _ in windows.spans(i)]


@pytest.mark.parametrize("pack", [True, False])
def test_a_document_longer_than_the_context_is_cut_and_what_is_dropped_is_reported(tmp_path, pack):
    (tmp_path / "long.txt").write_text("".join(chr(33 + i % 90) for i in range(1000)))
    settings = Settings(
        data=(str(tmp_path / "long.txt"),),
        output_dir=tmp_path,
        cache_dir=tmp_path / "cache",
        val_fraction=0.0,
        sequence_length=64,
        batch_size=8,
        pack=pack,
    )
    corpora = open_corpora(settings, byte_tokenizer(), SimpleNamespace(ignore_index=FILLER), lambda line: None)
    (windows,) = corpora.training.sources
    dropped = 1000 % 64 if pack else 0  # 1,001 tokens with the end, of which the first is no label
    labels = np.concatenate([windows[i][1 : 1 + windows.scored(i)] for i in range(len(windows))])
    assert labels.tolist() == windows.tokens.tokens[1 : 1001 - dropped].tolist()
    assert corpora.report[0].endswith(
        f"1 documents, {len(windows)} windows, {1000 - dropped:,} tokens to learn ({dropped} too few for a window at the end)"
    )


def test_a_document_of_one_token_has_no_window(tmp_path):
    backend = byte_tokenizer().backend
    backend.normalizer = normalizers.Replace("gone", "")
    texts = ["gone", "ab", "gone", "gone", "c", "gone"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokens = make(tmp_path / "a.jsonl", tmp_path, Tokenizer(backend, 1, 0), 0.0).train
    assert np.diff(tokens.offsets).tolist() == [1, 3, 1, 1, 2, 1]
    windows = Windows(tokens, 1, pack=False, filler=FILLER)
    assert [window.tolist() for window in windows] == [[99, 100], [100, 1], [101, 1]]
    assert [windows.documents_of(i)[0][-1] for i in range(3)] == ["2", "2", "5"]


@pytest.mark.parametrize("pack", [True, False])
def test_windows_of_little_or_nothing(tmp_path, pack):
    (tmp_path / "a.txt").write_text("ab")
    corpus = make(tmp_path / "a.txt", tmp_path, val_fraction=0.0)
    assert len(Windows(corpus.validation, 8, pack=pack, filler=0, tail=True)) == 0
    windows = Windows(corpus.train, 8, pack=pack, filler=0, tail=True)
    assert windows[0].tolist() == windows[-1].tolist() == [99, 100, 1, 0, 0, 0, 0, 0, 0]
    for index in (1, -2):
        with pytest.raises(IndexError):
            windows[index]
    with pytest.raises(UserError, match="--sequence-length"):
        Windows(corpus.train, 0, pack=pack, filler=0)


def test_the_index_of_documents_is_written_once_and_repaired(tmp_path):
    write(tmp_path / "a.jsonl")
    tokens = make(tmp_path / "a.jsonl", tmp_path, val_fraction=0.0).train
    first = [window.tolist() for window in Windows(tokens, 8, pack=False, filler=0)]
    (index,) = tokens.folder.glob("train.windows-8*")
    stamp = index.stat().st_mtime_ns
    Windows(tokens, 8, pack=False, filler=0)
    assert index.stat().st_mtime_ns == stamp
    index.write_bytes(index.read_bytes()[:-8])
    assert [window.tolist() for window in Windows(tokens, 8, pack=False, filler=0)] == first
    assert len(list(tokens.folder.glob("train.windows-8*"))) == 1
