"""Forge's assembled model: a decoder (the trunk), modules that were trained on it separately, and a router that mixes them.

In every layer h += sum_e g_t(e) F_e(norm h), where F_0 is the trunk's feed-forward. Attentions that modules change are
mixed by the same gates, each with its own keys and values. At the end the candidates' probabilities are mixed: log p =
logsumexp_e [log w_t(e) + log_softmax(W_e h)]. So `logits` are log probabilities. The gates g and the weights w depend
on the tokens of the document so far, not on hidden states: the router compares them with counts of tokens and of pairs
of tokens that each candidate brings, by the forward filter of a hidden Markov model. With a cache its state is one more
layer of it, and the keys and values of the modules' attentions are the layers after that.

An EOS ends a document and resets the router. Tokens that attention_mask leaves out count as EOS, so that padding on the
left changes nothing.

B batch, P tokens before, T time, E candidates (the trunk first, then the modules), S = E + 1 states of the filter, D
width, V vocabulary
"""

from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_forge import ForgeConfig
from .layers_forge import ForgeLayer, LowRank, own_attentions, rotary
from .router_forge import ForgeRouter

ROWS = 512  # rows of logits in memory at a time, to score the tokens that are given


class ForgeModel(nn.Module):
    """Embedding, layers and last norm."""

    def __init__(self, config: ForgeConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ForgeLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, seen, real, positions, cache, gates):
        """seen, real [B, P + T], positions [B, T], gates [B, T, E] -> hidden [B, T, D]."""
        length, total = positions.shape[1], seen.shape[1]
        causal = torch.ones(length, total, dtype=torch.bool, device=seen.device).tril(total - length)
        mask = causal & real[:, None, None, :]
        if not self.config.cross_document_attention:
            ends = (seen == self.config.eos_token_id).long()
            document = ends.cumsum(-1) - ends  # an EOS belongs to the document that it ends
            mask = mask & (document[:, None, total - length :, None] == document[:, None, None, :])
        if self.config.sliding_window:
            mask = mask & torch.ones_like(mask).triu(total - length - self.config.sliding_window + 1)
        mask = mask | torch.eye(total, dtype=torch.bool, device=seen.device)[total - length :]  # padding sees itself
        rope = rotary(self.config, positions)
        x = self.embed_tokens(seen[:, total - length :]) * self.config.embed_scale
        for layer in self.layers:
            x = layer(x, rope, mask, cache, gates)
        return self.norm(x)


class ForgeForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = ForgeConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _no_split_modules: ClassVar = ["ForgeLayer"]

    def __init__(self, config: ForgeConfig):
        super().__init__(config)
        self.model = ForgeModel(config)
        self.router = ForgeRouter(config)
        width, vocabulary = config.hidden_size, config.vocab_size
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.heads = nn.ModuleDict()
        for number, module in enumerate(config.modules, 1):
            if module["head"] and module["kind"] == "lora":
                self.heads[str(number)] = LowRank(width, vocabulary, module["size"])
            elif module["head"]:
                self.heads[str(number)] = nn.Linear(width, vocabulary, bias=False)
        # of the trunk, of the router's state, and of the attentions that modules change
        self.cache_layers = config.num_hidden_layers + 1 + len(own_attentions(config))
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value: Any):
        self.model.embed_tokens = value

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """input_ids [B, T], attention_mask [B, P + T] -> log probabilities [B, T, V] (of the tokens of logits_to_keep)."""
        self.router.prepare()
        cache = past_key_values
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache()
        past = cache.get_seq_length() if cache is not None else 0
        shape = (len(input_ids), past + input_ids.shape[1])
        if attention_mask is None:
            attention_mask = torch.ones(shape, dtype=torch.long, device=input_ids.device)
        if attention_mask.shape != shape:
            raise ValueError(
                f"attention_mask is {tuple(attention_mask.shape)}; it must be [batch, all tokens] = {shape}"
            )
        real = attention_mask.bool()
        seen = input_ids.masked_fill(~real[:, past:], self.config.eos_token_id)
        before, layer_state, head_state, last_hidden = self.read_state(cache, past, len(input_ids))
        while cache is not None and len(cache.layers) < self.cache_layers:
            cache.layers.append(DynamicLayer())
        seen = torch.cat((before.to(seen), seen), dim=1)
        if position_ids is None:
            position_ids = (real.long().cumsum(-1) - 1).clamp(min=0)[:, past:]

        counted = np.pad(seen.cpu().numpy(), ((0, 0), (1, 0)), constant_values=self.config.eos_token_id)
        ends = self.router.ends(counted, real)
        evidence = self.router.evidence(counted, ends, past + 1)
        ends = ends[:, past + 1 :]
        layer_states = self.router.filter(evidence, ends, layer_state)
        is_limited = 0 < self.config.candidates_per_token < layer_states.shape[-1] - 1
        gates = self.router.gates(layer_states, mixed=not is_limited)
        if is_limited:
            places = (-gates).argsort(dim=-1, stable=True)[..., : self.config.candidates_per_token]
            gates = gates * torch.zeros_like(gates).scatter(-1, places, 1.0)
            gates = gates / gates.sum(-1, keepdim=True)
        hidden = self.model(seen, real, position_ids, cache, gates.to(seen.device))

        head_states, weights = layer_states, gates
        if not self.config.candidates_per_token:  # each head also counts by how well it predicted the tokens so far
            previous = torch.cat((last_hidden.to(hidden), hidden[:, :-1]), dim=1)
            log_p = self.log_p(previous, seen[:, past:]).detach().cpu()
            # How well a head predicts is counted for real tokens that follow a real token.
            counts = torch.cat((torch.zeros_like(real[:, :1]), real), dim=1)[:, past:-1] & real[:, past:]
            if self.config.pad_token_id is not None:
                counts = counts & (seen[:, past:] != self.config.pad_token_id)
            evidence = self.router.with_heads(evidence, log_p.masked_fill(~counts.cpu()[..., None], 0))
            head_states = self.router.filter(evidence, ends, head_state)
            weights = self.router.gates(head_states, mixed=True)
        if cache is not None:
            self.write_state(cache, seen[:, past:], layer_states, head_states, hidden)

        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.mixed(hidden[:, kept], weights.to(hidden.device)[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    def read_state(self, cache, past: int, batch: int):
        """Of the tokens so far: their ids [B, P], the states [B, S] of the layers' filter and of the output weights',
        and the last hidden state [B, 1, D].
        """
        if not past:
            prior = self.router.prior.expand(batch, -1)
            hidden = torch.zeros(batch, 1, self.config.hidden_size, device=self.device)
            return torch.zeros(batch, 0), prior, prior, hidden
        if len(cache.layers) < self.cache_layers:
            raise ValueError("the cache has no state of the router; pass one that this model returned")
        layer = cache.layers[self.config.num_hidden_layers]
        last = layer.values[:, -1]
        states = len(self.router.prior)
        first, second = last[:, : 2 * states].cpu().split(states, dim=1)
        return layer.keys[..., 0], first, second, last[:, None, 2 * states :]

    def write_state(self, cache, tokens, layer_states, head_states, hidden) -> None:
        """Appends one row for each token to a layer of its own, so that beams, crops and batches treat it like keys and values."""
        states = torch.cat((layer_states, head_states), dim=-1).to(hidden.device)
        rows = torch.cat((states, hidden.detach().to(states.dtype)), dim=-1)
        cache.layers[self.config.num_hidden_layers].update(tokens[..., None], rows)

    def by_head(self) -> list[tuple[Any, list[int]]]:
        """(hidden -> logits, the candidates with this head) of each distinct head."""
        weight = self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

        def trunk_head(x):
            return F.linear(x, weight)

        def changed_head(change, x):
            return change(x) + trunk_head(x)

        others = [e for e in range(1 + len(self.config.modules)) if str(e) not in self.heads]
        heads: list[tuple[Any, list[int]]] = [(trunk_head, others)]
        for number, head in self.heads.items():
            heads.append((partial(changed_head, head) if isinstance(head, LowRank) else head, [int(number)]))
        return heads

    def log_p(self, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """log p [B, T, E] of tokens [B, T] under each candidate's head, from the hidden states [B, T, D] before them."""
        log_p = torch.empty(*tokens.shape, 1 + len(self.config.modules), device=hidden.device)
        for head, users in self.by_head():
            chunks = zip(hidden.flatten(0, 1).split(ROWS), tokens.flatten().split(ROWS), strict=True)
            scores = [-F.cross_entropy(head(rows).float(), labels, reduction="none") for rows, labels in chunks]
            log_p[..., users] = torch.cat(scores).view_as(tokens)[..., None]
        return log_p

    def mixed(self, hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """log sum_e w_e p_e [B, T, V] of hidden [B, T, D] and weights [B, T, E]."""
        total = None
        for head, users in self.by_head():
            weight = weights[..., users].sum(-1, keepdim=True)
            if not weight.any():
                continue
            scores = head(hidden).float().log_softmax(-1) + weight.log()
            total = scores if total is None else torch.logaddexp(total, scores)
        assert total is not None  # the weights sum to 1
        return total
