"""The assembled model: a frozen trunk and modules that were trained apart, mixed by a router.

In every layer h += sum_e g_t(e) F_e(norm h), where F_0 is the trunk's own feed-forward (and a module's in layers it does
not have); at the end the candidates' probabilities are mixed: log p = logsumexp_e [log w_t(e) + log_softmax(W_e h)].

B batch, T time, E candidates (the trunk first), D width, V vocabulary
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ..loss import nats_per_token
from ..model.modules import Rival, put_in
from ..model.trunk import Cache, Trunk
from .routers import ContextRouter, State

Tensors = dict[str, torch.Tensor]


def with_module(trunk: Trunk, tensors: Tensors, kind: str, layers: list[int], **sizes: int) -> Trunk:
    """A model of the trunk's own parameters (the same objects) with a module in it."""
    with torch.device("meta"):
        view = Trunk(trunk.config)
    shared = dict(trunk.named_parameters())
    owned = {
        name: nn.Parameter(tensors[name].to(frozen.dtype))
        for name, frozen in shared.items()
        if name in tensors and tensors[name].shape == frozen.shape  # another shape is for put_in to refuse
    }
    view.load_state_dict(shared | owned, assign=True)
    put_in(view, tensors, kind, layers, **sizes)
    return view


class Mixture(nn.Module):
    """Candidates and their router. top_k: how many candidates serve a token (0: all)."""

    def __init__(self, trunk: Trunk, modules: dict[str, Trunk], router: Any, *, top_k: int = 0):
        super().__init__()
        self.config = trunk.config
        self.names = ["trunk", *modules]
        self.candidates = nn.ModuleList([trunk, *modules.values()])
        self.router, self.top_k = router, top_k
        self.weights: torch.Tensor | None = None  # [B, T, E] of the last pass: whose head spoke
        self.own = [  # for each layer, the candidates that have one of their own
            [e for e, layer in enumerate(layers) if _differs(layer, layers[0])]
            for layers in zip(*(candidate.model.layers for candidate in self.candidates), strict=True)
        ]

    @property
    def head(self) -> torch.Tensor:
        return self.candidates[0].head

    @torch.no_grad()
    def nats(self, tokens: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
        """Nats of each label of tokens [B, T + 1], 0 where not scored: [B, T].

        before [B, H]: the ids of the document before these, -1 where there were none or they are unknown (on the left);
        an EOS says that a document begins. The router hears them, the trunk does not.
        """
        inputs, labels = self.candidates[0].split(tokens)
        state = self._start(inputs, before)
        hidden, gates, evidence, _ = self._hidden(inputs, state, None)
        ignore, flat = self.config.ignore_index, hidden.flatten(0, 1)
        chosen = None if evidence is not None and not self.top_k else self._few(gates)

        def log_p(head: torch.Tensor, users: list[int]) -> torch.Tensor:
            if chosen is None:
                return -nats_per_token(flat, head, labels.flatten(), ignore).view_as(labels)
            rows = (chosen[..., users].sum(-1) > 0).flatten()
            found = flat.new_zeros(len(flat), dtype=torch.float32)
            if rows.any():
                found[rows] = -nats_per_token(flat[rows], head, labels.flatten()[rows], ignore).float()
            return found.view_as(labels)

        spoken = self._by_head(log_p)  # [B, T, E]
        if chosen is None:
            given = torch.cat((torch.zeros_like(spoken[:, :1]), spoken[:, :-1]), dim=1)
            self.weights = self.router.weigh(inputs, evidence, given, state.outputs)
        else:
            self.weights = chosen
        return -torch.logsumexp(self.weights.log() + spoken, dim=-1).masked_fill(labels == ignore, 0)

    @torch.no_grad()
    def next_logits(self, inputs: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """Log probabilities [B, V] after inputs [B, T]; with `cache` (a list, empty at first) only the new tokens are passed.

        What the router remembers lies at the cache's end, behind the layers' keys and values.
        """
        cache = [] if cache is None else cache
        depth = 1 + len(self.candidates[0].model.layers)
        state = cache[depth] if cache else self._start(inputs, None)
        hidden, gates, evidence, last = self._hidden(inputs, state, cache)
        spoken = self._by_head(lambda head, users: (hidden[:, -1:] @ head.T).float().log_softmax(-1))  # [B, 1, V, E]
        if evidence is not None and not self.top_k:
            ignore, rows, next_ones = self.config.ignore_index, hidden[:, :-1].flatten(0, 1), inputs[:, 1:]
            given = self._by_head(
                lambda head, users: -nats_per_token(rows, head, next_ones.flatten(), ignore).view_as(next_ones)
            )
            first = torch.zeros_like(evidence[:, :1])
            if state.spoken is not None:
                first = state.spoken[:, 0].gather(1, inputs[:, :1, None].expand(-1, -1, len(self.names)))
            self.weights = self.router.weigh(inputs, evidence, torch.cat((first, given), dim=1), state.outputs)
        else:
            self.weights = self._few(gates)
        outputs = self.weights[:, -1]
        cache[depth:] = [State(gates[:, -1], outputs, last, spoken)]
        return torch.logsumexp(outputs.log()[:, None] + spoken[:, 0], dim=-1)

    def _start(self, inputs: torch.Tensor, before: torch.Tensor | None) -> State:
        """The router's state before `inputs`; without `before` a document begins there."""
        if not isinstance(self.router, ContextRouter):
            return State(None, None, inputs[:, :0])
        state = self.router.to(inputs.device).start(len(inputs), at_document=before is None)
        if before is None or not before.shape[1]:
            return state
        gates, _, last = self.router.route(before, state)
        return State(gates[:, -1], gates[:, -1], last)

    def _hidden(self, inputs, state: State, cache: Cache | None):
        """hidden [B, T, D], gates [B, T, E] (of the last layer, where each has its own), their evidence, the last ids."""
        layered: list[torch.Tensor] = []
        gates = evidence = last = None
        if isinstance(self.router, ContextRouter):
            gates, evidence, last = self.router.route(inputs, state)
        feeds = [partial(self._feed, index, gates, layered) for index in range(len(self.candidates[0].model.layers))]
        hidden, _ = self.candidates[0].model(inputs, cache=cache, feeds=feeds)
        return hidden, layered[-1] if gates is None else gates, evidence, last

    def _feed(self, index: int, gates, layered: list, normed, scored, load):
        """sum_e g_t(e) F_e(normed), [B, T, D]; a candidate without this layer adds its gate to the trunk's."""
        if gates is None:
            gates = self.router.layer(index, normed)
            layered.append(gates)
        gates = self._few(gates).to(normed.dtype)
        own = self.own[index]
        parts = [
            (1 - gates[..., own].sum(-1), partial(self.candidates[0].model.layers[index].feed, scored=None, load=load))
        ]
        parts += [(gates[..., e], _function(self.candidates[e].model.layers[index], load)) for e in own]
        y = torch.zeros_like(normed)
        for gate, function in parts:
            if not self.top_k:
                y += gate.unsqueeze(-1) * function(normed)[0]
                continue
            rows = gate > 1e-6
            if rows.any():
                y[rows] += gate[rows].unsqueeze(-1) * function(normed[rows][None])[0][0]
        return y, None

    def _few(self, gates: torch.Tensor) -> torch.Tensor:
        """The best top_k gates, made to sum to 1; the others zero."""
        if not self.top_k or self.top_k >= gates.shape[-1]:
            return gates
        best, places = gates.topk(self.top_k, dim=-1)
        return torch.zeros_like(gates).scatter(-1, places, best / best.sum(-1, keepdim=True))

    def _by_head(self, spoken: Callable[[torch.Tensor, list[int]], torch.Tensor]) -> torch.Tensor:
        """spoken(head, its users) once for each distinct head, stacked for all candidates: [..., E]."""
        heads = [candidate.head for candidate in self.candidates]
        users: dict[int, list[int]] = {}
        for e, head in enumerate(heads):
            users.setdefault(id(head), []).append(e)
        found = {key: spoken(heads[own[0]], own) for key, own in users.items()}
        return torch.stack([found[id(head)] for head in heads], dim=-1)


def _differs(layer: nn.Module, trunk: nn.Module) -> bool:
    """Whether a candidate's layer has parameters that are not the trunk's own objects."""
    ours = {id(parameter) for parameter in trunk.parameters()}
    return any(id(parameter) not in ours for parameter in layer.parameters())


def _function(layer: nn.Module, load) -> Callable:
    """normed -> (what this candidate's feed-forward gives, ...); of a rival its own part, without its private router."""
    if isinstance(layer.addition, Rival):
        return lambda normed: (layer.addition.expert(normed), None)
    return partial(layer.feed, scored=None, load=load)
