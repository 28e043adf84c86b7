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

# Limits of the fields of Effect, and what working modules had. The broken one was trained at a rate of 0.02 on a trunk
# of 20 updates.
LARGE_GROWTH = 10.0  # warned; working modules 0.9 to 1.6, a broken one 82
LARGE_ON_TRUNK_TEXT = 1.5  # warned; working modules 0.1 to 1.0, a broken one 3.0
LARGE_ON_OWN_TEXT = 0.65  # refused without --allow-worse; working modules at most 0.6
THIN_TOKENS = 5_000  # counted; with fewer, the router hardly knows the module's text
# Counted tokens as a share of the stated ones: rare ones are left out, and counts are rounded by 3%.
COUNTED_SHARE = (0.5, 1.1)
LEAST_SPREAD = 0.1  # standard deviation of the counts as a share of their mean; that of a text is far above 1
COUNTED_PER_SEEN = 20  # counted tokens per token seen in training; more is a contradiction
# Two modules' counts are copies if their cosine is above the first, and their totals differ by less than the second.
SAME_COSINE = 0.999
SAME_TOTAL = 0.05
LOSS_DIFFERENCE = 0.1  # nats per token; windows of another length explain less


class CheckedModule(NamedTuple):
    """What the table and the checks need of a module, without its weights."""

    metadata: dict[str, Any]
    parameters: int
    counts: torch.Tensor | None
    """Of its tokens, float32 [V]; None without statistics."""
    effect: Effect = Effect()
    """The result of `check_module`."""
    measured: tuple[float, float] | None = None
    """The trunk's loss and its own on --check-data."""

    @property
    def name(self) -> str:
        return self.metadata["name"]


class ModuleWarning(NamedTuple):
    keyword: str
    """For the module's row of the table."""
    sentence: str
    """For a line below the table."""


def measure_module(part: Part, trunk: Trunk, effect: Effect, windows: Sequence[np.ndarray]) -> CheckedModule:
    """Counts a module's parameters and measures its loss on the windows of --check-data; [] if there are none."""
    shared = {id(parameter) for parameter in trunk.parameters()}
    parameters = sum(own.numel() for own in part.model.parameters() if id(own) not in shared)
    counts = None if part.statistics is None else decode(part.statistics["unigrams"])
    measured = None
    if windows:
        trunk_loss = mean_loss(trunk, windows, "the trunk on --check-data")
        measured = trunk_loss, mean_loss(part.model, windows, f"module {part.name} on --check-data")
    return CheckedModule(part.metadata, parameters, counts, effect, measured)


def weight_warnings(module: CheckedModule) -> list[ModuleWarning]:
    """Warns of hidden states far larger than the trunk's, and of a loss far above it on either kind of text."""
    warnings = []
    effect = module.effect
    if effect.growth > LARGE_GROWTH:
        sentence = f"its hidden states are up to {effect.growth:,.0f} times those of the trunk for random tokens"
        warnings.append(ModuleWarning("size", sentence))
    if effect.excess_on_trunk_text > LARGE_ON_TRUNK_TEXT:
        excess = f"{effect.excess_on_trunk_text:.1f} nats per token above the trunk's"
        warnings.append(ModuleWarning("weights", f"its loss on text that the trunk generates is {excess}"))
    if effect.excess_on_own_text > LARGE_ON_OWN_TEXT:
        warnings.append(ModuleWarning("text", _own_text_sentence(effect)))
    return warnings


def _own_text_sentence(effect: Effect) -> str:
    excess = f"{effect.excess_on_own_text:.1f} nats per token above the trunk's"
    return f"its loss on text that its own counts call likely is {excess}"


