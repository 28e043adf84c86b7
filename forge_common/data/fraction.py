"""The fraction of the documents that is held out: of a small corpus a larger one, so that a validation means something."""

import contextlib
import hashlib
import itertools
import json
import math
import os
import secrets
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files.atomic import read_json
from .readers.document import reading_of
from .sources import facts, parse, read
from .writer import position

FRACTION = 0.01  # of a large corpus
ENOUGH = 20  # documents: the mean over them has a standard error of about SPREAD / sqrt(20) = 0.22 nats
SHARE = 10  # of a small corpus at most one document in ten is held out, to have ENOUGH
SPREAD = 1.0  # nats: the standard deviation of the documents' losses, about (docs/RESULTS.md has errors of many texts)


def fraction_for(settings: Any) -> float:
    """The fraction of the documents of --data that is held out: 0 with --val-data. It depends on the text alone, and is
    cached.

    At least one document is held out, unless --val-fraction is 0. Where none is given: ENOUGH documents, but at most
    one in SHARE. UserError where all documents have the same text.
    """
    if settings.val_data or settings.val_fraction == 0:
        return 0.0
    reading = reading_of(settings)
    specs = [parse(source)[0] for source in settings.data]
    # Everything that the fraction depends on. The name of its file is the hash of it.
    inputs = [settings.val_fraction, FRACTION, ENOUGH, SHARE, asdict(reading), [facts(spec) for spec in specs]]
    name = hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()[:32]
    file = Path(settings.cache_dir).expanduser() / "fractions" / f"{name}.json"
    if file.is_file():
        with contextlib.suppress(UserError, KeyError):  # cut off by a crash: it is computed again
            return float(read_json(file)["val_fraction"])
    counts: Counter[str] = Counter()
    positions = (position(document.digest) for spec in specs for document in read(spec, reading, counts))
    first = next(positions, None)
    if first is None:
        left_out = ", ".join(f"{number} {name}" for name, number in counts.items() if number)
        raise UserError(
            f"--data {' '.join(settings.data)} holds no document{f' (left out: {left_out})' if left_out else ''}. Name other text, "
            "or see what is wrong with it without --on-bad-line skip and --on-bad-text skip."
        )
    fraction = _fraction(itertools.chain([first], positions), settings.val_fraction)
    if fraction is None:
        raise UserError(
            f"no document was held out: --data {' '.join(settings.data)} holds one text. Add documents, split a text file with "
            "--document-separator, name --val-data, or train without a validation: --val-fraction 0."
        )
    temp_path = file.with_name(f".tmp-{name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temp_path.write_text(json.dumps({"val_fraction": fraction}) + "\n", encoding="utf-8")
        os.replace(temp_path, file)
    except OSError as error:
        raise UserError(
            f"--cache-dir {settings.cache_dir} cannot be written ({error}). Fix that, or choose another --cache-dir."
        ) from None
    return fraction


def _fraction(positions: Iterable[float], wanted: float | None) -> float | None:
    """The fraction for documents at these positions: `wanted`, or FRACTION without it, or more where that holds out too
    few of them. None where all of them have one position: they are copies.

    Stops reading as soon as enough documents are held out, so of a large corpus only the beginning is read.
    """
    least = FRACTION if wanted is None else wanted
    enough = ENOUGH if wanted is None else 1
    smallest: set[float] = set()  # the smallest positions so far, as many as can decide
    for place in positions:
        smallest.add(place)
        if len(smallest) > ENOUGH * SHARE:
            smallest.remove(max(smallest))
        if place < least and sum(other < least for other in smallest) >= enough:
            return least
    if len(smallest) < 2:
        return None
    number = min(enough, max(1, len(smallest) // SHARE))
    return max(least, math.nextafter(sorted(smallest)[number - 1], 1.0))


def too_few(documents: int) -> str | None:
    """A warning where so few held-out documents say little of other text."""
    if not 0 < documents < ENOUGH // 2:
        return None
    error = SPREAD / math.sqrt(documents)
    return (
        f"warning     {documents} held-out documents: another choice of them would change the validation loss by about {error:.2f} "
        "nats (standard error). Add documents, raise --val-fraction, or name --val-data"
    )
