"""Starts runs as forks of a process that has already imported the libraries, which saves each run about five seconds.

One request a line on stdin, as JSON: {"ranks": [{"argv": what follows `python`, "cwd", "environment"}, one for each process], "out": a
file for stdout and stderr}. Replies with the pids, then with the exit codes. Each run is a process of its own that runs the script as __main__ and
ends as Python ends. Only libraries are imported here, nothing of forge_common.
"""

import json
import os
import runpy
import signal
import sys
from collections.abc import Iterator

import accelerate.utils  # noqa: F401
import safetensors.torch  # noqa: F401
import tokenizers  # noqa: F401
import torch._dynamo  # noqa: F401 (torch.optim imports it at the first step)
import tyro  # noqa: F401


def children() -> Iterator[tuple[dict, str]]:
    """(its rank, the file for its output) in each new child; in the server it ends when stdin is closed."""
    for line in sys.stdin:
        request = json.loads(line)
        pids = []
        for rank in request["ranks"]:
            pid = os.fork()
            if pid == 0:
                yield rank, request["out"]
                return
            pids.append(pid)
        print(json.dumps(pids), flush=True)
        print(json.dumps(exit_codes(set(pids))), flush=True)


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
    output = os.open(out, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(rank["environment"])
    os.chdir(rank["cwd"])
    argv = rank["argv"]
    if argv[0] == "-m":
        sys.argv = argv[1:]
        sys.path[0] = rank["cwd"]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        sys.path[0] = os.path.dirname(argv[0])
        runpy.run_path(argv[0], run_name="__main__")


for work in children():
    become(*work)
