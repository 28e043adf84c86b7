"""What the assembled model is compared with: soups, ensembles, a random router, and the true labels.

B batch, T time, E candidates, D width
"""

import copy

import torch

from forge_common.model.trunk import Trunk
from forge_common.routing.mixture import Mixture
from forge_common.routing.routers import ContextRouter


def soup(models: list[Trunk]) -> Trunk:
    """The mean of the models' weights."""
    whole = Trunk(models[0].config)
    states = [model.state_dict() for model in models]
    whole.load_state_dict({name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]})
    return whole.eval()


class Ensemble:
    """Whole models side by side, one pass per model; weights by the probability that each gave the document so far.

    The posterior over the models with an even prior, as in Branch-Train-Merge (arXiv 2208.03306). `router` provides only the
    filter; the evidence of its counts is not used.
    """

    names, weights = ("ensemble",), None  # its gates are not reported

    def __init__(self, models: list[Trunk], router: ContextRouter):
        self.models, self.config = models, models[0].config
        self.router = copy.copy(router)
        self.router.prior = torch.full((len(models),), 1 / len(models))

    def to(self, device):
        return self

    def eval(self):
        return self

    @torch.no_grad()
    def nats(self, tokens: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
        inputs, labels = self.models[0].split(tokens)
        log_p = torch.stack([-model.nats(tokens, before) for model in self.models], dim=-1)
        earlier = torch.cat((torch.zeros_like(log_p[:, :1]), log_p[:, :-1]), dim=1)
        start = self.router.prior.expand(len(tokens), -1)
        weights = self.router.filter(earlier, inputs, start)
        mixed = -torch.logsumexp(weights.log() + log_p, dim=-1)
        return mixed.masked_fill(labels == self.config.ignore_index, 0)


class DrawnRouter:
    """The original system's router, which was not trained: random rows over the modules, without the trunk."""

    def __init__(self, layers: int, hidden_size: int, modules: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.rows = torch.randn(layers, hidden_size, modules, generator=generator) * hidden_size**-0.5

    def layer(self, index: int, normed: torch.Tensor) -> torch.Tensor:
        gates = (normed @ self.rows[index]).softmax(-1)
        return torch.cat((torch.zeros_like(gates[..., :1]), gates), dim=-1)


class TrueLabels:
    """The assembled model with the gates of the true domain of each predicted token.

    choice: for each domain's number, its candidate; labels [windows, T + 1], in the order of the windows.
    """

    names, weights = ("labels",), None  # its gates are not reported

    def __init__(self, mixture: Mixture, choice: list[int], labels: torch.Tensor):
        self.mixture, self.config = mixture, mixture.config
        self.choice, self.labels, self.place = torch.tensor(choice), labels, 0

    @torch.no_grad()
    def nats(self, tokens: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
        labels = self.labels[self.place : self.place + len(tokens), 1 : tokens.shape[1]]
        self.place += len(tokens)
        gates = torch.nn.functional.one_hot(self.choice[labels], len(self.mixture.names)).float()
        router, self.mixture.router = self.mixture.router, _FixedGates(gates)
        try:
            return self.mixture.nats(tokens)
        finally:
            self.mixture.router = router


class _FixedGates:
    def __init__(self, gates: torch.Tensor):
        self.gates = gates

    def layer(self, index: int, normed: torch.Tensor) -> torch.Tensor:
        return self.gates
