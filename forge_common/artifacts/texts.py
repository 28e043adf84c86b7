"""The texts that `assemble` reads: for the trunk's statistics, for the router's numbers, and to measure claimed losses again.

T time, V vocabulary
"""

from collections.abc import Collection
from typing import Any

import numpy as np
import torch

from ..data.readers.document import reading_of
from ..data.sources import parse
from ..data.store import prepare
from ..data.tokenizer import Tokenizer
from ..data.windows import Tokens
from ..errors import UserError
from ..model.trunk import Trunk
from ..routing import statistics
from ..routing.mixture import Mixture
from ..routing.tuning import CALIBRATED
from .assembled import Part, route
from .trial import mean_loss

STATISTICS_TOKENS = 1_000_000  # tokens of text like the trunk's that are counted at most
CHECKED_TOKENS = 32_768  # tokens of each text of --check-data that are scored at most
LENGTH = 512  # tokens in a window at most


def trunk_statistics(
    sources: tuple[str, ...], settings: Any, tokenizer: Tokenizer, vocab_size: int
) -> dict[str, torch.Tensor]:
    """The statistics of text like the trunk's, as train_shared.py would count them."""
    sample = statistics.sample(_opened(sources, settings, tokenizer), STATISTICS_TOKENS)
    counts, _ = statistics.count(sample, vocab_size, tokenizer.eos_token_id, 1)
    return counts


def check_sources(check_data: tuple[str, ...], modules: Collection[str]) -> dict[str, str]:
    """The sources of --check-data by the module's name."""
    sources = {}
    for text in check_data:
        name, _, source = text.partition("=")
        if name not in modules or not source:
            raise UserError(f"--check-data {text} is not NAME=SOURCE. The modules are {', '.join(modules)}.")
        sources[name] = source
    return sources


def check_windows(
    source: str, settings: Any, tokenizer: Tokenizer, config: Any, val_fraction: float
) -> list[np.ndarray]:
    """Windows of --check-data: of the documents that a run with this --val-fraction holds out, if it holds out any, else of all."""
    store = _tokens(parse(source)[0], settings, tokenizer, val_fraction)
    return _windows([(store, 1.0)], CHECKED_TOKENS, config)


def calibrated(
    settings: Any,
    trunk: Trunk,
    tokenizer: Tokenizer,
    parts: list[Part],
    background: dict[str, torch.Tensor] | None,
    metadata: dict[str, Any],
) -> dict[str, float]:
    """The router's numbers that fit --calibrate best: each halved and doubled in turn, as long as the loss falls.

    background: the trunk's statistics. metadata: of assembled.json, with the numbers to start from.
    """
    windows = _windows(_opened(settings.calibrate, settings, tokenizer), settings.calibrate_tokens, trunk.config)
    model = Mixture(trunk, {part.name: part.model for part in parts}, None, top_k=metadata["top_k"])

    def loss_of(tuning: dict[str, float]) -> float:
        model.router = route(trunk, background, parts, metadata | {"tuning": tuning})
        return mean_loss(model, windows, "the assembled model on --calibrate")

    best = metadata["tuning"]
    initial_loss = best_loss = loss_of(best)
    for name in CALIBRATED[metadata["router"]]:
        for factor in (0.5, 2.0):
            while True:
                tuning = best | {name: best[name] * factor}
                loss = loss_of(tuning)
                if loss >= best_loss - 1e-4:
                    break
                best, best_loss = tuning, loss
    tokens = sum(map(len, windows))
    print(f"calibrated  on {tokens:,} tokens: {initial_loss:.4f} -> {best_loss:.4f} nats per token; {best}")
    return best


def _opened(sources: tuple[str, ...], settings: Any, tokenizer: Tokenizer) -> list[tuple[Tokens, float]]:
    """(tokens, weight) of each source; weights sum to 1."""
    parsed = [parse(source) for source in sources]
    stores = [_tokens(spec, settings, tokenizer, 0.0) for spec, _ in parsed]
    weights = [
        weight if weight else float(len(store.tokens)) for (_, weight), store in zip(parsed, stores, strict=True)
    ]
    return [(store, weight / sum(weights)) for store, weight in zip(stores, weights, strict=True)]


def _tokens(spec: str, settings: Any, tokenizer: Tokenizer, val_fraction: float) -> Tokens:
    """The tokens of the documents that `val_fraction` holds out, if it holds out any, else of all."""
    cache_dir = settings.cache_dir.expanduser()
    corpus = prepare(spec, tokenizer, reading_of(settings), cache_dir=cache_dir, val_fraction=val_fraction)
    return corpus.validation if len(corpus.validation.tokens) else corpus.train


def _windows(sources: list[tuple[Tokens, float]], tokens: int, config: Any) -> list[np.ndarray]:
    """Windows of ids, int64 [up to T + 1], of at most `tokens` tokens: each document by itself, evenly spaced over its source."""
    length = min(config.max_position_embeddings, LENGTH)
    windows = [
        document[start : start + length + 1]
        for document in statistics.sample(sources, tokens)
        for start in range(0, len(document) - 1, length)
    ]
    if not windows:
        raise UserError("the text of --check-data or --calibrate has no token to score. Name more text.")
    return windows
