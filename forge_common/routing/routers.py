"""Routers: gates over the candidates (the trunk first, then the modules by name) for every token.

| router | input | needs of a module |
| --- | --- | --- |
| context | the tokens of the document so far | counts of tokens and of pairs of tokens |
| learned | each layer's normed hidden state of the token | the router row trained with it (kind expert) |
| ridge | each layer's normed hidden state of the token | moments of hidden states; solved in closed form |
| uniform | none | nothing |

When a module is added or left out, the router is computed again from the others' statistics; that needs no text.

B batch, T time, P time before it, E candidates, S = E + 1 states of the filter, D width, V vocabulary
"""

from dataclasses import dataclass

import numpy as np
import torch

from .statistics import bigram_bucket, decode, projection
from .tuning import Tuning

SMOOTHING = 1000.0  # weight, in tokens, of the mean of all candidates' unigrams in a candidate's own
BACKOFF = 200.0  # weight, in pairs, of the smoothed probabilities in the pair's
COLLISIONS = 0.3  # added to it for each pair after a token beyond the token's own count: such pairs only share a bucket
SHARED = 0.5  # share of the back-off that is the mean of all candidates' pairs; the rest is the candidate's unigrams
DOCUMENT = 100.0  # weight, in tokens, of the mean of all candidates in the document's own counts
NEAR_COPY = 64  # power of the similarity of two modules' unigrams: 0.98 counts as 0.27 of a copy, 0.9 as 0.001
NONE = -2  # no token's id, and not that of an unknown one
RIDGE = 1e-2  # added to the diagonal, as a share of its mean
Tensors = dict[str, torch.Tensor]


@dataclass
class State:
    """A router's state after the tokens so far. The S states of its filters: the candidates, and the unknown domain."""

    layers: torch.Tensor
    """[B, S] on the CPU: probabilities of the states, from which the layers' gates follow."""
    outputs: torch.Tensor
    """[B, S] on the CPU: the same for the output weights."""
    history: torch.Tensor
    """[B, P] on the CPU: the ids so far, -1 (on the left) where unknown."""
    next_log_p: torch.Tensor | None = None
    """[B, 1, V, E] on the device: log probabilities of the next token under each head."""


