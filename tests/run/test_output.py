"""One run to a folder, and a folder that can be written: refused before the first update, or survived."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import edits
import launch
import psutil
import pytest
from disks import fill, missing_bytes, mounted
from launch import MORE, PATIENCE, STEPS, same_run

from forge_common.artifacts.trunk_folder import read_trunk, write_trunk
from forge_common.errors import UserError
from forge_common.run import folder as output
from forge_common.run import log as run_log
from forge_common.run.progress import Progress

MAIN = types.SimpleNamespace(is_main_process=True)


@pytest.fixture
def disk(tmp_path):
    with mounted(tmp_path / "disk", "size=12m") as folder:
        yield folder


def test_two_runs_in_one_folder(straight, started, shared, tmp_path):
    """The second is refused with the pid of the first, and changes nothing; the first is not affected."""
    folder = tmp_path / "run"
    first = started(folder, *MORE)
    launch.wait_for(folder / "checkpoints" / "step-00000002", first)
    first.send_signal(signal.SIGSTOP)
    before = sorted(folder.rglob("*"))
    printed = shared(folder, *MORE, fails=True)
    assert f"in use by another run: pid {first.pid} on host {socket.gethostname()}, started 20" in printed
    assert "Traceback" not in printed and sorted(folder.rglob("*")) == before
    first.send_signal(signal.SIGCONT)
    assert first.wait(PATIENCE) == 0
    same_run(straight, folder)
    assert (folder / ".lock").read_text() == ""


def child(folder: Path) -> subprocess.Popen:
    """Another process that claims the folder and waits."""
    code = (
        "import sys, time, types; from pathlib import Path; from forge_common.run import folder as output\n"
        "lock = output.claim(types.SimpleNamespace(is_main_process=True), Path(sys.argv[1]))\n"
        "print('claimed', flush=True); time.sleep(100_000)"
    )
    running = subprocess.Popen([sys.executable, "-c", code, folder], cwd=launch.ROOT, stdout=subprocess.PIPE, text=True)
    assert running.stdout.readline() == "claimed\n"
    return running


@pytest.fixture(params=["locks", "no locks"])
def file_system(request, monkeypatch):
    """With the kernel's locks, and as on a file system without locks."""
    if request.param == "no locks":

        def none(file, operation):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", none)
    return request.param


def test_the_lock_of_a_dead_owner_is_taken_over(file_system, tmp_path, capsys):
    owner = child(tmp_path / "run")
    with pytest.raises(UserError, match=rf"pid {owner.pid} on host {socket.gethostname()}"):
        output.claim(MAIN, tmp_path / "run")
    owner.kill()
    owner.wait()
    lock = output.claim(MAIN, tmp_path / "run")
    assert f"the previous run did not end normally: pid {owner.pid}" in capsys.readouterr().out
    owner = json.loads((tmp_path / "run" / ".lock").read_text())
    assert owner["pid"] == os.getpid()
    assert owner["started"] == pytest.approx(psutil.Process().create_time(), abs=1)
    output.release(lock)
    output.release(output.claim(MAIN, tmp_path / "run"))
    assert "taken over" not in capsys.readouterr().out


ENDS = {
    "error: wrong": "run_main(lambda _: (_ for _ in ()).throw(UserError('wrong')), types.SimpleNamespace())",
    "Traceback": "raise RuntimeError",
    "": "os._exit(1)",  # by force
}


