"""The flags of a command's settings: their names, which of them a command line has, and what was meant by one that does
not exist. Imports nothing of this package, so that every folder may name a flag in a message.
"""

import dataclasses
import difflib
import re
from typing import Any

FLAG = re.compile(r"--(no-)?([A-Za-z][\w-]*)(=.*)?", re.DOTALL)
IN_EVERY_COMMAND = ("help", "help_verbose")
# What other trainers call a setting -> its name here, or what there is instead.
OTHER_NAMES = {
    "learning_rate": "lr", "max_lr": "lr", "max_time": "budget", "num_epochs": "epochs", "num_train_epochs": "epochs", "max_epochs": "epochs",
    "max_steps": "steps", "max_iters": "steps", "num_steps": "steps", "train_steps": "steps", "total_steps": "steps",
    "train_batch_size": "batch_size", "global_batch_size": "batch_size", "device_batch_size": "micro_batch_size",
    "per_device_train_batch_size": "micro_batch_size", "block_size": "sequence_length", "seq_len": "sequence_length",
    "max_seq_len": "sequence_length", "max_seq_length": "sequence_length", "context_length": "sequence_length",
    "eval_steps": "val_every", "eval_interval": "val_every", "logging_steps": "log_every", "save_steps": "save_every",
    "save_total_limit": "keep", "lr_scheduler_type": "schedule", "lr_scheduler": "schedule", "adam_beta1": "beta1",
    "warmup_ratio": "warmup_steps", "warmup_iters": "warmup_steps",
    "adam_beta2": "beta2", "adam_epsilon": "eps", "grad_clip": "max_grad_norm", "optim": "optimizer", "report_to": "tracker",
    "wandb_project": "project", "resume_from_checkpoint": "resume", "train_file": "data", "dataset": "data",
    "dataset_name": "data", "n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
    "gradient_checkpointing": "activation_checkpointing", "model_name_or_path": "trunk_from", "out_dir": "output_dir",
    "gradient_accumulation_steps": "it follows from --batch-size / (--micro-batch-size x processes)",
    "bf16": "give --mixed_precision bf16 to accelerate launch", "fp16": "give --mixed_precision fp16 to accelerate launch",
    "mixed_precision": "give it to accelerate launch, before the script", "num_processes": "give it to accelerate launch, before the script",
}  # fmt: skip


def flag_of(name: str) -> str:
    """The flag of a setting: batch_size -> --batch-size."""
    return f"--{name.replace('_', '-')}"


def switch_of(name: str, on: bool) -> str:
    """The flag that switches a setting on or off: --pack or --no-pack."""
    return flag_of(name if on else f"no_{name}")


def flag_name(field: dataclasses.Field[Any]) -> str | None:
    """The name of a setting's flag, which tyro.conf.arg may change; None of a tyro.conf.Positional, which has no flag."""
    marks = getattr(field.type, "__metadata__", ())
    if "Positional" in map(str, marks):
        return None
    return next((mark.name for mark in marks if getattr(mark, "name", None)), field.name)


def flag_types(kind: type[Any]) -> dict[str, Any]:
    """Name of each flag -> type of its setting."""
    fields = dataclasses.fields(kind)
    return {name: field.type for field in fields if (name := flag_name(field)) is not None}


def given_settings(words: list[str]) -> set[str]:
    """The names of the settings whose flags are among the words, also of those that are given their defaults."""
    return {match[2].replace("-", "_") for match in map(FLAG.fullmatch, words) if match}


def unknown_flags(words: list[str], kind: type[Any]) -> list[str]:
    """A line for each flag that does not exist, with the one that was probably meant."""
    types = flag_types(kind)
    faults = []
    for word in words:
        match = FLAG.fullmatch(word)
        if not match:
            continue
        name = match[2].replace("-", "_")
        if name.startswith("tyro") or name in IN_EVERY_COMMAND:
            continue
        exists = name in types or f"no_{name}" in types
        is_negated_without_being_a_switch = match[1] and types.get(name) is not bool
        if not exists or is_negated_without_being_a_switch:
            faults.append(f"{word.partition('=')[0]} is no flag{meant(name, kind)}")
    return faults


def meant(name: str, kind: type[Any]) -> str:
    """'; did you mean --FLAG?' for a name that is no setting, or what there is instead; '' where nothing is near."""
    names = list(flag_types(kind))
    other = OTHER_NAMES.get(name, "")
    if " " in other:
        return f": {other}"
    if other == "trunk_from" and "trunk" in names:
        other = "trunk"
    near = [other] if other in names else difflib.get_close_matches(name, names, 1)
    return f"; did you mean {flag_of(near[0])}?" if near else ""
