"""The order: every window once an epoch; an update has the same windows for any number of processes and after a restart."""

import hashlib
import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch

from forge_common.data.order import BLOCK, Mixture, permute, positions_of, updates
from forge_common.data.readers.document import Reading
from forge_common.data.store import Windows, prepare
from forge_common.data.tokenizer import byte_tokenizer
from forge_common.errors import UserError


class Store:
    """Windows that name themselves: [source, index]; three of them make a document."""

    def __init__(self, source, length):
        self.source, self.length = source, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        assert 0 <= index < self.length
        return np.array([self.source, index])

    def documents_of(self, index):
        return [f"{self.source}:{index // 3}", f"{self.source}:{(index + 1) // 3}"][: 1 + (index % 3 == 2)]


def mixture(*lengths, weights=None, seed=0):
    return Mixture([Store(source, length) for source, length in enumerate(lengths)], weights, seed)


def seen(mixed, positions):
    return [tuple(mixed[position].tolist()) for position in positions]


@pytest.mark.parametrize("size", [*range(1, 18), 63, 64, 65, 255, 256, 257, 1000, 1024, 4095, 4096, 4097])
def test_permute_is_a_bijection_for_every_size_and_key(size):
    for key in ((0, 0), (0, 1), (7, 0), ("block", 3)):
        assert sorted(permute(np.arange(size), size, *key).tolist()) == list(range(size))


@pytest.mark.parametrize("size", [100, 1000])
def test_every_key_gives_another_permutation(size):
    keys = [(seed, epoch) for seed in range(6) for epoch in range(6)]
    orders = {tuple(permute(np.arange(size), size, *key).tolist()) for key in keys}
    assert len(orders) == len(keys)
    fixed = [sum(order[i] == i for i in range(size)) for order in orders]
    assert np.mean(fixed) < 3  # a random permutation keeps one place on average
    for a, b in itertools.combinations(orders, 2):
        assert sum(x == y for x, y in zip(a, b, strict=True)) < 12


def test_a_permutation_of_a_trillion_needs_no_memory():
    size = 2**40 - 3
    places = np.concatenate([np.arange(500), size - 1 - np.arange(500)]).astype(np.uint64)
    found = permute(places, size, "large")
    assert len(set(found.tolist())) == 1000
    assert found.min() >= 0
    assert found.max() < size
    assert abs(found.mean() / size - 0.5) < 5 * (1 / 12 / 1000) ** 0.5
    assert found.tolist() == [int(permute(places[i : i + 1], size, "large")[0]) for i in range(1000)]  # one by one


@pytest.mark.parametrize("size", [5, 16, 60])
def test_every_window_is_as_likely_at_every_place(size):
    keys = 2000
    table = np.zeros((size, size))
    for key in range(keys):
        table[np.arange(size), permute(np.arange(size), size, key)] += 1
    expected = keys / size
    chi_square = ((table - expected) ** 2 / expected).sum()
    freedom = (size - 1) ** 2
    assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5
    # Neighbours are not kept together: the next place is next in value about as often as by chance.
    follow = sum((np.diff(permute(np.arange(size), size, key)) == 1).sum() for key in range(keys)) / keys
    assert follow == pytest.approx((size - 1) / size, abs=0.2)


