"""docs/notebook.ipynb: its outputs are those of a real execution, and its cells run without Jupyter."""

import ast
import itertools
import json
import re
import shlex
import subprocess
import sys

import launch
from test_readme_commands import settings_of

NOTEBOOK = launch.ROOT / "docs" / "notebook.ipynb"
# Runs the code cells as a kernel does, and prints the HTML or SVG of what a cell ends with.
KERNEL = """
import ast, json, sys
names = {}
for source in json.load(sys.stdin):
    body = ast.parse(source).body
    last = body.pop() if isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), "cell", "exec"), names)
    value = None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    if value is not None:
        print(value._repr_html_() or value._repr_svg_(), flush=True)
"""


def cells() -> list[dict]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def shown(cell: dict) -> str:
    """All that is below a cell."""
    parts = [output.get("text") or sum(output["data"].values(), []) for output in cell["outputs"]]  # noqa: RUF017 (short)
    return "".join(itertools.chain.from_iterable(parts))


def test_it_was_executed_from_top_to_bottom():
    assert [cell["execution_count"] for cell in cells()] == list(range(1, 11))
    text = "\n".join(map(shown, cells()))
    assert not [output for cell in cells() for output in cell["outputs"] if output["output_type"] == "error"]
    assert "step 40/40" in text and text.count("<polyline") == 4 and "<b>" in text and "heads " in text
    assert not re.search(r"/(root|home|tmp|work)\b", NOTEBOOK.read_text()), "a place on the machine where it ran"


def test_the_commands_of_the_notebook_are_accepted():
    import tyro

    values = {"small": None, "launch": None}
    accepted = 0
    for node in (node for cell in cells() for node in ast.parse("".join(cell["source"])).body):
        if (
            isinstance(node, ast.Assign | ast.AugAssign)
            and ast.unparse(getattr(node, "targets", [0])[0] if isinstance(node, ast.Assign) else node.target) in values
        ):
            exec(ast.unparse(node), values)
        elif isinstance(node, ast.Expr) and ast.unparse(node.value).startswith("run("):
            words = shlex.split(eval(ast.unparse(node.value.args[0]), values))
            start = next(i for i, word in enumerate(words) if word.startswith(("train_", "forge_common.")))
            tyro.cli(settings_of(words[start]), args=words[start + 1 :], config=(tyro.conf.AvoidSubcommands,))
            accepted += 1
    assert accepted == 5


def test_the_cells_of_the_notebook_run(tmp_path):
    for name in ("forge_common", "accelerate_configs", "train_shared.py", "train_module.py"):
        (tmp_path / name).symlink_to(launch.ROOT / name)
    (tmp_path / "docs").mkdir()
    sources = json.dumps(["".join(cell["source"]) for cell in cells()])
    done = subprocess.run(
        [sys.executable, "-c", KERNEL], input=sources, cwd=tmp_path / "docs", env=launch.environment(),
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.count("<polyline") == 4 and "<table>" in done.stdout and "heads " in done.stdout
    rows = json.loads((tmp_path / "runs" / "notebook" / "losses.json").read_text())["rows"]
    losses = {(row["model"], row["domain"]): row["loss"] for row in rows}
    assert losses["assembled", "cpp"] < losses["trunk", "cpp"], "the module helps on its text"
