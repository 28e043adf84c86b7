"""The house: one training chapter in two scripts, imports that run one way, nothing heavy before the settings."""

import ast
import subprocess
import sys
from pathlib import Path

import launch
import pytest

PACKAGE = launch.ROOT / "forge_common"
SCRIPTS = ("train_shared.py", "train_module.py")
RUNNABLE = {"assemble", "evaluate", "generate", "merge"}
LEAVES = {"config", "schedule", "loss", "trackers", "errors", "files", "stopping", "validation"}
LEAVES |= {"statistics", "picture", "output", "progress", "launching", "untrusted", "tensors"}
MAY = {  # what else a room may reach; errors, files, config and untrusted are everybody's
    "model": {"loss"},
    "modules": {"model", "loss"},
    "routers": {"statistics"},
    "mixture": {"model", "modules", "routers", "loss"},
    "passport": {"modules", "routers"},
    "artifact": {"model", "modules", "statistics", "data", "passport", "tensors"},
    "assembled": {"artifact", "data", "model", "mixture", "routers"},
    "texts": {"data"},
    "checkpoint": {"progress"},
    "tracking": {"trackers"},
}
COMMON = {"errors", "files", "config", "untrusted"}


def imports(path: Path) -> set[str]:
    """The modules that a file names, of ours as `forge_common.x`."""
    found = set()
    package = ".".join(path.relative_to(launch.ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            found |= {f"{base}.{alias.name}" for alias in node.names} if base == "forge_common" else {base}
    return found


def ours(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("forge_common.")}


def rooms() -> dict[str, Path]:
    return {path.stem: path for path in PACKAGE.glob("*.py") if path.stem != "__init__"}


def test_every_room_is_known():
    assert rooms().keys() == LEAVES | MAY.keys() | RUNNABLE


@pytest.mark.parametrize("name", sorted(LEAVES | MAY.keys()))
def test_imports_run_one_way(name):
    assert ours(rooms()[name]) <= COMMON | MAY.get(name, set())


def test_the_data_knows_nothing_of_models():
    for path in (PACKAGE / "data").glob("*.py"):
        assert ours(path) <= {"errors", "files", "data", "untrusted"}, path.name


def test_the_package_knows_no_script_and_no_accelerate():
    for path in PACKAGE.rglob("*.py"):
        named = imports(path)
        assert not named & {"train_shared", "train_module"}, path.name
        assert not any(name.split(".")[0] == "accelerate" for name in named), path.name


def test_no_script_knows_the_other():
    for script in SCRIPTS:
        assert not imports(launch.ROOT / script) & {"train_shared", "train_module"}


def chapter(script: str) -> str:
    source = (launch.ROOT / script).read_text()
    return source[source.index("    # ---- Train ----") : source.index("    # ---- Publish ----")]


def test_the_training_chapters_are_one_text():
    one, other = map(chapter, SCRIPTS)
    assert one == other
    for call in (
        "accelerator.accumulate(model)",
        "accelerator.backward(",
        "accelerator.clip_grad_norm_(",
        "optimizer.step()",
    ):
        assert one.count(call) == 1


@pytest.mark.parametrize(
    "script",
    [
        *SCRIPTS,
        "-m forge_common.assemble",
        "-m forge_common.evaluate",
        "-m forge_common.generate",
        "-m forge_common.merge",
    ],
)
def test_help_imports_nothing_heavy(script):
    """What a --help or a wrong flag costs: no torch, no accelerate, no datasets."""
    code = f"""
import runpy, sys
script = {script!r}
sys.argv = [script, "--help"]
try:
    runpy.run_module(script[3:], run_name="__main__") if script.startswith("-m ") else runpy.run_path(script, run_name="__main__")
except SystemExit as ended:
    assert ended.code == 0
print("HEAVY", sorted({{"torch", "accelerate", "datasets", "numpy", "wandb", "transformers"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=launch.ROOT, text=True, capture_output=True, check=True)
    assert done.stdout.rstrip().endswith("HEAVY []"), done.stdout[-300:]
