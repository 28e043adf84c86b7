"""Writes the folder of an assembled model: copies of the trunk and the modules, each verified and tried, their
statistics, assembled.json and the card.
"""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file

from ..data.tokenizer import Tokenizer
from ..files.atomic import copy_files, write_json
from ..files.hub import origins
from ..files.places import MODULE_FILES
from ..files.tensors import Tensors, digest, trunk_files
from ..files.untrusted import naming_source
from ..model.trunk import Trunk
from ..routing.statistics import decode
from . import checks, module_table, texts, trial
from .assembled import Part, check_digests, check_router, make_router, new_metadata, read_part
from .card import model_card
from .statistics_file import read_statistics
from .trunk_folder import read_trunk

GENERAL_TEXT = ("local:docs",)


class Plan(NamedTuple):
    """What an assembled model is made of."""

    trunk: Path
    """Its folder."""
    modules: dict[str, Path]
    """Their folders by name, sorted."""
    router: str
    top_k: int
    before: dict[str, Any]
    """The content of assembled.json before the change; {} for a new model."""

    def stays(self, folder: Path) -> bool:
        """Whether a part was in the model before the change."""
        return bool(self.before) and folder.is_relative_to(self.trunk.parent)

    def staying(self) -> list[str]:
        """The names of the parts that were in the model before the change."""
        if not self.before:
            return []
        return ["trunk", *(name for name, folder in self.modules.items() if self.stays(folder))]


def write_assembled(temp_dir: Path, plan: Plan, settings: Any) -> None:
    """Writes the model to `temp_dir`, and prints the table of its modules. UserError where a part is refused."""
    copy = temp_dir / "trunk"
    copy_files(plan.trunk, copy, trunk_files(plan.trunk), link=plan.stays(plan.trunk))
    with naming_source(plan.trunk, copy):
        trunk, tokenizer, trunk_metadata = read_trunk(str(copy))
        trunk_statistics = read_statistics(copy, trunk_metadata, trunk.config)
    parts, modules = _copy_modules(temp_dir, plan, settings, trunk, tokenizer, trunk_metadata)
    if not settings.allow_copies:
        checks.check_copies(modules, _token_counts(trunk_statistics))
    if not settings.allow_worse:
        checks.check_worse(modules)

    staying = plan.staying()
    places = {name: place for name, place in plan.before.get("origins", {}).items() if name in staying}
    places |= origins({"trunk": plan.trunk, **plan.modules})
    metadata_of_parts = {"trunk": trunk_metadata, **{module.name: module.metadata for module in modules}}
    metadata = new_metadata(plan.router, plan.top_k, metadata_of_parts, plan.before, places)
    if plan.before:
        check_digests(plan.trunk.parent, plan.before, {name: metadata["digests"][name] for name in staying})

    has_own = trunk_statistics is not None
    new_digest, source = _write_statistics(temp_dir, plan, settings, tokenizer, trunk.config.vocab_size, has_own)
    if new_digest:
        metadata["statistics_digest"] = new_digest
        trunk_statistics = read_statistics(temp_dir, metadata, trunk.config)
    if settings.calibrate:
        metadata["tuning"] = texts.calibrate(settings, trunk, tokenizer, parts, trunk_statistics, metadata)
    if plan.router == "ridge":
        make_router(trunk, trunk_statistics, parts, metadata)  # refuses a system that cannot be solved
    write_json(temp_dir / "assembled.json", metadata)
    (temp_dir / "README.md").write_text(model_card("assembled model", metadata), encoding="utf-8")
    print(module_table.table(modules, _token_counts(trunk_statistics), metadata["licences"]))
    print(f"statistics  of the trunk: {source}")


def _token_counts(statistics: Tensors | None) -> Any:
    return None if statistics is None else decode(statistics["unigrams"])


def _copy_modules(
    temp_dir: Path, plan: Plan, settings: Any, trunk: Trunk, tokenizer: Tokenizer, trunk_metadata: dict[str, Any]
) -> tuple[list[Part], list[checks.CheckedModule]]:
    """Copies the modules, verifies and tries each, and measures its loss on --check-data.

    Returns the parts that fitting the router needs ([] if it needs none), and what is known of each module. Only
    --calibrate needs all modules in memory at once; ridge needs all statistics.
    """
    with naming_source(plan.trunk, temp_dir / "trunk"):
        reference = trial.make_reference(trunk, temp_dir / "trunk")
    check_data = texts.parse_check_data(settings.check_data, plan.modules)
    parts = []
    modules = []
    for name, folder in plan.modules.items():
        copy = temp_dir / "modules" / name
        copy_files(folder, copy, MODULE_FILES, link=plan.stays(folder))
        with naming_source(folder, copy):
            part = read_part(trunk, trunk_metadata, copy)
            check_router(plan.router, part, copy)
            effect = trial.check_module(part.model, reference, copy, part.statistics)
        windows = []
        if name in check_data:
            held_out = part.metadata.get("val_fraction", 0.0)
            windows = texts.read_check_data(check_data[name], settings, tokenizer, trunk.config, held_out)
        modules.append(checks.measure_module(part, trunk, effect, windows))
        if settings.calibrate:
            parts.append(part)
        elif plan.router == "ridge":
            parts.append(part._replace(model=trunk))
        del part
    return parts, modules


def _write_statistics(
    temp_dir: Path, plan: Plan, settings: Any, tokenizer: Tokenizer, vocab_size: int, trunk_has_own: bool
) -> tuple[str | None, str]:
    """Writes statistics that are used in place of the trunk's own, if it needs any.

    Returns their digest (None: none were written), and the text that says where the trunk's statistics are from.
    """
    path = temp_dir / "statistics.safetensors"
    before = plan.before.get("statistics_digest")
    if settings.trunk_data:
        sources = settings.trunk_data
        text = f"of {', '.join(sources)}"
    elif before:
        shutil.copyfile(plan.trunk.parent / path.name, path)
        return before, "as before"
    elif trunk_has_own:
        return None, "the trunk's own"
    elif plan.router == "context":
        sources = GENERAL_TEXT
        text = f"of {', '.join(sources)}, a general text, since it has none (--trunk-data names text that is more like the trunk's)"
    else:
        return None, f"none, and --router {plan.router} needs none"
    counts = texts.count_statistics(sources, settings, tokenizer, vocab_size)
    save_file(counts, path)
    return digest(counts), text
