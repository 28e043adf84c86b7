"""The benchmark beside other projects: it compares by round, and says where contenders do not train the same thing."""

import math
import sys

import launch
import pytest

sys.path.insert(0, str(launch.ROOT / "benchmarks"))

from peers import CONTENDERS
from peers_table import GOALS, LARGE, OTHERS, OURS, PEER, ratios, report

GROUPS = {"train_shared": ("standard", "whole"), "bare loop": ("standard", "whole"), "PEFT LoRA": ("standard", "lora")}


def measured(speeds: list[float], loss: float) -> list[dict[str, float]]:
    return [{"tokens/s": speed, "loss": loss, "peak": 100.0, "above start": 50.0} for speed in speeds]


def test_ratios_are_of_the_same_round_and_the_median_is_compared_with_the_goal():
    found = {"train_shared": measured([100, 60, 300], 7.0), "bare loop": measured([100, 50, 100], 7.0)}
    assert ratios(found, "train_shared", "bare loop", "tokens/s") == [1.0, 1.2, 3.0]
    table, chart, wrong = report(found, GROUPS)
    assert "| train_shared / bare loop | tokens/s | 1.200 (1.000-3.000) | >= 1.0 | yes |" in table
    assert "| train_shared / bare loop | peak | 1.000 (1.000-1.000) | <= 0.7 | no |" in table
    assert wrong == "" and "train_shared, tokens/s: 1.2000" in chart


@pytest.mark.parametrize("loss", [7.002, 6.998, math.nan])
def test_another_loss_than_that_of_the_others_is_an_error_that_names_the_contender(loss):
    same = {"train_shared": measured([1], 7.0), "PEFT LoRA": measured([1], 3.0)}
    assert report(same | {"bare loop": measured([1], 7.0005)}, GROUPS)[2] == ""
    wrong = report(same | {"bare loop": measured([1], loss)}, GROUPS)[2]
    assert "bare loop" in wrong and "PEFT LoRA" not in wrong


def test_the_table_compares_contenders_that_exist():
    named = {name for goal in GOALS for name in goal[:2]} - {PEER}
    assert named | {*OURS, *OTHERS, *LARGE} <= CONTENDERS.keys()
