"""What `assemble` checks of modules that others published. module_table.py prints it.

A digest shows that the bytes are the author's, not that they are good. So each candidate passes a trial, a module's counts are
compared with what it states and with those of the other candidates, and its loss can be measured again.

E candidates (the trunk first), V vocabulary
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
from ..routing.statistics import decode
from .assembled import Part

TRIAL_WINDOWS = 4
TRIAL_TOKENS = 32
GENERATED = (8, 64)  # windows and tokens of the text that the trunk generates
MOST_EXCESS = 4.0  # nats per token above the trunk's loss on that text; more is refused. Random weights had 4.3 to 7.3
LARGE_EXCESS = 1.5  # warned; modules had 0.1 to 1.0, and 3.0 after training at a rate of 0.02 on a trunk of 20 updates
THIN_TOKENS = 5_000  # counted; with fewer, the router hardly knows the module's text
COUNTED = (0.5, 1.1)  # counted tokens as a share of the stated ones: rare ones are left out, counts are rounded by 3%
LEAST_SPREAD = 0.1  # standard deviation of the counts as a share of their mean; that of a text is far above 1
SEEN = 20  # times as many tokens counted as seen in training
MOST_GROWTH = 1000.0  # of the hidden states; more is refused
LARGE_GROWTH = 10.0  # warned; seen were 0.9 to 1.6, and 82 after training at a rate of 0.02 on a trunk of 20 updates
SAME_COSINE = 0.999
SAME_TOTAL = 0.05  # difference of the totals, as a share
LOSS_DIFFERENCE = 0.1  # nats per token; windows of another length explain less


class Reference(NamedTuple):
    """What modules are compared with: the trunk's hidden states for random ids, and its loss on text that it generated itself."""

    sizes: list[float]
    generated: torch.Tensor
    loss: float


class Effect(NamedTuple):
    """growth: how many times as large as the trunk's the hidden states are. excess: nats per token on the trunk's own text."""

    growth: float = 1.0
    excess: float = 0.0


class Examined(NamedTuple):
    """A module in the table.

    counts: of its tokens, float32 [V]. effect: of check_module. rescored: the trunk's and its own loss on --check-data.
    """

    metadata: dict[str, Any]
    parameters: int
    counts: torch.Tensor | None
    effect: Effect = Effect()
    rescored: tuple[float, float] | None = None

    @property
    def name(self) -> str:
        return self.metadata["name"]


class Warned(NamedTuple):
    """keyword: for the module's row. sentence: for a line of its own."""

    keyword: str
    sentence: str


def examined(part: Part, trunk: Trunk, effect: Effect, windows: Sequence[np.ndarray]) -> Examined:
    """What the table needs of a module, without its weights. windows: of --check-data; [] if there are none."""
    shared = {id(parameter) for parameter in trunk.parameters()}
    parameters = sum(own.numel() for own in part.model.parameters() if id(own) not in shared)
    counts = None if part.statistics is None else decode(part.statistics["unigrams"])
    if not windows:
        return Examined(part.metadata, parameters, counts, effect)
    losses = [
        mean_loss(model, windows, f"{name} on --check-data")
        for name, model in (("the trunk", trunk), (f"module {part.name}", part.model))
    ]
    return Examined(part.metadata, parameters, counts, effect, (losses[0], losses[1]))


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


# ---- Warnings ----


def weight_warnings(module: Examined) -> list[Warned]:
    """Of hidden states that are far larger than the trunk's, and of a loss far above it on the trunk's own text."""
    warnings = []
    growth, excess = module.effect
    if growth > LARGE_GROWTH:
        warnings.append(
            Warned("size", f"its hidden states are up to {growth:,.0f} times those of the trunk for random tokens")
        )
    if excess > LARGE_EXCESS:
        warnings.append(
            Warned(
                "weights", f"its loss on text that the trunk generates is {excess:.1f} nats per token above the trunk's"
            )
        )
    return warnings


