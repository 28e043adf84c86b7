"""Forward, backward, routers and generation on a device that is not the CPU (tests/model/other_device.py)."""

import subprocess
import sys

import launch
import pytest


@pytest.mark.engines
def test_everything_runs_on_another_device():
    """In a process of its own: the device stays registered with torch."""
    line = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/model/other_device.py"]
    where = {"env": launch.environment(), "cwd": launch.ROOT, "timeout": launch.PATIENCE}
    done = subprocess.run(line, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, **where)
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
