"""The optimizers that --optimizer chooses: what each of them updates, and that a resumed run is the same."""

import dataclasses
import types

import launch
import pytest
import torch

from forge_common import optimizers
from forge_common.errors import UserError
from forge_common.model.config import ModelConfig
from forge_common.model.modules import plug_in
from forge_common.model.trunk import Trunk
from forge_common.run import engines
from forge_common.settings import UpdateSettings

ONE_PROCESS = types.SimpleNamespace(
    device=torch.device("cpu"), is_fsdp2=False, state=types.SimpleNamespace(deepspeed_plugin=None)
)
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def settings_of(**changes):
    return types.SimpleNamespace(lr=0.01, **dataclasses.asdict(UpdateSettings(**changes)))


def trunk_of(**changes):
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=40, num_key_value_heads=1, max_position_embeddings=8, **SHAPE | changes)
    return Trunk(config)


def among(parameter, others):
    return any(parameter is other for other in others)


def train(model, parts, steps):
    """Updates with gradients that depend on the update and the parameter alone."""
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn(parameter.shape, generator=draw)
        for part in parts:
            for group in part.param_groups:
                group["lr"] = 0.01 / (1 + step)
            part.step()


def test_adamw_is_torchs_to_the_bit():
    """Also after its state was saved and loaded."""
    ours, theirs = trunk_of(), trunk_of()
    settings = settings_of(beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.2)
    optimizer = optimizers.make(ours, settings, ONE_PROCESS)
    groups = optimizers.parameter_groups(theirs, 0.2)
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.9), eps=1e-6, fused=True)

    train(theirs, [reference], range(4))
    train(ours, [optimizer], range(2))
    again = optimizers.make(ours, settings, ONE_PROCESS)
    again.load_state_dict(optimizer.state_dict())
    train(ours, [again], range(2, 4))
    assert launch.same_bits(ours.state_dict(), theirs.state_dict())
    found, wanted = again.state_dict(), reference.state_dict()
    assert found["param_groups"] == wanted["param_groups"]
    for index, state in wanted["state"].items():
        assert launch.same_bits(found["state"][index], state)

    calls = []
    again.register_step_pre_hook(lambda *_: calls.append("before"))
    again.register_step_post_hook(lambda *_: calls.append("after"))
    train(ours, [again], [4])
    assert calls == ["before", "after"]
    again.zero_grad()
    assert all(parameter.grad is None for parameter in ours.parameters())


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("keep_gradients", [True, False])
def test_memory_that_is_reserved_changes_no_bit(keep_gradients, name):
    """The moments, and gradients that are kept, have their place before the first forward pass, and stay there."""
    ours, theirs = trunk_of(), trunk_of()
    settings = settings_of(weight_decay=0.2, optimizer=name)
    reserved, plain = (optimizers.make(model, settings, ONE_PROCESS) for model in (ours, theirs))
    engines.reserve_before_forward(ours, reserved, keep_gradients=keep_gradients)
    assert not reserved.state
    missing, places = [], []

    def look(*_):
        missing.append([p.grad is None for p in ours.parameters()])
        assert reserved.state.keys() == set(ours.parameters())

    ours.register_forward_pre_hook(look)
    for step in range(3):
        windows = torch.randint(40, (2, 2, 9), generator=torch.Generator().manual_seed(step))
        for model, optimizer in ((ours, reserved), (theirs, plain)):
            for micro_batch in windows:
                model(micro_batch).objective.backward()
            optimizer.step()
            optimizer.zero_grad()
        kept = [tensor for state in reserved.state.values() for key, tensor in state.items() if key != "step"]
        kept += [p.grad for p in ours.parameters() if p.grad is not None]
        places.append([tensor.data_ptr() for tensor in kept])
    assert launch.same_bits(ours.state_dict(), theirs.state_dict())
    assert all(set(of_update) == {not keep_gradients} for of_update in missing[::2])
    assert places[0] == places[1] == places[2]


def test_deepspeed_gets_the_optimizer_that_it_knows():
    """It compares types: a subclass would be refused."""
    deepspeed = types.SimpleNamespace(**vars(ONE_PROCESS) | {"state": types.SimpleNamespace(deepspeed_plugin=object())})
    assert type(optimizers.make(trunk_of(), settings_of(), deepspeed)) is torch.optim.AdamW


@pytest.mark.parametrize(
    ("module", "experts"), [(None, 0), (None, 3), ("ffn", 0), ("lora+head", 0), ("expert", 0), ("narrow", 0)]
)
def test_muon_updates_the_layers_matrices_and_adamw_the_rest(module, experts):
    """Bit for bit torch's two optimizers, also after the state was saved and loaded."""
    ours, theirs = (trunk_of(num_local_experts=experts) for _ in range(2))
    for model in (ours, theirs) if module else ():
        torch.manual_seed(1)
        plug_in(model, module, [1], rank=2)
    settings = settings_of(optimizer="muon", beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.2)
    optimizer = optimizers.make(ours, settings, ONE_PROCESS)

    named = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    matrices = [p for name, p in named.items() if p.ndim == 2 and "layers" in name and "gate.weight" not in name]
    matrices = [p for p in matrices if p.shape != (1, 16)]  # the row of a router
    rest = [p for p in named.values() if not among(p, matrices)]
    bare = [p for name, p in named.items() if p.ndim == 1 or "embed" in name]
    parts: list = [torch.optim.Muon(matrices, 0.01, 0.2, adjust_lr_fn="match_rms_adamw")]
    for decay, group in ((0.2, [p for p in rest if not among(p, bare)]), (0.0, [p for p in rest if among(p, bare)])):
        if group:
            parts.append(torch.optim.AdamW(group, betas=(0.8, 0.9), eps=1e-6, weight_decay=decay, fused=True))
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(named)

    train(theirs, parts, range(4))
    train(ours, [optimizer], range(2))
    again = optimizers.make(ours, settings, ONE_PROCESS)
    again.load_state_dict(optimizer.state_dict())
    train(ours, [again], range(2, 4))
    assert launch.same_bits(ours.state_dict(), theirs.state_dict())


def test_muon_is_refused_where_matrices_are_divided():
    sharded = types.SimpleNamespace(**vars(ONE_PROCESS) | {"is_fsdp2": True})
    with pytest.raises(UserError, match="--optimizer muon needs each matrix whole"):
        optimizers.make(trunk_of(), settings_of(optimizer="muon"), sharded)


def test_a_run_with_muon_resumes_to_the_same_bits(shared, tmp_path):
    more = ("--steps", 6, "--save-every", 3, "--val-every", 0, "--keep", 9, "--optimizer", "muon")
    shared(tmp_path / "straight", *more)
    launch.copy_until(tmp_path / "straight", tmp_path / "run", 3)
    shared(tmp_path / "run", *more)
    assert launch.same_bits(launch.weights(tmp_path / "straight", 6), launch.weights(tmp_path / "run", 6))
    losses = [row["train/loss"] for row in launch.rows(tmp_path / "run")]
    assert losses[-1] < losses[0] - 0.1
    states = launch.optimizer_state(tmp_path / "run", 6)["state"].values()
    assert {tuple(sorted(state)) for state in states} == {("momentum_buffer",), ("exp_avg", "exp_avg_sq", "step")}
