"""A tracker delays a run by ten seconds at most and never ends it: W&B's real client against servers that fail."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import edits
import launch
import psutil
import pytest
import wandb_server

from forge_common.run import trackers

LIMIT = 10 + 30  # seconds: the tracker's limit, and what the end of a process may take on a busy machine


class Run:
    """A run of train_shared.py with --tracker wandb, and its lines with the time of each.

    It ends when its output ends: a process that it leaves behind, which keeps the pipe open, counts as part of it.
    """

    def __init__(self, folder: Path, url: str, arguments: tuple[object, ...], script: Path | str, **extra: str):
        self.folder = folder
        home = folder.parent / "home"
        home.mkdir(exist_ok=True)
        known = {"HOME": str(home), "WANDB_BASE_URL": url, "WANDB_API_KEY": wandb_server.KEY}
        self.environment = launch.environment(ACCELERATE_USE_CPU="true", **known, **extra)
        self.process = subprocess.Popen(
            launch.command(script, *arguments, "--output-dir", folder, "--tracker", "wandb"),
            env=self.environment,
            cwd=launch.ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.lines: list[tuple[float, str]] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append((time.monotonic(), line.rstrip()))
        self.ended = time.monotonic()

    @property
    def text(self) -> str:
        return "\n".join(line for _, line in self.lines)

    def wait_for(self, what: str | Callable[[], object]) -> None:
        """Waits until the run has printed `what`, or `what()` holds."""
        until = time.monotonic() + launch.PATIENCE
        while not (what in self.text if isinstance(what, str) else what()):
            assert self.process.poll() is None and time.monotonic() < until, self.text
            time.sleep(0.02)

    def is_tracked(self) -> bool:
        """Whether wandb.init has returned, according to W&B's log."""
        logs = self.folder.glob("wandb/run-*/logs/debug.log")
        return any("returning control to user process" in log.read_text() for log in logs)

    def services(self) -> list[psutil.Process]:
        """W&B's processes of this run, also those that outlived it: their command line has its pid."""
        processes = psutil.process_iter(["name", "cmdline"])
        served = (one for one in processes if one.info["name"] == "wandb-core")
        return [one for one in served if str(self.process.pid) in (one.info["cmdline"] or ())]

    def end(self, code: int = 0, after: str = "published ") -> str:
        """The output. The run ends with `code`, at most LIMIT seconds after the last line that `after` starts."""
        self._reader.join(launch.PATIENCE)
        alive = self._reader.is_alive()
        if alive:
            for process in [*self.services(), self.process]:
                process.kill()
            self._reader.join()
        assert not alive, f"did not end:\n{self.text}"
        assert self.process.wait() == code, self.text
        last = next(second for second, line in self.lines if line.startswith(after))
        assert self.ended - last < LIMIT, f"{self.ended - last:.1f} s:\n{self.text}"
        assert "Traceback" not in self.text
        return self.text

    def is_complete(self, steps: int) -> bool:
        rows = [row["step"] for row in launch.rows(self.folder)]
        return rows == list(range(1, steps + 1)) and (self.folder / "trunk" / "model.safetensors").exists()

    def sync(self, command: str) -> set[int]:
        """The steps that a working server receives by the `wandb sync` command that the run printed."""
        folder = self.text.split(f"`{command}")[1].split("`")[0].split()
        with wandb_server.serve() as server:
            environment = self.environment | {"WANDB_BASE_URL": server.url}
            client = [sys.executable, "-m", "wandb", *command.split()[1:], *folder]
            subprocess.run(client, env=environment, check=True, capture_output=True, timeout=launch.PATIENCE)
            return server.steps


@pytest.fixture
def start(text, cache, tmp_path):
    """start(url, steps) -> a Run that has been started."""

    def call(url: str, steps: int, *more: object, script: Path | str = "train_shared.py", **extra: str) -> Run:
        fixed = ("--data", text, "--cache-dir", cache, *launch.SHAPE, *launch.SIZES, "--steps", steps)
        return Run(tmp_path / "run", url, (*fixed, *more), script, **extra)

    return call


