"""The layers of Forge's assembled model: those of the trunk's family, with the feed-forwards and the attentions of the
modules beside the trunk's.

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

SERVES = 1e-6  # with candidates_per_token: a candidate with a smaller gate does not serve the token
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


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


class Changes(nn.ModuleDict):
    """A module's low-rank changes of some of the trunk's matrices, by their names."""

    def __init__(self, trunk: nn.Module, names: list[str], rank: int):
        matrices: dict[str, Any] = {name: getattr(trunk, name) for name in names}
        super().__init__(
            {name: LowRank(matrix.in_features, matrix.out_features, rank) for name, matrix in matrices.items()}
        )

    def changed(self, trunk: nn.Module, name: str, x):
        """The product of x and the trunk's matrix `name`, with its change if it has one."""
        y = getattr(trunk, name)(x)
        return y + self[name](x) if name in self else y


class LowRankFeedForward(Changes):
    """A module's changes of the matrices of the trunk's feed-forward."""

    def beside(self, trunk: FeedForward, x):
        inner = trunk.act(self.changed(trunk, "gate_proj", x)) * self.changed(trunk, "up_proj", x)
        return self.changed(trunk, "down_proj", inner)


class ForgeAttention(nn.Module):
    """Causal grouped-query attention with rotary positions, as in Llama.

    Qwen2 has biases, Qwen3 a norm over each head's queries and keys, OLMo2 over those of all heads together. index: the
    layer of the cache that has its keys and values.
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
        y = self.attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), rope, mask, cache, self.index)
        return self.o_proj(y)

    def attend(self, q, k, v, rope, mask, cache, index: int):
        """q [B, T, H d], k and v [B, T, K d], before their norms -> [B, T, H d]."""
        by_head = (*q.shape[:2], -1, self.head_dim)
        q = self.q_norm(q.unflatten(-1, (-1, self.normed[0]))).view(by_head)
        k = self.k_norm(k.unflatten(-1, (-1, self.normed[1]))).view(by_head)
        q = rotate(q.transpose(1, 2), *rope)
        k = rotate(k.transpose(1, 2), *rope)
        v = v.view(by_head).transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, index)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=k.shape[1] != q.shape[1])
        return y.transpose(1, 2).flatten(2)


class OwnAttention(ForgeAttention):
    """An attention of a module in the place of the trunk's."""

    def beside(self, trunk: ForgeAttention, x, rope, mask, cache):
        return self(x, rope, mask, cache)


class LowRankAttention(Changes):
    """A module's changes of the matrices of the trunk's attention; its keys and values are in the layer `index` of the cache."""

    def __init__(self, trunk: ForgeAttention, names: list[str], rank: int, index: int):
        super().__init__(trunk, names, rank)
        self.index = index

    def beside(self, trunk: ForgeAttention, x, rope, mask, cache):
        q, k, v = (self.changed(trunk, name, x) for name in ATTENTION[:3])
        return self.changed(trunk, "o_proj", trunk.attend(q, k, v, rope, mask, cache, self.index))


def own_attentions(config: ForgeConfig) -> list[tuple[int, int]]:
    """(layer, number of the module) of each attention that a module changes.

    In the cache their keys and values come after the trunk's layers and the router's state, in this order.
    """
    pairs = []
    for layer in range(config.num_hidden_layers):
        for number, module in enumerate(config.modules, 1):
            changes_attention = not set(module["targets"]).isdisjoint(ATTENTION)
            if changes_attention and layer in module["layers"]:
                pairs.append((layer, number))
    return pairs


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
    """Attention and feed-forward of the trunk (self_attn, mlp) and of the modules that change them in this layer
    (attentions, candidates, by number).
    """

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
        self.attentions = nn.ModuleDict()
        places = own_attentions(config)
        for number, module in enumerate(config.modules, 1):
            if index not in module["layers"]:
                continue
            matrices = [name for name in FEED_FORWARD if name in module["targets"]]
            if matrices and module["kind"] == "lora":
                self.candidates[str(number)] = LowRankFeedForward(self.mlp, matrices, module["size"])
            elif matrices:
                kind = OwnFeedForward if module["kind"] == "ffn" else NarrowFeedForward
                self.candidates[str(number)] = kind(width, module["size"], config.hidden_act)
            if (index, number) not in places:
                continue
            place = config.num_hidden_layers + 1 + places.index((index, number))
            if module["kind"] == "lora":
                matrices = [name for name in ATTENTION if name in module["targets"]]
                self.attentions[str(number)] = LowRankAttention(self.self_attn, matrices, module["size"], place)
            else:
                self.attentions[str(number)] = OwnAttention(config, place)

    def forward(self, x, rope, mask, cache, gates):
        """x [B, T, D], gates [B, T, E] -> x [B, T, D]."""
        if self.norm_after:
            x = x + self.post_attention_layernorm(self.attended(x, rope, mask, cache, gates))
            return x + self.post_feedforward_layernorm(self.mixed(x, gates))
        x = x + self.attended(self.input_layernorm(x), rope, mask, cache, gates)
        return x + self.mixed(self.post_attention_layernorm(x), gates)

    def attended(self, normed, rope, mask, cache, gates):
        """The mean of the attentions [B, T, D], weighted by their gates.

        With a cache all of them attend: a later token may need their keys and values.
        """
        y = torch.zeros_like(normed)
        for attention, gate in self.by_candidate(self.self_attn, self.attentions, gates):
            if cache is None and self.candidates_per_token and not (gate > SERVES).any():
                continue
            y = y + gate[..., None].to(normed.dtype) * attention(normed, rope, mask, cache)
        return y

    def mixed(self, normed, gates):
        """The mean of the feed-forwards [B, T, D], weighted by their gates."""
        y = torch.zeros_like(normed)
        for feed_forward, gate in self.by_candidate(self.mlp, self.candidates, gates):
            y = y + self.served(feed_forward, normed, gate)
        return y

    def by_candidate(self, trunk: nn.Module, modules: nn.ModuleDict, gates):
        """(function, its gate [B, T]) of the trunk's part and of the modules that change it.

        The gate of a module that does not change this layer goes to the trunk's part.
        """
        own = gates[..., [int(number) for number in modules]]
        changes: list[Any] = list(modules.values())
        functions = [trunk, *(partial(change.beside, trunk) for change in changes)]
        return zip(functions, (1 - own.sum(-1), *own.unbind(-1)), strict=True)

    def served(self, function, normed, gate):
        """gate [B, T] * function(normed [B, T, D]); with candidates_per_token only of the tokens that it serves."""
        if not self.candidates_per_token:
            return gate[..., None].to(normed.dtype) * function(normed)
        y = torch.zeros_like(normed)
        rows = gate > SERVES
        if rows.any():
            y[rows] = gate[rows][:, None].to(normed.dtype) * function(normed[rows])
        return y
