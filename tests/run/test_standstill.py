"""Ranks that die or hang: all ranks end with a non-zero exit code in a stated time, and the run resumes from its checkpoint."""

import signal
import time

import edits
import launch
import psutil
import pytest
from launch import MORE, same_run


def second_rank(running) -> psutil.Process:
    return next(rank for rank in psutil.Process(running.pid).children() if rank.environ()["RANK"] == "1")


def test_a_rank_that_dies_takes_all_with_it(started, tmp_path):
    folder = tmp_path / "run"
    running = started(folder, *MORE, "--steps", 5000, processes=2)
    launch.wait_for(folder / "checkpoints" / "step-00000003", running)
    ranks = psutil.Process(running.pid).children()
    second_rank(running).kill()
    before = time.monotonic()
    assert running.wait(60) != 0
    seconds = time.monotonic() - before
    print(f"a rank died; all had ended after {seconds:.1f} s")
    assert seconds < 20 and not any(rank.is_running() for rank in ranks)


@pytest.mark.soak
def test_a_rank_that_is_halted_is_told_of_and_ended(started, tmp_path):
    """Rank 0 waits for it in a collective, says where it stands, and aborts; the launcher needs 30 s for the halted one."""
    folder = tmp_path / "run"
    running = started(folder, *MORE, "--steps", 5000, "--hang-timeout", 4, processes=2)
    launch.wait_for(folder / "checkpoints" / "step-00000003", running)
    halted = second_rank(running)
    halted.send_signal(signal.SIGSTOP)
    assert running.wait(120) != 0 and not halted.is_running()
    said = (tmp_path / "run.out").read_text()
    assert "rank 0 of 2: no progress for" in said and "(--hang-timeout 4)" in said
    assert "train_shared.py" in said.split("no progress for")[1].split("aborted")[0], (
        "the stack names the script's line"
    )


HANG = edits.AFTER_UPDATE


def test_a_rank_that_hangs_is_told_of_and_ended(started, altered, tmp_path):
    """One sleeps in its own code, the other waits for it in a collective: both say where they stand."""
    folder = tmp_path / "run"
    asleep = "        if rank == 1 and step == 4:\n            __import__('time').sleep(1000)\n"
    script = altered("train_shared.py", HANG, asleep + HANG)
    running = started(folder, *MORE, "--hang-timeout", 3, script=script, processes=2)
    launch.wait_for(folder / "checkpoints" / "step-00000003", running)
    before = time.monotonic()
    assert running.wait(60) != 0
    print(f"a rank hung for 3 s; all had ended after {time.monotonic() - before:.1f} s")
    said = (tmp_path / "run.out").read_text()
    assert time.monotonic() - before < 3 + 15 and "rank 0 of 2: no progress for" in said


def test_a_hang_in_the_code_is_named(straight, shared, altered, tmp_path):
    """A hang in an edited script: the dump names the line. Resumed without the edit, the run equals one that never hung."""
    folder = tmp_path / "run"
    asleep = "        if step == 8:\n            __import__('time').sleep(1000)\n"
    script = altered("train_shared.py", HANG, asleep + HANG)
    number = script.read_text().split("sleep(1000)")[0].count("\n") + 1
    said = shared(folder, *MORE, "--hang-timeout", 2, script=script, fails=True)
    assert f'train_shared.py", line {number}' in said and "--hang-timeout 2" in said
    shared(folder, *MORE)
    same_run(straight, folder)


def test_slow_is_not_hanging(started, altered, tmp_path):
    """Micro-batches that take their time, a slow first one, and a process that was suspended and continued (Ctrl-Z)."""
    folder = tmp_path / "run"
    line = edits.AFTER_MICRO_BATCH
    script = altered("train_shared.py", line, "            __import__('time').sleep(5 if step == 1 else 0.5)\n" + line)
    running = started(folder, *MORE, "--steps", 6, "--micro-batch-size", 64, "--hang-timeout", 2, script=script)
    launch.wait_for(folder / "checkpoints" / "step-00000003", running)
    running.send_signal(signal.SIGSTOP)
    time.sleep(5)
    running.send_signal(signal.SIGCONT)
    assert running.wait(60) == 0, (tmp_path / "run.out").read_text()
    assert launch.rows(folder)[-1]["step"] == 6


@pytest.mark.parametrize("where", ["loss", "labels"])
def test_what_cannot_be_learned_from_is_passed_over(where, straight, shared, altered, tmp_path):
    """An infinite loss with a finite gradient, and an update that is all PAD: not applied, counted, and nothing else."""
    folder = tmp_path / "run"
    if where == "loss":
        old = edits.LOSS
        new = 'loss = float("inf") if step == 3 else float('
    else:
        old = edits.TAKE_WINDOWS
        new = f"{old}.fill_(0) if progress.global_step == 2 else next(update_batches)"
    said = shared(folder, *MORE, script=altered("train_shared.py", old, new))
    assert launch.same_bits(launch.weights(folder, 2), launch.weights(folder, 3))
    assert launch.same_bits(launch.weights(folder, 2), launch.weights(straight, 2))
    assert not launch.same_bits(launch.weights(folder, 3), launch.weights(folder, 4))
    before, after = (launch.optimizer_state(folder, step)["state"][0]["step"] for step in (2, 3))
    assert before == after
    counter = {"loss": "train/bad_updates", "labels": "train/empty_updates"}[where]
    assert [row[counter] for row in launch.rows(folder)] == [0, 0] + [1] * 10
    assert ("update 3: loss inf" in said) == (where == "loss")
    tokens = [row["train/tokens"] for row in launch.rows(folder)]
    assert tokens[2] == tokens[1]


def test_a_resumed_run_forgets_no_bad_update(shared, altered, tmp_path):
    """Two bad ones in a row, a stop, and two more: the fourth ends the run that may have four, and names all four."""
    bad = altered("train_shared.py", edits.BACKWARD, edits.scaled_by('(float("nan") if step > 4 else scale)'))
    source = bad.read_text()
    half = tmp_path / "train_half.py"
    half.write_text(source.replace(edits.CHECK_STOP, edits.interrupted_at(6)))
    more = (*MORE, "--max-bad-updates", 4)
    shared(tmp_path / "run", *more, script=half)
    said = shared(tmp_path / "run", *more, script=bad, fails=True)
    assert "updates 5 to 8" in said and "Traceback" not in said
    assert not (tmp_path / "run" / "trunk").exists()
