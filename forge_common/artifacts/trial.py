"""The trial that every candidate of an assembled model passes: on random ids, and on text that the trunk generates.

A digest shows that the bytes are the author's, not that they are good.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import UserError
from ..model.modules import RoutedExpert
from ..model.trunk import Cache, DecoderLayer, Trunk

TRIAL_WINDOWS = 4
TRIAL_TOKENS = 32
GENERATED = (8, 64)  # windows and tokens of the text that the trunk generates
MOST_EXCESS = 4.0  # nats per token above the trunk's loss on that text; more is refused. Random weights had 4.3 to 7.3
MOST_GROWTH = 1000.0  # of the hidden states; more is refused


class Reference(NamedTuple):
    """What modules are compared with: the trunk's hidden states for random ids, and its loss on text that it generated itself."""

    sizes: list[float]
    generated: torch.Tensor
    loss: float


class Effect(NamedTuple):
    """growth: how many times as large as the trunk's the hidden states are. excess: nats per token on the trunk's own text."""

    growth: float = 1.0
    excess: float = 0.0


@torch.no_grad()
def check_trial(model: Trunk, place: Any) -> list[float]:
    """Refuses weights that are finite but give values that are not, for random ids. Half of the windows begin with an EOS.

    Returns the root mean square of the hidden states after each layer. Experts with a router row are tried with it and
    without, as an assembled model uses them.
    """
    generator = torch.Generator().manual_seed(0)
    length = min(TRIAL_TOKENS, model.config.max_position_embeddings)
    tokens = torch.randint(model.config.vocab_size, (TRIAL_WINDOWS, length), generator=generator)
    assert model.config.eos_token_id is not None  # read_trunk takes it from the tokenizer
    tokens[::2, 0] = model.config.eos_token_id
    layers = model.model.layers
    sizes = _sizes(model, tokens, None, place)
    if any(isinstance(layer.addition, RoutedExpert) for layer in layers):
        alone = _sizes(model, tokens, [partial(_expert_alone, layer) for layer in layers], place)
        sizes = [max(pair) for pair in zip(sizes, alone, strict=True)]
    return sizes


def reference(trunk: Trunk, place: Any) -> Reference:
    """The trunk's trial, and text that it generates: no other text is at hand, and a module must not spoil the trunk's own."""
    sizes = check_trial(trunk, place)
    windows, length = GENERATED
    generator = torch.Generator().manual_seed(0)
    assert trunk.config.eos_token_id is not None
    tokens = next_token = torch.full((windows, 1), trunk.config.eos_token_id)
    cache: Cache = []
    for _ in range(min(length, trunk.config.max_position_embeddings - 1)):
        p = trunk.next_logits(next_token, cache).float().softmax(-1)
        next_token = torch.multinomial(p, 1, generator=generator)
        tokens = torch.cat((tokens, next_token), dim=1)
    return Reference(sizes, tokens, mean_loss(trunk, list(tokens.numpy()), "the trunk on text that it generated"))


def check_module(model: Trunk, trunk: Reference, place: Any) -> Effect:
    """Refuses a module whose weights would spoil every text, even with a small gate: the trial, and the trunk's own text.

    A module of another domain is somewhat worse on the trunk's text, a broken one far worse.
    """
    growth = max(own / max(other, 1e-9) for own, other in zip(check_trial(model, place), trunk.sizes, strict=True))
    if growth > MOST_GROWTH:
        raise UserError(
            f"{place}: the hidden states are up to {growth:,.0f} times those of the trunk for random tokens, since some weights "
            "are too large. Do not use this artifact."
        )
    excess = mean_loss(model, list(trunk.generated.numpy()), f"{place} on text that the trunk generated") - trunk.loss
    if excess > MOST_EXCESS:
        raise UserError(
            f"{place}: on text that the trunk generates, its loss is {excess:.1f} nats per token above the trunk's; those of "
            "working modules are at most 1 above. Its weights are broken: do not use this artifact."
        )
    return Effect(growth, excess)


def _sizes(model: Trunk, tokens: torch.Tensor, feeds: list[Any] | None, place: Any) -> list[float]:
    """The root mean square of the hidden states after each layer; UserError where a value is not finite."""
    outputs: list[torch.Tensor] = []
    layers = model.model.layers
    hooks = [layer.register_forward_hook(lambda layer, args, output: outputs.append(output[0])) for layer in layers]
    try:
        hidden, routers = model.model(tokens, feeds=feeds)
    finally:
        for hook in hooks:
            hook.remove()
    squares = [x.float().square().mean() for x in outputs]  # the norms take them too: they must be finite
    values = {f"the hidden states after layer {index}": square for index, square in enumerate(squares)}
    values |= {"the last hidden states": hidden, "the logits": hidden @ model.head.T}
    if routers:
        values["the values of the routers"] = torch.stack([torch.stack(router[:2]) for router in routers])
    for what, value in values.items():
        if not torch.isfinite(value).all():
            raise UserError(
                f"{place}: {what} are not finite for random tokens, since some weights are too large. Do not use this artifact."
            )
    return [math.sqrt(square) for square in squares]


def _expert_alone(layer: DecoderLayer, normed, scored, load):
    expert = layer.addition
    return (expert.expert(normed), None) if isinstance(expert, RoutedExpert) else layer.feed(normed, scored, load)


def mean_loss(model: Any, windows: Sequence[np.ndarray], what: str) -> float:
    """Nats per token of windows of ids, int64 [up to T + 1], each scored by itself. UserError, which names `what`, if it is not finite."""
    nats = sum(float(model.nats(torch.from_numpy(window)[None]).double().sum()) for window in windows)
    return check_finite(nats, what) / max(sum(int((window[1:] >= 0).sum()) for window in windows), 1)


def check_finite(nats: float, what: str) -> float:
    """Returns nats that are finite; UserError for others."""
    if not math.isfinite(nats):
        raise UserError(
            f"the loss of {what} is {nats}, not a finite number: some weights are too large. Leave out the module with "
            "these weights, or use another version of it."
        )
    return nats
