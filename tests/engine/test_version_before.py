"""Runs and artifacts of the version before are still good: checkpoints resume, trunks and modules load.

tests/fixtures/version_0 was made by commit dfe2192 with these settings, from the root of the repository (its text is
what README.md and two documents of that commit said). Each run was copied as it was after its checkpoint at update 6.
"""

import json
import shutil
from pathlib import Path

import launch
import pytest

FIXTURE = Path("tests/fixtures/version_0")  # relative: the settings and the digests name the text by this path
SIZES = ("--sequence-length", 64, "--batch-size", 16, "--micro-batch-size", 8, "--steps", 12, "--lr", 3e-3)
SIZES += ("--warmup-steps", 2, "--val-every", 5, "--save-every", 6, "--keep", 9, "--tracker", "none")
SIZES += ("--val-fraction", 0.1, "--document-separator", "\n## ", "--data", FIXTURE / "text.md")
SHAPE = ("--preset", "tiny", "--hidden-size", 16, "--intermediate-size", 32, "--num-hidden-layers", 1)
SHAPE += ("--num-attention-heads", 2, "--num-key-value-heads", 1, "--tokenizer", "bytes")
MODULE = ("--trunk", FIXTURE / "trunk", "--name", "readme", "--general-data", FIXTURE / "text.md")
MODULE += ("--general-tokens", 500, "--kind", "lora+head", "--rank", 2)
MODULE += ("--weight-decay", 0.1)  # its default then


@pytest.mark.parametrize(
    ("script", "kind", "more"), [("train_shared.py", "trunk", SHAPE), ("train_module.py", "module", MODULE)]
)
def test_a_checkpoint_of_the_version_before_resumes(script, kind, more, tmp_path):
    before = FIXTURE / "runs" / kind
    shutil.copytree(launch.ROOT / before, tmp_path / kind)
    rows = launch.rows(tmp_path / kind, "val/loss")
    line = (script, *SIZES, *more, "--output-dir", tmp_path / kind, "--cache-dir", tmp_path / "cache")
    if kind == "trunk":  # that version scored all held-out tokens, and so do the defaults where there are fewer
        assert "val_tokens: 0 -> 300" in launch.run(*line, "--val-tokens", 300, fails=True)
    printed = launch.run(*line)
    assert "at update 6 of 12" in printed
    resumed = launch.rows(tmp_path / kind, "val/loss")
    assert [row["step"] for row in resumed] == [5, 10, 12]
    for row, expected in zip(resumed, rows, strict=True):  # other processors round differently
        assert row["val/loss"] == pytest.approx(expected["val/loss"], abs=1e-4)
    metadata = json.loads((tmp_path / kind / kind / ("forge.json" if kind == "trunk" else "module.json")).read_text())
    published = json.loads(
        (launch.ROOT / FIXTURE / kind / ("forge.json" if kind == "trunk" else "module.json")).read_text()
    )
    assert metadata["data"] == published["data"] and metadata["tokens_seen"] == published["tokens_seen"]
    if kind == "module":
        for domain, losses in published["losses"].items():
            assert metadata["losses"][domain] == pytest.approx(losses, abs=1e-4)


def test_artifacts_of_the_version_before_load(tmp_path):
    scores = tmp_path / "scores.json"
    line = ("-m", "forge_common.evaluate", "--model", FIXTURE / "trunk", "--module", FIXTURE / "module")
    line += ("--data", f"text={FIXTURE / 'text.md'}", "--val-fraction", 1, "--json", scores, "--cache-dir", tmp_path)
    launch.run_python(*line)
    losses = {row["model"]: row["loss"] for row in json.loads(scores.read_text())["rows"]}
    assert losses == pytest.approx({"trunk": 5.138706916929831, "module:readme": 5.099903489394886}, abs=1e-4)
