"""What the assembled model is compared with: soups, ensembles, a random router, and the true labels.

B batch, T time, E candidates, D width
"""

import copy
from collections.abc import Callable
from typing import Any

import torch

from forge_common.model.trunk import Trunk
from forge_common.routing.mixture import Mixture
from forge_common.routing.routers import ContextRouter, State


def soup(models: list[Trunk]) -> Trunk:
    """The mean of the models' weights."""
    whole = Trunk(models[0].config)
    states = [model.state_dict() for model in models]
    whole.load_state_dict({name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]})
    return whole.eval()


class Ensemble:
    """Whole models side by side, one pass per model; weights by the probability that each gave the document so far.

    With an even prior, as in Branch-Train-Merge (arXiv 2208.03306). `router` provides the filter. counts: the weights
    hear what the assembled model's output weights do: also the router's counts and its prior, and the text before a
    window.
    """

    names, weights = ("ensemble",), None  # its gates are not reported

    def __init__(self, models: list[Trunk], router: ContextRouter, *, counts: bool = False):
        self.models, self.config, self.counts = models, models[0].config, counts
        self.router = copy.copy(router)
        if not counts:
            self.router.prior = torch.full((len(models),), 1 / len(models))

    def to(self, device):
        for model in self.models:
            model.to(device)
        return self

    def eval(self):
        return self

    @torch.no_grad()
    def nats(self, tokens: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
        inputs, labels = self.models[0].split(tokens)
        labels, inputs = labels.cpu(), inputs.cpu()
        before = None if before is None else before.cpu()
        log_p = torch.stack([-model.nats(tokens, before).cpu() for model in self.models], dim=-1)
        earlier = torch.cat((torch.zeros_like(log_p[:, :1]), log_p[:, :-1]), dim=1)
        if self.counts:
            weights = self._heard(inputs, before, earlier)
        else:
            weights = self.router.filter(earlier, inputs, self.router.prior.expand(len(tokens), -1))
        mixed = -torch.logsumexp(weights.log() + log_p, dim=-1)
        return mixed.masked_fill(labels == self.config.ignore_index, 0)

    def _heard(self, inputs: torch.Tensor, before: torch.Tensor | None, earlier: torch.Tensor) -> torch.Tensor:
        """The gates [B, T, E] that the assembled model's output weights would be, from log p of these models."""
        router = self.router
        state = router.start(len(inputs), at_document=before is None)
        if before is not None:
            filtered, _ = router.route(before, state)
            state = State(filtered[:, -1], filtered[:, -1], torch.cat((state.history, before), dim=1))
        _, evidence = router.route(inputs, state)
        return router.gates(router.weigh(inputs, evidence, earlier, state.outputs), mixed=True)


class DrawnRouter:
    """The original system's router, which was not trained: random rows over the modules, without the trunk."""

    def __init__(self, layers: int, hidden_size: int, modules: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.rows = torch.randn(layers, hidden_size, modules, generator=generator) * hidden_size**-0.5

    def layer(self, index: int, normed: torch.Tensor) -> torch.Tensor:
        gates = (normed @ self.rows[index].to(normed)).softmax(-1)
        return torch.cat((torch.zeros_like(gates[..., :1]), gates), dim=-1)


class FixedGates:
    """Gates [E], or [B, T, E], that do not depend on the text: of the layers, and of the output weights."""

    def __init__(self, gates: torch.Tensor):
        self.gates = gates

    def layer(self, index: int, normed: torch.Tensor) -> torch.Tensor:
        return self.gates.to(normed).expand(*normed.shape[:2], -1)


class TrueLabels:
    """The assembled model with the gates of the true domain of each predicted token.

    choice: for each domain's number, its candidate; labels [windows, T + 1], in the order of the windows.
    """

    def __init__(self, mixture: Mixture, choice: list[int], labels: torch.Tensor):
        self.mixture = mixture
        self.choice, self.labels, self.place = torch.tensor(choice), labels, 0

    def to(self, device):
        self.mixture.to(device)
        return self

    def nats(self, tokens: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
        labels = self.labels[self.place : self.place + len(tokens), 1 : tokens.shape[1]]
        self.place += len(tokens)
        gates = torch.nn.functional.one_hot(self.choice[labels], len(self.mixture.names)).float()
        return with_router(self.mixture, FixedGates(gates)).nats(tokens)


def with_router(mixture: Mixture, router: Any, top_k: int = 0) -> Mixture:
    """The same candidates with another router."""
    modules = dict(zip(mixture.names[1:], list(mixture.candidates)[1:], strict=True))
    return Mixture(mixture.candidates[0], modules, router, top_k=top_k).eval()


STEPS = (0.3, 0.1)  # of the search for constant gates
ROUNDS = 4


def constant_gates(mixture: Mixture, loss: Callable[[Mixture], float]) -> torch.Tensor:
    """Gates [E] with a low loss: from the best candidate alone, steps towards others while one lowers it."""
    corners = list(torch.eye(len(mixture.names)))
    losses = [loss(with_router(mixture, FixedGates(gates))) for gates in corners]
    lowest = min(losses)
    best = corners[losses.index(lowest)]
    for _ in range(ROUNDS):
        moved = [best + step * (corner - best) for corner in corners for step in STEPS]
        losses = [loss(with_router(mixture, FixedGates(gates))) for gates in moved]
        if min(losses) >= lowest:
            break
        lowest = min(losses)
        best = moved[losses.index(lowest)]
    return best
