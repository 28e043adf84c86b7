"""What `evaluate` scores: the documents of named sources, and texts in which the domain changes.

T tokens, H tokens of history
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import numpy as np

from ..artifacts.metadata import training_texts
from ..data.byte_lengths import ByteLengths
from ..data.readers.document import reading_of
from ..data.sources import parse
from ..data.store import Corpus, prepare
from ..data.windows import Windows
from ..errors import UserError

SPLICED = 64  # windows in the spliced column at most


@dataclass(frozen=True)
class Piece:
    """A window to score."""

    document: Any
    """The document's key, the same for all its windows."""
    size: int
    """Number of labels before the padding. In a conversation not all of them are scored."""
    scored: int
    """Number of labels that are scored."""
    tokens: Callable[[], np.ndarray]
    """Reads the window's ids, int64 [T + 1]."""
    before: Callable[[], np.ndarray]
    """Reads the ids before the window, int64 [H]; -1 where there are none."""


@dataclass(frozen=True)
class Column:
    pieces: list[Piece]
    bytes: int | None
    """Bytes of the text that is scored; None where the tokenizer does not tell."""


class Choice(NamedTuple):
    """Which documents of a source are scored, and why."""

    share: float
    """Share of the documents, by the hash of their content."""
    text: Literal["held out", "trained on", "other", "chosen"]
    """held out: no part was trained on these documents. trained on: a part was, and held out none of the text.

    other: no part states that it was trained on the text. chosen: by --val-fraction.
    """
    reason: str


def open_columns(
    sources: dict[str, str],
    parts: dict[str, dict[str, Any]],
    model: Any,
    tokenizer: Any,
    settings: Any,
) -> tuple[dict[str, Column], dict[str, Choice]]:
    """The columns of `sources` and, for each, which of its documents are scored, as `choose` decides.

    parts: the metadata of the trunk and of each module, by name.
    """
    open_corpus = cache(partial(divide, tokenizer=tokenizer, settings=settings))
    choices = {name: choose(source, parts, open_corpus, settings) for name, source in sources.items()}
    shares = {name: choice.share for name, choice in choices.items()}
    return read_columns(sources, tokenizer, model.config, settings, shares, open_corpus), choices


def choose(
    source: str, parts: dict[str, dict[str, Any]], open_corpus: Callable[[str, float], Corpus], settings: Any
) -> Choice:
    """Which documents of a source to score: those of --val-fraction; without it, those that no part was trained on.

    A part was trained on a source if its metadata have the source's name, or the digest of its training documents. Then
    the documents are scored that all such parts held out; if one of them held out nothing, all documents are, as of any
    other text. open_corpus: `divide` for a source and a share.
    """
    if settings.val_fraction is not None:
        return Choice(
            settings.val_fraction, "chosen", f"the first {settings.val_fraction:.2%} by hash (--val-fraction)"
        )
    spec = parse(source)[0]
    shares: dict[str, float] = {}
    for name, metadata in parts.items():
        for text in training_texts(metadata):
            same_name = text.is_called(spec)
            if same_name or (text.digest and text.digest == open_corpus(source, text.val_fraction).train.digest):
                shares[name] = min(text.val_fraction, shares.get(name, 1.0))
    if not shares:
        without_texts = [name for name, metadata in parts.items() if not training_texts(metadata)]
        unknown = f"; what {', '.join(without_texts)} was trained on is not known" if without_texts else ""
        return Choice(1.0, "other", f"all of them: no part states that it was trained on this text{unknown}")
    share = min(shares.values())
    names = ", ".join(name for name in shares if shares[name] == share)
    if not share or not open_corpus(source, share).validation.documents:
        return Choice(1.0, "trained on", f"all of them: TRAINED ON by {names}, which held out nothing of this text")
    return Choice(share, "held out", f"held out by {', '.join(shares)}: the first {share:.2%} by hash")


