"""Settings: read from the command line, checked, written as JSON.

Imports nothing heavy: a wrong flag is reported before torch is loaded.
"""

import dataclasses
import difflib
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from .errors import UserError
from .files.untrusted import LINE, PLAIN
from .model.config import KINDS, PRESETS
from .schedule import SCHEDULES

Settings = TypeVar("Settings")

# The settings of train_shared.py that only shape a new model: a trunk of --trunk-from has its own.
MODEL_SETTINGS = ("tokenizer", "preset", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
MODEL_SETTINGS += ("num_key_value_heads", "tie_word_embeddings", "cross_document_attention", "num_experts")
MODEL_SETTINGS += ("experts_per_token", "router_aux_loss_coef", "router_z_loss_coef")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadingSettings:
    """How text is read; every command that reads text inherits it."""

    text_column: str = "text"
    """Column or key of the text in jsonl, json, csv, parquet, arrow and hub data."""
    document_separator: str | None = None
    """Text that separates the documents of a text file. None: a file is one document."""
    on_bad_text: Literal["refuse", "replace", "skip"] = "refuse"
    """What to do with bytes that are not UTF-8."""
    on_bad_line: Literal["refuse", "skip"] = "refuse"
    """What to do with rows that cannot be read."""
    cache_dir: Path = Path("~/.cache/forge")
    """Folder for tokens and tokenizers, which later commands use again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings(ReadingSettings):
    """What only operates a training run; both scripts inherit it."""

    output_dir: Path
    """Folder for settings, metrics, checkpoints and what is published."""

    # -- held-out data and windows --
    val_data: tuple[str, ...] = ()
    """Sources to validate on. None: a part of --data is held out."""
    val_fraction: float = 0.01
    """Share of the documents of --data that is held out, by the hash of their content (without --val-data)."""
    val_tokens: int = 262_144
    """Held-out tokens that a validation scores, the same ones each time, from all over the held-out text; 0: all."""
    val_documents: bool = False
    """Validate on each document by itself, as forge_common.evaluate does. Default: on windows as training reads them."""
    eos_token: str | None = None
    """Token at the end of a document, where the tokenizer's files do not name it."""
    pack: bool = True
    """Fill windows with documents end to end. --no-pack: one document in a window, cut or padded."""
    seed: int = 42
    """Seed of the initial weights, the order of the data and dropout."""

    # -- precision and statistics --
    dtype: Literal["float32", "float64"] = "float32"
    """Type of the weights; bf16 is the launcher's --mixed_precision."""
    activation_checkpointing: bool = False
    """Compute each layer again in the backward pass instead of keeping its activations: less memory, a third more time."""
    deterministic: bool = True
    """On a GPU: only kernels that give the same bits each time, so that a resumed run does. --no-deterministic can be faster."""
    statistics_tokens: int = 1_000_000
    """Tokens of the training text, at most, that the router's statistics are counted on."""
    statistics_min_documents: int = 2
    """Documents of the sample that must hold a token or a pair for it to be counted (docs/PRIVACY.md)."""
    statistics_moments: bool = False
    """Also publish a module's moments of hidden states, which `assemble --router ridge` needs: a forward pass over 16,384 tokens."""

    # -- logging --
    log_every: int = 10
    """Updates between two rows of the log."""
    tracker: Literal["auto", "none", "wandb", "trackio", "tensorboard"] = "auto"
    """Tracker beside metrics.jsonl. auto: W&B where an account is configured, else none."""
    project: str = "forge"
    """Project in the tracker."""
    run_name: str | None = None
    """Name of the run in the tracker. None: the tracker chooses one."""

    # -- validation and checkpoints --
    val_every: int = 250
    """Updates between two validations; 0: only at the end."""
    patience: int = 0
    """Validations in a row without a better one after which the run ends; 0: no limit."""
    save_every: int = 250
    """Updates between two checkpoints; 0: only at the end and when validation improves."""
    keep: int = 2
    """Checkpoints that are kept: the newest ones, besides the best by validation."""
    on_full_disk: Literal["continue", "stop"] = "continue"
    """What to do when the disk has no room for a checkpoint. The last one must succeed."""
    resume: Literal["auto", "never", "require"] = "auto"
    """Continue from the newest checkpoint: if there is one, never, or end with an error without one."""
    accept_change: tuple[str, ...] = ()
    """Settings that may differ from those of the checkpoint, such as steps, or the launcher's mixed_precision."""

    # -- limits --
    max_bad_updates: int = 10
    """Updates in a row with NaN or Inf after which the run ends."""
    hang_timeout: float = 60.0
    """Seconds without progress after which the run ends; longer where updates are slow, or it computes; 0: no limit."""
    dry_run: bool = False
    """Print the plan, time a few updates, and write nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateSettings:
    """The windows of an update, the optimizer and the curve of its rate. Both scripts inherit it and add --steps and --lr, whose defaults differ."""

    batch_size: int = 64
    """Windows in an update, over all processes."""
    micro_batch_size: int = 16
    """Windows that a device holds at once."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Optimizer of the layers' matrices; everything else has AdamW. muon: one process or DDP, with the same --lr as adamw."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient, in an update."""
    beta2: float = 0.95
    """AdamW's decay of the mean squared gradient, in an update."""
    eps: float = 1e-8
    """Added to the root of the mean squared gradient, by which AdamW divides its rate."""
    weight_decay: float = 0.1
    """Decay of matrices; norms, biases and embeddings have none."""
    max_grad_norm: float = 1.0
    """Norm to which a larger gradient is clipped."""
    schedule: str = "cosine"
    """Learning-rate curve: a name in SCHEDULES of forge_common/schedule.py (cosine, linear, constant, wsd)."""
    warmup_steps: int = 100
    """Updates of linear warm-up."""
    min_lr_ratio: float = 0.0
    """Learning rate at the end, as a share of --lr."""
    wsd_decay_share: float = 0.2
    """Share of the updates, at the end, in which the schedule wsd lowers the rate."""


def read_settings(
    kind: type[Settings], description: str | None, check: Callable[[Any], list[str]] = lambda settings: []
) -> Settings:
    """The command line as `kind`, a frozen dataclass; ends the process (code 2) with every problem that `check` returns."""
    import tyro

    settings = tyro.cli(kind, description=description, config=(tyro.conf.AvoidSubcommands,))
    faults = check(settings)
    if faults:
        lines = "\n".join(f"  - {fault}" for fault in faults)
        print(f"{Path(sys.argv[0]).name}: these settings are not valid:\n{lines}", file=sys.stderr)
        raise SystemExit(2)
    return settings


def run_main(main: Callable[[Settings], int], settings: Settings) -> NoReturn:
    """Ends the process with main's code; a UserError is printed without a traceback (code 1)."""
    try:
        exit_code = main(settings)
        _leave_process_group()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr, flush=True)
        exit_code = 1
    raise SystemExit(exit_code)


