"""The trial that every candidate of an assembled model passes: on random ids, and on text that the trunk generates.

A digest shows that the bytes are the author's, not that they are good.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import UserError
from ..files.tensors import Tensors
from ..model.modules import RoutedExpert
from ..model.trunk import Cache, DecoderLayer, Trunk
from ..routing.routers import ContextRouter
from ..routing.tuning import Tuning

TRIAL_WINDOWS = 4
TRIAL_TOKENS = 32
GENERATED = (8, 64)  # windows and tokens of the text that the trunk generates
CLAIMED = (8, 32)  # of the text that is likely by a module's counts too
MOST_EXCESS = 4.0  # nats per token above the trunk's loss on that text; more is refused. Random weights had 4.3 to 7.3
MOST_CLAIMED = 1.5  # of the same on text that is likely by its counts; more is refused. Working modules had at most 0.6
MOST_GROWTH = 1000.0  # of the hidden states; more is refused


class Reference(NamedTuple):
    """What modules are compared with: the trunk, its hidden states for random ids, and its loss on text that it
    generated itself.
    """

    trunk: Trunk
    sizes: list[float]
    generated: torch.Tensor
    loss: float


class Effect(NamedTuple):
    """growth: how many times as large as the trunk's the hidden states are. excess, claimed: nats per token above the
    trunk's loss.

    excess: on the trunk's own text. claimed: on text that is likely by the module's counts too.
    """

    growth: float = 1.0
    excess: float = 0.0
    claimed: float = 0.0


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
    tokens = _drawn(trunk, GENERATED)
    return Reference(
        trunk, sizes, tokens, mean_loss(trunk, list(tokens.numpy()), "the trunk on text that it generated")
    )


def check_module(model: Trunk, trunk: Reference, place: Any, statistics: Tensors | None = None) -> Effect:
    """Refuses a module whose weights would spoil every text, even with a small gate, or the text that its counts claim.

    A module of another domain is somewhat worse on the trunk's text, a broken one far worse. A module with broken
    weights and true statistics is worse than the trunk on the text that the router gives it.
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
    claimed = 0.0 if statistics is None else excess_on_claimed(model, trunk.trunk, statistics, place)
    if claimed > MOST_CLAIMED:
        raise UserError(
            f"{place}: on text that its own counts call likely, its loss is {claimed:.1f} nats per token above the trunk's; those of "
            "working modules are at most 0.6 above. Its weights do not fit its statistics: do not use this artifact."
        )
    return Effect(growth, excess, claimed)


def excess_on_claimed(model: Trunk, trunk: Trunk, statistics: Tensors, place: Any) -> float:
    """Nats per token of a module above the trunk, on text drawn from the product of the trunk's probabilities and those
    of its counts.

    The context router gives the module such text. Drawn from the counts alone it would be nonsense, on which good
    modules are worse too.
    """
    assert trunk.config.eos_token_id is not None
    router = ContextRouter([statistics], torch.ones(1), trunk.config.eos_token_id, Tuning())
    every = np.arange(trunk.config.vocab_size)[None]

    def by_counts(last: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(router.pair_p(last.numpy().repeat(every.shape[1], 1), every.repeat(len(last), 0))[0])

    windows = list(_drawn(trunk, CLAIMED, by_counts).numpy())
    of_trunk = mean_loss(trunk, windows, f"the trunk on text that the counts of {place} call likely")
    return mean_loss(model, windows, f"{place} on text that its counts call likely") - of_trunk


def _drawn(trunk: Trunk, size: tuple[int, int], weight: Callable[[torch.Tensor], Any] = lambda last: 1) -> torch.Tensor:
    """Ids that the trunk generates, size: windows and tokens after an EOS.

    weight: of the probabilities [B, V], by the last ids [B, 1].
    """
    windows, length = size
    generator = torch.Generator().manual_seed(0)
    assert trunk.config.eos_token_id is not None
    tokens = last = torch.full((windows, 1), trunk.config.eos_token_id)
    cache: Cache = []
    for _ in range(min(length, trunk.config.max_position_embeddings - 1)):
        p = trunk.next_logits(last, cache).float().softmax(-1) * weight(last)
        last = torch.multinomial(p, 1, generator=generator)
        tokens = torch.cat((tokens, last), dim=1)
    return tokens


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
    """Nats per token of windows of ids, int64 [up to T + 1], each scored by itself.

    UserError, which names `what`, if it is not finite.
    """
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
