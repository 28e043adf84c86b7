"""LoRA adapters of PEFT: written of a module, and made a module. The round trips need the package peft; refusals do not."""

import json
from pathlib import Path
from typing import Any

import pytest
import small_artifacts
import torch
from safetensors.torch import load_file, save_file

from forge_common import assemble, export
from forge_common.artifacts import assembled
from forge_common.artifacts.module_folder import read_model, write_module
from forge_common.artifacts.trunk_folder import read_trunk
from forge_common.exporting import peft_adapter, proof
from forge_common.model.modules import plug_in
from forge_common.model.trunk import Trunk

PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none"}
UP = "base_model.model.model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory) -> Path:
    return small_artifacts.build(tmp_path_factory.mktemp("artifacts"))


def lora_with_head(artifacts: Path, folder: Path) -> Path:
    """A module of kind lora+head of that trunk, whose embedding is its head too."""
    plain = Trunk(small_artifacts.CONFIG)
    names = plug_in(plain, "lora+head", [0, 1], rank=2)
    tensors = {name: torch.randn_like(plain.state_dict()[name]) * 0.3 for name in names}
    trunk = json.loads((artifacts / "trunk" / "forge.json").read_text())
    metadata = {"name": "three", "kind": "lora+head", "layers": [0, 1], "rank": 2, "trunk_digest": trunk["digest"]}
    metadata["tokenizer_digest"] = trunk["tokenizer_digest"]
    write_module(folder, tensors, metadata, small_artifacts.counts(9), small_artifacts.CONFIG)
    return folder


@pytest.mark.parametrize("name", ["two", "three"])
def test_a_module_becomes_an_adapter_and_a_module_again(artifacts, tmp_path, name):
    pytest.importorskip("peft")
    trunk = str(artifacts / "trunk")
    module = artifacts / name if name == "two" else lora_with_head(artifacts, tmp_path / name)
    export.main(export.Settings(trunk, "peft", tmp_path / "adapter", module))
    back = tmp_path / "back"
    export.main(export.Settings(trunk, "module", back, peft=tmp_path / "adapter", name="back"))
    before, after = (load_file(folder / "module.safetensors") for folder in (module, back))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(tensor.float(), after[key]), key


