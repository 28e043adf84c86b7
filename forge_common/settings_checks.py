"""Checks of the settings of both scripts that need nothing but the settings and the names of files: nothing heavy is imported."""

import dataclasses
import difflib
import math
import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from .config_file import expanded
from .files.hub import upload_problem
from .files.places import missing_artifact, missing_file, missing_source, published, split_weight, unused_weight
from .files.untrusted import LINE, PLAIN
from .flags import flag_of, given_settings
from .model.config import AUTO, KINDS, PRESETS
from .model.module_settings import ModuleSettings, module_problems
from .schedule import SCHEDULES
from .settings import MODEL_SETTINGS, is_first_process, processes, seconds_of


def problems(settings: Any) -> list[str]:
    """Problems with a script's settings that can be found without loading anything, each with how to fix it."""
    faults = []
    value = vars(settings).get  # None for a setting that only the other script has
    if not value("data"):
        faults.append("--data names no source")
    for name in ("batch_size", "micro_batch_size", "sequence_length", "keep", "log_every", "max_bad_updates"):
        if value(name) < 1:
            faults.append(f"{flag_of(name)} is {value(name)}; it must be at least 1")
    for name in ("statistics_tokens", "statistics_min_documents"):
        if value(name) is not None and value(name) < 1:
            faults.append(f"{flag_of(name)} is {value(name)}; it must be at least 1")
    if value("steps") < 0:
        faults.append(f"--steps is {value('steps')}; it must be at least 1 (0 means those of --epochs)")
    for name in ("val_every", "save_every", "patience", "warmup_steps", "general_tokens", "num_experts"):
        if (value(name) or 0) < 0:
            faults.append(f"{flag_of(name)} is {value(name)}; it cannot be negative (0 means never or none)")
    if value("val_tokens") < 0:
        faults.append(f"--val-tokens is {value('val_tokens')}; it cannot be negative (0 means all)")
    for name in ("lr", "max_grad_norm", "eps", "epochs"):
        if value(name) is not None and not (value(name) > 0 and math.isfinite(value(name))):
            faults.append(f"{flag_of(name)} is {value(name)}; it must be a positive number")
    if not value("hang_timeout") >= 0:
        faults.append(f"--hang-timeout is {value('hang_timeout')}; it must be 0 (never) or more seconds")
    if not 0 <= value("weight_decay") < 1:
        faults.append(f"--weight-decay is {value('weight_decay')}; it must lie in [0, 1)")
    if not 0 <= value("min_lr_ratio") <= 1:
        faults.append(f"--min-lr-ratio is {value('min_lr_ratio')}; it must lie in [0, 1]")
    for name in ("beta1", "beta2"):
        if not 0 <= value(name) < 1:
            faults.append(f"--{name} is {value(name)}; it must lie in [0, 1)")
    if not 0 < value("wsd_decay_share") <= 1:
        faults.append(f"--wsd-decay-share is {value('wsd_decay_share')}; it must lie in (0, 1]")
    if value("val_fraction") is not None and not 0 <= value("val_fraction") < 1:
        faults.append(f"--val-fraction is {value('val_fraction')}; it must lie in [0, 1)")
    if value("sample_prompt") and value("val_fraction") == 0 and not value("val_data"):
        faults.append(
            "--sample-prompt is used at each validation, and --val-fraction 0 without --val-data has none; raise it, or leave "
            "out --sample-prompt"
        )
    if 0 < value("steps") < (value("warmup_steps") or 0):
        faults.append(f"--warmup-steps {value('warmup_steps')} exceeds --steps {value('steps')}; lower the first")
    lengths = [name for name in ("steps", "epochs", "budget") if value(name)]
    if len(lengths) > 1:
        faults.append(f"--{' and --'.join(lengths)} say how long to train; leave only one")
    if value("budget") is not None and not seconds_of(value("budget")):
        faults.append(f"--budget {value('budget')} is no time; write 90s, 30m, 8h or 2d")
    at_once = max(value("micro_batch_size"), 1) * processes()
    if value("batch_size") % at_once:
        faults.append(
            f"--batch-size {value('batch_size')} does not divide into {processes()} process(es) x --micro-batch-size "
            f"{value('micro_batch_size')}; make it a multiple of {at_once}, or lower --micro-batch-size"
        )
    if value("module_dtype") and value("dtype") != "float32":
        faults.append(
            f"--module-dtype {value('module_dtype')} rounds float32 weights; leave out --dtype {value('dtype')}"
        )
    if value("module_dtype") and _is_deepspeed_without_bf16():
        faults.append(
            f"--module-dtype {value('module_dtype')} under DeepSpeed needs --mixed_precision bf16: in another precision the "
            "published losses would be those of weights before they are rounded"
        )
    if value("log_artifact") and value("tracker") not in ("wandb", "trackio"):
        faults.append(
            f"--log-artifact with --tracker {value('tracker')}; it needs --tracker wandb or --tracker trackio"
        )
    if value("schedule") not in SCHEDULES:
        faults.append(f"--schedule {value('schedule')} is not one of {', '.join(SCHEDULES)}")
    faults += module_problems(value, (AUTO, *KINDS)) + _unused_sizes(settings)
    largest = 2**32 - 1 - max(value("steps") or 10**7, 0) * processes() - processes()
    if not 0 <= value("seed") <= largest:  # each update of each process adds to it, and NumPy takes 32 bits
        faults.append(f"--seed is {value('seed')}; it must lie in [0, {largest}]")
    for name, (description, is_valid) in {"name": PLAIN, "licence": LINE}.items():
        if value(name) is not None and not is_valid(value(name)):
            faults.append(f"--{name} {value(name)!r} must be {description}")
    known = {field.name for field in dataclasses.fields(settings)} | {"mixed_precision"}
    for word in value("accept_change"):
        name = word.replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            faults.append(f"--accept-change {word} is not a setting{hint}")
    faults += _shape_problems(settings) + _folder_problems(value, type(settings)) + _missing(value)
    if value("push_to_hub") and not faults and is_first_process():
        problem = upload_problem(value("push_to_hub"))
        if problem:
            faults.append(f"--push-to-hub {problem}; or leave it out, and use forge_common.push afterwards")
    return faults


