"""Which of a GPU's kernels a training run uses."""

import os
from typing import Any

import torch

from .hardware import compute_dtype

AMPERE = (8, 0)  # the first compute capability with bf16
SMALLEST_HEAD = 16  # of flex_attention on a GPU


def choose_kernels(trunk: Any, settings: Any, accelerator: Any) -> None:
    """Kernels that give the same bits each time (--deterministic), and one that needs no mask [T, T] to separate
    documents.

    Call it before the first matrix product. A CPU's kernels do give the same bits.
    """
    if accelerator.device.type != "cuda":
        return
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks for
        # Filling memory helps to find errors, and takes time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
        torch.use_deterministic_algorithms(True)
    low = compute_dtype(accelerator.mixed_precision, settings.dtype).itemsize == 2
    recent = torch.cuda.get_device_capability(accelerator.device) >= AMPERE
    trunk.model.fused_document_mask = low and recent and trunk.config.head_dim >= SMALLEST_HEAD
