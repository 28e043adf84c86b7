"""Machines that differ are refused before update 1, on all of them, with what differs, where and how to fix it.

A machine is played by a rank with a working directory of its own.
"""

import json
import shutil
import socket
from pathlib import Path

import edits
import launch
import pytest

HOST = socket.gethostname()
STEPS = ("--steps", 2, "--val-every", 0)


@pytest.fixture
def machines(text, tmp_path) -> list[Path]:
    """The working directories of two machines, each with a copy of the text in the folder `text`."""
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        shutil.copytree(text, folder / "text")
    return folders


@pytest.fixture
def line(tmp_path):
    """line(output_dir, *more flags): what a machine runs."""

    def make(output: Path | str, *more: object, script: Path | str = "train_shared.py") -> tuple[object, ...]:
        fixed = ("--data", "text", "--output-dir", output, "--cache-dir", "cache")
        return (launch.ROOT / script, *fixed, *launch.SHAPE, *launch.SIZES, *STEPS, *more)

    return make


def refused(*machines: tuple[Path, tuple[object, ...]], folder: Path) -> str:
    """The output of machines that are refused: each says why, and nothing was trained."""
    printed = launch.run_machines(*machines, fails=True)
    assert printed.count(".py: error: ") == len(machines) and "Traceback" not in printed, printed
    assert not (folder / "metrics.jsonl").exists() and not (folder / "checkpoints").exists()
    return printed


def test_machines_that_agree_train(machines, line, tmp_path):
    """The output directory and the cache may have other names on each."""
    one, two = machines
    launch.run_machines((one, line("../run")), (two, line(tmp_path / "run", "--cache-dir", tmp_path / "other")))
    assert (tmp_path / "run" / "trunk" / "forge.json").exists()
    assert [row["step"] for row in launch.rows(tmp_path / "run")] == [1, 2]


def test_other_data_is_refused(machines, line, tmp_path):
    """Under the same names: other training text, and a held-out text of another length, which would never end."""
    one, two = machines
    for folder in machines:
        shutil.copy(folder / "text" / "csv.py", folder / "val.py")
    changed = (two / "text" / "abc.py").read_text()
    (two / "text" / "abc.py").write_text(changed.replace("a", "b"))
    (two / "val.py").write_text(changed * 3)
    more = line(tmp_path / "run", "--val-data", "val.py")
    printed = refused((one, more), (two, more), folder=tmp_path / "run")
    for name in ("digest of text", "digest of held out 0"):
        found = next(row for row in printed.splitlines() if row.startswith(f"  {name}: "))
        assert f" on rank 0 ({HOST}); " in found and found.endswith(f" on rank 1 ({HOST})")
    assert "digest of tokenizer" not in printed and "--output-dir" not in printed


def test_other_settings_and_other_code_are_refused(machines, line, altered, tmp_path):
    """Also settings that a resumed run may change: each rank would save at another update, and wait for the other."""
    one, two = machines
    edited = altered("train_shared.py", edits.SET_RATE, f"{edits.SET_RATE} * 0.5")
    other = line(tmp_path / "run", "--seed", 7, "--save-every", 1, script=edited)
    printed = refused((one, line(tmp_path / "run")), (two, other), folder=tmp_path / "run")
    assert f"  --seed: 42 on rank 0 ({HOST}); 7 on rank 1 ({HOST})\n" in printed
    assert f"  --save-every: 250 on rank 0 ({HOST}); 1 on rank 1 ({HOST})\n" in printed
    assert "  digest of the code: " in printed and "digest of text" not in printed
    assert "the same flags, data, code and packages" in printed


def test_no_common_file_system_is_refused(machines, line):
    """The second machine has an output directory of its own there, with the lock of a run that was killed."""
    one, two = machines
    (two / "run").mkdir()
    (two / "run" / ".lock").write_text('{"pid": 1, "host": "elsewhere", "started": 1.8e9}')
    printed = refused((one, line("run")), (two, line("run")), folder=two / "run")
    assert f"--output-dir is {one / 'run'} on host {HOST} for rank 0, which another process does not see" in printed
    assert f"  rank 1 ({HOST}): {two / 'run'} on host {HOST}\n" in printed
    assert "on a file system that they share" in printed and "the processes of this run differ" not in printed
    assert not (one / "run" / "metrics.jsonl").exists()


def test_no_common_file_system_is_refused_to_a_run_that_continues(machines, line):
    """The main process alone has the length of the run; the other does not time a micro-batch, for which it would wait forever."""
    one, two = machines
    (one / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
    (one / "run" / "settings.json").write_text('{"steps": 2, "preset": "tiny"}')
    words = line("run", "--steps", 0, "--budget", "1h")
    printed = refused((one, words), (two, words), folder=two / "run")
    assert "which another process does not see" in printed and printed.count("2 updates, as when this run began") == 2


def test_another_general_sample_is_refused(machines, trunk, tmp_path):
    one, two = machines
    for folder, word in zip(machines, ("is", "was"), strict=True):
        rows = [json.dumps({"text": f"the number {number} {word} there"}) for number in range(1000)]
        (folder / "general.jsonl").write_text("\n".join(rows))
    fixed = (
        "--trunk",
        trunk,
        "--name",
        "one",
        "--data",
        "text",
        "--output-dir",
        tmp_path / "run",
        "--cache-dir",
        "cache",
    )
    more = (launch.ROOT / "train_module.py", *fixed, *launch.SIZES, *STEPS, "--general-data", "general.jsonl")
    printed = refused((one, more), (two, more), folder=tmp_path / "run")
    assert "digest of general sample 0: " in printed and "digest of text" not in printed
