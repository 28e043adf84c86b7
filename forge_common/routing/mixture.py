"""The assembled model: a frozen trunk and separately trained modules, mixed by a router.

In every layer h += sum_e g_t(e) F_e(norm h), where F_0 is the trunk's feed-forward (and that of a module in layers that it
does not change). At the end the candidates' probabilities are mixed: log p = logsumexp_e [log w_t(e) + log_softmax(W_e h)].

B batch, T time, P time before the window, E candidates (the trunk first), D width, V vocabulary
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from ..loss import nats_per_token
from ..model.modules import RoutedExpert, put_in
from ..model.trunk import Cache, Trunk
from .routers import ContextRouter, State

Tensors = dict[str, torch.Tensor]


def with_module(trunk: Trunk, tensors: Tensors, kind: str, layers: list[int], **sizes: int) -> Trunk:
    """A model with the module, which shares the trunk's parameters (the same objects)."""
    with torch.device("meta"):
        model = Trunk(trunk.config)
    shared = dict(trunk.named_parameters())
    replaced = {
        name: nn.Parameter(tensors[name].to(frozen.dtype))
        for name, frozen in shared.items()
        if name in tensors and tensors[name].shape == frozen.shape  # put_in refuses another shape
    }
    model.load_state_dict(shared | replaced, assign=True)
    put_in(model, tensors, kind, layers, **sizes)
    return model


