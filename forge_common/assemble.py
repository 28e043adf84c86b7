"""Modules that were trained apart, and their trunk -> one model that routes by itself.

    python -m forge_common.assemble --trunk runs/trunk/trunk --modules runs/law/module runs/code/module --output-dir runs/all

Nothing is trained. The folder holds copies of all parts, each verified; the order of --modules plays no part.
"""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from .errors import UserError
from .files.untrusted import naming
from .settings import read_settings, run_main

STATISTICS_TOKENS = 1_000_000  # of --trunk-data
CALIBRATED = {  # which of a router's numbers --calibrate fits
    "context": ("temperature", "trunk_share"),
    "learned": ("trunk_share",),
    "ridge": ("sharpness", "trunk_share"),
    "uniform": ("trunk_share",),
}


@dataclass(frozen=True)
class Settings:
    trunk: str  # folder or hub id
    modules: tuple[Path, ...]  # folders of modules of this trunk
    output_dir: Path  # a new folder
    without: tuple[str, ...] = ()  # names among --modules to leave out
    router: Literal["context", "learned", "ridge", "uniform"] = "context"
    top_k: int = 0  # candidates that serve a token; 0: all, softly; 1: the cost of one module
    trunk_data: tuple[str, ...] = ()  # text like the trunk's, for the statistics of a trunk that brings none
    calibrate: tuple[str, ...] = ()  # a little text of all domains, unlabelled: fits the router's handful of numbers
    calibrate_tokens: int = 16_384  # of it, all sources together
    text_column: str = "text"
    document_separator: str | None = None
    on_bad_text: Literal["refuse", "replace", "skip"] = "refuse"
    on_bad_line: Literal["refuse", "skip"] = "refuse"
    cache_dir: Path = Path("~/.cache/forge")


def main(settings: Settings) -> int:
    from safetensors.torch import save_file

    from .artifacts.artifact import MODULE_FILES, TRUNK_FILES, find, plug, read_module, read_statistics, read_trunk
    from .artifacts.card import model_card
    from .artifacts.metadata import FORMAT_VERSION, leave_out, smallest_held_out_share
    from .files.atomic import publish, write_json
    from .files.tensors import digest, weight_files
    from .routing.mixture import with_module
    from .routing.routers import Tuning

    if settings.output_dir.exists():
        raise UserError(f"--output-dir {settings.output_dir} exists; name a new folder")
    if settings.top_k < 0 or settings.calibrate_tokens < 2:
        raise UserError("--top-k must be 0 (all) or more, --calibrate-tokens at least 2")
    source = find(settings.trunk)
    trunk, tokenizer, facts = read_trunk(settings.trunk)
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for folder in settings.modules:
        tensors, passport = read_module(folder, facts)  # one at a time: refused with the reason, and let go again
        with naming(folder):
            with_module(trunk, tensors, **plug(passport))
        del tensors
        name = passport["name"]
        for other, (taken, _) in found.items():
            if other.lower() == name.lower():  # a disk may take A and a for one
                raise UserError(f"{folder} and {taken} are both called {name}; train one of them under another name")
        if settings.router == "learned" and passport["kind"] != "expert":
            raise UserError(f"{folder} is of kind {passport['kind']}: --router learned needs modules of --kind expert")
        if settings.router in ("context", "ridge") and read_statistics(folder, passport, trunk.config) is None:
            raise UserError(f"{folder} brings no statistics.safetensors: --router {settings.router} needs it")
        found[name] = (folder, passport)
    names = leave_out(sorted(found), settings.without, "--modules")
    if not names:
        raise UserError("no module is left to assemble; name some by --modules")
    folders = {name: found[name][0] for name in names}
    background = (
        _statistics(settings, tokenizer, trunk.config.vocab_size)
        if settings.trunk_data
        else read_statistics(source, facts, trunk.config)
    )
    described = {
        "format_version": FORMAT_VERSION,
        "router": settings.router,
        "top_k": settings.top_k,
        "tuning": asdict(Tuning()),
        "modules": names,
        "digests": {"trunk": facts["digest"], **{name: found[name][1]["digest"] for name in names}},
        "val_fraction": smallest_held_out_share([facts, *(found[name][1] for name in names)]),
    }
    if settings.calibrate:
        described["tuning"] = _calibrated(settings, trunk, tokenizer, facts, folders, background, described)
    del trunk

    def write(aside: Path) -> None:
        index = "model.safetensors.index.json"
        _copy(source, aside / "trunk", (*TRUNK_FILES, index, *(path.name for path in weight_files(source))))
        for name, folder in folders.items():
            _copy(folder, aside / "modules" / name, MODULE_FILES)
            read_module(aside / "modules" / name, facts)
        if settings.trunk_data:
            save_file(background, aside / "statistics.safetensors")
            described["statistics_digest"] = digest(background)
        write_json(aside / "assembled.json", described)
        (aside / "README.md").write_text(model_card("assembled model", described), encoding="utf-8")

    publish(settings.output_dir, write)
    told = "the trunk's own" if not settings.trunk_data and background else "from --trunk-data"
    if background is None:
        told = "none: the mean of the modules' stands in (--trunk-data would be better)"
    print(f"statistics  of the trunk: {told}")
    print(f"assembled   {settings.output_dir}: the trunk and {', '.join(names)}; router {settings.router}")
    return 0


