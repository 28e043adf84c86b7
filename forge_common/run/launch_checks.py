"""Checks that the launcher started what its flags and configuration ask for."""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..settings import processes
from . import zero


def check_launch(accelerator: Any, accumulation: int, settings: Any) -> None:
    """UserError where the launcher contradicts the script, or started something else than it was asked for.

    Completes DeepSpeed's configuration (run/zero.py). Has FSDP2 keep in float32 what is exact: accelerate would have it
    round the sums that `forward` returns, expert_load and the reduced gradients to 16 bits.
    """
    if accelerator.state.deepspeed_plugin:
        if settings.sample_prompt:
            raise UserError(
                "--sample-prompt was never run under DeepSpeed. Leave it out, or use accelerate_configs/fsdp2.yaml."
            )
        zero.configure(accelerator, settings)
    if accelerator.is_fsdp2:  # reduce each micro-batch's gradient: accelerate would keep the whole one on each device
        accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
    if accelerator.is_fsdp2 and accelerator.mixed_precision != "no":
        plugin = accelerator.state.fsdp_plugin
        kept = {"reduce_dtype": torch.float32, "output_dtype": None, "cast_forward_inputs": False}
        plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, **kept)
    check_trunk_dtype(accelerator, vars(settings).get("trunk_dtype"))  # only train_module.py has it
    check_processes()
    launched = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto")
    if launched not in ("auto", str(accumulation)) or accelerator.gradient_accumulation_steps != accumulation:
        raise UserError(
            f"the launcher sets gradient_accumulation_steps to {launched} (ACCELERATE_GRADIENT_ACCUMULATION_STEPS), "
            f"--batch-size and --micro-batch-size make it {accumulation}. Remove it from the launcher's configuration "
            "and flags, or set it to auto: the script computes it from the two sizes."
        )
    if accelerator.num_processes != processes():
        raise UserError(
            f"the launcher started {processes()} processes, accelerate made {accelerator.num_processes} of them: they "
            "would train separate models. On CPUs start with ACCELERATE_USE_CPU=true torchrun --nproc_per_node N."
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("fp16 on a CPU would train in float32. Launch with --mixed_precision bf16 or no.")
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and not accelerator.is_fsdp2:
        raise UserError(
            "FSDP was requested, but accelerate did not create FSDP2 (on a CPU it uses DDP instead). Use an fsdp2 "
            "configuration on GPUs."
        )


def check_trunk_dtype(accelerator: Any, trunk_dtype: str | None) -> None:
    """UserError where frozen matrices in bf16 would meet activations in float32, or parameters that an engine stores as
    one type.
    """
    if trunk_dtype is None:
        return
    if accelerator.mixed_precision != "bf16":
        raise UserError(
            f"--trunk-dtype bf16 with mixed_precision {accelerator.mixed_precision}: the frozen matrices need bf16 "
            "activations. Launch with --mixed_precision bf16, or leave out --trunk-dtype."
        )
    if accelerator.is_fsdp2 or accelerator.state.deepspeed_plugin:
        raise UserError(
            "--trunk-dtype bf16 is for one process or DDP: FSDP2 and DeepSpeed store all parameters of a layer in one "
            "type. Leave it out; they divide the trunk over the devices."
        )


def check_processes() -> None:
    """UserError where `accelerate launch` was asked for more processes than it started.

    With --cpu and MULTI_CPU it starts one process, whatever number was requested, and the environment does not hold
    that number: it is read from the command line of this process's parent.
    """
    import psutil  # accelerate depends on it

    try:
        parent = psutil.Process().parent()
        command = parent.cmdline() if parent else []
    except psutil.Error:
        return  # the launcher has ended, or belongs to another user
    requested = processes_requested(command, sys.argv[1:])
    if requested > processes():
        raise UserError(
            f"the launcher was asked for {requested} processes and started {processes()}. On CPUs start with "
            f"ACCELERATE_USE_CPU=true torchrun --nproc_per_node {requested}, or with ACCELERATE_USE_CPU=true "
            f"accelerate launch --multi_gpu --num_processes {requested}, or request {processes()}."
        )


def processes_requested(command: list[str], arguments: list[str]) -> int:
    """--num_processes of an `accelerate launch` that ends with the script's arguments, by flag or file; 0: unknown."""
    names = [Path(word).name for word in command[:4]]  # [python [-m]] accelerate[-launch] [launch]
    start = [i for i, name in enumerate(names) if name in ("accelerate-launch", "accelerate.commands.launch")]
    start += [i + 1 for i, name in enumerate(names[:-1]) if (name, names[i + 1]) == ("accelerate", "launch")]
    if not start or command[len(command) - len(arguments) :] != arguments:
        return 0
    words: list[str] = []  # of the launcher, --flag=value as two
    for word in command[start[0] + 1 : len(command) - len(arguments)]:
        words += word.split("=", 1) if word.startswith("--") else [word]
    # Each word with the one after it, which is its value if the word is a flag.
    options = dict(zip([word.replace("-", "_") for word in words], [*words[1:], ""], strict=True))
    if "__num_processes" in options:
        return int(options["__num_processes"])
    if "__config_file" not in options and "__cpu" in options:
        return 0  # then the launcher does not read its default file
    cache = os.environ.get("HF_HOME", os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"))
    default = Path(cache, "accelerate", "default_config.yaml").expanduser()
    return _processes_of(Path(options.get("__config_file", default)))


def _processes_of(file: Path) -> int:
    """num_processes in a launcher's YAML or JSON file; 0 where the file cannot be read or does not hold it."""
    import yaml  # accelerate depends on it

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        return int(content.get("num_processes", 0))
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError):
        return 0
