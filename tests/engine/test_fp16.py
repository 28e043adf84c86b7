"""fp16's loss scaler, run on a CPU: torch's autocast and GradScaler have one for it, only accelerate does not create it."""

import edits
import launch
import pytest

STEPS = 6
# the updates without a scored token, with an infinite gradient, and with a loss that is NaN
EMPTY, OVERFLOW, BAD = 2, 3, 4
ON_CPU = """    accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
"""


@pytest.fixture(scope="module")
def run(shared, altered, tmp_path_factory):
    """A run in fp16 with those three updates: its folder, and the loss scale after each update."""
    folder = tmp_path_factory.mktemp("fp16")
    script = altered("train_shared.py", edits.CHECK_LAUNCH, edits.CHECK_LAUNCH + ON_CPU)
    script = altered(script, edits.TAKE_WINDOWS, edits.empty_update(EMPTY))
    script = altered(script, edits.BACKWARD, edits.scaled_by(f'(float("inf") if step == {OVERFLOW} else scale)'))
    script = altered(script, edits.LOSS, edits.loss_of_update('float("nan")', BAD))
    scale = "        print('scale', accelerator.scaler.get_scale())\n"
    script = altered(script, edits.AFTER_UPDATE, edits.AFTER_UPDATE + scale)
    printed = shared(
        folder / "run", "--steps", STEPS, "--save-every", 1, "--keep", 9, "--weight-decay", 0.5, script=script
    )
    return folder / "run", [float(line.split()[1]) for line in printed.splitlines() if line.startswith("scale ")]


@pytest.mark.parametrize("step", [EMPTY, OVERFLOW, BAD])
def test_an_update_that_is_not_applied_changes_neither_weights_nor_moments(step, run):
    before, after = (launch.weights(run[0], number) for number in (step - 1, step))
    assert launch.same_bits(before, after)
    before, after = (launch.optimizer_state(run[0], number)["state"] for number in (step - 1, step))
    assert all(launch.same_bits(before[index], after[index]) for index in before)


def test_updates_after_those_that_were_not_applied_are_applied(run):
    for step in (5, 6):
        assert not launch.same_bits(launch.weights(run[0], step - 1), launch.weights(run[0], step))
    assert {int(entry["step"]) for entry in launch.optimizer_state(run[0], STEPS)["state"].values()} == {STEPS - 3}


def test_only_an_overflow_lowers_the_loss_scale(run):
    assert run[1] == [256.0, 256.0, 128.0, 128.0, 128.0, 128.0]


def test_empty_skipped_and_bad_updates_are_counted_apart(run):
    last = launch.rows(run[0])[-1]
    assert (last["train/empty_updates"], last["train/scaler_skips"], last["train/bad_updates"]) == (1, 1, 1)
