"""The benchmark of growth: its lines, what it reports as away from them, and that a point on two curves is measured once."""

import sys

import launch
import pytest

sys.path.insert(0, str(launch.ROOT / "benchmarks"))

from growth_curves import base, curves, name_of
from growth_table import line, report, speeds


def test_a_line_is_fitted_to_the_smallest_points_alone():
    assert line([1.0, 2.0, 9.0], [10, 20, 40], offset=False) == pytest.approx([1, 2, 4])
    assert line([110.0, 130.0, 500.0], [0, 20, 40], offset=True) == pytest.approx([110, 130, 150])


def test_the_speeds_are_those_that_explain_the_seconds_and_never_negative():
    flops, moved = [1e9, 2e9, 4e9], [1e8, 1e8, 8e8]
    assert speeds(flops, moved, [1e-9 * f + 5e-9 * m for f, m in zip(flops, moved, strict=True)]) == pytest.approx(
        (1e-9, 5e-9)
    )
    assert speeds(flops, moved, [1e-9 * f - 1e-10 * m for f, m in zip(flops, moved, strict=True)])[1] == 0


def test_what_grows_faster_than_theory_is_reported():
    start = base(small=True)
    points = dict(list(curves(False, 100)["MB of text"].items()))
    found = {
        name_of(point, start): [{"tokenize": n**1.2, "first update": 5, "tokenize peak": 400, "resident": 300}]
        for n, point in points.items()
    }
    table, chart = report({"MB of text": points}, start, found)
    away = table.split("More than 15% from the line:")[1].strip().splitlines()
    assert away == ["- MB of text 1, s to tokenize: -37%", "- MB of text 100, s to tokenize: +59%"]
    assert "MB of text: tokenize" in chart


def test_a_point_on_two_curves_has_one_name_and_others_have_their_own():
    start = base(small=False)
    points = [point for curve in curves(False, 100).values() for point in curve.values()]
    assert len({name_of(point, start) for point in points}) == len(set(points)) == len(points) - 4
