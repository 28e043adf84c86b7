"""Runs the scripts as users run them: processes of their own, real text, one or two ranks."""

import atexit
import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import IO

import psutil
import torch
from safetensors.torch import load_file

from forge_common.run.checkpoint_folder import fault, manifest

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ("accelerate", "launch", "--config_file", str(ROOT / "accelerate_configs" / "cpu.yaml"))
SHAPE = ("--hidden-size", "32", "--intermediate-size", "64", "--num-hidden-layers", "2", "--num-attention-heads", "4")
SHAPE += ("--num-key-value-heads", "2", "--preset", "tiny", "--tokenizer", "bytes")
SIZES = ("--sequence-length", "64", "--batch-size", "64", "--micro-batch-size", "16", "--lr", "0.003")
SIZES += ("--warmup-steps", "2", "--val-fraction", "0.1", "--tracker", "none", "--log-every", "1")

# A run of twelve updates that is kept whole: so few windows that it passes the end of an epoch.
STEPS = 12
MORE = ("--steps", STEPS, "--save-every", 1, "--keep", 100, "--val-every", 5)
ON_CPU = ROOT / "tests" / "engines_on_cpu"  # its sitecustomize.py says what these variables do
ENGINES_ON_CPU = {"ENGINES_ON_CPU": "1", "ACCELERATE_TORCH_DEVICE": "cpu", "ACCELERATE_USE_CPU": "false"}
ENGINES_ON_CPU |= {"PYTHONPATH": f"{ON_CPU}{os.pathsep}{ROOT}"}
PATIENCE = 600  # seconds after which a run or a wait counts as hanging, on a busy machine too
TIMES = ("train/tokens_per_second", "train/mfu", "memory/peak_mb", "memory/process_peak_mb")