def _leave_process_group() -> None:
    """Destroys it when main's model is gone. DDP's reducer, if it is the last owner of gloo's group, destroys it without giving up the
    GIL, for which gloo's thread may wait to free the tensors of the last collective: the process would never end.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def processes() -> int:
    """Number of processes that the launcher started, read from its environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def accumulation_steps(settings: Any) -> int:
    """Micro-batches a process takes for one update: batch / (micro x processes)."""
    return settings.batch_size // (settings.micro_batch_size * processes())


def problems(settings: Any) -> list[str]:
    """Problems with a script's settings that can be found without loading anything, each with how to fix it."""
    faults = []
    value = vars(settings).get
    for name in ("steps", "batch_size", "micro_batch_size", "sequence_length", "keep", "log_every", "max_bad_updates"):
        if value(name) < 1:
            faults.append(f"--{name.replace('_', '-')} is {value(name)}; it must be at least 1")
    for name in ("statistics_tokens", "statistics_min_documents", "rank"):
        if (value(name, 1)) < 1:
            faults.append(f"--{name.replace('_', '-')} is {value(name)}; it must be at least 1")
    for name in ("val_every", "save_every", "patience", "warmup_steps", "general_tokens", "num_experts", "width"):
        if (value(name) or 0) < 0:
            faults.append(f"--{name.replace('_', '-')} is {value(name)}; it cannot be negative (0 means never or none)")
    if value("val_tokens") < 0:
        faults.append(f"--val-tokens is {value('val_tokens')}; it cannot be negative (0 means all)")
    for name in ("lr", "max_grad_norm", "eps"):
        if not (value(name) > 0 and math.isfinite(value(name))):
            faults.append(f"--{name.replace('_', '-')} is {value(name)}; it must be a positive number")
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
    if not 0 <= value("val_fraction") < 1:
        faults.append(f"--val-fraction is {value('val_fraction')}; it must lie in [0, 1)")
    if value("warmup_steps") > value("steps"):
        faults.append(f"--warmup-steps {value('warmup_steps')} exceeds --steps {value('steps')}; lower the first")
    at_once = max(value("micro_batch_size"), 1) * processes()
    if value("batch_size") % at_once:
        faults.append(
            f"--batch-size {value('batch_size')} does not divide into {processes()} process(es) x --micro-batch-size "
            f"{value('micro_batch_size')}; make it a multiple of {at_once}"
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
    if value("schedule") not in SCHEDULES:
        faults.append(f"--schedule {value('schedule')} is not one of {', '.join(SCHEDULES)}")
    if value("kind") is not None and value("kind") not in KINDS:
        faults.append(f"--kind {value('kind')} is not one of {', '.join(KINDS)}")
    largest = 2**32 - 1 - max(value("steps"), 0) * processes() - processes()
    if not 0 <= value("seed") <= largest:  # each update of each process adds to it, and NumPy takes 32 bits
        faults.append(f"--seed is {value('seed')}; it must lie in [0, {largest}]")
    for name, (rule, holds) in {"name": PLAIN, "licence": LINE}.items():
        if value(name) is not None and not holds(value(name)):
            faults.append(f"--{name} {value(name)!r} must be {rule}")
    known = {field.name for field in dataclasses.fields(settings)} | {"mixed_precision"}
    for name in value("accept_change"):
        if name.replace("-", "_") not in known:
            near = difflib.get_close_matches(name.replace("-", "_"), known, 1)
            faults.append(f"--accept-change {name} is not a setting{f'; did you mean {near[0]}?' if near else ''}")
    return faults + _shape_problems(value) + _folder_problems(value)


def _is_deepspeed_without_bf16() -> bool:
    """What the launcher started, read from its environment."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() != "true":
        return False
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "bf16"


def _shape_problems(value: Any) -> list[str]:
    """Problems with the sizes of a model that is initialized, not loaded."""
    if value("trunk_from"):
        given = [f"--{name.replace('_', '-')}" for name in MODEL_SETTINGS if is_given(name)]
        shaped = f"--trunk-from {value('trunk_from')} has its own sizes and tokenizer; leave out {', '.join(given)}"
        return [shaped] if given else []
    if value("preset") is None:
        return []
    if value("preset") not in PRESETS:
        return [f"--preset {value('preset')} is not one of {', '.join(PRESETS)}"]
    size = {name: value(name) or preset for name, preset in PRESETS[value("preset")].items()}
    faults = [
        f"--{name.replace('_', '-')} is {number}; it must be positive" for name, number in size.items() if number < 1
    ]
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


def _folder_problems(value: Any) -> list[str]:
    """Problems with the output directory."""
    faults = []
    output = Path(value("output_dir"))
    if output.exists() and not output.is_dir():
        faults.append(f"--output-dir {output} is a file; name a folder")
    if value("resume") == "require" and not (output / "checkpoints").is_dir():
        faults.append(
            f"--resume require, but {output}/checkpoints does not exist; use --resume auto to start a new run"
        )
    return faults


def is_given(name: str) -> bool:
    """Whether a setting is on the command line, be it at its default."""
    flag = name.replace("_", "-")
    words = {word.partition("=")[0].replace("_", "-") for word in sys.argv[1:]}
    return not words.isdisjoint({f"--{flag}", f"--no-{flag}"})


def to_json(settings: Any) -> dict[str, Any]:
    """A settings dataclass as JSON's types."""
    return _as_json(vars(settings))


def defaults(settings: Any) -> dict[str, Any]:
    """The defaults of a settings dataclass as JSON's types, without the settings that have none."""
    fields = dataclasses.fields(settings)
    return _as_json({field.name: field.default for field in fields if field.default is not dataclasses.MISSING})


def _as_json(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
    }


def differences(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Which entries changed: name -> (before, now)."""
    names = sorted(before.keys() | now.keys())
    return {name: (before.get(name), now.get(name)) for name in names if before.get(name) != now.get(name)}
