"""Modules of strangers: weights that break a model are refused, statistics and losses that do not fit what is claimed
are reported.
"""

import dataclasses
import json
import math
import shutil

import launch
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_artifacts import CONFIG, MODULES, assembling, counts, edit, refused

from forge_common import assemble, evaluate, merge
from forge_common.artifacts import checks, module_table, trial
from forge_common.artifacts.module_folder import write_module
from forge_common.files.tensors import digest
from forge_common.model.modules import plug_in
from forge_common.model.trunk import Trunk
from forge_common.routing import statistics
from forge_common.routing.statistics import encode

HUGE = 3e38  # finite in float32 and in bfloat16
ROWS = [
    ("one", "model.layers.1.addition.gate_proj.weight"),
    ("one", "model.layers.1.addition.up_proj.weight"),
    ("one", "model.layers.1.addition.down_proj.weight"),
    ("one", "lm_head.weight"),
    ("two", "model.layers.1.mlp.up_proj.lora_A"),
    ("two", "model.layers.1.mlp.down_proj.lora_B"),
]


def rewrite(folder, change, name="module"):
    """Changes the tensors of a file of a module's folder, and its digests, as their author would."""
    tensors = load_file(folder / f"{name}.safetensors")
    change(tensors)
    save_file(tensors, folder / f"{name}.safetensors")
    key = "digest" if name == "module" else "statistics_digest"
    edit(folder / "module.json", **{key: digest(tensors), "tensor_digests": {}})


def with_huge_row(folder, key, value=HUGE):
    rewrite(folder, lambda tensors: tensors[key][1].fill_(value))


def unigrams(folder, values) -> None:
    """Replaces a module's counts of tokens."""
    codes = torch.from_numpy(encode(torch.as_tensor(values, dtype=torch.float64).numpy()))
    rewrite(folder, lambda tensors: tensors["unigrams"].copy_(codes), "statistics")


def text_like(seed: int, total: int) -> torch.Tensor:
    """Counts of the tokens of an invented text: Zipf's law over a random order."""
    order = torch.randperm(CONFIG.vocab_size, generator=torch.Generator().manual_seed(seed)) + 1
    return (total / order / (1 / order).sum()).round()


def printed_by(capsys, settings) -> list[str]:
    capsys.readouterr()
    assert assemble.main(settings) == 0
    return capsys.readouterr().out.splitlines()


# ---- The trial ----


@pytest.mark.parametrize(("name", "key"), ROWS)
def test_huge_weights_are_refused_by_assemble_and_merge(root, tmp_path, name, key):
    with_huge_row(root / name, key)
    for command, settings in (
        (assemble, assembling(root)),
        (merge, merge.Settings(str(root / "trunk"), root / name, root / "new" / "merged")),
    ):
        message = refused(command.main, settings)
        assert message.startswith(f"{root / name}: ") and "not finite for random tokens" in message
    assert not list((root / "new").glob("*")) and ".tmp-" not in message


def test_low_rank_factors_whose_product_is_infinite_are_refused(root):
    for key in ("lora_A", "lora_B"):
        with_huge_row(root / "two", f"model.layers.1.mlp.up_proj.{key}", 1e25)
    rewrite(root / "two", lambda tensors: tensors["model.layers.1.mlp.up_proj.lora_B"].fill_(1e25))
    assert "not finite" in refused(merge.main, merge.Settings(str(root / "trunk"), root / "two", root / "merged"))


def test_squares_of_the_hidden_states_must_be_finite(root):
    """1e25: every value is finite, but the norm of its squares is 0, for every text."""
    with_huge_row(root / "one", "model.layers.1.addition.down_proj.weight", 1e25)
    assert "hidden states after layer 1" in refused(assemble.main, assembling(root))


