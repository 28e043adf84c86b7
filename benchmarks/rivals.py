"""What the assembled model is compared with: soups, ensembles, a random router, and labels that are told.

B batch, T time, E candidates, D width
"""

import copy
from dataclasses import replace

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
    """Whole models side by side, as many passes as models; weights by what each gave the document so far.

    Branch-train-merge's way (arXiv 2208.03306): the posterior over the models, with an even prior. `router` gives the
    filter: its own evidence is not heard.
    """

    names, weights = ("ensemble",), None  # its gates are not reported

    def __init__(self, models: list[Trunk], router: ContextRouter):
        self.models, self.config = models, models[0].config
        self.router = copy.copy(router)
        self.router.prior = torch.full((len(models),), 1 / len(models))
        self.router.tuning = replace(router.tuning, own=1.0)

    def to(self, device):
        return self

    def eval(self):
        return self

    @torch.no_grad()
    def nats(self, tokens: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
        inputs, labels = self.models[0].split(tokens)
        spoken = torch.stack([-model.nats(tokens, before) for model in self.models], dim=-1)
        given = torch.cat((torch.zeros_like(spoken[:, :1]), spoken[:, :-1]), dim=1)
        start = self.router.prior.expand(len(tokens), -1)
        weights = self.router.weigh(inputs, torch.zeros_like(given), given, start)
        mixed = -torch.logsumexp(weights.log() + spoken, dim=-1)
        return mixed.masked_fill(labels == self.config.ignore_index, 0)


class DrawnRouter:
    """The original system's router, which nobody trained: random rows over the modules, the trunk is no candidate."""

    def __init__(self, layers: int, hidden_size: int, modules: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.rows = torch.randn(layers, hidden_size, modules, generator=generator) * hidden_size**-0.5

    def layer(self, index: int, normed: torch.Tensor) -> torch.Tensor:
        gates = (normed @ self.rows[index]).softmax(-1)
        return torch.cat((torch.zeros_like(gates[..., :1]), gates), dim=-1)


class Told:
    """The assembled model, told whose text each token that it is to name belongs to.

    choice: for each domain's number, the candidate that is to speak; labels [windows, T + 1], windows in turn.
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
        router, self.mixture.router = self.mixture.router, _Given(gates)
        try:
            return self.mixture.nats(tokens)
        finally:
            self.mixture.router = router


class _Given:
    def __init__(self, gates: torch.Tensor):
        self.gates = gates

    def layer(self, index: int, normed: torch.Tensor) -> torch.Tensor:
        return self.gates
