"""Ranks that die or hang: all ranks end with a non-zero exit code, and the run resumes from its checkpoint."""

import signal
import subprocess
import sys
import time

import edits
import launch
import psutil
import pytest
from launch import MORE, PATIENCE, same_run


def second_rank(running) -> psutil.Process:
    return next(rank for rank in psutil.Process(running.pid).children() if rank.environ()["RANK"] == "1")


def test_all_ranks_end_when_one_dies(started, tmp_path):
    folder = tmp_path / "run"
    running = started(folder, *MORE, "--steps", 5000, processes=2, new=True)
    launch.wait_for(folder / "checkpoints" / "step-00000003", running)
    ranks = psutil.Process(running.pid).children()
    second_rank(running).kill()
    before = time.monotonic()
    assert running.wait(PATIENCE) != 0
    print(f"a rank died; all had ended after {time.monotonic() - before:.1f} s")
    assert not any(rank.is_running() for rank in ranks)


@pytest.mark.soak
def test_a_suspended_rank_is_reported_and_ended(started, tmp_path):
    """Rank 0 waits for it in a collective, prints its stack and aborts; the launcher takes 30 s to end the suspended one."""
    folder = tmp_path / "run"
    running = started(folder, *MORE, "--steps", 5000, "--hang-timeout", 6, processes=2, new=True)
    launch.wait_for(folder / "checkpoints" / "step-00000003", running)
    suspended = second_rank(running)
    suspended.send_signal(signal.SIGSTOP)
    assert running.wait(PATIENCE) != 0 and not suspended.is_running()
    printed = (tmp_path / "run.out").read_text()
    assert "rank 0 of 2: no progress for" in printed and "(--hang-timeout 6)" in printed
    stack = printed.split("no progress for")[1].split("aborted")[0]
    assert "train_shared.py" in stack, "the stack names the script's line"


def hangs_when(condition: str) -> str:
    """The end of an update with an endless sleep when `condition` holds."""
    return f"        if {condition}:\n            __import__('time').sleep(100_000)\n{edits.AFTER_UPDATE}"


def test_all_ranks_print_their_stacks_when_one_hangs(started, altered, tmp_path):
    """Rank 1 sleeps in the script, rank 0 waits for it in a collective. Both print before the end of one ends the other."""
    folder = tmp_path / "run"
    script = altered("train_shared.py", edits.AFTER_UPDATE, hangs_when("rank == 1 and step == 4"))
    running = started(folder, *MORE, "--hang-timeout", 6, script=script, processes=2)
    launch.wait_for(folder / "checkpoints" / "step-00000003", running)
    before = time.monotonic()
    assert running.wait(PATIENCE) != 0
    print(f"a rank hung for 6 s; all had ended after {time.monotonic() - before:.1f} s")
    printed = (tmp_path / "run.out").read_text()
    for rank in (0, 1):
        assert f"rank {rank} of 2: no progress for" in printed and f"rank {rank} of 2: aborted" in printed


def test_the_stack_names_the_line_that_hangs(straight, shared, altered, tmp_path):
    """Resumed without the edit that hangs, the run equals one that never hung."""
    folder = tmp_path / "run"
    script = altered("train_shared.py", edits.AFTER_UPDATE, hangs_when("step == 8"))
    number = script.read_text().split("sleep(100_000)")[0].count("\n") + 1
    printed = shared(folder, *MORE, "--hang-timeout", 5, script=script, fails=True)
    assert f'train_shared.py", line {number}' in printed and "--hang-timeout 5" in printed
    shared(folder, *MORE)
    same_run(straight, folder)


def test_a_slow_run_is_not_aborted(started, altered, tmp_path):
    """A first micro-batch slower than --hang-timeout, and a process that was suspended and continued (Ctrl-Z)."""
    folder = tmp_path / "run"
    line = edits.AFTER_MICRO_BATCH
    script = altered("train_shared.py", line, "            __import__('time').sleep(6 if step == 1 else 0.1)\n" + line)
    running = started(folder, *MORE, "--steps", 4, "--micro-batch-size", 64, "--hang-timeout", 5, script=script)
    launch.wait_for(folder / "checkpoints" / "step-00000002", running)
    running.send_signal(signal.SIGSTOP)
    time.sleep(6)
    running.send_signal(signal.SIGCONT)
    assert running.wait(PATIENCE) == 0, (tmp_path / "run.out").read_text()
    assert launch.rows(folder)[-1]["step"] == 4