def read_columns(
    sources: dict[str, str],
    tokenizer: Any,
    config: Any,
    settings: Any,
    shares: dict[str, float] | None = None,
    open_corpus: Callable[[str, float], Corpus] | None = None,
) -> dict[str, Column]:
    """The column of each named source, and `spliced` with --spliced.

    config: of the model. shares: of the documents of a source that are scored, by its name; 1 where it is not given.
    open_corpus: `divide` for a source and a share, if it keeps what was opened before.
    """
    share_of = dict.fromkeys(sources, 1.0) | (shares or {})
    length = settings.sequence_length or min(config.max_position_embeddings, 2048)
    byte_lengths = ByteLengths(tokenizer)
    columns = {}
    stores = {}
    for name, source in sources.items():
        stores[name] = scored_stores(source, tokenizer, settings, share_of[name], open_corpus)
        columns[name] = _cut_documents(source, stores[name], length, config, settings, share_of[name], byte_lengths)
    if settings.spliced:
        columns["spliced"] = spliced(list(stores.values()), length, settings.spliced)[0]
    return columns


def scored_stores(
    source: str,
    tokenizer: Any,
    settings: Any,
    share: float,
    open_corpus: Callable[[str, float], Corpus] | None = None,
) -> list[Any]:
    """The stores whose documents are scored: those of the first `share` of a source by hash."""
    corpus = open_corpus(source, share) if open_corpus else divide(source, share, tokenizer, settings)
    return [corpus.validation] if share < 1 else [corpus.validation, corpus.train]


def divide(source: str, share: float, tokenizer: Any, settings: Any) -> Corpus:
    """Opens a source with the first `share` of its documents by hash as validation, and the rest as train."""
    return prepare(
        parse(source)[0],
        tokenizer,
        reading_of(settings),
        cache_dir=settings.cache_dir.expanduser(),
        val_fraction=min(share, 0.999999),
    )


def _cut_documents(
    source: str, stores: list[Any], length: int, config: Any, settings: Any, share: float, byte_lengths: ByteLengths
) -> Column:
    """Cuts each document into windows of `length`, sorted by their size, so that a batch of short ones is narrow."""
    memory = max(settings.router_memory, 1)
    pieces = []
    total = 0
    for piece in _pieces(stores, length, memory, config):
        pieces.append(piece)
        total += piece.scored
        if settings.max_tokens and total >= settings.max_tokens:
            break
    if not pieces:
        raise UserError(f"{source}: no document to score among the first {share:.2%}. Use --val-fraction 1 for all.")
    sizes = []
    for part, store in enumerate(stores):
        windows = (piece.tokens() for piece in pieces if piece.document[0] == part)
        sizes.append(byte_lengths.count(store, windows, config.ignore_index))
    pieces.sort(key=lambda piece: piece.size)
    known = [size for size in sizes if size is not None]
    return Column(pieces, sum(known) if len(known) == len(sizes) else None)


def _pieces(stores: list[Any], length: int, memory: int, config: Any) -> Iterator[Piece]:
    """The windows that have a scored label, in the order of the documents. memory: ids before a window."""
    for part, store in enumerate(stores):
        windows = Windows(store, length, pack=False, filler=config.ignore_index)
        for i in range(len(windows)):
            scored = windows.scored(i)
            if not scored:  # a part of a conversation without an answer
                continue
            document = (part, windows.spans(i)[0][0])
            before = partial(windows.before, i, memory, config.eos_token_id)
            yield Piece(document, windows.size(i), scored, partial(windows.__getitem__, i), before)


def spliced(domains: list[list[Any]], length: int, every: int) -> tuple[Column, np.ndarray]:
    """A column of windows whose domain changes every `every` tokens, and the domain of each token [windows, length + 1].

    The next domain is drawn at random among the others; its text continues where its last stretch ended.
    """
    texts = [np.concatenate([store.read(0, len(store.tokens)) for store in stores]) for stores in domains]
    number = max(1, min(SPLICED, min(map(len, texts)) * len(texts) // (length + 1)))
    generator = np.random.default_rng(0)
    places = [0] * len(texts)
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
    pieces = [
        Piece(row, length, int((tokens[row, 1:] >= 0).sum()), partial(tokens.__getitem__, row), lambda: unknown)
        for row in range(number)
    ]
    return Column(pieces, None), labels
