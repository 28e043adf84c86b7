"""Kind lora: the settings of its changes, what they compute, and what a module's metadata say of them."""

import json

import edits
import launch
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_model import make, text

from forge_common.artifacts.metadata import module_arguments
from forge_common.artifacts.module_folder import read_model
from forge_common.errors import UserError
from forge_common.model.config import MATRICES, TARGETS
from forge_common.model.modules import LowRankLinear, fold, plug_in

ATTENTION = TARGETS[:4]
FLAGS = (
    "--kind",
    "lora+head",
    "--rank",
    4,
    "--alpha",
    10,
    "--dropout",
    0.2,
    "--targets",
    "o_proj",
    "q_proj",
    "up_proj",
)


def changed(kind: str, **sizes):
    """A trunk with a module of kind lora, none of whose changes is 0."""
    trunk = make(kind)
    names = plug_in(trunk, "lora+head", [0, 2], rank=4, **sizes)
    with torch.no_grad():
        for number, name in enumerate(names):
            draw = torch.Generator().manual_seed(number)
            trunk.get_parameter(name).copy_(torch.randn(trunk.get_parameter(name).shape, generator=draw) * 0.2)
    return trunk, names


@pytest.mark.parametrize("kind", ["tied", "qwen2", "qwen3", "mixtral"])
def test_a_new_module_of_the_attention_changes_nothing(kind):
    trunk, tokens = make(kind), text(2, 40)
    before = trunk.nats(tokens)
    names = plug_in(trunk, "lora", [1], rank=4, alpha=8, targets=ATTENTION)
    assert torch.equal(trunk.nats(tokens), before)
    wanted = {f"model.layers.1.self_attn.{name}.lora_{factor}" for name in ATTENTION for factor in "AB"}
    assert set(names) == wanted == {name for name, p in trunk.named_parameters() if p.requires_grad}
    trunk(tokens).nats.backward()
    assert all((trunk.get_parameter(name).grad != 0).any() for name in names if name.endswith("lora_B"))


@pytest.mark.parametrize("kind", ["tied", "qwen2", "qwen3"])
def test_a_folded_module_is_the_sum_of_the_matrices(kind):
    """W + alpha / R * B A, for each target, biases included, and the head."""
    trunk, names = changed(kind, alpha=10, targets=TARGETS)
    tokens, before = text(2, 40), make(kind)
    expected = trunk.nats(tokens)
    tensors = {name: trunk.get_parameter(name).detach().clone() for name in names}
    weight = before.head.detach() + 10 / 4 * tensors["head_change.lora_B"] @ tensors["head_change.lora_A"]
    fold(trunk)
    torch.testing.assert_close(trunk.nats(tokens), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(trunk.head, weight)
    for name, parameter in trunk.model.named_parameters():
        change = [tensors.get(f"model.{name.removesuffix('weight')}lora_{factor}") for factor in "BA"]
        original = before.model.get_parameter(name).detach()
        wanted = original if change[0] is None else original + 10 / 4 * change[0] @ change[1]
        torch.testing.assert_close(parameter.detach(), wanted)


def test_without_alpha_and_dropout_it_has_the_bits_of_before():
    trunk, _ = changed("tied")
    layer = trunk.model.layers[2].mlp.up_proj
    x = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(0))
    assert isinstance(layer, LowRankLinear)
    assert torch.equal(layer.train()(x), x @ layer.weight.T + (x @ layer.lora_A.T) @ layer.lora_B.T)
    assert torch.equal(layer.folded().weight, layer.weight + layer.lora_B @ layer.lora_A)


@pytest.mark.parametrize("factors", [1, 2], ids=["input", "gated product"])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_the_formula(factors, bias):
    """W x + alpha / R * B A x, where x is the input or silu(gate) * up; the frozen matrix has no gradient."""
    draw = torch.Generator().manual_seed(0)
    layer = LowRankLinear(torch.nn.Linear(6, 5, bias=bias).double().requires_grad_(False), 3, alpha=7, dropout=0)
    torch.nn.init.normal_(layer.lora_B, generator=draw)
    parts = torch.randn(factors, 2, 4, 6, dtype=torch.float64, generator=draw).requires_grad_()
    inputs = [part.detach().requires_grad_() for part in parts]
    x = inputs[0] if factors == 1 else F.silu(inputs[0]) * inputs[1]
    wanted = F.linear(x, layer.weight + 7 / 3 * layer.lora_B @ layer.lora_A, layer.bias)
    found = layer(*inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    leaves = [*inputs, layer.lora_A, layer.lora_B]
    upstream = torch.randn(2, 4, 5, dtype=torch.float64, generator=draw)
    gradients = (torch.autograd.grad(y, leaves, upstream, retain_graph=True) for y in (found, wanted))
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_a_feed_forward_keeps_its_input_gate_and_up_alone():
    """And R numbers for each matrix, of 2 rows of 40 tokens."""
    layer = changed("tied")[0].model.layers[2].mlp
    x, own, kept = torch.randn(2, 40, 32, requires_grad=True), {p.data_ptr() for p in layer.parameters()}, {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t}) or t, lambda t: t):
        y = layer(x)
    sizes = sorted(tensor.numel() for place, tensor in kept.items() if place not in own)
    width = layer.gate_proj.out_features
    assert sizes == sorted([*[80 * 4] * 3, x.numel(), 80 * width, 80 * width])
    assert y.shape == x.shape


def test_dropout_is_of_the_change_alone_and_off_in_validation():
    (trunk, _), (plain, _) = changed("tied", dropout=0.5), changed("tied")
    tokens = text(2, 40)
    assert torch.equal(trunk.eval().nats(tokens), plain.nats(tokens))
    layer, x = trunk.train().model.layers[0].mlp.up_proj, torch.ones(20000, 32)
    first = layer(x)
    assert not torch.equal(first, layer(x))
    change = x[:1] @ layer.lora_A.T @ layer.lora_B.T
    mean = (first - x @ layer.weight.T).mean(0)
    torch.testing.assert_close(mean, change[0], rtol=0, atol=0.05)  # kept inputs are scaled, so the mean stays


def test_a_mixture_of_experts_has_lora_in_its_attention_alone():
    with pytest.raises(UserError, match="--targets of the attention alone"):
        plug_in(make("mixtral"), "lora", [1], targets=("q_proj", "up_proj"))


def test_a_resumed_run_has_the_same_bits_and_its_module_states_its_settings(module, altered, trunk, tmp_path):
    runs = tmp_path / "straight", tmp_path / "resumed"
    module(runs[0], "--steps", 4, *FLAGS)
    module(runs[1], "--steps", 4, *FLAGS, script=altered("train_module.py", edits.CHECK_STOP, edits.interrupted_at(2)))
    module(runs[1], "--steps", 4, *FLAGS)
    assert launch.same_bits(*(load_file(run / "module" / "module.safetensors") for run in runs))
    metadata = json.loads((runs[1] / "module" / "module.json").read_text())
    stated = {"rank": 4, "alpha": 10, "dropout": 0.2, "targets": ["o_proj", "q_proj", "up_proj"]}
    assert {name: metadata[name] for name in stated} == stated
    model, _, _, _ = read_model(str(trunk), runs[1] / "module")
    changes = [part for part in model.train().modules() if isinstance(part, LowRankLinear)]
    assert [(part.scale, part.dropout) for part in changes] == [(2.5, 0)] * len(changes) and len(changes) == 6


def test_modules_of_earlier_versions_have_the_default_settings():
    arguments = module_arguments({"kind": "lora", "layers": [0], "rank": 8})
    assert (arguments["alpha"], arguments["targets"]) == (8, MATRICES)
