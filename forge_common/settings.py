"""Settings: read from the command line, checked, written as JSON.

Imports nothing heavy: a wrong flag is reported before torch is loaded.
"""

import dataclasses
import gc
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from .command_line import BadConfig, completion, expanded, given_settings, grouped_help, program_name, unknown_flags
from .errors import UserError
from .files.places import published

Settings = TypeVar("Settings")

# The settings of train_shared.py that only shape a new model: a trunk of --trunk-from has its own.
MODEL_SETTINGS = ("tokenizer", "preset", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
MODEL_SETTINGS += ("num_key_value_heads", "tie_word_embeddings", "cross_document_attention", "num_experts")
MODEL_SETTINGS += ("experts_per_token", "router_aux_loss_coef", "router_z_loss_coef")
# torch's switch for memory in pages of 2 MiB on a CPU: larger tensors then begin at a page. Training kind lora needs
# less memory with it. Everything else needs more, and more with each update (docs/EXPERIMENTS.md).
HUGE_PAGES = ("THP_MEM_ALLOC_ENABLE", "1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadingSettings:
    """How text is read; every command that reads text inherits it."""

    # -- reading text --
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

    # -- output --
    output_dir: Path
    """Folder for settings, metrics, checkpoints and what is published."""

    push_to_hub: str | None = None
    """Hub repository, such as org/name, to upload what is published to; needs a token (docs/guides/SHARING.md)."""

    # -- held-out data and windows --
    val_data: tuple[str, ...] = ()
    """Sources to validate on. None: a part of --data is held out."""
    val_fraction: float | None = None
    """Share of documents held out, by the hash of their text. None: 0.01 or, if more, 20 documents; at most a tenth."""
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
    """Tokens of the training text that are counted for the router's statistics, at most."""
    statistics_min_documents: int = 2
    """Tokens and pairs that fewer documents have are not counted (docs/PRIVACY.md)."""
    statistics_moments: bool = False
    """Also publish moments of a module's hidden states, over 16,384 tokens, which `assemble --router ridge` needs."""

    # -- logging --
    log_every: int = 10
    """Updates between two rows of the log."""
    tracker: Literal["auto", "none", "wandb", "trackio", "tensorboard"] = "auto"
    """Tracker beside metrics.jsonl. auto: W&B where an account is configured, else none."""
    project: str = "forge"
    """Project in the tracker."""
    run_name: str | None = None
    """Name of the run in the tracker. None: the name of --output-dir and the run's id."""
    log_artifact: bool = False
    """Store what is published in the tracker, W&B or trackio; the end of the run waits for it."""
    sample_prompt: tuple[str, ...] = ()
    """Texts that each validation continues by up to 48 tokens, the likeliest: printed, logged, shown in report.html."""

    # -- validation and checkpoints --
    val_every: int = 250
    """Updates between two validations; 0: only at the end."""
    patience: int = 0
    """Validations in a row without improvement after which the run ends; 0: no limit."""
    save_every: int = 250
    """Updates between two checkpoints; 0: only at the end and when validation improves."""
    keep: int = 2
    """Newest checkpoints that are kept, besides the best by validation."""
    on_full_disk: Literal["continue", "stop"] = "continue"
    """What to do when the disk has no room for a checkpoint. Without the last one a run always ends with an error."""
    resume: Literal["auto", "never", "require"] = "auto"
    """Continue from the newest checkpoint. auto: if there is one. require: end with an error if there is none."""
    accept_change: tuple[str, ...] = ()
    """Settings that may differ from those of the checkpoint, such as steps, or the launcher's mixed_precision."""

    # -- limits --
    max_bad_updates: int = 10
    """Updates in a row with NaN or Inf after which the run ends."""
    hang_timeout: float = 60.0
    """Seconds without progress after which the run ends, more where updates are slow or the CPU is busy; 0: no limit.
    """
    dry_run: bool = False
    """Print the plan, time a few updates, and write nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateSettings:
    """The windows of an update, the optimizer and the curve of its rate.

    Both scripts inherit it and add --lr, whose defaults differ.
    """

    # -- updates --
    steps: int = 0
    """Optimizer updates; 0: those of --epochs or --budget."""
    epochs: float | None = None
    """Passes over the text, in place of --steps. None: 4, but at most 10,000 updates."""
    budget: str | None = None
    """Time that the run may take, such as 30m or 8h, in place of --steps: a micro-batch is timed. At most 4 passes."""
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
    warmup_steps: int | None = None
    """Updates of linear warm-up. None: 100, but at most a tenth of all updates."""
    min_lr_ratio: float = 0.0
    """Learning rate at the end, as a share of --lr."""
    wsd_decay_share: float = 0.2
    """Share of the updates, at the end, in which the schedule wsd lowers the rate."""


def read_settings(
    kind: type[Settings], description: str | None, check: Callable[[Any], list[str]] = lambda settings: []
) -> Settings:
    """The command line as `kind`, a frozen dataclass. Flags override the settings of --config FILE, which override
    defaults.

    Ends the process (code 2) with every problem that `check` returns.
    """
    import tyro

    if "--print-completion" in sys.argv[1:]:
        print(completion(Path(sys.argv[0]), kind), end="")
        raise SystemExit(0)
    try:
        words, file, notes = expanded([word for word in sys.argv[1:] if word != "--print-config"], kind)
    except BadConfig as error:
        _end([str(error)])
    unknown = unknown_flags(words, kind)
    if unknown:
        _end(unknown)
    with grouped_help(words, kind):
        program = program_name(Path(sys.argv[0]))
        settings = tyro.cli(
            kind,
            prog=program if program.endswith(".py") else f"python -m {program}",
            args=words,
            description=description,
            config=(tyro.conf.AvoidSubcommands,),
        )
    try:
        faults = check(settings)
    except PermissionError as error:
        faults = [f"{error.filename}: permission denied; check who may read it, or name another path"]
    if faults:
        _end(faults)
    if "--print-config" in sys.argv[1:]:
        import yaml

        print(yaml.safe_dump(to_json(settings), sort_keys=False, allow_unicode=True), end="")
        raise SystemExit(0)
    if is_first_process() and file:
        given = sorted(given_settings([word for word in sys.argv[1:] if not word.startswith("--config")]))
        flags = f", but the flags --{', --'.join(given).replace('_', '-')}" if given else ""
        noted = "".join(f"; {note}" for note in notes)
        print(f"settings    of {file}{flags}{noted}; the rest are defaults", file=sys.stderr, flush=True)
    if is_first_process() and issubclass(kind, RunSettings):
        print(
            "loading     PyTorch and Accelerate, which takes some seconds; then the data, the plan, training",
            flush=True,
        )
    return settings


def _end(faults: list[str]) -> NoReturn:
    lines = "\n".join(f"  - {fault}" for fault in faults)
    print(f"{Path(sys.argv[0]).name}: these settings are not valid:\n{lines}", file=sys.stderr)
    raise SystemExit(2)


def run_main(main: Callable[[Settings], int], settings: Settings) -> NoReturn:
    """Ends the process with main's code; a UserError, or what may not be read, is printed without a traceback (code 1)."""
    if _trains_lora(settings) and Path("/sys/kernel/mm/transparent_hugepage").exists():
        os.environ.setdefault(*HUGE_PAGES)  # torch reads it when it is imported, which `main` does
    try:
        exit_code = main(settings)
        _leave_process_group()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr, flush=True)
        exit_code = 1
    except PermissionError as error:
        print(
            f"{Path(sys.argv[0]).name}: error: {error.filename or error}: permission denied. Check who may read and write it, or name "
            "another path.",
            file=sys.stderr,
            flush=True,
        )
        exit_code = 1
    except KeyboardInterrupt:  # Python still ends by the signal, so that a script around it ends too
        sys.excepthook = lambda *_: print(f"{Path(sys.argv[0]).name}: ended by Ctrl-C", file=sys.stderr, flush=True)
        raise
    raise SystemExit(exit_code)


def _trains_lora(settings: Any) -> bool:
    """Whether a module of kind lora is trained.

    --kind auto is lora on a trunk that train_shared.py did not make, so without forge.json, and not on a mixture of
    experts. Neither a mixture of experts nor a trunk on the hub is recognized before the trunk is read: a wrong answer
    changes only how much memory is needed.
    """
    kind = str(vars(settings).get("kind"))
    if kind == "auto":
        return not (published(Path(settings.trunk), "trunk") / "forge.json").exists()
    return "lora" in kind


def _leave_process_group() -> None:
    """Destroys the process group, after main's model is freed.

    Otherwise DDP's reducer may be the last owner of gloo's group. It destroys the group while it holds the GIL, for
    which gloo's thread may wait to free the tensors of the last collective: the process would never end.

    FSDP2's meshes, which DTensor's caches keep, and its model are owners too. Python would end while gloo's threads run,
    and abort the process where one of them frees such a tensor.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return
    distributed.destroy_process_group()
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        for owner in gc.get_objects():
            if type(owner) is distributed.device_mesh.DeviceMesh:  # isinstance would ask a dead weak proxy
                vars(owner).get("_pg_registry", {}).clear()  # torch has no function that does it
        gc.collect()  # the model, which refers to itself and to the group


def seconds_of(time: str) -> float:
    """30m -> 1800.0: a number with s, m, h or d. 0 for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", time)
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86_400}[match[2]] if match else 0.0


def is_first_process() -> bool:
    """Whether this is the process that prints, read from the launcher's environment."""
    return os.environ.get("RANK", "0") == "0"


def processes() -> int:
    """Number of processes that the launcher started, read from its environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def accumulation_steps(settings: Any) -> int:
    """Micro-batches of a process in an update: batch_size / (micro_batch_size x processes)."""
    return settings.batch_size // (settings.micro_batch_size * processes())


def to_json(settings: Any) -> dict[str, Any]:
    """A settings dataclass as JSON's types."""
    return _as_json(vars(settings))


def defaults(settings: Any) -> dict[str, Any]:
    """The defaults of a settings dataclass as JSON's types, without the settings that have none."""
    fields = dataclasses.fields(settings)
    return _as_json({field.name: field.default for field in fields if field.default is not dataclasses.MISSING})


def _as_json(values: dict[str, Any]) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return [plain(part) for part in value]
        return str(value) if isinstance(value, Path) else value

    return {name: plain(value) for name, value in values.items()}


def differences(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Which entries changed: name -> (before, now)."""
    names = sorted(before.keys() | now.keys())
    return {name: (before.get(name), now.get(name)) for name in names if before.get(name) != now.get(name)}
