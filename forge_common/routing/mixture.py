"""The assembled model: a frozen trunk and separately trained modules, mixed by a router.

In every layer h += sum_e g_t(e) A_e(norm h) and h += sum_e g_t(e) F_e(norm h) (layer_mix.py). A_0 and F_0 are the
trunk's attention and feed-forward; where a module does not change a layer, its A_e and F_e are the trunk's. Each A_e
has its own queries, keys and values, also of the tokens that other candidates serve: n attentions that differ cost n
attentions. Norms after attention and feed-forward (OLMo2) are of these sums. At the end the candidates' probabilities
are mixed: log p = logsumexp_e [log w_t(e) + log_softmax(W_e h)].

B batch, T time, P time before the window, E candidates (the trunk first), D width, V vocabulary
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from ..loss import nats_per_token
from ..model.modules import layout, widen_on_use
from ..model.trunk import Cache, Trunk
from .layer_mix import LayerMix, best_gates, changed_by, feed_of, in_use
from .routers import ContextRouter, State

Tensors = dict[str, torch.Tensor]


def with_module(trunk: Trunk, tensors: Tensors, kind: str, layers: list[int], **sizes: Any) -> Trunk:
    """The trunk with a module. Both share the tensors that the module does not change.

    Tensors that are mapped from a file stay mapped, and are not read.
    """
    model = layout(trunk.config, tensors, kind, layers, **sizes)
    own = {name: nn.Parameter(tensor.to(trunk.head.device)) for name, tensor in tensors.items()}
    model.load_state_dict(dict(trunk.named_parameters()) | own, assign=True)
    widen_on_use(model, list(own), torch.promote_types(trunk.head.dtype, torch.float32))
    _share(model.model, trunk.model)
    return model


def _share(part: nn.Module, trunk_part: nn.Module) -> None:
    """Replaces each submodule that has only parameters of the trunk by the trunk's own, since the objects take memory
    too: with many modules, more than their statistics.
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


