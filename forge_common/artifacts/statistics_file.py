"""Reads and verifies statistics.safetensors, which trunks and modules have for the routers."""

from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..files.tensors import Tensors, read_tensors, verify
from ..files.untrusted import quoted
from ..model.config import ModelConfig
from ..routing.statistics import BIGRAM_BUCKETS, moment_shapes

STATISTICS = (torch.uint8, torch.float16)  # the dtypes of codes and of moments


def read_statistics(folder: Path, metadata: dict[str, Any], config: ModelConfig) -> Tensors | None:
    """The verified statistics in the folder of a trunk or a module; None if it has none. config: of the trunk."""
    path = folder / "statistics.safetensors"
    if "statistics_digest" not in metadata and not path.exists():
        return None
    statistics = read_tensors(path, STATISTICS)
    verify(path, statistics, metadata, "statistics_digest", "its metadata")
    for name, size in (("unigrams", config.vocab_size), ("bigrams", BIGRAM_BUCKETS)):
        codes = statistics.get(name)
        if codes is None or codes.shape != (size,) or codes.dtype != torch.uint8:
            raise UserError(
                f"{path}: {name} are not {size} codes of 8 bits. Make the artifact again with this version."
            )
    moments = {
        name: (tensor.dtype, tuple(tensor.shape))
        for name, tensor in statistics.items()
        if name not in ("unigrams", "bigrams")
    }
    shapes = moment_shapes(config.num_hidden_layers, config.hidden_size)
    if moments and moments != {name: (torch.float16, shape) for name, shape in shapes.items()}:
        raise UserError(
            f"{path} has the moments {quoted(moments)}; those of this trunk have the shapes {shapes} in float16. "
            "Make the artifact again with this version."
        )
    return statistics
