"""The signals of batch systems, received by a process that only waits for them: no model, no imports."""

import os
import signal
import subprocess
import sys
import time

import launch
import pytest

# A run whose update takes another 2.5 seconds from the signal on.
RUN = """
import sys, time
from forge_common.run.stop import StopRequest
stop = StopRequest(0)
stop.phase = "training"
print("training", flush=True)
while not stop.exit_code:
    time.sleep(0.01)
time.sleep(2.5)
print("saved", flush=True)
sys.exit(stop.exit_code)
"""


def started(**how) -> subprocess.Popen:
    line = [sys.executable, "-c", RUN]
    running = subprocess.Popen(line, cwd=launch.ROOT, stdout=subprocess.PIPE, text=True, **how)
    assert running.stdout and running.stdout.readline() == "training\n"
    return running


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU], ids=lambda number: number.name)
def test_a_batch_systems_signal_waits_for_the_end_of_the_update(number):
    running = started()
    running.send_signal(number)
    assert running.communicate(timeout=60) == ("saved\n", None)
    assert running.returncode == 128 + number


def test_the_kernel_repeats_sigxcpu_every_second_and_it_is_one_request():
    running = started()
    for _ in range(2):
        running.send_signal(signal.SIGXCPU)
        time.sleep(1.2)
    assert running.communicate(timeout=60) == ("saved\n", None)


def test_a_hangup_that_nohup_ignores_stays_ignored():
    running = started(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    running.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        running.wait(0.3)
    running.terminate()
    assert running.wait(60) == 128 + signal.SIGTERM


def test_a_launcher_that_ends_by_the_same_signal_is_no_second_request():
    """Both get it, as from Ctrl-C or a batch system; the launcher ends at once, and the update is finished."""
    line = [sys.executable, "-c", f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {RUN!r}])"]
    environment = launch.environment(TORCHELASTIC_RUN_ID="1")
    group = {"start_new_session": True, "cwd": launch.ROOT, "env": environment}
    running = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, **group)
    assert running.stdout and running.stdout.readline() == "training\n"
    time.sleep(0.2)
    os.killpg(running.pid, signal.SIGUSR1)
    assert running.stdout.read() == "saved\n"
    assert running.wait(60) == -signal.SIGUSR1


@pytest.mark.parametrize(("first", "code"), [("/sbin/init", 143), ("/usr/bin/python3", 0)], ids=["init", "launcher"])
def test_a_launcher_that_ended_before_the_run_could_watch_it_ends_the_run(first, code):
    """It was killed while its process started. Process 1 has adopted that one; in a container it may be the launcher."""
    run = (
        "import os, sys, time, psutil\n"
        "from forge_common.run.stop import StopRequest\n"
        "os.getppid = lambda: 1\n"
        f"psutil.Process.cmdline = lambda process: [{first!r}]\n"
        "stop = StopRequest(0)\n"
        "time.sleep(3)\n"
    )
    how = {"cwd": launch.ROOT, "env": launch.environment(TORCHELASTIC_RUN_ID="none")}
    assert subprocess.run([sys.executable, "-c", run], **how, timeout=60, check=False).returncode == code
