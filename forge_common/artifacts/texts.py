"""Text that `assemble` reads: to count the trunk's statistics, to fit the router's numbers (--calibrate), and to
measure claimed losses again (--check-data).

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
from .assembled import Part, make_router
from .trial import mean_loss

STATISTICS_TOKENS = 1_000_000  # tokens that are counted for statistics at most
CHECKED_TOKENS = 32_768  # tokens of each text of --check-data that are scored at most
LENGTH = 512  # tokens in a window at most


def count_statistics(
    sources: tuple[str, ...], settings: Any, tokenizer: Tokenizer, vocab_size: int
) -> dict[str, torch.Tensor]:
    """The statistics of a text, as a training run would count them, but also of tokens that only one document has."""
    sample = statistics.sample(_open_sources(sources, settings, tokenizer), STATISTICS_TOKENS)
    counts, _ = statistics.count(sample, vocab_size, tokenizer.eos_token_id, 1)
    return counts


def parse_check_data(check_data: tuple[str, ...], modules: Collection[str]) -> dict[str, str]:
    """The sources of --check-data by the module's name."""
    sources = {}
    for text in check_data:
        name, _, source = text.partition("=")
        if name not in modules or not source:
            raise UserError(f"--check-data {text} is not NAME=SOURCE. The modules are {', '.join(modules)}.")
        sources[name] = source
    return sources


def read_check_data(
    source: str, settings: Any, tokenizer: Tokenizer, config: Any, val_fraction: float
) -> list[np.ndarray]:
    """Windows of one source of --check-data: of its held-out documents, or of all if none is held out.

    val_fraction: the share that the module's run held out.
    """
    store = _open_tokens(parse(source)[0], settings, tokenizer, val_fraction)
    return _cut_windows([(store, 1.0)], CHECKED_TOKENS, config)


def calibrate(
    settings: Any,
    trunk: Trunk,
    tokenizer: Tokenizer,
    parts: list[Part],
    trunk_statistics: dict[str, torch.Tensor] | None,
    metadata: dict[str, Any],
) -> dict[str, float]:
    """Fits the router's numbers to --calibrate: each in turn is halved, then doubled, as long as the loss falls.

    metadata: the content of assembled.json, with the numbers to start from.
    """
    sources = _open_sources(settings.calibrate, settings, tokenizer)
    windows = _cut_windows(sources, settings.calibrate_tokens, trunk.config)
    model = Mixture(trunk, {part.name: part.model for part in parts}, None, top_k=metadata["top_k"])

    def loss_of(tuning: dict[str, float]) -> float:
        model.router = make_router(trunk, trunk_statistics, parts, metadata | {"tuning": tuning})
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


def _open_sources(sources: tuple[str, ...], settings: Any, tokenizer: Tokenizer) -> list[tuple[Tokens, float]]:
    """(tokens, weight) of each source; weights sum to 1. A source without a weight has that of its size."""
    stores = []
    weights = []
    for source in sources:
        spec, weight = parse(source)
        store = _open_tokens(spec, settings, tokenizer, 0.0)
        stores.append(store)
        weights.append(weight or float(len(store.tokens)))
    return [(store, weight / sum(weights)) for store, weight in zip(stores, weights, strict=True)]


def _open_tokens(spec: str, settings: Any, tokenizer: Tokenizer, val_fraction: float) -> Tokens:
    """The tokens of the documents that `val_fraction` holds out, if it holds out any, else of all."""
    cache_dir = settings.cache_dir.expanduser()
    corpus = prepare(spec, tokenizer, reading_of(settings), cache_dir=cache_dir, val_fraction=val_fraction)
    return corpus.validation if len(corpus.validation.tokens) else corpus.train


def _cut_windows(sources: list[tuple[Tokens, float]], tokens: int, config: Any) -> list[np.ndarray]:
    """Windows of ids, int64 [up to T + 1], of at most `tokens` tokens: each document by itself, evenly spaced over its
    source.
    """
    length = min(config.max_position_embeddings, LENGTH)
    windows = [
        document[start : start + length + 1]
        for document in statistics.sample(sources, tokens)
        for start in range(0, len(document) - 1, length)
    ]
    if not windows:
        raise UserError("the text of --check-data or --calibrate has no token to score. Name more text.")
    return windows
