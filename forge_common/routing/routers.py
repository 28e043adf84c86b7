"""Who speaks: gates over candidates (the trunk first, then the modules by name) for every token.

| router | what it looks at | what it needs of a module |
| --- | --- | --- |
| context | the tokens of the document so far | counts of tokens and of pairs |
| learned | each layer's normed hidden state, token by token | the router row that was trained beside it (kind expert) |
| ridge | the same | moments of hidden states; solved in closed form |
| uniform | nothing | nothing |

A router is re-solved whenever a module joins or leaves; no text is needed again.

B batch, T time, E candidates, D width, V vocabulary
"""

from dataclasses import dataclass

import torch

from .statistics import bigram_bucket, decode, projection

BACKOFF = 200.0  # occurrences of a token that weigh as much as its pairs' fallback on single tokens
RIDGE = 1e-2  # of the mean of the diagonal, added to it
CALIBRATED = {  # router -> which of its numbers (Tuning) `assemble --calibrate` fits
    "context": ("temperature", "trunk_share"),
    "learned": ("trunk_share",),
    "ridge": ("sharpness", "trunk_share"),
    "uniform": ("trunk_share",),
}
ROUTERS = tuple(CALIBRATED)
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Tuning:
    """A router's handful of numbers. Measured defaults: docs/RESULTS.md. ValueError where the gates would be no numbers."""

    temperature: float = 0.2  # weight of a token's evidence
    switch: float = 0.02  # the chance that the domain changes at a token
    own: float = 1.0  # weight of what each head itself gave the tokens so far, in the mixture of the outputs
    trunk_share: float = 1.0  # of the prior, beside 1 for each module
    sharpness: float = 10.0  # of ridge: softmax(sharpness * regression)

    def __post_init__(self):
        bounds = {"switch": (0, 1), "trunk_share": (1e-9, 1e9)}
        for name, value in vars(self).items():
            least, most = bounds.get(name, (0, 1e9))
            if not least <= value <= most:
                raise ValueError(f"a {name} of {value}, which must lie from {least} to {most}")


@dataclass
class State:
    """What a router remembers of the tokens so far."""

    gates: torch.Tensor | None  # [B, E] of the layers, after the last token
    outputs: torch.Tensor | None  # [B, E] of the heads
    last: torch.Tensor  # [B, 1]: the last id, -1 where unknown
    spoken: torch.Tensor | None = None  # [B, 1, V, E]: what each head gave the token that comes next


