"""A module is trained alone: the trunk does not change, and is neither in the optimizer nor in the checkpoint."""

import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import edits
import launch
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_artifacts import CONFIG, edit

import train_module
from forge_common.artifacts.metadata import read_metadata, training_texts
from forge_common.artifacts.trunk_folder import read_trunk, replaced_tensors, write_trunk
from forge_common.errors import UserError
from forge_common.files.tensors import digest
from forge_common.model.modules import MATRICES, kind_and_layers, plug_in

STEPS = 8
KINDS = {"ffn": 6, "ffn+head": 7}  # tensors of a module of two layers


@pytest.fixture(scope="module", params=KINDS)
def made(request, module, tmp_path_factory):
    """(kind, the run's folder, its output)"""
    folder = tmp_path_factory.mktemp("module") / "run"
    return request.param, folder, module(folder, "--steps", STEPS, "--kind", request.param, "--keep", 100)


def test_the_artifact_holds_the_trained_tensors_alone(made, trunk):
    kind, folder, _ = made
    tensors, original = load_file(folder / "module" / "module.safetensors"), load_file(trunk / "model.safetensors")
    assert len(tensors) == KINDS[kind]
    assert all(".mlp." in name or name == "lm_head.weight" for name in tensors)
    for name, tensor in tensors.items():  # each was trained
        before = original.get(name, original["model.embed_tokens.weight"])
        assert tensor.shape == before.shape and not torch.equal(tensor, before)
    assert {path.name for path in (folder / "module").iterdir()} == {
        "module.safetensors",
        "module.json",
        "statistics.safetensors",
        "README.md",
    }


def test_what_is_scored_before_and_after_training_is_said(made):
    """It can take minutes, before the first update and after the last one."""
    _, _, printed = made
    said = "scoring     held-out text, for the losses before and after training: own "
    first, last = (match.start() for match in re.finditer(rf"^{said}[\d,]+ tokens$", printed, re.M))
    assert first < printed.index("step 1/") and printed.index(f"step {STEPS}/") < last < printed.index("published")


def test_no_frozen_weight_in_checkpoint_or_optimizer(made):
    kind, folder, _ = made
    saved = launch.weights(folder, STEPS)
    assert len(saved) == KINDS[kind]
    state = launch.optimizer_state(folder, STEPS)
    assert len(state["state"]) == sum(len(group["params"]) for group in state["param_groups"]) == KINDS[kind]


def test_the_metadata_of_a_module(made, trunk):
    kind, folder, printed = made
    metadata = json.loads((folder / "module" / "module.json").read_text())
    published = json.loads((trunk / "forge.json").read_text())
    assert metadata["trunk_digest"] == published["digest"] == digest(load_file(trunk / "model.safetensors"))
    assert metadata["tokenizer_digest"] == published["tokenizer_digest"]
    assert metadata["digest"] == digest(load_file(folder / "module" / "module.safetensors"))
    shape = (metadata["kind"], metadata["name"], metadata["layers"], metadata["format_version"])
    assert shape == (kind, "cpp", [0, 1], 1)
    assert metadata["losses"]["own"]["after"] < metadata["losses"]["own"]["before"]
    losses = {name: part for name, part in metadata["losses"].items() if part["before"] is not None}
    shown = ", ".join(f"{name} {part['before']:.4f} -> {part['after']:.4f}" for name, part in losses.items())
    assert f"losses      held out, before -> after training: {shown} nats per token\n" in printed
    last = launch.rows(folder, "val/loss")[-1]
    assert metadata["losses"]["own"]["after"] == pytest.approx(last["val/loss"], rel=1e-6)
    assert metadata["tokens_seen"] == launch.rows(folder)[-1]["train/tokens"] > 0


def test_a_new_module_does_not_change_the_loss(module, altered, tmp_path):
    """With one update at rate 0, the loss after is the loss before, bit for bit."""
    script = altered("train_module.py", edits.SET_RATE, 'group["lr"] = 0.0')
    module(tmp_path / "run", "--steps", 1, "--warmup-steps", 0, "--weight-decay", 0, script=script)
    losses = json.loads((tmp_path / "run" / "module" / "module.json").read_text())["losses"]["own"]
    assert losses["before"] == losses["after"]


