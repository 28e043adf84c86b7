"""From documents to tokens on disk: written once, cached under a fingerprint of everything that they depend on, memory-mapped.

cache_dir/<fingerprint>/ holds, for train and validation, <split>.tokens (uint16 or uint32), <split>.offsets (uint64:
each document's first token, and the total) and <split>.origins (a line a document), and facts.json. Little endian. A
split with conversations also has <split>.context: a byte for each token, 1 where it is read but not scored.
"""

import hashlib
import json
import os
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError
from ..files.atomic import rename_if_absent, sync
from ..files.tensors import give_back_memory
from . import sources
from .chat import Encoded
from .readers.document import Document, Reading, bad_line
from .tokenizer import Tokenizer
from .windows import Tokens, Windows
from .writer import SplitWriter, batches, in_validation

__all__ = ["Corpus", "Tokens", "Windows", "in_validation", "prepare"]

FORMAT = 1  # raise it when the files change, or the way they are made
SPLITS = ("train", "validation")
REPORT_SECONDS = 5.0
ABANDONED_SECONDS = 24 * 3600.0


class Corpus(NamedTuple):
    """A source, tokenized. `facts`: counts per split, counters of what was skipped, digests, settings."""

    source: str
    train: Tokens
    validation: Tokens
    facts: dict[str, Any]


def prepare(
    source: str,
    tokenizer: Tokenizer,
    reading: Reading,
    *,
    cache_dir: Path,
    val_fraction: float,
    report: Callable[[str], None] = print,
    only_held_out: bool = False,
) -> Corpus:
    """Tokenize a source (without its weight), or open what was tokenized before.

    A document is held out if the first 8 bytes of its digest, as a fraction of 2**64, are below `val_fraction` (0..1),
    so copies of a text are always in the same split. only_held_out: the documents of the other split are read and not
    tokenized. UserError if the source cannot be read, changes meanwhile or holds no document, if the tokenizer yields
    PAD, or if the cache cannot be written.
    """
    if not 0 <= val_fraction <= 1:
        raise UserError(f"--val-fraction is {val_fraction}. Give a number between 0 and 1.")
    # Everything that the tokens depend on. The name of their folder is the hash of it.
    inputs = {"format": FORMAT, "source": source, "files": sources.facts(source)}
    if tokenizer.chat:
        inputs["chat_template"] = [tokenizer.chat.digest, sorted(tokenizer.chat.tokens.items())]
    inputs |= {"tokenizer": tokenizer.digest, "val_fraction": val_fraction, "reading": asdict(reading)}
    fingerprint = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    cached = _cached(Path(cache_dir) / fingerprint, report)
    if not cached and only_held_out:
        inputs["only_held_out"] = True
        fingerprint = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
        cached = _cached(Path(cache_dir) / fingerprint, report)
    if cached:
        return cached
    folder = Path(cache_dir) / fingerprint
    partial = Path(cache_dir) / f".tmp-{fingerprint}-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        _remove_abandoned(Path(cache_dir), fingerprint)
        partial.mkdir(parents=True)
        _write(partial, source, tokenizer, inputs, reading, report)
        give_back_memory()
        sync(partial)
        rename_if_absent(partial, folder)
    except OSError as error:
        raise UserError(
            f"{source}: cannot be tokenized into {cache_dir}: {error}. Fix that, or choose another --cache-dir."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return _open(folder)


def _cached(folder: Path, report: Callable[[str], None]) -> Corpus | None:
    """The corpus in the cache, or None; a damaged one is removed."""
    if not folder.is_dir():
        return None
    try:
        return _open(folder)
    except (OSError, ValueError, KeyError) as error:
        report(f"{folder}: damaged ({error}). It is written again.")
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _write(
    folder: Path, source: str, tokenizer: Tokenizer, inputs: dict, reading: Reading, report: Callable[[str], None]
) -> None:
    counts: Counter = Counter()
    dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    writers = {split: SplitWriter(folder, split, dtype, tokenizer) for split in SPLITS}
    began = reported = time.monotonic()
    fraction = inputs["val_fraction"]
    only_held_out = "only_held_out" in inputs
    documents = sources.read(source, reading, counts)
    wanted = (d for d in documents if not only_held_out or in_validation(d.digest, fraction))
    try:
        for batch in batches(wanted):
            # The writer adds prefix and suffix, because a long document comes in several pieces.
            texts = [piece.text for piece in batch if not piece.document.messages]
            encodings = iter(tokenizer.encode_batch(texts, continued=True))
            for piece in batch:
                held_out = in_validation(piece.document.digest, fraction)
                writer = writers["validation" if held_out else "train"]
                if not piece.document.messages:
                    writer.add(piece, next(encodings))
                elif conversation := _conversation(piece.document, tokenizer, reading, counts):
                    writer.add_conversation(piece.document, conversation)
            if time.monotonic() - reported >= REPORT_SECONDS:
                reported = time.monotonic()
                done = sum(writer.bytes for writer in writers.values()) / 1e6
                report(f"{source}: tokenized {done:.1f} MB, {done / (reported - began):.1f} MB/s")
    finally:
        written = {split: writer.close() for split, writer in writers.items()}
    skipped = ", ".join(f"{name} {number}" for name, number in sorted(counts.items()) if number)
    if not sum(facts["documents"] for facts in written.values()) and not only_held_out:
        raise UserError(f"{source}: no document in it ({skipped or 'nothing was read'}). Name a source with text.")
    if skipped:
        report(f"{source}: {skipped}")
    if sources.facts(source) != inputs["files"]:
        raise UserError(f"{source}: changed while it was being read. Start again when nothing writes to it.")
    facts = {**inputs, **written, "dtype": dtype, "counters": +counts}
    # ASCII: the name of a file need not be UTF-8.
    (folder / "facts.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _conversation(document: Document, tokenizer: Tokenizer, reading: Reading, counts: Counter) -> Encoded | None:
    """A conversation through the chat template; None, and counted, where --on-bad-line leaves it out."""
    if tokenizer.chat is None:
        raise UserError(
            f"{document.origin}: the row is a conversation, and the tokenizer has no chat template. Use a trunk with a template "
            "in tokenizer_config.json or chat_template.jinja, or name a column of plain text with --text-column."
        )
    try:
        return tokenizer.chat.encode(document.messages)
    except ValueError as reason:
        bad_line(f"{document.origin}: {reason}", reading, counts)
        return None


def _remove_abandoned(cache_dir: Path, fingerprint: str) -> None:
    """Remove the partial folders of killed runs: no write for a day. (A pid proves nothing, it may be another host's.)"""
    for partial in cache_dir.glob(f".tmp-{fingerprint}-*"):
        times = [path.stat().st_mtime for path in (partial, *partial.glob("*"))]
        if time.time() - max(times) > ABANDONED_SECONDS:
            shutil.rmtree(partial, ignore_errors=True)


def _open(folder: Path) -> Corpus:
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    return Corpus(facts["source"], Tokens(folder, "train"), Tokens(folder, "validation"), facts)