class ContextRouter:
    """Bayes' rule over the document so far: a hidden Markov model whose states are the candidates.

    The likelihood of a token under a candidate is a bigram that falls back on single tokens, from its counts; an EOS
    resets to the prior. Only tokens up to t decide the gates at t.
    """

    def __init__(self, statistics: list[Tensors], prior: torch.Tensor, eos_token_id: int, tuning: Tuning):
        self.eos, self.tuning, self.prior = eos_token_id, tuning, prior
        self.unigrams, self.bigrams = (
            torch.stack([decode(own[name]) for own in statistics]) for name in ("unigrams", "bigrams")
        )
        self.totals = self.unigrams.sum(1)

    def to(self, device: torch.device) -> "ContextRouter":
        for name in ("prior", "unigrams", "bigrams", "totals"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def start(self, batch: int, *, at_document: bool) -> State:
        """Nothing known yet. at_document: a document begins here; otherwise what came before is unknown."""
        last = torch.full((batch, 1), self.eos if at_document else -1, device=self.prior.device)
        prior = self.prior.expand(batch, -1)
        return State(prior, prior, last)

    def scores(self, tokens: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """log p_e(x_t | x_t-1) for tokens [B, T] after `last` [B, 1]: [B, T, E]; 0 where a token is -1."""
        previous, token = torch.cat((last, tokens[:, :-1]), dim=1), tokens.clamp(min=0)
        single = (self.unigrams[:, token] + 1) / (self.totals + self.unigrams.shape[1])[:, None, None]
        after = self.unigrams[:, previous.clamp(min=0)]
        double = (self.pairs(previous.clamp(min=0), token) + BACKOFF * single) / (after + BACKOFF)
        return (torch.where(previous >= 0, double, single).log() * (tokens >= 0)).permute(1, 2, 0)

    def pairs(self, previous: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        """How often a pair was seen, at most: what its bucket holds, but no more than either token: [E, B, T]."""
        found = self.bigrams[:, bigram_bucket(previous, token)]
        return found.minimum(self.unigrams[:, previous]).minimum(self.unigrams[:, token])

    def filter(self, evidence: torch.Tensor, tokens: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """Gates [B, T, E] from evidence [B, T, E] (weighted log likelihoods), from `start` [B, E] on."""
        likelihood = (evidence - evidence.amax(-1, keepdim=True)).exp().transpose(0, 1).contiguous()
        reset = (tokens == self.eos).T.unsqueeze(-1)
        any_reset = reset.flatten(1).any(1).tolist()
        gates, found = start, []
        stay, arrive = 1 - self.tuning.switch, self.tuning.switch * self.prior
        for t in range(len(likelihood)):
            gates = (gates * stay + arrive) * likelihood[t]
            gates = gates / gates.sum(-1, keepdim=True)
            if any_reset[t]:
                gates = torch.where(reset[t], self.prior, gates)
            found.append(gates)
        return torch.stack(found, dim=1)

    def route(self, tokens: torch.Tensor, state: State) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gates [B, T, E], the evidence behind them, and the last of `tokens` [B, T]."""
        evidence = self.tuning.temperature * self.scores(tokens, state.last)
        gates = self.filter(evidence, tokens, state.gates)
        return gates, evidence, tokens[:, -1:]

    def weigh(self, tokens, evidence, given, start) -> torch.Tensor:
        """Weights [B, T, E] of the heads, which hear as well what each gave the tokens so far: given [B, T, E], log p."""
        return self.filter(evidence + self.tuning.own * given, tokens, start)


class LearnedRouter:
    """The rows that were trained beside each module, side by side: softmax over [0 (the trunk), row_e(x)]."""

    def __init__(self, rows: list[list], prior: torch.Tensor):
        """rows: per candidate but the trunk, per layer, nn.Linear(D, 1), or None where it has none."""
        self.rows, self.prior = rows, prior

    def layer(self, index: int, normed: torch.Tensor) -> torch.Tensor:
        """normed [B, T, D] -> gates [B, T, E]."""
        logits = [normed.new_zeros(*normed.shape[:2], 1)]
        logits += [
            row(normed) if row is not None else torch.full_like(logits[0], -torch.inf) for row in self._at(index)
        ]
        return (torch.cat(logits, dim=-1) + self.prior.to(normed).log()).softmax(-1)

    def _at(self, index: int) -> list:
        return [layers[index] for layers in self.rows]


class RidgeRouter:
    """W = (mean of E[x x'] + lambda I)^-1 E[x y] from each module's moments; gates = softmax(sharpness * x W).

    Source: DUME, arXiv 2603.29765, with equal weight for each module, so that none drowns in the others' text.
    """

    def __init__(self, statistics: list[Tensors], prior: torch.Tensor, hidden_size: int, tuning: Tuning):
        second = torch.stack([own["second"].double() for own in statistics]).mean(0)
        first = torch.stack([own["first"].double() for own in statistics], dim=-1) / len(statistics)
        eye = torch.eye(second.shape[-1], dtype=second.dtype)
        scale = second.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
        weights, failed = torch.linalg.solve_ex(second + RIDGE * scale * eye, first)
        self.weights = weights.float()  # [L, d, E - 1]
        if failed.any() or not torch.isfinite(self.weights).all():
            raise ValueError("the modules' moments have no ridge regression")
        self.prior, self.tuning, self.projection = prior, tuning, projection(hidden_size)

    def layer(self, index: int, normed: torch.Tensor) -> torch.Tensor:
        """normed [B, T, D] -> gates [B, T, E]; the trunk, which has no text of its own here, keeps its prior."""
        prior = self.prior.to(normed)
        regression = normed @ self.projection.to(normed) @ self.weights[index].to(normed) * self.tuning.sharpness
        modules = (regression + prior[1:].log()).softmax(-1)
        return torch.cat((prior[:1].expand(*normed.shape[:2], 1), modules * (1 - prior[0])), dim=-1)


class UniformRouter:
    """The prior everywhere."""

    def __init__(self, prior: torch.Tensor):
        self.prior = prior

    def layer(self, index: int, normed: torch.Tensor) -> torch.Tensor:
        return self.prior.to(normed).expand(*normed.shape[:2], -1)
