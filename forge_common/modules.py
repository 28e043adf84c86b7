"""What is trained on a frozen trunk, and under which names it travels.

A module of kind `ffn` is a copy of the trunk's feed-forward in the chosen layers; `ffn+head` adds an output head of its
own. The copies stand in the trunk's place, under the trunk's names, so that a fresh module changes nothing and a trunk
with a module merged into it is an ordinary checkpoint.
"""

import dataclasses

import torch
from torch import nn

from .errors import UserError
from .model import Trunk

KINDS = ("ffn", "ffn+head")


def chosen_layers(spec: str, num_hidden_layers: int) -> list[int]:
    """`all`, `top:N` (the N nearest to the head) or numbers from 0 such as `2,5`, as a sorted list."""
    try:
        if spec == "all":
            layers = range(num_hidden_layers)
        elif spec.startswith("top:"):
            count = int(spec.removeprefix("top:"))
            layers = range(num_hidden_layers - count, num_hidden_layers) if count > 0 else ()
        else:
            layers = {int(number) for number in spec.split(",")}
    except ValueError:
        raise UserError(f"--layers {spec}: say all, top:N, or numbers such as 2,5") from None
    chosen = sorted(layers)
    if not chosen or chosen[0] < 0 or chosen[-1] >= num_hidden_layers:
        raise UserError(f"--layers {spec}: the trunk's layers are 0 to {num_hidden_layers - 1}; choose among them")
    return chosen


def plug_in(trunk: Trunk, kind: str, layers: list[int]) -> list[str]:
    """Freezes `trunk` in place, but for a module of `kind` in `layers`; returns the names of the module's tensors.

    The module starts as the trunk's own tensors. A head of its own is cut loose from a tied embedding.
    """
    if kind not in KINDS:
        raise UserError(f"--kind {kind}: the kinds of module are {', '.join(KINDS)}")
    surplus = [layer for layer in layers if layer not in range(len(trunk.model.layers))]
    if surplus:
        raise UserError(f"layers {surplus}: the trunk's layers are 0 to {len(trunk.model.layers) - 1}")
    trunk.requires_grad_(False)
    for layer in layers:
        trunk.model.layers[layer].feed_forward.requires_grad_(True)
    if kind == "ffn+head":
        untie(trunk)
        trunk.lm_head.requires_grad_(True)
    return [name for name, parameter in trunk.named_parameters() if parameter.requires_grad]


def untie(trunk: Trunk) -> None:
    """Gives the trunk a head of its own, a copy of its embedding; does nothing where it has one."""
    if trunk.lm_head is not None:
        return
    weight = trunk.model.embed_tokens.weight
    trunk.lm_head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        trunk.lm_head.weight.copy_(weight)
    trunk.config = dataclasses.replace(trunk.config, tie_word_embeddings=False)


@torch.no_grad()
def put_in(trunk: Trunk, tensors: dict[str, torch.Tensor], kind: str, layers: list[int]) -> None:
    """Merges a module's tensors into `trunk`, in place. Every name and shape must be what the kind asks for."""
    expected = set(plug_in(trunk, kind, layers))
    parameters = dict(trunk.named_parameters())
    if expected != tensors.keys():
        missing, surplus = sorted(expected - tensors.keys()), sorted(tensors.keys() - expected)
        raise UserError(f"the module's tensors are not those of kind {kind}: missing {missing}, surplus {surplus}")
    for name, tensor in tensors.items():
        if tensor.shape != parameters[name].shape:
            raise UserError(
                f"the module's {name} has the shape {tuple(tensor.shape)}, the trunk's {tuple(parameters[name].shape)}"
            )
    for name, tensor in tensors.items():  # only when all of them fit
        parameters[name].copy_(tensor)
