"""What autocast does to matrix products, for the operations of our own, which it does not know."""

import torch


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a matrix product reads x: under autocast its dtype, else that of x. float64 is not cast."""
    device = x.device.type
    is_cast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if is_cast else x.dtype