def test_what_a_module_replaced_is_read_again_from_the_trunk(root):
    """For the moments of the trunk alone: its feed-forwards under a module of kind ffn, and nothing for the other kinds."""
    _, _, metadata = read_trunk(str(root / "trunk"))
    own = load_file(root / "trunk" / "model.safetensors")
    for kind in ("ffn", "ffn+head", "narrow+head", "lora+head", "expert"):
        trunk, _, _ = read_trunk(str(root / "trunk"))
        config, names = trunk.config, plug_in(trunk, kind, [1])
        again = replaced_tensors(str(root / "trunk"), config, names, metadata)
        assert sorted(again) == sorted(name for name in names if ".mlp." in name and kind.startswith("ffn"))
        assert all(torch.equal(again[name], own[name]) for name in again)
    own["model.norm.weight"][0] += 1
    save_file(own, root / "trunk" / "model.safetensors")
    replaced, added = [f"model.layers.1.mlp.{m}.weight" for m in MATRICES], ["head_change.lora_A"]
    with pytest.raises(UserError, match="the trunk has changed since the start of the run"):
        replaced_tensors(str(root / "trunk"), config, replaced, metadata)
    assert replaced_tensors(str(root / "trunk"), config, added, metadata) == {}  # the weights are not read
    edit(root / "trunk" / "forge.json", digest="0" * 64)
    with pytest.raises(UserError, match="the trunk has changed since the start of the run"):
        replaced_tensors(str(root / "trunk"), config, added, metadata)


@pytest.mark.parametrize("kind", ["ffn+head", "lora+head"])
def test_a_trunk_that_is_published_again_during_the_run_is_refused(kind, trunk, module, altered, tmp_path):
    """No module is published, whatever it reads of the trunk; with the first trunk, the same command publishes it."""
    copy, other = tmp_path / "trunk", tmp_path / "other"
    shutil.copytree(trunk, copy)
    model, tokenizer, metadata = read_trunk(str(trunk))
    tensors = {name: tensor * 1.01 for name, tensor in model.state_dict().items()}
    write_trunk(other, tensors, model.config, tokenizer, {})
    exchange = f"    import os\n\n    os.rename({str(copy)!r}, {str(tmp_path / 'first')!r})\n"
    exchange += f"    os.rename({str(other)!r}, {str(copy)!r})\n"
    script = altered("train_module.py", edits.AFTER_TRAINING, edits.AFTER_TRAINING + exchange)
    more = ("--trunk", copy, "--steps", 2, "--kind", kind)
    printed = module(tmp_path / "run", *more, script=script, fails=True)
    assert f"it was {metadata['digest']}" in printed and "Traceback" not in printed
    assert not (tmp_path / "run" / "module").exists()
    copy.rename(other)
    (tmp_path / "first").rename(copy)
    assert "published " in module(tmp_path / "run", *more)


def test_a_changed_frozen_weight_is_detected(module, altered, tmp_path):
    """The comparison of digests finds a script that was edited wrongly."""
    change = "        trunk.model.norm.weight.data.add_(1e-7 * step + 1e-3)\n"
    script = altered("train_module.py", edits.AFTER_UPDATE, edits.AFTER_UPDATE + change)
    printed = module(tmp_path / "run", "--steps", 2, script=script, fails=True)
    assert "has changed" in printed and not (tmp_path / "run" / "module").exists()


def test_two_processes_train_the_same_module(module, tmp_path):
    for processes in (1, 2):
        more = ("--steps", STEPS, "--no-pack", "--document-separator", "\n\n", "--dtype", "float64")
        module(tmp_path / str(processes), *more, processes=processes)
    gap = launch.difference(launch.weights(tmp_path / "1", STEPS), launch.weights(tmp_path / "2", STEPS))
    assert gap <= 1e-12


