"""The layers of Forge's assembled model: those of the trunk's family, with the feed-forwards of the modules beside the
trunk's.

B batch, P tokens before, T time, E candidates (the trunk first, then the modules), D width, H heads, d width of a head,
R rank
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

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
    """SwiGLU, or with another hidden_act GeGLU."""

    def __init__(self, hidden_size: int, width: int, hidden_act: str):
        super().__init__()
        self.act = ACT2FN[hidden_act]
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


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
        inner = trunk.act(trunk.gate_proj(x) + self.gate_proj(x)) * (trunk.up_proj(x) + self.up_proj(x))
        return trunk.down_proj(inner) + self.down_proj(inner)


class ForgeAttention(nn.Module):
    """Causal grouped-query attention with rotary positions, as in Llama.

    Qwen2: biases. Qwen3: norms of each head's queries and keys. OLMo2: of those of all heads together.
    """

    def __init__(self, config: ForgeConfig, index: int):
        super().__init__()
        self.index = index
        self.head_dim = config.head_dim
        width, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.normed = (width, keys) if config.norm_after else (config.head_dim, config.head_dim)
        self.q_norm = nn.RMSNorm(self.normed[0], config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.normed[1], config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, rope, mask, cache):
        """x [B, T, D], rope: cos and sin [B, 1, T, d], mask [B, 1, T, P + T] -> [B, T, D]."""
        by_head = (*x.shape[:2], -1, self.head_dim)
        q = self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.normed[0]))).view(by_head)
        k = self.k_norm(self.k_proj(x).unflatten(-1, (-1, self.normed[1]))).view(by_head)
        q = rotate(q.transpose(1, 2), *rope)
        k = rotate(k.transpose(1, 2), *rope)
        v = self.v_proj(x).view(by_head).transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.index)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=k.shape[1] != q.shape[1])
        return self.o_proj(y.transpose(1, 2).flatten(2))


def rotary(config: ForgeConfig, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [B, 1, T, d] for positions [B, T]."""
    frequency = torch.tensor(config.inv_freq, device=positions.device)
    angle = (positions[:, None, :, None].float() * frequency).repeat(1, 1, 1, 2)
    return angle.cos() * config.attention_scaling, angle.sin() * config.attention_scaling


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
        self.norm_after = config.norm_after  # OLMo2
        self.self_attn = ForgeAttention(config, index)
        self.post_attention_layernorm = nn.RMSNorm(width, config.rms_norm_eps)
        if self.norm_after:
            self.post_feedforward_layernorm = nn.RMSNorm(width, config.rms_norm_eps)
        else:
            self.input_layernorm = nn.RMSNorm(width, config.rms_norm_eps)
        self.mlp = FeedForward(width, config.intermediate_size, config.hidden_act)
        self.candidates = nn.ModuleDict()
        for number, module in enumerate(config.modules, 1):
            if index not in module["layers"]:
                continue
            if module["kind"] == "lora":
                candidate = LowRankFeedForward(width, config.intermediate_size, module["size"])
            else:
                kind = OwnFeedForward if module["kind"] == "ffn" else NarrowFeedForward
                candidate = kind(width, module["size"], config.hidden_act)
            self.candidates[str(number)] = candidate

    def forward(self, x, rope, mask, cache, gates):
        """x [B, T, D], gates [B, T, E] -> x [B, T, D]."""
        if self.norm_after:
            x = x + self.post_attention_layernorm(self.self_attn(x, rope, mask, cache))
            return x + self.post_feedforward_layernorm(self.mixed(x, gates))
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache)
        return x + self.mixed(self.post_attention_layernorm(x), gates)

    def mixed(self, normed, gates):
        """The mean of the feed-forwards [B, T, D] by their gates."""
        own = gates[..., [int(number) for number in self.candidates]]
        y = self.served(
            self.mlp, normed, 1 - own.sum(-1)
        )  # the gate of a module that does not change this layer is the trunk's
        for place, candidate in enumerate(self.candidates.values()):
            change: Any = candidate
            y = y + self.served(partial(change.beside, self.mlp), normed, own[..., place])
        return y

    def served(self, function, normed, gate):
        """gate [B, T] * function(normed [B, T, D]); with candidates_per_token only of the tokens that it serves."""
        if not self.candidates_per_token:
            return gate[..., None].to(normed.dtype) * function(normed)
        y = torch.zeros_like(normed)
        rows = gate > SERVES
        if rows.any():
            y[rows] = gate[rows][:, None].to(normed.dtype) * function(normed[rows])
        return y
