"""The commands of README.md and of docs: each is accepted as it stands; `make soak` runs those of README.md,
docs/QUICKSTART.md and docs/guides/OWN_TEXT.md, in order.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import launch
import pytest
import torch

AFTER_QUICKSTART = ("docs/EXPORT.md", "docs/SCALE.md", "docs/CHAT.md")  # they read what its commands have written
GUIDES = ("OWN_TEXT", "MANY_GPUS", "SHARING")
FILES = ("README.md", "docs/QUICKSTART.md", *(f"docs/guides/{name}.md" for name in GUIDES), *AFTER_QUICKSTART)
PROGRAM = re.compile(
    r"(?:accelerate launch (?:-q )?(?:--config_file \S+ )?|python )(?:-m )?(train_\w+\.py|forge_common\.\w+) (.*)"
)


def commands(file: str) -> list[str]:
    """The lines of a file's code blocks that are typed: those that name a program. What is printed is in blocks of `text`."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", (launch.ROOT / file).read_text(), re.M | re.S)
    blocks = [block for language, block in found if not language]
    lines = [line.partition("    # ")[0].strip() for block in blocks for line in block.replace("\\\n", "").splitlines()]
    return [line for line in lines if line.startswith(("make ", "export ", "accelerate ", "python "))]


def settings_of(program: str) -> type:
    """The settings that a script or a command reads."""
    if program.endswith(".py"):
        sys.path.insert(0, str(launch.ROOT))
        program = program.removesuffix(".py")
    return __import__(program, fromlist=["Settings"]).Settings


@pytest.mark.parametrize("file", FILES)
def test_each_command_is_accepted(file):
    """The targets of make exist, the programs know the flags, and what a later command reads an earlier one has written."""
    import tyro

    targets = re.findall(r"^(\w+):", (launch.ROOT / "Makefile").read_text(), re.M)
    written = set()
    before = commands("docs/QUICKSTART.md") if file in AFTER_QUICKSTART else []
    for line in [*before, *commands(file)]:
        if line.startswith("make "):
            assert line.split()[1] in targets, line
        elif not line.startswith("export "):
            program, arguments = PROGRAM.fullmatch(line).groups()
            words = shlex.split(arguments)
            settings = tyro.cli(settings_of(program), args=words, config=(tyro.conf.AvoidSubcommands,))
            read = [
                word
                for word in words
                if word.startswith("runs/") and word != str(getattr(settings, "output_dir", None))
            ]
            for path in read:
                assert Path(path).parent in written or Path(path) in written, f"{line}: {path} is not written before"
            written |= {getattr(settings, "output_dir", Path())}
    assert len(written) > 1


def test_the_last_line_of_a_failed_command_is_its_error(tmp_path):
    """Not a traceback of the launcher: README.md's commands start it with -q."""
    line = next(line for line in commands("README.md") if line.startswith("accelerate launch "))
    start = line[: line.index("train_shared.py")].split()
    flags = ["train_shared.py", "--data", "missing.txt", "--output-dir", str(tmp_path)]
    done = subprocess.run([*start, *flags], cwd=launch.ROOT, env=launch.environment(), capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.endswith("--data missing.txt: no such file or folder\n"), done.stderr


def copy_texts(files: Iterable[Path], folder: Path) -> None:
    """Small files, until they are enough for an update of the default size."""
    folder.mkdir()
    size = 0
    for file in sorted(files):
        if size < 200_000 and file.stat().st_size < 20_000:
            shutil.copy(file, folder)
            size += file.stat().st_size


@pytest.mark.soak
@pytest.mark.parametrize("file", ["docs/QUICKSTART.md", "docs/guides/OWN_TEXT.md"])
def test_the_commands_run_as_they_stand(file, tmp_path):
    """In one shell, in a copy of the repository that has .venv; corpus/ and law/ are small folders of text."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=launch.ROOT, capture_output=True, text=True, check=True)
    for name in files.stdout.split("\0")[:-1]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(launch.ROOT / name, tmp_path / name)
    (tmp_path / ".venv").symlink_to((launch.ROOT / ".venv").resolve())
    os.utime(tmp_path / "requirements.txt", (0, 0))  # older than .venv, so that `make setup` installs nothing
    copy_texts(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"), tmp_path / "corpus")
    copy_texts((Path(torch.__file__).parent / "include" / "c10" / "util").glob("*.h"), tmp_path / "law")
    (tmp_path / "home").mkdir()
    lines = commands(file)
    if file == "docs/QUICKSTART.md":
        assert set(commands("README.md")) - {"make demo", "make test"} <= set(lines)
    else:
        lines.insert(0, "source .venv/bin/activate; export OMP_NUM_THREADS=1")
    script = "\n".join(["set -e", *lines])
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "WANDB_"))}
    environment |= {"HOME": str(tmp_path / "home"), "PYTHONPATH": ""}
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    merged = [word for line in lines if ".merge " in line for word in line.split() if word.endswith("/merged")]
    assert len(merged) == 1 and (tmp_path / merged[0] / "model.safetensors").is_file()