@pytest.mark.parametrize("made", ["ffn+head"], indirect=True)
def test_stopped_and_resumed(made, module, altered, tmp_path):
    """At update 5 and again at 6: bit for bit the module of an uninterrupted run, and the same metadata."""
    kind, straight, _ = made
    folder = tmp_path / "run"
    for step in (5, 6):
        script = altered("train_module.py", edits.CHECK_STOP, edits.interrupted_at(step))
        module(folder, "--steps", STEPS, "--kind", kind, "--keep", 100, script=script)
        assert not (folder / "module").exists()
    module(folder, "--steps", STEPS, "--kind", kind, "--keep", 100)
    assert launch.same_bits(launch.weights(straight, STEPS), launch.weights(folder, STEPS))
    metadata = [json.loads((run / "module" / "module.json").read_text()) for run in (straight, folder)]
    assert metadata[0] == metadata[1]


def test_a_trunk_stored_in_bf16(module, tmp_path):
    """Its module is in float32, and needs bf16 activations; the frozen matrices do not change."""
    more = ("--trunk-dtype", "bf16", "--kind", "lora+head", "--steps", 4)
    printed = module(tmp_path / "run", *more, fails=True)
    assert "Launch with --mixed_precision bf16" in printed and not (tmp_path / "run").exists()
    printed = module(tmp_path / "run", *more, ACCELERATE_MIXED_PRECISION="bf16")
    assert "before and after" in printed
    tensors = load_file(tmp_path / "run" / "module" / "module.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    losses = json.loads((tmp_path / "run" / "module" / "module.json").read_text())["losses"]["own"]
    assert losses["after"] < losses["before"]


@pytest.mark.parametrize("made", ["ffn+head"], indirect=True)
def test_a_module_stored_in_bf16(made, module, altered, trunk, domain, cache, tmp_path):
    """Trained in float32 to the same bits, also over a resume, and rounded once; its losses are those of what is stored."""
    kind, straight, _ = made
    folder = tmp_path / "run"
    more = ("--steps", STEPS, "--kind", kind, "--keep", 100, "--val-documents", "--module-dtype", "bf16")
    module(folder, *more, script=altered("train_module.py", edits.CHECK_STOP, edits.interrupted_at(5)))
    module(folder, *more)
    assert launch.same_bits(launch.weights(straight, STEPS), launch.weights(folder, STEPS))
    before, after = (load_file(run / "module" / "module.safetensors") for run in (straight, folder))
    assert launch.same_bits({name: tensor.bfloat16() for name, tensor in before.items()}, after)
    metadata = [json.loads((run / "module" / "module.json").read_text()) for run in (straight, folder)]
    assert [each["dtype"] for each in metadata] == ["float32", "bfloat16"]
    assert metadata[1]["digest"] == digest(after)
    common = ("--model", trunk, "--data", f"cpp={domain}", "--cache-dir", cache, "--val-fraction", 0.1)
    evaluate(*common, "--module", folder / "module", "--json", tmp_path / "rows.json")
    [stored] = [r["loss"] for r in json.loads((tmp_path / "rows.json").read_text())["rows"] if r["model"] != "trunk"]
    trained = launch.rows(folder, "val/loss")[-1]["val/loss"]
    published = metadata[1]["losses"]["own"]["after"]
    assert abs(published - stored) < 1e-6 < abs(published - trained) < 1e-3
    generate = ("--module", folder / "module", "--prompt", "#include", "--max-new-tokens", 3)
    assert launch.run_python("-m", "forge_common.generate", "--model", trunk, *generate).startswith("#include")


def test_only_the_chosen_layers(module, tmp_path):
    module(tmp_path / "run", "--steps", 2, "--kind", "ffn", "--layers", "top:1")
    assert all(name.startswith("model.layers.1.mlp.") for name in launch.weights(tmp_path / "run", 2))


def test_without_kind_it_suits_the_trunk(trunk, module, tmp_path):
    """lora on a Transformers checkpoint; ffn+head on a trunk of train_shared.py, as ever. The choice is printed, and resumed."""
    elsewhere = shutil.copytree(trunk, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("forge.json"))
    flags = ("--steps", 2, "--save-every", 1, "--trunk")
    for place, expected, lines in ((elsewhere, "lora", 1), (trunk, "ffn+head", 0)):
        printed = module(tmp_path / expected, *flags, place)
        assert printed.count("kind        lora") == lines
        assert json.loads((tmp_path / expected / "module" / "module.json").read_text())["kind"] == expected
        assert json.loads((tmp_path / expected / "settings.json").read_text())["kind"] == expected
    assert "kind        " not in module(tmp_path / "given", *flags, elsewhere, "--kind", "narrow")
    assert "published" in module(tmp_path / "lora", *flags, elsewhere, "--kind", "lora")  # the same run


def test_a_mixture_of_experts_made_elsewhere_has_no_low_rank_default():
    """Its feed-forwards cannot have low-rank changes."""
    settings = train_module.Settings(trunk="org/trunk", name="law", data=("law",), output_dir=Path("run"))
    for experts, expected in ((0, "lora"), (4, "ffn+head")):
        chosen_settings, layers = kind_and_layers(settings, replace(CONFIG, num_local_experts=experts), {}, print)
        assert (chosen_settings.kind, layers) == (expected, [0, 1])


@pytest.mark.parametrize(
    ("kind", "targets", "largest"),
    [
        ("lora", MATRICES, 32),
        ("lora", ("k_proj",), 24),
        ("lora", ("k_proj", "o_proj"), 32),
        ("lora+head", ("k_proj",), 32),
    ],
)
def test_a_rank_that_no_matrix_can_have_is_refused(kind, targets, largest):
    """A change of a matrix has at most the rank of its smaller side."""
    settings = train_module.Settings(trunk="org/trunk", name="law", data=("law",), output_dir=Path("run"), kind=kind)
    config = replace(
        CONFIG,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=3,
        head_dim=8,
        vocab_size=99,
    )
    assert kind_and_layers(replace(settings, rank=largest, targets=targets), config, {}, print)
    with pytest.raises(UserError, match=rf"--rank {largest + 1} is more than the {largest} .* Lower --rank\."):
        kind_and_layers(replace(settings, rank=largest + 1, targets=targets), config, {}, print)
    assert kind_and_layers(replace(settings, rank=999, kind="ffn"), config, {}, print)


def evaluate(*arguments: object, fails: bool = False) -> str:
    """python -m forge_common.evaluate"""
    return launch.run_python("-m", "forge_common.evaluate", *arguments, fails=fails)


def test_evaluate_is_a_plain_loop_over_the_documents(made, trunk, domain, cache, tmp_path):
    """Its loss, and that of the merged checkpoint in Transformers, equal a loop over the documents' windows."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, folder, _ = made
    common = ("--model", trunk, "--data", f"cpp={domain}", "--cache-dir", cache, "--val-fraction", 0.1)
    evaluate(*common, "--module", folder / "module", "--json", tmp_path / "rows.json")
    found = {row["model"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    merged = tmp_path / "merged"
    line = ("--trunk", trunk, "--module", folder / "module", "--output-dir", merged)
    launch.run_python("-m", "forge_common.merge", *line)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    for place, name in ((trunk, "trunk"), (merged, "module:cpp")):
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
        nats, tokens, size = 0.0, 0, 0
        for path in domain.iterdir():
            text = path.read_text(encoding="utf-8")
            if int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64 >= 0.1:
                continue
            ids = torch.tensor(tokenizer(text)["input_ids"] + [tokenizer.eos_token_id])
            size += len(text.encode()) - 1  # the tokens are bytes, and the first one is no label
            for start in range(0, len(ids) - 1, 64):
                window = ids[start : start + 65]
                log_p = model(window[None, :-1]).logits[0].log_softmax(-1)
                nats -= log_p.gather(1, window[1:, None]).sum().item()
                tokens += len(window) - 1
        assert found[name]["tokens"] == tokens > 1000
        assert found[name]["loss"] == pytest.approx(nats / tokens, abs=1e-5)
        assert found[name]["bits_per_byte"] == pytest.approx(
            nats / tokens * tokens / size / 0.6931471805599453, abs=1e-5
        )


def test_generate_is_deterministic_at_temperature_0(made, trunk):
    _, folder, _ = made
    line = ["-m", "forge_common.generate", "--model", trunk, "--module", folder / "module"]
    line += ["--prompt", "#include", "--max-new-tokens", 30, "--temperature", 0]
    out = [launch.run_python(*line) for _ in range(2)]
    assert out[0].startswith("#include") and len(out[0]) > len("#include\n") and out[0] == out[1]


def tampered(folder, tmp_path, change):
    """A copy of a module with its tensors changed."""
    copy = tmp_path / "module"
    shutil.copytree(folder / "module", copy)
    tensors = load_file(copy / "module.safetensors")
    change(tensors)
    save_file(tensors, copy / "module.safetensors")
    return copy


@pytest.mark.parametrize("made", ["ffn+head"], indirect=True)
def test_parts_that_do_not_match_are_refused(made, trunk, domain, cache, shared, tmp_path):
    """Another trunk, another tokenizer, changed tensors, a pickle: refused, with both digests or the name."""
    _, folder, _ = made
    common = ("--data", f"cpp={domain}", "--cache-dir", cache, "--val-fraction", 0.1)

    shared(tmp_path / "other", "--steps", 2, "--seed", 1)
    printed = evaluate("--model", tmp_path / "other" / "trunk", "--module", folder / "module", *common, fails=True)
    assert "another trunk" in printed and json.loads((trunk / "forge.json").read_text())["digest"] in printed

    shared(tmp_path / "words", "--steps", 2, "--tokenizer", "train:300")
    metadata = json.loads((folder / "module" / "module.json").read_text())
    other = json.loads((tmp_path / "words" / "trunk" / "forge.json").read_text())
    copy = tmp_path / "copy"
    shutil.copytree(folder / "module", copy)
    (copy / "module.json").write_text(json.dumps(metadata | {"trunk_digest": other["digest"]}))
    printed = evaluate("--model", tmp_path / "words" / "trunk", "--module", copy, *common, fails=True)
    assert "another tokenizer" in printed and other["tokenizer_digest"] in printed

    def flip(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"].view(torch.int32)[0, 0] ^= 1

    def spoil(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")

    changes = ((flip, "digest"), (spoil, "model.layers.0.mlp.up_proj.weight holds NaN"))
    for number, (change, expected) in enumerate(changes):
        printed = evaluate(
            "--model", trunk, "--module", tampered(folder, tmp_path / str(number), change), *common, fails=True
        )
        assert expected in printed and "Traceback" not in printed
    (tmp_path / "weights.pt").write_bytes(b"pickled")
    printed = evaluate("--model", trunk, "--module", tmp_path / "weights.pt", *common, fails=True)
    assert "Pickles are not opened" in printed


def test_a_damaged_trunk_is_refused(trunk, domain, cache, module, tmp_path):
    copy = tmp_path / "trunk"
    shutil.copytree(trunk, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, copy / "model.safetensors")
    printed = module(tmp_path / "run", "--trunk", copy, fails=True)
    assert "forge.json says" in printed and "Traceback" not in printed


def test_a_trunk_can_be_continued(trunk, shared, tmp_path):
    """--trunk-from: starts at the trunk's loss, not at a uniform guess."""
    shared(tmp_path / "run", "--trunk-from", trunk, "--steps", 2, "--lr", 1e-9, shape=())
    metadata = json.loads((trunk / "forge.json").read_text())
    last = launch.rows(tmp_path / "run", "val/loss")[-1]
    assert last["val/loss"] == pytest.approx(metadata["validation_loss"], abs=1e-4)
    assert json.loads((tmp_path / "run" / "trunk" / "forge.json").read_text())["continued_from"] == metadata["digest"]


def test_a_trunk_that_was_continued_names_its_earlier_texts_too(trunk, shared, domain, text, cache, tmp_path):
    """Each with its own share; evaluate knows one of them by its name, the other by its content."""
    copy = shutil.copytree(trunk, tmp_path / "trunk")
    edit(copy / "forge.json", data={"held out 0": [], str(text): 7})
    renamed = shutil.copytree(domain, tmp_path / "renamed")
    shared(tmp_path / "run", "--trunk-from", copy, "--data", domain, "--val-fraction", 0.3, "--steps", 2, shape=())
    found = training_texts(read_metadata(tmp_path / "run" / "trunk" / "forge.json"))
    assert [(known.source, known.val_fraction) for known in found] == [(str(domain), 0.3), (str(text), 0.1)]
    line = ("--model", tmp_path / "run" / "trunk", "--cache-dir", cache, "--data", f"a={text}", f"b={renamed}")
    printed = evaluate(*line)
    assert "held out by trunk: the first 10.00% by hash" in printed and "the first 30.00% by hash" in printed