def test_layers_are_progress(started, altered, tmp_path):
    """A micro-batch of eight layers takes four times --hang-timeout, and the run goes on; one that hangs in a layer ends."""
    running = {}
    for seconds in (1.5, 100_000):
        sleep = (
            "    def sleep_in(layer, inputs):\n"
            f"        __import__('time').sleep({seconds} if progress.global_step == 2 else 0)\n"
            "    for layer in trunk.model.layers:\n"
            "        layer.register_forward_pre_hook(sleep_in)\n"
        )
        script = altered("train_shared.py", edits.BEGIN_TRAINING, sleep + edits.BEGIN_TRAINING)
        more = ("--steps", 4, "--micro-batch-size", 64, "--num-hidden-layers", 8, "--hang-timeout", 3)
        running[seconds] = started(tmp_path / str(seconds), *more, script=script)
    assert running[1.5].wait(PATIENCE) == 0, (tmp_path / "1.5.out").read_text()
    assert launch.rows(tmp_path / "1.5")[-1]["step"] == 4
    assert running[100_000].wait(PATIENCE) == 1
    printed = (tmp_path / "100000.out").read_text()
    assert "no progress for" in printed and "in sleep_in" in printed


WATCHED = """
import subprocess, sys, time
from forge_common.run.stop import StopRequest

class OneProcess:
    set_trigger = check_trigger = lambda self: False

def update(work, *arguments):
    work(*arguments)
    stop.heartbeat()
    stop.check(OneProcess())

def compute(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass

def compile(seconds):
    subprocess.run([sys.executable, "-c", f"import time\\nend = time.monotonic() + {seconds}\\nwhile time.monotonic() < end: pass"])

stop = StopRequest(float(sys.argv[1]))
stop.phase = "training"
"""
QUICK = "update(time.sleep, 0)\n"
SLOW = {  # --hang-timeout, what the process does
    "computes": (3, QUICK + "update(compute, 7)"),
    "waits for a compiler": (3, QUICK + "update(compile, 7)"),
    "is as slow as before": (1, 4 * "update(time.sleep, 4)\n"),
    "saves for long": (1, QUICK + "with stop.slow_section(): time.sleep(5)"),
}
HANGING = {
    "sleeps": (1, QUICK + "update(time.sleep, 1000)"),
    "computes and then sleeps": (2, QUICK + "compute(3); update(time.sleep, 1000)"),
    "computes without an end": (0.5, QUICK + "update(compute, 1000)"),
    "hangs after a save": (1, QUICK + "with stop.slow_section(): pass\nupdate(time.sleep, 1000)"),
    "sleeps in a later batch of a validation": (
        1,
        QUICK + "with stop.slow_section():\n update(time.sleep, 4)\n update(time.sleep, 1000)",
    ),
}


def test_what_is_slow_goes_on_and_what_hangs_is_ended(tmp_path):
    """Processes with the watch alone, without a model."""
    running = {}
    for name, (timeout, work) in (SLOW | HANGING).items():
        line = [sys.executable, "-c", WATCHED + work, str(timeout)]
        with open(tmp_path / name, "w") as out:
            running[name] = subprocess.Popen(line, cwd=launch.ROOT, stdout=out, stderr=out)
    for name, process in running.items():
        assert process.wait(PATIENCE) == (name in HANGING), f"{name}: {(tmp_path / name).read_text()}"
        assert ("no progress for" in (tmp_path / name).read_text()) == (name in HANGING)


@pytest.mark.parametrize("where", ["loss", "labels"])
def test_a_bad_update_is_counted_and_not_applied(where, straight, shared, altered, tmp_path):
    """An infinite loss with a finite gradient, and an update of PAD alone."""
    folder = tmp_path / "run"
    if where == "loss":
        old = edits.LOSS
        new = edits.loss_of_update('float("inf")', 3)
    else:
        old = edits.TAKE_WINDOWS
        new = edits.empty_update(3)
    printed = shared(folder, *MORE, script=altered("train_shared.py", old, new))
    assert launch.same_bits(launch.weights(folder, 2), launch.weights(folder, 3))
    assert launch.same_bits(launch.weights(folder, 2), launch.weights(straight, 2))
    assert not launch.same_bits(launch.weights(folder, 3), launch.weights(folder, 4))
    before, after = (launch.optimizer_state(folder, step)["state"][0]["step"] for step in (2, 3))
    assert before == after
    counter = {"loss": "train/bad_updates", "labels": "train/empty_updates"}[where]
    assert [row[counter] for row in launch.rows(folder)] == [0, 0] + [1] * 10
    assert ("update 3: loss inf" in printed) == (where == "loss")
    assert [row["step"] for row in launch.rows(folder) if row["train/loss"] is None] == [3]
    assert "step 3/12  loss - (no update applied)" in printed
    tokens = [row["train/tokens"] for row in launch.rows(folder)]
    assert tokens[2] == tokens[1]


def test_bad_updates_are_counted_across_a_resume(shared, altered, tmp_path):
    """Two in a row, a stop, and two more: the fourth ends a run with --max-bad-updates 4, and the message names all four."""
    bad = altered("train_shared.py", edits.BACKWARD, edits.scaled_by('(float("nan") if step > 4 else scale)'))
    half = altered(bad, edits.CHECK_STOP, edits.interrupted_at(6))
    more = (*MORE, "--max-bad-updates", 4)
    shared(tmp_path / "run", *more, script=half)
    printed = shared(tmp_path / "run", *more, script=bad, fails=True)
    assert "updates 5 to 8" in printed and "Traceback" not in printed
    assert not (tmp_path / "run" / "trunk").exists()
