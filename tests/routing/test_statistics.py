"""A module's statistics: exact counts on a coarse scale, none of what too few documents hold, and how the router uses them."""

from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from forge_common.routing import statistics
from forge_common.routing.routers import ContextRouter, repeats
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
    texts.append(np.concatenate(documents(9, of=range(60, 120))[:12]))  # longer than two pieces
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
                holders[name][place].add((number, (t - 1) // statistics.PIECE))
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

    def read(self, start, end):
        return self.tokens[start:end]


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


def test_the_likelihoods_are_probabilities():
    """Over all next tokens they sum to 1, for each candidate and the unknown domain, whatever the document before."""
    found = router(Tuning())
    token = torch.arange(VOCABULARY)[:, None]
    for history in ([-1], [20], [EOS], [200], [EOS, 20, 20, 7, 20], [-1, -1, 5, EOS, 6, 200]):
        log_p = found.log_p(token, torch.tensor(history).expand(VOCABULARY, -1))
        assert torch.allclose(log_p[:, 0].double().exp().sum(0), torch.ones(4).double(), atol=1e-5), history


def test_repeats_are_counted_in_the_document_alone():
    history = torch.tensor([[-1, 5, 5, EOS, 7], [-1, -1, -1, -1, 9]])
    tokens = torch.tensor([[5, 7, 7, EOS, 7, 5, 5], [9, 9, 4, 9, EOS, EOS, 9]])
    seen = torch.cat((history, tokens), dim=1).numpy()
    for t in range(tokens.shape[1]):  # one by one
        for found, expected in zip(repeats(seen[:, : 6 + t], 5 + t, EOS), repeats(seen, 5, EOS), strict=True):
            assert np.array_equal(found[:, 0], expected[:, t])
    times, length = repeats(seen, 5, EOS)
    assert times.tolist() == [[0, 1, 2, 0, 0, 0, 1], [1, 2, 0, 3, 0, 0, 0]]
    assert length.tolist() == [[1, 2, 3, 4, 0, 1, 2], [1, 2, 3, 4, 5, 0, 0]]


def test_the_gates_follow_a_change_of_text_and_reset_at_the_end_of_a_document():
    found = router(Tuning())
    low, high = documents(6, 1, 30, range(2, 150))[0][:-1], documents(7, 1, 30, range(150, VOCABULARY))[0][:-1]
    tokens = torch.from_numpy(np.concatenate((low, high, [EOS], low)))[None]
    states, _ = found.route(tokens, found.start(1, at_document=True))
    assert torch.allclose(states.sum(-1), torch.ones(1, tokens.shape[1]))
    gates = found.gates(states, mixed=True)
    assert torch.allclose(gates.sum(-1), torch.ones(1, tokens.shape[1]))
    assert (gates[0, 10:30].argmax(-1) == 1).all() and (gates[0, 45:60].argmax(-1) == 2).all()
    assert torch.equal(states[0, 60], found.prior)
    assert (gates[0, 75:].argmax(-1) == 1).all()
    alone = found.gates(states, mixed=False)
    torch.testing.assert_close(alone[..., 0], states[..., 0] + states[..., -1])
    assert torch.equal(alone[..., 1:], states[..., 1:-1])


def test_an_eos_resets_nothing_where_the_trunk_attends_across_documents():
    """As between the turns of a chat: the gates go on, as after any other token that no candidate has counted more."""
    low, high = documents(4, of=range(2, 150)), documents(5, of=range(150, VOCABULARY))
    counts = [statistics.count(texts, VOCABULARY, EOS, 1)[0] for texts in (low + high, low, high)]
    question = documents(6, 1, 30, range(150, VOCABULARY))[0][:-1]
    turns = torch.from_numpy(np.concatenate((question, [EOS], question[:3])))[None]
    gates = {}
    for across in (False, True):
        found = ContextRouter(counts, torch.tensor((0.2, 0.4, 0.4)), EOS, Tuning(), across=across)
        states, _ = found.route(turns, found.start(1, at_document=True))
        gates[across] = found.gates(states, mixed=True)[0]
        one_by_one, state = [], found.start(1, at_document=True)
        for token in turns[0]:
            step, _ = found.route(token[None, None], state)
            state.layers, state.history = step[:, -1], torch.cat((state.history, token[None, None]), dim=1)
            one_by_one.append(step[0, 0])
        torch.testing.assert_close(torch.stack(one_by_one), states[0])
    assert torch.equal(gates[False][:30], gates[True][:30])
    assert gates[False][30, 2] < 0.5 and (gates[True][29:, 2] > 0.8).all()


LARGE = 2048


def languages(seed: int, number: int, tokens: int) -> list[list[np.ndarray]]:
    """Documents of `tokens` each in three languages with one vocabulary: Zipf's law over words in another order, half
    of them shared.
    """
    order = np.random.default_rng(1)
    draw = np.random.default_rng(seed)
    p = 1 / np.arange(1, LARGE - 1)
    half = np.arange(2, LARGE)
    texts = []
    for _ in range(3):
        words = half.copy()
        own = order.permutation(len(words))[: len(words) // 2]
        words[own] = words[order.permutation(own)]
        texts.append([np.append(draw.choice(words, tokens, p=p / p.sum()), EOS) for _ in range(number)])
    return texts


@pytest.fixture(scope="module")
def million():
    """Counts on a million tokens of each of three languages."""
    return [statistics.count(texts, LARGE, EOS, 2)[0] for texts in languages(0, 500, 2000)]


def own_gates(every, prior=None) -> list[float]:
    """The mean gate of the first three modules on new text of their languages, the trunk's counts being the first one's."""
    prior = torch.full((len(every) + 1,), 1 / (len(every) + 1)) if prior is None else prior
    found = ContextRouter([every[0], *every], prior, EOS, Tuning())
    gates = []
    for e, texts in enumerate(languages(5, 8, 128)):
        tokens = torch.from_numpy(np.stack(texts))
        states, _ = found.route(tokens, found.start(len(tokens), at_document=True))
        each = found.gates(states, mixed=True)[:, 16:-1]
        gates.append(float((each[..., e + 1] + (each[..., 0] if e == 0 else 0)).mean()))
    return gates


@pytest.mark.parametrize("tokens", [20_000, 60_000])
def test_a_module_with_few_counts_keeps_its_domain(million, tokens):
    """At a vocabulary of 2,048 and a million tokens for the others."""
    thin = statistics.count(languages(3, tokens // 2000, 2000)[1], LARGE, EOS, 2)[0]
    full, one_thin = own_gates(million), own_gates([million[0], thin, million[2]])
    assert min(full) > 0.8
    assert one_thin[1] > full[1] - 0.1 and one_thin[2] > full[2] - 0.1


@pytest.mark.parametrize("code", [0, 40, 255])
def test_statistics_without_information_take_no_domain(million, code):
    lie = {name: torch.full_like(codes, code) for name, codes in million[0].items()}
    with_lie, expected = own_gates([*million, lie]), own_gates(million)
    assert all(found > other - 0.06 for found, other in zip(with_lie, expected, strict=True))
    if code == 0:  # it has no part in anything
        assert with_lie == pytest.approx(expected, abs=1e-3)


def test_copies_share_one_prior(million):
    expected = own_gates(million)
    with_copies = own_gates([*million, *[million[1]] * 16])
    assert with_copies[0] == pytest.approx(expected[0], abs=0.01) and with_copies[2] == pytest.approx(
        expected[2], abs=0.01
    )
    twice = ContextRouter([million[0], million[1], million[1], million[2]], torch.full((4,), 0.25), EOS, Tuning())
    once = ContextRouter([million[0], million[1], million[2]], torch.full((3,), 1 / 3), EOS, Tuning())
    torch.testing.assert_close(twice.prior[1] + twice.prior[2], once.prior[1], rtol=0.05, atol=0)


def test_the_order_of_the_candidates_does_not_matter():
    one, other = router(Tuning(), (0.2, 0.5, 0.3)), router(Tuning(), (0.2, 0.3, 0.5), (0, 2, 1))
    tokens = torch.from_numpy(documents(8, 1)[0])[None]
    ours, theirs = (each.route(tokens, each.start(1, at_document=True))[0] for each in (one, other))
    torch.testing.assert_close(ours[..., [0, 2, 1, 3]], theirs)


def test_a_pair_counts_no_more_than_its_rarer_token():
    """With all buckets full, the probabilities after an unseen token are those without a previous token."""
    unigrams = np.full(VOCABULARY, 50)
    unigrams[20] = 0
    full = {"unigrams": unigrams, "bigrams": np.full(statistics.BIGRAM_BUCKETS, 10_000)}
    own = {name: torch.from_numpy(statistics.encode(counts)) for name, counts in full.items()}
    found = ContextRouter([own], torch.ones(1), EOS, Tuning())
    token = np.arange(10, 30)[None]
    assert found.pairs(np.full_like(token, 21), token).max() == pytest.approx(50, rel=0.03)
    assert not found.pairs(np.full_like(token, 20), token).any()
    alone, unseen = (found.pair_p(np.full_like(token, last), token) for last in (-1, 20))
    np.testing.assert_allclose(unseen, alone, rtol=1e-5)


def test_pairs_that_share_buckets_weigh_less():
    """With all buckets full, as in a large vocabulary, the counts of pairs say nothing: the token's own probability must show."""
    unigrams = np.full(VOCABULARY, 5_000)
    unigrams[30:] = 50
    full = {"unigrams": unigrams, "bigrams": np.full(statistics.BIGRAM_BUCKETS, 10_000)}
    own = {name: torch.from_numpy(statistics.encode(counts)) for name, counts in full.items()}
    found = ContextRouter([own], torch.ones(1), EOS, Tuning())
    token = np.arange(VOCABULARY)[None]
    alone, after = (found.pair_p(np.full_like(token, last), token)[0, 0] for last in (-1, 40))
    assert after.sum() == pytest.approx(1, abs=1e-5)
    assert after[10] > 0.2 * alone[10]  # 0.12 if all pairs had their full weight
