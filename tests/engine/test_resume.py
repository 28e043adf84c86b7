"""A stopped and resumed run equals an uninterrupted one, bit for bit; a damaged checkpoint costs one checkpoint."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import edits
import launch
import pytest

from forge_common.errors import UserError
from forge_common.run.checkpoint_folder import fault
from forge_common.run.progress import Progress, check_same
from forge_common.settings import RunSettings, to_json


def test_the_run_passes_an_epochs_end(straight):
    epochs = [row["train/epoch"] for row in launch.rows(straight)]
    assert epochs[0] < 1 < epochs[-1]


def test_stopped_by_a_signal_and_resumed(straight, shared, started, tmp_path):
    folder = tmp_path / "run"
    running = started(folder, *launch.MORE, "--save-every", 3)
    launch.wait_for(folder / "checkpoints" / "step-00000003", running)
    running.send_signal(signal.SIGINT)
    assert running.wait(launch.PATIENCE) == 130
    assert not (folder / "trunk").exists()
    printed = shared(folder, *launch.MORE)
    assert "resumed" in printed
    launch.same_run(straight, folder)


@pytest.mark.parametrize("step", [1, 5, 9])
def test_resumed_from_any_update(step, straight, shared, tmp_path):
    """From the middle of an epoch, and from after its end."""
    folder = tmp_path / "run"
    launch.copy_until(straight, folder, step)
    shared(folder, *launch.MORE)
    launch.same_run(straight, folder)


def test_an_interval_that_spans_a_resume_is_logged_the_same(shared, tmp_path):
    """A row every 4 updates, a kill after update 6: the sums of updates 5 and 6 are neither lost nor rounded."""
    more = (*launch.MORE, "--log-every", 4)
    shared(tmp_path / "straight", *more)
    launch.copy_until(tmp_path / "straight", tmp_path / "run", 6)
    shared(tmp_path / "run", *more)
    launch.same_run(tmp_path / "straight", tmp_path / "run")
    shared(tmp_path / "rarely", *more, "--save-every", 0, "--val-every", 0)  # the losses do not depend on saving
    losses = [[row["train/loss"] for row in launch.rows(tmp_path / name)] for name in ("straight", "rarely")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("dtype", "bound"), [pytest.param("float32", 1e-5, marks=pytest.mark.soak), ("float64", 1e-12)]
)
def test_one_two_one_processes(dtype, bound, shared, altered, tmp_path):
    """The same windows, and the same weights up to rounding, when the number of processes changes between resumes."""
    straight, folder, copy = tmp_path / "straight", tmp_path / "run", tmp_path / "again"
    more = (*launch.MORE, "--dtype", dtype)
    shared(straight, *more)
    launch.copy_until(straight, folder, 4)
    stopping = altered("train_shared.py", edits.CHECK_STOP, edits.interrupted_at(8))
    shared(folder, *more, processes=2, script=stopping)
    launch.copy_until(folder, copy, 8)
    shared(copy, *more)
    assert launch.difference(launch.weights(straight, launch.STEPS), launch.weights(copy, launch.STEPS)) <= bound
    for row, reference in zip(launch.rows(copy), launch.rows(straight), strict=True):
        assert row["train/tokens"] == reference["train/tokens"] and row["train/epoch"] == reference["train/epoch"]
        assert row["train/loss"] == pytest.approx(reference["train/loss"], abs=bound)
        assert row["train/grad_norm"] == pytest.approx(reference["train/grad_norm"], rel=10 * bound)


def test_killed_while_a_checkpoint_is_written_beside_the_updates(straight, shared, started, tmp_path):
    """On a slow disk: the log has a later update before the checkpoint has its name. The resumed run starts from update 0."""
    folder = tmp_path / "run"
    running = started(folder, *launch.MORE, "--save-every", 3, **launch.slow_disk(0.2))
    launch.wait_for(folder / "checkpoints" / ".tmp-step-00000003", running)
    while launch.rows(folder)[-1]["step"] < 4:
        assert running.poll() is None
        time.sleep(0.005)
    os.kill(running.pid, signal.SIGKILL)
    assert running.wait(launch.PATIENCE) == -signal.SIGKILL
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [".tmp-step-00000003"]
    assert "resumed" not in shared(folder, *launch.MORE)
    launch.same_run(straight, folder)


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    middle = len(content) // 2
    if how == "missing":
        path.unlink()
    elif how == "flipped":
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        path.write_bytes(content[:middle] if how == "halved" else b"")


@pytest.mark.parametrize("how", ["missing", "flipped", "halved", "emptied"])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "progress.json", "manifest.json"]
)
def test_a_damaged_checkpoint_is_detected(name, how, straight, tmp_path):
    copy = tmp_path / "step-00000012"
    shutil.copytree(straight / "checkpoints" / copy.name, copy)
    assert fault(copy) is None
    damage(copy / name, how)
    assert name in fault(copy)


def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(straight, shared, tmp_path):
    folder = tmp_path / "run"
    launch.copy_until(straight, folder, 6)
    damage(folder / "checkpoints" / "step-00000006" / "optimizer.bin", "flipped")
    (folder / "checkpoints" / ".tmp-step-00000007").mkdir()  # what a kill in the middle of a save leaves
    printed = shared(folder, *launch.MORE)
    assert "optimizer.bin" in printed and "step-00000005 at update 5" in printed
    assert (folder / "checkpoints" / "step-00000006.broken").is_dir()
    assert not list((folder / "checkpoints").glob(".tmp-*"))
    launch.same_run(straight, folder)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("--seed", 7), "seed: 42 -> 7"),
        (("--batch-size", 32), "batch_size: 64 -> 32"),
        (("--hidden-size", 64), "hidden_size: 32 -> 64"),
        (("--steps", 13), "--accept-change steps"),
        (("--steps", 13, "--lr", 0.1), "Accept with --accept-change lr steps, or"),
        (("--steps", 13, "--lr", 0.1, "--accept-change", "steps"), "Accept with --accept-change steps lr, or"),
        (("--steps", 3, "--accept-change", "steps"), "has 4 updates, more than the 3 of this run"),
    ],
)
def test_a_changed_run_is_refused(change, named, straight, shared, tmp_path):
    folder = tmp_path / "run"
    launch.copy_until(straight, folder, 4)
    printed = shared(folder, *launch.MORE, *change, fails=True)
    assert named in printed and "Traceback" not in printed


def test_another_precision_is_refused_unless_it_is_accepted(straight, shared, tmp_path):
    """It is the launcher's, and not among the flags."""
    folder = tmp_path / "run"
    launch.copy_until(straight, folder, 11)
    printed = shared(folder, *launch.MORE, fails=True, ACCELERATE_MIXED_PRECISION="bf16")
    assert "mixed_precision: 'no' -> 'bf16'" in printed and "Accept with --accept-change mixed-precision" in printed
    shared(folder, *launch.MORE, "--accept-change", "mixed-precision", ACCELERATE_MIXED_PRECISION="bf16")
    assert launch.rows(folder)[-1]["step"] == launch.STEPS
    written = json.loads((folder / "checkpoints" / "step-00000012" / "progress.json").read_text())
    assert written["settings"]["mixed_precision"] == "bf16"


