"""Starts runs as forks of a process that has already imported the libraries, which saves each run about five seconds.

One request a line on stdin, as JSON: {"ranks": [{"argv": what follows `python`, "cwd", "environment"}, one for each
process], "out": a file for stdout and stderr, "background"}. Replies with the pids, then with the exit codes; for a run
in the background with the pids alone, and the run becomes a child of the nearest ancestor that adopts orphans
(launch.py). Each run is a process of its own that runs the script as __main__ and ends as Python ends. Only libraries
are imported here, nothing of forge_common.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import accelerate.utils  # noqa: F401
import safetensors.torch  # noqa: F401
import tokenizers  # noqa: F401
import torch._dynamo  # noqa: F401 (torch.optim imports it at the first step)
import tyro  # noqa: F401

for name in sys.argv[1:]:  # DeepSpeed, for tests of it alone: accelerate uses it wherever it can be imported
    importlib.import_module(name)


def children() -> Iterator[tuple[dict, str]]:
    """(its rank, the file for its output) in each new child; in the server it ends when stdin is closed."""
    for line in sys.stdin:
        request = json.loads(line)
        pids = []
        for rank in request["ranks"]:
            pid = orphan() if request["background"] else os.fork()
            if pid == 0:
                yield rank, request["out"]
                return
            pids.append(pid)
        print(json.dumps(pids), flush=True)
        if not request["background"]:
            print(json.dumps(exit_codes(set(pids))), flush=True)


def orphan() -> int:
    """os.fork, but the new process is not this one's child: the process between them has ended."""
    read, write = os.pipe()
    between = os.fork()
    if between == 0:
        parent, pid = os.getpid(), os.fork()
        if pid:
            os.write(write, str(pid).encode())
            os._exit(0)
        while os.getppid() == parent:
            time.sleep(0.001)
        os.close(read)
        os.close(write)
        return 0
    os.close(write)
    pid = int(os.read(read, 16))
    os.close(read)
    os.waitpid(between, 0)
    return pid


def exit_codes(running: set[int]) -> list[int]:
    """Waits for all; when one fails, the others are ended, as torchrun does."""
    codes = []
    while running:
        pid, status = os.wait()
        running.discard(pid)
        codes.append(os.waitstatus_to_exitcode(status))
        for other in running if codes[-1] else ():
            os.kill(other, signal.SIGTERM)
    return codes


def become(rank: dict, out: str) -> None:
    """Turns this process into `python ARGV`."""
    os.setsid()
    output = os.open(out, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(rank["environment"])
    os.chdir(rank["cwd"])
    customs = [Path(folder, "sitecustomize.py") for folder in os.environ["PYTHONPATH"].split(os.pathsep)]
    for file in [path for path in customs if path.exists()][:1]:  # Python would have run it at its start
        runpy.run_path(str(file))
    argv = rank["argv"]
    if argv[0] == "-m":
        sys.argv = argv[1:]
        sys.path[0] = rank["cwd"]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        sys.path[0] = os.path.dirname(argv[0])
        runpy.run_path(argv[0], run_name="__main__")


gc.freeze()  # no child's garbage collector looks at what is imported, which takes 2 s when it ends
for work in children():
    become(*work)
