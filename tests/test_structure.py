"""The layout: one training chapter in two scripts, imports that run one way, nothing heavy before the settings are checked."""

import ast
import itertools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import launch
import pytest

PACKAGE = launch.ROOT / "forge_common"
SCRIPTS = ("train_shared.py", "train_module.py")
MAY_IMPORT = {  # a folder (with what is below it) -> what else of the package its files may import
    "files": {"errors"},
    "model": {"autocast", "errors", "labels", "loss", "files"},
    "data": {"errors", "flags", "files", "heap", "labels"},
    "run": {"errors", "flags", "settings", "schedule", "files", "heap", "reporting"},
    "reporting": {"errors", "files"},
    "routing": {"errors", "labels", "loss", "files", "model"},
    "artifacts": {"errors", "flags", "files", "heap", "model", "data", "routing"},
    "evaluation": {"errors", "labels", "files", "model", "data", "routing", "artifacts"},
    "generation": {"errors", "data", "model", "routing"},
    "exporting": {"errors", "files", "model", "data", "routing", "artifacts"},
}
TOP_LEVEL = {"autocast", "errors", "settings", "files", "run"}  # what a file of the package's top level may import
# What is imported before the settings are checked: a --help must not load torch.
READ_FIRST = ("settings", "settings_checks", "command_line", "config_file", "flags", "help")
BEFORE_TORCH = {*READ_FIRST, "errors", "files", "schedule", "model.config", "model.module_settings"}