SETTINGS = RunSettings(output_dir=Path("run"), accept_change=("mixed_precision",))


def identity(**settings: object) -> Progress:
    return Progress("run", to_json(SETTINGS) | {"mixed_precision": "no"} | settings, {})


def test_a_setting_that_was_added_since_the_checkpoint_is_at_its_default():
    before = identity()
    del before.settings["statistics_min_documents"]
    check_same(before, identity(), SETTINGS, Path("step"))
    with pytest.raises(UserError, match="statistics_min_documents: 2 -> 3"):
        check_same(before, identity(statistics_min_documents=3), SETTINGS, Path("step"))


def test_fp16_cannot_be_accepted():
    """Its loss scale is not in a checkpoint of another precision."""
    check_same(identity(mixed_precision="fp16"), identity(mixed_precision="bf16"), SETTINGS, Path("step"))
    with pytest.raises(UserError, match="mixed_precision: 'no' -> 'fp16'\nRestore them"):
        check_same(identity(), identity(mixed_precision="fp16"), SETTINGS, Path("step"))


def test_changed_text_is_refused(shared, text, tmp_path):
    """The same flags and file names with one more sentence: the digests of the tokens and of the tokenizer differ."""
    folder, copy = tmp_path / "run", tmp_path / "text"
    shutil.copytree(text, copy)
    more = ("--data", copy, "--steps", 2, "--tokenizer", "train:300", "--val-every", 0)
    shared(folder, *more)
    with open(copy / "abc.py", "a") as file:
        file.write("One more sentence.\n" * 20)
    printed = shared(folder, *more, fails=True)
    assert f"digest of {copy}: " in printed and "digest of tokenizer: " in printed and "Traceback" not in printed


