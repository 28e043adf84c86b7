"""The head's loss equals cross-entropy in value and gradient, without all logits; the router's losses equal their formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from forge_common.loss import CHUNK_LOGITS, CHUNK_ROWS, balance_sum, head_cross_entropy, nats_per_token, z_sum
from forge_common.run.ledger import Ledger

WIDTH, VOCABULARY = 6, 11
ROWS = [1, 7, CHUNK_ROWS - 1, CHUNK_ROWS, CHUNK_ROWS + 1, 2 * CHUNK_ROWS + 37]
TOLERANCE = {torch.float64: {"rtol": 1e-12, "atol": 1e-12}, torch.float32: {"rtol": 2e-5, "atol": 2e-5}}


def problem(rows, ignore_index=-100, dtype=torch.float64, seed=0):
    """Hidden states, a head, and labels of which about a third are ignored."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, WIDTH, dtype=dtype, generator=draw).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, dtype=dtype, generator=draw).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (rows,), generator=draw)
    labels[torch.rand(rows, generator=draw) < 0.3] = ignore_index
    return hidden, weight, labels


def reference(hidden, weight, labels, ignore_index):
    return F.cross_entropy(hidden @ weight.T, labels, reduction="sum", ignore_index=ignore_index)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("ignore_index", [0, -100])
@pytest.mark.parametrize("rows", ROWS)
def test_it_is_the_sum_of_cross_entropy(rows, ignore_index, dtype):
    hidden, weight, labels = problem(rows, ignore_index, dtype)
    ours = head_cross_entropy(hidden, weight, labels, ignore_index)
    theirs = reference(hidden, weight, labels, ignore_index)
    torch.testing.assert_close(ours, theirs, **TOLERANCE[dtype])
    found = torch.autograd.grad(ours * 0.37, (hidden, weight))  # a scale from above, as P * N / n
    wanted = torch.autograd.grad(theirs * 0.37, (hidden, weight))
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other, **TOLERANCE[dtype])
    assert not found[0][labels == ignore_index].any()


@pytest.mark.parametrize("ignore_index", [0, -100])
def test_without_scored_labels_loss_and_gradient_are_0(ignore_index):
    hidden, weight, _ = problem(CHUNK_ROWS + 5)
    hidden.data[3] = 1e300  # not even where the softmax overflows
    loss = head_cross_entropy(hidden, weight, torch.full((CHUNK_ROWS + 5,), ignore_index), ignore_index)
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, (hidden, weight)):
        assert (gradient == 0).all()


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_side_gets_no_gradient_and_the_other_the_same(frozen):
    hidden, weight, labels = problem(CHUNK_ROWS + 5)
    trained = {"hidden": weight, "weight": hidden}[frozen]
    {"hidden": hidden, "weight": weight}[frozen].requires_grad_(False)
    (found,) = torch.autograd.grad(head_cross_entropy(hidden, weight, labels, -100), trained)
    (wanted,) = torch.autograd.grad(reference(hidden, weight, labels, -100), trained)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    both_frozen = head_cross_entropy(hidden.detach(), weight.detach(), labels, -100)
    assert not both_frozen.requires_grad


def test_a_tied_weight_gets_the_gradients_of_both_uses():
    _, weight, labels = problem(40)
    tokens = torch.randint(0, VOCABULARY, (40,), generator=torch.Generator().manual_seed(1))
    gradients = []
    for loss in (head_cross_entropy, reference):
        hidden = torch.tanh(F.embedding(tokens, weight))
        gradients.append(torch.autograd.grad(loss(hidden, weight, labels, -100), weight)[0])
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_under_bfloat16_the_sum_is_float32():
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(1500, 2, generator=draw).requires_grad_()
    weight = torch.randn(3, 2, generator=draw).requires_grad_()
    labels = torch.randint(0, 3, (1500,), generator=draw)
    with torch.autocast("cpu", torch.bfloat16):
        loss = head_cross_entropy(hidden, weight, labels, -100)
    assert loss.dtype == torch.float32
    rounded = [tensor.detach().bfloat16() for tensor in (hidden, weight)]
    exact = F.cross_entropy((rounded[0] @ rounded[1].T).double(), labels, reduction="sum")
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)  # in bfloat16 it would be off by up to 4e-3
    gradients = torch.autograd.grad(loss, (hidden, weight))
    wanted = torch.autograd.grad(F.cross_entropy(hidden @ weight.T, labels, reduction="sum"), (hidden, weight))
    for mine, other in zip(gradients, wanted, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - other).norm() < 0.01 * other.norm()


