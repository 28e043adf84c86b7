"""Runs the scripts as users run them: real processes, real text, one or two ranks."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ("accelerate", "launch", "--config_file", str(ROOT / "accelerate_configs" / "cpu.yaml"))
SHAPE = ("--hidden-size", "32", "--intermediate-size", "64", "--num-hidden-layers", "2", "--num-attention-heads", "4")
SHAPE += ("--num-key-value-heads", "2", "--preset", "tiny", "--tokenizer", "bytes")
SIZES = ("--sequence-length", "64", "--batch-size", "64", "--micro-batch-size", "16", "--lr", "0.003")
SIZES += ("--warmup-steps", "2", "--val-fraction", "0.1", "--tracker", "none", "--log-every", "1")


def environment(**extra: str) -> dict[str, str]:
    """This process's environment with the interpreter's own programs first and two threads at most."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "WANDB_", "FORGE_"))}
    return plain | {"PATH": path, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | extra


def command(script: Path | str, *arguments: object, processes: int = 1, launcher: tuple[str, ...] = ()) -> list[str]:
    """One process: python, or `launcher`; more: torchrun, which on CPUs is what gives several (see ACCELERATE_USE_CPU)."""
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
    timeout: float = 240,
    **extra: str,
) -> str:
    """Runs a script to its end and returns what it printed (both streams). `fails`: it must end non-zero, else zero."""
    extra = {"ACCELERATE_USE_CPU": "true"} | extra
    done = subprocess.run(
        command(script, *arguments, processes=processes, launcher=launcher),
        env=environment(**extra),
        cwd=ROOT,
        text=True,
        timeout=timeout,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert (done.returncode != 0) == fails, f"exit code {done.returncode}:\n{done.stdout}"
    return done.stdout


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
    """The updates that console lines tell of."""
    return [int(step) for step in re.findall(r"^step (\d+)/\d+  loss", text, re.M)]
