"""What a run is told and how large a model is: settings <-> flags <-> JSON, and what is wrong with them.

Imports nothing heavy: a wrong flag is answered before torch is loaded.
"""

import dataclasses
import difflib
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from .errors import UserError

Settings = TypeVar("Settings")

PRESETS: dict[str, dict[str, int]] = {
    # about 1 M, 25 M, 110 M and 350 M parameters with the vocabularies they are meant for (4k, 16k, 32k, 32k)
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "small": {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    },
    "base": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
    },
    "large": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder's sizes, under the names that Hugging Face's config.json has for them."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None  # None or Llama 3's {"rope_type": "llama3", "factor": ...}
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3: RMSNorm on each head's queries and keys
    num_local_experts: int = 0  # 0: a dense feed-forward; else Mixtral's sparse one
    num_experts_per_tok: int = 2
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.001
    pad_token_id: int | None = 0
    eos_token_id: int | None = 1
    bos_token_id: int | None = None
    cross_document_attention: bool = True  # ours: may a token see the documents before its own in the same window

    def __post_init__(self):
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)

    @property
    def ignore_index(self) -> int:
        """The label that is never scored, and what fills a window up: PAD, or -100 where the tokenizer has no PAD."""
        return -100 if self.pad_token_id is None else self.pad_token_id

    @property
    def model_type(self) -> str:
        if self.num_local_experts:
            return "mixtral"
        return "qwen3" if self.qk_norm else "qwen2" if self.qkv_bias else "llama"

    def to_hf(self) -> dict[str, Any]:
        """config.json for AutoModelForCausalLM; a mixture that no Transformers model is (no flag reaches one) is refused."""
        if self.qkv_bias and (self.qk_norm or self.num_local_experts):
            raise UserError("no Transformers model has both biases and experts, or biases and norms, in its attention")
        ours = {"qkv_bias", "qk_norm", "num_local_experts", "num_experts_per_tok", "rope_scaling"}
        ours |= {"router_aux_loss_coef", "router_z_loss_coef"}
        written = {k: v for k, v in dataclasses.asdict(self).items() if k not in ours}
        rope = {"rope_type": "default"} | (self.rope_scaling or {}) | {"rope_theta": self.rope_theta}
        written |= {
            "model_type": self.model_type,
            "architectures": [
                {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mixtral": "Mixtral"}[self.model_type]
                + "ForCausalLM"
            ],
            "hidden_act": "silu",
            "rope_scaling": self.rope_scaling,
            "rope_parameters": rope,
            "sliding_window": None,
            "attention_bias": False,
            "torch_dtype": "float32",
        }
        if self.num_local_experts:
            written |= {key: getattr(self, key) for key in ("num_local_experts", "num_experts_per_tok")}
            written |= {key: getattr(self, key) for key in ("router_aux_loss_coef", "router_z_loss_coef")}
        return written

    @classmethod
    def from_hf(cls, config: dict[str, Any], where: str) -> "ModelConfig":
        """Reads a Llama, Mistral, Mixtral, Qwen2 or Qwen3 config.json; what we would compute differently is refused."""
        kind = config.get("model_type")
        if kind not in ("llama", "mistral", "mixtral", "qwen2", "qwen3"):
            raise UserError(
                f"{where}: model_type {kind!r} cannot be a trunk here. Use a Llama, Mistral, Mixtral, Qwen2 or Qwen3."
            )
        rope = dict(config.get("rope_parameters") or {}) or dict(config.get("rope_scaling") or {})
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
        unknown = {
            "rope type": rope_type if rope_type not in ("default", "llama3") else None,
            "hidden_act": config["hidden_act"] if config.get("hidden_act", "silu") != "silu" else None,
            "attention_bias": config.get("attention_bias") or None,
            "mlp_bias": config.get("mlp_bias") or None,
            "partial_rotary_factor": partial if partial != 1 else None,
        }
        for name, value in unknown.items():
            if value is not None:
                raise UserError(f"{where}: {name} {value!r} is not implemented. Choose a checkpoint without it.")
        needed = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING] + ["rms_norm_eps"]
        missing = [name for name in needed if config.get(name) is None and name != "num_key_value_heads"]
        if missing:  # each kind has another default for it: nothing is guessed
            raise UserError(f"{where} does not say {', '.join(missing)}. Fetch the checkpoint again.")
        known = {field.name for field in dataclasses.fields(cls)}
        kept = {key: value for key, value in config.items() if key in known and value is not None}
        window = config.get("sliding_window", 4096 if kind == "mistral" else None)
        window = window if config.get("use_sliding_window", not kind.startswith("qwen")) else None
        if window:  # within one sliding window, full attention is the same thing
            kept["max_position_embeddings"] = min(window, kept["max_position_embeddings"])
        eos = config.get("eos_token_id")
        kept["eos_token_id"] = eos[0] if isinstance(eos, list) else eos
        kept["pad_token_id"] = config.get("pad_token_id")
        kept["tie_word_embeddings"] = config.get("tie_word_embeddings", False)
        kept["rope_theta"] = float(rope.get("rope_theta", config.get("rope_theta", 1e6 if kind == "mixtral" else 1e4)))
        kept["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"} if rope_type == "llama3" else None
        kept.setdefault("num_key_value_heads", config["num_attention_heads"])
        return cls(**kept | {"qkv_bias": kind == "qwen2", "qk_norm": kind == "qwen3"})


