"""What a validation scores: every label once, or a fixed choice of exactly so many; and the bytes that those labels stand for."""

import hashlib
import itertools
import json
import random
from collections import Counter

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from forge_common.data.byte_lengths import ByteLengths
from forge_common.data.corpora import log_names
from forge_common.data.held_out import HeldOut, choose
from forge_common.data.readers.document import Reading
from forge_common.data.store import Windows, prepare
from forge_common.data.tokenizer import Tokenizer, byte_tokenizer, train_tokenizer

FILLER = -100


def texts(count=150, words=("tree", "Water", "of", "over", "x\n", " and,")):
    random_ = random.Random(3)
    sizes = [random_.choice([1, 2, 9, 40]) for _ in range(count)]
    return [f"{i} " + " ".join(random_.choice(words) for _ in range(size)) for i, size in enumerate(sizes)]


def byte_level_bpe():
    return train_tokenizer(texts(), 300)


def with_bos():
    backend = Backend.from_str(byte_level_bpe().backend.to_str())
    backend.add_special_tokens(["<bos>"])
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 300)])
    return Tokenizer(backend, eos_token_id=1, pad_token_id=0)


def sentence_piece(*, bos=False, normalizer=None):
    """As in Llama 2 and Mistral: a space before the text, ▁ for spaces, bytes for what is not in the vocabulary."""
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizer or normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    every_byte = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>", *every_byte], show_progress=False
    )
    backend.train_from_iterator([text.replace("\n", "") for text in texts()], trainer)
    written = json.loads(backend.to_str())
    written["added_tokens"] = written["added_tokens"][:3]  # the bytes are tokens of the vocabulary
    backend = Backend.from_str(json.dumps(written))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return Tokenizer(backend, eos_token_id=2, pad_token_id=None)


def without_line_breaks():
    """Loses a part of the text."""
    backend = Backend.from_str(byte_level_bpe().backend.to_str())
    backend.normalizer = normalizers.Replace("\n", "")
    return Tokenizer(backend, eos_token_id=1, pad_token_id=0)


