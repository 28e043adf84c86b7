"""A decoder's sizes under Hugging Face's names: presets, and config.json, read with validation and written.

Imports nothing heavy: `--help` and the check of the settings read the presets.
"""

import dataclasses
import json
from typing import Any

from ..errors import UserError
from ..files.untrusted import ANY, BOOLEAN, Field, checked, dict_of, integer, list_of, number, quoted

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

AUTO = "auto"  # a preset (run/length.py) or a kind of module (modules.kind_and_layers) that follows from the rest
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
PRESETS: dict[str, dict[str, int]] = {
    "tiny": dict(zip(_SIZES, (128, 384, 4, 4, 2), strict=True)),  # about 1 M parameters with a vocabulary of 4k
    "small": dict(zip(_SIZES, (384, 1024, 8, 6, 2), strict=True)),  # 25 M, 16k
    "base": dict(zip(_SIZES, (768, 2048, 12, 12, 4), strict=True)),  # 110 M, 32k
    "large": dict(zip(_SIZES, (1024, 2816, 24, 16, 8), strict=True)),  # 350 M, 32k
}

# model_type -> the defaults of its config.json that are not Llama's.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4096},
    "mixtral": {"rope_theta": 1e6},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "olmo2": {},
    "gemma": {"head_dim": 256, "tie_word_embeddings": True},
}
ARCHITECTURES = {kind: f"{kind.capitalize()}ForCausalLM" for kind in FAMILIES}
SUPPORTED = "a Llama, Mistral, Mixtral, Qwen2, Qwen3, OLMo2 or Gemma (1)"
REASONS = {  # why some others are not among them
    "gemma2": "it caps its logits, and every second layer has a sliding window",
    **dict.fromkeys(("gemma3", "gemma3_text"), "its layers differ in their windows and in rope"),
    "olmo": "its norms have no weights",
    "olmo3": "some of its layers have a sliding window",
    "phi3": "it has one matrix for queries, keys and values",
}
# Fields of a config.json that change the computation, here or in another model's code -> the values with which they do
# not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("attention_bias", "mlp_bias", "use_sliding_window", "use_bidirectional_attention"), (None, False)),
    **dict.fromkeys(("partial_rotary_factor", "logit_scale", "logits_scaling"), (None, 1)),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier"), (None, 1)),
    **dict.fromkeys(("attention_multiplier", "query_pre_attn_scalar", "clip_qkv", "quantization_config"), (None,)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "original_max_position_embeddings"), (None,)),
}
_ID = integer(-1, 1 << 31)
FIELDS: dict[str, Field] = {  # of a config.json; no model is near the bounds, beyond them sizes and positions overflow
    "vocab_size": integer(1, 1 << 24),
    "num_hidden_layers": integer(1, 1 << 16),
    "max_position_embeddings": integer(1, 1 << 31),
    "head_dim": integer(2, 1 << 16),
    "num_local_experts": integer(0, 1 << 16),
    "sliding_window": integer(1, 1 << 31),
    **dict.fromkeys(("hidden_size", "intermediate_size"), integer(1, 1 << 20)),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_experts_per_tok"), integer(1, 1 << 16)),
    **dict.fromkeys(("rms_norm_eps", "initializer_range"), number(0, 1)),
    **dict.fromkeys(("router_aux_loss_coef", "router_z_loss_coef"), number(0, 1e6)),
    **dict.fromkeys(("tie_word_embeddings", "cross_document_attention", "use_sliding_window"), BOOLEAN),
    "layer_types": list_of(ANY),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), dict_of(ANY)),
    **dict.fromkeys(("pad_token_id", "bos_token_id"), _ID),
    "eos_token_id": ("an id or a list of ids", lambda value: _ID[1](value) or (bool(value) and list_of(_ID)[1](value))),
    "rope_theta": number(1, 1e12),
}
ROPE: dict[str, Field] = {
    "rope_theta": FIELDS["rope_theta"],
    "factor": number(1, 1e6),
    **dict.fromkeys(("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"), number(1e-3, 1e6)),
    **dict.fromkeys(("attention_factor", "mscale", "mscale_all_dim"), number(0, 1e3)),
    "truncate": BOOLEAN,
    "original_max_position_embeddings": FIELDS["max_position_embeddings"],
}
ROPE_TYPES = {  # -> the fields that it needs
    "default": (),
    **dict.fromkeys(("linear", "dynamic", "yarn"), ("factor",)),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
YARN = ("original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")
YARN += ("truncate",)


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
    rope_scaling: dict[str, Any] | None = None  # None or {"rope_type": one of ROPE_TYPES, "factor": ...}
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3: RMSNorm on each head's queries and keys; OLMo2: on those of all heads together
    num_local_experts: int = 0  # 0: a dense feed-forward; else Mixtral's sparse one
    num_experts_per_tok: int = 2
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.001
    pad_token_id: int | None = 0
    eos_token_id: int | None = 1
    bos_token_id: int | None = None
    cross_document_attention: bool = True  # ours: whether a token attends to the earlier documents in its window
    family: str = ""  # mistral, olmo2 or gemma; else model_type follows from the fields above
    sliding_window: int | None = None  # Mistral, Mixtral: to how many tokens one attends, itself included; None: to all

    def __post_init__(self):
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)

    @property
    def ignore_index(self) -> int:
        """The label that is not scored and pads windows: PAD, or -100 where the tokenizer has no PAD."""
        return -100 if self.pad_token_id is None else self.pad_token_id

    @property
    def model_type(self) -> str:
        if self.family:
            return self.family
        if self.num_local_experts:
            return "mixtral"
        if self.qk_norm:
            return "qwen3"
        return "qwen2" if self.qkv_bias else "llama"

    @property
    def norm_after(self) -> bool:
        """OLMo2: RMSNorm on what attention and feed-forward give, not on what they get."""
        return self.family == "olmo2"

    @property
    def hidden_act(self) -> str:
        return "gelu_pytorch_tanh" if self.family == "gemma" else "silu"

    @property
    def embed_scale(self) -> float:
        """By which embeddings are multiplied."""
        return self.hidden_size**0.5 if self.family == "gemma" else 1.0

    @property
    def context(self) -> int:
        """The most tokens in a window; dynamic and yarn extend it beyond max_position_embeddings."""
        rope = self.rope_scaling or {"rope_type": "default"}
        extended = 0.0
        if rope["rope_type"] == "dynamic":
            extended = rope["factor"] * self.max_position_embeddings
        elif rope["rope_type"] == "yarn":
            extended = rope["factor"] * rope["original_max_position_embeddings"]
        return max(self.max_position_embeddings, int(extended))

    def to_hf(self) -> dict[str, Any]:
        """config.json for AutoModelForCausalLM. UserError for a combination that Transformers cannot express."""
        if self.qkv_bias and (self.qk_norm or self.num_local_experts):
            raise UserError(
                "Transformers has no model with qkv_bias and qk_norm, or qkv_bias and experts. Turn one of them off."
            )
        omitted = {"qkv_bias", "qk_norm", "num_local_experts", "num_experts_per_tok", "rope_scaling", "family"}
        omitted |= {"router_aux_loss_coef", "router_z_loss_coef"}
        written = {k: v for k, v in dataclasses.asdict(self).items() if k not in omitted}
        rope = {"rope_type": "default"} | (self.rope_scaling or {}) | {"rope_theta": self.rope_theta}
        written |= {
            "model_type": self.model_type,
            "architectures": [ARCHITECTURES[self.model_type]],
            "hidden_act": self.hidden_act,
            "rope_scaling": self.rope_scaling,
            "rope_parameters": rope,
            "attention_bias": False,
            "torch_dtype": "float32",
        }
        if self.num_local_experts:
            written |= {key: getattr(self, key) for key in ("num_local_experts", "num_experts_per_tok")}
            written |= {key: getattr(self, key) for key in ("router_aux_loss_coef", "router_z_loss_coef")}
        return written

    @classmethod
    def from_hf(cls, config: dict[str, Any], where: str) -> "ModelConfig":
        """Reads the config.json of one of FAMILIES. UserError for what is not implemented here."""
        kind = config.get("model_type")
        if not isinstance(kind, str) or kind not in FAMILIES:
            reason = f" ({REASONS[kind]})" if kind in tuple(REASONS) else ""
            raise UserError(f"{where}: model_type {quoted(kind)} cannot be a trunk here{reason}. Use {SUPPORTED}.")
        required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING] + ["rms_norm_eps"]
        required.remove("num_key_value_heads")  # the defaults of the others differ by model_type
        checked(config, where, FIELDS, required)
        activations = ("gelu_pytorch_tanh", "gelu", None) if kind == "gemma" else ("silu", None)
        allowed = NEUTRAL | dict.fromkeys(("hidden_act", "hidden_activation"), activations)
        if kind not in ("mistral", "mixtral", "qwen2", "qwen3"):
            allowed["sliding_window"] = (None,)
        for name, values in allowed.items():
            _refuse_others(where, name, config.get(name), values)
        for layer_type in config.get("layer_types") or ():
            _refuse_others(where, "layer_types", layer_type, ("full_attention",))
        known = {field.name for field in dataclasses.fields(cls)}
        fields = {"tie_word_embeddings": False, "num_key_value_heads": config["num_attention_heads"]} | FAMILIES[kind]
        fields |= {key: value for key, value in config.items() if key in known and value is not None}
        if kind.startswith("qwen") or config.get("sliding_window", "default") is None:
            fields["sliding_window"] = None  # Qwen's has no effect without use_sliding_window
        eos = config.get("eos_token_id")
        fields["eos_token_id"] = eos[0] if isinstance(eos, list) else eos
        fields["pad_token_id"] = config.get("pad_token_id")
        fields["rope_theta"], fields["rope_scaling"] = _rope(config, where, fields.get("rope_theta") or 1e4)
        fields |= {"qkv_bias": kind == "qwen2", "qk_norm": kind in ("qwen3", "olmo2")}
        fields["family"] = kind if kind in ("mistral", "olmo2", "gemma") else ""
        return _consistent(cls(**fields), where)


