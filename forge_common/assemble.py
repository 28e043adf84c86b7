"""Assembles a trunk and modules that were trained separately into one model, which routes every token by itself.

    python -m forge_common.assemble --trunk runs/trunk/trunk --modules runs/law/module runs/code/module --output-dir runs/all

Nothing is trained. The new folder holds verified copies of all parts. The order of --modules does not matter.
"""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import UserError
from .files.atomic import lack_of_room
from .files.untrusted import naming_source, without_links
from .routing.tuning import CALIBRATED, ROUTERS, Tuning
from .settings import ReadingSettings, read_settings, run_main

STATISTICS_TOKENS = 1_000_000  # tokens of --trunk-data that are counted at most


@dataclass(frozen=True)
class Settings(ReadingSettings):
    trunk: str
    """Trunk: folder or hub id."""
    modules: tuple[Path, ...]
    """Folders of modules of this trunk."""
    output_dir: Path
    """New folder for the assembled model."""
    without: tuple[str, ...] = ()
    """Names of modules in --modules to leave out."""

    # -- router --
    router: str = "context"
    """Router: a name in ROUTERS of forge_common/routing/tuning.py (context, learned, ridge, uniform)."""
    top_k: int = 0
    """Candidates (the trunk and the modules) that serve a token; 0: all, weighted; 1: the cost of one module."""
    trunk_data: tuple[str, ...] = ()
    """Sources of text like the trunk's, for the statistics of a trunk that has none."""
    calibrate: tuple[str, ...] = ()
    """Sources of a little text of all domains, without labels, to fit the router's numbers on."""
    calibrate_tokens: int = 16_384
    """Tokens of --calibrate at most, all sources together."""


def main(settings: Settings) -> int:
    if settings.router not in ROUTERS:
        raise UserError(f"--router {settings.router} is not a router. Choose one of {', '.join(ROUTERS)}.")
    if settings.output_dir.exists():
        raise UserError(f"--output-dir {settings.output_dir} exists. Name a new folder.")
    if settings.top_k < 0 or settings.calibrate_tokens < 2:
        raise UserError(
            f"--top-k is {settings.top_k}, --calibrate-tokens is {settings.calibrate_tokens}. "
            "The first must be 0 (all) or more, the second at least 2."
        )
    # Heavy imports come after the settings were checked, so that a wrong flag is reported at once.
    from .artifacts.artifact import local_folder
    from .artifacts.metadata import read_metadata
    from .files.atomic import publish

    trunk_dir = local_folder(settings.trunk)
    module_dirs = _module_dirs(settings)

    def write(temp_dir: Path) -> None:
        _write(settings, trunk_dir, module_dirs, temp_dir)

    def read_back(temp_dir: Path) -> None:  # `_write` has read the parts back, one at a time
        read_metadata(temp_dir / "assembled.json")

    publish(settings.output_dir, write, read_back)
    print(f"assembled   {settings.output_dir}: the trunk and {', '.join(module_dirs)}; router {settings.router}")
    return 0


def _module_dirs(settings: Settings) -> dict[str, Path]:
    """The modules' folders by name, sorted, without those of --without."""
    from .artifacts.artifact import read_module_metadata
    from .artifacts.metadata import leave_out

    module_dirs: dict[str, Path] = {}
    for folder in settings.modules:
        name = read_module_metadata(folder)["name"]
        for other, other_dir in module_dirs.items():
            if other.lower() == name.lower():  # one folder on a file system that ignores case
                raise UserError(
                    f"{folder} and {other_dir} are both called {name}. Train one of them under another name."
                )
        module_dirs[name] = folder
    names = leave_out(sorted(module_dirs), settings.without, "--modules")
    if not names:
        raise UserError("no module is left to assemble. Name one in --modules that is not in --without.")
    return {name: module_dirs[name] for name in names}


