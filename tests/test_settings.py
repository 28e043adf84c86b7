"""What is asked for wrongly is refused: all of it at once, with the mend, a non-zero exit code, and nothing written."""

import json

import launch
import pytest


def test_all_problems_in_one_message(shared, tmp_path):
    more = (
        "--steps",
        0,
        "--batch-size",
        30,
        "--lr",
        -1,
        "--num-attention-heads",
        5,
        "--min-lr-ratio",
        2,
        "--accept-change",
        "stepz",
    )
    printed = shared(tmp_path / "run", *more, fails=True)
    for said in (
        "--steps is 0",
        "multiple of 16",
        "--lr is -1",
        "--num-attention-heads 5",
        "--min-lr-ratio",
        "did you mean steps",
    ):
        assert said in printed
    assert "Traceback" not in printed and not (tmp_path / "run").exists()


def test_an_unknown_flag_is_answered_with_the_nearest(shared, tmp_path):
    printed = shared(tmp_path / "run", "--warmup-stepz", 3, fails=True)
    assert "--warmup-steps" in printed and "Traceback" not in printed


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--tokenizer", "nothing.json"), "--tokenizer nothing.json"),
        (("--trunk-from", "no/such/place"), "no/such/place"),
        (("--val-fraction", 0.0001), "Raise --val-fraction"),
        (("--sequence-length", 100_000), "fewer than one update"),
        (("--resume", "require"), "--resume require"),
        (("--tracker", "trackio"), "pip install trackio"),
        (("--document-separator", ""), "document_separator"),
    ],
)
def test_refused_before_the_first_update(more, said, shared, tmp_path):
    printed = shared(tmp_path / "run", *more, fails=True)
    assert said.replace("_", "-") in printed.replace("_", "-") and "Traceback (most" not in printed
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("content", [None, "", "  \n\n "], ids=["no file", "empty file", "blank file"])
def test_no_text_is_refused(content, shared, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    if content is not None:
        (folder / "one.txt").write_text(content)
    printed = shared(tmp_path / "run", "--data", folder, fails=True)
    assert str(folder) in printed and "Traceback" not in printed


def test_too_long_for_the_trunk(module, tmp_path):
    printed = module(tmp_path / "run", "--sequence-length", 128, fails=True)
    assert "context of 64 tokens" in printed and "Traceback" not in printed


def test_a_dry_run_plans_and_writes_nothing(shared, tmp_path):
    printed = shared(tmp_path / "run", "--dry-run", "--steps", 1000)
    for said in (
        "parameters",
        "4 micro-batch(es) x 16",
        "epochs",
        "memory",
        "s an update (4 timed)",
        "nothing was written",
    ):
        assert said in printed
    assert not (tmp_path / "run").exists()


def test_a_launcher_that_contradicts_is_refused(shared, tmp_path):
    printed = shared(tmp_path / "run", "--steps", 2, fails=True, ACCELERATE_GRADIENT_ACCUMULATION_STEPS="7")
    assert "gradient_accumulation_steps to 7" in printed and "make it 4" in printed


def test_processes_that_would_train_apart_are_refused(shared, tmp_path):
    printed = shared(tmp_path / "run", "--steps", 2, processes=2, fails=True, ACCELERATE_USE_CPU="false")
    assert "train apart" in printed


def test_fp16_on_a_cpu_is_refused(shared, tmp_path):
    printed = shared(tmp_path / "run", "--steps", 2, fails=True, ACCELERATE_MIXED_PRECISION="fp16")
    assert "silently trains in float32" in printed


def test_bf16_trains(shared, tmp_path):
    """Mixed precision on a CPU: the weights stay float32, the loss falls, the sums are exact."""
    shared(tmp_path / "run", "--steps", 4, "--lr", 0.01, ACCELERATE_MIXED_PRECISION="bf16")
    losses = [row["train/loss"] for row in launch.rows(tmp_path / "run")]
    assert losses[-1] < losses[0]
    assert all(tensor.dtype.itemsize == 4 for tensor in launch.weights(tmp_path / "run", 4).values())


def test_settings_are_kept(shared, text, tmp_path):
    shared(tmp_path / "run", "--steps", 2)
    kept = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert kept["data"] == [str(text)] and kept["steps"] == 2 and kept["sequence_length"] == 64
