"""Low-rank changes of frozen matrices (LoRA), which keep for the backward pass what only they need.

D width, V vocabulary, R rank
"""

import torch
import torch.nn.functional as F
from torch import nn

from ..autocast import product_dtype
from .gated import gated_product, gated_product_backward


class _LowRankProduct(torch.autograd.Function):
    """x W^T + scale x A^T B^T + bias, where W and bias are frozen and x is `input`, or act(input) * up.

    For the gradient g: of B g^T (scale x A^T), of A h^T x with h = scale g B, of x g W + h A. Kept are input, up and
    scale x A^T; act(input) * up is computed again. The low-rank parts are added in place: a temporary tensor of the
    size of the result would cost more time than their products, and leave a gap between the tensors that are kept.
    """

    @staticmethod
    def forward(ctx, input, up, weight, bias, a, b, scale, hidden_act):
        x = (input if up is None else gated_product(input, up, hidden_act)).reshape(-1, weight.shape[1])
        low = (x @ a.T).mul_(scale)
        ctx.save_for_backward(input, up, weight, a, b, low)
        ctx.scale = scale
        ctx.hidden_act = hidden_act
        y = (x @ weight.T).addmm_(low, b.T)
        y = y if bias is None else y.add_(bias)
        return y.view(*input.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx, *grad_outputs):
        input, up, weight, a, b, low = ctx.saved_tensors
        grad = grad_outputs[0].reshape(-1, len(weight))
        inner = (grad @ b).mul_(ctx.scale)
        x = (input if up is None else gated_product(input, up, ctx.hidden_act)).reshape(-1, weight.shape[1])
        a_grad, b_grad = inner.T @ x, grad.T @ low
        del x
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, a_grad, b_grad, None, None
        input_grad = (grad @ weight).addmm_(inner, a).view_as(input)
        up_grad = None
        if up is not None:
            input_grad, up_grad = gated_product_backward(input_grad, input, up, ctx.hidden_act)
        return input_grad, up_grad, None, None, a_grad, b_grad, None, None


class LowRankLinear(nn.Linear):
    """A frozen matrix plus a low-rank change: W + alpha / R * B A, A [R, in], B [out, R] = 0 at the start.

    dropout: share of the inputs of A that are 0 in training, as in PEFT. Source: LoRA, arXiv 2106.09685.
    """

    def __init__(self, frozen: nn.Linear, rank: int, alpha: float, dropout: float):
        nn.Module.__init__(self)
        self.in_features = frozen.in_features
        self.out_features = frozen.out_features
        self.weight = frozen.weight
        self.bias = frozen.bias
        self.plain = type(frozen)  # nn.Linear or GatedLinear
        self.scale = alpha / rank
        self.dropout = dropout
        self.lora_A, self.lora_B = _low_rank(frozen.weight, rank)

    def forward(self, input, up=None, hidden_act="silu"):
        """input [..., in] -> [..., out].

        With `up` the input is act(input) * up, which is then not kept for the backward pass.
        """
        if self.dropout and self.training:
            input = input if up is None else gated_product(input, up, hidden_act)
            change = F.dropout(input, self.dropout) @ self.lora_A.T * self.scale @ self.lora_B.T
            y = input @ self.weight.T + change
            return y if self.bias is None else y + self.bias
        tensors = (input, up, self.weight, self.bias, self.lora_A, self.lora_B)
        tensors = [tensor if tensor is None else tensor.to(product_dtype(input)) for tensor in tensors]
        with torch.autocast(input.device.type, enabled=False):
            return _LowRankProduct.apply(*tensors, self.scale, hidden_act)

    @torch.no_grad()
    def folded(self) -> nn.Linear:
        """An ordinary layer that computes the same."""
        plain = self.plain(self.in_features, self.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(self.weight + self.lora_B @ (self.lora_A * self.scale))
        plain.bias = self.bias
        return plain


class LowRankHead(nn.Module):
    """weight [V, D] -> weight + alpha / R * B A."""

    def __init__(self, weight: torch.Tensor, rank: int, alpha: float):
        super().__init__()
        self.scale = alpha / rank
        self.lora_A, self.lora_B = _low_rank(weight, rank)

    def forward(self, weight):
        return weight + self.lora_B @ (self.lora_A * self.scale)


def _low_rank(weight: torch.Tensor, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """A [R, in], initialized as in nn.Linear, and B [out, R], zeros."""
    a = weight.new_empty(rank, weight.shape[1], dtype=trained_dtype(weight))
    b = weight.new_zeros(weight.shape[0], rank, dtype=trained_dtype(weight))
    nn.init.uniform_(a, -(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5)
    return nn.Parameter(a), nn.Parameter(b)


def trained_dtype(weight: torch.Tensor) -> torch.dtype:
    """At least float32, on a trunk whose matrices may be stored in bf16: small updates would be lost in it."""
    return torch.promote_types(weight.dtype, torch.float32)
