"""Fields of other kinds and sizes in the JSON of an artifact, and tokenizers that are none: refused, and the field named."""

import json
import shutil

import pytest
import specimens
from safetensors.torch import save_file
from specimens import edit, refused, spoiled

from forge_common import evaluate
from forge_common.artifacts import artifact
from forge_common.data.tokenizer import byte_tokenizer, load_tokenizer
from forge_common.files.atomic import read_json
from forge_common.model.config import ModelConfig


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return specimens.build(tmp_path_factory.mktemp("original"))


@pytest.fixture
def made(original, tmp_path):
    """A copy of the specimens that a test may spoil."""
    shutil.copytree(original, tmp_path / "made")
    return tmp_path / "made"


# ---- JSON ----

NO_JSON = [
    '{"a": NaN}',
    '{"a": -Infinity}',
    '{"a": 1e999}',
    '{"a": 1, "a": 2}',
    "[" * 100_000,
    '{"a":' * 100_000,
    "",
    "null",
]
NO_JSON += ["[]", "7", "{", '{"a": ' + "9" * 5000 + "}", '\ufeff{"a": 1}', '{"a": "\x01"}']


@pytest.mark.parametrize("content", NO_JSON, ids=lambda text: repr(text[:20]))
def test_what_is_not_plain_json_is_refused(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    assert str(tmp_path / "a.json") in refused(read_json, tmp_path / "a.json")


def test_json_that_is_no_text_or_too_long_is_refused(tmp_path):
    path = tmp_path / "a.json"
    for content in (b'{"a": "\xff"}', '{"a": 1}'.encode("utf-16"), b'{"a": 1}' + b" " * (16 << 20)):
        path.write_bytes(content)
        assert str(path) in refused(read_json, path)


CONFIGS = {
    "num_hidden_layers": [10**9, 65_536, 3, 0, -1, "2", 2.0, True, [2]],
    "hidden_size": [2**62, 0, "8", 8.0, {"x": 8}],
    "vocab_size": [2**31, 0, 1],
    "num_attention_heads": [0, -2, "2", 3, 4],
    "num_key_value_heads": [0, 3, 2.0],
    "head_dim": [0, 3, -2, 2**20],
    "num_local_experts": [10**9, 65_536, -1, "4"],
    "max_position_embeddings": [0, -1, 2**40, "64", 1e9],
    "rms_norm_eps": [-1, 2, "1e-5", [1e-5]],
    "initializer_range": [-1.0, 1e30, "x"],
    "rope_parameters": [
        [1, 2],
        "default",
        {"rope_type": "llama3"},
        {"rope_theta": "x"},
        {"rope_theta": 0},
        {"rope_theta": 1e-300},
    ],
    "tie_word_embeddings": ["false", 0, []],
    "pad_token_id": ["0", 2**40, {}],
    "sliding_window": ["64", -1, True],
    "model_type": [5, ["llama"], "LLAMA"],
    "hidden_act": [["silu"], "gelu"],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in CONFIGS.items() for value in values], ids=repr
)
def test_a_config_of_other_types_and_sizes_is_refused(made, name, value):
    """Also by a trunk that states no digests."""
    (made / "trunk" / "forge.json").unlink()
    edit(made / "trunk" / "config.json", **{name: value})
    assert str(made / "trunk") in refused(artifact.read_trunk, str(made / "trunk"))


@pytest.mark.parametrize("value", [[], "1", [None], 1.0, True, 2**40])
def test_an_end_that_is_no_id_is_refused(value):
    """A trunk's is its tokenizer's, whatever its config.json says."""
    assert "eos_token_id" in refused(ModelConfig.from_hf, specimens.CONFIG.to_hf() | {"eos_token_id": value}, "here")


@pytest.mark.parametrize("name", ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"])
@pytest.mark.parametrize("value", [None, 0, -1, "8", 1e300, True])
def test_positions_that_are_no_numbers_are_refused(name, value):
    config = specimens.CONFIG.to_hf()
    config["rope_parameters"] = config["rope_parameters"] | {name: value}
    assert name in refused(ModelConfig.from_hf, config, "here")
    config["rope_parameters"] |= specimens.CONFIG.rope_scaling | {"low_freq_factor": 4.0}
    assert "high_freq_factor" in refused(ModelConfig.from_hf, config, "here")


def test_a_config_that_was_changed_is_refused_though_the_tensors_fit(made):
    """Other positions, another epsilon: the same shapes, another model."""
    edit(made / "trunk" / "config.json", rms_norm_eps=1e-3)
    assert "config_digest" in refused(artifact.read_trunk, str(made / "trunk"))


PASSPORTS = {
    "forge.json": {
        "format_version": [None, 2, "1", True],
        "digest": [5, "", None, "0" * 64],
        "tokenizer_digest": [None, [], "x"],
    },
    "module.json": {
        "format_version": [None, 2, 1.0],
        "kind": ["trunk", "expert+head", 5, None, ["ffn"]],
        "layers": [
            [],
            [True],
            [-1],
            [0, 0],
            [1, 1],
            [1, 0],
            [2],
            [10**9],
            list(range(10**5)),
            "all",
            None,
            [1.0],
            [[1]],
        ],
        "width": [2**20, 2**21, -1, "5", 5.0, 6, True, 10**30],
        "digest": [5, None, "x" * 64, ["0" * 64]],
        "trunk_digest": [5, None, "0" * 64],
        "statistics_digest": [5, "0" * 64, {}],
        "tensor_digests": [5, ["x"], {"a": 1}],
        "shapes": [[], {"lm_head.weight": [9, 9]}, {"x": "y"}, {"x": [-1]}],
        "val_fraction": ["0.1", 2, -1, [0.1], True],
        "licence": [5, "mit\nevil: true", "x" * 1000, ["mit"]],
        "tokens_seen": ["9", -1, 1.5, []],
        "steps": ["3", -3],
        "losses": [[], 5, "x"],
    },
    "assembled.json": {
        "format_version": [None, 2],
        "router": [None, "magic", 5, ["context"], "learned"],
        "top_k": [True, -1, "1", 1.0, None],
        "modules": [None, "one", ["one", "one"], ["one", "ONE"], ["three"], {"one": 1}, []],
        "tuning": [None, {}, [], 5, {"temperature": 0.2}, {"x": 1}],
        "digests": [None, [], {}, {"trunk": 5}, {"trunk": "0" * 64, "one": "0" * 64, "two": "0" * 64}],
        "val_fraction": ["0.1", 2],
        "statistics_digest": ["0" * 64, 5],
    },
}
WHERE = {"forge.json": "trunk", "module.json": "one", "assembled.json": "assembled"}


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [(file, name, value) for file, fields in PASSPORTS.items() for name, values in fields.items() for value in values],
    ids=lambda value: repr(value)[:30],
)
def test_a_passport_of_other_types_and_sizes_is_refused(made, file, name, value):
    folder = made / WHERE[file]
    edit(folder / file, **{name: value})
    said = refused(specimens.load, folder)
    assert str(folder) in said and len(said) < 2000


