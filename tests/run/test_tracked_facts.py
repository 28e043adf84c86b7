"""What a tracker gets beside the curves: names, settings, versions, commit, the artifact; a sweep."""

import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import launch
import pytest
import wandb_server

OPTIONAL = Path(
    os.environ.get("FORGE_TRACKERS", "/tmp/forge_trackers")
)  # pip install --target, for trackio and tensorboard
STEPS = {"train/loss": [1, 2, 3, 4], "val/loss": [2, 4]}


def stored_records(file: Path) -> Iterator[bytes]:
    """The records of W&B's file, a log of LevelDB's format: blocks of 32 KiB, pieces of (checksum, length, kind)."""
    content = file.read_bytes()
    place, record = 7, b""
    while place < len(content):
        left = (1 << 15) - place % (1 << 15)
        if left < 7:  # too few for a header: the block is filled up
            place += left
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield record
            record = b""


def offline_record(folder: Path) -> tuple[dict, dict, list]:
    """(settings, summary, artifacts) that W&B's client has recorded offline."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    config, summary, artifacts = {}, {}, []
    for content in stored_records(file):
        record = Record.FromString(content)
        for item in (*record.run.config.update, *record.config.update):
            config[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
        for item in record.summary.update:
            summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        artifacts += [found for found in (record.artifact, record.request.log_artifact.artifact) if found.name]
    return config, summary, artifacts


def test_wandb_has_settings_versions_commit_and_the_artifact(shared, tmp_path):
    folder = tmp_path / "run"
    home = tmp_path / "home"
    home.mkdir()
    more = ("--steps", 4, "--val-every", 2, "--tracker", "wandb", "--log-artifact")
    printed = shared(folder, *more, HOME=str(home))
    digest = json.loads((folder / "trunk" / "forge.json").read_text())["digest"]
    assert re.search(rf"artifact    run-\w+-trunk: .* \(digest {digest[:12]}\), stored by wandb", printed)
    config, summary, artifacts = offline_record(folder)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=launch.ROOT, capture_output=True, text=True
    ).stdout.strip()
    assert config["lr"] == 0.003 and config["git_commit"] == (commit or "unknown")
    assert {"version_torch", "device", "processes", "mixed_precision"} <= config.keys()
    last = launch.rows(folder, "val/loss")[-1]
    assert summary["val/best_loss"] == min(row["val/loss"] for row in launch.rows(folder, "val/loss"))
    assert last["val/best_step"] in STEPS["val/loss"]
    (stored,) = artifacts
    assert stored.type == "trunk" and json.loads(stored.metadata)["digest"] == digest
    assert "model.safetensors" in {entry.path for entry in stored.manifest.contents}


@pytest.mark.soak
@pytest.mark.skipif(not OPTIONAL.is_dir(), reason=f"trackio and tensorboard are not in {OPTIONAL} (docs/TRACKING.md)")
@pytest.mark.parametrize("tracker", ["tensorboard", "trackio"])
def test_other_trackers_have_the_same_curves_under_the_same_name(tracker, shared, tmp_path):
    folder = tmp_path / "run"
    path = f"{OPTIONAL}{os.pathsep}{launch.ROOT}"
    shared(folder, "--steps", 4, "--val-every", 2, "--tracker", tracker, launcher=(sys.executable,), PYTHONPATH=path)
    code = {"tensorboard": READ_TENSORBOARD, "trackio": READ_TRACKIO}[tracker]
    environment = launch.environment(PYTHONPATH=path)
    read = subprocess.run([sys.executable, "-c", code, folder], env=environment, capture_output=True, text=True)
    assert read.returncode == 0, read.stderr
    names, curves = json.loads(read.stdout.splitlines()[-1])
    (checkpoint,) = (folder / "checkpoints").glob("step-00000004")
    assert names == [f"run-{json.loads((checkpoint / 'progress.json').read_text())['run_id']}"]
    for key, steps in STEPS.items():
        own = {row["step"]: row[key] for row in launch.rows(folder, key)}
        assert {step: pytest.approx(value, rel=1e-6) for step, value in curves[key]} == own and list(own) == steps


READ_TENSORBOARD = """
import json, pathlib, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
folder = pathlib.Path(sys.argv[1]) / "tensorboard"
names = [path.name for path in folder.iterdir()]
events = EventAccumulator(str(folder / names[0])).Reload()
keys = ("train/loss", "val/loss")
print(json.dumps([names, {key: [(event.step, event.value) for event in events.Scalars(key)] for key in keys}]))
"""
READ_TRACKIO = """
import json, sqlite3, sys
rows = sqlite3.connect(sys.argv[1] + "/trackio/forge.db").execute("select run_name, step, metrics from metrics order by step")
rows = [(name, step, json.loads(values)) for name, step, values in rows]
keys = ("train/loss", "val/loss")
curves = {key: [(step, values[key]) for _, step, values in rows if key in values] for key in keys}
print(json.dumps([sorted({name for name, _, _ in rows}), curves]))
"""


@pytest.mark.soak
def test_the_sweep_file_is_accepted_and_an_agent_runs_it(text, cache, tmp_path):
    """`wandb sweep` and `wandb agent`, the real ones, against a server on this machine that draws the grid."""
    sweep = (launch.ROOT / "sweeps" / "learning_rate.yaml").read_text()
    known = "--data local:docs --preset tiny --steps 200"
    assert known in sweep.replace("\n    ", " ")
    sizes = " ".join(map(str, (*launch.SHAPE, *launch.SIZES))).replace("--lr 0.003", "").replace("--tracker none", "")
    line = f"--data {text} --cache-dir {cache} {sizes} --steps 40 --val-every 0"  # not over before W&B has started
    file = tmp_path / "sweep.yaml"
    file.write_text(sweep.replace(known, line).replace("runs/sweep", f"{tmp_path}/sweep"))
    with wandb_server.serve() as server:
        home = tmp_path / "home"
        home.mkdir()
        environment = launch.environment(
            HOME=str(home),
            WANDB_BASE_URL=server.url,
            WANDB_API_KEY=wandb_server.KEY,
            WANDB_DIR=str(tmp_path),
            ACCELERATE_USE_CPU="true",
        )

        def wandb(*arguments: object) -> str:
            done = subprocess.run(
                [sys.executable, "-m", "wandb", *map(str, arguments)],
                env=environment,
                cwd=launch.ROOT,
                capture_output=True,
                text=True,
                timeout=launch.PATIENCE,
            )
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout + done.stderr

        assert "Creating sweep with ID: sweep" in wandb("sweep", file)
        printed = wandb("agent", "someone/forge/sweep", "--count", 2)
    runs = sorted((tmp_path / "sweep").iterdir())
    settings = [json.loads((run / "settings.json").read_text()) for run in runs]
    assert {(one["lr"], one["schedule"]) for one in settings} == {(0.001, "cosine"), (0.001, "wsd")}, printed
    assert all((run / "trunk" / "model.safetensors").exists() for run in runs)
    assert server.steps == set(range(1, 41)), printed
