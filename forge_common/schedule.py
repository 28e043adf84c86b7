"""Learning-rate schedules: pure functions from the update to a factor of the peak rate, so a resume needs no state.

`step` is an update of the optimizer, so a factor does not depend on the number of processes or on accumulation.
To add a curve, add a function and an entry in SCHEDULES; the parametrized tests then cover it.
"""

import math
from collections.abc import Callable
from typing import Any

WARMUP_STEPS = 100


def default_warmup(steps: int) -> int:
    """The warm-up updates of a run of `steps` updates whose settings give none."""
    return min(WARMUP_STEPS, steps // 10)


def _warmup(step: float, warmup_steps: int) -> float:
    """Position of `step` in the warm-up, from 0 to 1; 1 without a warm-up."""
    if warmup_steps == 0:
        return 1.0
    return min(step / warmup_steps, 1.0)


def _progress(step: float, start: float, end: float) -> float:
    """Position of `step` between `start` (0) and `end` (1), clamped to [0, 1]."""
    if end <= start:
        return float(step >= end)
    return min(max((step - start) / (end - start), 0.0), 1.0)


def cosine(step: float, *, warmup_steps: int, total_steps: float, floor: float = 0.0) -> float:
    """From 0 linear to 1 at `warmup_steps`, then half a cosine to `floor` at `total_steps`, then constant.

    Source: Loshchilov & Hutter, SGDR, arXiv 1608.03983, eq. 5, with one cycle.
    """
    if step < warmup_steps:
        return _warmup(step, warmup_steps)
    decay = 0.5 * (1.0 + math.cos(math.pi * _progress(step, warmup_steps, total_steps)))
    return floor + (1.0 - floor) * decay


def linear(step: float, *, warmup_steps: int, total_steps: float, floor: float = 0.0) -> float:
    """From 0 linear to 1 at `warmup_steps`, then linear to `floor` at `total_steps`."""
    if step < warmup_steps:
        return _warmup(step, warmup_steps)
    return floor + (1.0 - floor) * (1.0 - _progress(step, warmup_steps, total_steps))


def constant(step: float, *, warmup_steps: int, total_steps: float, floor: float = 0.0) -> float:
    """From 0 linear to 1 at `warmup_steps`, then 1. `floor` has no effect."""
    return _warmup(step, warmup_steps)


def wsd(step: float, *, warmup_steps: int, total_steps: float, floor: float = 0.0, decay_share: float = 0.2) -> float:
    """Warm-up, stable, decay: 1 until the last `decay_share` of the run, then linear to `floor` at `total_steps`.

    Source: Hu et al., MiniCPM, arXiv 2404.06395. The length of the decay follows Hägele et al., arXiv 2405.18392.
    """
    if step < warmup_steps:
        return _warmup(step, warmup_steps)
    decay_start = max(warmup_steps, (1.0 - decay_share) * total_steps)
    return floor + (1.0 - floor) * (1.0 - _progress(step, decay_start, total_steps))


SCHEDULES: dict[str, Callable[..., float]] = {"cosine": cosine, "linear": linear, "constant": constant, "wsd": wsd}


def rate(settings: Any, update: int) -> float:
    """The learning rate of `update`, counted from 1, by the settings of a script."""
    curve = {"warmup_steps": settings.warmup_steps, "floor": settings.min_lr_ratio}
    if settings.schedule == "wsd":
        curve["decay_share"] = settings.wsd_decay_share
    return settings.lr * factor(settings.schedule, update, settings.steps, **curve)


def factor(name: str, update: int, steps: int, *, warmup_steps: int, floor: float, **shape: float) -> float:
    """The factor of the peak rate at `update`, counted from 1, of `steps` updates.

    No update has the rate 0: the first has 1 / warmup_steps, and the curve ends at steps + 1, after the last one.
    shape: the arguments that only this curve has.
    """
    return SCHEDULES[name](update, warmup_steps=warmup_steps, total_steps=steps + 1, floor=floor, **shape)
