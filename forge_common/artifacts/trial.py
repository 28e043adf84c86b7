"""Tries the weights of each part of an assembled model: on random ids, and on text that the trunk generates.

A digest shows that the bytes are the author's, not that they are good.

B batch, T time, V vocabulary
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import UserError
from ..files.tensors import Tensors
from ..model.modules import RoutedExpert
from ..model.trunk import Cache, Trunk
from ..routing.layer_mix import feed_of
from ..routing.routers import ContextRouter
from ..routing.tuning import Tuning

TRIAL_WINDOWS = 4
TRIAL_TOKENS = 32
WINDOWS = 8  # that the trunk generates, of either kind of text
TRUNK_TEXT_TOKENS = 64  # in a window of the trunk's text
OWN_TEXT_TOKENS = 32  # in a window of a module's own text: likely by the trunk and by the module's counts
# A module with more is refused. Excess: nats per token above the trunk's loss on the same text.
MOST_GROWTH = 1000.0  # of the hidden states
MOST_ON_TRUNK_TEXT = 4.0  # excess; random weights had 4.3 to 7.3
MOST_ON_OWN_TEXT = 1.5  # excess; working modules had at most 0.6
# A trunk writes text if its loss on what it generates is a smaller share of ln V, the loss of one that knows nothing.
# After 40 updates it was 0.84, and working modules had an excess of up to 0.86 on their own text, which was repeated
# line ends; after 120, 200 and 400 updates it was 0.76, 0.69 and 0.59, and the excess at most 0.27.
MOST_OF_UNTRAINED_LOSS = 0.75


class Reference(NamedTuple):
    """The trunk, with which modules are compared."""

    trunk: Trunk
    sizes: list[float]
    """The result of `check_trial`."""
    text: list[np.ndarray]
    """Windows of ids [T + 1] that it generated."""
    loss: float
    """Its nats per token on them."""

    @property
    def writes_text(self) -> bool:
        """Whether the trunk has learned enough for what it generates to be like text."""
        return self.loss < MOST_OF_UNTRAINED_LOSS * math.log(self.trunk.config.vocab_size)


class Effect(NamedTuple):
    """What a module does to the trunk. An excess is in nats per token above the trunk's loss on the same text."""

    growth: float = 1.0
    """How many times as large as the trunk's the hidden states become."""
    excess_on_trunk_text: float = 0.0
    excess_on_own_text: float = 0.0
    """0 where the trunk does not write text."""


@torch.no_grad()
def check_trial(model: Trunk, place: Any) -> list[float]:
    """Refuses weights that are finite but give values that are not, for random ids. Half of the windows begin with an
    EOS.

    Returns the root mean square of the hidden states after each layer. Experts with a router row are tried with and
    without that row, since an assembled model leaves it out.
    """
    generator = torch.Generator().manual_seed(0)
    length = min(TRIAL_TOKENS, model.config.max_position_embeddings)
    tokens = torch.randint(model.config.vocab_size, (TRIAL_WINDOWS, length), generator=generator)
    assert model.config.eos_token_id is not None  # read_trunk takes it from the tokenizer
    tokens[::2, 0] = model.config.eos_token_id
    layers = model.model.layers
    sizes = _hidden_sizes(model, tokens, None, place)
    if any(isinstance(layer.addition, RoutedExpert) for layer in layers):
        alone = _hidden_sizes(model, tokens, [feed_of(layer) for layer in layers], place)
        sizes = [max(pair) for pair in zip(sizes, alone, strict=True)]
    return sizes


def make_reference(trunk: Trunk, place: Any) -> Reference:
    """Tries the trunk, and has it generate the text on which modules are compared with it: there is no other text."""
    sizes = check_trial(trunk, place)
    text = _generate(trunk, TRUNK_TEXT_TOKENS)
    return Reference(trunk, sizes, text, mean_loss(trunk, text, "the trunk on text that it generated"))


