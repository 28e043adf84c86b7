"""The layers of Forge's assembled model: Llama's, with the feed-forwards of the modules beside the trunk's.

B batch, P tokens before, T time, E candidates (the trunk first, then the modules), D width, H heads, d width of a head, R rank
"""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_forge import ForgeConfig

SERVES = 1e-6  # with candidates_per_token: a smaller gate is none


class LowRank(nn.Module):
    """x -> x A' B', a low-rank change of a linear map. A [R, in], B [out, R]."""

    def __init__(self, inputs: int, outputs: int, rank: int):
        super().__init__()
        self.lora_A = nn.Parameter(torch.zeros(rank, inputs))
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x):
        return (x @ self.lora_A.T) @ self.lora_B.T


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class NarrowFeedForward(FeedForward):
    """A feed-forward of a module whose output is added to the trunk's."""

    def beside(self, trunk: FeedForward, x):
        return trunk(x) + self(x)


class OwnFeedForward(FeedForward):
    """A feed-forward of a module in the place of the trunk's."""

    def beside(self, trunk: FeedForward, x):
        return self(x)


class LowRankFeedForward(nn.Module):
    """A module's changes of the trunk's three matrices."""

    def __init__(self, hidden_size: int, width: int, rank: int):
        super().__init__()
        self.gate_proj = LowRank(hidden_size, width, rank)
        self.up_proj = LowRank(hidden_size, width, rank)
        self.down_proj = LowRank(width, hidden_size, rank)

    def beside(self, trunk: FeedForward, x):
        inner = F.silu(trunk.gate_proj(x) + self.gate_proj(x)) * (trunk.up_proj(x) + self.up_proj(x))
        return trunk.down_proj(inner) + self.down_proj(inner)


class ForgeAttention(nn.Module):
    """Causal grouped-query attention with rotary positions, as in Llama (Qwen2: biases, Qwen3: norms of queries and keys)."""

    def __init__(self, config: ForgeConfig, index: int):
        super().__init__()
        self.index = index
        self.head_dim = config.head_dim
        width, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, rope, mask, cache):
        """x [B, T, D], rope: cos and sin [B, 1, T, d], mask [B, 1, T, P + T] -> [B, T, D]."""
        by_head = (*x.shape[:2], -1, self.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).view(by_head)).transpose(1, 2), *rope)
        k = rotate(self.k_norm(self.k_proj(x).view(by_head)).transpose(1, 2), *rope)
        v = self.v_proj(x).view(by_head).transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.index)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=k.shape[1] != q.shape[1])
        return self.o_proj(y.transpose(1, 2).flatten(2))


def rotary(config: ForgeConfig, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [B, 1, T, d] for positions [B, T]."""
    rope: dict[str, Any] = config.rope_parameters
    even = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)
    frequency = rope["rope_theta"] ** (-even / config.head_dim)
    if rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = keep * frequency + (1 - keep) * frequency / rope["factor"]
    angle = (positions[:, None, :, None].float() * frequency).repeat(1, 1, 1, 2)
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the pairs (i, i + d/2) of x [B, H, T, d]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x.dtype)


class ForgeLayer(nn.Module):
    """Attention and the feed-forwards of the trunk (mlp) and of the modules that change this layer (candidates, by number)."""

    def __init__(self, config: ForgeConfig, index: int):
        super().__init__()
        width = config.hidden_size
        self.candidates_per_token = config.candidates_per_token
        self.self_attn = ForgeAttention(config, index)
        self.input_layernorm = nn.RMSNorm(width, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(width, config.rms_norm_eps)
        self.mlp = FeedForward(width, config.intermediate_size)
        self.candidates = nn.ModuleDict()
        for number, module in enumerate(config.modules, 1):
            if index not in module["layers"]:
                continue
            if module["kind"] == "lora":
                candidate = LowRankFeedForward(width, config.intermediate_size, module["size"])
            else:
                kind = OwnFeedForward if module["kind"] == "ffn" else NarrowFeedForward
                candidate = kind(width, module["size"])
            self.candidates[str(number)] = candidate

    def forward(self, x, rope, mask, cache, gates):
        """x [B, T, D], gates [B, T, E] -> x [B, T, D]."""
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)
        normed = self.post_attention_layernorm(x)
        own = gates[..., [int(number) for number in self.candidates]]
        y = self.served(
            self.mlp, normed, 1 - own.sum(-1)
        )  # the gate of a module that does not change this layer is the trunk's
        for place, candidate in enumerate(self.candidates.values()):
            change: Any = candidate
            y = y + self.served(partial(change.beside, self.mlp), normed, own[..., place])
        return x + y

    def served(self, function, normed, gate):
        """gate [B, T] * function(normed [B, T, D]); with candidates_per_token only of the tokens that it serves."""
        if not self.candidates_per_token:
            return gate[..., None].to(normed.dtype) * function(normed)
        y = torch.zeros_like(normed)
        rows = gate > SERVES
        if rows.any():
            y[rows] = gate[rows][:, None].to(normed.dtype) * function(normed[rows])
        return y