def _copy(source: Path, target: Path, names: tuple[str, ...]) -> None:
    """Those of the files that are there; nothing else that lies beside them, and nothing from elsewhere."""
    target.mkdir(parents=True)
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _opened(sources: tuple[str, ...], settings: Settings, tokenizer: Any) -> list[tuple[Any, float]]:
    """(tokens, weight) of each source; weights sum to 1."""
    from .data.sources import parse
    from .data.store import prepare

    reading = {
        name: getattr(settings, name) for name in ("text_column", "document_separator", "on_bad_text", "on_bad_line")
    }
    parsed = [parse(source) for source in sources]
    stores = [
        prepare(spec, tokenizer, cache_dir=settings.cache_dir.expanduser(), val_fraction=0.0, **reading).train
        for spec, _ in parsed
    ]
    weights = [
        weight if weight else float(len(store.tokens)) for (_, weight), store in zip(parsed, stores, strict=True)
    ]
    return [(store, weight / sum(weights)) for store, weight in zip(stores, weights, strict=True)]


def _statistics(settings: Settings, tokenizer: Any, vocab_size: int) -> dict[str, Any]:
    """The statistics of --trunk-data, as train_shared.py would have gathered them."""
    from .routing import statistics

    sample = statistics.sample(_opened(settings.trunk_data, settings, tokenizer), STATISTICS_TOKENS)
    counts, _ = statistics.count(sample, vocab_size, tokenizer.eos_token_id, 1)
    return counts


def _calibrated(settings, trunk, tokenizer, facts, folders, background, described) -> dict[str, float]:
    """The router's numbers that fit --calibrate best: each halved and doubled in turn, as long as the loss falls."""
    import torch

    from .artifacts.assembled import read_parts, route
    from .routing.mixture import Mixture
    from .routing.statistics import sample

    length = min(trunk.config.max_position_embeddings, 512)
    drawn = sample(_opened(settings.calibrate, settings, tokenizer), settings.calibrate_tokens)
    windows = [
        document[start : start + length + 1] for document in drawn for start in range(0, len(document) - 1, length)
    ]
    parts = read_parts(trunk, facts, list(folders.values()))
    model = Mixture(trunk, parts.models, None, top_k=settings.top_k)

    def loss(tuning: dict[str, float]) -> float:
        model.router = route(trunk, background, parts, described | {"tuning": tuning})
        nats = sum(float(model.nats(torch.from_numpy(window)[None]).sum()) for window in windows)
        return nats / sum(len(window) - 1 for window in windows)

    best = described["tuning"]
    start = lowest = loss(best)
    for name in CALIBRATED[settings.router]:
        for factor in (0.5, 2.0):
            while True:
                value = best[name] * factor
                reached = loss(best | {name: value})
                if reached >= lowest - 1e-4:
                    break
                best, lowest = best | {name: value}, reached
    print(f"calibrated  on {sum(map(len, windows)):,} tokens: {start:.4f} -> {lowest:.4f} nats a token; {best}")
    return best


if __name__ == "__main__":
    run_main(main, read_settings(Settings, __doc__))