def made_by_peft(artifacts: Path, folder: Path, **how: Any) -> Any:
    """An adapter of that trunk, saved in `folder`; the model with it."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    adapted = peft.get_peft_model(proof.load(artifacts / "trunk"), peft.LoraConfig(r=4, lora_alpha=16, **how))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder)
    return adapted


@pytest.mark.parametrize("targets", [["up_proj", "lm_head"], ["q_proj", "v_proj"]])
def test_an_adapter_that_peft_made_becomes_a_module_that_assembles(artifacts, tmp_path, targets):
    adapted = made_by_peft(artifacts, tmp_path / "adapter", use_rslora=True, target_modules=targets)
    module = tmp_path / "module"
    export.main(export.Settings(str(artifacts / "trunk"), "module", module, peft=tmp_path / "adapter", name="other"))
    expected = adapted.eval()(input_ids=small_artifacts.TOKENS[:, :-1]).logits.log_softmax(-1)
    model, _, _, _ = read_model(str(artifacts / "trunk"), module)
    nats = -expected.gather(2, small_artifacts.TOKENS[:, 1:, None])[..., 0].detach()
    labels = small_artifacts.TOKENS[:, 1:19]  # until the first EOS: Transformers does not know documents
    assert torch.allclose(
        model.nats(small_artifacts.TOKENS)[:, : labels.shape[1]], nats[:, : labels.shape[1]], atol=1e-5
    )
    modules = (artifacts / "one", module)
    assemble.main(assemble.Settings(str(artifacts / "trunk"), modules, tmp_path / "all"))
    mixture, _, _ = assembled.read_assembled(str(tmp_path / "all"))
    shares = dict(zip(mixture.names, mixture.router.shares.tolist(), strict=True))
    assert shares["other"] == 0 and shares["one"] > 0  # without counts of its tokens the router never chooses it


@pytest.mark.parametrize(
    ("how", "layers", "targets"),
    [
        ({"exclude_modules": ["up_proj"]}, [0, 1], ["q_proj"]),
        ({"exclude_modules": ["model.layers.0.mlp.up_proj"]}, [0, 1], ["q_proj", "up_proj"]),
        ({"exclude_modules": r".*layers\.0\..*"}, [1], ["q_proj", "up_proj"]),
        ({"layers_to_transform": [1]}, [1], ["q_proj", "up_proj"]),
        ({"init_lora_weights": "gaussian"}, [0, 1], ["q_proj", "up_proj"]),
    ],
)
def test_an_adapter_of_some_matrices_changes_the_others_by_nothing(artifacts, tmp_path, how, layers, targets):
    made_by_peft(artifacts, tmp_path / "adapter", target_modules=["q_proj", "up_proj"], **how)
    trunk = str(artifacts / "trunk")
    export.main(export.Settings(trunk, "module", tmp_path / "module", peft=tmp_path / "adapter", name="other"))
    metadata = json.loads((tmp_path / "module" / "module.json").read_text())
    assert (metadata["layers"], metadata["targets"]) == (layers, targets)


def test_a_matrix_that_the_adapter_holds_and_excludes_is_named(artifacts, tmp_path):
    made_by_peft(artifacts, tmp_path / "adapter", target_modules=["q_proj", "up_proj"])
    settings = export.Settings(
        str(artifacts / "trunk"), "module", tmp_path / "module", peft=tmp_path / "adapter", name="other"
    )
    for changes in ({"exclude_modules": ["up_proj"]}, {"target_modules": ["q_proj"]}, {"layers_to_transform": [0]}):
        before = (tmp_path / "adapter" / "adapter_config.json").read_text()
        small_artifacts.edit(tmp_path / "adapter" / "adapter_config.json", **changes)
        message = small_artifacts.refused(export.main, settings)
        assert "PEFT does not load" in message and "_proj.lora_A" in message and "exclude_modules" in message
        (tmp_path / "adapter" / "adapter_config.json").write_text(before)
    assert not (tmp_path / "module").exists()


@pytest.mark.parametrize(
    ("changes", "name", "message"),
    [
        ({}, UP.replace("mlp.up_proj", "self_attn.q_norm"), "self_attn.q_norm"),
        ({}, "base_model.model.lm_head", "no layer"),
        ({"use_dora": True}, UP, "use_dora"),
        ({"bias": "all"}, UP, "bias"),
        ({"rank_pattern": {"up_proj": 3}}, UP, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, UP, "modules_to_save"),
        ({"peft_type": "LOHA"}, UP, "peft_type"),
        ({"peft_type": None}, UP, "peft_type"),
        ({"init_lora_weights": "pissa"}, UP, "init_lora_weights"),
        ({"alora_invocation_tokens": [3]}, UP, "alora_invocation_tokens"),
        ({"some_new_field": 1}, UP, "some_new_field"),
        ({"r": -1}, UP, "r is -1"),
        ({}, UP.replace("layers.1", "layers.7"), "layers [7] do not exist"),
    ],
)
def test_an_adapter_that_no_module_expresses_is_refused(artifacts, tmp_path, changes, name, message):
    (tmp_path / "adapter_config.json").write_text(json.dumps(PLAIN | changes))
    inside, outside = (258, 8) if "lm_head" in name else (8, 12)
    if "lm_head" in name:
        inside, outside = outside, inside
    tensors = {f"{name}.lora_A.weight": torch.randn(2, inside), f"{name}.lora_B.weight": torch.randn(outside, 2)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    trunk, _, _ = read_trunk(str(artifacts / "trunk"))
    assert message in small_artifacts.refused(peft_adapter.read, tmp_path, trunk)


def test_only_modules_of_kind_lora_become_adapters(artifacts, tmp_path):
    settings = export.Settings(str(artifacts / "trunk"), "peft", tmp_path / "out", artifacts / "one")
    assert "narrow+head" in small_artifacts.refused(export.main, settings)
    assert list(tmp_path.iterdir()) == []