def statistics_warnings(metadata: dict[str, Any], counts: torch.Tensor | None) -> list[ModuleWarning]:
    """Warns where a module's counts of tokens [V] are of little use, or contradict its metadata."""
    if counts is None:
        return [ModuleWarning("none", "it has no statistics")]
    values = counts.double()
    counted = float(values.sum())
    if counted < 1:
        return [ModuleWarning("empty", "its statistics are empty. Count them on more documents")]
    warnings = []
    if counted < THIN_TOKENS:
        needed = f"a router needs {THIN_TOKENS:,} or more"
        warnings.append(ModuleWarning("thin", f"its statistics count only {counted:,.0f} tokens; {needed}"))
    if float(values.std()) < LEAST_SPREAD * float(values.mean()):
        warnings.append(
            ModuleWarning("flat", "its statistics count all tokens about equally often, which is not so in a text")
        )
    sample = metadata.get("statistics")
    stated = as_number(sample.get("tokens")) if isinstance(sample, dict) else None
    seen = as_number(metadata.get("tokens_seen"))
    if stated is None:
        warnings.append(ModuleWarning("unstated", "it does not state how many tokens its statistics count"))
    elif not COUNTED_SHARE[0] * stated <= counted <= COUNTED_SHARE[1] * stated:
        warnings.append(
            ModuleWarning("counts", f"its counts add up to {counted:,.0f} tokens, but it states {stated:,.0f}")
        )
    if stated is not None and seen is not None and stated > COUNTED_PER_SEEN * seen:
        warnings.append(
            ModuleWarning("seen", f"it states {stated:,.0f} counted tokens, but only {seen:,.0f} in training")
        )
    return warnings


def loss_warnings(module: CheckedModule) -> list[ModuleWarning]:
    """Warns where the loss on --check-data contradicts the claimed one."""
    if module.measured is None:
        return []
    trunk, own = module.measured
    _, claimed = claimed_losses(module.metadata)
    if own >= trunk:
        return [ModuleWarning("loss", f"its loss on --check-data is {own:.4f}, not below the trunk's {trunk:.4f}")]
    if claimed is not None and own > claimed + LOSS_DIFFERENCE:
        return [ModuleWarning("loss", f"it claims a loss of {claimed:.4f}; on --check-data it is {own:.4f}")]
    return []


def copy_warnings(modules: list[CheckedModule], trunk_counts: torch.Tensor | None) -> list[list[ModuleWarning]]:
    """For each module, a warning of the first candidate before it with the same weights or statistics, or nearly the
    same counts; [] where there is none.
    """
    names = ["the trunk", *(module.name for module in modules)]
    metadata = [{}, *(module.metadata for module in modules)]
    all_counts = [trunk_counts, *(module.counts for module in modules)]
    size = max((len(counts) for counts in all_counts if counts is not None), default=0)
    counts = torch.stack([torch.zeros(size) if one is None else one for one in all_counts])  # [E, V]
    norms = counts.norm(dim=1)
    totals = counts.sum(1)
    warnings: list[list[ModuleWarning]] = [[] for _ in modules]
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
            warnings[i - 1] = [ModuleWarning("copy", what)]
            break
    return warnings


def check_worse(modules: list[CheckedModule]) -> None:
    """Refuses a module that is far worse than the trunk on its own text, where it gets large gates."""
    for module in modules:
        if module.effect.excess_on_own_text > LARGE_ON_OWN_TEXT:
            raise UserError(
                f"module {module.name}: {_own_text_sentence(module.effect)}; those of working modules are at most "
                f"{LARGE_ON_OWN_TEXT} above. Leave it out, train it at a lower --lr, or accept it with --allow-worse."
            )


def check_copies(modules: list[CheckedModule], trunk_counts: torch.Tensor | None) -> None:
    """Refuses a module whose statistics are nearly those of the trunk, or of a module with other weights: the router
    would give it half of the other's text.

    trunk_counts: of the tokens that the trunk was trained on [V]; None where it does not publish them.
    """
    for i, module in enumerate(modules):
        if copy_warnings([module], trunk_counts)[0]:
            raise UserError(
                f"module {module.name} has nearly the same statistics as the trunk: it was trained on the same text, "
                "or they are a copy. Leave it out, or accept it with --allow-copies."
            )
        others = [other for other in modules[:i] if not _same("digest", other.metadata, module.metadata)]
        for other in others:
            if copy_warnings([other, module], None)[1]:
                raise UserError(
                    f"modules {other.name} and {module.name} have nearly the same statistics: they were trained on the "
                    "same text, or one's statistics are a copy. Leave one out, or accept both with --allow-copies."
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
    """An untrusted value as a number; None where it is not a number from 0 to 1e18."""
    return float(value) if type(value) in (int, float) and 0 <= value <= 1e18 else None
