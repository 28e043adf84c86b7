"""metrics.jsonl is complete and the numbers are right."""

import itertools
import json
import math
import re
import types

import edits
import launch
import pytest

from forge_common.run.log import RunLog
from forge_common.run.progress import Progress
from forge_common.validation import Validation


@pytest.fixture(scope="module")
def run(shared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tracking") / "run"
    return folder, shared(folder, "--steps", 10, "--log-every", 4, "--val-every", 5, launcher=launch.LAUNCH)


def test_each_interval_has_a_row_and_a_line_and_the_tail_is_not_lost(run):
    folder, printed = run
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert (
        [row["step"] for row in launch.rows(folder)] == [4, 8, 10] == launch.steps_of(printed)
    )  # the tail is not lost
    assert [row["step"] for row in launch.rows(folder, "val/loss")] == [5, 10]
    for row in rows:
        assert all(isinstance(value, (int, float)) for value in row.values())
    for word in ("loss", "lr", "grad", "tok/s", "mfu", "mem", "eta"):
        assert word in next(line for line in printed.splitlines() if line.startswith("step 4/10"))


def test_the_columns_of_a_row_agree_with_each_other(run):
    folder, _ = run
    for row in launch.rows(folder):
        assert row["train/tokens"] == row["step"] * 64 * 64  # packed: every label is scored
        assert 0 < row["train/mfu"] <= 1 and row["train/tokens_per_second"] > 0
        assert 100 < row["memory/peak_mb"] == row["memory/process_peak_mb"] < 4000
    for row in launch.rows(folder, "val/loss"):
        assert row["val/perplexity"] == pytest.approx(math.exp(row["val/loss"]))
        # the tokens are bytes, except the one at the end of a document
        assert row["val/bits_per_byte"] == pytest.approx(row["val/loss"] / math.log(2), rel=0.01)


def test_train_loss_is_the_mean_over_the_interval(run, shared, tmp_path):
    folder, _ = run
    shared(tmp_path / "fine", "--steps", 10, "--val-every", 5)
    fine = {row["step"]: row for row in launch.rows(tmp_path / "fine")}
    before = 0
    for row in launch.rows(folder):
        steps = range(before + 1, row["step"] + 1)
        assert row["train/loss"] == pytest.approx(sum(fine[s]["train/loss"] for s in steps) / len(steps), rel=1e-6)
        before = row["step"]


@pytest.mark.parametrize(
    ("packing", "processes"),
    [("--pack", 1), ("--pack", 2), ("--no-pack", 1), ("--no-pack", 2), ("--val-documents", 2)],
)
def test_validation_is_a_plain_loop_over_all_held_out_tokens(packing, processes, shared, text, cache, tmp_path):
    """For one and two processes: Transformers' model on a document, or on the whole stream, at a time."""
    import hashlib

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "run"
    shared(folder, "--steps", 3, packing, "--micro-batch-size", 8, processes=processes)
    model = AutoModelForCausalLM.from_pretrained(folder / "trunk", dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(folder / "trunk")
    texts = []
    for path in sorted(text.iterdir()):
        content = path.read_text(encoding="utf-8")
        if int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big") / 2**64 < 0.1:
            texts.append(tokenizer(content)["input_ids"] + [tokenizer.eos_token_id])
    streams = [list(itertools.chain(*texts))] if packing == "--pack" else texts
    nats, tokens, size = 0.0, 0, 0
    for stream in streams:
        for start in range(0, len(stream) - 1, 64):
            window = torch.tensor(stream[start : start + 65])
            ends = [i + 1 for i, token in enumerate(window[:-1]) if token == tokenizer.eos_token_id]
            for first, last in itertools.pairwise([0, *ends, len(window) - 1]):  # a document attends to itself alone
                if first < last:
                    log_p = model(window[None, first:last]).logits[0].log_softmax(-1)
                    nats -= log_p.gather(1, window[first + 1 : last + 1, None]).sum().item()
            tokens += len(window) - 1
            size += int((window[1:] != tokenizer.eos_token_id).sum())  # the other tokens are bytes
    row = launch.rows(folder, "val/loss")[-1]
    assert row["val/tokens"] == tokens > 1000 and len(texts) > 2
    assert row["val/loss"] == pytest.approx(nats / tokens, abs=2e-6)
    assert row["val/bits_per_byte"] == pytest.approx(nats / math.log(2) / size, abs=1e-5)
    assert json.loads((folder / "trunk" / "forge.json").read_text())["validation_tokens"] == tokens
    if packing == "--val-documents":  # what evaluate gives
        line = (
            "--model",
            folder / "trunk",
            "--data",
            f"text={text}",
            "--cache-dir",
            cache,
            "--json",
            tmp_path / "json",
        )
        launch.run_python("-m", "forge_common.evaluate", *line)
        (found,) = json.loads((tmp_path / "json").read_text())["rows"]
        assert found["tokens"] == tokens
        assert row["val/loss"] == pytest.approx(found["loss"], rel=1e-6)
        assert row["val/bits_per_byte"] == pytest.approx(found["bits_per_byte"], rel=1e-6)


def test_a_run_whose_gradient_is_0_ends(shared, tmp_path, altered):
    """As under a compiler that loses gradients: its log would look like that of a training."""
    printed = shared(tmp_path, script=altered("train_shared.py", edits.BACKWARD, edits.scaled_by("0")), fails=True)
    assert "the gradient of update 1 is 0, and its loss is not: nothing would be learned" in printed
    assert "Traceback" not in printed and not (tmp_path / "trunk").exists()


def test_nan_never_reaches_the_weights(shared, tmp_path, altered):
    """A gradient that is NaN at update 3 is counted and not applied, and the run continues."""
    script = altered("train_shared.py", edits.BACKWARD, edits.scaled_by('(float("nan") if step == 3 else scale)'))
    folder = tmp_path / "run"
    printed = shared(folder, "--steps", 5, "--save-every", 1, "--keep", 9, script=script)
    assert "update 3" in printed and "not applied" in printed
    assert launch.same_bits(launch.weights(folder, 2), launch.weights(folder, 3))
    assert not launch.same_bits(launch.weights(folder, 3), launch.weights(folder, 4))
    rows = launch.rows(folder)
    assert [row["train/bad_updates"] for row in rows] == [0, 0, 1, 1, 1]
    assert [row["step"] for row in rows if row["train/loss"] is None] == [3]  # a mean over nothing, not 0
    assert "step 3/5  loss - (no update applied)" in printed


def test_a_diverging_run_ends_and_names_its_documents(shared, text, tmp_path, altered):
    script = altered("train_shared.py", edits.BACKWARD, edits.scaled_by('float("inf")'))
    printed = shared(tmp_path / "run", "--steps", 9, "--max-bad-updates", 3, script=script, fails=True)
    assert "updates 1 to 3" in printed and str(text) in printed and "Traceback" not in printed
    assert not (tmp_path / "run" / "trunk").exists()


@pytest.mark.parametrize(("loss", "shown"), [(5.5, "244.69"), (14.0, "1.20e+06"), (1164.9, "1.01e+304")])
def test_a_large_perplexity_is_short(loss, shown, tmp_path, capsys):
    settings = types.SimpleNamespace(output_dir=tmp_path, dry_run=True, patience=0, sample_prompt=())
    log = RunLog(types.SimpleNamespace(is_main_process=True), settings, Progress("run", {}, {}), 9)
    log.validation(Validation(loss, 100, 40.0, {}), Progress("run", {}, {}, global_step=3))
    assert f" perplexity {shown} " in capsys.readouterr().out


def test_weighted_sources(shared, text, domain, tmp_path):
    """The log has the passes over each source, and the loss on each; a choice of held-out tokens is the same for two processes."""
    more = ("--steps", 2, "--data", f"{text}@0.75", f"{domain}@0.25", "--val-tokens", 1500)
    losses = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        printed = shared(folder, *more, processes=processes)
        assert str(domain) in printed and "1,500 of which a validation scores" in printed
        rows = launch.rows(folder)
        windows = [int(number.replace(",", "")) for number in re.findall(r"^data .* ([\d,]+) windows", printed, re.M)]
        for row in rows:
            seen = [
                row[f"train/passes/{name}"] * number for name, number in zip(("text0", "domain0"), windows, strict=True)
            ]
            assert sum(seen) == pytest.approx(row["step"] * 64) and seen[0] > 1.5 * seen[1] > 0
        (row,) = launch.rows(folder, "val/loss")
        losses.append([row["val/loss"], row["val/loss/text0"], row["val/loss/domain0"], row["val/bits_per_byte"]])
        whole, first, second, bits = losses[-1]
        assert row["val/tokens"] == 1500 and min(first, second) < whole < max(first, second)
        assert bits == pytest.approx(whole / math.log(2), rel=0.01)  # of the tokens that were scored
        assert json.loads((folder / "trunk" / "forge.json").read_text())["validation_tokens"] == 1500
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    printed = shared(folder, *more, "--val-tokens", 1400, fails=True)
    assert "val_tokens: 1500 -> 1400" in printed and "Traceback" not in printed
    printed = shared(tmp_path / "bad", "--steps", 2, "--data", f"{text}@0.75", domain, fails=True)
    assert "every source a weight" in printed
