"""Untrusted tokenizers: an invalid one is refused, and the message names the file."""

import json

import pytest
from small_artifacts import refused, tokenizer_with

from forge_common.data.tokenizer import byte_tokenizer, load_tokenizer


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
