"""silu(gate) * up, the product inside a SwiGLU feed-forward."""

import torch
import torch.nn.functional as F


class _SiluProduct(torch.autograd.Function):
    """silu(gate) * up, of which gate and up are kept for the backward pass; torch's own product would keep silu(gate) too.

    With s = sigmoid(gate): d / d gate = up * s * (1 + gate * (1 - s)), d / d up = silu(gate) = gate * s.
    """

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, *grad_outputs):
        return silu_product_backward(grad_outputs[0], *ctx.saved_tensors)


def silu_product_backward(grad, gate, up) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of gate and up for that of silu(gate) * up."""
    return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def silu_product(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, elementwise."""
    return _SiluProduct.apply(gate, up)