def _unused_sizes(settings: Any) -> list[str]:
    """Flags of another kind of module than --kind, which would change nothing."""
    if not isinstance(settings, ModuleSettings):
        return []
    kind = vars(settings)["kind"]
    given = given_settings(sys.argv[1:])
    faults = []
    for field in dataclasses.fields(ModuleSettings):
        name, user = field.name, "narrow" if field.name == "width" else "lora"
        differs = name != "layers" and name in given and getattr(settings, name) != field.default
        if differs and kind.removesuffix("+head") != user:
            faults.append(
                f"--{name} belongs to kind {user}, and --kind is {kind}; leave out --{name}, or choose that kind"
            )
    return faults


def _is_deepspeed_without_bf16() -> bool:
    """What the launcher started, read from its environment."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() != "true":
        return False
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "bf16"


def _shape_problems(settings: Any) -> list[str]:
    """Problems with the sizes of a model that is initialized, not loaded."""
    value = vars(settings).get
    if value("trunk_from"):
        on_command_line = given_settings(expanded(sys.argv[1:], type(settings)).words)
        given = [flag_of(name) for name in MODEL_SETTINGS if name in on_command_line]
        if not given:
            return []
        return [f"--trunk-from {value('trunk_from')} has its own sizes and tokenizer; leave out {', '.join(given)}"]
    if value("preset") is None:
        return []
    named = "small" if value("preset") == AUTO else value("preset")
    if named not in PRESETS:
        return [f"--preset {named} is not one of {AUTO}, {', '.join(PRESETS)}"]
    size = {name: value(name) or preset for name, preset in PRESETS[named].items()}
    faults = [f"{flag_of(name)} is {number}; it must be positive" for name, number in size.items() if number < 1]
    if faults:
        return faults
    if size["hidden_size"] % size["num_attention_heads"] or size["hidden_size"] // size["num_attention_heads"] % 2:
        faults.append(
            f"--hidden-size {size['hidden_size']} must be an even multiple of --num-attention-heads "
            f"{size['num_attention_heads']} (each head has an even width, for rotary positions)"
        )
    if size["num_attention_heads"] % size["num_key_value_heads"]:
        faults.append(
            f"--num-attention-heads {size['num_attention_heads']} must be a multiple of --num-key-value-heads "
            f"{size['num_key_value_heads']}"
        )
    if value("num_experts") == 1 or 0 < value("num_experts") < value("experts_per_token"):
        faults.append(
            f"--num-experts {value('num_experts')} must be 0 (dense), or at least 2 and no fewer than --experts-per-token "
            f"{value('experts_per_token')}"
        )
    if value("experts_per_token") < 1:
        faults.append(f"--experts-per-token is {value('experts_per_token')}; it must be at least 1")
    return faults


def _folder_problems(value: Any, kind: type[Any]) -> list[str]:
    """Problems with the folders that a run writes to."""
    faults = []
    output = Path(value("output_dir"))
    for name in ("output_dir", "cache_dir"):
        if Path(value(name)) == Path() and _is_given_empty(name, kind):
            faults.append(f"{flag_of(name)} is empty; name a folder")
    for name in ("data", "val_data", "general_data"):
        for source in value(name) or ():
            folder = Path(split_weight(source)[0]).expanduser()
            for written in ("output_dir", "cache_dir"):
                if folder.is_dir() and _would_read(folder, Path(value(written)).expanduser()):
                    faults.append(
                        f"{flag_of(written)} {value(written)} lies in {flag_of(name)} {source}: the same command would read "
                        "what it wrote as text. Name a folder outside of it, or one whose name begins with a dot"
                    )
    for place in filter(None, (value("trunk"), value("trunk_from"))):
        trunk = published(Path(place), "trunk")
        if trunk.is_dir() and output.resolve().is_relative_to(trunk.resolve()):
            faults.append(f"--output-dir {output} lies in the trunk that is read; name a folder outside of it")
    if output.exists() and not output.is_dir():
        faults.append(f"--output-dir {output} is a file; name a folder")
    if value("resume") == "require" and not (output / "checkpoints").is_dir():
        faults.append(
            f"--resume require, but {output}/checkpoints does not exist; use --resume auto to start a new run"
        )
    return faults


def _is_given_empty(name: str, kind: type[Any]) -> bool:
    """Whether a path was given as an empty text, which as a Path is the current folder."""
    words = expanded(sys.argv[1:], kind).words
    values = [
        word.partition("=")[2] if "=" in word else next_word
        for word, next_word in pairwise([*words, ""])
        if given_settings([word]) == {name}
    ]
    return values[-1:] == [""]


def _would_read(folder: Path, output: Path) -> bool:
    """Whether `output` is that folder or below it; hidden folders are not read."""
    folder, output = folder.resolve(), output.resolve()
    return output.is_relative_to(folder) and not any(part.startswith(".") for part in output.relative_to(folder).parts)


def _missing(value: Any) -> list[str]:
    """Files and folders that are named and do not exist, each with the nearest name that does; weights without effect."""
    problems_found = []
    for name in ("data", "val_data", "general_data"):
        if name == "general_data" and not value("general_tokens"):
            continue  # it is not read
        problems_found += [(name, missing_source(source)) for source in value(name) or ()]
        if name != "data":
            problems_found += [(name, unused_weight(source)) for source in value(name) or ()]
    for name in ("trunk", "trunk_from"):
        if value(name):
            problems_found.append((name, missing_artifact(value(name))))
    tokenizer = value("tokenizer") or "bytes"
    if not value("trunk_from") and tokenizer != "bytes" and not tokenizer.startswith("train:"):
        problems_found.append(("tokenizer", missing_file(tokenizer)))
    return [f"{flag_of(name)} {problem}" for name, problem in problems_found if problem]
