"""Nats and counts. A loss here is a sum over scored tokens; whoever knows the whole update divides.

B batch, T time, D width, V vocabulary, E experts, R = B * T rows.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

CHUNK_ROWS = 512  # rows of logits that exist at one time: 512 x V, whatever the batch


class Sums(NamedTuple):
    """What a forward pass returns: sums over the scored tokens of this micro-batch, on the device.

    objective: nats + coefficients x (balance, z); the script scales it by P * N / n and sends it backward.
    nats: cross-entropy, base e. tokens: scored (non-PAD) labels. balance, z: router losses, summed over tokens and averaged
    over layers (0 without a router). expert_counts: [layers, E] assignments of scored tokens ([0, 0] without a router).
    """

    objective: torch.Tensor
    nats: torch.Tensor
    tokens: torch.Tensor
    balance: torch.Tensor
    z: torch.Tensor
    expert_counts: torch.Tensor


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Nats are added up in at least float32: a sum over thousands of tokens has three good digits in bfloat16."""
    return torch.promote_types(dtype, torch.float32)


class _HeadCrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(hidden @ weight.T)[label], CHUNK_ROWS rows at a time, gradients made on the way forward.

    torch's F.linear_cross_entropy works the same way, but returns the sum in the dtype of its input (bfloat16 under
    autocast: 15680 for 15666), which is why this exists.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, ignore_index):
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        wide = _wide(hidden.dtype)
        nats = torch.zeros((), dtype=wide, device=hidden.device)
        hidden_grad = torch.empty_like(hidden) if needs_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        for start in range(0, len(labels), CHUNK_ROWS):
            rows, target = hidden[start : start + CHUNK_ROWS], labels[start : start + CHUNK_ROWS]
            scored = (target != ignore_index).unsqueeze(1)
            target = target.unsqueeze(1).masked_fill(~scored, 0)
            log_p = torch.log_softmax((rows @ weight.T).to(wide), dim=-1)
            nats -= log_p.gather(1, target).masked_fill(~scored, 0).sum()
            if not (needs_hidden or needs_weight):
                continue
            grad = log_p.exp_()
            grad.scatter_add_(1, target, torch.full_like(target, -1, dtype=wide))
            grad = grad.masked_fill_(~scored, 0).to(hidden.dtype)
            if needs_hidden:
                torch.mm(grad, weight, out=hidden_grad[start : start + CHUNK_ROWS])
            if needs_weight and wide == hidden.dtype:
                weight_grad.addmm_(grad.T, rows)
            elif needs_weight:
                weight_grad += grad.T @ rows
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.weight_dtype = weight.dtype
        return nats

    @staticmethod
    def backward(ctx, upstream):
        hidden_grad, weight_grad = ctx.saved_tensors
        return (
            # In float32 also for bfloat16: a scale such as 1/3 would be off by 0.2 % in it, for all of the gradient.
            None if hidden_grad is None else (hidden_grad.to(upstream.dtype) * upstream).to(hidden_grad.dtype),
            None if weight_grad is None else (weight_grad * upstream).to(ctx.weight_dtype),
            None,
            None,
        )


def head_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, ignore_index: int
) -> torch.Tensor:
    """Sum of nats of `labels` [R] under the head `weight` [V, D] on `hidden` [R, D]; no [R, V] tensor ever exists.

    Rows whose label is `ignore_index` count nothing and get no gradient. Returns a scalar in at least float32.
    The gradient is first-order only (no double backward).
    """
    device = hidden.device.type
    if not torch.is_grad_enabled():  # needs_input_grad is True for a parameter all the same: 3 x the work
        hidden, weight = hidden.detach(), weight.detach()
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:  # which autocast leaves alone
        low = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(low), weight.to(low)
    with torch.autocast(device, enabled=False):
        return _HeadCrossEntropy.apply(hidden, weight, labels, ignore_index)


@torch.no_grad()
def nats_per_token(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """Nats of each of `labels` [R], 0 where it is `ignore_index`; chunked, without gradient. [R], at least float32."""
    chunks = zip(hidden.split(CHUNK_ROWS), labels.split(CHUNK_ROWS), strict=True)
    parts = [
        F.cross_entropy((rows @ weight.T).to(_wide(rows.dtype)), target, ignore_index=ignore_index, reduction="none")
        for rows, target in chunks
    ]
    return torch.cat(parts)


def balance_sum(probabilities: torch.Tensor, load: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
    """Switch's balance loss times the number of scored tokens: E * sum_i f_i * sum_t P_t,i.

    probabilities [R, E]: the router's softmax. scored [R]: bool. load [E]: f_i, the share of all assignments that expert i
    took; a constant to the gradient. Divided by the tokens of the update it is 1 for a perfectly even load.
    Source: Fedus et al., Switch Transformers, arXiv 2101.03961, eq. 4 (there top-1; with top-k the shares are of all k * n
    assignments).
    """
    return probabilities.shape[-1] * (probabilities * scored.unsqueeze(-1) * load).sum()


def z_sum(logits: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
    """Router z loss times the number of scored tokens: sum_t (logsumexp of the router's logits [R, E])^2.

    Source: Zoph et al., ST-MoE, arXiv 2202.08906, eq. 5.
    """
    return (torch.logsumexp(logits, dim=-1).square() * scored).sum()