def test_a_working_server_has_every_row_at_the_end(start):
    with wandb_server.serve() as server:
        run = start(server.url, 6)
        printed = run.end()
        assert server.steps == {1, 2, 3, 4, 5, 6} and server.exit_code == 0
    assert run.is_complete(6) and "wandb:" not in printed
    assert (run.folder / "wandb").is_dir()


def test_after_a_refused_connection_the_run_is_recorded_offline_and_sent_later(start):
    """A password in the server's address is not printed."""
    with wandb_server.nobody() as url:
        run = start(url.replace("//", "//someone:pass-word@"), 6)
        printed = run.end()
    assert f"{url} cannot be used ([Errno 111]" in printed and "pass-word" not in printed and "someone" not in printed
    assert run.is_complete(6)
    assert run.sync("wandb sync ") == {1, 2, 3, 4, 5, 6}


@pytest.mark.parametrize(
    "text",
    [
        "http://a:secret@host:80/x cannot be used",
        "a 'https://secret@host' and https://b:sec@ret@host/",
        "input_value='http://a:secret...'",
        "http://a:s/secret@host/graphql",
    ],
)
def test_no_password_is_printed(text):
    shown = trackers.without_password(text)
    assert "sec" not in shown and ("host" in text) == ("//host" in shown) and shown[-4:] == text[-4:]
    assert trackers.without_password("http://host:80/x, not //host") == "http://host:80/x, not //host"


@pytest.mark.soak
def test_with_dropped_packets_the_run_is_recorded_offline(start):
    with wandb_server.dropped() as url:
        run = start(url, 4)
        assert "is recorded offline" in run.end()
    assert run.is_complete(4)


@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=pytest.mark.soak) for mode in ("denied", "error", "garbage")]
)
def test_with_a_server_that_refuses_the_run_is_recorded_offline(mode, start):
    with wandb_server.serve(mode) as server:
        run = start(server.url, 4)
        assert "is recorded offline" in run.end()
    assert run.is_complete(4)


@pytest.mark.soak
def test_a_failed_run_is_not_delayed(start, altered):
    """It does not close its log, and it ends while wandb.init waits for the server."""
    script = altered("train_shared.py", edits.BACKWARD, edits.scaled_by('float("inf")'))
    with wandb_server.serve("half") as server:
        run = start(server.url, 9, "--max-bad-updates", 3, script=script)
        assert "It is disabled" in run.end(code=1, after="train_shared.py: error:")


