"""What `evaluate` and `generate` need of a model, be it a trunk or an assembled model.

B batch, T time, H tokens of history, E candidates (the trunk first, then the modules), V vocabulary
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from .config import ModelConfig
from .trunk import Cache


class LanguageModel(Protocol):
    @property
    def config(self) -> ModelConfig: ...

    @property
    def names(self) -> Sequence[str]:
        """The names of the E candidates."""
        ...

    @property
    def weights(self) -> torch.Tensor | None:
        """Gate weights [B, T, E] of the last pass; None where there is no router."""
        ...

    def nats(self, tokens: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
        """tokens [B, T + 1], the document before them [B, H] -> nats of each label [B, T], 0 where not scored."""
        ...

    def next_logits(self, inputs: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """inputs [B, T] -> logits [B, V] of the next token."""
        ...
