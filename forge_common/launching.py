"""What a launcher was asked for, against what it started: a run that is not the one that was meant is refused."""

import os
import sys
from pathlib import Path
from typing import Any

from .config import processes
from .errors import UserError


def check_launch(accelerator: Any, accumulation: int) -> None:
    """Refuses a launcher that contradicts the script, or that silently gave something else than was asked for."""
    check_processes()
    launched = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto")
    if launched not in ("auto", str(accumulation)) or accelerator.gradient_accumulation_steps != accumulation:
        raise UserError(
            f"the launcher sets gradient_accumulation_steps to {launched} (ACCELERATE_GRADIENT_ACCUMULATION_STEPS), "
            f"--batch-size and --micro-batch-size make it {accumulation}. Take it out of the launcher's configuration and "
            "flags (or say auto): it follows from the sizes."
        )
    if accelerator.num_processes != processes():
        raise UserError(
            f"the launcher started {processes()} processes, accelerate made {accelerator.num_processes} of them: they would "
            "train apart. On CPUs start with ACCELERATE_USE_CPU=true torchrun --nproc_per_node N."
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("fp16 on a CPU silently trains in float32. Launch with --mixed_precision bf16 or no.")
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and not accelerator.is_fsdp2:
        raise UserError("FSDP was asked for, but accelerate did not make FSDP2 (on a CPU it silently becomes DDP).")


def check_processes() -> None:
    """Refuses a run for which `accelerate launch` was asked for more processes than it started.

    Where it does not know how to start several (--cpu, MULTI_CPU) it starts one and leaves nothing in the environment
    that tells how many were wanted: only its own command line does, that of this process's parent.
    """
    import psutil  # accelerate depends on it

    try:
        parent = psutil.Process().parent()
        command = parent.cmdline() if parent else []
    except psutil.Error:
        return  # the launcher has ended, or is not ours to look at
    wanted = _processes_asked_for(command, sys.argv[1:])
    if wanted > processes():
        raise UserError(
            f"the launcher was asked for {wanted} processes and started {processes()}. On CPUs start with "
            f"ACCELERATE_USE_CPU=true torchrun --nproc_per_node {wanted}, or with ACCELERATE_USE_CPU=true accelerate "
            f"launch --multi_gpu --num_processes {wanted}; or ask for {processes()}."
        )


def _processes_asked_for(command: list[str], arguments: list[str]) -> int:
    """--num_processes of an `accelerate launch` that ended in the script's arguments, or its file's; 0: unknown."""
    names = [Path(word).name for word in command[:4]]  # [python [-m]] accelerate[-launch] [launch]
    start = [i for i, name in enumerate(names) if name in ("accelerate-launch", "accelerate.commands.launch")]
    start += [i + 1 for i, name in enumerate(names[:-1]) if (name, names[i + 1]) == ("accelerate", "launch")]
    if not start or command[len(command) - len(arguments) :] != arguments:
        return 0
    flags = command[start[0] + 1 : len(command) - len(arguments)]
    flags = [word for flag in flags for word in (flag.split("=", 1) if flag.startswith("--") else [flag])]
    said = dict(zip([flag.replace("-", "_") for flag in flags], [*flags[1:], ""], strict=True))
    if "__num_processes" in said:
        return int(said["__num_processes"])
    if "__config_file" not in said and "__cpu" in said:
        return 0  # then the launcher does not read its default file
    cache = os.environ.get("HF_HOME", os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"))
    default = Path(cache, "accelerate", "default_config.yaml").expanduser()
    return _processes_of(Path(said.get("__config_file", default)))


def _processes_of(file: Path) -> int:
    """num_processes in a launcher's YAML or JSON file; 0 where it cannot be read (any more) or does not say."""
    import yaml  # accelerate depends on it

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        return int(content.get("num_processes", 0))
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError):
        return 0