class Mixture(nn.Module):
    """Candidates and their router. top_k: how many candidates serve a token (0: all)."""

    def __init__(self, trunk: Trunk, modules: dict[str, Trunk], router: Any, *, top_k: int = 0):
        super().__init__()
        self.config = trunk.config
        self.names = ["trunk", *modules]
        self.candidates = cast(Sequence[Trunk], nn.ModuleList([trunk, *modules.values()]))
        self.router = router
        self.top_k = top_k
        self.weights: torch.Tensor | None = None  # [B, T, E]: output weights of the last pass
        self.gates: torch.Tensor | None = None  # [B, T, E]: the layers' gates of the last pass
        self.changed_by = [  # for each layer, the candidates that change it
            tuple(e for e, layer in enumerate(layers) if _differs(layer, layers[0]))
            for layers in zip(*(candidate.model.layers for candidate in self.candidates), strict=True)
        ]

    @property
    def head(self) -> torch.Tensor:
        return self.candidates[0].head

    @torch.no_grad()
    def nats(self, tokens: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
        """Nats of each label of tokens [B, T + 1], 0 where not scored: [B, T].

        before [B, P]: the ids before them in the document, -1 (on the left) where there are none or they are unknown. An
        EOS marks the start of a document. Only the router uses them.
        """
        inputs, labels = self.candidates[0].split(tokens)
        state = self._start(inputs, before)
        hidden, gates, _, evidence = self._hidden(inputs, state, None)
        ignore = self.config.ignore_index
        flat = hidden.flatten(0, 1)
        chosen = None if evidence is not None and not self.top_k else self._best(gates)

        def log_p_under(head: torch.Tensor, users: list[int]) -> torch.Tensor:
            if chosen is None:
                return -nats_per_token(flat, head, labels.flatten(), ignore).view_as(labels)
            rows = (chosen[..., users].sum(-1) > 0).flatten()
            scores = flat.new_zeros(len(flat), dtype=torch.float32)
            if rows.any():
                scores[rows] = -nats_per_token(flat[rows], head, labels.flatten()[rows], ignore).float()
            return scores.view_as(labels)

        log_p = self._by_head(log_p_under)  # [B, T, E]
        weights = chosen
        if weights is None:
            previous_log_p = torch.cat((torch.zeros_like(log_p[:, :1]), log_p[:, :-1]), dim=1)
            outputs = self.router.weigh(inputs, evidence, previous_log_p, state.outputs)
            weights = self.router.gates(outputs, mixed=True)
        self.weights = weights
        self.gates = self._best(gates)
        return -torch.logsumexp(weights.log() + log_p, dim=-1).masked_fill(labels == ignore, 0)

    @torch.no_grad()
    def next_logits(self, inputs: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """Log probabilities [B, V] after inputs [B, T]. With `cache` (a list, empty at first) pass only the new tokens.

        The router's state is the last entry of the cache, after the layers' keys and values.
        """
        cache = [] if cache is None else cache
        depth = 1 + len(self.candidates[0].model.layers)
        state: State = cache[depth] if cache else self._start(inputs, None)
        hidden, gates, filtered, evidence = self._hidden(inputs, state, cache)
        last = hidden[:, -1:]
        history = torch.cat((state.history, inputs), dim=1)
        if evidence is None or self.top_k:
            weights = self._best(gates)
            used = (weights[:, -1] > 0).any(0).tolist()

            def next_log_p_under(head: torch.Tensor, users: list[int]) -> torch.Tensor:
                if not any(used[e] for e in users):
                    return last.new_zeros(*last.shape[:2], len(head), dtype=torch.float32)
                return (last @ head.T).float().log_softmax(-1)

            next_log_p = self._by_head(next_log_p_under)  # [B, 1, V, E]
            state = State(filtered[:, -1], filtered[:, -1], history)
        else:
            next_log_p = self._by_head(lambda head, users: (last @ head.T).float().log_softmax(-1))
            rows = hidden[:, :-1].flatten(0, 1)
            labels = inputs[:, 1:]
            log_p = self._by_head(
                lambda head, users: (
                    -nats_per_token(rows, head, labels.flatten(), self.config.ignore_index).view_as(labels)
                )
            )
            first = torch.zeros_like(gates[:, :1])
            if state.next_log_p is not None:
                first = state.next_log_p[:, 0].gather(1, inputs[:, :1, None].expand(-1, -1, len(self.names)))
            outputs = self.router.weigh(inputs, evidence, torch.cat((first, log_p), dim=1), state.outputs)
            weights = self.router.gates(outputs, mixed=True)
            state = State(filtered[:, -1], outputs[:, -1], history, next_log_p)
        self.weights = weights
        self.gates = self._best(gates)
        cache[depth:] = [state]
        return torch.logsumexp(weights[:, -1].log()[:, None] + next_log_p[:, 0], dim=-1)

    def _start(self, inputs: torch.Tensor, before: torch.Tensor | None) -> State:
        """The router's state before `inputs`; without `before` a document begins there."""
        if not isinstance(self.router, ContextRouter):
            unused = torch.zeros(len(inputs), len(self.names))
            return State(unused, unused, inputs[:, :0])
        state = self.router.to(inputs.device).start(len(inputs), at_document=before is None)
        if before is None or not before.shape[1]:
            return state
        filtered, _ = self.router.route(before, state)
        return State(filtered[:, -1], filtered[:, -1], torch.cat((state.history, before), dim=1))

    def _hidden(self, inputs: torch.Tensor, state: State, cache: Cache | None):
        """hidden [B, T, D], gates [B, T, E] (of the last layer where each has its own), the filter's states and their evidence."""
        layers = range(len(self.candidates[0].model.layers))
        layer_gates: list[torch.Tensor] = []
        gates = filtered = evidence = None
        if isinstance(self.router, ContextRouter):
            filtered, evidence = self.router.route(inputs, state)
            gates = self.router.gates(filtered, mixed=not 0 < self.top_k < len(self.names))
        served: dict = {}  # the same for all layers that the same candidates change
        feeds = [partial(self._feed, index, gates, layer_gates, served) for index in layers]
        hidden, _ = self.candidates[0].model(inputs, cache=cache, feeds=feeds)
        gates = layer_gates[-1] if gates is None else gates
        return hidden, gates, gates if filtered is None else filtered, evidence

    def _feed(self, index: int, gates, layer_gates: list, served: dict, normed, scored, load):
        """sum_e g_t(e) F_e(normed), [B, T, D]. The gate of a candidate that does not change this layer goes to the trunk's F_0."""
        if gates is None:
            gates = self.router.layer(index, normed)
            layer_gates.append(gates)
            served = {}
        changed_by = self.changed_by[index]
        if changed_by not in served:
            served[changed_by] = self._served(self._best(gates).to(normed.dtype), changed_by)
        flat = normed.flatten(0, 1)
        y = torch.zeros_like(flat)
        for e, gate, rows in served[changed_by]:
            function = self._function(e, index, load)
            if rows is None:
                y += gate * function(normed)[0].flatten(0, 1)
            else:
                y.index_add_(0, rows, gate * function(flat[rows][None])[0][0])
        return y.view_as(normed), None

    def _served(self, gates: torch.Tensor, changed_by: tuple[int, ...]):
        """(candidate, its gates [R, 1], its rows [R] of the B * T, or None for all) of those that serve a token in a layer."""
        own = gates.flatten(0, 1)[:, changed_by]
        gates = torch.cat((1 - own.sum(-1, keepdim=True), own), dim=-1)
        if not self.top_k:
            return [(e, gates[:, [place]], None) for place, e in enumerate((0, *changed_by))]
        places, rows = (gates > 1e-6).T.nonzero(as_tuple=True)
        served = []
        for place, e in enumerate((0, *changed_by)):
            of_e = rows[places == place]
            if len(of_e):
                served.append((e, gates[of_e, place, None], None if len(of_e) == len(gates) else of_e))
        return served

    def _function(self, e: int, index: int, load) -> Callable:
        """A candidate's feed-forward, normed -> (y, ...); of a RoutedExpert the expert alone, without its router row."""
        layer = self.candidates[e].model.layers[index]
        expert = layer.addition
        if isinstance(expert, RoutedExpert):
            return lambda normed: (expert.expert(normed), None)
        return partial(layer.feed, scored=None, load=load)

    def _best(self, gates: torch.Tensor) -> torch.Tensor:
        """The top_k gates, normalized to 1; the others 0."""
        if not self.top_k or self.top_k >= gates.shape[-1]:
            return gates
        best, places = gates.topk(self.top_k, dim=-1)
        return torch.zeros_like(gates).scatter(-1, places, best / best.sum(-1, keepdim=True))

    def _by_head(self, score: Callable[[torch.Tensor, list[int]], torch.Tensor]) -> torch.Tensor:
        """score(head, candidates that use it), called once for each distinct head; stacked for all candidates: [..., E]."""
        heads = [candidate.head for candidate in self.candidates]
        users: dict[int, list[int]] = {}
        for e, head in enumerate(heads):
            users.setdefault(id(head), []).append(e)
        scores = {key: score(heads[candidates[0]], candidates) for key, candidates in users.items()}
        return torch.stack([scores[id(head)] for head in heads], dim=-1)


def _differs(layer: nn.Module, trunk_layer: nn.Module) -> bool:
    """Whether a candidate's layer has parameters that are not objects of the trunk's layer."""
    shared = {id(parameter) for parameter in trunk_layer.parameters()}
    return any(id(parameter) not in shared for parameter in layer.parameters())
