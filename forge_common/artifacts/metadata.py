"""The metadata in forge.json, module.json and assembled.json, and the types and ranges of its fields.

Digests cover the weights and statistics, not the rest: a module's name, sources, licence, losses, counts of tokens,
command, origins (ORG/NAME@COMMIT of what was fetched from the hub) and the share of documents that it held out are
claims of whoever published it.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError
from ..files.atomic import read_json
from ..files.untrusted import (
    ANY,
    DIGEST,
    LINE,
    PLAIN,
    Field,
    checked,
    dict_of,
    integer,
    list_of,
    matches,
    number,
    one_of,
    quoted,
    without_links,
)
from ..model.config import KINDS, MATRICES, TARGETS
from ..routing.tuning import ROUTERS, Tuning

FORMAT_VERSION = 1
COUNT = integer(0, 1 << 62)


def _ascending(layers: Any) -> bool:
    if not isinstance(layers, list) or not layers or not all(type(layer) is int for layer in layers):
        return False
    return layers[0] >= 0 and all(low < high for low, high in itertools.pairwise(layers))


def _is_tuning(numbers: Any) -> bool:
    """Whether these are all numbers of a router, and no others: a default for a missing one would change the router."""
    known = {field.name for field in dataclasses.fields(Tuning)}
    return matches(numbers, dict_of(number(0, 1e9))) and numbers.keys() == known


class Text(NamedTuple):
    """A text that an artifact was trained on, according to its metadata."""

    source: str
    """As on the command line."""
    digest: str | None
    """SHA-256 of the tokens of the documents that were not held out."""
    val_fraction: float
    """Share of the documents, by hash, that was held out."""

    def is_called(self, spec: str) -> bool:
        """Whether its source is `spec`, with or without a weight."""
        return spec in (self.source, self.source.rpartition("@")[0])


def _is_text(text: Any) -> bool:
    if not isinstance(text, dict) or text.keys() != set(Text._fields) or not isinstance(text["source"], str):
        return False
    return matches(text["val_fraction"], number(0, 1)) and (text["digest"] is None or matches(text["digest"], DIGEST))


COMMON: dict[str, Field] = {
    "licence": LINE,
    "val_fraction": number(0, 1),
    "steps": COUNT,
    "tokens_seen": COUNT,
    "bad_updates": COUNT,
    "validation_loss": number(0, 1e9),
    "validation_tokens": COUNT,
    "sources": list_of(("a string", lambda text: isinstance(text, str))),
    "data": dict_of(ANY),
    "texts_before": list_of((f"an object with {', '.join(Text._fields)}", _is_text)),
    "losses": dict_of(ANY),
    "origins": dict_of(LINE),
    "command": (
        "a line of at most 4,000 printable characters",
        lambda value: isinstance(value, str) and len(value) <= 4000 and value.isprintable(),
    ),
    "statistics": dict_of(ANY),
    "tensor_digests": dict_of(DIGEST),
    **dict.fromkeys(("digest", "config_digest", "tokenizer_digest", "chat_template_digest"), DIGEST),
    **dict.fromkeys(("statistics_digest", "continued_from"), DIGEST),
}
TRUNK = COMMON | {"kind": one_of("trunk")}
MODULE = COMMON | {
    "name": PLAIN,
    "kind": one_of(*KINDS),
    "dtype": one_of("float32", "float64", "bfloat16"),
    "layers": ("a list of different layers in ascending order", _ascending),
    "shapes": dict_of(list_of(COUNT)),
    "trunk_digest": DIGEST,
    **dict.fromkeys(("width", "rank"), integer(0, 1 << 20)),
    "alpha": number(0, 1e6),
    "dropout": number(0, 1),
    "targets": list_of(one_of(*TARGETS)),
}
PLAIN_NAMES = list_of(PLAIN)
CHANGE: Field = (
    "a line of at most 300 printable characters",
    lambda value: isinstance(value, str) and len(value) <= 300 and value.isprintable(),
)
ASSEMBLED = COMMON | {
    "router": one_of(*ROUTERS),
    "top_k": COUNT,
    "tuning": ("all numbers of the router", _is_tuning),
    "modules": (
        f"names of folders, none of them outside of the assembled model: {PLAIN_NAMES[0]}",
        PLAIN_NAMES[1],
    ),
    "digests": dict_of(DIGEST),
    "licences": dict_of(LINE),
    "version": integer(1, 1 << 62),
    "history": list_of(CHANGE),
}
FILES = {  # name -> (its fields, the required ones)
    "forge.json": (TRUNK, ("digest", "tokenizer_digest")),
    "module.json": (MODULE, ("name", "kind", "layers", "digest", "trunk_digest", "tokenizer_digest")),
    "assembled.json": (ASSEMBLED, ("router", "top_k", "tuning", "modules", "digests")),
}


def read_metadata(path: Path) -> dict[str, Any]:
    """The content of forge.json, module.json or assembled.json, in which every known field is valid."""
    without_links(path.parent)
    metadata = read_json(path)
    version = metadata.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {quoted(version)}, this program reads {FORMAT_VERSION}. "
            "Use the version of forge that made it, or make it again."
        )
    checked(metadata, path, *FILES[path.name])
    return {name: value for name, value in metadata.items() if value is not None}  # null is like absent


def training_texts(metadata: dict[str, Any]) -> list[Text]:
    """The texts that a trunk or a module was trained on, also before it was continued or merged; [] if not stated."""
    digests = {source: value for source, value in metadata.get("data", {}).items() if matches(value, DIGEST)}
    fraction = float(metadata.get("val_fraction", 0))
    own = [Text(source, digests.get(source), fraction) for source in metadata.get("sources", [])]
    return own + [Text(**text) for text in metadata.get("texts_before", [])]


def smallest_held_out_share(parts: Iterable[dict[str, Any]]) -> float:
    """The share of the documents, by hash, that none of these trunks and modules was trained on.

    Parts that do not state a share are ignored.
    """
    return min((metadata["val_fraction"] for metadata in parts if "val_fraction" in metadata), default=0.0)


def leave_out(names: Sequence[str], without: Sequence[str], place: Any) -> list[str]:
    """The modules `names` of `place` without those of --without. UserError where one of these is not in `names`."""
    unknown = [name for name in without if name not in names]
    if unknown:
        raise UserError(f"--without {unknown[0]}: no such module. Choose among those of {place}: {', '.join(names)}.")
    return [name for name in names if name not in without]


def changes_attention(metadata: dict[str, Any]) -> bool:
    """Whether a module changes the attention of its layers."""
    arguments = module_arguments(metadata)
    low_rank = arguments["kind"].startswith("lora") and not set(arguments["targets"]) <= set(MATRICES)
    return low_rank or arguments["kind"].startswith("attention")


def module_arguments(metadata: dict[str, Any]) -> dict[str, Any]:
    """The arguments of modules.plug_in for a module, without its dropout, which is for training alone."""
    rank = metadata.get("rank") or 0
    return {
        "kind": metadata["kind"],
        "layers": metadata["layers"],
        "width": metadata.get("width") or 0,
        "rank": rank,
        "alpha": metadata.get("alpha") or rank,  # modules of earlier versions have neither alpha nor targets
        "targets": metadata.get("targets") or MATRICES,
    }


def merged_metadata(trunk: dict[str, Any], module: dict[str, Any], origins: dict[str, str]) -> dict[str, Any]:
    """The metadata of a trunk with a module merged into it, which is a trunk again.

    origins: where the two were fetched from (files/hub.py).
    """
    return {
        "origins": origins,
        "merged_from": {"trunk": trunk["digest"], "module": module["digest"], "name": module["name"]},
        "kind": "trunk",
        "val_fraction": smallest_held_out_share([trunk, module]),
        "texts_before": [text._asdict() for part in (trunk, module) for text in training_texts(part)],
        "licence": module.get("licence"),
    }
