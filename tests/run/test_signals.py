"""A signal at any moment: finished updates are saved, and the same command resumes the run."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import edits
import launch
import psutil
import pytest
from launch import MORE, PATIENCE, STEPS, copy_until, reseal, same_run

SIGNALS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name[-8:]) for path in (folder / "checkpoints").glob("step-????????"))


def test_a_signal_while_it_imports_ends_the_run(started, tmp_path):
    """Python handles no signal inside an import. The run ends nevertheless, before it has written anything."""
    running = started(tmp_path / "run", *MORE, new=True)
    maps = Path(f"/proc/{running.pid}/maps")
    while "libtorch_cpu" not in maps.read_text():
        time.sleep(0.01)
    running.send_signal(signal.SIGTERM)
    assert running.wait(PATIENCE) == 143
    assert not (tmp_path / "run" / "checkpoints").exists()


@SIGNALS
def test_while_it_tokenizes(number, started, shared, tmp_path):
    """The partial cache is removed, and the run's exit code is that of the signal."""
    cache, long = tmp_path / "cache", tmp_path / "long"
    long.mkdir()
    source = (launch.ROOT / "train_shared.py").read_text()
    (long / "a.txt").write_text(source * (40_000_000 // len(source)))
    more = (*MORE, "--data", long, "--cache-dir", cache, "--val-fraction", 0)
    running = started(tmp_path / "run", *more)
    launch.wait_for(cache / ".tmp-*", running)
    time.sleep(0.3)
    running.send_signal(number)
    assert running.wait(PATIENCE) == 128 + number
    assert list(cache.iterdir()) == [] and not (tmp_path / "run" / "checkpoints").exists()
    printed = (tmp_path / "run.out").read_text()
    assert "stop requested" in printed and "Traceback" not in printed


def test_in_a_validation(straight, started, shared, altered, tmp_path):
    """It is interrupted, the update is saved, and the resumed run begins with it: the rows and bits of an uninterrupted run."""
    folder = tmp_path / "run"
    slow = "    trunk.register_forward_hook(lambda *_: None if trunk.training else __import__('time').sleep(5))\n"
    script = altered("train_shared.py", edits.START_LOG, slow + edits.START_LOG)
    running = started(folder, *MORE, script=script)
    launch.wait_for(folder / "checkpoints" / "step-00000004", running)
    while (folder / "metrics.jsonl").read_text().count("\n") < 5:  # the row of update 5, without its validation
        time.sleep(0.01)
    running.send_signal(signal.SIGTERM)
    assert running.wait(PATIENCE) == 143
    assert checkpoints(folder)[-1] == 5
    progress = json.loads((folder / "checkpoints" / "step-00000005" / "progress.json").read_text())
    assert progress["validation_due"] and not launch.rows(folder, "val/loss")
    shared(folder, *MORE)
    same_run(straight, folder)


def test_the_row_of_a_due_validation_is_written_once(straight, shared, tmp_path):
    """A run that was killed after it had written the row, and before another checkpoint: the next run replaces the row."""
    folder = tmp_path / "run"
    copy_until(straight, folder, 5)
    place = folder / "checkpoints" / "step-00000005"
    progress = json.loads((place / "progress.json").read_text())
    before = json.loads((folder / "checkpoints" / "step-00000004" / "progress.json").read_text())
    kept = {name: before[name] for name in ("best_val_loss", "best_step", "validations_without_gain")}
    (place / "progress.json").write_text(json.dumps(progress | kept | {"validation_due": True}))
    reseal(place)
    shared(folder, *MORE)
    same_run(straight, folder)


@pytest.mark.parametrize("twice", [pytest.param(False, marks=pytest.mark.soak), True], ids=["once", "twice"])
def test_in_a_save(twice, straight, started, shared, tmp_path):
    """One signal: the save is finished. Two: the run ends at once, and the checkpoint before stays."""
    folder = tmp_path / "run"
    running = started(folder, *MORE, **launch.slow_disk(0.4 if twice else 0.1))
    launch.wait_for(folder / "checkpoints" / ".tmp-step-00000002", running)
    running.send_signal(signal.SIGTERM)
    if twice:
        time.sleep(1.3)
        running.send_signal(signal.SIGINT)
        assert running.wait(PATIENCE) == 130
        assert checkpoints(folder) == [1] and (folder / "checkpoints" / ".tmp-step-00000002").exists()
    else:
        assert running.wait(PATIENCE) == 143
        assert checkpoints(folder) == [1, 2, 3]
    shared(folder, *MORE)
    same_run(straight, folder)


def test_while_it_publishes(started, shared, tmp_path):
    """Everything is saved by then: the run ends at once without a partial trunk, and the same command publishes."""
    folder = tmp_path / "run"
    running = started(folder, *MORE, "--save-every", 0, "--val-every", 0, "--steps", 2, **launch.slow_disk(0.3))
    launch.wait_for(folder / ".tmp-trunk-*", running)
    running.send_signal(signal.SIGTERM)
    assert running.wait(PATIENCE) == 143
    assert not (folder / "trunk").exists() and not list(folder.glob(".tmp-*"))
    shared(folder, *MORE, "--steps", 2)
    assert (folder / "trunk" / "forge.json").exists()


@pytest.mark.soak
def test_to_the_launcher_alone(straight, started, shared, tmp_path):
    """It ends and does not forward the signal. The trainer notices that its launcher has ended, and loses nothing."""
    folder = tmp_path / "run"
    running = started(folder, *MORE, launcher=launch.LAUNCH, **launch.slow_disk(0.05))
    launch.wait_for(folder / "checkpoints" / "step-00000003", running)
    (trainer,) = psutil.Process(running.pid).children()
    running.terminate()
    running.wait(PATIENCE)
    trainer.wait(PATIENCE)
    assert "Run the same command to resume" in (tmp_path / "run.out").read_text()
    assert 3 <= checkpoints(folder)[-1] < STEPS
    assert launch.rows(folder)[-1]["step"] == checkpoints(folder)[-1]
    shared(folder, *MORE)
    same_run(straight, folder)


def test_a_plain_process_outlives_its_shell(started, tmp_path):
    """nohup python train_shared.py &, and the shell ends while the run trains: the run continues."""
    folder, script = tmp_path / "run", tmp_path / "shell.py"
    script.write_text(
        "import pathlib, subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, *sys.argv[1:]], start_new_session=True)\n"
        f"while not pathlib.Path({str(folder / 'checkpoints' / 'step-00000001')!r}).exists(): time.sleep(0.01)\n"
    )
    running = started(folder, *MORE, launcher=(sys.executable, str(script)), **launch.slow_disk(0.01))
    running.wait(PATIENCE)
    assert not (folder / "trunk").exists()
    deadline = time.monotonic() + PATIENCE
    while not (folder / "trunk").exists():
        assert time.monotonic() < deadline, (tmp_path / "run.out").read_text()
        time.sleep(0.1)
    assert launch.rows(folder)[-1]["step"] == STEPS


def test_to_one_rank_alone(started, tmp_path):
    """All ranks save at the same update, and end."""
    folder = tmp_path / "run"
    running = started(folder, *MORE, "--steps", 500, processes=2)
    launch.wait_for(folder / "checkpoints" / "step-00000003", running)
    os.kill(running.pids[1], signal.SIGTERM)
    assert running.wait(PATIENCE) == 128 + signal.SIGTERM
    newest = checkpoints(folder)[-1]
    assert f"stopped at update {newest} of 500" in (tmp_path / "run.out").read_text()
    assert launch.rows(folder)[-1]["step"] == newest
    place = folder / "checkpoints" / f"step-{newest:08d}"
    assert {path.name for path in place.glob("random_states_*")} == {"random_states_0.pkl", "random_states_1.pkl"}


def test_of_a_batch_system(started, tmp_path):
    """SIGUSR1, as Slurm sends it before the end of a job's time (--signal=USR1@60)."""
    folder = tmp_path / "run"
    running = started(folder, *MORE, "--steps", 500)
    launch.wait_for(folder / "checkpoints" / "step-00000003", running)
    running.send_signal(signal.SIGUSR1)
    assert running.wait(PATIENCE) == 128 + signal.SIGUSR1
    newest = checkpoints(folder)[-1]
    assert f"stopped at update {newest} of 500" in (tmp_path / "run.out").read_text()
    assert launch.rows(folder)[-1]["step"] == newest


@pytest.mark.soak
def test_in_the_first_compile(started, tmp_path):
    """torch.compile takes a minute: the update is finished and saved, and the run ends."""
    folder = tmp_path / "run"
    compiled = {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    running = started(folder, *MORE, "--hang-timeout", 600, **compiled)
    launch.wait_for(tmp_path / "inductor" / "*", running)
    running.send_signal(signal.SIGTERM)
    assert running.wait(PATIENCE) == 143 and checkpoints(folder) == [1]
