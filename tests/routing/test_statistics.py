"""A module's statistics: exact counts on a coarse scale, none of what too few documents hold, and how the router uses them."""

from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from forge_common.routing import statistics
from forge_common.routing.routers import ContextRouter
from forge_common.routing.tuning import Tuning

VOCABULARY, EOS = 300, 1


def documents(seed: int, number: int = 20, length: int = 200, of: range = range(2, VOCABULARY)) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    return [np.append(draw.integers(of.start, of.stop, length), EOS) for _ in range(number)]


def test_codes_are_within_their_bound():
    counts = np.arange(0, 2_000_000, 37)
    back = statistics.decode(torch.from_numpy(statistics.encode(counts))).double().numpy()
    assert back[0] == 0
    assert (np.abs(back - counts) <= 0.03 * (counts + 1)).all()
    assert (np.diff(statistics.encode(np.arange(300_000)).astype(int)) >= 0).all()


@pytest.mark.parametrize("least", [1, 2, 5])
def test_what_too_few_documents_hold_is_not_counted(least):
    """Against a plain loop over all tokens and pairs: the sum over a bucket, or nothing."""
    texts = documents(0, of=range(2, 80))
    counts, sample_size = statistics.count(texts, VOCABULARY, EOS, least)
    assert sample_size == {"tokens": sum(map(len, texts)), "documents": len(texts), "min_documents": least}
    times: dict[str, Counter] = defaultdict(Counter)
    holders: dict[str, dict[int, set]] = defaultdict(lambda: defaultdict(set))
    for number, text in enumerate(texts):
        ids = [EOS, *text.tolist()]
        for t in range(1, len(ids)):
            places = {"unigrams": ids[t], "bigrams": statistics.bigram_bucket(ids[t - 1], ids[t])}
            for name, place in places.items():
                times[name][place] += 1
                holders[name][place].add(number)
    for name, tensor in counts.items():
        wanted = np.zeros(len(tensor), np.int64)
        for place, number in times[name].items():
            if len(holders[name][place]) >= least:
                wanted[place] = number
        assert (statistics.encode(wanted) == tensor.numpy()).all()
        assert wanted.any()


def test_the_bucket_is_the_same_for_arrays_and_tensors():
    pairs = np.random.default_rng(1).integers(0, 200_000, (2, 1000))
    found = statistics.bigram_bucket(*pairs)
    assert (found == statistics.bigram_bucket(*map(torch.from_numpy, pairs)).numpy()).all()
    assert found.min() >= 0 and found.max() < statistics.BIGRAM_BUCKETS and len(set(found.tolist())) > 950


class Store:
    """Documents as data.windows.Tokens holds them."""

    def __init__(self, texts):
        self.tokens, self.documents = np.concatenate(texts), len(texts)
        self.offsets = np.cumsum([0, *map(len, texts)])


def test_a_sample_is_spread_over_each_source_by_its_share():
    one, other = Store(documents(2, 100)), Store(documents(3, 50, 37))
    drawn = list(statistics.sample([(one, 0.75), (other, 0.25)], 4_000))
    sizes = [sum(len(text) for text in drawn if (len(text) > 38) == long) for long in (True, False)]
    assert sum(sizes) <= 4_000 and abs(sizes[0] - 3_000) < 250 and abs(sizes[1] - 1_000) < 50
    assert len(list(statistics.sample([(one, 1.0)], 10**9))) == 100
    texts = [tuple(text) for text in drawn]
    assert len(set(texts)) == len(texts)


def router(tuning: Tuning, prior=(0.2, 0.4, 0.4), order=(0, 1, 2)) -> ContextRouter:
    """A trunk trained on both languages, and a module for each; the languages share no token but EOS."""
    low, high = documents(4, of=range(2, 150)), documents(5, of=range(150, VOCABULARY))
    counts = [statistics.count(texts, VOCABULARY, EOS, 1)[0] for texts in (low + high, low, high)]
    return ContextRouter([counts[e] for e in order], torch.tensor(prior), EOS, tuning)


def test_scores_are_probabilities():
    """Over all next tokens they sum to 1, up to collisions in a bucket and the coarse scale."""
    found = router(Tuning())
    token = torch.arange(VOCABULARY)[:, None]
    for last in (-1, 20, EOS, 200):
        scores = found.scores(token, torch.full((VOCABULARY, 1), last))
        assert torch.allclose(scores[:, 0].double().exp().sum(0), torch.ones(3).double(), atol=0.1), last


def test_the_gates_follow_a_change_of_text_and_reset_at_the_end_of_a_document():
    found = router(Tuning())
    low, high = documents(6, 1, 30, range(2, 150))[0][:-1], documents(7, 1, 30, range(150, VOCABULARY))[0][:-1]
    tokens = torch.from_numpy(np.concatenate((low, high, [EOS], low)))[None]
    gates, _ = found.route(tokens, found.start(1, at_document=True))
    assert torch.allclose(gates.sum(-1), torch.ones(1, tokens.shape[1]))
    assert (gates[0, 10:30].argmax(-1) == 1).all() and (gates[0, 45:60].argmax(-1) == 2).all()
    assert torch.equal(gates[0, 60], found.prior)
    assert (gates[0, 75:].argmax(-1) == 1).all()


def test_the_order_of_the_candidates_does_not_matter():
    one, other = router(Tuning(), (0.2, 0.5, 0.3)), router(Tuning(), (0.2, 0.3, 0.5), (0, 2, 1))
    tokens = torch.from_numpy(documents(8, 1)[0])[None]
    ours, theirs = (each.route(tokens, each.start(1, at_document=True))[0] for each in (one, other))
    torch.testing.assert_close(ours[..., [0, 2, 1]], theirs)


def test_a_pair_counts_no_more_than_its_rarer_token():
    """With all buckets full, the scores after an unseen token are those without a previous token."""
    unigrams = np.full(VOCABULARY, 50)
    unigrams[20] = 0
    full = {"unigrams": unigrams, "bigrams": np.full(statistics.BIGRAM_BUCKETS, 10_000)}
    own = {name: torch.from_numpy(statistics.encode(counts)) for name, counts in full.items()}
    found = ContextRouter([own], torch.ones(1), EOS, Tuning())
    token = torch.arange(30, 40)[:, None]
    alone, unseen, seen = (found.scores(token, torch.full((10, 1), last)) for last in (-1, 20, 21))
    torch.testing.assert_close(unseen, alone)
    assert (seen > alone).all() and (seen <= 0).all()
