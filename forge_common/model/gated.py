"""act(gate) * up, the product inside a gated feed-forward, and the matrix after it: SwiGLU with silu, GeGLU with gelu."""

import torch
import torch.nn.functional as F
from torch import nn

from ..autocast import product_dtype


class _GatedProduct(torch.autograd.Function):
    """act(gate) * up. The backward pass has gate and up alone; torch's own product would keep act(gate) too."""

    @staticmethod
    def forward(ctx, gate, up, hidden_act):
        ctx.save_for_backward(gate, up)
        ctx.hidden_act = hidden_act
        # A view: torch.compile of torch 2.11 loses the gradient of a result that was changed in place.
        return _act(gate, hidden_act).mul_(up).view_as(gate)

    @staticmethod
    def backward(ctx, *grad_outputs):
        gate, up = ctx.saved_tensors
        return *gated_product_backward(grad_outputs[0], gate, up, ctx.hidden_act), None


def gated_product_backward(grad, gate, up, hidden_act: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of gate and up, from that of act(gate) * up. The first takes the memory of that of act(gate)."""
    gate_grad = grad * up
    if hidden_act == "silu":
        torch.ops.aten.silu_backward.grad_input(gate_grad, gate, grad_input=gate_grad)
    else:
        torch.ops.aten.gelu_backward.grad_input(gate_grad, gate, approximate="tanh", grad_input=gate_grad)
    return gate_grad, _act(gate, hidden_act).mul_(grad)


def _act(x: torch.Tensor, hidden_act: str) -> torch.Tensor:
    return F.silu(x) if hidden_act == "silu" else F.gelu(x, approximate="tanh")


def gated_product(gate: torch.Tensor, up: torch.Tensor, hidden_act: str = "silu") -> torch.Tensor:
    """act(gate) * up, elementwise. hidden_act: silu or gelu_pytorch_tanh."""
    return _GatedProduct.apply(gate, up, hidden_act)


class _GatedLinear(torch.autograd.Function):
    """(act(gate) * up) W^T. The product is computed again in the backward pass, which has gate, up and W alone."""

    @staticmethod
    def forward(ctx, gate, up, weight, hidden_act):
        ctx.save_for_backward(gate, up, weight)
        ctx.hidden_act = hidden_act
        return F.linear(gated_product(gate, up, hidden_act), weight)

    @staticmethod
    def backward(ctx, *grad_outputs):
        gate, up, weight = ctx.saved_tensors
        grad = grad_outputs[0]
        weight_grad = None
        if ctx.needs_input_grad[2]:
            product = gated_product(gate, up, ctx.hidden_act)
            weight_grad = grad.reshape(-1, len(weight)).T @ product.reshape(-1, weight.shape[1])
            del product
        if not ctx.needs_input_grad[0]:
            return None, None, weight_grad, None
        return *gated_product_backward(grad @ weight, gate, up, ctx.hidden_act), weight_grad, None


class GatedLinear(nn.Linear):
    """The last matrix of a gated feed-forward, made with `bias=False`: act(gate) * up -> (act(gate) * up) W^T."""

    def forward(self, gate, up, hidden_act="silu"):
        """gate, up [..., in] -> [..., out]. Their product is not kept for the backward pass."""
        dtype = product_dtype(gate)
        return _GatedLinear.apply(gate.to(dtype), up.to(dtype), self.weight.to(dtype), hidden_act)
