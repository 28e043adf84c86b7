"""Properties of every curve in SCHEDULES, also of a new one, and those of single curves."""

import itertools
import math

import pytest

from forge_common.schedule import SCHEDULES, cosine, factor, linear, wsd

CASES = [  # warmup_steps, total_steps, floor
    (0, 1, 0.0),
    (0, 50, 0.0),
    (1, 50, 0.1),
    (7, 50, 0.0),
    (7, 50, 0.1),
    (45, 50, 0.3),  # warm-up reaches into the decay of wsd
    (49, 50, 1.0),
    (100, 1001, 0.0),
]
every_curve = pytest.mark.parametrize("curve", SCHEDULES.values(), ids=SCHEDULES)
every_case = pytest.mark.parametrize(("warmup", "total", "floor"), CASES)


@every_curve
@every_case
def test_every_curve(curve, warmup, total, floor):
    at = [curve(step, warmup_steps=warmup, total_steps=total, floor=floor) for step in range(total + 1)]
    assert at[:warmup] == [step / warmup for step in range(warmup)]  # from 0, linear
    assert at[warmup] == pytest.approx(1.0, abs=1e-15)
    assert all(floor <= value <= 1 for value in at[warmup:])
    assert all(later <= earlier for earlier, later in itertools.pairwise(at[warmup:]))
    beyond = [curve(total + more, warmup_steps=warmup, total_steps=total, floor=floor) for more in (1, 10, 10**9)]
    assert beyond == [at[-1]] * 3


@every_curve
@every_case
def test_a_falling_curve_ends_at_the_floor(curve, warmup, total, floor):
    end = curve(total, warmup_steps=warmup, total_steps=total, floor=floor)
    assert end == pytest.approx(1.0 if curve is SCHEDULES["constant"] else floor, abs=1e-15)
    # Scaled from [floor, 1] to [0, 1], the curve is the same for every floor.
    for step in range(warmup, total + 1):
        bare = curve(step, warmup_steps=warmup, total_steps=total, floor=0.0)
        raised = curve(step, warmup_steps=warmup, total_steps=total, floor=floor)
        fallen = bare if curve is SCHEDULES["constant"] else floor + (1 - floor) * bare
        assert raised == pytest.approx(fallen, abs=1e-12)


@every_curve
@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (1, 1), (0, 20), (5, 20), (20, 20), (100, 1000)])
def test_no_update_has_the_rate_0(curve, warmup, steps):
    name = next(name for name, known in SCHEDULES.items() if known is curve)
    rates = [factor(name, n, warmup_steps=warmup, steps=steps, floor=0.0) for n in range(1, steps + 1)]
    assert min(rates) > 0  # also in the last one
    assert max(rates) <= 1
    assert warmup == 0 or max(rates) == 1  # warm-up is reached, even where it is the whole run
    if warmup:
        assert rates[0] == 1 / warmup
    ending = {"warmup_steps": warmup, "total_steps": steps + 1, "floor": 0.0}
    assert rates == [curve(n, **ending) for n in range(1, steps + 1)]


def test_cosine_is_the_closed_form():
    for step in range(10, 111):
        wanted = 0.2 + 0.8 * (1 + math.cos(math.pi * (step - 10) / 100)) / 2
        assert cosine(step, warmup_steps=10, total_steps=110, floor=0.2) == pytest.approx(wanted, abs=1e-14)
    half = cosine(60, warmup_steps=10, total_steps=110, floor=0.2)
    assert half == pytest.approx(0.6, abs=1e-14)
    for away in range(51):  # symmetric about its middle
        pair = [cosine(60 + side * away, warmup_steps=10, total_steps=110, floor=0.2) for side in (-1, 1)]
        assert sum(pair) == pytest.approx(1.2, abs=1e-14)


def test_linear_falls_by_the_same_amount_at_every_step():
    at = [linear(step, warmup_steps=10, total_steps=110, floor=0.2) for step in range(10, 111)]
    assert [a - b for a, b in itertools.pairwise(at)] == pytest.approx([0.008] * 100, abs=1e-14)


def test_wsd_decays_in_the_last_fifth_only():
    at = [wsd(step, warmup_steps=10, total_steps=100, floor=0.2) for step in range(101)]
    assert at[10:81] == [1.0] * 71
    assert [a - b for a, b in itertools.pairwise(at[80:])] == pytest.approx([0.04] * 20, abs=1e-14)