def statistics_warnings(metadata: dict[str, Any], counts: torch.Tensor | None) -> list[Warned]:
    """What makes a module's counts of tokens [V] of little use, or contradicts what it states."""
    if counts is None:
        return [Warned("none", "it has no statistics")]
    values = counts.double()
    counted = float(values.sum())
    if counted < 1:
        return [Warned("empty", "its statistics are empty. Count them on more documents")]
    warnings = []
    if counted < THIN_TOKENS:
        needed = f"a router needs {THIN_TOKENS:,} or more"
        warnings.append(Warned("thin", f"its statistics count only {counted:,.0f} tokens; {needed}"))
    if float(values.std()) < LEAST_SPREAD * float(values.mean()):
        warnings.append(
            Warned("flat", "its statistics count all tokens about equally often, which is not so in a text")
        )
    sample = metadata.get("statistics")
    stated = as_number(sample.get("tokens")) if isinstance(sample, dict) else None
    seen = as_number(metadata.get("tokens_seen"))
    if stated is None:
        warnings.append(Warned("unstated", "it does not state how many tokens its statistics count"))
    elif not COUNTED[0] * stated <= counted <= COUNTED[1] * stated:
        warnings.append(Warned("counts", f"its counts add up to {counted:,.0f} tokens, but it states {stated:,.0f}"))
    if stated is not None and seen is not None and stated > SEEN * seen:
        warnings.append(Warned("seen", f"it states {stated:,.0f} counted tokens, but only {seen:,.0f} in training"))
    return warnings


def loss_warnings(module: Examined) -> list[Warned]:
    """What --check-data says against the claimed loss."""
    if module.rescored is None:
        return []
    trunk, own = module.rescored
    _, claimed = claimed_losses(module.metadata)
    if own >= trunk:
        return [Warned("loss", f"its loss on --check-data is {own:.4f}, not below the trunk's {trunk:.4f}")]
    if claimed is not None and own > claimed + LOSS_DIFFERENCE:
        return [Warned("loss", f"it claims a loss of {claimed:.4f}; on --check-data it is {own:.4f}")]
    return []


def copy_warnings(modules: list[Examined], trunk_counts: torch.Tensor | None) -> list[list[Warned]]:
    """For each module the first candidate before it that has the same weights or statistics, or nearly the same counts."""
    names = ["the trunk", *(module.name for module in modules)]
    metadata = [{}, *(module.metadata for module in modules)]
    all_counts = [trunk_counts, *(module.counts for module in modules)]
    size = max((len(counts) for counts in all_counts if counts is not None), default=0)
    counts = torch.stack([torch.zeros(size) if one is None else one for one in all_counts])  # [E, V]
    norms = counts.norm(dim=1)
    totals = counts.sum(1)
    warnings: list[list[Warned]] = [[] for _ in modules]
    for i in range(1, len(names)):
        cosines = (counts[:i] @ counts[i] / (norms[:i] * norms[i]).clamp(min=1e-9)).tolist()
        for j, cosine in enumerate(cosines):
            near = abs(float(totals[j] / totals[i].clamp(min=1)) - 1) < SAME_TOTAL
            if _same("digest", metadata[i], metadata[j]):
                what = f"its weights are those of {names[j]}"
            elif _same("statistics_digest", metadata[i], metadata[j]):
                what = f"its statistics are those of {names[j]}"
            elif cosine > SAME_COSINE and near:
                what = f"its counts are nearly those of {names[j]} (cosine {cosine:.5f})"
            else:
                continue
            warnings[i - 1] = [Warned("copy", what)]
            break
    return warnings


def check_copies(modules: list[Examined]) -> None:
    """Refuses other weights with the statistics of another module, or nearly those: half of its text would go to them."""
    for i, module in enumerate(modules):
        others = [other for other in modules[:i] if not _same("digest", other.metadata, module.metadata)]
        for other in others:
            if copy_warnings([other, module], None)[1]:
                raise UserError(
                    f"modules {other.name} and {module.name} have nearly the same statistics: they were trained on the same text, or one's "
                    "statistics are a copy. Leave one out, or accept both with --allow-copies."
                )


def _same(key: str, one: dict[str, Any], other: dict[str, Any]) -> bool:
    return key in one and one[key] == other.get(key)


def claimed_losses(metadata: dict[str, Any]) -> tuple[float | None, float | None]:
    """The losses on its own domain that a module claims, before and after its training; None where it claims none."""
    own = metadata.get("losses", {}).get("own")
    if not isinstance(own, dict):
        return None, None
    return as_number(own.get("before")), as_number(own.get("after"))


def as_number(value: Any) -> float | None:
    """An untrusted value as a number; None where it is not one from 0 to 1e18."""
    return float(value) if type(value) in (int, float) and 0 <= value <= 1e18 else None
