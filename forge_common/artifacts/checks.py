"""What `assemble` checks of modules that others published. module_table.py prints it.

Beside the trial (trial.py), a module's counts are compared with what it states and with those of the other candidates,
and its loss can be measured again.

E candidates (the trunk first), V vocabulary
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import UserError
from ..model.trunk import Trunk
from ..routing.statistics import decode
from .assembled import Part
from .trial import Effect, mean_loss

LARGE_EXCESS = 1.5  # warned; modules had 0.1 to 1.0, and 3.0 after training at a rate of 0.02 on a trunk of 20 updates
LARGE_CLAIMED = 0.65  # on text that its counts call likely; refused without --allow-worse. Modules had at most 0.6
THIN_TOKENS = 5_000  # counted; with fewer, the router hardly knows the module's text
COUNTED = (0.5, 1.1)  # counted tokens as a share of the stated ones: rare ones are left out, counts are rounded by 3%
LEAST_SPREAD = 0.1  # standard deviation of the counts as a share of their mean; that of a text is far above 1
SEEN = 20  # times as many tokens counted as seen in training
LARGE_GROWTH = 10.0  # warned; seen were 0.9 to 1.6, and 82 after training at a rate of 0.02 on a trunk of 20 updates
SAME_COSINE = 0.999
SAME_TOTAL = 0.05  # difference of the totals, as a share
LOSS_DIFFERENCE = 0.1  # nats per token; windows of another length explain less


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


def weight_warnings(module: Examined) -> list[Warned]:
    """Of hidden states that are far larger than the trunk's, and of a loss above it on the trunk's own text, or on what
    the counts claim.
    """
    warnings = []
    growth, excess, claimed = module.effect
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
    if claimed > LARGE_CLAIMED:
        what = "its loss on text that its own counts call likely"
        warnings.append(Warned("text", f"{what} is {claimed:.1f} nats per token above the trunk's"))
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


def check_weights(modules: list[Examined]) -> None:
    """Refuses a module that is far worse than the trunk on the text that its counts claim, where it gets large gates."""
    for module in modules:
        for warned in weight_warnings(module):
            if warned.keyword == "text":
                raise UserError(
                    f"module {module.name}: {warned.sentence}; those of working modules are at most {LARGE_CLAIMED} above. Leave "
                    "it out, train it at a lower --lr, or accept it with --allow-worse."
                )


def check_copies(modules: list[Examined], trunk_counts: torch.Tensor | None) -> None:
    """Refuses other weights with the statistics of another module or of the trunk, or nearly those: half of its text
    would go to them.

    trunk_counts: of the tokens that the trunk was trained on [V]; None where it does not publish them.
    """
    for i, module in enumerate(modules):
        if copy_warnings([module], trunk_counts)[0]:
            raise UserError(
                f"module {module.name} has nearly the same statistics as the trunk: it was trained on the same text, or they "
                "are a copy. Leave it out, or accept it with --allow-copies."
            )
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
