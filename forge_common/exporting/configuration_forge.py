"""The configuration of a model that `python -m forge_common.export` wrote: a trunk, modules trained on it, and their router."""

from typing import Any, ClassVar

from transformers import PreTrainedConfig


class ForgeConfig(PreTrainedConfig):
    """Sizes under the names of Llama's configuration, what follows from the trunk's family, and three fields of the
    assembled model.

    inv_freq, attention_scaling: the angle per position of each pair of a head, and the factor of cos and sin.
    norm_after: norms as in OLMo2. modules: for each one {"name", "kind": "ffn" | "narrow" | "lora", "layers":
    [numbers], "targets": [names of the matrices of a layer that it has or changes], "size": width or rank, "head":
    bool}. router: the weights of the candidates in a mean ("shares", the trunk first) and the numbers of the filter.
    candidates_per_token: 0 for all, weighted.
    """

    model_type = "forge"
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 258,
        hidden_size: int = 8,
        intermediate_size: int = 12,
        num_hidden_layers: int = 1,
        num_attention_heads: int = 1,
        num_key_value_heads: int = 1,
        head_dim: int = 8,
        max_position_embeddings: int = 64,
        rms_norm_eps: float = 1e-5,
        inv_freq: list[float] | None = None,
        attention_scaling: float = 1.0,
        hidden_act: str = "silu",
        embed_scale: float = 1.0,
        norm_after: bool = False,
        sliding_window: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        cross_document_attention: bool = True,
        modules: list[dict[str, Any]] | None = None,
        router: dict[str, Any] | None = None,
        candidates_per_token: int = 0,
        use_cache: bool = True,
        **others: Any,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.inv_freq = inv_freq or [1.0] * (head_dim // 2)
        self.attention_scaling = attention_scaling
        self.hidden_act = hidden_act
        self.embed_scale = embed_scale
        self.norm_after = norm_after
        self.sliding_window = sliding_window
        self.qkv_bias = qkv_bias
        self.qk_norm = qk_norm
        self.cross_document_attention = cross_document_attention
        self.modules = modules or []
        self.router = router or {}
        self.candidates_per_token = candidates_per_token
        self.use_cache = use_cache
        self.layer_types = ["full_attention"] * num_hidden_layers  # of the cache: the mask has the sliding window
        super().__init__(**others)
