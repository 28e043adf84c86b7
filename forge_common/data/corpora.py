"""From the sources in the settings to what a run reads: the tokenizer, the training stream and the held-out windows."""

import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError
from ..files.atomic import publish
from ..files.tensors import give_back_memory
from .byte_lengths import ByteLengths
from .fraction import fraction_for, too_few
from .held_out import HeldOut, choose
from .order import Mixture
from .readers.document import reading_of
from .sources import facts, parse, read
from .store import Corpus, prepare
from .tokenizer import SAMPLE_PER_TOKEN, Tokenizer, load_tokenizer, resolve
from .windows import Tokens, Windows
from .writer import in_validation

GENERAL_FRACTION = 0.01  # of the documents of --general-data are held out, as in training


class Corpora(NamedTuple):
    """What a run reads."""

    training: Mixture
    """The endless stream of windows."""
    held_out: list[HeldOut]
    """Windows to validate on; may be []."""
    digests: dict[str, str]
    """Source -> SHA-256 of its tokens."""
    report: list[str]
    """Lines of the plan."""
    fraction: float
    """Fraction of the documents that is held out; 0 with --val-data."""


def log_names(sources: Sequence[str]) -> list[str]:
    """A name of each source for the keys of the log: the end of its path that tells it from the others, such as law.jsonl."""
    specs = [parse(source)[0].rstrip("/").split("/") for source in sources]
    names: list[str] = []
    for depth in range(1, max(map(len, specs), default=0) + 1):
        names = [re.sub(r"[^A-Za-z0-9._-]+", "_", "/".join(parts[-depth:])).strip("_") for parts in specs]
        if len(set(names)) == len(names) and all(names):
            return names
    return [f"{name}_{number}" for number, name in enumerate(names)]


def tokenizer_for(settings: Any, print_line: Callable[[str], None] = lambda line: None) -> Tokenizer:
    """The tokenizer of --tokenizer. train:VOCAB is trained once for its sources, and cached."""
    if not settings.tokenizer.startswith("train:"):
        return resolve(settings.tokenizer, lambda characters: (), settings.eos_token)
    fraction = fraction_for(settings)
    # Everything that the tokenizer depends on. The name of its folder is the hash of it.
    inputs: list[Any] = [settings.tokenizer, fraction, asdict(reading_of(settings))]
    inputs += [SAMPLE_PER_TOKEN, *(facts(parse(source)[0]) for source in settings.data)]
    name = hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()[:32]
    folder = Path(settings.cache_dir).expanduser() / "tokenizers" / name
    if folder.is_dir():
        try:
            return load_tokenizer(folder)
        except UserError as error:
            print_line(f"tokenizer   {error} It is in the cache, and is trained again")
            shutil.rmtree(folder, ignore_errors=True)
    print_line(
        f"tokenizer   training one ({settings.tokenizer}); then all text is tokenized. Later runs find both in {folder.parents[1]}"
    )
    tokenizer = resolve(settings.tokenizer, partial(_training_texts, settings, fraction), settings.eos_token)
    give_back_memory()
    publish(folder, tokenizer.save, load_tokenizer, keep_existing=True)
    return tokenizer


def _training_texts(settings: Any, fraction: float, characters: int) -> Iterator[str]:
    """Text that is not held out: one document from each source in turn, each source up to its share of the characters."""
    share = characters // len(settings.data)
    reading = reading_of(settings)

    def texts(source: str) -> Iterator[str]:
        size = 0
        for document in read(parse(source)[0], reading):
            if in_validation(document.digest, fraction):
                continue
            for piece in document.pieces:
                size += len(piece)
                yield piece
            if size > share:
                return

    for turn in itertools.zip_longest(*(texts(source) for source in settings.data)):
        yield from (text for text in turn if text is not None)