@pytest.mark.soak
def test_a_stopped_run_keeps_its_exit_code(start):
    """A server that stops to answer during the run: metrics.jsonl has every row, and `wandb sync` sends what W&B has stored.

    W&B writes its file in blocks of 32 KiB, each more than ten rows, and the rest when it ends. On a busy machine the
    tracker's limit may come before that, or before W&B's own. WANDB_ERROR_REPORTING: W&B's telemetry waits for an
    answer when the process exits, without a limit.
    """
    with wandb_server.serve(then="silent") as server:
        run = start(server.url, 5000, "--val-every", 0, WANDB_ERROR_REPORTING="true")
        run.wait_for(lambda: any(file.stat().st_size >= 1 << 15 for file in run.folder.glob("wandb/run-*/*.wandb")))
        assert server.mode == "silent"
        run.process.send_signal(signal.SIGTERM)
        printed = run.end(code=128 + signal.SIGTERM, after="stopped at update")
    steps = [row["step"] for row in launch.rows(run.folder)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 10
    assert "metrics.jsonl has every row" in printed
    if "did not accept everything" in printed:
        received = run.sync("wandb sync --no-skip-online ")
        assert 10 < len(received) <= len(steps) and received == set(range(1, len(received) + 1))
    else:
        assert "was not finished 7 s after the run" in printed


@pytest.mark.soak
@pytest.mark.parametrize("then", ["gone", "silent"])
def test_a_server_that_fails_during_the_run(then, start):
    with wandb_server.serve(then=then) as server:
        run = start(server.url, 60)
        assert "did not accept everything" in run.end()
        assert server.mode == then
    assert run.is_complete(60)
    assert run.sync("wandb sync --no-skip-online ") == set(range(1, 61))


@pytest.mark.soak
def test_wandbs_process_killed_during_the_run(start):
    with wandb_server.serve() as server:
        run = start(server.url, 60)
        run.wait_for(run.is_tracked)
        for service in run.services():
            service.kill()
        printed = run.end()
    assert run.is_complete(60)
    assert printed.index("It is disabled") < printed.index("step 60/60"), printed


@pytest.mark.soak
def test_wandbs_process_suspended_during_the_run(start):
    """The run is finished when it waits for the tracker: a signal then does not change its exit code."""
    with wandb_server.serve() as server:
        run = start(server.url, 30)
        run.wait_for(run.is_tracked)
        for service in run.services():
            service.send_signal(signal.SIGSTOP)
        run.wait_for("published ")
        time.sleep(1)
        run.process.send_signal(signal.SIGTERM)
        assert "It is disabled" in run.end()
    assert run.is_complete(30)


def test_a_call_that_hangs_disables_the_tracker_during_the_run(start, altered):
    """W&B's process is suspended during init, which then waits without a limit; reported while the run continues."""
    line = edits.START_LOG
    script = altered(
        "train_shared.py", line, f"    from forge_common.run import trackers\n\n    trackers.STUCK = 2\n{line}"
    )
    with wandb_server.serve() as server:
        run = start(server.url, 60, script=script)
        run.wait_for(run.services)
        for service in run.services():
            service.send_signal(signal.SIGSTOP)
        printed = run.end()
    assert run.is_complete(60)
    assert printed.index("has not responded for 2 s") < printed.index("step 60/60")


@pytest.mark.soak
def test_a_server_that_answers_but_does_not_start_a_run(start):
    with wandb_server.serve("half") as server:
        run = start(server.url, 300, "--val-every", 0)
        run.wait_for("published ")
        assert "is recorded offline" in run.end()
    assert run.is_complete(300)
    assert run.sync("wandb sync ") == set(range(1, 301))


def test_wandb_without_an_account_is_offline_and_one_run(shared, tmp_path, altered):
    """The real W&B client records offline, and a resumed run continues under the same id; samples are a table."""
    folder = tmp_path / "run"
    half = altered("train_shared.py", edits.CHECK_STOP, edits.interrupted_at(3))
    home = tmp_path / "home"
    home.mkdir()
    more = ("--steps", 6, "--tracker", "wandb")
    printed = shared(folder, *more, script=half, HOME=str(home))
    assert "offline" in printed
    run_id = json.loads((folder / "checkpoints" / "step-00000003" / "progress.json").read_text())["run_id"]
    shared(folder, *more, "--sample-prompt", "def ", HOME=str(home))
    [table] = folder.glob("wandb/offline-run-*/files/media/table/val/samples_*.table.json")
    [row] = launch.rows(folder, "val/samples")
    [sample] = row["val/samples"]
    samples = {"columns": ["step", "prompt", "continuation"], "data": [[6, "def ", sample["continuation"]]]}
    assert json.loads(table.read_text()).items() >= samples.items()
    recorded = sorted(path.name for path in (folder / "wandb").glob("offline-run-*"))
    assert len(recorded) == 2 and all(name.endswith(f"-{run_id}") for name in recorded)
    assert [row["step"] for row in launch.rows(folder)] == [1, 2, 3, 4, 5, 6]


def test_without_an_account_auto_is_the_local_file(shared, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    printed = shared(tmp_path / "run", "--steps", 2, "--tracker", "auto", HOME=str(home))
    assert "no W&B account" in printed
    assert not (tmp_path / "run" / "wandb").exists()
