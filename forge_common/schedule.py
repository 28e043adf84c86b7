"""The learning rate: update -> factor of the peak rate. Pure functions of the update, so a resume needs no state.

A factor never depends on the number of processes or on accumulation: `step` is an update of the optimizer.
A new curve is a function and a line in SCHEDULES; the parametrized tests apply to it by themselves.
"""

import math
from collections.abc import Callable


def _warmup(step: float, warmup_steps: int) -> float:
    return min(step / warmup_steps, 1.0) if warmup_steps else 1.0


def _progress(step: float, start: float, end: float) -> float:
    """How far `step` is on the way from `start` (0) to `end` (1), clamped at both."""
    return min(max((step - start) / (end - start), 0.0), 1.0) if end > start else float(step >= end)


def cosine(step: float, *, warmup_steps: int, total_steps: float, floor: float = 0.0) -> float:
    """f(0) = 0, linear to 1 at `warmup_steps`, half a cosine down to `floor` at `total_steps`, `floor` beyond.

    Source: Loshchilov & Hutter, SGDR, arXiv 1608.03983, eq. 5, with one cycle.
    """
    if step < warmup_steps:
        return _warmup(step, warmup_steps)
    fall = 0.5 * (1.0 + math.cos(math.pi * _progress(step, warmup_steps, total_steps)))
    return floor + (1.0 - floor) * fall


def linear(step: float, *, warmup_steps: int, total_steps: float, floor: float = 0.0) -> float:
    """Linear to 1 at `warmup_steps`, then a straight line down to `floor` at `total_steps`."""
    if step < warmup_steps:
        return _warmup(step, warmup_steps)
    return floor + (1.0 - floor) * (1.0 - _progress(step, warmup_steps, total_steps))


def constant(step: float, *, warmup_steps: int, total_steps: float, floor: float = 0.0) -> float:
    """Linear to 1 at `warmup_steps`, then 1. `floor` has nothing to bound here."""
    return _warmup(step, warmup_steps)


def wsd(step: float, *, warmup_steps: int, total_steps: float, floor: float = 0.0) -> float:
    """Warm-up, stable, decay: 1 until the last fifth of the run, then a straight line down to `floor`.

    Source: Hu et al., MiniCPM, arXiv 2404.06395; the share of the decay follows Hägele et al., arXiv 2405.18392.
    """
    if step < warmup_steps:
        return _warmup(step, warmup_steps)
    decay_start = max(warmup_steps, 0.8 * total_steps)
    return floor + (1.0 - floor) * (1.0 - _progress(step, decay_start, total_steps))


SCHEDULES: dict[str, Callable[..., float]] = {"cosine": cosine, "linear": linear, "constant": constant, "wsd": wsd}


def factor(name: str, update: int, *, warmup_steps: int, steps: int, floor: float) -> float:
    """The factor of the peak rate at the `update`-th of `steps` updates, counted from 1.

    The curve ends at steps + 1, so that the last update still moves the weights (at the end itself the rate is `floor`,
    which is 0 by default); the first has the rate 1 / warmup_steps, not 0, for the same reason.
    """
    return SCHEDULES[name](update, warmup_steps=warmup_steps, total_steps=steps + 1, floor=floor)
