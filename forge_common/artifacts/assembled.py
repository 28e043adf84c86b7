"""A folder that `assemble` wrote, as one model: every part is verified when it is read.

assembled/  assembled.json (router, its numbers, names, digests), trunk/, modules/NAME/, README.md, and
            statistics.safetensors where the trunk brought none of its own
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..data.tokenizer import Tokenizer
from ..errors import UserError
from ..files.untrusted import closed, naming
from ..model.trunk import Trunk
from ..routing.mixture import Mixture, with_module
from ..routing.routers import ROUTERS, ContextRouter, LearnedRouter, RidgeRouter, Tuning, UniformRouter
from .artifact import Tensors, plug, read_module, read_passport, read_statistics, read_trunk
from .metadata import leave_out


def is_assembled(place: str) -> bool:
    """Whether a folder is what `assemble` writes."""
    return (Path(place) / "assembled.json").is_file()


def read_assembled(
    place: str, *, without: tuple[str, ...] = (), top_k: int | None = None
) -> tuple[Mixture, Tokenizer, dict[str, Any]]:
    """An assembled model without the modules named, its tokenizer, and assembled.json; all that it holds is verified.

    top_k over the one that it was assembled with. The modules left out are not read.
    """
    folder = Path(place)
    facts = read_passport(folder / "assembled.json")
    names = leave_out(facts["modules"], without, folder)
    kept = facts["top_k"] if top_k is None else top_k
    if kept < 0:
        raise UserError(f"--top-k {kept}: say how many candidates serve a token, 0 for all")
    trunk, tokenizer, trunk_facts = read_trunk(str(folder / "trunk"))
    modules = closed(folder / "modules")
    parts = read_parts(trunk, trunk_facts, [modules / name for name in names])
    _check_digests(folder, facts, {"trunk": trunk_facts["digest"], **parts.digests})
    stated = "statistics_digest" in facts or (folder / "statistics.safetensors").exists()
    whose = (folder, facts) if stated else (folder / "trunk", trunk_facts)
    statistics = read_statistics(*whose, trunk.config)
    with naming(folder):
        router = route(trunk, statistics, parts, facts)
    return Mixture(trunk, parts.models, router, top_k=kept), tokenizer, facts


def _check_digests(folder: Path, facts: dict[str, Any], found: dict[str, str]) -> None:
    """Refuses other parts than were assembled, each of which may be sound in itself. found: of what was read."""
    stated = facts["digests"]
    if stated.keys() != {"trunk", *facts["modules"]}:
        raise UserError(
            f"{folder}: assembled.json has digests of other parts than it names. Assemble the modules again."
        )
    for name, own in found.items():
        if stated.get(name) != own:
            raise UserError(
                f"{folder}: {name} has the digest {own}, assembled.json says {stated.get(name)}. It is not what was "
                "assembled: assemble the modules again."
            )


class Parts(NamedTuple):
    """Modules by name: the trunk with each in it (its parameters shared), what each tells a router, their digests."""

    models: dict[str, Trunk]
    statistics: dict[str, Tensors | None]
    digests: dict[str, str]


def read_parts(trunk: Trunk, trunk_facts: dict[str, Any], folders: list[Path]) -> Parts:
    """The modules in these folders, verified against the trunk."""
    parts = Parts({}, {}, {})
    for folder in folders:
        tensors, passport = read_module(folder, trunk_facts)
        name = passport["name"]
        if name in parts.models:
            raise UserError(f"{folder}: another module is called {name} as well. Assemble the modules again.")
        with naming(folder):
            parts.models[name] = with_module(trunk, tensors, **plug(passport))
        parts.statistics[name] = read_statistics(folder, passport, trunk.config)
        parts.digests[name] = passport["digest"]
    return parts


def route(trunk: Trunk, background: Tensors | None, parts: Parts, facts: dict[str, Any]) -> Any:
    """The router that `facts` (an assembled.json) describes, solved for these parts. background: the trunk's statistics."""
    names, router = list(parts.models), facts.get("router")
    try:
        tuning = Tuning(**facts["tuning"])
    except (TypeError, ValueError) as reason:
        raise UserError(
            f"assembled.json does not describe its router ({reason}). Assemble the modules again."
        ) from None
    shares = torch.tensor([tuning.trunk_share, *[1.0] * len(names)])
    prior = shares / shares.sum()
    if not names:
        return UniformRouter(prior)  # the trunk alone: whoever is asked, it speaks
    statistics = list(parts.statistics.values())
    if router in ("context", "ridge") and None in statistics:
        name = names[statistics.index(None)]
        raise UserError(f"module {name} brings no statistics.safetensors: the {router} router needs it.")
    if router == "context":
        return ContextRouter(
            [background or _average(statistics), *statistics], prior, trunk.config.eos_token_id, tuning
        )
    if router == "learned":
        rows = [
            [getattr(layer.addition, "row", None) for layer in model.model.layers] for model in parts.models.values()
        ]
        if not all(any(own) for own in rows):
            raise UserError("--router learned needs the rows of modules that were trained with --kind expert.")
        return LearnedRouter(rows, prior)
    if router == "ridge":
        if any("second" not in own or "first" not in own for own in statistics):
            raise UserError("a module's statistics.safetensors brings no moments: the ridge router needs them.")
        try:
            return RidgeRouter(statistics, prior, trunk.config.hidden_size, tuning)
        except ValueError as reason:
            raise UserError(f"{reason}. Use --router context, or modules of other text.") from None
    if router == "uniform":
        return UniformRouter(prior)
    raise UserError(f"router {router!r}: the routers are {', '.join(ROUTERS)}. Assemble the modules again.")


def _average(statistics: list[Tensors]) -> Tensors:
    """In place of the statistics of a trunk that brings none: the mean of the modules' codes, so of their counts' logs."""
    return {
        name: torch.stack([own[name] for own in statistics]).float().mean(0).to(torch.uint8)
        for name in ("unigrams", "bigrams")
    }
