"""Untrusted JSON: a value of a wrong type or size is refused, and the message names the file and the field."""

import json

import pytest
from safetensors.torch import save_file
from small_artifacts import CONFIG, assembling, counts, edit, load, refused

from forge_common import assemble, evaluate
from forge_common.artifacts import assembled
from forge_common.artifacts.module_folder import write_module
from forge_common.artifacts.trunk_folder import read_trunk
from forge_common.errors import UserError
from forge_common.files.atomic import read_json
from forge_common.files.tensors import digest
from forge_common.model.config import ModelConfig

INVALID_JSON = [
    '{"a": NaN}',
    '{"a": -Infinity}',
    '{"a": 1e999}',
    '{"a": 1, "a": 2}',
    "[" * 100_000,
    '{"a":' * 100_000,
    "",
    "null",
]
INVALID_JSON += ["[]", "7", "{", '{"a": ' + "9" * 5000 + "}", '\ufeff{"a": 1}', '{"a": "\x01"}']


@pytest.mark.parametrize("content", INVALID_JSON, ids=lambda text: repr(text[:20]))
def test_invalid_json_is_refused(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    assert str(tmp_path / "a.json") in refused(read_json, tmp_path / "a.json")


def test_json_that_is_not_utf_8_or_too_large_is_refused(tmp_path):
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
def test_a_config_with_a_wrong_type_or_size_is_refused(root, name, value):
    """Also in a trunk without digests."""
    (root / "trunk" / "forge.json").unlink()
    edit(root / "trunk" / "config.json", **{name: value})
    assert str(root / "trunk") in refused(read_trunk, str(root / "trunk"))


@pytest.mark.parametrize("value", [[], "1", [None], 1.0, True, 2**40])
def test_an_invalid_eos_token_id_is_refused(value):
    """Only from_hf reads it: read_trunk takes the id of the tokenizer."""
    assert "eos_token_id" in refused(ModelConfig.from_hf, CONFIG.to_hf() | {"eos_token_id": value}, "here")


@pytest.mark.parametrize("name", ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"])
@pytest.mark.parametrize("value", [None, 0, -1, "8", 1e300, True])
def test_invalid_rope_parameters_are_refused(name, value):
    config = CONFIG.to_hf()
    config["rope_parameters"] = config["rope_parameters"] | {name: value}
    assert name in refused(ModelConfig.from_hf, config, "here")
    config["rope_parameters"] |= CONFIG.rope_scaling | {"low_freq_factor": 4.0}
    assert "high_freq_factor" in refused(ModelConfig.from_hf, config, "here")


def test_a_changed_config_is_refused_even_if_the_tensors_fit(root):
    """Another epsilon: the same shapes, but another model."""
    edit(root / "trunk" / "config.json", rms_norm_eps=1e-3)
    assert "config_digest" in refused(read_trunk, str(root / "trunk"))


TEXT = {"source": "a", "digest": None, "val_fraction": 0.1}
FIELDS = {
    "forge.json": {
        "format_version": [None, 2, "1", True],
        "digest": [5, "", None, "0" * 64],
        "tokenizer_digest": [None, [], "x"],
        "texts_before": [5, [5], [{}], [TEXT | {"source": 5}], [TEXT | {"digest": "x"}], [TEXT | {"val_fraction": 2}]],
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
        "alpha": ["5", -1, True, 1e30, [1]],
        "targets": ["q_proj", ["norm"], [5], [["q_proj"]]],
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
        "licences": [[], "mit", {"one": 5}, {"one": "mit\nevil: true"}, {"one": "x" * 201}],
        "version": [0, -1, "1", 1.0, True],
        "history": ["added", [5], ["a\nb"], ["x" * 301]],
    },
}
FOLDERS = {"forge.json": "trunk", "module.json": "one", "assembled.json": "assembled"}


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [(file, name, value) for file, fields in FIELDS.items() for name, values in fields.items() for value in values],
    ids=lambda value: repr(value)[:30],
)
def test_metadata_with_a_wrong_type_or_value_is_refused(root, file, name, value):
    folder = root / FOLDERS[file]
    edit(folder / file, **{name: value})
    message = refused(load, folder)
    assert str(folder) in message and len(message) < 2000


@pytest.mark.parametrize("name", ["temperature", "switch", "own", "trunk_share", "sharpness"])
@pytest.mark.parametrize("value", [-1, "x", None, True, 1e300])
def test_router_numbers_of_a_wrong_type_are_refused(root, name, value):
    path = root / "assembled" / "assembled.json"
    edit(path, tuning=json.loads(path.read_text())["tuning"] | {name: value})
    assert str(root / "assembled") in refused(load, root / "assembled")


@pytest.mark.parametrize(("name", "value"), [("switch", 1.5), ("trunk_share", 0)])
def test_router_numbers_outside_their_bounds_are_refused(root, name, value):
    path = root / "assembled" / "assembled.json"
    edit(path, tuning=json.loads(path.read_text())["tuning"] | {name: value})
    message = refused(load, root / "assembled")
    assert f"{name} " in message and "must lie" in message


def test_statistics_of_an_assembled_model_match_their_digest(root):
    """Those beside assembled.json are used instead of the trunk's, and need a digest in assembled.json."""
    path, metadata_file = root / "assembled" / "statistics.safetensors", root / "assembled" / "assembled.json"
    before = metadata_file.read_text()
    statistics = counts(7, moments=False)
    save_file(statistics, path)
    edit(metadata_file, statistics_digest=digest(statistics))
    load(root / "assembled")
    metadata_file.write_text(before)
    assert str(path) in refused(load, root / "assembled")


def test_evaluate_checks_the_metadata_that_it_reads_first(root):
    edit(root / "one" / "module.json", val_fraction="0.5")
    settings = evaluate.Settings(str(root / "trunk"), ("a=b",), module=(root / "one",))
    assert "val_fraction" in refused(evaluate.metadata_of_parts, settings)


# ---- Names ----


UNSAFE_NAMES = [
    "",
    ".",
    "..",
    "../evil",
    "../../evil",
    "/tmp/evil",
    "a/b",
    "a\\b",
    "C:evil",
    "~",
    "-rf",
    ".hidden",
    "a\nb",
    "a\0b",
]
UNSAFE_NAMES += [
    "a b",
    "$HOME",
    "a;b",
    "*",
    "con",
    "NUL.txt",
    "com1",
    "lpt9.x",
    "a.",
    "\x1b[31m",
    "é" * 9,
    "x" * 65,
    "trunk",
    "TRUNK",
]
UNSAFE_NAMES += ["\u202egpj", 5, True, None, [], {}, ["one"]]


@pytest.mark.parametrize("name", UNSAFE_NAMES, ids=repr)
def test_an_unsafe_name_is_refused_and_nothing_is_written(root, name, tmp_path):
    edit(root / "one" / "module.json", name=name)
    before = sorted(tmp_path.rglob("*"))
    message = refused(assemble.main, assembling(root))
    assert "name" in message and str(root / "one" / "module.json") in message and message.isprintable()
    edit(root / "assembled" / "assembled.json", modules=[name, "two"])
    message = refused(assembled.read_assembled, str(root / "assembled"))
    assert "modules" in message and "assembled.json" in message and message.isprintable()
    assert sorted(tmp_path.rglob("*")) == before
    if name is not None:
        with pytest.raises(UserError, match="cannot be called"):
            write_module(tmp_path / "written", {}, {"name": name}, {}, CONFIG)


@pytest.mark.parametrize("name", ["a", "law", "cpp-2.1", "Recht_und_Gesetz", "c++", "conx", "x" * 64])
def test_a_safe_name_is_accepted(root, name):
    edit(root / "one" / "module.json", name=name)
    assert assemble.main(assembling(root)) == 0
    assert (root / "new" / "assembled" / "modules" / name / "module.json").is_file()
    load(root / "new" / "assembled")


def test_names_that_differ_only_in_case_are_refused(root):
    edit(root / "one" / "module.json", name="TWO")
    assert "both called" in refused(assemble.main, assembling(root))