def model_config(settings: Any, tokenizer: Any) -> ModelConfig:
    """The preset's sizes with the settings' over them, and the vocabulary and special ids of the tokenizer."""
    sizes = {name: getattr(settings, name) or preset for name, preset in PRESETS[settings.preset].items()}
    same = ("tie_word_embeddings", "cross_document_attention", "router_aux_loss_coef", "router_z_loss_coef")
    return ModelConfig(
        vocab_size=tokenizer.vocab_size,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        max_position_embeddings=settings.sequence_length,
        num_local_experts=settings.num_experts,
        num_experts_per_tok=settings.experts_per_token,
        **{name: getattr(settings, name) for name in same},
        **sizes,
    )


def read(kind: type[Settings], description: str, check: Callable[[Any], list[str]] = lambda settings: []) -> Settings:
    """The command line as `kind`, a frozen dataclass; ends the process (code 2) with all that `check` finds wrong with it."""
    import tyro

    settings = tyro.cli(kind, description=description, config=(tyro.conf.AvoidSubcommands,))
    found = check(settings)
    if found:
        lines = "\n".join(f"  - {problem}" for problem in found)
        print(f"{Path(sys.argv[0]).name}: the settings cannot be used:\n{lines}", file=sys.stderr)
        raise SystemExit(2)
    return settings


def run(main: Callable[[Settings], int], settings: Settings) -> NoReturn:
    """Ends the process with main's code; a user's mistake is said plainly, without a traceback (code 1)."""
    try:
        code = main(settings)
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr, flush=True)
        code = 1
    raise SystemExit(code)


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


def check_context(settings: Any, config: ModelConfig) -> None:
    """Refuses windows that are longer than the positions a trunk has learned."""
    if settings.sequence_length > config.max_position_embeddings:
        raise UserError(
            f"--sequence-length {settings.sequence_length} exceeds the trunk's context of {config.max_position_embeddings} "
            f"tokens. Use at most {config.max_position_embeddings}."
        )


