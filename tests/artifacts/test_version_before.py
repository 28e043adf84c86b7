"""Artifacts of the version before still load: tests/fixtures/version_0 was made by commit dfe2192."""

import json
from pathlib import Path

import launch
import pytest

FIXTURE = Path("tests/fixtures/version_0")  # relative: the metadata name the text by this path


def test_artifacts_of_the_version_before_load(tmp_path):
    scores = tmp_path / "scores.json"
    line = ("-m", "forge_common.evaluate", "--model", FIXTURE / "trunk", "--module", FIXTURE / "module")
    line += ("--data", f"text={FIXTURE / 'text.md'}", "--val-fraction", 1, "--json", scores, "--cache-dir", tmp_path)
    launch.run_python(*line)
    losses = {row["model"]: row["loss"] for row in json.loads(scores.read_text())["rows"]}
    assert losses == pytest.approx({"trunk": 5.138706916929831, "module:readme": 5.099903489394886}, abs=1e-4)
