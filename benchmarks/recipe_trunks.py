"""Changed copies of a trunk, from which some recipes start. Each changes the model that it is given, or returns another."""

import dataclasses

from forge_common.model.modules import untie
from forge_common.model.trunk import Trunk


def untied(model: Trunk) -> Trunk:
    """With an output head of its own, a copy of the embedding."""
    untie(model)
    return model


def upcycled(model: Trunk, experts: int) -> Trunk:
    """A mixture of experts (Mixtral's, top-2) that are copies of the feed-forward, with an output head of its own."""
    untie(model)
    mixture = Trunk(dataclasses.replace(model.config, num_local_experts=experts))
    tensors = mixture.state_dict() | {n: t for n, t in model.state_dict().items() if ".mlp." not in n}
    for index, layer in enumerate(model.model.layers):
        matrices = {"w1": layer.mlp.gate_proj, "w2": layer.mlp.down_proj, "w3": layer.mlp.up_proj}
        for expert in range(experts):
            for name, matrix in matrices.items():
                tensors[f"model.layers.{index}.block_sparse_moe.experts.{expert}.{name}.weight"] = matrix.weight
    mixture.load_state_dict(tensors)
    return mixture


def fresh(model: Trunk) -> Trunk:
    """With newly initialized feed-forwards, from which the original system's experts start."""
    drawn = Trunk(model.config).state_dict()
    model.load_state_dict({n: drawn[n] if ".mlp." in n else t for n, t in model.state_dict().items()})
    return model