class Pass(NamedTuple):
    """The result of a pass through the layers."""

    hidden: torch.Tensor
    """[B, T, D]"""
    gates: torch.Tensor
    """[B, T, E]: of the last layer, where each has its own."""
    states: torch.Tensor
    """[B, T, S]: of the context router's filter after each token; the gates for another router."""
    evidence: torch.Tensor | None
    """[B, T, S]: of the context router, for the output weights; None where the output weights are the gates."""


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
        self.attention_by = [changed_by(layers, attention=True) for layers in zip(*self.layers, strict=True)]
        self.changed_by = [changed_by(layers, attention=False) for layers in zip(*self.layers, strict=True)]

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
        result = self._run(inputs, state, None)
        self.gates = result.gates
        if result.evidence is not None:
            log_p = self._by_head(lambda head, _: self._log_p(result.hidden, labels, head))
            previous_log_p = torch.cat((torch.zeros_like(log_p[:, :1]), log_p[:, :-1]), dim=1)
            _, self.weights = self._weigh(inputs, result.evidence, previous_log_p, state)
            weights = self.weights
        else:
            used = in_use(result.gates)
            log_p = self._by_head(lambda head, users: self._log_p_where_used(result, labels, head, users), used)
            self.weights = result.gates
            weights = result.gates[..., used]
        return -_mixed(weights, log_p).masked_fill(labels == self.config.ignore_index, 0)

    @torch.no_grad()
    def next_logits(self, inputs: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """Log probabilities [B, V] after inputs [B, T]. With `cache` (a list, empty at first) pass only the new tokens.

        The cache holds the keys and values of the trunk's layers, then the router's state, then the caches of the
        modules' attentions by (layer, candidate).
        """
        cache = [] if cache is None else cache
        depth = 1 + len(self.changed_by)
        own_caches: dict[tuple[int, int], Cache] = cache[depth + 1] if cache else {}
        state: State = cache[depth] if cache else self._start(inputs, None)
        result = self._run(inputs, state, cache, own_caches)
        self.gates = result.gates
        last = result.hidden[:, -1]
        history = torch.cat((state.history, inputs.cpu()), dim=1)

        def next_log_p_under(head: torch.Tensor, _: list[int]) -> torch.Tensor:
            return (last @ head.T).float().log_softmax(-1)[:, None]

        if result.evidence is not None:
            next_log_p = self._by_head(next_log_p_under)  # [B, 1, V, E]
            log_p = self._by_head(lambda head, _: self._log_p(result.hidden[:, :-1], inputs[:, 1:], head))
            first = torch.zeros_like(result.gates[:, :1])
            if state.next_log_p is not None:
                first = state.next_log_p[:, 0].gather(1, inputs[:, :1, None].expand(-1, -1, len(self.names)))
            outputs, self.weights = self._weigh(inputs, result.evidence, torch.cat((first, log_p), dim=1), state)
            weights = self.weights
            state = State(result.states[:, -1], outputs[:, -1], history, next_log_p)
        else:
            used = in_use(result.gates[:, -1:])
            next_log_p = self._by_head(next_log_p_under, used)
            self.weights = result.gates
            weights = result.gates[..., used]
            state = State(result.states[:, -1], result.states[:, -1], history)
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

    def _run(self, inputs: torch.Tensor, state: State, cache: Cache | None, own_caches: dict | None = None) -> Pass:
        """Passes inputs [B, T] through the layers. own_caches: None without a cache."""
        gates = states = evidence = None
        if isinstance(self.router, ContextRouter):
            states, evidence = self.router.route(inputs.cpu(), state)
            gates = self.router.gates(states, mixed=not 0 < self.top_k < len(self.names))
            gates = best_gates(gates, self.top_k).to(inputs.device)
        mix = LayerMix(self.layers, self.router, self.top_k, gates, own_caches)
        used = in_use(gates) if gates is not None and self.top_k == 1 else []
        if len(used) == 1:  # it serves all tokens, by a gate of 1: nothing is mixed
            own = self.layers[used[0]]
            feeds = [feed_of(own[index]) if used[0] in by else None for index, by in enumerate(self.changed_by)]
        else:
            feeds = mix.feeds(self.changed_by)
        hidden, _ = self.candidates[0].model(inputs, cache=cache, feeds=feeds, attends=mix.attends(self.attention_by))
        assert mix.gates is not None  # the router gave them to each layer
        states = mix.gates if states is None else states
        return Pass(hidden, mix.gates, states, None if self.top_k else evidence)

    def _log_p(self, hidden: torch.Tensor, labels: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """log p [B, T] of labels [B, T] under a head, 0 where they are ignored."""
        nats = nats_per_token(hidden.flatten(0, 1), head, labels.flatten(), self.config.ignore_index)
        return -nats.view_as(labels)

    def _log_p_where_used(
        self, result: Pass, labels: torch.Tensor, head: torch.Tensor, users: list[int]
    ) -> torch.Tensor:
        """The same, computed only for the tokens that one of `users` serves; 0 for the others."""
        rows = (result.gates[..., users] > 0).any(-1).flatten().nonzero().flatten()
        if len(rows) == labels.numel():
            return self._log_p(result.hidden, labels, head)
        flat = result.hidden.flatten(0, 1)
        scores = -nats_per_token(flat[rows], head, labels.flatten()[rows], self.config.ignore_index)
        return scores.new_zeros(len(flat)).index_copy_(0, rows, scores).view_as(labels)

    def _weigh(
        self, inputs: torch.Tensor, evidence: torch.Tensor, log_p: torch.Tensor, state: State
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The states of the output weights' filter [B, T, S], and the output weights [B, T, E].

        log_p [B, T, E]: of the inputs under each candidate's head, 0 where it is not known.
        """
        outputs = self.router.weigh(inputs.cpu(), evidence, log_p.cpu(), state.outputs)
        return outputs, self.router.gates(outputs, mixed=True).to(log_p)

    def _by_head(
        self, score: Callable[[torch.Tensor, list[int]], torch.Tensor], candidates: Sequence[int] | None = None
    ) -> torch.Tensor:
        """score(head, the candidates that have it), once for each distinct head; the results stacked by candidate.

        candidates: those that are computed; None for all.
        """
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