@pytest.mark.parametrize("lengths", [(1,), (7,), (5, 1, 20)])
def test_without_weights_every_window_comes_once_an_epoch(lengths):
    mixed, size = mixture(*lengths), sum(lengths)
    every = sorted((source, index) for source, length in enumerate(lengths) for index in range(length))
    epochs = [seen(mixed, range(epoch * size, (epoch + 1) * size)) for epoch in range(4)]
    assert all(sorted(epoch) == every for epoch in epochs)
    if size > 6:
        assert len(set(map(tuple, epochs))) == 4
        assert seen(mixture(*lengths, seed=1), range(size)) != epochs[0]
    assert [mixed.locate(position)[2] for position in (0, size - 1, size, 3 * size)] == [0, 0, 1, 3]
    assert mixed.epoch(size * 5 // 2) == size * 5 // 2 / size


def test_a_position_is_a_number_of_any_type():
    for mixed in (mixture(40, 3), mixture(40, 3, weights=[3, 1])):
        for position in (0, 1, 2, 50, 1500):
            assert mixed.locate(np.int64(position)) == mixed.locate(position)


@pytest.mark.parametrize(
    ("weights", "counts"),
    [([0.5, 0.25, 0.25], [512, 256, 256]), ([1, 1, 1], [341, 341, 342]), ([7, 2, 1], [717, 205, 102])],
)
def test_with_weights_the_shares_hold_in_every_block(weights, counts):
    mixed = mixture(50, 300, 7, weights=weights)
    located = [mixed.locate(position) for position in range(3 * BLOCK)]
    blocks = [[place[:2] for place in located[start : start + BLOCK]] for start in range(0, 3 * BLOCK, BLOCK)]
    for block in blocks:
        found = Counter(source for source, _ in block)
        assert sorted(found.values()) == sorted(counts)
        assert all(abs(found[i] - weight / sum(weights) * BLOCK) < 1 for i, weight in enumerate(weights))
    assert len({tuple(source for source, _ in block) for block in blocks}) == 3
    # Each source comes pass by pass, whatever the others do: all its windows, then all again in another order.
    for source, length in enumerate((50, 300, 7)):
        drawn = [index for block in blocks for s, index in block if s == source]
        passes = [drawn[start : start + length] for start in range(0, len(drawn) - length + 1, length)]
        assert all(sorted(one) == list(range(length)) for one in passes)
        assert len(passes) >= 2 or length == 300
        assert all(a != b for a, b in itertools.pairwise(passes))
    for source, length in enumerate((50, 300, 7)):
        numbers = [number for s, _, number in located if s == source]
        assert numbers == [n // length for n in range(len(numbers))]


def test_shares_are_even_within_a_block_too():
    mixed = mixture(1000, 1000, weights=[3, 1])
    sources = np.array([mixed.locate(position)[0] for position in range(BLOCK)])
    quarters = sources.reshape(8, -1).sum(1)  # of 128 each: 32 expected, 4.6 the standard deviation
    assert np.abs(quarters - 32).max() < 20


def test_a_weight_too_small_for_its_source_to_be_seen_is_refused():
    with pytest.raises(UserError, match="never be seen"):
        mixture(10, 10, weights=[10_000, 1])
    assert Counter(source for source, _ in seen(mixture(10, 10, weights=[1000, 1]), range(BLOCK)))[1] == 1


# Of the first 5,000 positions, 300 after a resume in the middle, 50 far out; made by the first implementation, position
# by position.
ORDERS = [
    ((1,), None, 0, "7016548f80a04ed7 18787561df4ecb8d 5a5380cce15ae024"),
    ((7,), None, 42, "955de0bdfb797933 29c1c315229316cf b51dad8b46468171"),
    ((5, 1, 20), None, 42, "ada220a3ceecd159 0edf347f89c4592d f4749432fd53f528"),
    ((1000, 37), None, 7, "e32b6f9d5cb170a8 50deffee2d4f958d 2699d321467f82f6"),
    ((40_589, 133_413), None, 4294966295, "e4eff1210ec5356b dfd1eb1f740f4b37 ae8d9c00400642a4"),
    ((3_000_000_000,), None, 1, "0aa75c7afe93fc4a d48c43e9084a5f42 edea410318bf5cc1"),
    ((50, 300, 7), (7, 2, 1), 42, "8b703520cc86aeb5 162a39da97b97a5a 52a3ad3738d9c910"),
    ((1000, 1000), (3, 1), 0, "07f37e340c45eb22 118d54eb1f377ed2 66f767c01e02a51b"),
    ((13,), (2.5,), 5, "6b133ff01a7f3923 3076d0ca8dbb6690 122f768ece4452b2"),
    ((40_589, 133_413, 999), (0.5, 0.3, 0.2), 4294966295, "43a39d116311ce0d f256ca5527fde8a3 055fade67aba7c7e"),
    ((2, 3_000_000_000), (1, 1000), 3, "56a05dc1861f044a 3ae4c641d9f3498c f5a21c077d6d6de9"),
]


@pytest.mark.parametrize(("lengths", "weights", "seed", "digests"), ORDERS)
def test_the_order_is_the_one_of_every_version(lengths, weights, seed, digests):
    """Otherwise a resumed run would see some windows twice and others never."""
    mixed = mixture(*lengths, weights=weights, seed=seed)
    for (start, count), digest in zip(((0, 5000), (1_000_003, 300), (10**12, 50)), digests.split(), strict=True):
        places = mixed.places(np.arange(start, start + count))
        assert hashlib.sha256(places.astype("<i8").tobytes()).hexdigest()[:16] == digest
        for i in (0, count // 3, count - 1):  # alone, in another order, after positions of other blocks and epochs
            assert mixed.locate(start + i) == tuple(places[i])
        scattered = np.arange(start, start + count)[::-7]
        assert mixed.places(scattered).tolist() == places[::-7].tolist()


@pytest.mark.parametrize("positions", [0, 1, 777, BLOCK, 2 * BLOCK + 5])
def test_passes_count_what_was_seen_of_each_source(positions):
    mixed = Mixture([Store(0, 50), Store(1, 3000)], [3, 1], 0, ["law", "docs"])
    seen_of = Counter(mixed.locate(position)[0] for position in range(positions))
    assert mixed.passes(positions) == {"law": seen_of[0] / 50, "docs": seen_of[1] / 3000}
    assert mixture(50, 3000).passes(positions) == {}  # each source is seen as often as the epoch says


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2, 3, 6])
@pytest.mark.parametrize("update", [0, 5])
def test_the_ranks_share_an_update_between_them(update, micro, processes):
    batch = 24
    shares = [positions_of(update, batch, micro, rank, processes) for rank in range(processes)]
    assert all(share.shape == (batch // (micro * processes), micro) for share in shares)
    together = np.concatenate([share.ravel() for share in shares])
    assert sorted(together.tolist()) == list(range(update * batch, (update + 1) * batch))


def rounds(mixed, *, count, start=0, batch=8, micro=2, rank=0, processes=1):
    """The first updates of a rank, as lists of windows."""
    device = torch.device("cpu")
    stream = updates(
        mixed, start=start, batch_size=batch, micro_batch_size=micro, rank=rank, processes=processes, device=device
    )
    taken = list(itertools.islice(stream, count))
    stream.close()
    assert all(share.dtype == torch.int64 for share in taken)
    return [[tuple(window) for window in share.flatten(0, 1).tolist()] for share in taken]


@pytest.mark.parametrize("weights", [None, [2, 1]])
def test_a_restart_continues_at_the_same_window(weights):
    mixed = mixture(13, 6, weights=weights)  # 19 windows: updates of 8 run across the ends of epochs
    whole = rounds(mixed, count=9)
    assert list(itertools.chain(*whole)) == seen(mixed, range(72))
    for start in (1, 2, 3, 8):
        assert rounds(mixed, start=start, count=9 - start) == whole[start:]


@pytest.mark.parametrize(("processes", "micro"), [(1, 1), (1, 8), (2, 1), (2, 4), (4, 1), (4, 2)])
def test_an_update_holds_the_same_windows_however_it_is_divided(processes, micro):
    mixed = mixture(13, 6)
    whole = rounds(mixed, count=4, micro=8)
    ranks = [rounds(mixed, count=4, micro=micro, rank=rank, processes=processes) for rank in range(processes)]
    assert [sorted(itertools.chain(*shares)) for shares in zip(*ranks, strict=True)] == [
        sorted(update) for update in whole
    ]


def test_a_failure_to_read_ahead_is_raised_at_its_update():
    class Torn(Store):
        def __getitem__(self, index):
            if index == 3:
                raise OSError("torn")
            return super().__getitem__(index)

    mixed = Mixture([Torn(0, 64)], None, 0)
    broken = next(position for position in range(64) if mixed.locate(position)[1] == 3)
    assert len(rounds(mixed, count=broken // 2, batch=2)) == broken // 2
    with pytest.raises(OSError, match="torn"):
        rounds(mixed, count=broken // 2 + 1, batch=2)


def test_origins_name_the_documents_of_the_windows_once_each():
    for mixed in (mixture(9, 4), mixture(9, 4, weights=[1, 1])):
        positions = range(3, 11)
        wanted = [
            name for source, index in seen(mixed, positions) for name in mixed.sources[source].documents_of(index)
        ]
        assert mixed.origins(positions) == list(dict.fromkeys(wanted))


def test_over_real_windows_every_token_is_learned_once_an_epoch(tmp_path):
    texts = [f"document {i} " + "word " * (i % 11) for i in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = prepare(
        str(tmp_path / "a.jsonl"),
        byte_tokenizer(),
        Reading(),
        cache_dir=tmp_path / "cache",
        val_fraction=0.0,
        report=lambda line: None,
    )
    windows = Windows(corpus.train, 16, pack=False, filler=0)
    mixed = Mixture([windows], None, 3)
    epoch = [mixed[position] for position in range(len(windows))]
    labels = Counter(label for window in epoch for label in window[1:].tolist() if label != 0)
    documents = byte_tokenizer().encode_batch(texts)
    assert labels == Counter(token for document in documents for token in [*document[1:], 1])
    drawn = mixed.origins(range(5))
    held = {f"{tmp_path}/a.jsonl:{1 + texts.index(text)}" for text in texts}
    assert set(drawn) <= held
    for position in range(5):
        (origin,) = mixed.origins(range(position, position + 1))
        line = int(origin.rsplit(":", 1)[1])
        start = mixed[position]
        real = start[start != 0].tolist()
        whole = [*documents[line - 1], 1]
        assert any(whole[at : at + len(real)] == real for at in range(0, len(whole), 16))
