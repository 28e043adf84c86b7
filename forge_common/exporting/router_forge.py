"""The router of Forge's assembled model: how well each candidate's counts predict the document so far.

The likelihood of a token under a candidate is its probability after the token before it, from the candidate's counts of
tokens and of pairs of tokens. The fewer counts a candidate has, the closer its probabilities are to the mean of all
candidates, which favours none. Tokens that the document repeats count less. One more state is the unknown domain, whose
probabilities are the mean of all candidates'. An EOS resets the filter to the prior, unless the trunk attends across
documents.

B batch, T time, E candidates (the trunk first, then the modules), S = E + 1 states of the filter, V vocabulary
"""

import numpy as np
import torch
from torch import nn

from .configuration_forge import ForgeConfig

BIGRAM_BUCKETS = 1 << 17
SMOOTHING = 1000.0  # weight, in tokens, of the mean of all candidates' unigrams in a candidate's own
BACKOFF = 200.0  # weight, in pairs, of the smoothed probabilities in the pair's
COLLISIONS = 0.3  # added to it for each pair after a token beyond the token's own count: such pairs only share a bucket
SHARED = 0.5  # share of the back-off that is the mean of all candidates' pairs; the rest is the candidate's unigrams
DOCUMENT = 100.0  # weight, in tokens, of the mean of all candidates in the document's own counts


def decode(codes: torch.Tensor) -> torch.Tensor:
    """Counts of 8-bit codes on a logarithmic scale."""
    return torch.exp2(codes.float() / 12) - 1


def bigram_bucket(previous: np.ndarray, token: np.ndarray) -> np.ndarray:
    """The bucket of a pair of ids (int64)."""
    return ((previous * 2654435761 + token * 40503) & 0x7FFFFFFF) >> 9 & (BIGRAM_BUCKETS - 1)


