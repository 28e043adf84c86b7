"""Attention: rotary positions, grouped queries, and the mask that keeps a token within its document.

B batch, T time, D width, H heads, K key-value heads, d width of a head, P tokens before the first query
"""

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from ..autocast import product_dtype
from .config import ModelConfig
from .norm import RMSNorm

# For generation: the tokens so far ([B, T],), then each layer's keys and values [B, K, T, d]. A mixture appends its
# router's state.
Cache = list[Any]


@functools.cache
def _compiled_flex_attention() -> Any:
    """flex_attention as one kernel, without scores [T, T] in memory. For a GPU: on a CPU it has no backward pass."""
    return torch.compile(flex_attention, dynamic=False)


def frequencies(config: ModelConfig, length: int, device: Any = None) -> tuple[torch.Tensor, float]:
    """The angle per position of each pair [d/2], and the factor of cos and sin, in a sequence of `length` tokens.

    By the steps of Transformers' modeling_rope_utils, so that the float32 values are the same. yarn: Peng et al., arXiv
    2309.00071.
    """
    d = config.head_dim
    theta = config.rope_theta
    rope = config.rope_scaling or {"rope_type": "default", "factor": 1.0}
    factor = rope["factor"]
    if rope["rope_type"] == "dynamic" and length > config.max_position_embeddings:
        theta *= (factor * length / config.max_position_embeddings - (factor - 1)) ** (d / (d - 2))
    frequency = 1 / theta ** (torch.arange(0, d, 2, device=device, dtype=torch.float32) / d)
    if rope["rope_type"] in ("default", "dynamic"):
        return frequency, 1.0
    if rope["rope_type"] == "linear":
        return frequency / factor, 1.0
    # High frequencies are kept, low ones divided by factor, those between interpolated: by the turns in the original
    # context.
    original = rope["original_max_position_embeddings"]
    if rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((original * frequency / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        return keep * frequency + (1 - keep) * frequency / factor, 1.0
    turns = rope.get("beta_fast") or 32, rope.get("beta_slow") or 1
    first, last = (d * math.log(original / (n * 2 * math.pi)) / (2 * math.log(theta)) for n in turns)
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, d - 1)
    pair = torch.arange(d // 2, device=device, dtype=torch.float32)
    keep = 1 - ((pair - first) / ((last - first) or 1e-3)).clamp(0, 1)
    return keep * frequency + (1 - keep) * frequency / factor, _attention_factor(rope)


def _attention_factor(rope: dict[str, Any]) -> float:
    """By what yarn multiplies cos and sin."""

    def grown(by: float) -> float:
        return 0.1 * by * math.log(rope["factor"]) + 1

    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return grown(rope["mscale"]) / grown(rope["mscale_all_dim"])
    return grown(1)


def rotary(config: ModelConfig, length: int, past: int = 0, device: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [T, d] for the positions from `past` to `length` - 1.

    Source: Su et al., RoFormer, arXiv 2104.09864; halves as in HF's Llama.
    """
    frequency, scale = frequencies(config, length, device)
    angle = torch.outer(torch.arange(past, length, device=device).float(), frequency).repeat(1, 2)
    return angle.cos() * scale, angle.sin() * scale


class _Rotation(torch.autograd.Function):
    """`rotate`.

    Its backward pass is the rotation by the opposite angles; torch's own would keep nothing more, but make five
    temporary tensors.
    """

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx, *grad_outputs):
        cos, sin = ctx.saved_tensors
        return _rotated(grad_outputs[0], cos, -sin), None, None


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    (first, second), (sin_first, sin_second) = x.chunk(2, dim=-1), sin.chunk(2, dim=-1)
    y = x * cos
    y_first, y_second = y.chunk(2, dim=-1)
    y_first.sub_(second * sin_first)
    y_second.add_(first * sin_second)
    return y


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the pairs (i, i + d/2) of x [B, H, T, d] by the angles of each position."""
    return _Rotation.apply(x, cos.to(x.dtype), sin.to(x.dtype))


class Attention(nn.Module):
    """Causal grouped-query attention. Source: Ainslie et al., GQA, arXiv 2305.13245."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        width = config.hidden_size
        bias = config.qkv_bias
        self.q_proj = nn.Linear(width, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, width, bias=False)
        self.q_normed, self.k_normed = (  # how many numbers are normed together
            self.head_dim * (heads if config.norm_after else 1) for heads in (self.heads, self.kv_heads)
        )
        self.q_norm = RMSNorm(self.q_normed, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.k_normed, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, rope, mask, cache: Cache | None, layer: int):
        """x [B, T, D] -> [B, T, D]. rope: cos and sin [T, d]. mask: of `document_mask`, `as_bias` of it, or None for
        causal.

        Appends to the layer's cache.
        """
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.q_normed)).view(B, T, self.heads, self.head_dim)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.k_normed)).view(B, T, self.kv_heads, self.head_dim)
        q = rotate(q.transpose(1, 2), *rope)
        k = rotate(k.transpose(1, 2), *rope)
        v = self.v_proj(x).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)
        if cache is not None:
            if layer + 1 < len(cache):
                k = torch.cat((cache[layer + 1][0], k), dim=2)
                v = torch.cat((cache[layer + 1][1], v), dim=2)
            cache[layer + 1 : layer + 2] = [(k, v)]
        grouped = self.kv_heads != self.heads
        if isinstance(mask, BlockMask):
            # In a compiled model it is compiled with the rest.
            attend = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
            y = attend(q, k, v, block_mask=mask, enable_gqa=grouped)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


def document_mask(
    document: torch.Tensor, past: int = 0, fused: bool = False, sliding_window: int | None = None
) -> torch.Tensor | BlockMask:
    """The causal mask that keeps a token within its document, for the queries after the first `past` tokens.

    document [B, P + T]: the number of each token's document; [1, P + T] of zeros is plain causal attention. Returns
    bool [B, 1, T, P + T], True: may attend. fused: the same, as the blocks that flex_attention takes (no `past`).
    sliding_window: to how many tokens one attends, itself included.
    """
    if fused:
        # inductor rejects a mask that is made of numbers of its own graph ("convert FlexibleLayout to FixedLayout
        # first").
        outside_of_graphs: Any = torch.compiler.disable  # called here: it imports torch._dynamo, which takes 2 s
        return outside_of_graphs(_document_blocks)(document, sliding_window or document.shape[1])
    length = document.shape[1]
    causal = torch.ones(length - past, length, dtype=torch.bool, device=document.device).tril(past)
    if sliding_window:
        causal = causal.triu(past - sliding_window + 1)
    return causal & (document[:, None, past:, None] == document[:, None, None, :])


def as_bias(mask: torch.Tensor | BlockMask | None, x: torch.Tensor) -> torch.Tensor | BlockMask | None:
    """A bool mask as numbers that are added to the scores, 0 or -inf, in the type that attention computes in for x.

    One for all layers: each would make its own of a bool mask, and keep it for the backward pass.
    """
    if not isinstance(mask, torch.Tensor):
        return mask
    return torch.zeros(mask.shape, dtype=product_dtype(x), device=x.device).masked_fill_(~mask, -math.inf)


def _document_blocks(document: torch.Tensor, sliding_window: int) -> BlockMask:
    def may_attend(batch, head, query, key):
        near = (query >= key) & (query - key < sliding_window)
        return near & (document[batch, query] == document[batch, key])

    length = document.shape[1]
    return create_block_mask(may_attend, document.shape[0], None, length, length, document.device)
