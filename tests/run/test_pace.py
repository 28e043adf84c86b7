"""How long a run is, and what a console shows before the first row of the log."""

import io
import sys
import time
import types

import pytest
import torch
from accelerate import Accelerator

import train_shared
from forge_common.data.tokenizer import byte_tokenizer
from forge_common.errors import UserError
from forge_common.model.config import ModelConfig
from forge_common.model.presets import preset_sizes
from forge_common.model.trunk import Trunk
from forge_common.run.length import with_length, with_preset
from forge_common.run.pace import Pace
from forge_common.run.progress import PENDING, UpdateOutcome
from forge_common.settings import seconds_of

ACCELERATOR = Accelerator(cpu=True)
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
    found = with_length(settings(**given), corpora(windows), None, ACCELERATOR)
    assert (found.steps, found.warmup_steps, found.epochs, found.val_fraction) == (steps, warmup, None, 0.02)
    assert (f"{steps:,} updates: 4 passes" in capsys.readouterr().out) == (not given)
    assert with_length(found, corpora(windows), None, ACCELERATOR) == found, "a settings.json gives the same run"


def test_a_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(UserError, match="--warmup-steps 99 exceeds the 62 updates"):
        with_length(settings(warmup_steps=99), corpora(1000), None, ACCELERATOR)


@pytest.mark.parametrize(
    ("budget", "val_every", "steps"),
    [
        ("1h", 0, 446),  # of 8 s; one validation of 32 s
        ("1h", 4, 223),  # of 16 s
        ("60s", 0, 3),
        ("5s", 0, 1),
        ("2d", 0, 625),  # 4 passes
    ],
)
def test_a_budget_of_time_gives_the_updates(budget, val_every, steps, monkeypatch, capsys):
    """A micro-batch takes 2 s by the clock, an update has 4 of them, and validation 48 without a backward pass."""
    ticks = iter(range(0, 100, 2))
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    config = ModelConfig(258, 8, 12, 1, 2, 1, 16)
    text = corpora(10_000)
    text.training.windows = lambda places: torch.randint(2, 258, (len(places), 17)).numpy()
    text.held_out = [types.SimpleNamespace(labels=48 * 16 * 16)]
    given = settings(budget=budget, val_every=val_every, sequence_length=16)
    trunk = Trunk(config)
    found = with_length(given, text, trunk, ACCELERATOR)
    assert (found.steps, found.budget) == (steps, None)
    assert all(parameter.grad is None for parameter in trunk.parameters())
    assert "an update takes about 8 s, a validation 32 s (timed)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("windows", "given", "preset"),
    [
        (10_000, {}, "tiny"),
        (10**9, {}, "small"),  # 10,000 updates
        (10**9, {"batch_size": 1024, "micro_batch_size": 16}, "large"),
        (10**9, {"epochs": 1}, "large"),
        (10**9, {"steps": 100}, "tiny"),
        (10**9, {"num_hidden_layers": 3}, "small"),
        (10**9, {"preset": "base"}, "base"),
        (10**9, {"budget": "1s"}, "tiny"),
        (10**9, {"budget": "100000d"}, "small"),
    ],
)
def test_the_size_follows_the_text_and_the_budget(windows, given, preset, capsys):
    given = settings(**given)
    found = with_preset(given, corpora(windows), preset_sizes(given, byte_tokenizer()), ACCELERATOR)
    assert found.preset == preset
    assert not preset_sizes(found, byte_tokenizer())


def test_a_run_that_continues_keeps_its_length_and_its_size(tmp_path, capsys):
    given = settings(budget="1s", output_dir=tmp_path)
    (tmp_path / "settings.json").write_text('{"steps": 123, "preset": "base"}')
    (tmp_path / "checkpoints" / "step-00000010").mkdir(parents=True)
    found = with_preset(given, corpora(10_000), preset_sizes(given, byte_tokenizer()), ACCELERATOR)
    assert (found.preset, with_length(found, corpora(10_000), None, ACCELERATOR).steps) == ("base", 123)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"steps": 12', "is not JSON"),
        ("[]", "holds a list"),
        ("{}", "has no steps and preset"),
        ('{"steps": null, "preset": 3}', "has no"),
    ],
)
def test_damaged_settings_of_a_run_that_continues_are_named_with_what_to_give_instead(content, problem, tmp_path):
    given = settings(budget="1s", output_dir=tmp_path)
    (tmp_path / "settings.json").write_text(content)
    newest = tmp_path / "checkpoints" / "step-00000010"
    newest.mkdir(parents=True)
    with pytest.raises(UserError) as size:
        with_preset(given, corpora(10_000), preset_sizes(given, byte_tokenizer()), ACCELERATOR)
    with pytest.raises(UserError) as length:
        with_length(given, corpora(10_000), None, ACCELERATOR)
    assert str(size.value) == str(length.value)
    assert f"{tmp_path}/settings.json {problem}" in str(size.value) and "Fetch" not in str(size.value)
    assert f"--steps and --preset that {newest}/progress.json has" in str(size.value)
    found = with_preset(settings(steps=7, preset="base", output_dir=tmp_path), corpora(100), {}, ACCELERATOR)
    assert with_length(found, corpora(100), None, ACCELERATOR).steps == 7


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("1.5h", 5400), ("2d", 172_800), ("30", 0), ("m", 0), ("0m", 0), ("-1h", 0)],
)
def test_a_time_is_read(text, seconds):
    assert seconds_of(text) == seconds


def test_the_first_micro_batch_and_the_first_update_say_how_long_it_takes(clock):
    lines: list[str] = []
    pace = Pace(CPU, settings(steps=100), 100, 0, lines.append)
    for done in (1, 2, 3, 4):
        clock[0] += 3
        pace.advance(0, done, 4, DONE if done == 4 else PENDING, row_start=0.0)
        pace.advance(1, done, 4, DONE if done == 4 else PENDING, row_start=0.0)
    first, update = lines
    assert "micro-batch 1 of 4 took 3.0 s: an update takes about 12s, 100 updates 20m00s" in first
    assert "loss 5.0000 after 12.0 s; 100 updates at this speed: 20m00s. The next line comes after update 10" in update
    Pace(CPU, settings(steps=3), 3, 0, lines.append).advance(0, 1, 1, DONE, row_start=0.0)
    assert lines[-1].endswith("after update 3")


@pytest.mark.parametrize(("changes", "step"), [({"log_every": 1}, 0), ({}, 7)], ids=["each is logged", "resumed"])
def test_a_fast_run_says_no_more_than_its_log(changes, step, clock):
    lines: list[str] = []
    pace = Pace(CPU, settings(steps=100, **changes), 100, step, lines.append)
    pace.advance(step, 1, 1, DONE, row_start=0.0)
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
        pace.advance(step, done, 2, PENDING, row_start=time.perf_counter())
    drawn = console.getvalue()
    assert all(f"{n} updates" in drawn for n in ("4.50/10", "5.00/10", "5.50/10")) == is_terminal
    assert is_terminal or not drawn