def _write(settings: Settings, trunk_dir: Path, module_dirs: dict[str, Path], temp_dir: Path) -> None:
    """Copies the trunk and the modules to `temp_dir`, verifies the copies and the router, and adds assembled.json and the card."""
    from safetensors.torch import save_file

    from .artifacts.artifact import MODULE_FILES, TRUNK_FILES, read_statistics, read_trunk
    from .artifacts.assembled import check_router, read_part, route
    from .artifacts.card import model_card
    from .artifacts.metadata import FORMAT_VERSION, smallest_held_out_share
    from .files.atomic import write_json
    from .files.tensors import digest, weight_files

    copy = temp_dir / "trunk"
    index = "model.safetensors.index.json"
    _copy(trunk_dir, copy, (*TRUNK_FILES, index, *(path.name for path in weight_files(trunk_dir))))
    with naming_source(trunk_dir, copy):
        trunk, tokenizer, trunk_metadata = read_trunk(str(copy))
        background = read_statistics(copy, trunk_metadata, trunk.config)
    parts = []
    module_metadata = []
    for name, module_dir in module_dirs.items():
        copy = temp_dir / "modules" / name
        _copy(module_dir, copy, MODULE_FILES)
        with naming_source(module_dir, copy):
            part = read_part(trunk, trunk_metadata, copy)
            check_router(settings.router, part, copy)
        module_metadata.append(part.metadata)
        # To calibrate takes all modules in memory at once, to solve the ridge system all statistics; otherwise one module is enough.
        if settings.calibrate:
            parts.append(part)
        elif settings.router == "ridge":
            parts.append(part._replace(model=trunk))
        del part
    metadata: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "router": settings.router,
        "top_k": settings.top_k,
        "tuning": asdict(Tuning()),
        "modules": list(module_dirs),
        "digests": {"trunk": trunk_metadata["digest"], **{each["name"]: each["digest"] for each in module_metadata}},
        "val_fraction": smallest_held_out_share([trunk_metadata, *module_metadata]),
    }
    origin = (
        "the trunk's own" if background else "none: the mean of the modules' is used (--trunk-data would be better)"
    )
    if settings.trunk_data:
        background = _statistics(settings, tokenizer, trunk.config.vocab_size)
        save_file(background, temp_dir / "statistics.safetensors")
        metadata["statistics_digest"] = digest(background)
        background = read_statistics(temp_dir, metadata, trunk.config)
        origin = "from --trunk-data"
    if settings.calibrate:
        metadata["tuning"] = _calibrated(settings, trunk, tokenizer, parts, background, metadata)
    if settings.router == "ridge":
        route(trunk, background, parts, metadata)
    write_json(temp_dir / "assembled.json", metadata)
    (temp_dir / "README.md").write_text(model_card("assembled model", metadata), encoding="utf-8")
    print(f"statistics  of the trunk: {origin}")


def _copy(source: Path, target: Path, names: tuple[str, ...]) -> None:
    """Copies those of the files that exist; refuses links, and files for which there is no room."""
    without_links(source)
    files = [source / name for name in names if (source / name).is_file()]
    target.mkdir(parents=True)
    size = sum(path.stat().st_size for path in files)
    if size > shutil.disk_usage(target).free:
        raise UserError(f"{source} cannot be copied: {lack_of_room(target, size)}")
    for path in files:
        shutil.copyfile(path, target / path.name)


def _opened(sources: tuple[str, ...], settings: Settings, tokenizer: Any) -> list[tuple[Any, float]]:
    """(tokens, weight) of each source; weights sum to 1."""
    from .data.readers.document import reading_of
    from .data.sources import parse
    from .data.store import prepare

    parsed = [parse(source) for source in sources]
    stores = [
        prepare(
            spec, tokenizer, reading_of(settings), cache_dir=settings.cache_dir.expanduser(), val_fraction=0.0
        ).train
        for spec, _ in parsed
    ]
    weights = [
        weight if weight else float(len(store.tokens)) for (_, weight), store in zip(parsed, stores, strict=True)
    ]
    return [(store, weight / sum(weights)) for store, weight in zip(stores, weights, strict=True)]


def _statistics(settings: Settings, tokenizer: Any, vocab_size: int) -> dict[str, Any]:
    """The statistics of --trunk-data, as train_shared.py would count them."""
    from .routing import statistics

    sample = statistics.sample(_opened(settings.trunk_data, settings, tokenizer), STATISTICS_TOKENS)
    counts, _ = statistics.count(sample, vocab_size, tokenizer.eos_token_id, 1)
    return counts


def _calibrated(settings, trunk, tokenizer, parts, background, metadata) -> dict[str, float]:
    """The router's numbers that fit --calibrate best: each halved and doubled in turn, as long as the loss falls."""
    import torch

    from .artifacts.assembled import route
    from .routing.mixture import Mixture
    from .routing.statistics import sample

    length = min(trunk.config.max_position_embeddings, 512)
    documents = sample(_opened(settings.calibrate, settings, tokenizer), settings.calibrate_tokens)
    windows = [
        document[start : start + length + 1] for document in documents for start in range(0, len(document) - 1, length)
    ]
    model = Mixture(trunk, {part.name: part.model for part in parts}, None, top_k=settings.top_k)

    def loss_of(tuning: dict[str, float]) -> float:
        model.router = route(trunk, background, parts, metadata | {"tuning": tuning})
        nats = sum(float(model.nats(torch.from_numpy(window)[None]).sum()) for window in windows)
        return nats / sum(len(window) - 1 for window in windows)

    best = metadata["tuning"]
    initial_loss = best_loss = loss_of(best)
    for name in CALIBRATED[settings.router]:
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


if __name__ == "__main__":
    run_main(main, read_settings(Settings, __doc__))