def test_autocast_does_not_cast_float64():
    hidden, weight, labels = problem(20)
    with torch.autocast("cpu", torch.bfloat16):
        loss = head_cross_entropy(hidden, weight, labels, -100)
    assert loss.item() == head_cross_entropy(hidden, weight, labels, -100).item()


def test_a_scale_from_above_is_not_rounded_to_bfloat16():
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 4, generator=draw).bfloat16().requires_grad_()
    weight = torch.randn(3, 4, generator=draw).bfloat16()
    loss = head_cross_entropy(hidden, weight, torch.zeros(64, dtype=torch.long), -100)
    (whole,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (third,) = torch.autograd.grad(loss / 3, hidden)
    assert torch.equal(third, (whole.double() / 3).bfloat16())  # bfloat16's own 1/3 is 0.3340


class Sizes(TorchDispatchMode):
    """Records the number of elements of each tensor that an operation returns, forward or backward."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        results = result if isinstance(result, tuple | list) else [result]
        self.made += [tensor.numel() for tensor in results if isinstance(tensor, torch.Tensor)]
        return result


@pytest.mark.parametrize("scored_only", [False, True], ids=["trained", "nats_per_token"])
def test_the_logits_of_all_rows_are_never_in_memory(scored_only):
    rows, vocabulary = 4 * CHUNK_ROWS + 3, 97
    hidden, labels = torch.randn(rows, 4, requires_grad=True), torch.randint(0, vocabulary, (rows,))
    weight = torch.randn(vocabulary, 4, requires_grad=True)
    saved = []
    with (
        Sizes() as sizes,
        torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x),
    ):
        if scored_only:
            nats_per_token(hidden, weight, labels, -100)
        else:
            head_cross_entropy(hidden, weight, labels, -100).backward()
    assert max(sizes.made) == CHUNK_ROWS * vocabulary
    assert max(saved, default=0) <= max(hidden.numel(), weight.numel())


def test_one_chunk_of_logits_and_one_gradient_of_the_weight_are_in_memory():
    rows, width, vocabulary = 3 * CHUNK_ROWS, 64, 1024
    hidden, labels = torch.randn(rows, width, requires_grad=True), torch.randint(0, vocabulary, (rows,))
    weight = torch.randn(vocabulary, width, requires_grad=True)
    with Ledger() as ledger:
        head_cross_entropy(hidden, weight, labels, -100).backward()
    chunk = 4 * CHUNK_ROWS * vocabulary
    assert ledger.peak < 1.1 * chunk + 2 * (weight.nbytes + hidden.nbytes)


def test_under_autocast_one_chunk_of_logits_is_in_memory_in_either_dtype():
    """The last chunk's are gone when the next one is computed, and after the forward pass."""
    rows, width, vocabulary = 3 * CHUNK_ROWS, 64, 1024
    hidden, labels = torch.randn(rows, width, requires_grad=True), torch.randint(0, vocabulary, (rows,))
    weight = torch.randn(vocabulary, width)
    with Ledger() as ledger, torch.autocast("cpu", torch.bfloat16):
        loss = head_cross_entropy(hidden, weight, labels, -100)
    copies = (hidden.nbytes + weight.nbytes) // 2
    chunk = CHUNK_ROWS * vocabulary
    assert ledger.peak < 1.1 * (4 + 2) * chunk + copies + hidden.nbytes
    assert sum(ledger.live.values()) < 0.1 * chunk + copies + hidden.nbytes
    assert loss.requires_grad


def test_a_large_vocabulary_has_fewer_rows_of_logits_in_memory():
    rows, vocabulary = 300, 1 << 17
    hidden, labels = torch.randn(rows, 4, requires_grad=True), torch.randint(0, vocabulary, (rows,))
    weight = torch.randn(vocabulary, 4, requires_grad=True)
    with Sizes() as sizes:
        loss = head_cross_entropy(hidden, weight, labels, -100)
    assert max(sizes.made) == CHUNK_LOGITS == 128 * vocabulary
    loss.backward()
    whole = F.cross_entropy(hidden.detach() @ weight.detach().T, labels, reduction="sum")
    torch.testing.assert_close(loss.detach(), whole)
    expected = torch.autograd.grad(F.cross_entropy(hidden @ weight.T, labels, reduction="sum"), (hidden, weight))
    for found, gradient in zip((hidden.grad, weight.grad), expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)


def test_a_second_backward_pass_is_refused():
    """The first one scales the gradients in place."""
    hidden, weight, labels = problem(20)
    loss = head_cross_entropy(hidden, weight, labels, -100)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# A product added in place, which torch's counter does not know.
ADDED = {torch.ops.aten.addmm_: lambda total, a, b, *_, **__: 2 * a[0] * a[1] * b[1]}


def test_without_gradient_none_is_computed():
    hidden, weight, labels = problem(CHUNK_ROWS + 20)
    matrix = 2 * len(labels) * WIDTH * VOCABULARY
    for trained, products in ((True, 3), (False, 1)):
        with FlopCounterMode(display=False, custom_mapping=ADDED) as counter, torch.set_grad_enabled(trained):
            head_cross_entropy(hidden, weight, labels, -100)
        assert counter.get_total_flops() == products * matrix


@pytest.mark.parametrize("ignore_index", [0, -100])
@pytest.mark.parametrize("rows", ROWS)
def test_nats_per_token_sum_to_the_loss(rows, ignore_index):
    hidden, weight, labels = problem(rows, ignore_index)
    nats = nats_per_token(hidden, weight, labels, ignore_index)
    torch.testing.assert_close(nats.sum(), head_cross_entropy(hidden, weight, labels, ignore_index))
    assert (nats[labels == ignore_index] == 0).all()
    row = int((labels != ignore_index).nonzero()[0]) if (labels != ignore_index).any() else None
    if row is not None:
        alone = (hidden[row] @ weight.T).double().softmax(-1)[labels[row]]
        assert nats[row].item() == pytest.approx(-math.log(alone.item()), rel=1e-12)


def router(rows, experts, seed=0):
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, experts, dtype=torch.float64, generator=draw)
    return logits.requires_grad_(), torch.rand(rows, generator=draw) < 0.8