def _refuse_others(where: str, name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """UserError where `value` is none of those that are implemented."""
    if value not in allowed:
        choice = " or ".join("null" if one is None else json.dumps(one) for one in allowed)
        raise UserError(f"{where}: {name} {quoted(value)} is not implemented. Choose a checkpoint with {choice}.")


def _rope(config: dict[str, Any], where: str, theta: float) -> tuple[float, dict[str, Any] | None]:
    """rope_theta (`theta` where it is not there) and rope_scaling, from the field of Transformers 4 or that of 5."""
    given = {key: config[key] for key in ("rope_scaling", "rope_parameters") if config.get(key)}
    read = [_rope_of(rope, f"{where}: {key}", config, theta) for key, rope in given.items()]
    if len(read) == 2 and read[0] != read[1]:
        raise UserError(f"{where}: rope_scaling and rope_parameters differ: {quoted(given)}. Make them the same.")
    return read[0] if read else (float(theta), None)


def _rope_of(rope: dict[str, Any], where: str, config: dict[str, Any], theta: float) -> tuple[float, dict | None]:
    checked(rope, where, ROPE)
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    _refuse_others(where, "rope_type", rope_type, tuple(ROPE_TYPES))
    names = ROPE_TYPES[rope_type] + (YARN if rope_type == "yarn" else ())
    for name in rope.keys() - {*ROPE, "rope_type", "type", "finetuned"}:
        _refuse_others(where, name, rope[name], NEUTRAL.get(name, (None,)))
    theta = float(rope.get("rope_theta") or theta)
    if rope_type == "default":
        return theta, None
    checked(rope, where, {}, ROPE_TYPES[rope_type])
    scaling = {name: rope[name] for name in names if rope.get(name) is not None}
    if rope_type == "yarn":
        scaling.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    return theta, {"rope_type": rope_type} | scaling


def _consistent(config: ModelConfig, where: str) -> ModelConfig:
    """`config`. UserError where two of its numbers contradict each other."""
    rope = {"rope_type": None, "low_freq_factor": 0, "high_freq_factor": 1} | (config.rope_scaling or {})
    remainder = config.num_attention_heads % config.num_key_value_heads
    wrong = {
        "num_key_value_heads does not divide num_attention_heads": remainder != 0,
        "head_dim (else hidden_size / num_attention_heads) is not even": config.head_dim % 2 or not config.head_dim,
        "num_experts_per_tok exceeds num_local_experts": 0 < config.num_local_experts < config.num_experts_per_tok,
        "high_freq_factor is not above low_freq_factor": rope["high_freq_factor"] < rope["low_freq_factor"] + 1e-3,
        "head_dim is 2 with rope type dynamic": config.head_dim == 2 and rope["rope_type"] == "dynamic",
        "rope_theta is 1 with rope type yarn": config.rope_theta == 1 and rope["rope_type"] == "yarn",
    }
    for problem, holds in wrong.items():
        if holds:
            raise UserError(f"{where}: {problem}. Fetch the checkpoint again, or choose another.")
    return config


def check_context(settings: Any, config: ModelConfig) -> None:
    """UserError where windows are longer than the trunk's context."""
    if settings.sequence_length > config.context:
        raise UserError(
            f"--sequence-length {settings.sequence_length} exceeds the trunk's context of {config.context} "
            f"tokens. Use at most {config.context}."
        )