def open_corpora(settings: Any, tokenizer: Tokenizer, config: Any, print_line: Callable[[str], None]) -> Corpora:
    """Open the tokens of all sources; those not in the cache are tokenized. UserError if the text is too little for one
    update.

    config: of the model.
    """
    ignore_index = config.ignore_index
    reading = reading_of(settings)

    def prepared(spec: str, val_fraction: float) -> Corpus:
        cache_dir = Path(settings.cache_dir).expanduser()
        return prepare(spec, tokenizer, reading, cache_dir=cache_dir, val_fraction=val_fraction, report=print_line)

    parsed = [parse(source) for source in settings.data]
    weights = [weight for _, weight in parsed]
    if any(weights) and not all(weights):
        raise UserError("--data: only some sources have a weight. Give every source a weight (SOURCE@0.7), or none.")
    fraction = fraction_for(settings)
    corpora = [prepared(spec, fraction) for spec, _ in parsed]
    val_data = [prepared(parse(source)[0], 0.0).train for source in settings.val_data]
    trained = [corpus.train.digest for corpus in corpora]
    for i, corpus in enumerate(corpora):
        if trained[i] in trained[:i] and corpus.train.documents:
            other = settings.data[trained.index(trained[i])]
            raise UserError(
                f"--data: {settings.data[i]} has the text of {other}. Name it once, with a weight if it should come more often."
            )
    read_for_training = set().union(*map(_files, settings.data)) if val_data else set()
    for source, tokens in zip(settings.val_data, val_data, strict=True):
        shared = _files(source) & read_for_training
        if tokens.digest in trained:
            print_line(f"warning     --val-data {source} has the text of a source of --data: it is trained on")
        elif shared:
            print_line(
                f"warning     --val-data {source}: --data reads {len(shared)} of its files too: it is trained on"
            )
    _check_turns([corpus.train for corpus in corpora], settings.data, tokenizer, config)
    T = settings.sequence_length
    pack = settings.pack

    training = [Windows(corpus.train, T, pack=pack, filler=ignore_index) for corpus in corpora]
    for source, windows in zip(settings.data, training, strict=True):
        if not len(windows):
            raise UserError(
                f"{source}: {windows.tokens.documents} training documents give no window of {T} + 1 tokens. "
                "Add text, or lower --sequence-length."
            )
    count = sum(len(windows) for windows in training)
    if count < settings.batch_size:
        raise UserError(
            f"the training text gives {count} windows of {T} tokens, fewer than one update of --batch-size "
            f"{settings.batch_size}. Add text, or lower --batch-size or --sequence-length."
        )
    validation: list[Tokens] = val_data or [corpus.validation for corpus in corpora if fraction > 0]
    sources = (settings.val_data or settings.data) if validation else ()
    held_out_windows = _held_out(settings, validation, sources, ignore_index)
    held_out = choose(held_out_windows, settings.val_tokens, ByteLengths(tokenizer))
    if validation and not held_out:
        raise UserError(
            "the held-out documents have no token to score. Raise --val-fraction, or name other --val-data."
        )
    digests = {source: corpus.train.digest for source, corpus in zip(settings.data, corpora, strict=True)}
    for i, part in enumerate(held_out):
        digest = part.tokens.digest
        digests[f"held out {i}"] = digest if part.is_whole else f"{part.labels:,} tokens of {digest}"
    mixture_weights = [weight for weight in weights if weight]  # of all sources or of none
    mixture = Mixture(training, mixture_weights or None, settings.seed, log_names(settings.data))
    return Corpora(mixture, held_out, digests, _report(settings.data, training, held_out), fraction)


def _files(source: str) -> set[str]:
    """The files of a source, those here without links in their paths; of a hub data set and local: none."""
    return {os.path.realpath(name) for name, *_ in facts(parse(source)[0]).get("files", ())}


def _check_turns(stores: list[Tokens], sources: Sequence[str], tokenizer: Tokenizer, config: Any) -> None:
    """UserError for conversations whose turns end with EOS, if a token attends only to what follows the last EOS."""
    with_conversations = [source for source, tokens in zip(sources, stores, strict=True) if tokens.has_conversations]
    if not with_conversations or config.cross_document_attention or tokenizer.chat is None:
        return
    if tokenizer.chat.end_of_turn == tokenizer.eos_token_id:
        raise UserError(
            f"{with_conversations[0]}: the chat template ends a turn with EOS, and this model attends to nothing before an EOS: an "
            "answer would not know the earlier turns. Train the trunk with --cross-document-attention, or choose another "
            "--eos-token."
        )


def _held_out(settings: Any, stores: list[Tokens], sources: Sequence[str], ignore_index: int) -> dict[str, Windows]:
    """The windows to validate on, by the sources' names in the log; a source without any is left out."""
    pack = settings.pack and not settings.val_documents
    opened = {
        name: Windows(tokens, settings.sequence_length, pack=pack, filler=ignore_index, tail=pack)
        for name, tokens in zip(log_names(sources), stores, strict=True)
    }
    return {name: windows for name, windows in opened.items() if len(windows)}


def general_sample(
    settings: Any, tokenizer: Tokenizer, ignore_index: int, print_line: Callable[[str], None]
) -> list[HeldOut]:
    """Held-out windows of --general-data, of at most --general-tokens tokens in all; [] if that is 0."""
    if not settings.general_tokens:
        return []
    names = " ".join(settings.general_data)
    print_line(
        f"general     reading {names} for held-out documents: the module's loss on general text is measured before and after "
        f"training, on at most {settings.general_tokens:,} tokens (--general-tokens 0: not)"
    )
    reading = reading_of(settings)
    cache_dir = Path(settings.cache_dir).expanduser()
    options = {"cache_dir": cache_dir, "report": print_line, "val_fraction": GENERAL_FRACTION, "only_held_out": True}
    stores = [prepare(parse(source)[0], tokenizer, reading, **options).validation for source in settings.general_data]
    share = settings.general_tokens // len(settings.general_data)
    byte_lengths = ByteLengths(tokenizer)
    opened = _held_out(settings, stores, settings.general_data, ignore_index)
    for name, source in zip(log_names(settings.general_data), settings.general_data, strict=True):
        if name not in opened:
            print_line(
                f"warning     the loss on {source} is not measured: of its documents one in {1 / GENERAL_FRACTION:.0f} is held out, and "
                "it has too few. Name more text as --general-data, or --general-tokens 0"
            )
    return [HeldOut.first(name, windows, share, byte_lengths) for name, windows in opened.items()]


def _report(sources: tuple[str, ...], training: list[Windows], held_out: list[HeldOut]) -> list[str]:
    lines = [
        f"data        {source}: {w.tokens.documents:,} documents, {len(w):,} windows, {w.labels:,} tokens to learn "
        f"({w.dropped} too few for a window at the end)"
        for source, w in zip(sources, training, strict=True)
    ]
    labels = sum(part.windows.labels for part in held_out)
    scored = sum(part.labels for part in held_out)
    documents = sum(part.tokens.documents for part in held_out)
    chosen = "" if scored == labels else f", {scored:,} of which a validation scores (--val-tokens)"
    lines.append(f"held out    {documents:,} documents, {labels:,} tokens{chosen}")
    warning = too_few(documents)
    return [*lines, warning] if warning else lines
