"""A decoder's sizes under Hugging Face's names: presets, and config.json, read with validation and written.

Imports nothing heavy: `--help` and the check of the settings read the presets.
"""

import dataclasses
from typing import Any

from ..errors import UserError
from ..files.untrusted import ANY, FLAG, Field, checked, dict_of, integer, list_of, number, quoted

# The kinds of module; modules.py builds them.
KINDS = (
    "ffn",
    "ffn+head",
    "attention+ffn",
    "attention+ffn+head",
    "narrow",
    "narrow+head",
    "lora",
    "lora+head",
    "expert",
    "expert+head",
)
MATRICES = ("gate_proj", "up_proj", "down_proj")  # of a feed-forward
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", *MATRICES)  # that kind lora can change

AUTO = "auto"  # a preset that follows from the text, --budget and the machine (forge_common/run/length.py)
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
PRESETS: dict[str, dict[str, int]] = {
    "tiny": dict(zip(_SIZES, (128, 384, 4, 4, 2), strict=True)),  # about 1 M parameters with a vocabulary of 4k
    "small": dict(zip(_SIZES, (384, 1024, 8, 6, 2), strict=True)),  # 25 M, 16k
    "base": dict(zip(_SIZES, (768, 2048, 12, 12, 4), strict=True)),  # 110 M, 32k
    "large": dict(zip(_SIZES, (1024, 2816, 24, 16, 8), strict=True)),  # 350 M, 32k
}

