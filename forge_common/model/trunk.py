"""The trunk: a pre-norm decoder with rotary positions, grouped-query attention and SwiGLU, under Hugging Face's names.

The state dict is that of LlamaForCausalLM (or of another of config.FAMILIES), so that a trunk is a Transformers
checkpoint. The loss is computed inside: no logits leave the model in training.

B batch, T time, D width, V vocabulary, d width of a head, L layers, E experts
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..labels import CONTEXT, is_scored
from ..loss import Sums, chunk_rows, head_cross_entropy, nats_per_token
from .attention import Attention, Cache, as_bias, document_mask, rotary
from .config import ModelConfig
from .feed_forward import FeedForward, SparseFeedForward
from .norm import GemmaRMSNorm, RMSNorm

# The parameters of a layer in the order of the forward pass, for flops_per_token.
FLOW = "input_layernorm", "q_proj k_proj v_proj", "q_norm k_norm", "o_proj", "post_attention_layernorm"
FLOW += "row gate gate_proj up_proj w1 w3", "down_proj w2"
PARALLEL = {"mlp", "block_sparse_moe", "addition"}  # side by side in a layer: none is the input of another


def norm_of(config: ModelConfig) -> nn.RMSNorm:
    """The norm of a residual stream."""
    norm = GemmaRMSNorm if config.family == "gemma" else RMSNorm
    return norm(config.hidden_size, config.rms_norm_eps)


class DecoderLayer(nn.Module):
    """Attention and a feed-forward, each added to x: `mlp` if dense, `block_sparse_moe` in a mixture of experts."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.norm_after = config.norm_after
        if not self.norm_after:
            self.input_layernorm = norm_of(config)
        self.post_attention_layernorm = norm_of(config)
        if self.norm_after:
            self.post_feedforward_layernorm = norm_of(config)
        self.sparse = config.num_local_experts > 0
        if self.sparse:
            self.block_sparse_moe = SparseFeedForward(config)
        else:
            self.mlp = FeedForward(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.addition: nn.Module | None = None  # of a module: (normed, y, scored, router) -> (y, router)

    @property
    def feed_forward(self) -> nn.Module:
        return self.block_sparse_moe if self.sparse else self.mlp

    def feed(self, normed, scored, load):
        """normed [B, T, D] -> y [B, T, D], to be added to x, and the router's (balance, z, counts) or None."""
        if self.sparse:
            y, *router = self.block_sparse_moe(normed, scored, load)
        else:
            y, router = self.mlp(normed), None
        if self.addition is not None:
            y, router = self.addition(normed, y, scored, router)
        return y, router

    def forward(self, x, rope, mask, scored, load, cache, layer, feed=None, attend=None, recompute=False):
        """x [B, T, D] -> x [B, T, D] and the router's (balance, z, counts), or None without a router.

        feed, attend: replace this layer's `feed` and `self_attn`, in an assembled model. recompute: keep x alone for
        the backward pass.
        """
        if recompute and torch.is_grad_enabled():  # inside the layer's forward, so that FSDP's hooks are around it
            return checkpoint(
                self.forward, x, rope, mask, scored, load, cache, layer, feed, attend, use_reentrant=False
            )
        attend, feed = attend or self.self_attn, feed or self.feed
        if self.norm_after:
            x = x + self.post_attention_layernorm(attend(x, rope, mask, cache, layer))
            y, router = feed(x, scored, load)
            return x + self.post_feedforward_layernorm(y), router
        x = x + attend(self.input_layernorm(x), rope, mask, cache, layer)
        y, router = feed(self.post_attention_layernorm(x), scored, load)
        return x + y, router


class Decoder(nn.Module):
    """Embedding, layers and last norm: `model.` in HF's state dict."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        shape = (config.vocab_size, config.hidden_size)
        # Random values on the meta device, which holds none, would import torch._dynamo.
        values = torch.empty(shape) if torch.get_default_device().type == "meta" else None
        self.embed_tokens = nn.Embedding(*shape, _weight=values)
        layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.layers = cast(Sequence[DecoderLayer], layers)
        self.norm = norm_of(config)
        self.fused_document_mask = False  # in training on a GPU (run/kernels.py)

    def forward(
        self, inputs, scored=None, load=None, cache: Cache | None = None, feeds=None, attends=None, recompute=False
    ):
        """inputs [B, T] -> hidden [B, T, D] after the last norm, and (balance, z, counts) of each layer with a router.

        scored [B, T]: bool. load [L, E]: f of the balance loss. feeds, attends: one for each layer, or None. recompute:
        of DecoderLayer.
        """
        seen = torch.cat((cache[0][0], inputs), dim=1) if cache else inputs
        past = seen.shape[1] - inputs.shape[1]
        if cache is not None:
            cache[:1] = [(seen,)]
        rope, mask = self.rope_and_mask(seen, past)
        x = self.embed_tokens(inputs).to(self.norm.weight.dtype)  # wider than a frozen embedding that is stored in bf16
        if self.config.embed_scale != 1:
            x = x * self.config.embed_scale
        mask = as_bias(mask, x)
        routers = []
        if scored is None:
            scored = torch.ones_like(inputs, dtype=torch.bool)
        if load is None and self.config.num_local_experts:
            load = even_load(self.config, x.device)
        for index, layer in enumerate(self.layers):
            layer_load = None if load is None else load[index]
            feed = feeds and feeds[index]
            attend = attends and attends[index]
            x, router = layer(x, rope, mask, scored, layer_load, cache, index, feed, attend, recompute)
            routers.append(router)
        return self.norm(x), [router for router in routers if router is not None]

    def rope_and_mask(self, seen, past: int = 0):
        """cos and sin [T, d] and the mask of `document_mask`, for the tokens of seen [B, past + T] after the first
        `past`.

        The mask is None where plain causal attention needs none.
        """
        length = seen.shape[1]
        rope = rotary(self.config, length, past, seen.device)
        window = self.config.sliding_window
        window = window if window and window < length else None
        if self.config.cross_document_attention:
            plain = not past and not window
            return rope, None if plain else document_mask(torch.zeros_like(seen[:1]), past, sliding_window=window)
        ends = (seen == self.config.eos_token_id).long()
        document = ends.cumsum(-1) - ends  # an EOS belongs to the document that it ends
        return rope, document_mask(document, past, self.fused_document_mask, window)


class Trunk(nn.Module):
    """The model that both scripts train. `Trunk(config)` draws from torch's global generator: seed it first."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False  # of `forward`: keep the layers' inputs alone, compute the rest again
        self.names = ("trunk",)  # LanguageModel: one candidate, so no gate weights
        self.weights: torch.Tensor | None = None
        self.model = Decoder(config)
        self.lm_head = (
            None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        self.head_change: nn.Module | None = None  # of a module: weight [V, D] -> [V, D]
        if self.model.embed_tokens.weight.is_meta:
            return  # the values come from elsewhere, and random numbers for none take longer than everything else here
        self.apply(self._initialize)
        residual = config.initializer_range / math.sqrt(2 * config.num_hidden_layers)  # GPT-2's rule
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", ".w2.weight")):
                nn.init.normal_(parameter, std=residual)

    def _initialize(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @property
    def chunk_rows(self) -> int:
        """Rows of logits in memory at a time."""
        return chunk_rows(self.config.vocab_size)

    @property
    def head(self) -> torch.Tensor:
        """[V, D]: the head's weight, or the embedding's where they are tied, with the module's change."""
        weight = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return weight if self.head_change is None else self.head_change(weight)

    def forward(self, tokens: torch.Tensor, expert_load: torch.Tensor | None = None) -> Sums:
        """tokens [B, T + 1] -> sums over the labels tokens[:, 1:] that are scored (`split`).

        expert_load [L, E]: f of the balance loss, a constant (None: even). With one f for the whole update every sum is
        linear in the tokens, hence exact for any division into micro-batches and processes.
        """
        inputs, labels = self.split(tokens)
        scored = labels != self.config.ignore_index
        hidden, routers = self.model(inputs, scored, expert_load, recompute=self.activation_checkpointing)
        nats = head_cross_entropy(hidden.flatten(0, 1), self.head, labels.flatten(), self.config.ignore_index)
        none = nats.new_zeros(())
        if not routers:
            return Sums(nats, nats, scored.sum(), none, none, labels.new_zeros(0, 0))
        balance = torch.stack([router[0] for router in routers]).mean()
        z = torch.stack([router[1] for router in routers]).mean()
        objective = nats + self.config.router_aux_loss_coef * balance + self.config.router_z_loss_coef * z
        return Sums(objective, nats, scored.sum(), balance, z, torch.stack([router[2] for router in routers]))

    def split(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """inputs and labels [B, T]; a label that is not scored is `ignore_index`.

        A token t that is read but not scored is CONTEXT - t in `tokens`. Padding of -100 becomes token 0 in the inputs:
        no scored token attends to it.
        """
        inputs = tokens[:, :-1]
        inputs = torch.where(inputs <= CONTEXT, CONTEXT - inputs, inputs).clamp(min=0)
        return inputs, tokens[:, 1:].where(self.scored(tokens), self.config.ignore_index)

    def scored(self, tokens: torch.Tensor) -> torch.Tensor:
        """Which labels of windows [..., T + 1] are scored: bool [..., T]."""
        return is_scored(tokens[..., 1:], self.config.ignore_index)

    @torch.no_grad()
    def nats(self, tokens: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
        """Nats of each label of tokens [B, T + 1], 0 where not scored: [B, T].

        before [B, P]: the tokens before them, for the router of an assembled model; a trunk does not use them.
        """
        inputs, labels = self.split(tokens)
        hidden, _ = self.model(inputs)
        flat = nats_per_token(hidden.flatten(0, 1), self.head, labels.flatten(), self.config.ignore_index)
        return flat.view_as(labels)

    @torch.no_grad()
    def next_logits(self, inputs: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """Logits [B, V] of the token after inputs [B, T].

        With `cache` (a list, empty at first) pass only the new tokens.
        """
        hidden, _ = self.model(inputs, cache=cache)
        return hidden[:, -1] @ self.head.T

    def flops_per_token(self, sequence_length: int) -> int:
        """FLOPs of an update per token, without those that frozen parameters save.

        For each weight 2 forward, 2 for the gradient of its input and 2 for its own (Kaplan et al., arXiv 2001.08361).
        For the scores and values of causal attention 2 * T * H * d a layer forward, and twice that backward.
        """
        flops = 0.0
        attention = 2 * sequence_length * self.config.num_attention_heads * self.config.head_dim
        experts = self.config.num_local_experts
        active = self.config.num_experts_per_tok / experts if experts else 1
        reached = self.model.embed_tokens.weight.requires_grad  # whether the backward pass reaches this stage's input
        for layer in self.model.layers:
            trained: set[str] = set()  # the parts of this layer that an earlier stage trains
            for stage in FLOW:
                in_stage = [(n, p) for n, p in layer.named_parameters() if n.split(".")[-2] in stage.split()]
                for name, parameter in in_stage:
                    if parameter.ndim != 2:
                        continue
                    into_input = reached or name.split(".")[0] in trained or name.endswith("lora_B")
                    used = parameter.numel() * (active if ".experts." in name else 1)
                    flops += 2 * used * (1 + into_input + parameter.requires_grad)
                trained |= {name.split(".")[0] for name, parameter in in_stage if parameter.requires_grad}
                reached = reached or bool(trained - PARALLEL)
                if "q_norm" in stage:
                    flops += attention * (1 + 2 * reached)
            reached = reached or bool(trained)
        return round(flops + 2 * self.head.numel() * (1 + reached + self.head.requires_grad))


def even_load(config: ModelConfig, device: torch.device) -> torch.Tensor | None:
    """f [L, E] before any token is routed: 1 / E each; None without a router."""
    if not config.num_local_experts:
        return None
    shape = (config.num_hidden_layers, config.num_local_experts)
    return torch.full(shape, 1 / config.num_local_experts, device=device)


def starting_load(config: ModelConfig, counts: list[list[int]], device: torch.device) -> torch.Tensor | None:
    """f [L, E] for the first update after the start or a resume. counts: of the update before it; [] without one."""
    return load_of(torch.tensor(counts, device=device)) if counts else even_load(config, device)


def load_of(counts: torch.Tensor) -> torch.Tensor | None:
    """f [L, E] from counts of assignments [L, E]: each layer sums to 1. None without a router."""
    return counts / counts.sum(-1, keepdim=True).clamp(min=1) if counts.numel() else None
