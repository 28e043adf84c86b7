"""Untrusted tokenizers: an invalid one is refused, and the message names the file."""

import itertools
import json
import random
import subprocess
import sys

import launch
import pytest
from small_artifacts import refused, tokenizer_with

from forge_common.data.tokenizer import byte_tokenizer
from forge_common.data.tokenizer_files import load_tokenizer
from forge_common.data.tokenizer_limits import ADDED_TEXT, ADDED_TOKENS, MERGES, VOCABULARY, VOCABULARY_TEXT


def template(*ids: int) -> dict:
    special = {"<eos>": {"id": "<eos>", "ids": list(ids), "tokens": ["<eos>"] * len(ids)}}
    single = [{"SpecialToken": {"id": "<eos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


REPLACE = {"type": "Replace", "pattern": {"String": "x"}, "content": "x" * 99}
TOKENIZERS = {
    "not JSON": "{",
    "deeply nested": "[" * 100_000,
    "an empty vocabulary": tokenizer_with("model", "vocab", value={}),
    "an id of four billion": tokenizer_with("model", "vocab", "a", value=2**32 - 1),
    "an id of 17 million": tokenizer_with("model", "vocab", "a", value=1 << 24),
    "an id beyond the vocabulary before each text": tokenizer_with("post_processor", value=template(999)),
    "a panic while it is read": tokenizer_with(
        "normalizer", value={"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    ),
    "a panic while it encodes": tokenizer_with("pre_tokenizer", value={"type": "FixedLength", "length": 0}),
    "an unknown special token": tokenizer_with("post_processor", value=template() | {"special_tokens": {}}),
    "no unknown token": tokenizer_with(
        "model", value={"type": "WordLevel", "unk_token": "?", "vocab": {"a": 0, "<eos>": 1}}
    ),
    "no tokens for any text": tokenizer_with("normalizer", value=REPLACE | {"content": ""}),
    "an invalid regular expression": tokenizer_with("normalizer", value=REPLACE | {"pattern": {"Regex": "(("}}),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_invalid_tokenizer_is_refused(tmp_path, name):
    (tmp_path / "tokenizer.json").write_text(TOKENIZERS[name])
    assert str(tmp_path / "tokenizer.json") in refused(load_tokenizer, tmp_path)


def added(number: int, letters: int = 1) -> list[dict]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return [{"id": 300 + index, "content": f"t{index}" + "x" * letters} | flags for index in range(number)]


MANY = {  # a part of the file -> a value that is too large for it
    ("normalizer",): {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 600},
    ("pre_tokenizer",): {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}] * 400},
    ("pre_tokenizer", "pattern"): {"Regex": "a|" * (33 << 10)},
    ("model", "unk_token"): "x" * (65 << 10),
    ("model", "vocab"): {f"t{index}": index for index in range(VOCABULARY)} | {"<eos>": 1},
    ("model", "vocab", "x" * (VOCABULARY_TEXT + 1)): 258,
    ("model", "merges"): ["a b"] * (MERGES + 1),
    ("added_tokens",): added(ADDED_TOKENS + 1),
    ("added_tokens", 0): added(1, ADDED_TEXT)[0],
}


@pytest.mark.parametrize("part", MANY, ids=lambda part: f"{part[:2]}")
def test_a_part_that_would_take_long_to_build_is_refused(tmp_path, part):
    """Before it is built: the library takes a hundred times the memory of some of them."""
    (tmp_path / "tokenizer.json").write_text(tokenizer_with(*part, value=MANY[part]))
    assert ", more than " in refused(load_tokenizer, tmp_path)


def test_a_part_that_is_there_twice_is_refused(tmp_path):
    """What is checked would not be what the library reads."""
    text = tokenizer_with("normalizer", value={"type": "NFC"})
    (tmp_path / "tokenizer.json").write_text(f'{text[:-1]}, "normalizer": null}}')
    assert "twice" in refused(load_tokenizer, tmp_path)


def test_a_tokenizer_that_cannot_encode_a_text_is_refused(tmp_path):
    words = {"type": "WordLevel", "unk_token": "?", "vocab": {"x": 0, "<eos>": 1}}
    (tmp_path / "tokenizer.json").write_text(tokenizer_with("model", value=words))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode_batch(["x"]) == [[0]]
    assert "cannot encode" in refused(tokenizer.encode_batch, ["unknown words"])


@pytest.mark.parametrize("id", [-1, 258, 2**24, 2**32, 10**30, True, "1", None])
def test_ids_outside_the_vocabulary_are_ignored(tmp_path, id):
    """As EOS and PAD in tokenizer_config.json."""
    byte_tokenizer().save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token_id": id, "pad_token_id": id}))
    assert load_tokenizer(tmp_path).digest == byte_tokenizer().digest


def at_the_limits(kind: str) -> str:
    """The largest tokenizer of a kind that is accepted: by the length of its tokens (Unigram), by their number and the
    merges (BPE).
    """
    content = json.loads(byte_tokenizer().backend.to_str())
    if kind == "Unigram":
        draw = random.Random(0)
        words = ["".join(draw.choices("abcdefghijklmnop", k=1 << 16)) for _ in range((VOCABULARY_TEXT >> 16) - 1)]
        content["model"] = {
            "type": kind,
            "unk_id": 0,
            "vocab": [[word, -1.0] for word in ("<pad>", "<eos>", "x", *words)],
        }
        return json.dumps(content)
    vocabulary = content["model"]["vocab"]
    letters = [token for token in vocabulary if len(token) == 1]
    words = map("".join, itertools.chain(itertools.product(letters, repeat=2), itertools.product(letters, repeat=3)))
    for word in itertools.islice(words, VOCABULARY - len(vocabulary)):
        vocabulary[word] = len(vocabulary)
    splits = ((word[:at], word[at:]) for word in vocabulary for at in range(1, len(word)) if word[0] != "<")
    content["model"]["merges"] = [" ".join(pair) for pair in itertools.islice(splits, MERGES)]
    return json.dumps(content)


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("kind", ["Unigram", "BPE"])
def test_what_the_largest_tokenizers_take(tmp_path, kind):
    """Those that are not refused. docs/RELIABILITY.md has the figures.

    Of the process itself: the peak that `getrusage` returns begins with that of the process that started it.
    """
    (tmp_path / "tokenizer.json").write_text(at_the_limits(kind))
    code = (
        "import re, sys, time; from forge_common.data.tokenizer_files import load_tokenizer\n"
        "peak = lambda: int(re.search('VmHWM: +([0-9]+)', open('/proc/self/status').read().replace('\\t', ' '))[1])\n"
        "before, start = peak(), time.process_time()\n"
        "load_tokenizer(sys.argv[1])\n"
        "print((peak() - before) >> 10, time.process_time() - start)\n"
    )
    line = [sys.executable, "-c", code, tmp_path]
    done = subprocess.run(line, cwd=launch.ROOT, env=launch.environment(), capture_output=True, text=True, check=True)
    mebibytes, seconds = map(float, done.stdout.split())
    print(f"{kind}: {mebibytes:,.0f} MiB, {seconds:.1f} s")
    assert 256 < mebibytes < 2048 and seconds < 60