ARCHITECTURES = {kind: f"{kind.capitalize()}ForCausalLM" for kind in ("llama", "qwen2", "qwen3", "mixtral")}
_ID = integer(-1, 1 << 31)
FIELDS: dict[str, Field] = {  # of a config.json; no model is near the bounds, beyond them sizes and positions overflow
    "vocab_size": integer(1, 1 << 24),
    "num_hidden_layers": integer(1, 1 << 16),
    "max_position_embeddings": integer(1, 1 << 31),
    "head_dim": integer(2, 1 << 16),
    "num_local_experts": integer(0, 1 << 16),
    "sliding_window": integer(0, 1 << 31),
    **dict.fromkeys(("hidden_size", "intermediate_size"), integer(1, 1 << 20)),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_experts_per_tok"), integer(1, 1 << 16)),
    **dict.fromkeys(("rms_norm_eps", "initializer_range"), number(0, 1)),
    **dict.fromkeys(("router_aux_loss_coef", "router_z_loss_coef"), number(0, 1e6)),
    **dict.fromkeys(("tie_word_embeddings", "cross_document_attention", "use_sliding_window"), FLAG),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), dict_of(ANY)),
    **dict.fromkeys(("pad_token_id", "bos_token_id"), _ID),
    "eos_token_id": ("an id or a list of ids", lambda value: _ID[1](value) or (bool(value) and list_of(_ID)[1](value))),
    "rope_theta": number(1, 1e12),
}
ROPE: dict[str, Field] = {
    "rope_theta": FIELDS["rope_theta"],
    "factor": number(1, 1e6),
    **dict.fromkeys(("low_freq_factor", "high_freq_factor"), number(1e-3, 1e6)),
    "original_max_position_embeddings": FIELDS["max_position_embeddings"],
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder's sizes, under the names of Hugging Face's config.json."""

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
    cross_document_attention: bool = True  # ours: whether a token attends to the earlier documents in its window

    def __post_init__(self):
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)

    @property
    def ignore_index(self) -> int:
        """The label that is not scored and pads windows: PAD, or -100 where the tokenizer has no PAD."""
        return -100 if self.pad_token_id is None else self.pad_token_id

    @property
    def model_type(self) -> str:
        if self.num_local_experts:
            return "mixtral"
        return "qwen3" if self.qk_norm else "qwen2" if self.qkv_bias else "llama"

    def to_hf(self) -> dict[str, Any]:
        """config.json for AutoModelForCausalLM. UserError for a combination that Transformers cannot express."""
        if self.qkv_bias and (self.qk_norm or self.num_local_experts):
            raise UserError(
                "Transformers has no model with qkv_bias and qk_norm, or qkv_bias and experts. Turn one of them off."
            )
        omitted = {"qkv_bias", "qk_norm", "num_local_experts", "num_experts_per_tok", "rope_scaling"}
        omitted |= {"router_aux_loss_coef", "router_z_loss_coef"}
        written = {k: v for k, v in dataclasses.asdict(self).items() if k not in omitted}
        rope = {"rope_type": "default"} | (self.rope_scaling or {}) | {"rope_theta": self.rope_theta}
        written |= {
            "model_type": self.model_type,
            "architectures": [ARCHITECTURES[self.model_type]],
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
        """Reads the config.json of a Llama, Mistral, Mixtral, Qwen2 or Qwen3. UserError for what is not implemented here."""
        kind = config.get("model_type")
        if kind not in ("llama", "mistral", "mixtral", "qwen2", "qwen3"):
            raise UserError(
                f"{where}: model_type {quoted(kind)} cannot be a trunk here. Use a Llama, Mistral, Mixtral, Qwen2 or Qwen3."
            )
        required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING] + ["rms_norm_eps"]
        required.remove("num_key_value_heads")  # the defaults of the others differ by model_type
        checked(config, where, FIELDS, required)
        rope = checked(config.get("rope_parameters") or config.get("rope_scaling") or {}, f"{where}: rope", ROPE)
        rope_type = rope.get("rope_type") or rope.get("type") or "default"
        partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
        unsupported = {
            "rope type": rope_type if rope_type not in ("default", "llama3") else None,
            "hidden_act": config["hidden_act"] if config.get("hidden_act", "silu") != "silu" else None,
            "attention_bias": config.get("attention_bias") or None,
            "mlp_bias": config.get("mlp_bias") or None,
            "partial_rotary_factor": partial if partial != 1 else None,
        }
        for name, value in unsupported.items():
            if value is not None:
                raise UserError(f"{where}: {name} {quoted(value)} is not implemented. Choose a checkpoint without it.")
        known = {field.name for field in dataclasses.fields(cls)}
        fields = {key: value for key, value in config.items() if key in known and value is not None}
        window = config.get("sliding_window", 4096 if kind == "mistral" else None)
        window = window if config.get("use_sliding_window", not kind.startswith("qwen")) else None
        if window:  # within one sliding window, attention is full attention
            fields["max_position_embeddings"] = min(window, fields["max_position_embeddings"])
        eos = config.get("eos_token_id")
        fields["eos_token_id"] = eos[0] if isinstance(eos, list) else eos
        fields["pad_token_id"] = config.get("pad_token_id")
        fields["tie_word_embeddings"] = config.get("tie_word_embeddings") or False
        theta = rope.get("rope_theta") or config.get("rope_theta") or (1e6 if kind == "mixtral" else 1e4)
        fields |= {"rope_theta": float(theta), "rope_scaling": None}
        if rope_type == "llama3":
            scaling = [name for name in ROPE if name != "rope_theta"]
            checked(rope, f"{where}: rope", {}, scaling)
            fields["rope_scaling"] = {"rope_type": "llama3"} | {name: rope[name] for name in scaling}
        fields.setdefault("num_key_value_heads", config["num_attention_heads"])
        fields |= {"qkv_bias": kind == "qwen2", "qk_norm": kind == "qwen3"}
        return _consistent(cls(**fields), where)


def _consistent(config: ModelConfig, where: str) -> ModelConfig:
    """`config`. UserError where two of its numbers contradict each other."""
    rope = config.rope_scaling or {"low_freq_factor": 0, "high_freq_factor": 1}
    wrong = {
        "num_key_value_heads does not divide num_attention_heads": config.num_attention_heads
        % config.num_key_value_heads,
        "head_dim (else hidden_size / num_attention_heads) is not even": config.head_dim % 2 or not config.head_dim,
        "num_experts_per_tok exceeds num_local_experts": 0 < config.num_local_experts < config.num_experts_per_tok,
        "high_freq_factor is not above low_freq_factor": rope["high_freq_factor"] < rope["low_freq_factor"] + 1e-3,
    }
    for problem, holds in wrong.items():
        if holds:
            raise UserError(f"{where}: {problem}. Fetch the checkpoint again, or choose another.")
    return config


def _preset(name: str) -> dict[str, int]:
    return PRESETS["small" if name == AUTO else name]


def model_config(settings: Any, tokenizer: Any) -> ModelConfig:
    """The sizes of the settings, else of the preset, with the tokenizer's vocabulary and special ids."""
    sizes: dict[str, Any] = {name: getattr(settings, name) or size for name, size in _preset(settings.preset).items()}
    return ModelConfig(
        vocab_size=tokenizer.vocab_size,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        max_position_embeddings=settings.sequence_length,
        num_local_experts=settings.num_experts,
        num_experts_per_tok=settings.experts_per_token,
        tie_word_embeddings=settings.tie_word_embeddings,
        cross_document_attention=settings.cross_document_attention,
        router_aux_loss_coef=settings.router_aux_loss_coef,
        router_z_loss_coef=settings.router_z_loss_coef,
        **sizes,
    )


def check_context(settings: Any, config: ModelConfig) -> None:
    """UserError where windows are longer than the trunk's context."""
    if settings.sequence_length > config.max_position_embeddings:
        raise UserError(
            f"--sequence-length {settings.sequence_length} exceeds the trunk's context of {config.max_position_embeddings} "
            f"tokens. Use at most {config.max_position_embeddings}."
        )
