"""RMSNorm. Source: Zhang and Sennrich, arXiv 1910.07467."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import nn


class _RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension, in at least float32.

    The backward pass has x and one number a row. On a CPU torch computes F.rms_norm in steps, which keep x / sqrt(...)
    too and take two to three times as long.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        factor = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, factor)
        # A view: torch.compile of torch 2.11 loses the gradient of a result that was changed in place.
        return (wide * factor).mul_(weight).to(x.dtype).view_as(x)

    @staticmethod
    def backward(ctx, *grad_outputs):
        x, weight, factor = ctx.saved_tensors
        grad = grad_outputs[0].to(factor.dtype)
        normed = x * factor
        weight_grad = None
        if ctx.needs_input_grad[1]:
            weight_grad = (grad * normed).reshape(-1, len(weight)).sum(0).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, weight_grad, None
        grad = grad * weight
        along = (grad * normed).mean(-1, keepdim=True)
        return grad.sub_(normed.mul_(along)).mul_(factor).to(x.dtype), weight_grad, None


class RMSNorm(nn.RMSNorm):
    """torch's, in less memory and time on a CPU. A GPU has one kernel for it, which keeps as much."""

    def forward(self, x):
        return rms_norm(x, self.weight, cast(float, self.eps))


class GemmaRMSNorm(nn.RMSNorm):
    """RMSNorm that multiplies with 1 + weight."""

    def reset_parameters(self):
        nn.init.zeros_(self.weight)

    def forward(self, x):
        return rms_norm(x, 1 + self.weight, cast(float, self.eps))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of the last dimension of x [..., D] with weight [D], in the dtype of x."""
    if x.device.type == "cpu":
        return _RMSNorm.apply(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)
