"""Reads the folder that `assemble` writes as one model. Every part is verified.

assembled/  assembled.json (router, its numbers, names, digests, licences, version and history), README.md, trunk/,
            modules/NAME/, and statistics.safetensors where the trunk has none
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..data.tokenizer import Tokenizer
from ..errors import UserError
from ..files.hub import local_folder
from ..files.tensors import Tensors, drop_pages
from ..files.untrusted import naming, without_links
from ..model.modules import RoutedExpert
from ..model.trunk import Trunk
from ..routing.mixture import Mixture, with_module
from ..routing.routers import ContextRouter, LearnedRouter, RidgeRouter, UniformRouter
from ..routing.tuning import ROUTERS, Tuning
from .metadata import (
    FORMAT_VERSION,
    changes_attention,
    leave_out,
    module_arguments,
    read_metadata,
    smallest_held_out_share,
)
from .module_folder import read_module
from .statistics_file import read_statistics
from .trunk_folder import read_trunk


class Part(NamedTuple):
    """A verified module. model: the trunk with the module in it; it shares the trunk's parameters."""

    metadata: dict[str, Any]
    model: Trunk
    statistics: Tensors | None

    @property
    def name(self) -> str:
        return self.metadata["name"]


def is_assembled(place: str) -> bool:
    """Whether a folder or a hub id is that of an assembled model."""
    return (local_folder(place, None) / "assembled.json").is_file()


class Assembly(NamedTuple):
    """The verified parts of an assembled model. `mixture` makes models of them without reading files again."""

    folder: Path
    metadata: dict[str, Any]
    """The content of assembled.json."""
    trunk: Trunk
    tokenizer: Tokenizer
    parts: list[Part]
    trunk_statistics: Tensors | None
    top_k: int

    def mixture(self, without: Sequence[str] = ()) -> Mixture:
        """The model without some of its modules. All models made here share their tensors."""
        names = leave_out([part.name for part in self.parts], without, self.folder)
        parts = [part for part in self.parts if part.name in names]
        with naming(self.folder):
            router = make_router(self.trunk, self.trunk_statistics, parts, self.metadata)
        modules = {part.name: part.model for part in parts}
        return Mixture(self.trunk, modules, router, top_k=self.top_k)


def read_assembled(
    place: str, *, without: tuple[str, ...] = (), top_k: int | None = None
) -> tuple[Mixture, Tokenizer, dict[str, Any]]:
    """An assembled model, its tokenizer and the content of assembled.json. Everything that is read is verified.

    without: modules to leave out; they are not read. top_k: instead of the one in assembled.json.
    """
    assembly = read_assembly(place, without=without, top_k=top_k)
    return assembly.mixture(), assembly.tokenizer, assembly.metadata


def read_assembly(place: str, *, without: tuple[str, ...] = (), top_k: int | None = None) -> Assembly:
    """The parts of an assembled model, verified, of which `read_assembled` makes its model."""
    folder = local_folder(place, None)
    metadata = read_metadata(folder / "assembled.json")
    check_top_k(top_k, len(metadata["modules"]))
    names = leave_out(metadata["modules"], without, folder)
    trunk, tokenizer, trunk_metadata = read_trunk(str(folder / "trunk"))
    modules_dir = without_links(folder / "modules")
    parts = read_parts(trunk, trunk_metadata, [modules_dir / name for name in names])
    digests = {part.name: part.metadata["digest"] for part in parts}
    check_digests(folder, metadata, {"trunk": trunk_metadata["digest"], **digests})
    if "statistics_digest" in metadata or (folder / "statistics.safetensors").exists():
        trunk_statistics = read_statistics(folder, metadata, trunk.config)
    else:
        trunk_statistics = read_statistics(folder / "trunk", trunk_metadata, trunk.config)
    served = metadata["top_k"] if top_k is None else top_k
    return Assembly(folder, metadata, trunk, tokenizer, parts, trunk_statistics, served)


def check_top_k(top_k: int | None, modules: int) -> None:
    """UserError for a --top-k that no model of a trunk and so many modules has."""
    if top_k is not None and top_k < 0:
        raise UserError(f"--top-k {top_k} is negative. Give the number of candidates that serve a token, or 0 for all.")
    if top_k is not None and top_k > modules + 1:
        raise UserError(
            f"--top-k {top_k} exceeds the {modules + 1} candidates (the trunk and {modules} modules). Give "
            f"{modules + 1} or fewer, or 0 for all."
        )


def check_digests(folder: Path, metadata: dict[str, Any], digests: dict[str, str]) -> None:
    """Refuses parts that are not those that were assembled, even if each is valid. digests: of the parts as read."""
    expected = metadata["digests"]
    if expected.keys() != {"trunk", *metadata["modules"]}:
        raise UserError(
            f"{folder}: assembled.json has digests of other parts than it names. Assemble the modules again."
        )
    for name, digest in digests.items():
        if expected.get(name) != digest:
            raise UserError(
                f"{folder}: {name} has the digest {digest}, assembled.json says {expected.get(name)}. It is not what "
                "was assembled: assemble the modules again."
            )


