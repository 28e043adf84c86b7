"""Routers: gates over the candidates (the trunk first, then the modules by name) for every token.

| router | input | needs of a module |
| --- | --- | --- |
| context | the tokens of the document so far | counts of tokens and of pairs of tokens |
| learned | each layer's normed hidden state of the token | the router row trained with it (kind expert) |
| ridge | each layer's normed hidden state of the token | moments of hidden states; solved in closed form |
| uniform | none | nothing |

A router is solved again when a module is added or left out; that needs no text.

B batch, T time, E candidates, D width, V vocabulary
"""

from dataclasses import dataclass

import torch

from .statistics import bigram_bucket, decode, projection
from .tuning import Tuning

BACKOFF = 200.0  # weight, in occurrences of the previous token, of the unigrams in the bigram probability
RIDGE = 1e-2  # added to the diagonal, as a share of its mean
Tensors = dict[str, torch.Tensor]


@dataclass
class State:
    """A router's state after the tokens so far."""

    gates: torch.Tensor  # [B, E]: of the layers
    outputs: torch.Tensor  # [B, E]: output weights of the heads
    last: torch.Tensor  # [B, 1]: the last id, -1 where unknown
    next_log_p: torch.Tensor | None = None  # [B, 1, V, E]: log probabilities of the next token under each head


class ContextRouter:
    """Bayes' rule over the document so far: the forward filter of a hidden Markov model whose states are the candidates.

    The likelihood of a token under a candidate is its bigram probability, smoothed by unigrams, from the candidate's counts.
    An EOS resets the gates to the prior. The gates at t depend on the tokens up to t alone.
    """

    def __init__(self, statistics: list[Tensors], prior: torch.Tensor, eos_token_id: int, tuning: Tuning):
        self.eos = eos_token_id
        self.tuning = tuning
        self.prior = prior
        self.unigrams = torch.stack([decode(tensors["unigrams"]) for tensors in statistics])
        self.bigrams = torch.stack([decode(tensors["bigrams"]) for tensors in statistics])
        self.totals = self.unigrams.sum(1)

    def to(self, device: torch.device) -> "ContextRouter":
        for name in ("prior", "unigrams", "bigrams", "totals"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def start(self, batch: int, *, at_document: bool) -> State:
        """The prior. at_document: whether a document begins here; otherwise the token before is unknown."""
        last = torch.full((batch, 1), self.eos if at_document else -1, device=self.prior.device)
        prior = self.prior.expand(batch, -1)
        return State(prior, prior, last)

    def scores(self, tokens: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """log p_e(x_t | x_t-1) for tokens [B, T] after `last` [B, 1]: [B, T, E]; 0 where a token is -1."""
        previous = torch.cat((last, tokens[:, :-1]), dim=1)
        token = tokens.clamp(min=0)
        unigram = (self.unigrams[:, token] + 1) / (self.totals + self.unigrams.shape[1])[:, None, None]
        occurrences = self.unigrams[:, previous.clamp(min=0)]
        bigram = (self.pairs(previous.clamp(min=0), token) + BACKOFF * unigram) / (occurrences + BACKOFF)
        return (torch.where(previous >= 0, bigram, unigram).log() * (tokens >= 0)).permute(1, 2, 0)

    def pairs(self, previous: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        """Upper bound of the count of a pair: of its bucket, and of either token: [E, B, T]."""
        in_bucket = self.bigrams[:, bigram_bucket(previous, token)]
        return in_bucket.minimum(self.unigrams[:, previous]).minimum(self.unigrams[:, token])

    def filter(self, evidence: torch.Tensor, tokens: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """Gates [B, T, E] from evidence [B, T, E] (weighted log likelihoods) and the gates `start` [B, E] before it."""
        likelihood = (evidence - evidence.amax(-1, keepdim=True)).exp().transpose(0, 1).contiguous()
        reset = (tokens == self.eos).T.unsqueeze(-1)
        any_reset = reset.flatten(1).any(1).tolist()
        gates = start
        sequence = []
        stay = 1 - self.tuning.switch
        arrive = self.tuning.switch * self.prior
        for t in range(len(likelihood)):
            gates = (gates * stay + arrive) * likelihood[t]
            gates = gates / gates.sum(-1, keepdim=True)
            if any_reset[t]:
                gates = torch.where(reset[t], self.prior, gates)
            sequence.append(gates)
        return torch.stack(sequence, dim=1)

    def route(self, tokens: torch.Tensor, state: State) -> tuple[torch.Tensor, torch.Tensor]:
        """Gates and their evidence, both [B, T, E], for tokens [B, T]."""
        evidence = self.tuning.temperature * self.scores(tokens, state.last)
        return self.filter(evidence, tokens, state.gates), evidence

    def weigh(self, tokens, evidence, log_p, start) -> torch.Tensor:
        """Output weights [B, T, E]: the filter with the heads' log p [B, T, E] of the tokens so far added to the evidence."""
        return self.filter(evidence + self.tuning.own * log_p, tokens, start)


class LearnedRouter:
    """The router rows that were trained with the modules: softmax over [0 (the trunk), row_e(x)]."""

    def __init__(self, rows: list[list], prior: torch.Tensor):
        """rows: for each module, for each layer, nn.Linear(D, 1), or None where it has none."""
        self.rows = rows
        self.prior = prior

    def layer(self, index: int, normed: torch.Tensor) -> torch.Tensor:
        """normed [B, T, D] -> gates [B, T, E]."""
        logits = [normed.new_zeros(*normed.shape[:2], 1)]
        for layers in self.rows:
            row = layers[index]
            logits.append(torch.full_like(logits[0], -torch.inf) if row is None else row(normed))
        return (torch.cat(logits, dim=-1) + self.prior.to(normed).log()).softmax(-1)


class RidgeRouter:
    """W = (mean of E[x x'] + lambda I)^-1 E[x y] from each module's moments; gates = softmax(sharpness * x W).

    Source: DUME, arXiv 2603.29765, here with the same weight for each module, whatever the amount of its text.
    """

    def __init__(self, statistics: list[Tensors], prior: torch.Tensor, hidden_size: int, tuning: Tuning):
        second = torch.stack([tensors["second"].double() for tensors in statistics]).mean(0)
        first = torch.stack([tensors["first"].double() for tensors in statistics], dim=-1) / len(statistics)
        eye = torch.eye(second.shape[-1], dtype=second.dtype)
        scale = second.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
        weights, failed = torch.linalg.solve_ex(second + RIDGE * scale * eye, first)
        self.weights = weights.float()  # [L, d, E - 1]
        if failed.any() or not torch.isfinite(self.weights).all():
            raise ValueError("the ridge system of the modules' moments is singular")
        self.prior = prior
        self.tuning = tuning
        self.projection = projection(hidden_size)

    def layer(self, index: int, normed: torch.Tensor) -> torch.Tensor:
        """normed [B, T, D] -> gates [B, T, E]; the trunk's is its prior, since the regression has no text of the trunk."""
        prior = self.prior.to(normed)
        regression = normed @ self.projection.to(normed) @ self.weights[index].to(normed) * self.tuning.sharpness
        modules = (regression + prior[1:].log()).softmax(-1)
        return torch.cat((prior[:1].expand(*normed.shape[:2], 1), modules * (1 - prior[0])), dim=-1)


class UniformRouter:
    """The prior for every token."""

    def __init__(self, prior: torch.Tensor):
        self.prior = prior

    def layer(self, index: int, normed: torch.Tensor) -> torch.Tensor:
        return self.prior.to(normed).expand(*normed.shape[:2], -1)
