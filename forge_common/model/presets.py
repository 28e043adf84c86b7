"""The sizes of a new model, and how large and how costly one of each preset would be."""

import dataclasses
from typing import Any

import torch

from .config import AUTO, PRESETS, ModelConfig
from .trunk import Trunk


def model_config(settings: Any, tokenizer: Any) -> ModelConfig:
    """The sizes of the settings, else of the preset, with the tokenizer's vocabulary and special ids."""
    preset = PRESETS["small" if settings.preset == AUTO else settings.preset]
    sizes: dict[str, Any] = {name: getattr(settings, name) or size for name, size in preset.items()}
    return ModelConfig(
        vocab_size=tokenizer.vocab_size,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        max_position_embeddings=settings.sequence_length,
        num_local_experts=settings.num_experts,
        num_experts_per_tok=settings.experts_per_token,
        tie_word_embeddings=settings.tie_word_embeddings,
        cross_document_attention=settings.cross_document_attention,
        router_aux_loss_coef=settings.router_aux_loss_coef,
        router_z_loss_coef=settings.router_z_loss_coef,
        **sizes,
    )


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
