"""Mixes the attentions and the feed-forwards of the candidates in the layers of an assembled model.

B batch, T time, E candidates (the trunk first), D width
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ..model.modules import RoutedExpert
from ..model.trunk import Cache, DecoderLayer

SERVES = 1e-6  # with top_k: a candidate with a smaller gate does not serve the token


class Served(NamedTuple):
    """The tokens that a candidate serves in a layer."""

    candidate: int
    gate: torch.Tensor
    """[R, 1]"""
    rows: torch.Tensor | None
    """[R]: their places among the B * T tokens; None: all of them."""


class LayerMix:
    """The mixtures of one forward pass."""

    def __init__(
        self,
        layers: list[list[DecoderLayer]],
        router: Any,
        top_k: int,
        gates: torch.Tensor | None,
        own_caches: dict[tuple[int, int], Cache] | None,
    ):
        """layers: of each candidate. gates [B, T, E]: of all layers; None where `router` gives each layer its own.

        own_caches: the caches of the attentions that modules change, by (layer, candidate); None without a cache.
        """
        self.layers = layers
        self.router = router
        self.top_k = top_k
        self.gates = gates  # of the last layer so far, where each has its own
        self.own_caches = own_caches
        self.same_in_all_layers = gates is not None
        self._served: dict[tuple[int, ...], list[Served]] = {}  # by the candidates that change a layer

    def feeds(self, changed_by: Sequence[tuple[int, ...]]) -> list[Callable]:
        """For each layer, what replaces its feed-forward. changed_by: for each layer, the candidates that change it."""
        return [partial(self._feed, index, candidates) for index, candidates in enumerate(changed_by)]

    def attends(self, changed_by: Sequence[tuple[int, ...]]) -> list[Callable | None] | None:
        """The same for the attentions; None where they are the trunk's."""
        if not any(changed_by):
            return None
        return [partial(self._attend, candidates) if candidates else None for candidates in changed_by]

    def _attend(self, changed_by: tuple[int, ...], normed, rope, mask, cache: Cache | None, index: int):
        """sum_e g_t(e) A_e(normed), [B, T, D].

        With a cache all candidates attend: a later token may need their keys and values.
        """
        served = {entry.candidate: entry for entry in self._serving(index, changed_by, normed)}
        y = torch.zeros_like(normed).flatten(0, 1)
        for e in served if self.own_caches is None else (0, *changed_by):
            past = (cache, index)
            if self.own_caches is not None and e:
                past = (self.own_caches.setdefault((index, e), [None]), 0)
            part = self.layers[e][index].self_attn(normed, rope, mask, *past).flatten(0, 1)
            if e not in served:
                continue
            _, gate, rows = served[e]
            if rows is None:
                y += gate.to(y.dtype) * part
            else:
                y.index_add_(0, rows, gate.to(y.dtype) * part[rows])
        return y.view_as(normed)

    def _feed(self, index: int, changed_by: tuple[int, ...], normed, scored, load):
        """sum_e g_t(e) F_e(normed), [B, T, D], and no router's losses."""
        served = self._serving(index, changed_by, normed)
        if len(served) == 1:  # it serves all tokens, by a gate of 1
            return feed_of(self.layers[served[0].candidate][index])(normed, None, load)[0], None
        flat = normed.flatten(0, 1)
        y = torch.zeros_like(flat)
        for e, gate, rows in served:
            feed = feed_of(self.layers[e][index])
            if rows is None:
                y += gate.to(y.dtype) * feed(normed, None, load)[0].flatten(0, 1)
            else:
                part = feed(flat[rows][None], None, load)[0][0]
                y.index_add_(0, rows, part.to(y.dtype) if self.top_k == 1 else gate.to(y.dtype) * part)
        return y.view_as(normed), None

    def _serving(self, index: int, changed_by: tuple[int, ...], normed: torch.Tensor) -> list[Served]:
        """The tokens that the trunk and the candidates `changed_by` serve in a layer."""
        if not self.same_in_all_layers:
            self.gates = best_gates(self.router.layer(index, normed), self.top_k)
            return _served(self.gates, changed_by, self.top_k)
        if changed_by not in self._served:
            assert self.gates is not None
            self._served[changed_by] = _served(self.gates, changed_by, self.top_k)
        return self._served[changed_by]


def _served(gates: torch.Tensor, changed_by: tuple[int, ...], top_k: int) -> list[Served]:
    """The tokens that each candidate serves in a layer, by gates [B, T, E].

    The gate of a candidate that does not change the layer goes to the trunk's part, which it leaves as it is.
    """
    if not top_k:
        own = gates.flatten(0, 1)[:, changed_by]
        gates = torch.cat((1 - own.sum(-1, keepdim=True), own), dim=-1)
        return [Served(e, gates[:, [place]], None) for place, e in enumerate((0, *changed_by))]
    values = gates.flatten(0, 1).float().cpu().numpy()[:, changed_by]
    values = np.concatenate((1 - values.sum(-1, keepdims=True), values), axis=-1)
    serves = values > SERVES
    served = []
    for place in np.flatnonzero(serves.any(0)):
        rows = np.flatnonzero(serves[:, place])
        gate = torch.from_numpy(values[rows, place, None]).to(gates.device)
        on_device = None if len(rows) == len(values) else torch.from_numpy(rows).to(gates.device)
        served.append(Served((0, *changed_by)[place], gate, on_device))
    return served


def feed_of(layer: DecoderLayer) -> Callable:
    """A layer's feed-forward, (normed, scored, load) -> (y, ...); of a RoutedExpert the expert without the row."""
    addition = layer.addition
    if isinstance(addition, RoutedExpert):
        return lambda normed, *_: (addition.expert(normed), None)
    return layer.feed


def best_gates(gates: torch.Tensor, top_k: int) -> torch.Tensor:
    """The top_k gates of [B, T, E], normalized to 1, and 0 for the others. Of equal ones the first is taken."""
    if not 0 < top_k < gates.shape[-1]:
        return gates
    values = gates.float().cpu().numpy()
    unit = np.eye(values.shape[-1], dtype=values.dtype)
    if top_k == 1:
        return torch.from_numpy(unit[values.argmax(-1)]).to(gates)
    places = (-values).argsort(axis=-1, kind="stable")[..., :top_k]
    best = values * unit[places].sum(-2)
    return torch.from_numpy(best / best.sum(-1, keepdims=True)).to(gates)


def in_use(gates: torch.Tensor) -> list[int]:
    """The candidates that have a gate above 0, of [B, T, E]."""
    return np.flatnonzero((gates.float().cpu().numpy() > 0).any((0, 1))).tolist()


def changed_by(layers: Sequence[nn.Module], *, attention: bool) -> tuple[int, ...]:
    """The candidates that change a layer's attention, or the rest of it: some of its parameters are not the trunk's.

    layers: this layer of each candidate, the trunk's first.
    """
    shared = {id(parameter) for parameter in layers[0].parameters()}

    def changes(layer: nn.Module) -> bool:
        own = [name for name, parameter in layer.named_parameters() if id(parameter) not in shared]
        return any(name.startswith("self_attn.") == attention for name in own)

    return tuple(e for e, layer in enumerate(layers) if changes(layer))