def repeats(seen: np.ndarray, first: int, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each token of seen [B, first + T] from `first` on: how often its document had it before, and how many tokens
    the document had before it. ends [B, first + T]: after which tokens a document begins.
    """
    place = np.arange(seen.shape[1])
    begins = np.zeros_like(seen, dtype=bool)
    begins[:, 1:] = ends[:, :-1]
    length = (place - np.maximum.accumulate(np.where(begins, place, 0), axis=1))[:, first:]
    key = np.cumsum(begins, axis=1) * (seen.max() + 2) + seen
    order = key.argsort(axis=1, kind="stable")
    ordered = np.take_along_axis(key, order, axis=1)
    new = np.ones_like(begins)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    times = np.empty_like(key)
    np.put_along_axis(times, order, place - np.maximum.accumulate(np.where(new, place, 0), axis=1), axis=1)
    return times[:, first:], length


class ForgeRouter(nn.Module):
    """Bayes' rule over the document so far: the states are the candidates and, as the last one, the unknown domain. On the CPU."""

    unigram_codes: torch.Tensor
    bigram_codes: torch.Tensor

    def __init__(self, config: ForgeConfig):
        super().__init__()
        self.end = -1 if config.cross_document_attention else config.eos_token_id  # of a document
        self.numbers = config.router
        candidates = 1 + len(config.modules)
        self.register_buffer("unigram_codes", torch.zeros(candidates, config.vocab_size, dtype=torch.uint8))
        self.register_buffer("bigram_codes", torch.zeros(candidates, BIGRAM_BUCKETS, dtype=torch.uint8))
        self.prepared = False

    def prepare(self) -> None:
        """Computes the tables from the counts, once: at the first use, when the counts have been loaded."""
        if self.prepared:
            return
        self.prepared = True
        unigrams = decode(self.unigram_codes.cpu())
        totals = unigrams.sum(1, keepdim=True)
        shares = torch.tensor(self.numbers["shares"])
        observed = (unigrams + 1) / (totals + unigrams.shape[1])
        self.unigram_p = ((unigrams + SMOOTHING * (shares @ observed)) / (totals + SMOOTHING)).numpy()
        self.shares = shares
        self.prior = torch.cat((shares * (1 - self.numbers["unknown"]), torch.tensor([self.numbers["unknown"]])))
        self.unigrams = self.unigram_codes.cpu().numpy()
        self.bigrams = self.bigram_codes.cpu().numpy()
        self.count_of = decode(torch.arange(256)).numpy()
        self.pairs_after = np.full_like(self.unigram_p, -1)  # [E, V]: sums over the next token; -1 until one is needed

    def ends(self, seen: np.ndarray, real: torch.Tensor) -> np.ndarray:
        """After which ids of seen [B, 1 + P + T] a document begins: the one before the text, padding, and what ends one.

        real [B, P + T]: what is not padding.
        """
        padding = np.pad(~real.cpu().numpy(), ((0, 0), (1, 0)), constant_values=True)
        return padding | (seen == self.end)

    def evidence(self, seen: np.ndarray, ends: np.ndarray, first: int) -> torch.Tensor:
        """The weighted log p_s(x_t | x_<t) of the tokens of seen [B, first + T] from `first` on: [B, T, S]."""
        p = self.pair_p(seen[:, first - 1 : -1], seen[:, first:])  # [E, B, T]
        mean = self.mean(p)
        times, length = repeats(seen, first, ends)
        document = (times + DOCUMENT * mean) / (length + DOCUMENT)
        weight = self.numbers["repeats"]
        p = (1 - weight) * np.concatenate((p, mean[None])) + weight * document
        return self.numbers["temperature"] * torch.from_numpy(np.log(p).transpose(1, 2, 0).astype(np.float32))

    def pair_p(self, previous: np.ndarray, token: np.ndarray) -> np.ndarray:
        """p_e(token | previous), both [B, T], from the counts: [E, B, T]."""
        pairs = self.pairs(previous, token)
        after = self.sums_of_pairs(previous)
        weight = BACKOFF + COLLISIONS * np.maximum(after - self.count_of[self.unigrams[:, previous]], 0)
        total = after + weight
        back = weight * self.unigram_p[:, token]
        shared = self.mean((pairs + back) / total)
        return (pairs + weight * SHARED * shared + (1 - SHARED) * back) / total

    def pairs(self, previous: np.ndarray, token: np.ndarray) -> np.ndarray:
        """Upper bound [E, B, T] of the count of a pair: the least of the counts of its bucket and of its two tokens."""
        of_tokens = np.minimum(self.unigrams[:, previous], self.unigrams[:, token])
        return self.count_of[np.minimum(self.bigrams[:, bigram_bucket(previous, token)], of_tokens)]

    def sums_of_pairs(self, previous: np.ndarray) -> np.ndarray:
        """The sum [E, B, T] of `pairs` over all tokens after `previous` [B, T], computed once for each distinct one."""
        every = np.arange(self.unigrams.shape[1])
        for token in np.unique(previous[self.pairs_after[0, previous] < 0]):
            self.pairs_after[:, token] = self.pairs(np.broadcast_to(token, every.shape), every).sum(-1)
        return self.pairs_after[:, previous]

    def mean(self, p: np.ndarray) -> np.ndarray:
        """The candidates' mean [B, T] of p [E, B, T]."""
        return (self.shares.numpy() @ p.reshape(len(p), -1)).reshape(p.shape[1:])

    def with_heads(self, evidence: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
        """The evidence with the log p [B, T, E] that each candidate's head gave the tokens."""
        unknown = torch.logsumexp(log_p + self.shares.log(), dim=-1, keepdim=True)
        return evidence + self.numbers["own"] * torch.cat((log_p, unknown), dim=-1)

    def filter(self, evidence: torch.Tensor, ends: np.ndarray, start: torch.Tensor) -> torch.Tensor:
        """The states [B, T, S] after evidence [B, T, S], from `start` [B, S]; the prior where a document ends [B, T]."""
        scores = evidence.double().numpy().transpose(1, 0, 2)
        likelihood = np.exp(scores - scores.max(-1, keepdims=True))
        reset = ends.T[..., None]
        prior = self.prior.double().numpy()
        belief = start.double().numpy()
        switch = self.numbers["switch"]
        sequence = np.empty(likelihood.shape)
        for t in range(len(sequence)):
            belief = (belief * (1 - switch) + switch * prior) * likelihood[t]
            belief /= belief.sum(-1, keepdims=True)
            belief = np.where(reset[t], prior, belief)
            sequence[t] = belief
        return torch.from_numpy(sequence.transpose(1, 0, 2)).float()

    def gates(self, states: torch.Tensor, *, mixed: bool) -> torch.Tensor:
        """Gates [..., E] of states [..., S]. mixed: all candidates serve an unknown domain; otherwise the trunk alone does."""
        known, unknown = states[..., :-1], states[..., -1:]
        if mixed:
            return known + unknown * self.shares
        return torch.cat((known[..., :1] + unknown, known[..., 1:]), dim=-1)