class ContextRouter:
    """Bayes' rule over the document so far: the forward filter of a hidden Markov model. Its states are the candidates.

    The likelihood of a token under a candidate is its probability after the token before it, from the candidate's
    counts. Each candidate's probabilities sum to 1 over the vocabulary. The fewer counts a candidate has, the closer
    its probabilities are to the mean of all candidates, which favours none. Tokens that the document repeats count
    less. One more state is the unknown domain, whose probabilities are the mean of all candidates'. The gates at t depend
    only on the tokens up to t. All tensors are on the CPU.

    An EOS resets the filter to the prior, unless the trunk attends across documents: there an EOS may also end a turn
    of a chat, as in SmolLM2's template, and the answer belongs to the question.
    """

    def __init__(
        self, statistics: list[Tensors], prior: torch.Tensor, eos_token_id: int, tuning: Tuning, *, across: bool = False
    ):
        """statistics: of each candidate, the trunk first. prior [E]. across: whether the trunk attends across documents."""
        self.eos = eos_token_id
        self.end = NONE if across else eos_token_id  # the id that ends a document
        self.tuning = tuning
        unigrams = torch.stack([decode(tensors["unigrams"]) for tensors in statistics])
        totals = unigrams.sum(1, keepdim=True)
        observed = (unigrams + 1) / (totals + unigrams.shape[1])
        # Copies of a module share one prior, and a module without counts has none.
        root = observed[1:].double().sqrt()
        copies = (root @ root.T).pow(NEAR_COPY).sum(1)
        counted = totals[1:, 0].double() / (totals[1:, 0] + SMOOTHING)
        weights = torch.cat((prior[:1].double(), prior[1:].double() * counted / copies))
        self.shares = (weights / weights.sum()).float()  # [E]: in a mean of all candidates
        self.prior = torch.cat((self.shares * (1 - tuning.unknown), self.shares.new_tensor([tuning.unknown])))  # [S]
        # In NumPy, since for one token the call of a torch function takes longer than the arithmetic. `take` is faster
        # than indexing.
        self.count_of = decode(torch.arange(256)).numpy()
        self.unigram_codes = torch.stack([tensors["unigrams"] for tensors in statistics]).numpy()
        self.bigram_codes = torch.stack([tensors["bigrams"] for tensors in statistics]).numpy()
        self.unigram_p = ((unigrams + SMOOTHING * (self.shares @ observed)) / (totals + SMOOTHING)).numpy()
        self.pairs_after = np.full_like(self.unigram_p, -1)  # [E, V]: sums over the next token; -1 until one is needed

    def start(self, batch: int, *, at_document: bool) -> State:
        """The state with the prior. at_document: a document begins here; otherwise the token before is unknown."""
        history = torch.full((batch, 1), self.eos if at_document else -1)
        prior = self.prior.expand(batch, -1)
        return State(prior, prior, history)

    def log_p(self, tokens: torch.Tensor, history: torch.Tensor) -> torch.Tensor:
        """log p_s(x_t | x_<t) of tokens [B, T] after `history` [B, P]: [B, T, S]; 0 where a token is -1."""
        seen = torch.cat((history, tokens), dim=1).numpy()
        first = history.shape[1]
        previous, token = seen[:, first - 1 : -1], seen[:, first:]
        p = self.pair_p(previous, token)  # [E, B, T]
        mean = self._mean(p)
        times, length = repeats(seen, first, self.end)
        document = (times + DOCUMENT * mean) / (length + DOCUMENT)
        p = (1 - self.tuning.repeats) * np.concatenate((p, mean[None])) + self.tuning.repeats * document
        log_p = np.where(token >= 0, np.log(p), 0)
        return torch.from_numpy(log_p.transpose(1, 2, 0).astype(np.float32))

    def pair_p(self, previous: np.ndarray, token: np.ndarray) -> np.ndarray:
        """p_e(token | previous), both [B, T], from the counts: [E, B, T]; p_e(token) where the previous one is -1."""
        before = np.maximum(previous, 0)
        token = np.maximum(token, 0)
        unigram = self.unigram_p.take(token, axis=1)
        pairs = self.pairs(before, token)
        after = self._pairs_after(before)
        weight = BACKOFF + COLLISIONS * np.maximum(
            after - self.count_of.take(self.unigram_codes.take(before, axis=1)), 0
        )
        total = after + weight
        back = weight * unigram
        shared = self._mean((pairs + back) / total)
        bigram = (pairs + weight * SHARED * shared + (1 - SHARED) * back) / total
        return np.where(previous >= 0, bigram, unigram)

    def pairs(self, previous: np.ndarray, token: np.ndarray) -> np.ndarray:
        """Upper bound [E, B, T] of the count of a pair: the least of the counts of its bucket and of its two tokens."""
        of_bucket = self.bigram_codes.take(bigram_bucket(previous, token), axis=1)
        of_tokens = np.minimum(self.unigram_codes.take(previous, axis=1), self.unigram_codes.take(token, axis=1))
        return self.count_of.take(np.minimum(of_bucket, of_tokens))  # codes have the order of their counts

    def _pairs_after(self, previous: np.ndarray) -> np.ndarray:
        """The sum [E, B, T] of `pairs` over all tokens after `previous` [B, T], computed once for each distinct one."""
        sums = self.pairs_after.take(previous, axis=1)
        if (sums[0] >= 0).all():
            return sums
        every = np.arange(self.unigram_codes.shape[1])
        for token in np.unique(previous[sums[0] < 0]):
            bucket = bigram_bucket(token, every)
            self.pairs_after[:, token] = 0  # where a candidate has not counted the token
            for e in np.flatnonzero(self.unigram_codes[:, token]):  # one candidate's codes fit into a core's cache
                codes = np.minimum(self.bigram_codes[e].take(bucket), self.unigram_codes[e])
                codes = np.minimum(codes, self.unigram_codes[e, token])
                self.pairs_after[e, token] = self.count_of.take(codes).sum()
        return self.pairs_after.take(previous, axis=1)

    def _mean(self, p: np.ndarray) -> np.ndarray:
        """The candidates' mean [B, T] of p [E, B, T]."""
        return (self.shares.numpy() @ p.reshape(len(p), -1)).reshape(p.shape[1:])

    def filter(self, evidence: torch.Tensor, tokens: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """The filter [B, T, S] after evidence [B, T, S] (weighted log likelihoods), from `start` [B, S].

        In NumPy, since each step has few operations on few numbers (B x S), and calls of NumPy are faster than torch's.
        """
        scores = evidence.double().numpy().transpose(1, 0, 2)
        likelihood = np.exp(scores - scores.max(-1, keepdims=True))
        reset = (tokens.numpy() == self.end).T[..., None]
        resets = reset.any((1, 2))
        prior = self.prior.double().numpy()
        belief = start.double().numpy()
        stay = 1 - self.tuning.switch
        arrive = self.tuning.switch * prior
        sequence = np.empty(likelihood.shape)
        for t in range(len(sequence)):
            belief = (belief * stay + arrive) * likelihood[t]
            belief /= np.add.reduce(belief, -1, keepdims=True)
            if resets[t]:
                belief = np.where(reset[t], prior, belief)
            sequence[t] = belief
        return torch.from_numpy(sequence.transpose(1, 0, 2)).to(evidence)

    def gates(self, states: torch.Tensor, *, mixed: bool) -> torch.Tensor:
        """Gates [..., E] of the filter's states [..., S].

        mixed: all candidates serve an unknown domain, by their prior; otherwise the trunk alone does.
        """
        known, unknown = states[..., :-1], states[..., -1:]
        if mixed:
            return known + unknown * self.shares
        return torch.cat((known[..., :1] + unknown, known[..., 1:]), dim=-1)

    def route(self, tokens: torch.Tensor, state: State) -> tuple[torch.Tensor, torch.Tensor]:
        """The layers' filter and its evidence, both [B, T, S], for tokens [B, T]."""
        evidence = self.tuning.temperature * self.log_p(tokens, state.history)
        return self.filter(evidence, tokens, state.layers), evidence

    def weigh(self, tokens, evidence, log_p, start) -> torch.Tensor:
        """The output weights' filter [B, T, S]. Its evidence has also each head's log p [B, T, E] of the tokens."""
        unknown = torch.logsumexp(log_p + self.shares.log(), dim=-1, keepdim=True)
        heads = torch.cat((log_p, unknown), dim=-1)
        return self.filter(evidence + self.tuning.own * heads, tokens, start)


def repeats(seen: np.ndarray, first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """For each token of seen [B, first + T] from `first` on: how often its document had it before, and how many tokens
    the document had before it.

    Both [B, T]. In `seen`, -1 (on the left) is an unknown token. `end`, the id that ends a document, belongs to it.
    """
    place = np.arange(seen.shape[1])
    ends = seen == end
    begins = np.zeros_like(ends)
    begins[:, 1:] = ends[:, :-1]
    begins[:, 1] = True  # the first id is of no document: `start` has put it there
    begin = np.maximum.accumulate(np.where(begins, place, 0), axis=1)  # place of the first token of each one's document
    begin = np.maximum(begin, (seen[:, :first] < 0).sum(1, keepdims=True))
    length = (place - begin)[:, first:]
    if first + 1 == seen.shape[1]:  # one generated token: it is compared with those before it
        times = ((seen[:, :-1] == seen[:, -1:]) & (place[:-1] >= begin[:, -1:])).sum(1, keepdims=True)
        return times, np.maximum(length, 0)
    # Sorted by document and id, equal tokens of a document are side by side in their order: how many of them are before
    # a token is its distance from the first of them.
    key = np.cumsum(begins, axis=1) * (seen.max() + 2) + seen
    order = key.argsort(axis=1, kind="stable")
    ordered = np.take_along_axis(key, order, axis=1)
    new = np.ones_like(ends)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    earlier = place - np.maximum.accumulate(np.where(new, place, 0), axis=1)
    times = np.empty_like(earlier)
    np.put_along_axis(times, order, earlier, axis=1)
    return times[:, first:], np.maximum(length, 0)


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
