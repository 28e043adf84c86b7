"""What `evaluate` scores: the documents of named sources, each alone, and texts that change their domain on the way."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..data.readers.document import reading_of
from ..data.sources import parse
from ..data.store import prepare
from ..data.windows import Windows
from ..errors import UserError

SPLICED = 64  # windows of the spliced column


@dataclass(frozen=True)
class Piece:
    """A window to score: its first `scored` labels are real. tokens() int64 [T + 1], before() int64 [H]."""

    document: Any  # pieces of one document share it
    scored: int
    tokens: Callable[[], np.ndarray]
    before: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Column:
    pieces: list[Piece]
    bytes: int | None  # of the text, where all of it is scored


def columns(
    named: list[tuple[str, str, str]], tokenizer: Any, model: Any, settings: Any, fraction: float
) -> dict[str, Column]:
    """NAME -> what is scored of its source, and `spliced` where it was asked for. model: its configuration."""
    memory = max(settings.router_memory, 1)
    length = settings.sequence_length or min(model.max_position_embeddings, 2048)
    found, stores = {}, {}
    for name, _, source in named:
        stores[name] = held_out(source, tokenizer, settings, fraction)
        found[name] = _alone(source, stores[name], length, model, memory, settings.max_tokens, fraction)
    if settings.spliced:
        found["spliced"] = spliced(list(stores.values()), length, settings.spliced)[0]
    return found


def held_out(source: str, tokenizer: Any, settings: Any, fraction: float) -> list[Any]:
    """The stores whose documents are scored."""
    corpus = prepare(
        parse(source)[0],
        tokenizer,
        reading_of(settings),
        cache_dir=settings.cache_dir.expanduser(),
        val_fraction=min(fraction, 0.999999),
    )
    return [corpus.validation] if fraction < 1 else [corpus.validation, corpus.train]


def _alone(
    source: str, stores: list[Any], length: int, model: Any, memory: int, max_tokens: int, fraction: float
) -> Column:
    """Each document cut into windows of `length`, like lengths together so that short batches are cut short."""
    pieces = []
    for part, store in enumerate(stores):
        windows = Windows(store, length, pack=False, filler=model.ignore_index)
        for i in range(len(windows)):
            before = partial(windows.before, i, memory, model.eos_token_id)
            document = (part, windows.spans(i)[0][0])
            pieces.append(Piece(document, windows.scored(i), partial(windows.__getitem__, i), before))
    if max_tokens:
        total = np.cumsum([piece.scored for piece in pieces])
        pieces = pieces[: int(np.searchsorted(total, max_tokens)) + 1]
    if not pieces:
        raise UserError(f"{source}: no document to score among the first {fraction:.2%}. Use --val-fraction 1 for all.")
    pieces.sort(key=lambda piece: piece.scored)
    return Column(pieces, None if max_tokens else sum(store.bytes for store in stores))


def spliced(domains: list[list[Any]], length: int, every: int) -> tuple[Column, np.ndarray]:
    """Windows whose domain changes every `every` tokens, and the domain's number of each token [windows, length + 1].

    Every domain follows every other equally often; the text goes on where it was left, within what is held out.
    """
    texts = [np.concatenate([np.asarray(store.tokens, dtype=np.int64) for store in stores]) for stores in domains]
    number = max(1, min(SPLICED, min(map(len, texts)) * len(texts) // (length + 1)))
    generator, places = np.random.default_rng(0), [0] * len(texts)
    tokens = np.empty((number, length + 1), np.int64)
    labels = np.empty((number, length + 1), np.int64)
    for row in range(number):
        domain = -1
        for start in range(0, length + 1, every):
            others = [d for d in range(len(texts)) if d != domain or len(texts) == 1]
            domain = int(generator.choice(others))
            size = min(every, length + 1 - start)
            if places[domain] + size > len(texts[domain]):
                places[domain] = 0
            tokens[row, start : start + size] = texts[domain][places[domain] : places[domain] + size]
            labels[row, start : start + size] = domain
            places[domain] += size
    unknown = np.full(1, -1, np.int64)
    pieces = [Piece(row, length, partial(tokens.__getitem__, row), lambda: unknown) for row in range(number)]
    return Column(pieces, None), labels
