"""What is published is read back before it has its final name; what cannot be read leaves that name as it was."""

import dataclasses
import os
import re
import stat

import pytest
import torch
import yaml
from small_artifacts import CONFIG, MODULES, build, counts

import train_module
from forge_common.artifacts.card import model_card
from forge_common.artifacts.module_folder import read_module, write_module
from forge_common.artifacts.publish import command, losses_line
from forge_common.artifacts.trunk_folder import read_trunk, write_trunk
from forge_common.errors import UserError
from forge_common.files import atomic


def contents(folder) -> dict:
    """Every file below, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def compiled_names(tensors: dict) -> dict:
    return {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}


def without_one(tensors: dict) -> dict:
    return dict(list(tensors.items())[1:])


def narrower(tensors: dict) -> dict:
    name = max(tensors)
    return tensors | {name: tensors[name][..., :-1].contiguous()}


def not_finite(tensors: dict) -> dict:
    name = max(tensors)
    return tensors | {name: torch.full_like(tensors[name], torch.inf)}


WRONG = [compiled_names, without_one, narrower, not_finite]


@pytest.mark.parametrize("older", [True, False], ids=["replaces", "new"])
@pytest.mark.parametrize("wrong", WRONG, ids=lambda change: change.__name__)
def test_a_trunk_that_cannot_be_read_back_is_not_published(root, tmp_path, wrong, older):
    place = tmp_path / "out" / "trunk"
    trunk, tokenizer, _ = read_trunk(str(root / "trunk"))
    if older:
        write_trunk(place, trunk.state_dict(), CONFIG, tokenizer, {}, counts(0, moments=False))
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match="was not written, since what was read back is wrong") as caught:
        write_trunk(place, wrong(trunk.state_dict()), CONFIG, tokenizer, {}, counts(0, moments=False))
    assert str(caught.value).startswith(str(place)) and ".tmp-" not in str(caught.value)
    assert contents(tmp_path / "out") == before and place.exists() == older
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize("older", [True, False], ids=["replaces", "new"])
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("wrong", WRONG, ids=lambda change: change.__name__)
def test_a_module_that_cannot_be_read_back_is_not_published(root, tmp_path, wrong, name, older):
    place = tmp_path / "out" / "module"
    tensors, metadata = read_module(root / name, read_trunk(str(root / "trunk"))[2])
    described = {key: metadata[key] for key in ("name", "kind", "layers", "width", "rank")}
    described |= {key: metadata[key] for key in ("trunk_digest", "tokenizer_digest")}
    if older:
        write_module(place, tensors, described, counts(1), CONFIG)
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match="was not written, since what was read back is wrong"):
        write_module(place, wrong(tensors), described, counts(1), CONFIG)
    with pytest.raises(UserError, match="unigrams are not 258 codes"):
        write_module(place, tensors, described, narrower(counts(1)), CONFIG)
    assert contents(tmp_path / "out") == before and place.exists() == older
    assert not list((tmp_path / "out").glob(".*"))


def test_configuration_tokenizer_and_statistics_are_read_back(root, tmp_path):
    """A configuration of another size, one with fewer tokens than the tokenizer, statistics of another vocabulary."""
    trunk, tokenizer, _ = read_trunk(str(root / "trunk"))
    for change in ({"intermediate_size": 16}, {"vocab_size": 200}):
        config = dataclasses.replace(CONFIG, **change)
        with pytest.raises(UserError, match="was not written"):
            write_trunk(tmp_path / "trunk", trunk.state_dict(), config, tokenizer, {})
    with pytest.raises(UserError, match="was not written"):
        wrong = counts(0, moments=False) | {"unigrams": torch.zeros(9, dtype=torch.uint8)}
        write_trunk(tmp_path / "trunk", trunk.state_dict(), CONFIG, tokenizer, {}, wrong)
    assert not (tmp_path / "trunk").exists()


def test_a_bit_that_the_disk_changes_is_found_before_the_rename(root, tmp_path, monkeypatch):
    trunk, tokenizer, _ = read_trunk(str(root / "trunk"))
    sync = atomic.sync

    def damage(folder):
        sync(folder)
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")

    monkeypatch.setattr(atomic, "sync", damage)
    with pytest.raises(UserError, match="the digest is"):
        write_trunk(tmp_path / "trunk", trunk.state_dict(), CONFIG, tokenizer, {})
    assert not (tmp_path / "trunk").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_published_files_follow_the_umask(tmp_path, umask):
    """The trunk, the modules and the assembled model, weights included."""
    before = os.umask(umask)
    try:
        build(tmp_path / "made")
    finally:
        os.umask(before)
    for path in (tmp_path / "made").rglob("*"):
        expected = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


LICENCES = [
    "apache-2.0",
    "no",
    "1.0",
    "GPL: version 3",
    'it\'s "mine"',
    "# none",
    "[a, b]",
    "*all",
    "- x",
    "---",
    "a\nb: c",
]
LICENCES += ["a\n---\nb", "é🙂 三", "x" * 200, "{", "%TAG", "`|`", "null", " ", "\t", "a\u2028b", "\x07"]


@pytest.mark.parametrize("licence", LICENCES)
def test_the_card_is_valid_for_any_licence(licence):
    """As YAML it holds the licence and nothing else that is of the user; the table has two columns."""
    card = model_card("module a", {"licence": licence, "sources": ["a|b"]})
    found = re.fullmatch(r"---\n(.*?)\n---\n(.*)", card, re.DOTALL)  # as the hub finds it
    assert found
    content = yaml.safe_load(found[1])
    named = (
        {"license": licence}
        if licence == "apache-2.0"
        else {"license": "other", "license_name": content.get("license_name")}
    )
    fixed = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["forge"]}
    assert content == fixed | named and re.fullmatch(r"[a-z0-9.-]+", content.get("license_name", "x"))
    rows = [line for line in found[2].split("\n") if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows) and len(rows) == 4


@pytest.mark.parametrize(("after", "warns"), [(3.9, False), (4.0, True), (4.5, True)])
def test_a_module_that_learned_nothing_of_its_own_text_is_published_with_a_warning(after, warns):
    """That on general text may rise: the assembled model has the trunk for it."""
    before = {"own": {"tokens": 9, "loss": 4.0}, "general": {"tokens": 9, "loss": 3.0}}
    line, *warnings = losses_line(before, {"own": {"loss": after}, "general": {"loss": 5.0}}).split("\n")
    assert line.endswith(f"own 4.0000 -> {after:.4f}, general 3.0000 -> 5.0000 nats per token")
    assert [warning[:12] for warning in warnings] == ["warning     "] * warns
    assert not warns or "is no better than the trunk on its own held-out text" in warnings[0]


def test_the_command_shows_no_folder_above_a_path(tmp_path):
    """Of a trunk, that is; --data is published as it was given."""
    given = {"name": "law", "data": ("/home/me/law",), "output_dir": tmp_path}
    for trunk, shown in (("/home/me/trunk", "trunk"), (".", "."), ("org/trunk", "org/trunk")):
        line = command(train_module.Settings(trunk=trunk, **given))
        assert line == f"accelerate launch train_module.py --trunk {shown} --name law --data /home/me/law"


HOSTILE = ["a: b", "---", "x\n---\ny", "```\n# head", "[a](b)", "| x |", "<script>", "é🙂", "hf:a/b:c\n- d", "*a &b"]


@pytest.mark.parametrize("word", HOSTILE)
def test_the_card_is_valid_for_any_metadata(word):
    """What a stranger's metadata may hold stays in its place: one value of the front matter, one cell of a table, one
    code block.
    """
    losses = {word: {"tokens": 5, "before": 3.0, "after": 2.0}, "no numbers": {"tokens": word}, "none": word}
    metadata = {
        "name": "a",
        "trunk_digest": "0" * 64,
        "sources": [word, "hf:org/data:en@0.5", f"hf:{word}"],
        "origins": {"trunk": "org/trunk@" + "1" * 40},
        "losses": losses,
        "command": " ".join(word.split()),
    }
    card = model_card("module a", metadata)
    found = re.fullmatch(r"---\n(.*?)\n---\n(.*)", card, re.DOTALL)
    assert found
    content = yaml.safe_load(found[1])
    assert content["base_model"] == ["org/trunk"] and content["base_model_relation"] == "adapter"
    assert "org/data" in content["datasets"] and all(
        re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) for name in content["datasets"]
    )
    assert card.count("\n```") == 2 and [line for line in card.splitlines() if line.startswith("#")] == [
        "# module a",
        "## Losses",
        "## Training",
        "## Metadata",
    ]
    columns = [len(re.findall(r"(?<!\\)\|", line)) for line in found[2].split("\n") if line.startswith("|")]
    assert columns == [5, 5, 5] + [3] * (2 + len(metadata) - 1)


def test_a_card_of_parts_has_a_licence_only_where_all_have_the_same():
    parts = {"modules": ["a"], "digests": {"trunk": "0", "a": "1"}}
    for licences, expected in (
        ({"trunk": "mit", "a": "MIT "}, None),
        ({"trunk": "mit", "a": "mit"}, "mit"),
        ({"a": "mit"}, None),
    ):
        card = model_card("assembled model", parts | {"licences": licences})
        assert yaml.safe_load(card.split("---\n")[1]).get("license") == expected
