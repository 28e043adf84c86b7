"""The assembled model: a frozen trunk and separately trained modules, mixed by a router.

In every layer h += sum_e g_t(e) A_e(norm h) and h += sum_e g_t(e) F_e(norm h), where A_0 and F_0 are the trunk's
attention and feed-forward (and those of a module in layers where it does not change them). Each A_e has its own
queries, keys and values, also of the tokens that other candidates serve: n attentions that differ cost n attentions.
Norms after attention and feed-forward (OLMo2) are of these sums. At the end the candidates' probabilities are mixed:
log p = logsumexp_e [log w_t(e) + log_softmax(W_e h)].

B batch, T time, P time before the window, E candidates (the trunk first), D width, V vocabulary
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from ..loss import nats_per_token
from ..model.modules import RoutedExpert, layout, widen_on_use
from ..model.trunk import Cache, Trunk
from .routers import ContextRouter, State

Tensors = dict[str, torch.Tensor]


def with_module(trunk: Trunk, tensors: Tensors, kind: str, layers: list[int], **sizes: Any) -> Trunk:
    """A model with the module. What the module leaves as it is, it shares with the trunk.

    Mapped tensors stay so, and are not read.
    """
    model = layout(trunk.config, tensors, kind, layers, **sizes)
    own = {name: nn.Parameter(tensor.to(trunk.head.device)) for name, tensor in tensors.items()}
    model.load_state_dict(dict(trunk.named_parameters()) | own, assign=True)
    widen_on_use(model, list(own), torch.promote_types(trunk.head.dtype, torch.float32))
    _share(model.model, trunk.model)
    return model


def _share(part: nn.Module, trunk_part: nn.Module) -> None:
    """Replaces what has only parameters of the trunk by the trunk's: for many modules the objects take more memory than
    the counts.
    """
    for name, child in part.named_children():
        other = getattr(trunk_part, name, None)
        if other is None:
            continue
        parameters, others = dict(child.named_parameters()), dict(other.named_parameters())
        if parameters.keys() == others.keys() and all(value is others[key] for key, value in parameters.items()):
            setattr(part, name, other)
        else:
            _share(child, other)


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
        self.layers = [list(candidate.model.layers) for candidate in self.candidates]
        # For each layer, the candidates that change its attention, and those that change the rest of it.
        self.attention_by = [_changed_by(layers, attention=True) for layers in zip(*self.layers, strict=True)]
        self.changed_by = [_changed_by(layers, attention=False) for layers in zip(*self.layers, strict=True)]

    @property
    def head(self) -> torch.Tensor:
        return self.candidates[0].head

    @torch.no_grad()
    def nats(self, tokens: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
        """Nats of each label of tokens [B, T + 1], 0 where not scored: [B, T].

        before [B, P]: the ids before them in the document, -1 (on the left) where there are none or they are unknown.
        An EOS marks the start of a document. Only the router uses them.
        """
        inputs, labels = self.candidates[0].split(tokens)
        state = self._start(inputs, before)
        hidden, gates, _, evidence, only = self._hidden(inputs, state, None)
        ignore = self.config.ignore_index
        flat = hidden.flatten(0, 1)

        if evidence is not None and not self.top_k:
            log_p = self._by_head(lambda head, _: -nats_per_token(flat, head, labels.flatten(), ignore).view_as(labels))
            previous_log_p = torch.cat((torch.zeros_like(log_p[:, :1]), log_p[:, :-1]), dim=1)
            outputs = self.router.weigh(inputs.cpu(), evidence, previous_log_p.cpu(), state.outputs)
            self.weights = weights = self.router.gates(outputs, mixed=True).to(log_p)
        else:

            def log_p_under(head: torch.Tensor, users: list[int]) -> torch.Tensor:
                rows = flat if users == [only] else (gates[..., users] > 0).any(-1).flatten().nonzero().flatten()
                if len(rows) == len(flat):
                    return -nats_per_token(flat, head, labels.flatten(), ignore).view_as(labels)
                scores = -nats_per_token(flat[rows], head, labels.flatten()[rows], ignore)
                return scores.new_zeros(len(flat)).index_copy_(0, rows, scores).view_as(labels)

            used = self._used(gates) if only is None else [only]
            log_p = self._by_head(log_p_under, used)
            self.weights = gates
            weights = gates[..., used]
        self.gates = gates
        return -_mixed(weights, log_p).masked_fill(labels == ignore, 0)

    @torch.no_grad()
    def next_logits(self, inputs: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """Log probabilities [B, V] after inputs [B, T]. With `cache` (a list, empty at first) pass only the new tokens.

        After the layers' keys and values the cache has the router's state, then those of the modules' attentions: a
        Cache for each (layer, candidate).
        """
        cache = [] if cache is None else cache
        depth = 1 + len(self.changed_by)
        own_caches: dict[tuple[int, int], Cache] = cache[depth + 1] if cache else {}
        state: State = cache[depth] if cache else self._start(inputs, None)
        hidden, gates, filtered, evidence, only = self._hidden(inputs, state, cache, own_caches)
        last = hidden[:, -1]
        history = torch.cat((state.history, inputs.cpu()), dim=1)

        def next_log_p_under(head: torch.Tensor, _: list[int]) -> torch.Tensor:
            return (last @ head.T).float().log_softmax(-1)[:, None]

        if evidence is not None and not self.top_k:
            next_log_p = self._by_head(next_log_p_under)  # [B, 1, V, E]
            rows = hidden[:, :-1].flatten(0, 1)
            labels = inputs[:, 1:]
            ignore = self.config.ignore_index
            log_p = self._by_head(lambda head, _: -nats_per_token(rows, head, labels.flatten(), ignore).view_as(labels))
            first = torch.zeros_like(gates[:, :1])
            if state.next_log_p is not None:
                first = state.next_log_p[:, 0].gather(1, inputs[:, :1, None].expand(-1, -1, len(self.names)))
            heads = torch.cat((first, log_p), dim=1).cpu()
            outputs = self.router.weigh(inputs.cpu(), evidence, heads, state.outputs)
            self.weights = weights = self.router.gates(outputs, mixed=True).to(next_log_p)
            state = State(filtered[:, -1], outputs[:, -1], history, next_log_p)
        else:
            used = self._used(gates[:, -1:]) if only is None else [only]
            next_log_p = self._by_head(next_log_p_under, used)
            self.weights = gates
            weights = gates[..., used]
            state = State(filtered[:, -1], filtered[:, -1], history)
        self.gates = gates
        cache[depth:] = [state, own_caches]
        return _mixed(weights[:, -1, None], next_log_p[:, 0])

    def _start(self, inputs: torch.Tensor, before: torch.Tensor | None) -> State:
        """The router's state before `inputs`; without `before` a document begins there."""
        if not isinstance(self.router, ContextRouter):
            unused = torch.zeros(len(inputs), len(self.names))
            return State(unused, unused, inputs[:, :0].cpu())
        state = self.router.start(len(inputs), at_document=before is None)
        if before is None or not before.shape[1]:
            return state
        before = before.cpu()
        filtered, _ = self.router.route(before, state)
        return State(filtered[:, -1], filtered[:, -1], torch.cat((state.history, before), dim=1))

    def _hidden(self, inputs: torch.Tensor, state: State, cache: Cache | None, own_caches: dict | None = None):
        """hidden [B, T, D], gates [B, T, E] (of the last layer where each has its own), the filter's states and their
        evidence, `_only`.
        """
        layer_gates: list[torch.Tensor] = []
        gates = filtered = evidence = None
        if isinstance(self.router, ContextRouter):
            filtered, evidence = self.router.route(inputs.cpu(), state)
            gates = self._best(self.router.gates(filtered, mixed=not 0 < self.top_k < len(self.names)))
            gates = gates.to(inputs.device)
        only = None if gates is None else self._only(gates)
        served: dict = {}  # the same for all layers that the same candidates change
        if only is None:
            feeds = [partial(self._feed, index, gates, layer_gates, served) for index in range(len(self.changed_by))]
        else:
            feeds = [self._function(only, i) if only in by else None for i, by in enumerate(self.changed_by)]
        attends = None
        if any(self.attention_by):
            attends = [
                partial(self._attend, changed_by, gates, served, own_caches) if changed_by else None
                for changed_by in self.attention_by
            ]
        hidden, _ = self.candidates[0].model(inputs, cache=cache, feeds=feeds, attends=attends)
        gates = layer_gates[-1] if gates is None else gates
        return hidden, gates, gates if filtered is None else filtered, evidence, only

    def _attend(self, changed_by, gates, served: dict, own_caches: dict | None, normed, rope, mask, cache, index: int):
        """sum_e g_t(e) A_e(normed), [B, T, D], as `_feed`.

        With a cache all candidates attend: a later token may need their keys and values.
        """
        if gates is None:
            gates = self._best(self.router.layer(index, normed))
            served = {}
        if changed_by not in served:
            served[changed_by] = self._served(gates, changed_by)
        shares = {e: (gate, rows) for e, gate, rows in served[changed_by]}
        y = torch.zeros_like(normed).flatten(0, 1)
        for e in (0, *changed_by) if own_caches is not None else shares:
            own = None if own_caches is None or not e else own_caches.setdefault((index, e), [None])
            past = (cache, index) if own is None else (own, 0)
            part = self.layers[e][index].self_attn(normed, rope, mask, *past).flatten(0, 1)
            gate, rows = shares.get(e, (None, None))
            if rows is not None:
                y.index_add_(0, rows, gate.to(y.dtype) * part[rows])
            elif gate is not None:
                y += gate.to(y.dtype) * part
        return y.view_as(normed)

    def _feed(self, index: int, gates, layer_gates: list, served: dict, normed, scored, load):
        """sum_e g_t(e) F_e(normed), [B, T, D]. The gate of a candidate that does not change this layer goes to the trunk's F_0."""
        if gates is None:
            gates = self._best(self.router.layer(index, normed))
            layer_gates.append(gates)
            served = {}
        changed_by = self.changed_by[index]
        if changed_by not in served:
            served[changed_by] = self._served(gates, changed_by)
        if len(served[changed_by]) == 1:  # for all tokens, by a gate of 1
            return self._function(served[changed_by][0][0], index)(normed, None, load)[0], None
        flat = normed.flatten(0, 1)
        y = torch.zeros_like(flat)
        for e, gate, rows in served[changed_by]:
            function = self._function(e, index)
            if rows is None:
                y += gate.to(y.dtype) * function(normed, None, load)[0].flatten(0, 1)
            else:
                part = function(flat[rows][None], None, load)[0][0]
                y.index_add_(0, rows, part.to(y.dtype) if self.top_k == 1 else gate.to(y.dtype) * part)
        return y.view_as(normed), None

    def _served(self, gates: torch.Tensor, changed_by: tuple[int, ...]):
        """(candidate, its gates [R, 1], its rows [R] of the B * T, or None for all) of those that serve a token in a layer."""
        if not self.top_k:
            own = gates.flatten(0, 1)[:, changed_by]
            gates = torch.cat((1 - own.sum(-1, keepdim=True), own), dim=-1)
            return [(e, gates[:, [place]], None) for place, e in enumerate((0, *changed_by))]
        values = gates.flatten(0, 1).float().cpu().numpy()[:, changed_by]
        values = np.concatenate((1 - values.sum(-1, keepdims=True), values), axis=-1)
        serves = values > 1e-6
        served = []
        for place in np.flatnonzero(serves.any(0)):
            rows = np.flatnonzero(serves[:, place])
            gate = torch.from_numpy(values[rows, place, None]).to(gates.device)
            every = len(rows) == len(values)
            served.append(((0, *changed_by)[place], gate, None if every else torch.from_numpy(rows).to(gates.device)))
        return served

    def _function(self, e: int, index: int) -> Callable:
        """A candidate's feed-forward, (normed, scored, load) -> (y, ...); of a RoutedExpert the expert alone, without
        its router row.
        """
        layer = self.layers[e][index]
        expert = layer.addition
        return (lambda normed, *_: (expert.expert(normed), None)) if isinstance(expert, RoutedExpert) else layer.feed

    def _best(self, gates: torch.Tensor) -> torch.Tensor:
        """The top_k gates, normalized to 1; the others 0. Of equal ones the first."""
        if not 0 < self.top_k < gates.shape[-1]:
            return gates
        values = gates.float().cpu().numpy()
        unit = np.eye(values.shape[-1], dtype=values.dtype)
        if self.top_k == 1:
            return torch.from_numpy(unit[values.argmax(-1)]).to(gates)
        places = (-values).argsort(axis=-1, kind="stable")[..., : self.top_k]
        best = values * unit[places].sum(-2)
        return torch.from_numpy(best / best.sum(-1, keepdims=True)).to(gates)

    def _only(self, gates: torch.Tensor) -> int | None:
        """The candidate that serves all tokens by a gate of 1; None where it is not alone."""
        used = self._used(gates) if self.top_k == 1 else []
        return used[0] if len(used) == 1 else None

    def _used(self, gates: torch.Tensor) -> list[int]:
        """The candidates with a gate above 0."""
        return np.flatnonzero((gates.float().cpu().numpy() > 0).any((0, 1))).tolist()

    def _by_head(
        self, score: Callable[[torch.Tensor, list[int]], torch.Tensor], candidates: Sequence[int] | None = None
    ) -> torch.Tensor:
        """score(head, those that use it), called once for each distinct head of `candidates` (None: all); stacked for them."""
        chosen = range(len(self.names)) if candidates is None else candidates
        heads = {e: self.candidates[e].head for e in chosen}
        users: dict[int, list[int]] = {}
        for e, head in heads.items():
            users.setdefault(id(head), []).append(e)
        scores = {key: score(heads[same[0]], same) for key, same in users.items()}
        if len(heads) == 1:
            return next(iter(scores.values())).unsqueeze(-1)
        return torch.stack([scores[id(head)] for head in heads.values()], dim=-1)


def _mixed(weights: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """log sum_e w_e p_e, of [..., E] each: [...]. The weight of a single candidate is 1."""
    return log_p[..., 0] if log_p.shape[-1] == 1 else torch.logsumexp(weights.log() + log_p, dim=-1)


def _changed_by(layers: Sequence[nn.Module], *, attention: bool) -> tuple[int, ...]:
    """The candidates whose layer has parameters that are not objects of the trunk's: of its attention, or of the rest.

    layers: of each candidate, the trunk first.
    """
    shared = {id(parameter) for parameter in layers[0].parameters()}

    def differs(layer: nn.Module) -> bool:
        own = [name for name, parameter in layer.named_parameters() if id(parameter) not in shared]
        return any(name.startswith("self_attn.") == attention for name in own)

    return tuple(e for e, layer in enumerate(layers) if differs(layer))
