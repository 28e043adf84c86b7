"""Tokenizers: exact round trips, no special id from a text, and the same ids after saving and loading."""

import json

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from forge_common.data.tokenizer import Tokenizer, byte_tokenizer, train_tokenizer
from forge_common.data.tokenizer_files import load_tokenizer, resolve
from forge_common.errors import UserError

SAMPLES = [
    "plain words, and more words",
    "  two spaces before and two after  ",
    "def f(x):\n\treturn {\n        'a' : x,\n    }\r\n\n\n",
    "don't can't we'll  'quoted' . , ! ?",
    "Übung – 三つ 🙂\u200d🚀 \u00a0nbsp",
    "\x01\x7f control \x00 nul",
    "x",
    " ",
    "\n",
    "",
]
FOX = "The quick brown fox jumps over the lazy dog. " * 3
TEXTS = [f"{FOX}{i}{i}{i} def f_{i}(x):\n    return x\n" for i in range(200)]
SPECIALS = "<pad><eos> [PAD] </s><s> <|endoftext|> <|im_end|>"


def trained():
    return train_tokenizer(iter(TEXTS), 400)


def pretrained(folder, *, bos=True, eos="</s>", pad=None, config=None, truncation=None, end_too=False):
    """A folder as others publish it: special tokens of its own, a post-processor that adds BOS, perhaps truncation."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = [token for token in ("<s>", eos, pad) if token]
    trainer = trainers.BpeTrainer(
        vocab_size=350,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    if bos:
        ids = [("<s>", backend.token_to_id("<s>")), (eos, backend.token_to_id(eos))]
        single = f"<s> $A {eos}" if end_too else "<s> $A"
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    if truncation:
        backend.enable_truncation(truncation)
        backend.enable_padding(length=truncation)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def kinds(tmp_path):
    folder = pretrained(tmp_path / "pretrained", pad="<pad>", config={"eos_token": "</s>"})
    return {"bytes": byte_tokenizer(), "trained": trained(), "pretrained": load_tokenizer(folder)}


@pytest.mark.parametrize("kind", ["bytes", "trained", "pretrained"])
def test_round_trip_and_no_special_id_from_text(tmp_path, kind):
    tokenizer = kinds(tmp_path)[kind]
    prefix = list(tokenizer.prefix)
    specials = {tokenizer.pad_token_id, tokenizer.eos_token_id, *prefix}
    for text, ids in zip([*SAMPLES, SPECIALS], tokenizer.encode_batch([*SAMPLES, SPECIALS]), strict=True):
        assert ids[: len(prefix)] == prefix
        assert not specials & set(ids[len(prefix) :])
        assert all(0 <= token < tokenizer.vocab_size for token in ids)
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode_batch([text], continued=True) == [ids[len(prefix) :]]


@pytest.mark.parametrize("kind", ["bytes", "trained", "pretrained"])
def test_transformers_loads_what_was_saved(tmp_path, kind):
    ours = kinds(tmp_path)[kind]
    ours.save(tmp_path / "saved")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.eos_token_id, ours.pad_token_id)
    assert len(theirs) == ours.vocab_size
    for text, ids in zip(SAMPLES, ours.encode_batch(SAMPLES), strict=True):
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids, skip_special_tokens=True) == text
    again = load_tokenizer(tmp_path / "saved")
    assert again.digest == ours.digest
    assert again.encode_batch(SAMPLES) == ours.encode_batch(SAMPLES)


def test_the_byte_tokenizer_is_the_bytes():
    tokenizer = byte_tokenizer()
    assert (tokenizer.vocab_size, tokenizer.pad_token_id, tokenizer.eos_token_id) == (258, 0, 1)
    for text, ids in zip(SAMPLES, tokenizer.encode_batch(SAMPLES), strict=True):
        assert ids == [2 + byte for byte in text.encode()]


def test_training_is_deterministic_and_reaches_its_size():
    first, second = trained(), trained()
    assert first.digest == second.digest != train_tokenizer(iter(TEXTS), 401).digest
    assert (first.vocab_size, first.pad_token_id, first.eos_token_id) == (400, 0, 1)
    assert first.backend.id_to_token(0) == "<pad>"
    assert first.backend.id_to_token(1) == "<eos>"
    assert len(first.encode_batch(TEXTS[:1])[0]) < len(TEXTS[0]) / 2


def test_training_reads_a_bounded_part(monkeypatch):
    monkeypatch.setattr("forge_common.data.tokenizer.SAMPLE_CHARACTERS", 3000)

    def endless():
        while True:
            yield from TEXTS

    assert train_tokenizer(endless(), 300).vocab_size == 300


def test_a_vocabulary_out_of_reach_is_refused_with_the_largest_possible_one():
    with pytest.raises(UserError, match=r"too little.*train:2"):
        train_tokenizer(iter(["ab ab"]), 4096)
    with pytest.raises(UserError, match="258"):
        train_tokenizer(iter(TEXTS), 257)
    assert train_tokenizer(iter([]), 258).vocab_size == 258


def test_truncation_and_padding_in_the_file_do_not_affect_training(tmp_path):
    tokenizer = load_tokenizer(pretrained(tmp_path / "t", truncation=8))
    (ids, short) = tokenizer.encode_batch([TEXTS[0] * 10, "a"])
    assert tokenizer.decode(ids) == TEXTS[0] * 10
    assert len(short) == 2  # BOS and the letter


def test_eos_and_pad_are_found_where_they_are_declared(tmp_path):
    def loaded(name, config=None, eos="</s>", pad=None, wanted=None, **others):
        folder = pretrained(tmp_path / name, eos=eos, pad=pad, config=config)
        for file, content in others.items():
            (folder / f"{file}.json").write_text(json.dumps(content))
        tokenizer = load_tokenizer(folder, wanted)
        token = tokenizer.backend.id_to_token
        return token(tokenizer.eos_token_id), None if tokenizer.pad_token_id is None else token(tokenizer.pad_token_id)

    assert loaded("flag", {"eos_token": "</s>"}, wanted="<s>") == ("<s>", None)
    assert loaded("config", {"eos_token": {"content": "<fin>"}}, eos="<fin>") == ("<fin>", None)
    assert loaded("model", eos="<fin>", config={"eos_token_id": [1, 0]}) == ("<fin>", None)
    assert loaded("generation", eos="<fin>", generation_config={"eos_token_id": 1}) == ("<fin>", None)
    assert loaded("common") == ("</s>", None)
    assert loaded("pad", {"pad_token": "[PAD]"}, pad="[PAD]") == ("</s>", "[PAD]")
    assert loaded("pad by name", pad="<|pad|>") == ("</s>", "<|pad|>")
    assert loaded("pad is eos", {"pad_token": "</s>", "eos_token": "</s>"}) == ("</s>", None)
    with pytest.raises(UserError, match="--eos-token"):
        loaded("unknown", eos="<fin>")
    with pytest.raises(UserError, match=r"--eos-token '</S>'.*did you mean '</s>'"):
        loaded("wrong flag", wanted="</S>")


def test_a_post_processor_that_adds_eos_adds_it_once(tmp_path):
    tokenizer = load_tokenizer(pretrained(tmp_path / "t", end_too=True))
    assert (tokenizer.prefix, tokenizer.suffix) == ((0,), (1,))


def test_the_digest_knows_eos_and_pad():
    tokenizer = trained()
    assert Tokenizer(tokenizer.backend, 0, None).digest != tokenizer.digest


def no_text(characters):
    raise AssertionError("text is read for train:VOCAB alone")


def test_each_form_of_the_tokenizer_flag_gives_its_tokenizer(tmp_path):
    asked = []

    def sample(characters):
        asked.append(characters)
        return iter(TEXTS)

    folder = pretrained(tmp_path / "t")
    assert resolve("bytes", no_text).digest == byte_tokenizer().digest
    assert resolve("train:400", sample).digest == trained().digest
    assert resolve(str(folder), no_text).digest == resolve(str(folder / "tokenizer.json"), no_text).digest
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.json").write_text("{")
    for bad in ("train:", "train:many", "train:-5", "byte", str(tmp_path / "empty"), str(tmp_path / "none.json")):
        with pytest.raises(UserError, match=r"--tokenizer.*train:VOCAB.*bytes"):
            resolve(bad, sample)
    with pytest.raises(UserError, match=r"broken\.json"):
        resolve(str(tmp_path / "broken.json"), no_text)
    with pytest.raises(UserError, match="--eos-token"):
        resolve("bytes", no_text, eos_token="<eos>")
    with pytest.raises(UserError, match="too little"):
        resolve("train:100000", sample)
    assert asked[0] == 400 * 8192 and asked[-1] == 64 << 20