def test_weights_that_spoil_the_trunks_own_text_are_refused():
    """The trunk is sure of its next tokens. Rows of the head in another order are as large as before, and wrong."""
    torch.manual_seed(0)
    trunk = Trunk(dataclasses.replace(CONFIG, tie_word_embeddings=False))
    with torch.no_grad():
        trunk.lm_head.weight.mul_(100)
    own = trial.make_reference(trunk, "trunk")
    assert own.loss < 0.7 * math.log(CONFIG.vocab_size)
    assert trial.check_module(trunk, own, "same") == trial.Effect(1.0, 0.0)
    other = Trunk(trunk.config)
    other.load_state_dict(trunk.state_dict())
    with torch.no_grad():
        other.lm_head.weight.copy_(trunk.lm_head.weight.flip(0))
    assert "place: on text that the trunk generates, its loss is " in refused(trial.check_module, other, own, "place")


def test_weights_that_spoil_the_text_of_the_modules_counts_are_refused():
    """Rows of the head for 40 tokens are wrong: refused where the module's counts are of these tokens, not where they
    are of others.
    """
    torch.manual_seed(0)
    trunk = Trunk(dataclasses.replace(CONFIG, tie_word_embeddings=False))
    with torch.no_grad():
        trunk.lm_head.weight.mul_(60)
    other = Trunk(trunk.config)
    other.load_state_dict(trunk.state_dict())
    with torch.no_grad():
        other.lm_head.weight[100:140] = trunk.lm_head.weight[100:140].flip(0)
    own = trial.make_reference(trunk, "trunk")
    assert own.writes_text

    def counted(first: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(first, first + 40, (40, 500), generator=torch.Generator().manual_seed(0))
        return statistics.count(list(ids.numpy()), CONFIG.vocab_size, 1, 2)[0]

    assert trial.check_module(trunk, own, "same", counted(100)).excess_on_own_text == 0
    assert trial.check_module(other, own, "place").excess_on_trunk_text < trial.MOST_ON_TRUNK_TEXT
    assert abs(trial.check_module(other, own, "place", counted(180)).excess_on_own_text) < checks.LARGE_ON_OWN_TEXT
    message = refused(trial.check_module, other, own, "place", counted(100))
    assert message.startswith("place: on text that its own counts call likely, its loss is ")


def test_a_loss_far_above_the_trunks_needs_a_flag(root, capsys, monkeypatch):
    """A head of larger and larger logits: accepted, then only with --allow-worse if the trunk writes text, then refused."""
    rewrite(root / "one", lambda tensors: tensors["lm_head.weight"].mul_(3))
    assert not any("warning     one: its loss" in line for line in printed_by(capsys, assembling(root)))
    rewrite(root / "one", lambda tensors: tensors["lm_head.weight"].mul_(1.8))
    shutil.rmtree(root / "new")
    assert not any("warning     one: its loss" in line for line in printed_by(capsys, assembling(root)))
    monkeypatch.setattr(trial, "MOST_OF_UNTRAINED_LOSS", math.inf)  # as if these random weights wrote text
    worse = assemble.Settings(str(root / "trunk"), (root / "one",), root / "new" / "worse")
    message = refused(assemble.main, worse)
    assert message.startswith("module one: its loss on text that ") and "--allow-worse" in message
    lines = printed_by(capsys, dataclasses.replace(worse, allow_worse=True))
    assert any("warning     one: its loss on text that " in line for line in lines)
    rewrite(root / "one", lambda tensors: tensors["lm_head.weight"].mul_(2))
    broken = assemble.Settings(str(root / "trunk"), (root / "one",), root / "new" / "broken", allow_worse=True)
    assert "do not use this artifact" in refused(assemble.main, broken)


def test_a_loss_above_the_trunks_on_the_text_of_the_counts_is_refused():
    module = checks.CheckedModule({"name": "a"}, 9, None, trial.Effect(1.0, 0.0, checks.LARGE_ON_OWN_TEXT))
    assert checks.weight_warnings(module) == []
    checks.check_worse([module])
    larger = module._replace(effect=trial.Effect(1.0, 0.0, checks.LARGE_ON_OWN_TEXT + 0.1))
    assert [warned.keyword for warned in checks.weight_warnings(larger)] == ["text"]
    assert refused(checks.check_worse, [module, larger]).startswith("module a: its loss on text that its own counts ")


def test_hidden_states_far_larger_than_the_trunks_are_refused(root, capsys):
    """A gate of 1% of them would change every text. At half of the limit there is a warning."""
    key = "model.layers.1.addition.down_proj.weight"
    rewrite(root / "one", lambda tensors: tensors[key].mul_(1e6))
    message = refused(assemble.main, assembling(root))
    assert message.startswith(f"{root / 'one'}: ") and "times those of the trunk" in message
    seen = float(message.split("up to ")[1].split()[0].replace(",", ""))
    rewrite(root / "one", lambda tensors: tensors[key].mul_(trial.MOST_GROWTH / 2 / seen))
    lines = printed_by(capsys, assembling(root))
    assert any("one: its hidden states are up to 500 times those of the trunk" in line for line in lines)


@pytest.mark.parametrize(
    ("key", "value"), [("row.bias", 3e38), ("row.weight", 3e38), ("expert.down_proj.weight", 1e30)]
)
def test_experts_are_tried_alone_and_with_their_row(root, key, value):
    """A row of -1e4 closes the expert while it is trained; an assembled model uses it alone."""
    plain = Trunk(CONFIG)
    names = plug_in(plain, "expert", [1])
    tensors = {name: torch.randn_like(plain.state_dict()[name]) * 0.1 for name in names}
    if key.startswith("expert"):
        tensors["model.layers.1.addition.row.bias"].fill_(-1e4)
    metadata = json.loads((root / "one" / "module.json").read_text())
    trunk = {name: metadata[name] for name in ("trunk_digest", "tokenizer_digest")}
    metadata = {"name": "sparse", "kind": "expert", "layers": [1], **trunk}
    write_module(root / "sparse", tensors, metadata, counts(5), CONFIG)
    assert assemble.main(assembling(root, "sparse", "one")) == 0
    tensors[f"model.layers.1.addition.{key}"].fill_(value)
    write_module(root / "sparse", tensors, metadata, counts(5), CONFIG)
    settings = assemble.Settings(str(root / "trunk"), (root / "sparse",), root / "other")
    assert refused(assemble.main, settings).startswith(f"{root / 'sparse'}: ")


def with_huge_trunk(root) -> None:
    path = root / "trunk" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"][1] = HUGE
    save_file(tensors, path)
    edit(root / "trunk" / "forge.json", digest=digest(tensors), tensor_digests={})
    for name in MODULES:
        edit(root / name / "module.json", trunk_digest=digest(tensors))


def test_a_huge_trunk_is_refused_by_its_name(root):
    with_huge_trunk(root)
    assert refused(assemble.main, assembling(root)).startswith(f"{root / 'trunk'}: ")


# ---- Losses that are not finite ----


def test_a_loss_that_is_not_finite_is_an_error_of_evaluate_and_generate(root, text, cache, tmp_path):
    """Of a trunk with a module, and of an assembled model whose part was exchanged after its trial."""
    with_huge_row(root / "one", "lm_head.weight")
    part = root / "assembled" / "modules" / "one"
    with_huge_row(part, "lm_head.weight")
    digests = json.loads((root / "assembled" / "assembled.json").read_text())["digests"]
    digests["one"] = json.loads((part / "module.json").read_text())["digest"]
    edit(root / "assembled" / "assembled.json", digests=digests)
    data = ("--data", f"code={text}", "--cache-dir", cache, "--json", tmp_path / "rows.json")
    for model in (("--model", root / "trunk", "--module", root / "one"), ("--model", root / "assembled")):
        printed = launch.run_python("-m", "forge_common.evaluate", *model, *data, fails=True)
        assert "module:one on code: the loss of a window is" in printed and "Traceback" not in printed
        assert not (tmp_path / "rows.json").exists()
        printed = launch.run_python("-m", "forge_common.generate", *model, "--prompt", "def", fails=True)
        assert "not finite" in printed and "Traceback" not in printed


def test_a_module_is_not_trained_on_a_trunk_without_a_finite_loss(root, text, cache, tmp_path):
    with_huge_trunk(root)
    line = (
        "--trunk",
        root / "trunk",
        "--name",
        "a",
        "--data",
        text,
        "--output-dir",
        tmp_path / "run",
        "--cache-dir",
        cache,
    )
    printed = launch.run("train_module.py", *line, *launch.SIZES, "--general-tokens", 0, "--steps", 2, fails=True)
    assert "the loss on the held-out text (own) is nan" in printed and "Traceback" not in printed


def test_a_mean_loss_that_is_not_finite_is_refused():
    """What --calibrate and --check-data measure."""
    trunk = Trunk(CONFIG)
    windows = [torch.arange(70, 90).numpy()]
    assert math.isfinite(trial.mean_loss(trunk, windows, "it"))
    trunk.model.embed_tokens.weight.data[70] = float("inf")
    assert "the loss of it is " in refused(trial.mean_loss, trunk, windows, "it")


# ---- Statistics ----


def keywords(metadata, values) -> list[str]:
    counted = None if values is None else torch.as_tensor(values, dtype=torch.float32)
    return [warned.keyword for warned in checks.statistics_warnings(metadata, counted)]


def test_statistics_are_compared_with_what_is_stated():
    def stated(tokens, seen=1_000_000, **more):
        return {"statistics": {"tokens": tokens, "documents": 99, "min_documents": 2}, "tokens_seen": seen, **more}

    honest = text_like(0, 100_000)
    assert keywords(stated(100_000), honest) == []
    assert keywords(stated(120_000), honest) == []  # rare tokens are left out
    assert keywords(stated(100_000), None) == ["none"]
    assert keywords(stated(900), torch.zeros(CONFIG.vocab_size)) == ["empty"]
    assert keywords(stated(2_000), text_like(0, 2_000)) == ["thin"]
    assert keywords(stated(100_000), torch.full((258,), 400.0)) == ["flat"]
    assert keywords(stated(100_000), torch.full((258,), 2.5e6)) == ["flat", "counts"]  # all codes 255
    assert keywords(stated(20_000), honest) == ["counts"]
    assert keywords(stated(900_000), honest) == ["counts"]
    assert keywords(stated(100_000, seen=1_000), honest) == ["seen"]
    for wrong in ({}, {"statistics": {}}, {"statistics": {"tokens": "9"}}, {"statistics": {"tokens": True}}):
        assert keywords(wrong, honest) == ["unstated"]


def test_copies_are_found_and_named(root, capsys):
    own = {"tokens": 100_000, "documents": 99, "min_documents": 2}
    for number, name in enumerate(MODULES):
        unigrams(root / name, text_like(number, 100_000))
        edit(root / name / "module.json", statistics=own, tokens_seen=100_000)
    assert not any("warning" in line for line in printed_by(capsys, assembling(root)))
    nearly = text_like(0, 100_000)
    nearly[:9] += 3
    unigrams(root / "two", nearly)
    settings = assemble.Settings(str(root / "trunk"), (root / "one", root / "two"), root / "new" / "other")
    assert "modules one and two have nearly the same statistics" in refused(assemble.main, settings)
    lines = printed_by(capsys, dataclasses.replace(settings, allow_copies=True))
    assert any("two: its counts are nearly those of one (cosine " in line for line in lines)
    shutil.copyfile(root / "one" / "statistics.safetensors", root / "two" / "statistics.safetensors")
    own_digest = json.loads((root / "one" / "module.json").read_text())["statistics_digest"]
    edit(root / "two" / "module.json", statistics_digest=own_digest)
    settings = assemble.Settings(str(root / "trunk"), (root / "one", root / "two"), root / "new" / "third")
    assert "modules one and two have nearly the same statistics" in refused(assemble.main, settings)
    lines = printed_by(capsys, dataclasses.replace(settings, allow_copies=True))
    assert any("two: its statistics are those of one." in line for line in lines)


def test_the_trunks_statistics_are_refused():
    values = text_like(0, 100_000)
    modules = [checks.CheckedModule({"name": name}, 9, text_like(seed, 100_000)) for seed, name in enumerate("ab")]
    checks.check_copies(modules, None)
    checks.check_copies(modules[1:], values)
    message = refused(checks.check_copies, modules, values)
    assert message.startswith("module a has nearly the same statistics as the trunk") and "--allow-copies" in message


def test_sixteen_copies_are_sixteen_lines_at_most():
    values = text_like(0, 100_000)
    modules = [checks.CheckedModule({"name": f"m{number}"}, 9, values) for number in range(16)]
    warnings = checks.copy_warnings(modules, None)
    assert [len(found) for found in warnings] == [0] + [1] * 15
    assert all("m0 " in found[0].sentence for found in warnings[1:])
    assert all(found and "the trunk" in found[0].sentence for found in checks.copy_warnings(modules, values))


# ---- The table ----


def test_the_table_has_a_row_for_each_module(root, capsys):
    edit(
        root / "one" / "module.json",
        losses={"own": {"tokens": 9, "before": 4.348, "after": 3.678}},
        licence="apache-2.0",
    )
    edit(root / "two" / "module.json", losses={"own": "none"}, tokens_seen=1_556_480)
    lines = printed_by(capsys, assembling(root))
    rows = {line.split()[0]: line for line in lines}
    assert "narrow+head" in rows["one"] and "4.35 -> 3.68" in rows["one"] and "apache-2.0" in rows["one"]
    own = sum(tensor.numel() for tensor in load_file(root / "one" / "module.safetensors").values())
    assert f" {own / 1000:.1f}K " in rows["one"] and " 1.6M " in rows["two"]
    metadata = json.loads((root / "new" / "assembled" / "assembled.json").read_text())
    assert metadata["licences"] == {"one": "apache-2.0", "two": "mit"}
    text = " ".join(lines)
    assert "licences apache-2.0 (one); mit (two); not stated (trunk). Check" in " ".join(text.split())


def test_no_line_is_wider_than_100_columns():
    metadata = {"name": "x" * 64, "kind": "narrow+head", "layers": [0, 7], "tokens_seen": 10**18}
    metadata |= {"losses": {"own": {"before": 1e17, "after": 1e17}}, "licence": "l" * 200}
    modules = [
        checks.CheckedModule(metadata, 10**12, text_like(0, 900), trial.Effect(1e5, 9.0), (3.0, 4.0)) for _ in range(3)
    ]
    printed = module_table.table(modules, text_like(0, 900), {"x" * 64: "l" * 80})
    assert max(map(len, printed.splitlines())) <= 100


def test_licences_are_compared_literally():
    names = ["trunk", "a", "b"]
    assert module_table.licence_line(names, dict.fromkeys(names, "MIT")) == "licences    all parts: MIT"
    assert module_table.licence_line(names, {"trunk": "mit", "a": "MIT ", "b": "mit"}) == "licences    all parts: mit"
    line = module_table.licence_line(names, {"trunk": "mit", "a": "gpl-3.0"})
    assert line == "licences    mit (trunk); gpl-3.0 (a); not stated (b). Check that they may be combined."
    assert "not stated (trunk, a, b)" in module_table.licence_line(names, {})


def test_claimed_losses_are_measured_again(root, text, cache, capsys, tmp_path):
    """On the documents that the module held out: the losses of evaluate."""
    how = {"check_data": (f"one={text}",), "cache_dir": cache}
    settings = evaluate.Settings(
        str(root / "trunk"),
        (f"one={text}",),
        module=(root / "one",),
        cache_dir=cache,
        val_fraction=0.1,
        json=tmp_path / "j",
    )
    assert evaluate.main(settings) == 0
    trunk, own = (row["loss"] for row in json.loads((tmp_path / "j").read_text())["rows"])
    edit(root / "one" / "module.json", losses={"own": {"before": trunk, "after": trunk - 1}})
    lines = printed_by(capsys, assembling(root, **how))
    assert f"{trunk:.2f} -> {own:.2f}" in next(line for line in lines if line.startswith("one "))
    assert any(
        f"one: its loss on --check-data is {own:.4f}, not below the trunk's {trunk:.4f}" in line for line in lines
    )
    better = checks.CheckedModule(
        {"name": "a", "losses": {"own": {"after": 3.0}}}, 9, None, trial.Effect(), (5.0, 3.05)
    )
    assert checks.loss_warnings(better) == []
    assert [found.keyword for found in checks.loss_warnings(better._replace(measured=(5.0, 3.2)))] == ["loss"]
    for wrong in ("one", "three=x", "one="):
        settings = dataclasses.replace(assembling(root, check_data=(wrong,)), output_dir=root / "never")
        assert "is not NAME=SOURCE. The modules are one, two" in refused(assemble.main, settings)