def imports(path: Path) -> set[str]:
    """The modules that a file imports, those of the package as `forge_common.x`."""
    found = set()
    package = list(path.relative_to(launch.ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package[: len(package) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            is_package = (launch.ROOT / base.replace(".", "/")).is_dir()
            found |= {f"{base}.{alias.name}" for alias in node.names} if is_package else {base}
    return found


def ours(path: Path) -> set[str]:
    """What a file imports of the package: `files.atomic`, `errors`."""
    return {name.removeprefix("forge_common.") for name in imports(path) if name.startswith("forge_common.")}


def folders() -> list[str]:
    return sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


def is_runnable(path: Path) -> bool:
    return '__name__ == "__main__"' in path.read_text()


def test_every_folder_has_a_rule_and_says_it():
    assert folders() == sorted(MAY_IMPORT)
    for init in PACKAGE.glob("*/**/__init__.py"):
        assert "May import: " in ast.get_docstring(ast.parse(init.read_text())), init


@pytest.mark.parametrize("folder", folders())
def test_a_folder_imports_only_what_its_rule_allows(folder):
    stated = ast.get_docstring(ast.parse((PACKAGE / folder / "__init__.py").read_text()))
    assert "May import: " + ", ".join(sorted(MAY_IMPORT[folder])) == next(
        "May import: " + ", ".join(sorted(line.removeprefix("May import: ").split(".")[0].split(", ")))
        for line in stated.splitlines()
        if line.startswith("May import: ")
    )
    for path in (PACKAGE / folder).rglob("*.py"):
        assert {name.split(".")[0] for name in ours(path)} <= MAY_IMPORT[folder] | {folder}, path


def test_a_top_level_file_imports_only_what_its_rule_allows():
    for path in PACKAGE.glob("*.py"):
        if path.stem in READ_FIRST:
            assert all(name in BEFORE_TORCH or name.startswith("files.") for name in ours(path)), path
        elif not is_runnable(path):
            assert {name.split(".")[0] for name in ours(path)} <= TOP_LEVEL, path


def test_the_package_imports_no_script_no_runnable_file_and_no_accelerate():
    runnable = {path.stem for path in PACKAGE.glob("*.py") if is_runnable(path)}
    assert runnable >= {"assemble", "evaluate", "generate", "merge"}
    for path in PACKAGE.rglob("*.py"):
        assert not imports(path) & {"train_shared", "train_module"}, path
        assert not ours(path) & runnable, path
        assert not any(name.split(".")[0] == "accelerate" for name in imports(path)), path


def test_no_script_imports_the_other():
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


def test_the_tour_in_contributing_shows_the_loop_as_it_is():
    blocks = (launch.ROOT / "CONTRIBUTING.md").read_text().split("```python\n")[1:]
    shown = [line for block in blocks for line in block.split("```")[0].splitlines()]
    loop = chapter("train_shared.py").split("    while ")[1].split("    update_batches.close()")[0]
    lines = ("    while " + loop).splitlines()
    assert shown == [line.removeprefix("    ") for line in lines if line.strip()]


@pytest.mark.parametrize(
    "script",
    [
        *SCRIPTS,
        "-m forge_common.assemble",
        "-m forge_common.chat",
        "-m forge_common.evaluate",
        "-m forge_common.export",
        "-m forge_common.generate",
        "-m forge_common.merge",
        "-m forge_common.plan",
        "-m forge_common.push",
        "-m forge_common.report",
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


def test_every_third_party_import_is_pinned_in_requirements_and_declared_in_pyproject():
    """Import names and package names differ in one case; a package of the tests counts only for the tests."""
    package_of = {"yaml": "PyYAML"}
    files = [path for top in ("forge_common", "benchmarks", "tests") for path in (launch.ROOT / top).rglob("*.py")]
    files += [launch.ROOT / script for script in SCRIPTS]
    local = {path.stem for path in files} | {"forge_common", "tests"}
    needed, needed_by_tests = set(), set()
    for path in files:
        names = {name.split(".")[0] for name in imports(path)} - sys.stdlib_module_names - local
        packages = {package_of.get(name, name) for name in names}
        (needed_by_tests if path.is_relative_to(launch.ROOT / "tests") else needed).update(packages)
    project = tomllib.loads((launch.ROOT / "pyproject.toml").read_text())["project"]
    declared = {requirement.split(">=")[0] for requirement in project["dependencies"]}
    for_tests = {requirement.split(">=")[0] for requirement in project["optional-dependencies"]["test"]}
    for_lint = {requirement.split(">=")[0] for requirement in project["optional-dependencies"]["lint"]}
    for_engines = {requirement.split(">=")[0] for requirement in project["optional-dependencies"]["engines"]}
    for_pretrained = {requirement.split(">=")[0] for requirement in project["optional-dependencies"]["pretrained"]}
    compared = {requirement.split(">=")[0] for requirement in project["optional-dependencies"]["bench"]}
    pinned, pinned_for_engines, pinned_for_pretrained, pinned_for_benchmarks = (
        [line.split("==")[0] for line in (launch.ROOT / file).read_text().splitlines() if not line.startswith("#")]
        for file in (
            "requirements.txt",
            "requirements-engines.txt",
            "requirements-pretrained.txt",
            "benchmarks/requirements.txt",
        )
    )
    assert needed - declared == for_engines | compared, "those that are installed only where they are used"
    assert for_engines <= set(pinned_for_engines) and for_pretrained == set(pinned_for_pretrained)
    assert compared <= set(pinned_for_benchmarks) | for_tests
    assert needed_by_tests <= declared | for_tests | for_engines | for_pretrained
    assert sorted(pinned) == sorted(declared | for_tests | for_lint), (
        "requirements.txt pins each of pyproject.toml's once"
    )


def test_the_tests_that_reliability_names_exist():
    """docs/RELIABILITY.md names tests as `test_file: a_test, another_one...; test_other`."""
    tests = {
        path.stem: [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        for path in (launch.ROOT / "tests").rglob("test_*.py")
    }
    cells = re.findall(r"\| (test_[^|]*?) \|", (launch.ROOT / "docs" / "RELIABILITY.md").read_text())
    assert len(cells) > 30
    for part in itertools.chain.from_iterable(cell.split(";") for cell in cells):
        files, _, names = re.sub(r"\(.*?\)|\[.*?\]|\.\.\.", "", part).partition(":")
        for file in files.split(","):
            assert file.strip() in tests, part
        for name in filter(None, (name.strip() for name in names.split(","))):
            assert any(name in test for test in tests[files.strip()]), part


def test_the_files_that_the_map_names_exist_and_every_folder_is_in_it():
    block = (launch.ROOT / "README.md").read_text().split("## The map")[1].split("```")[1]
    folder = launch.ROOT
    folders = set()
    for line in block.splitlines():
        if named := re.match(r"( *)(\w+)/", line):
            folder = (PACKAGE if named[1] == "  " else launch.ROOT) / named[2]
            folders.add(folder)
        elif re.match(r"  \w", line):
            folder = PACKAGE
        for file in re.findall(r"\b\w+\.py\b", line):
            assert (folder / file).is_file(), f"{file} in {folder}"
    assert folders >= {PACKAGE / name for name in MAY_IMPORT}