@pytest.mark.parametrize("end", ENDS)
def test_only_a_run_that_ended_by_force_is_called_unfinished(end, tmp_path, capsys):
    """A fork that ends does not release the lock of its parent."""
    code = (
        "import os, sys, types; from pathlib import Path; from forge_common.errors import UserError\n"
        "from forge_common.run import folder as output; from forge_common.command_line import run_main\n"
        "lock = output.claim(types.SimpleNamespace(is_main_process=True), Path(sys.argv[1]))\n"
        "if os.fork() == 0: sys.exit()\n"
        "os.wait()\n"
        "assert Path(sys.argv[1], '.lock').read_text()\n"
    )
    line = [sys.executable, "-c", code + ENDS[end], tmp_path]
    done = subprocess.run(line, cwd=launch.ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and end in done.stderr
    output.release(output.claim(MAIN, tmp_path))
    assert ("did not end normally" in capsys.readouterr().out) == (not end)


def test_a_reused_pid_is_not_the_owner(tmp_path, monkeypatch):
    """The lock names a running process of this host that started at another time."""
    monkeypatch.setattr(fcntl, "flock", lambda file, operation: (_ for _ in ()).throw(OSError(errno.ENOLCK, "")))
    (tmp_path / ".lock").write_text(json.dumps({"pid": os.getppid(), "host": socket.gethostname(), "started": 1e9}))
    output.release(output.claim(MAIN, tmp_path))


def test_an_owner_on_another_host(file_system, tmp_path):
    """With locks, it has ended if its lock is free; without locks, it counts as alive."""
    (tmp_path / ".lock").write_text(json.dumps({"pid": 1, "host": "elsewhere", "started": 1.8e9}))
    if file_system == "locks":
        output.release(output.claim(MAIN, tmp_path))
    else:
        with pytest.raises(UserError, match=r"pid 1 on host elsewhere, started 2027.*delete"):
            output.claim(MAIN, tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"pid": "x", "host": 1, "started": 2}', "null", '"a"'])
def test_an_incomplete_lock_has_no_owner(content, tmp_path):
    (tmp_path / ".lock").write_text(content)
    output.release(output.claim(MAIN, tmp_path))


def test_partial_files_of_a_killed_run_are_removed(tmp_path):
    for name in (".tmp-trunk-123", ".old-trunk", ".old-module", "module"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "from").write_text(name)
    (tmp_path / ".tmp-metrics.jsonl").touch()
    output.release(output.claim(MAIN, tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "module", "trunk"]
    assert (tmp_path / "trunk" / "from").read_text() == ".old-trunk", "the previous one gets its name back"
    assert (tmp_path / "module" / "from").read_text() == "module"


@pytest.mark.parametrize("place", ["read-only", "below a file", "/proc/forge"])
def test_a_folder_that_cannot_be_written_is_refused_at_once(place, shared, tmp_path):
    """Before anything is read or trained."""
    with mounted(tmp_path / "ro", "ro") if place == "read-only" else nullcontext() as disk:
        (tmp_path / "file").touch()
        folder = disk / "run" if disk else tmp_path / "file" / "run" if place == "below a file" else Path(place)
        printed = shared(folder, *MORE, fails=True)
    assert f"--output-dir {folder} cannot be written" in printed and "Traceback" not in printed
    assert "data  " not in printed


def test_a_disk_too_small_is_refused_before_the_first_update(disk, shared):
    """The message says how much is missing, and with that much more it runs."""
    filler = fill(disk, leaving=700_000)
    printed = shared(disk / "run", *MORE, "--keep", 1, fails=True)
    assert "needs about" in printed and "Traceback" not in printed and not launch.steps_of(printed)
    with open(filler, "r+b") as file:
        file.truncate(filler.stat().st_size - missing_bytes(printed) - 100_000)
    shared(disk / "run", *MORE, "--keep", 1, "--steps", 3)


@pytest.mark.parametrize("then", ["continue", "stop"])
def test_a_disk_that_fills_up_during_a_run(then, disk, started, shared, straight, tmp_path):
    """The older checkpoint stays; the run continues, or stops and resumes: the same bits, and no row is lost."""
    folder, out = disk / "run", tmp_path / "out"
    more = (*MORE, "--keep", 1, "--on-full-disk", then)
    running = started(folder, *more, out=out, **launch.slow_disk(0.03))
    launch.wait_for(folder / "checkpoints" / "step-00000002", running)
    running.send_signal(signal.SIGSTOP)
    filler = fill(disk, leaving=0)
    running.send_signal(signal.SIGCONT)
    if then == "continue":
        while out.read_text().count("was not saved") < 2:
            assert running.poll() is None
            time.sleep(0.01)
    else:
        assert running.wait(PATIENCE) == 1
    printed = out.read_text()
    assert " are missing" in printed and "The older ones are kept" in printed and "Traceback" not in printed
    filler.unlink()
    assert running.wait(PATIENCE) == (then == "stop")
    if then == "stop":
        shared(folder, *more)
    assert launch.same_bits(launch.weights(straight, STEPS), launch.weights(folder, STEPS))
    assert launch.without_times(straight) == launch.without_times(folder)


@contextmanager
def removed(folder: Path) -> Iterator[None]:
    folder.rename(folder.with_name("elsewhere"))
    yield
    folder.with_name("elsewhere").rename(folder)


@contextmanager
def replaced_by_a_file(folder: Path) -> Iterator[None]:
    with removed(folder):
        folder.touch()
        yield
        folder.unlink()


def read_only(folder: Path) -> AbstractContextManager:
    return mounted(folder, "ro")


FAULTS = {
    removed: "does not exist any more",
    replaced_by_a_file: "is no longer a folder",
    read_only: "cannot be written any more",
}


@pytest.mark.parametrize(
    "fault",
    [removed, pytest.param(replaced_by_a_file, marks=pytest.mark.soak), read_only],
    ids=lambda fault: fault.__name__,
)
def test_a_folder_that_is_lost_during_a_run(fault, started, shared, straight, tmp_path):
    """An error that names it; when it is there again, the run resumes from its newest checkpoint."""
    folder, out = tmp_path / "run", tmp_path / "out"
    running = started(folder, *MORE, out=out, **launch.slow_disk(0.02))
    launch.wait_for(folder / "checkpoints" / "step-00000002", running)
    running.send_signal(signal.SIGSTOP)
    try:
        with fault(folder):
            running.send_signal(signal.SIGCONT)
            assert running.wait(PATIENCE) == 1
    finally:
        running.send_signal(signal.SIGCONT)
    printed = out.read_text()
    assert f"error: --output-dir {folder} {FAULTS[fault]}" in printed and "Traceback" not in printed
    assert "did not end normally" not in shared(folder, *MORE)
    same_run(straight, folder)


def test_an_error_beside_the_updates_ends_all_ranks(shared, altered, tmp_path):
    """The main process cannot give a checkpoint its name: the others, which wait at the next one, end with it."""
    broken = "    if rank == 0:\n        __import__('os').rename = lambda old, new: open('/proc/self/mem').read(1)\n"
    script = altered("train_shared.py", edits.BEGIN_TRAINING, broken + edits.BEGIN_TRAINING)
    printed = shared(tmp_path / "run", *MORE, processes=2, script=script, fails=True)
    assert "step-00000001 was not written ([Errno 5] Input/output error)" in printed
    assert "OSError: [Errno 5] Input/output error" in printed
    assert "another process could not write the checkpoint, and prints why" in printed
    assert launch.steps_of(printed) == [1, 2]


def test_rows_are_kept_until_there_is_space(disk, capsys):
    """On a full disk a row is neither lost nor partial: it is written, in order, as soon as there is space."""
    settings = types.SimpleNamespace(output_dir=disk, dry_run=False, patience=0)
    log = run_log.RunLog(MAIN, settings, Progress("run", {}, {}), last=9)
    log.row(1, {"train/loss": 1.0})
    filler = fill(disk, leaving=0)
    for step in range(2, 900):  # what fits into the last page of the file still does
        log.row(step, {"train/loss": 1.0 / step})
    assert "row(s) are kept in memory until there is space" in capsys.readouterr().out
    assert 1 <= len(launch.rows(disk)) < 899
    filler.unlink()
    with log.clock_paused():
        pass
    assert [row["step"] for row in launch.rows(disk)] == list(range(1, 900))


@pytest.mark.parametrize("line", ["[1, 2]", "3", "null", "{}", '{"step": null}', '{"step": "4"}'])
def test_a_line_of_the_log_that_is_no_row_is_named(line, tmp_path):
    """Whoever edited the file sees where; a partial last row is written again."""
    settings = types.SimpleNamespace(output_dir=tmp_path, dry_run=False, patience=0)
    before = Progress("run", {}, {}, global_step=2)
    file = tmp_path / "metrics.jsonl"
    file.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n{{"st')
    with pytest.raises(UserError, match=f"^{file}:2 is no row with an integer `step`"):
        run_log.RunLog(MAIN, settings, before, last=9)
    file.write_text('{"step": 1}\n{"step": 2}\n{"st')
    run_log.RunLog(MAIN, settings, before, last=9)
    assert [row["step"] for row in launch.rows(tmp_path, "step")] == [1, 2]


def test_a_disk_too_full_to_publish(disk, trunk, tmp_path):
    """No partial file stays; the trunk that was published before does."""
    model, tokenizer, _ = read_trunk(str(trunk))
    place = disk / "trunk"
    write_trunk(place, model.state_dict(), model.config, tokenizer, {})
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    fill(disk, leaving=20_000)
    with pytest.raises(UserError, match="disk is full"):
        write_trunk(place, model.state_dict(), model.config, tokenizer, {})
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
    assert not list(disk.glob(".*"))


def test_a_closed_console_does_not_end_the_run(started, tmp_path):
    """Its reader ends while the run trains, as `| tee` does when its disk is full."""
    console, printed = tmp_path / "console", b""
    os.mkfifo(console)
    running = started(tmp_path / "run", *MORE, out=console)
    with open(console, "rb", buffering=0) as reader:
        while b"step 2/" not in printed:
            printed += reader.read(4096)
    assert running.wait(PATIENCE) == 0
    assert launch.rows(tmp_path / "run")[-1]["step"] == STEPS and (tmp_path / "run" / "trunk").exists()
