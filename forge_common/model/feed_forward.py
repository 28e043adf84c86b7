"""The feed-forwards of a decoder layer: SwiGLU (in Gemma GeGLU), and Mixtral's mixture of experts of it.

B batch, T time, D width, E experts, k experts of a token, R = B * T rows
"""

import torch
from torch import nn

from ..loss import balance_sum, z_sum
from .config import ModelConfig
from .gated import GatedLinear


class FeedForward(nn.Module):
    """SwiGLU, or with gelu_pytorch_tanh GeGLU. Source: Shazeer, GLU variants, arXiv 2002.05202."""

    def __init__(self, hidden_size: int, intermediate_size: int, hidden_act: str = "silu"):
        super().__init__()
        self.hidden_act = hidden_act
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = GatedLinear(intermediate_size, hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(self.gate_proj(x), self.up_proj(x), self.hidden_act)


class Expert(nn.Module):
    """A SwiGLU feed-forward under Mixtral's names."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = GatedLinear(config.intermediate_size, config.hidden_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, x):
        return self.w2(self.w1(x), self.w3(x))


class SparseFeedForward(nn.Module):
    """Mixtral's mixture of experts: softmax over E, the top k renormalized to 1. Source: arXiv 2401.04088."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.experts = nn.ModuleList(Expert(config) for _ in range(config.num_local_experts))

    def forward(self, x, scored, load):
        """x [B, T, D], scored [B, T] bool (None: all), load [E] -> y [B, T, D], balance sum, z sum, counts [E] of
        scored tokens.
        """
        rows = x.reshape(-1, x.shape[-1])
        scored = torch.ones_like(rows[:, 0], dtype=torch.bool) if scored is None else scored.reshape(-1)
        logits = self.gate(rows)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        probabilities = logits.softmax(-1)
        weights, chosen = probabilities.topk(self.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        assigned = chosen.unsqueeze(-1) == torch.arange(len(self.experts), device=chosen.device)  # [R, k, E]
        # Sorted by expert, the assignments are one product for each expert, and their sizes the only thing the host
        # waits for.
        order = chosen.flatten().argsort(stable=True)
        sizes = assigned.sum((0, 1)).tolist()
        sorted_rows = rows.repeat_interleave(self.top_k, dim=0).index_select(0, order)
        parts = zip(self.experts, sorted_rows.split(sizes), strict=True)
        outputs = torch.cat([expert(part) for expert, part in parts])  # also without tokens: DDP needs every parameter
        outputs = outputs.index_select(0, order.argsort()).unflatten(0, chosen.shape)
        y = (outputs * weights.unsqueeze(-1)).to(rows.dtype).sum(1)
        counts = (assigned & scored[:, None, None]).sum((0, 1))
        return y.view_as(x), balance_sum(probabilities, load, scored), z_sum(logits, scored), counts