def test_a_changed_trunk_is_refused(module, shared, trunk, tmp_path):
    """A module resumes only on the trunk that it was started on."""
    folder, copy = tmp_path / "run", tmp_path / "trunk"
    shutil.copytree(trunk, copy)
    module(folder, "--trunk", copy, "--steps", 2)
    shared(tmp_path / "other", "--steps", 2, "--seed", 5)
    shutil.rmtree(copy)
    shutil.copytree(tmp_path / "other" / "trunk", copy)
    printed = module(folder, "--trunk", copy, "--steps", 2, fails=True)
    assert "digest of trunk: " in printed and "Traceback" not in printed


def test_more_steps_with_accept_change(straight, shared, tmp_path):
    folder = tmp_path / "run"
    launch.copy_until(straight, folder, launch.STEPS)
    shared(folder, *launch.MORE, "--steps", launch.STEPS + 1, "--accept-change", "steps")
    assert launch.rows(folder)[-1]["step"] == launch.STEPS + 1


def test_another_weight_decay_with_accept_change_has_an_effect(straight, shared, tmp_path):
    """The optimizer's state in a checkpoint holds the decay that it was saved with."""
    folder = tmp_path / "run"
    launch.copy_until(straight, folder, 11)
    shared(folder, *launch.MORE, "--weight-decay", 0.5, "--accept-change", "weight-decay")
    groups = launch.optimizer_state(folder, launch.STEPS)["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert not launch.same_bits(launch.weights(straight, launch.STEPS), launch.weights(folder, launch.STEPS))


@pytest.fixture
def diverging(altered) -> Path:
    """The script with a rate that grows tenfold each update: the loss improves at first, then diverges."""
    return altered("train_shared.py", edits.SET_RATE, 'group["lr"] = rate = settings.lr * 10 ** (step - 4)')


def test_rotation_keeps_the_newest_and_the_best(diverging, shared, tmp_path):
    """The best is not among the newest; it is kept and published."""
    folder = tmp_path / "run"
    printed = shared(folder, "--steps", 8, "--save-every", 1, "--keep", 2, "--val-every", 1, script=diverging)
    losses = {row["step"]: row["val/loss"] for row in launch.rows(folder, "val/loss")}
    best = min(losses, key=losses.get)
    assert 1 < best < 7, losses
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert kept == [f"step-{step:08d}" for step in (best, 7, 8)]
    assert f"those of update {best}" in printed
    metadata = json.loads((folder / "trunk" / "forge.json").read_text())
    assert metadata["validation_loss"] == losses[best] and metadata["steps"] == best
    published = launch.load_file(folder / "trunk" / "model.safetensors")
    assert launch.same_bits(published, launch.weights(folder, best))


def test_patience_stops_early(diverging, shared, tmp_path):
    folder = tmp_path / "run"
    shared(folder, "--steps", 10, "--val-every", 1, "--patience", 2, script=diverging)
    losses = [row["val/loss"] for row in launch.rows(folder, "val/loss")]
    assert len(losses) < 10 and min(losses) == losses[-3]
    assert (folder / "trunk").is_dir()
    shared(folder, "--steps", 10, "--val-every", 1, "--patience", 2, script=diverging)
    assert [row["val/loss"] for row in launch.rows(folder, "val/loss")] == losses, (
        "a run that had stopped early trained on"
    )


def test_a_late_signal_to_one_rank_is_ignored_by_all(shared, altered, tmp_path):
    """Rank 1 alone gets it, after its last check: both ranks publish, and neither waits for the other."""
    line = edits.AFTER_TRAINING
    script = altered("train_shared.py", line, line + "    if rank == 1:\n        stop.exit_code = 143\n")
    shared(tmp_path / "run", "--steps", 2, script=script, processes=2)
    assert (tmp_path / "run" / "trunk" / "forge.json").exists()


def test_the_process_group_outlives_the_model(shared, altered, tmp_path):
    """DDP's reducer holds gloo's group. As its last owner it destroys it without giving up the GIL, for which gloo's
    thread may be waiting to free the tensors of the last collective: the process then never ends."""
    show = "    __import__('weakref').finalize(model, lambda: print('FREED', torch.distributed.is_initialized(), flush=True))\n"
    script = altered("train_shared.py", edits.START_LOG, show + edits.START_LOG)
    printed = shared(tmp_path / "run", "--steps", 2, script=script, processes=2)
    assert printed.count("FREED True") == 2, printed