def processes() -> int:
    """How many processes the launcher started, as its environment says before anything is imported."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def accumulation_steps(settings: Any) -> int:
    """Micro-batches a process takes for one update: batch / (micro x processes)."""
    return settings.batch_size // (settings.micro_batch_size * processes())


def problems(settings: Any) -> list[str]:
    """All that can be known to be wrong with a script's settings without loading anything, each with its mend."""
    found = []
    value = vars(settings).get
    for name in ("steps", "batch_size", "micro_batch_size", "sequence_length", "keep", "log_every", "max_bad_updates"):
        if value(name) < 1:
            found.append(f"--{name.replace('_', '-')} is {value(name)}; it must be at least 1")
    for name in ("statistics_tokens", "statistics_min_documents", "rank"):
        if (value(name, 1)) < 1:
            found.append(f"--{name.replace('_', '-')} is {value(name)}; it must be at least 1")
    for name in ("val_every", "save_every", "patience", "warmup_steps", "general_tokens", "num_experts", "width"):
        if (value(name) or 0) < 0:
            found.append(f"--{name.replace('_', '-')} is {value(name)}; it cannot be negative (0 means never or none)")
    for name in ("lr", "max_grad_norm"):
        if not (value(name) > 0 and math.isfinite(value(name))):
            found.append(f"--{name.replace('_', '-')} is {value(name)}; it must be a positive number")
    if not 0 <= value("weight_decay") < 1:
        found.append(f"--weight-decay is {value('weight_decay')}; it must lie in [0, 1)")
    if not 0 <= value("min_lr_ratio") <= 1:
        found.append(f"--min-lr-ratio is {value('min_lr_ratio')}; it must lie in [0, 1]")
    if not 0 <= value("val_fraction") < 1:
        found.append(f"--val-fraction is {value('val_fraction')}; it must lie in [0, 1)")
    if value("warmup_steps") > value("steps"):
        found.append(f"--warmup-steps {value('warmup_steps')} exceeds --steps {value('steps')}; lower the first")
    at_once = max(value("micro_batch_size"), 1) * processes()
    if value("batch_size") % at_once:
        found.append(
            f"--batch-size {value('batch_size')} does not divide into {processes()} process(es) x --micro-batch-size "
            f"{value('micro_batch_size')}; make it a multiple of {at_once}"
        )
    known = {field.name for field in dataclasses.fields(settings)}
    for name in value("accept_change"):
        if name.replace("-", "_") not in known:
            near = difflib.get_close_matches(name.replace("-", "_"), known, 1)
            found.append(f"--accept-change {name} names no setting{f'; did you mean {near[0]}?' if near else ''}")
    return found + _shape_problems(value) + _place_problems(value)


def _shape_problems(value: Any) -> list[str]:
    """What is wrong with the sizes of a model that is made from scratch."""
    if value("preset") is None or value("trunk_from"):
        return []
    if value("preset") not in PRESETS:
        return [f"--preset {value('preset')} is not one of {', '.join(PRESETS)}"]
    size = {name: value(name) or preset for name, preset in PRESETS[value("preset")].items()}
    found = [
        f"--{name.replace('_', '-')} is {number}; it must be positive" for name, number in size.items() if number < 1
    ]
    if found:
        return found
    if size["hidden_size"] % size["num_attention_heads"] or size["hidden_size"] // size["num_attention_heads"] % 2:
        found.append(
            f"--hidden-size {size['hidden_size']} must be an even multiple of --num-attention-heads "
            f"{size['num_attention_heads']} (each head has an even width, for rotary positions)"
        )
    if size["num_attention_heads"] % size["num_key_value_heads"]:
        found.append(
            f"--num-attention-heads {size['num_attention_heads']} must be a multiple of --num-key-value-heads "
            f"{size['num_key_value_heads']}"
        )
    if value("num_experts") == 1 or 0 < value("num_experts") < value("experts_per_token"):
        found.append(
            f"--num-experts {value('num_experts')} must be 0 (dense), or at least 2 and no fewer than --experts-per-token "
            f"{value('experts_per_token')}"
        )
    if value("experts_per_token") < 1:
        found.append(f"--experts-per-token is {value('experts_per_token')}; it must be at least 1")
    return found


def _place_problems(value: Any) -> list[str]:
    """What is wrong with the places a run reads from and writes to."""
    found = []
    output = Path(value("output_dir"))
    if output.exists() and not output.is_dir():
        found.append(f"--output-dir {output} is a file; name a folder")
    if value("resume") == "require" and not (output / "checkpoints").is_dir():
        found.append(f"--resume require, but {output}/checkpoints does not exist; use --resume auto to start afresh")
    return found


def to_json(settings: Any) -> dict[str, Any]:
    """A settings dataclass as JSON's types."""
    return {
        name: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        for name, value in vars(settings).items()
    }


def differences(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Which entries changed: name -> (before, now)."""
    names = sorted(before.keys() | now.keys())
    return {name: (before.get(name), now.get(name)) for name in names if before.get(name) != now.get(name)}