@pytest.mark.parametrize("name", ["temperature", "switch", "own", "trunk_share", "sharpness"])
@pytest.mark.parametrize("value", [-1, "x", None, True, 1e300])
def test_numbers_of_a_router_that_are_none_are_refused(made, name, value):
    path = made / "assembled" / "assembled.json"
    edit(path, tuning=json.loads(path.read_text())["tuning"] | {name: value})
    assert str(made / "assembled") in refused(specimens.load, made / "assembled")


@pytest.mark.parametrize(("name", "value"), [("switch", 1.5), ("trunk_share", 0)])
def test_numbers_of_a_router_that_give_no_gates_are_refused(made, name, value):
    path = made / "assembled" / "assembled.json"
    edit(path, tuning=json.loads(path.read_text())["tuning"] | {name: value})
    assert f"a {name} of" in refused(specimens.load, made / "assembled")


def test_statistics_of_the_whole_are_those_that_it_states(made):
    """Beside assembled.json they come before the trunk's own: neither exchanged nor without their digest."""
    path, facts = made / "assembled" / "statistics.safetensors", made / "assembled" / "assembled.json"
    before = facts.read_text()
    counts = specimens.counts(7, moments=False)
    save_file(counts, path)
    edit(facts, statistics_digest=artifact.digest(counts))
    specimens.load(made / "assembled")
    facts.write_text(before)
    assert str(path) in refused(specimens.load, made / "assembled")


def test_what_evaluate_reads_first_is_checked_as_well(made):
    edit(made / "one" / "module.json", val_fraction="0.5")
    settings = evaluate.Settings(str(made / "trunk"), ("a=b",), module=(made / "one",))
    assert "val_fraction" in refused(evaluate.held_out, settings)


# ---- Tokenizers ----


def template(*ids: int) -> dict:
    special = {"<eos>": {"id": "<eos>", "ids": list(ids), "tokens": ["<eos>"] * len(ids)}}
    single = [{"SpecialToken": {"id": "<eos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


REPLACE = {"type": "Replace", "pattern": {"String": "x"}, "content": "x" * 99}
TOKENIZERS = {
    "no JSON": "{",
    "deep": "[" * 100_000,
    "an empty vocabulary": spoiled("model", "vocab", value={}),
    "an id of four billion": spoiled("model", "vocab", "a", value=2**32 - 1),
    "an id of 17 million": spoiled("model", "vocab", "a", value=1 << 24),
    "ids before the text, beyond the vocabulary": spoiled("post_processor", value=template(999)),
    "a panic while it is read": spoiled("normalizer", value={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "a panic while it encodes": spoiled("pre_tokenizer", value={"type": "FixedLength", "length": 0}),
    "a special token that is none": spoiled("post_processor", value=template() | {"special_tokens": {}}),
    "no unknown token": spoiled("model", value={"type": "WordLevel", "unk_token": "?", "vocab": {"a": 0, "<eos>": 1}}),
    "nothing of a text": spoiled("normalizer", value=REPLACE | {"content": ""}),
    "a broken expression": spoiled("normalizer", value=REPLACE | {"pattern": {"Regex": "(("}}),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_that_is_none_is_refused(tmp_path, name):
    (tmp_path / "tokenizer.json").write_text(TOKENIZERS[name])
    assert str(tmp_path / "tokenizer.json") in refused(load_tokenizer, tmp_path)


def test_a_tokenizer_that_fails_at_a_text_is_refused_there(tmp_path):
    words = {"type": "WordLevel", "unk_token": "?", "vocab": {"x": 0, "<eos>": 1}}
    (tmp_path / "tokenizer.json").write_text(spoiled("model", value=words))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode_batch(["x"]) == [[0]]
    assert "cannot encode" in refused(tokenizer.encode_batch, ["words that it has not"])


@pytest.mark.parametrize("id", [-1, 258, 2**24, 2**32, 10**30, True, "1", None])
def test_ids_that_no_token_has_are_not_taken(tmp_path, id):
    """For EOS and PAD: what is declared but not in the vocabulary is as if it were not declared."""
    byte_tokenizer().save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token_id": id, "pad_token_id": id}))
    assert load_tokenizer(tmp_path).digest == byte_tokenizer().digest