def test_balance_is_one_a_token_where_load_and_router_are_even():
    _, scored = router(40, 8)
    even = torch.full((40, 8), 1 / 8, dtype=torch.float64)
    assert balance_sum(even, torch.full((8,), 1 / 8), scored).item() == pytest.approx(scored.sum().item(), rel=1e-12)
    # An even load is enough: whatever the router says of single tokens, its probabilities sum to 1.
    logits, _ = router(40, 8)
    assert balance_sum(logits.softmax(-1), torch.full((8,), 1 / 8), scored).item() == pytest.approx(int(scored.sum()))
    # All to one expert with probability 1: E times as much.
    one = F.one_hot(torch.zeros(40, dtype=torch.long), 8).double()
    assert balance_sum(one, one[0], scored).item() == pytest.approx(8 * int(scored.sum()), rel=1e-12)


@pytest.mark.parametrize("top_k", [1, 2])
def test_balance_is_the_formula_of_switch(top_k):
    logits, scored = router(50, 4)
    probabilities = logits.softmax(-1)
    chosen = probabilities.topk(top_k).indices[scored]
    f = [(chosen == expert).sum().item() / (top_k * len(chosen)) for expert in range(4)]
    P = [probabilities[scored, expert].mean().item() for expert in range(4)]
    switch = 4 * sum(share * mean for share, mean in zip(f, P, strict=True))
    ours = balance_sum(probabilities, torch.tensor(f, dtype=torch.float64), scored) / scored.sum()
    assert ours.item() == pytest.approx(switch, rel=1e-12)


def test_router_losses_are_sums_over_the_scored_tokens():
    logits, scored = router(60, 4)
    load = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    rows = [(logits[start : start + 17], scored[start : start + 17]) for start in range(0, 60, 17)]
    for whole, parts in (
        (balance_sum(logits.softmax(-1), load, scored), [balance_sum(x.softmax(-1), load, s) for x, s in rows]),
        (z_sum(logits, scored), [z_sum(x, s) for x, s in rows]),
    ):
        torch.testing.assert_close(whole, sum(parts), rtol=1e-12, atol=1e-12)
        gradient = torch.autograd.grad(whole, logits)[0]
        torch.testing.assert_close(gradient, torch.autograd.grad(sum(parts), logits)[0], rtol=1e-12, atol=1e-12)
        assert not gradient[~scored].any()
        assert gradient[scored].any(-1).all()


def test_z_is_the_square_of_the_log_of_the_partition():
    zeros = torch.zeros(5, 4, dtype=torch.float64)
    scored = torch.tensor([True, True, False, True, False])
    assert z_sum(zeros, scored).item() == pytest.approx(3 * math.log(4) ** 2, rel=1e-12)
    assert z_sum(zeros + 2.5, scored).item() == pytest.approx(3 * (math.log(4) + 2.5) ** 2, rel=1e-12)
    logits, scored = router(9, 4)
    wanted = math.fsum(math.log(sum(map(math.exp, row))) ** 2 for row in logits[scored].tolist())
    assert z_sum(logits, scored).item() == pytest.approx(wanted, rel=1e-12)
