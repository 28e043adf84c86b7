"""How large and how costly a model of each preset would be."""

import dataclasses
from typing import Any

import torch

from .config import AUTO, PRESETS, model_config
from .trunk import Trunk


def preset_sizes(settings: Any, tokenizer: Any) -> dict[str, tuple[int, int]]:
    """Parameters, and FLOPs of an update per token, of the presets that --preset auto can choose, the smallest first.

    Only small where one of its sizes is given. Nothing is allocated.
    """
    if settings.preset != AUTO:
        return {}
    names = ["small"] if any(getattr(settings, size) for size in PRESETS["small"]) else list(PRESETS)
    found = {}
    for name in names:
        with torch.device("meta"):
            model = Trunk(model_config(dataclasses.replace(settings, preset=name), tokenizer))
        found[name] = (sum(p.numel() for p in model.parameters()), model.flops_per_token(settings.sequence_length))
    return found
