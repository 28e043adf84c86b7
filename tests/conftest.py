import os
import shutil
import subprocess
import sysconfig
import time
from pathlib import Path

import launch
import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """tests/run first: it has the longest file, whose tests wait more than they compute (xdist keeps this order)."""
    items.sort(key=lambda item: item.path.parent.name != "run")


FUZZ = int(os.environ.get("FORGE_FUZZ", "1"))
RAGGED = """
    abc ast bisect calendar cmd codeop colorsys contextlib copy csv dis enum fileinput fnmatch ftplib functools
    genericpath getopt getpass gettext glob gzip heapq hmac keyword linecache lzma netrc ntpath numbers opcode
    operator pprint queue quopri random reprlib sched secrets shelve shlex signal stat statistics struct tabnanny
    textwrap this timeit token types uuid warnings weakref
""".split()  # noqa: SIM905 (sixty lines otherwise)


def excerpts_of_library(folder: Path) -> Path:
    """Real text of ragged lengths: modules of the standard library, the first 150 to 1,500 characters of each."""
    library = Path(sysconfig.get_paths()["stdlib"])
    return _excerpts([library / f"{name}.py" for name in RAGGED], folder)


def excerpts_of_headers(folder: Path) -> Path:
    """Text of another domain, of ragged lengths: C++ headers of torch."""
    return _excerpts(sorted((Path(torch.__file__).parent / "include" / "c10" / "util").glob("*.h"))[:60], folder)


def _excerpts(files: list[Path], folder: Path) -> Path:
    """Does not write a file again: its time is part of the key of the token cache."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, file in enumerate(files):
        copy, source = folder / file.name, file.read_text(encoding="utf-8")
        if not copy.exists():
            copy.write_text(source[: 150 + (number * 997) % 1350], encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def one_thread():
    """For models that are too small for two threads, which wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def clock(monkeypatch):
    """The seconds that time.perf_counter returns, which only the test advances: [seconds]."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    return excerpts_of_library(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def shared(text, cache):
    """Runs train_shared.py on that text with a small model: shared(output_dir, *more flags) -> its output.

    shape: the flags of the model; none with --trunk-from.
    """

    def call(output: Path, *more: object, script: Path | str = "train_shared.py", shape=launch.SHAPE, **how) -> str:
        fixed = ("--data", text, "--output-dir", output, "--cache-dir", cache)
        return launch.run(script, *fixed, *shape, *launch.SIZES, *more, **how)

    return call


@pytest.fixture(scope="session")
def started(text, cache):
    """Starts train_shared.py on that text in the background, in its own session; prints to `out` or OUTPUT_DIR.out.

    Without a launcher its processes are forks, unless they must be `new`: started by python, or several by torchrun.
    """

    def call(output: Path, *more, script="train_shared.py", launcher=(), processes=1, out=None, new=False, **extra):
        fixed = ("--data", text, "--output-dir", output, "--cache-dir", cache, *launch.SHAPE, *launch.SIZES)
        extra = {"ACCELERATE_USE_CPU": "true"} | extra
        out = out or output.with_suffix(".out")
        if not launcher and not new:
            return launch.Background(launch.ROOT / script, *fixed, *more, out=out, processes=processes, **extra)
        line = launch.command(script, *fixed, *more, launcher=launcher, processes=processes)
        environment = launch.environment(**extra)
        with open(out, "a") as console:
            how = {"stdout": console, "stderr": console, "start_new_session": True}
            return subprocess.Popen(line, env=environment, cwd=launch.ROOT, **how)

    return call


@pytest.fixture(scope="session")
def trunk(shared, tmp_path_factory) -> Path:
    """A published trunk, trained for 20 updates: the folder trunk/."""
    folder = tmp_path_factory.mktemp("trunk")
    shared(folder, "--steps", 20)
    return folder / "trunk"


@pytest.fixture(scope="session")
def domain(tmp_path_factory) -> Path:
    return excerpts_of_headers(tmp_path_factory.mktemp("domain"))


@pytest.fixture(scope="session")
def module(trunk, domain, cache):
    """Runs train_module.py on that trunk and domain: module(output_dir, *more flags) -> its output."""

    def call(output: Path, *more: object, script: Path | str = "train_module.py", **how) -> str:
        fixed = ("--trunk", trunk, "--name", "cpp", "--data", domain, "--output-dir", output, "--cache-dir", cache)
        return launch.run(script, *fixed, *launch.SIZES, "--general-tokens", 0, *more, **how)

    return call


@pytest.fixture(scope="session")
def valid_artifacts(tmp_path_factory) -> Path:
    """The folders of small_artifacts.build; tests must not change them."""
    import small_artifacts

    return small_artifacts.build(tmp_path_factory.mktemp("valid_artifacts"))


@pytest.fixture
def root(valid_artifacts, tmp_path) -> Path:
    """A copy of valid_artifacts that a test may damage."""
    return shutil.copytree(valid_artifacts, tmp_path / "root")


@pytest.fixture(scope="session")
def altered(tmp_path_factory):
    """A copy of a script with one text replaced by another: as a user edits it, or broken on purpose."""

    def make(script: str | Path, old: str, new: str) -> Path:
        source = (launch.ROOT / script).read_text()
        assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in {script}"
        copy = tmp_path_factory.mktemp("altered") / Path(script).name
        copy.write_text(source.replace(old, new))
        return copy

    return make


@pytest.fixture(scope="session")
def straight(shared, tmp_path_factory) -> Path:
    """An uninterrupted run of launch.MORE, with all its checkpoints."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    shared(folder, *launch.MORE)
    return folder
