"""Losses as sums of nats over scored tokens, with their number. The caller, who knows the whole update, divides.

B batch, T time, D width, V vocabulary, L layers, E experts, R = B * T rows
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .autocast import product_dtype

CHUNK_ROWS = 512  # rows of logits in memory at a time, at most
CHUNK_LOGITS = 1 << 24  # logits in memory at a time, at most: fewer rows from a vocabulary of 32,768 on


def chunk_rows(vocab_size: int) -> int:
    """Rows of logits in memory at a time, for any batch."""
    return max(1, min(CHUNK_ROWS, CHUNK_LOGITS // vocab_size))


class Sums(NamedTuple):
    """The result of a forward pass: sums over the scored tokens of this micro-batch, on the device.

    objective: nats + coefficients x (balance, z); the script scales it by P * N / n and calls backward. nats:
    cross-entropy, base e. tokens: number of scored labels. balance, z: router losses, summed over tokens and averaged
    over layers (0 without a router). expert_counts: [L, E] assignments of scored tokens ([0, 0] without a router).
    """

    objective: torch.Tensor
    nats: torch.Tensor
    tokens: torch.Tensor
    balance: torch.Tensor
    z: torch.Tensor
    expert_counts: torch.Tensor

    def detached(self) -> "Sums":
        """The same values without the graph of the backward pass."""
        return Sums(*(part.detach() for part in self))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """At least float32, for sums of nats: bfloat16 keeps 3 significant digits."""
    return torch.promote_types(dtype, torch.float32)


class _HeadCrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(hidden @ weight.T)[label], a chunk of rows at a time. The forward pass computes the gradients too.

    One tensor [chunk, V] becomes logits, log p and gradient in turn, for every chunk; under autocast a second one, in its
    dtype, is the result and the operand of the matrix products. torch's F.linear_cross_entropy does the same, but
    returns the sum in the dtype of its input: under autocast in bfloat16 15680 instead of 15666.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, ignore_index):
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        wide = _wide(hidden.dtype)
        nats = torch.zeros((), dtype=wide, device=hidden.device)
        hidden_grad = torch.empty_like(hidden) if needs_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        chunk = chunk_rows(len(weight))
        low_buffer = hidden.new_empty(min(chunk, len(labels)), len(weight))
        is_low = hidden.dtype != wide
        buffer = torch.empty_like(low_buffer, dtype=wide) if is_low else low_buffer
        for start in range(0, len(labels), chunk):
            rows, target = hidden[start : start + chunk], labels[start : start + chunk]
            scored = (target != ignore_index).unsqueeze(1)
            target = target.unsqueeze(1).masked_fill(~scored, 0)
            rows = rows.masked_fill(~scored, 0)  # so that these add 0 to the gradient of the weight
            low, logits = low_buffer[: len(rows)], buffer[: len(rows)]
            torch.mm(rows, weight.T, out=low)
            if is_low:
                logits.copy_(low)
            log_p = torch.log_softmax(logits, dim=-1, out=logits)
            nats = nats - log_p.gather(1, target).masked_fill(~scored, 0).sum()
            if not (needs_hidden or needs_weight):
                continue
            grad = log_p.exp_()
            grad.scatter_(1, target, grad.gather(1, target) - 1)
            if is_low:
                grad = low.copy_(grad)
            if hidden_grad is not None:
                torch.mm(grad, weight, out=hidden_grad[start : start + chunk]).masked_fill_(~scored, 0)
            if weight_grad is not None and is_low:
                weight_grad += grad.T @ rows
            elif weight_grad is not None:
                weight_grad.addmm_(grad.T, rows)
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.dtypes = hidden.dtype, weight.dtype
        return nats

    @staticmethod
    def backward(ctx, *grad_outputs):
        (upstream,) = grad_outputs
        hidden_grad, weight_grad = ctx.saved_tensors
        return _scaled(hidden_grad, upstream, ctx.dtypes[0]), _scaled(weight_grad, upstream, ctx.dtypes[1]), None, None


def _scaled(gradient: torch.Tensor | None, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """gradient * scale, in place where nothing is cast. In float32, since bfloat16 would round a scale such as 1/3 by 0.2 %."""
    return None if gradient is None else gradient.to(scale.dtype).mul_(scale).to(dtype)


def head_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, ignore_index: int
) -> torch.Tensor:
    """Sum of nats of `labels` [R] for hidden [R, D] and head weight [V, D], without a tensor [R, V].

    Rows with the label `ignore_index` add 0 to the loss and to the gradient. Returns a scalar in at least float32. One
    backward pass: it scales the gradients in place, and torch refuses a second one.
    """
    if not torch.is_grad_enabled():  # needs_input_grad is True for parameters even then
        hidden, weight = hidden.detach(), weight.detach()
    dtype = product_dtype(hidden)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        return _HeadCrossEntropy.apply(hidden, weight, labels, ignore_index)


@torch.no_grad()
def nats_per_token(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """Nats [R] of each label of `labels` [R], 0 for `ignore_index`; in chunks, without gradient, in at least float32."""
    chunk = chunk_rows(len(weight))
    chunks = zip(hidden.split(chunk), labels.split(chunk), strict=True)
    parts = [
        F.cross_entropy((rows @ weight.T).to(_wide(rows.dtype)), target, ignore_index=ignore_index, reduction="none")
        for rows, target in chunks
    ]
    return torch.cat(parts)


def balance_sum(probabilities: torch.Tensor, load: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
    """Switch's balance loss times the number of scored tokens: E * sum_i f_i * sum_t P_t,i.

    probabilities [R, E]: the router's softmax. scored [R]: bool. load [E]: f_i, expert i's share of all assignments,
    without gradient. Per token it is 1 for an even load. Source: Fedus et al., Switch Transformers, arXiv 2101.03961,
    eq. 4, for top-1; with top-k there are k * n assignments.
    """
    return probabilities.shape[-1] * (probabilities * scored.unsqueeze(-1) * load).sum()


def z_sum(logits: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
    """Router z loss times the number of scored tokens: sum_t (logsumexp of the router's logits [R, E] at t)^2.

    Source: Zoph et al., ST-MoE, arXiv 2202.08906, eq. 5.
    """
    return (torch.logsumexp(logits, dim=-1).square() * scored).sum()