def words_only():
    """White space is no token, and an unknown word is one."""
    backend = Backend(models.WordLevel({"<unk>": 0, "<eos>": 1, "tree": 2, "of": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<eos>"])
    return Tokenizer(backend, eos_token_id=1, pad_token_id=None)


def store(folder, tokenizer, content, name="a"):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in content))
    source = str(folder / f"{name}.jsonl")
    options = {"cache_dir": folder / "cache", "val_fraction": 0.0, "report": lambda line: None}
    return prepare(source, tokenizer, Reading(), **options).train


def label_sizes(tokens, tokenizer):
    """Bytes of each token of the store, in another way: by how much each lengthens the decoded text of its document."""
    sizes = []
    for start, end in itertools.pairwise(tokens.offsets.astype(int)):
        ids = tokens.tokens[start:end].tolist()
        lengths = [len(tokenizer.decode(ids[:number]).encode()) for number in range(len(ids) + 1)]
        sizes += [after - before for before, after in itertools.pairwise(lengths)]
    return np.array(sizes)


def label_places(tokens, length, *, pack):
    """Of each window, in order, the places of its labels in the store."""
    ends = tokens.offsets.astype(int).tolist()
    streams = [(0, ends[-1])] if pack else itertools.pairwise(ends)
    return [
        range(start + 1, min(start + length + 1, end))
        for first, end in streams
        for start in range(first, end - 1, length)
    ]


KINDS = {
    "bytes": byte_tokenizer,
    "byte-level": byte_level_bpe,
    "byte-level with BOS": with_bos,
    "SentencePiece": sentence_piece,
    "SentencePiece with BOS": lambda: sentence_piece(bos=True),
}


@pytest.mark.parametrize("pack", [True, False], ids=["packed", "documents"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_are_those_of_the_scored_labels(kind, pack, tmp_path):
    tokenizer, content = KINDS[kind](), texts()
    tokens = store(tmp_path, tokenizer, content)
    sizes = label_sizes(tokens, tokenizer)
    assert sizes.sum() == tokens.bytes == sum(len(text.encode()) for text in content)
    places = label_places(tokens, 16, pack=pack)
    windows = Windows(tokens, 16, pack=pack, filler=FILLER, tail=pack)
    lengths = ByteLengths(tokenizer)
    whole = HeldOut.whole("a", windows, lengths)
    assert len(whole) == len(places)
    assert whole.bytes == sum(int(sizes[labels].sum()) for labels in places)
    first = HeldOut.first("a", windows, 100, lengths)
    assert len(first) == 7  # of 16 tokens each
    assert first.bytes == sum(int(sizes[labels].sum()) for labels in places[:7]) > 50
    drawn = HeldOut.drawn("a", windows, 333, lengths)
    counted = 0
    for window in (drawn[i] for i in range(len(drawn))):
        labels = window[1:][window[1:] != FILLER]
        found = [p for p in places if tokens.tokens[p.start - 1] == window[0] and len(p) >= len(labels)]
        found = [p for p in found if tokens.tokens[p.start : p.start + len(labels)].tolist() == labels.tolist()]
        counts = {int(sizes[p.start : p.start + len(labels)].sum()) for p in found}
        assert len(counts) == 1  # the window, and others with the same ids
        counted += counts.pop()
    assert drawn.bytes == counted > 300
    if not pack and tokenizer.prefix == ():
        assert whole.bytes < tokens.bytes  # the first token of a document is no label


@pytest.mark.parametrize("pack", [True, False], ids=["packed", "documents"])
def test_tokens_that_hold_parts_of_characters(pack, tmp_path):
    """The bytes of a document are those of its text, wherever its windows cut a character."""
    content = [f"a{i} " + "Übung 三つ 🙂🙂 é" * (1 + i % 7) for i in range(60)]
    for number, tokenizer in enumerate((byte_tokenizer(), byte_level_bpe(), sentence_piece())):
        tokens = store(tmp_path, tokenizer, content, f"a{number}")
        windows = Windows(tokens, 7, pack=pack, filler=FILLER, tail=pack)
        firsts = sum(len(tokenizer.decode([int(tokens.tokens[int(start)])])) for start in tokens.offsets[:-1])
        missing = len(tokenizer.decode([int(tokens.tokens[0])])) if pack else firsts
        assert HeldOut.whole("a", windows, ByteLengths(tokenizer)).bytes == tokens.bytes - missing


@pytest.mark.parametrize(
    "make", [without_line_breaks, words_only, lambda: sentence_piece(normalizer=normalizers.NFKD())]
)
def test_bytes_that_the_tokens_do_not_tell_are_unknown(make, tmp_path):
    tokenizer = make()
    tokens = store(tmp_path, tokenizer, [*texts(), "½ Å"])
    windows = Windows(tokens, 16, pack=True, filler=FILLER, tail=True)
    assert HeldOut.whole("a", windows, ByteLengths(tokenizer)).bytes is None


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held_out")
    return {
        "law": store(folder, byte_tokenizer(), texts(400), "law"),
        "docs": store(folder, byte_tokenizer(), texts(90, ("def f():", "return")), "docs"),
    }


@pytest.mark.parametrize("pack", [True, False], ids=["packed", "documents"])
@pytest.mark.parametrize("labels", [1, 2, 777, 5000])
def test_a_choice_scores_exactly_so_many_labels_each_source_with_its_share(labels, pack, sources):
    windows = {name: Windows(s, 32, pack=pack, filler=FILLER, tail=pack) for name, s in sources.items()}
    total = sum(w.labels for w in windows.values())
    assert total > 5000
    parts = choose(windows, labels, ByteLengths(byte_tokenizer()))
    scored = {part.source: [int((part[i][1:] != FILLER).sum()) for i in range(len(part))] for part in parts}
    assert sum(map(sum, scored.values())) == labels
    for part in parts:
        assert sum(scored[part.source]) == part.labels
        assert abs(part.labels - labels * windows[part.source].labels / total) < 1
        assert min(scored[part.source]) > 0
        full = [w.tolist() for w in windows[part.source]]
        numbers = [full.index(part[i].tolist()) for i in range(len(part) - 1)]  # the last one may be cut
        if all(full.count(full[number]) == 1 for number in numbers):
            assert len(set(numbers)) == len(numbers)
    if labels == 5000:  # from all over the source, and the smaller choice is in the greater one
        law = parts[0]
        full = [w.tolist() for w in windows["law"]]
        thirds = {3 * full.index(law[i].tolist()) // len(full) for i in range(len(law) - 1)}
        assert thirds == {0, 1, 2}
        smaller = choose(windows, 777, ByteLengths(byte_tokenizer()))[0]
        assert all((smaller[i] == law[i]).all() for i in range(len(smaller) - 1))


def test_a_choice_of_all_labels_but_one_repeats_none(sources):
    windows = Windows(sources["law"], 3, pack=True, filler=FILLER, tail=True)
    drawn = HeldOut.drawn("law", windows, windows.labels - 1, ByteLengths(byte_tokenizer()))
    counts = Counter(label for i in range(len(drawn)) for label in drawn[i][1:].tolist() if label != FILLER)
    assert len(drawn) > 3000 and (Counter(sources["law"].tokens[1:].tolist()) - counts).total() == 1
    assert counts.total() == windows.labels - 1


@pytest.mark.parametrize("labels", [0, 10**9])
def test_without_a_choice_all_labels_are_scored(labels, sources):
    windows = {name: Windows(s, 32, pack=False, filler=FILLER) for name, s in sources.items()}
    for part in choose(windows, labels, ByteLengths(byte_tokenizer())):
        assert part.is_whole and len(part) == len(windows[part.source])
        assert all((part[i] == windows[part.source][i]).all() for i in range(len(part)))
        assert part.bytes == part.tokens.bytes - part.tokens.documents  # less the first byte of each


def test_the_choice_is_the_one_of_every_version(sources):
    """Otherwise the best loss of a resumed run would be of other text."""
    windows = {name: Windows(s, 32, pack=True, filler=FILLER, tail=True) for name, s in sources.items()}
    digest = hashlib.sha256()
    for part in choose(windows, 3001, ByteLengths(byte_tokenizer())):
        for i in range(len(part)):
            digest.update(part[i].astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == "9ee9e332a6e9ad08"


def test_names_for_the_log():
    """Letters, digits and ._- of as little of the path as tells the sources apart."""
    assert log_names(("corpora/law.jsonl@0.7", "corpora/docs/")) == ["law.jsonl", "docs"]
    assert log_names(("local:docs", "hf:allenai/c4:en:train")) == ["local_docs", "c4_en_train"]
    assert log_names(("a/text/*.txt", "b/text/*.txt")) == ["a_text_.txt", "b_text_.txt"]
    assert log_names(("x y", "x?y")) == ["x_y_0", "x_y_1"]
    assert log_names(("/",)) == ["_0"]
