"""How long a run is, and what a console shows before the first row of the log."""

import io
import sys
import time
import types

import pytest
import torch

import train_shared
from forge_common.errors import UserError
from forge_common.run.pace import Pace
from forge_common.run.plan import resolved
from forge_common.run.progress import PENDING, UpdateOutcome

CPU = types.SimpleNamespace(device=torch.device("cpu"), is_main_process=True)
DONE = UpdateOutcome(500.0, 1.0, 100, finite=True, overflow=False, applied=True)


def settings(**changes) -> train_shared.Settings:
    return train_shared.Settings(**{"data": ("local:docs",), "output_dir": "run"} | changes)


def corpora(windows: int, fraction: float = 0.02) -> types.SimpleNamespace:
    return types.SimpleNamespace(training=types.SimpleNamespace(size=windows), fraction=fraction)


@pytest.mark.parametrize(
    ("windows", "given", "steps", "warmup"),
    [
        (64_000, {}, 4000, 100),
        (1000, {}, 62, 6),  # not above 4 passes
        (10**9, {}, 10_000, 100),
        (64_000, {"epochs": 0.5}, 500, 50),
        (10**8, {"epochs": 1}, 1_562_500, 100),
        (70, {"epochs": 0.1, "warmup_steps": 0}, 1, 0),
        (1000, {"steps": 777, "warmup_steps": 700}, 777, 700),
        (1000, {"steps": 5}, 5, 0),
    ],
)
def test_the_length_follows_the_text(windows, given, steps, warmup, capsys):
    found = resolved(settings(**given), corpora(windows), print)
    assert (found.steps, found.warmup_steps, found.epochs, found.val_fraction) == (steps, warmup, None, 0.02)
    assert (f"{steps:,} updates: 4 passes" in capsys.readouterr().out) == (not given)
    assert resolved(found, corpora(windows), print) == found, "a settings.json gives the same run"


def test_a_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(UserError, match="--warmup-steps 99 exceeds the 62 updates"):
        resolved(settings(warmup_steps=99), corpora(1000), print)


@pytest.fixture
def clock(monkeypatch):
    """The seconds that time.perf_counter returns, which only the test advances: [seconds]."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_the_first_micro_batch_and_the_first_update_say_how_long_it_takes(clock):
    lines: list[str] = []
    pace = Pace(CPU, settings(steps=100), 100, 0, lines.append)
    for done in (1, 2, 3, 4):
        clock[0] += 3
        pace.advance(0, done, 4, DONE if done == 4 else PENDING, mark=0.0)
        pace.advance(1, done, 4, DONE if done == 4 else PENDING, mark=0.0)
    first, update = lines
    assert "micro-batch 1 of 4 took 3.0 s: an update takes about 12s, 100 updates 20m00s" in first
    assert "loss 5.0000 after 12.0 s; 100 updates at this speed: 20m00s. The next line comes after update 10" in update


@pytest.mark.parametrize(("changes", "step"), [({"log_every": 1}, 0), ({}, 7)], ids=["each is logged", "resumed"])
def test_a_fast_run_says_no_more_than_its_log(changes, step, clock):
    lines: list[str] = []
    pace = Pace(CPU, settings(steps=100, **changes), 100, step, lines.append)
    pace.advance(step, 1, 1, DONE, mark=0.0)
    assert not lines


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_bar_of_a_terminal_moves_with_each_micro_batch(is_terminal, monkeypatch):
    console = io.StringIO()
    console.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stderr", console)
    pace = Pace(CPU, settings(steps=10), 10, 4, lambda line: None)
    if is_terminal:
        pace.bar.mininterval = 0
    for step, done in ((4, 1), (4, 2), (5, 1)):
        pace.advance(step, done, 2, PENDING, mark=time.perf_counter())
    drawn = console.getvalue()
    assert all(f"{n} updates" in drawn for n in ("4.50/10", "5.00/10", "5.50/10")) == is_terminal
    assert is_terminal or not drawn