def fsdp2() -> dict[str, str]:
    """The environment in which accelerate runs accelerate_configs/fsdp2.yaml, on CPUs."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    flags = ["--config_file", str(ROOT / "accelerate_configs" / "fsdp2.yaml"), "train_shared.py"]
    environment = prepare_multi_gpu_env(_validate_launch_command(launch_command_parser().parse_args(flags))[0])
    return {k: v for k, v in environment.items() if k.startswith(("FSDP_", "ACCELERATE_USE_FSDP"))} | ENGINES_ON_CPU


def deepspeed(stage: int) -> dict[str, str]:
    """The environment in which accelerate runs that file, on CPUs."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    flags = ["--config_file", str(ROOT / f"accelerate_configs/deepspeed_zero{stage}.yaml"), "train_shared.py"]
    arguments, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(flags))
    arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)  # as accelerate launch
    environment = prepare_deepspeed_cmd_env(arguments)[1]
    chosen = {
        k: v for k, v in environment.items() if k.startswith(("ACCELERATE_DEEPSPEED", "ACCELERATE_USE_DEEPSPEED"))
    }
    chosen |= {k: environment[k] for k in ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_GRADIENT_CLIPPING")}
    path = os.pathsep.join((ENGINES_ON_CPU["PYTHONPATH"], str(ROOT / ".engines")))
    return chosen | ENGINES_ON_CPU | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": path}


def environment(**extra: str) -> dict[str, str]:
    """This process's environment with the interpreter's own programs first and one thread."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "WANDB_", "FORGE_"))}
    plain.pop("PYTHONDONTWRITEBYTECODE", None)  # each run would compile the package again
    return plain | {"PATH": path, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | extra


def command(script: Path | str, *arguments: object, processes: int = 1, launcher: tuple[str, ...] = ()) -> list[str]:
    """One process: python, or `launcher`; several: torchrun, which starts them on CPUs (with ACCELERATE_USE_CPU)."""
    start = [sys.executable]
    if processes > 1:
        start = ["torchrun", "--nproc_per_node", str(processes), "--master_port", str(free_port())]
    return [*(launcher or start), str(ROOT / script), *map(str, arguments)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(
    script: Path | str,
    *arguments: object,
    processes: int = 1,
    launcher: tuple[str, ...] = (),
    fails: bool = False,
    **extra: str,
) -> str:
    """Runs a script to its end and returns what it printed (both streams). `fails`: it must end non-zero, else zero."""
    extra = {"ACCELERATE_USE_CPU": "true"} | extra
    if not launcher:
        return run_python(ROOT / script, *arguments, processes=processes, fails=fails, **extra)
    done = subprocess.run(
        command(script, *arguments, processes=processes, launcher=launcher),
        env=environment(**extra),
        cwd=ROOT,
        text=True,
        timeout=PATIENCE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert (done.returncode != 0) == fails, f"exit code {done.returncode}:\n{done.stdout}"
    return done.stdout


@cache
def fork_server(*more: str) -> subprocess.Popen:
    """This process's server of tests/fork_server.py, which imports `more` libraries.

    It ends with this process, which adopts the server's orphans.
    """
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    line = [sys.executable, str(ROOT / "tests" / "fork_server.py"), *more]
    path = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / '.engines'}", "DS_ACCELERATOR": "cpu"} if more else {}
    server = subprocess.Popen(line, env=environment(**path), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.communicate)  # closes its stdin
    return server


def request(ranks: list[dict], out: str, extra: dict[str, str], *, machines: int = 1, background: bool = False) -> IO:
    """Asks the fork server for the processes of a run, each with "argv" and "cwd"; returns the pipe of its replies."""
    local_size = len(ranks) // machines
    if len(ranks) > 1:
        extra = extra | {"WORLD_SIZE": str(len(ranks)), "LOCAL_WORLD_SIZE": str(local_size)}
        extra |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for number, rank in enumerate(ranks):
        own = {"RANK": str(number), "LOCAL_RANK": str(number % local_size)} if len(ranks) > 1 else {}
        ranks[number] = rank | {"environment": environment(**extra, **own)}
    server = fork_server("deepspeed") if "ACCELERATE_USE_DEEPSPEED" in extra else fork_server()
    assert server.stdin and server.stdout
    print(json.dumps({"ranks": ranks, "out": out, "background": background}), file=server.stdin, flush=True)
    return server.stdout


class Background:
    """A run in the background, a fork: like subprocess.Popen, but it can be of several ranks. `pid`: of rank 0."""

    def __init__(self, *arguments: object, out: Path, processes: int = 1, cwd: Path = ROOT, **extra: str):
        rank = {"argv": [str(argument) for argument in arguments], "cwd": str(cwd)}
        replies = request([rank] * processes, str(out), extra, background=True)
        self.pids: list[int] = json.loads(replies.readline())
        self.pid = self.pids[0]
        self.codes: dict[int, int] = {}

    def poll(self) -> int | None:
        """None while a rank runs; then 0, or the exit code of the rank that failed first."""
        for pid in set(self.pids) - self.codes.keys():
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.codes[pid] = os.waitstatus_to_exitcode(status)
        if len(self.codes) < len(self.pids):
            return None
        return next((code for code in self.codes.values() if code), 0)

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a run in the background", timeout)
            time.sleep(0.005)
        return code

    def send_signal(self, number: int) -> None:
        """To every rank that runs."""
        self.poll()
        for pid in set(self.pids) - self.codes.keys():
            os.kill(pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def run_python(*arguments: object, processes: int = 1, fails: bool = False, cwd: Path = ROOT, **extra: str) -> str:
    """Runs `python ARGUMENTS` in the repository, or a copy of it, and returns what it printed (both streams), from a
    fork (tests/fork_server.py).

    processes: ranks, with the variables that torchrun sets. fails: it must end non-zero, else zero.
    """
    argv = [str(argument) for argument in arguments]
    return _run_ranks([{"argv": argv, "cwd": str(cwd)}] * processes, fails, machines=1, **extra)


def run_machines(*machines: tuple[Path, Sequence[object]], fails: bool = False, **extra: str) -> str:
    """Runs a rank of one run on each of several machines, played by (working directory, what follows `python`); returns
    their output.
    """
    ranks = [{"argv": [str(argument) for argument in arguments], "cwd": str(cwd)} for cwd, arguments in machines]
    return _run_ranks(ranks, fails, machines=len(machines), ACCELERATE_USE_CPU="true", **extra)


def _run_ranks(ranks: list[dict], fails: bool, machines: int, **extra: str) -> str:
    with tempfile.NamedTemporaryFile("r", encoding="utf-8", errors="replace") as out:
        replies = request(ranks, out.name, extra, machines=machines)
        pids = json.loads(replies.readline())
        killer = threading.Timer(PATIENCE, lambda: [os.kill(pid, signal.SIGKILL) for pid in pids])
        killer.start()
        codes = json.loads(replies.readline())
        killer.cancel()
        printed = out.read()
    assert any(codes) == fails, f"exit codes {codes}:\n{printed}"
    return printed


def wait_for(path: Path, running: subprocess.Popen | Background) -> None:
    """Waits until `path`, whose last part may be a glob, exists; fails when the process ends before."""
    deadline = time.monotonic() + PATIENCE
    while not any(path.parent.glob(path.name)):
        assert running.poll() is None and time.monotonic() < deadline, f"{path} was not written"
        time.sleep(0.005)


def kill_tree(launcher: subprocess.Popen) -> None:
    """kill -9 for a launcher and all processes below it, and waits for their end."""
    tree = [*psutil.Process(launcher.pid).children(recursive=True), psutil.Process(launcher.pid)]
    for process in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    launcher.wait()
    psutil.wait_procs(tree[:-1], PATIENCE)


def slow_disk(seconds: float) -> dict[str, str]:
    """The environment of a run on a slow disk: `seconds` before and after each sync, rename and delete."""
    return {"PYTHONPATH": f"{ROOT / 'tests' / 'slow_disk'}{os.pathsep}{ROOT}", "SLOW_DISK_SECONDS": str(seconds)}


def rows(folder: Path, key: str = "train/loss") -> list[dict]:
    """The rows of metrics.jsonl that have `key`."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if key in row]


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """The trained tensors of a checkpoint."""
    return load_file(folder / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def optimizer_state(folder: Path, step: int) -> dict:
    return torch.load(folder / "checkpoints" / f"step-{step:08d}" / "optimizer.bin", weights_only=True)


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of any element."""
    assert one.keys() == other.keys() and one
    return max((one[name] - other[name]).abs().max().item() for name in one)


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def steps_of(text: str) -> list[int]:
    """The updates that the console reports."""
    return [int(step) for step in re.findall(r"^step (\d+)/\d+  loss", text, re.M)]


def without_times(folder: Path) -> list[dict]:
    """All rows of metrics.jsonl, without the values that depend on the machine."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def same_run(one: Path, other: Path) -> None:
    """The same weights and optimizer state, bit for bit, the same artifact, and the same rows, each once."""
    assert same_bits(weights(one, STEPS), weights(other, STEPS))
    first, second = optimizer_state(one, STEPS)["state"], optimizer_state(other, STEPS)["state"]
    for index, state in first.items():
        assert same_bits(state, second[index])
    digests = [json.loads((folder / "trunk" / "forge.json").read_text())["digest"] for folder in (one, other)]
    assert digests[0] == digests[1]
    assert without_times(one) == without_times(other)


def copy_until(source: Path, target: Path, step: int) -> None:
    """Copies a run as a kill just after its checkpoint `step` leaves it."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("trunk"))
    for path in (target / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)


def reseal(path: Path) -> None:
    """Writes a manifest that matches the changed files of a checkpoint, as an attacker would."""
    (path / "manifest.json").write_text(json.dumps(manifest(path)))
    assert fault(path) is None