def new_metadata(
    router: str, top_k: int, parts: Mapping[str, dict[str, Any]], before: Mapping[str, Any], origins: Mapping[str, str]
) -> dict[str, Any]:
    """The content of assembled.json, of a new model or, a version later, of a changed one.

    parts: the metadata of `trunk` and of the modules, by name, sorted. before: assembled.json before the change, or {}.
    origins: ORG/NAME@COMMIT of the parts that were fetched from the hub, by name.
    """
    digests = {name: metadata["digest"] for name, metadata in parts.items()}
    version = before.get("version", 1) + 1 if before else 1
    return {
        "format_version": FORMAT_VERSION,
        "version": version,
        "router": router,
        "top_k": top_k,
        "tuning": before.get("tuning") or asdict(Tuning()),
        "modules": [name for name in parts if name != "trunk"],
        "digests": digests,
        "origins": origins,
        "licences": {name: metadata["licence"] for name, metadata in parts.items() if metadata.get("licence")},
        "val_fraction": smallest_held_out_share(parts.values()),
        "history": [*before.get("history", []), *_changes(version, before.get("digests", {}), digests)],
    }


def _changes(version: int, before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """A line for each part that a version adds, replaces or removes. before, after: digests by name."""
    lines = []
    for name in sorted(before.keys() | after.keys()):
        if name not in before:
            lines.append(f"version {version}: added {name} {after[name]}")
        elif name not in after:
            lines.append(f"version {version}: removed {name} {before[name]}")
        elif before[name] != after[name]:
            lines.append(f"version {version}: replaced {name} {before[name]} by {after[name]}")
    return lines


def read_part(trunk: Trunk, trunk_metadata: dict[str, Any], folder: Path) -> Part:
    """The module in a folder, verified against the trunk. Its weights stay mapped, and are read where they are used."""
    tensors, metadata = read_module(folder, trunk_metadata)
    with naming(folder):
        model = with_module(trunk, tensors, **module_arguments(metadata))
    drop_pages(tensors)  # verifying has read all of the file into memory
    return Part(metadata, model, read_statistics(folder, metadata, trunk.config))


def read_parts(trunk: Trunk, trunk_metadata: dict[str, Any], folders: list[Path]) -> list[Part]:
    """The modules in these folders, verified against the trunk."""
    parts: list[Part] = []
    for folder in folders:
        part = read_part(trunk, trunk_metadata, folder)
        if part.name in [other.name for other in parts]:
            raise UserError(f"{folder}: another module is called {part.name} too. Assemble the modules again.")
        parts.append(part)
    return parts


def check_router(router: str, part: Part, place: Any) -> None:
    """Refuses a module that lacks what the router reads of it."""
    if router in ("context", "ridge") and part.statistics is None:
        raise UserError(
            f"{place} has no statistics.safetensors, and --router {router} needs it. "
            "Train the module again with this version, or assemble with --router uniform."
        )
    if router == "ridge" and changes_attention(part.metadata):
        raise UserError(
            f"{place} changes the attention, and --router ridge finds a layer's gates after its attention. Assemble "
            "with --router context, or merge the module into its trunk (forge_common.merge)."
        )
    if router == "ridge" and part.statistics and not {"first", "second"} <= part.statistics.keys():
        raise UserError(
            f"{place}: statistics.safetensors holds no moments, and --router ridge needs them. "
            "Train the module again with --statistics-moments, or assemble with --router context."
        )
    if router == "learned" and not part.metadata["kind"].startswith("expert"):
        raise UserError(
            f"{place} is of kind {part.metadata['kind']}, and --router learned needs modules of --kind expert. "
            "Train the module with --kind expert, or assemble with --router context."
        )


def make_router(trunk: Trunk, trunk_statistics: Tensors | None, parts: list[Part], metadata: dict[str, Any]) -> Any:
    """The router that assembled.json names, for these parts. metadata: the content of assembled.json."""
    router = metadata["router"]
    try:
        tuning = Tuning(**metadata["tuning"])
    except (TypeError, ValueError) as reason:
        raise UserError(
            f"assembled.json does not describe its router ({reason}). Assemble the modules again."
        ) from None
    shares = torch.tensor([tuning.trunk_share, *[1.0] * len(parts)])
    prior = shares / shares.sum()
    if not parts:
        return UniformRouter(prior)  # the trunk is the only candidate
    for part in parts:
        check_router(router, part, f"module {part.name}")
    statistics = [part.statistics for part in parts if part.statistics is not None]
    if router == "context":
        assert trunk.config.eos_token_id is not None  # read_trunk takes it from the tokenizer
        if trunk_statistics is None:
            raise UserError("the trunk has no statistics, and --router context needs them. Assemble the modules again.")
        across = trunk.config.cross_document_attention
        return ContextRouter([trunk_statistics, *statistics], prior, trunk.config.eos_token_id, tuning, across=across)
    if router == "learned":
        return LearnedRouter([_router_rows(part.model) for part in parts], prior)
    if router == "ridge":
        try:
            return RidgeRouter(statistics, prior, trunk.config.hidden_size, tuning)
        except ValueError as reason:
            raise UserError(f"{reason}. Use --router context, or modules of other text.") from None
    if router == "uniform":
        return UniformRouter(prior)
    raise UserError(f"router {router!r} is not one of {', '.join(ROUTERS)}. Assemble the modules again.")


def _router_rows(model: Trunk) -> list[Any]:
    """The router row that was trained with the module in each layer; None where it changes nothing."""
    additions = [layer.addition for layer in model.model.layers]
    return [addition.row if isinstance(addition, RoutedExpert) else None for addition in additions]