def check_module(model: Trunk, reference: Reference, place: Any, statistics: Tensors | None = None) -> Effect:
    """Refuses a module whose weights would spoil every text, even with a small gate, or the text that it is chosen for.

    A module of another domain is somewhat worse on the trunk's text, a broken one far worse. A module with broken
    weights and true statistics is worse than the trunk on its own text; a little worse tells something only where the
    trunk writes text.
    """
    sizes = check_trial(model, place)
    growth = max(own / max(other, 1e-9) for own, other in zip(sizes, reference.sizes, strict=True))
    if growth > MOST_GROWTH:
        raise UserError(
            f"{place}: the hidden states are up to {growth:,.0f} times those of the trunk for random tokens, since "
            "some weights are too large. Do not use this artifact."
        )
    excess = mean_loss(model, reference.text, f"{place} on text that the trunk generated") - reference.loss
    if excess > MOST_ON_TRUNK_TEXT:
        raise UserError(
            f"{place}: on text that the trunk generates, its loss is {excess:.1f} nats per token above the trunk's; "
            "those of working modules are at most 1 above. Its weights are broken: do not use this artifact."
        )
    own_excess = 0.0
    if statistics is not None:
        own_excess = excess_on_own_text(model, reference.trunk, statistics, place)
    if own_excess > MOST_ON_OWN_TEXT:
        raise UserError(
            f"{place}: on text that its own counts call likely, its loss is {own_excess:.1f} nats per token above the "
            "trunk's; those of working modules are at most 0.6 above. Its weights do not fit its statistics: do not "
            "use this artifact."
        )
    return Effect(growth, excess, own_excess if reference.writes_text else 0.0)


def excess_on_own_text(model: Trunk, trunk: Trunk, statistics: Tensors, place: Any) -> float:
    """Nats per token of a module above the trunk on its own text: drawn from the product of the trunk's probabilities
    and those of the module's counts.

    The context router gives the module such text. Text from the counts alone would be nonsense, on which good modules
    are worse too.
    """
    assert trunk.config.eos_token_id is not None
    router = ContextRouter([statistics], torch.ones(1), trunk.config.eos_token_id, Tuning())
    vocabulary = np.arange(trunk.config.vocab_size)[None]

    def by_counts(last: torch.Tensor) -> torch.Tensor:
        previous = last.numpy().repeat(vocabulary.shape[1], axis=1)
        return torch.from_numpy(router.pair_p(previous, vocabulary.repeat(len(last), axis=0))[0])

    text = _generate(trunk, OWN_TEXT_TOKENS, by_counts)
    trunk_loss = mean_loss(trunk, text, f"the trunk on text that the counts of {place} call likely")
    return mean_loss(model, text, f"{place} on text that its counts call likely") - trunk_loss


def _generate(trunk: Trunk, length: int, weight: Callable[[torch.Tensor], Any] = lambda last: 1) -> list[np.ndarray]:
    """WINDOWS windows of ids: an EOS and `length` tokens that the trunk generates.

    weight: factors [B, V] of the next token's probabilities, for the last ids [B, 1].
    """
    generator = torch.Generator().manual_seed(0)
    assert trunk.config.eos_token_id is not None
    tokens = last = torch.full((WINDOWS, 1), trunk.config.eos_token_id)
    cache: Cache = []
    for _ in range(min(length, trunk.config.max_position_embeddings - 1)):
        p = trunk.next_logits(last, cache).float().softmax(-1) * weight(last)
        last = torch.multinomial(p, 1, generator=generator)
        tokens = torch.cat((tokens, last), dim=1)
    return list(tokens.numpy())


def _hidden_sizes(model: Trunk, tokens: torch.Tensor, feeds: list[Any] | None, place: Any) -> list[float]:
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
                f"{place}: {what} are not finite for random tokens, since some weights are too large. Do not use this "
                "artifact."
            )
    return [math.sqrt(square) for square in squares]


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
