"""Exports a trunk, a trunk with a module or an assembled model to what other programs load, and makes a module of a
PEFT adapter.

    python -m forge_common.export --model runs/all --as transformers --output-dir exported/all
    python -m forge_common.export --model runs/trunk/trunk --module runs/code/module --as gguf --output-dir exported/code
    python -m forge_common.export --model runs/trunk/trunk --module runs/code/module --as peft --output-dir exported/adapter
    python -m forge_common.export --model ORG/NAME --peft ADAPTER --name code --as module --output-dir runs/code/module

The result is loaded again by Transformers (with PEFT, or from GGUF) and compared with the model here on real text. It
has its name only if no logit differs by more than 1e-4 (docs/EXPORT.md).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from .command_line import read_settings, run_main
from .errors import UserError
from .files.places import check_artifacts, check_outside, hub_id, published
from .files.untrusted import PLAIN, is_plain
from .settings import ReadingSettings


@dataclass(frozen=True)
class Settings(ReadingSettings):
    model: str
    """Trunk or assembled model: folder or hub id (org/name or org/name@revision)."""
    format: Annotated[Literal["transformers", "gguf", "peft", "module"], tyro.conf.arg(name="as")]
    """transformers: a folder for from_pretrained. gguf: one file. peft: a LoRA adapter of a module. module: a module of --peft."""
    output_dir: Path
    """New folder."""
    module: Path | None = None
    """Module of this trunk (folder or hub id), which is merged into it (or becomes the adapter)."""

    # -- an assembled model --
    without: tuple[str, ...] = ()
    """Names of modules of an assembled model to leave out."""
    top_k: int | None = None
    """Candidates (the trunk and the modules) that serve a token; 0: all. None: as the model was assembled."""

    # -- a module of a PEFT adapter --
    peft: Path | None = None
    """Folder of a LoRA adapter of this trunk."""
    name: str | None = None
    """Name of the module."""
    licence: str | None = None
    """Licence of the module."""
    data: tuple[str, ...] = ()
    """Sources of text of the adapter's domain, to count its tokens for the router; without them it is not chosen by itself."""


def main(settings: Settings) -> int:
    check_artifacts([("--model", settings.model)])
    from .artifacts.assembled import is_assembled

    _check(settings)
    check_artifacts([("--module", settings.module), ("--peft", settings.peft)])
    if settings.format == "module":
        _make_module(settings)
    elif is_assembled(settings.model):
        _export_assembled(settings)
    elif settings.format == "peft":
        _export_adapter(settings)
    else:
        _export_checkpoint(settings)
    print(f"exported    {settings.output_dir}")
    return 0


def _check(settings: Settings) -> None:
    """Refuses flags that contradict each other, before anything is loaded."""
    from .artifacts.assembled import is_assembled

    assembled = is_assembled(settings.model)
    to_module = settings.format == "module"
    is_given = {
        "--module": bool(settings.module),
        "--peft": bool(settings.peft),
        "--name": bool(settings.name),
        "--licence": bool(settings.licence),
        "--data": bool(settings.data),
        "--without": bool(settings.without),
        "--top-k": settings.top_k is not None,
    }
    required: tuple[str, ...] = ()
    if to_module:
        required = ("--peft", "--name")
    elif settings.format == "peft" and not assembled:
        required = ("--module",)
    useless: list[str] = []
    if not assembled:
        useless += ["--without", "--top-k"]
    if not to_module:
        useless += ["--peft", "--name", "--licence", "--data"]
    if assembled or to_module:
        useless += ["--module"]
    missing = [flag for flag in required if not is_given[flag]]
    surplus = [flag for flag in useless if is_given[flag]]
    if missing or surplus:
        what = f"--as {settings.format} of {'an assembled model' if assembled else 'a trunk'}"
        problems = []
        if missing:
            problems.append(f"needs {', '.join(missing)}")
        if surplus:
            problems.append(f"has no use for {', '.join(surplus)}")
        raise UserError(f"{what} {' and '.join(problems)}. --help says what belongs to what.")
    if assembled and settings.format != "transformers":
        raise UserError(
            f"{settings.model} is an assembled model, and --as {settings.format} cannot express its router, which reads counts of the "
            "tokens so far. Use --as transformers, or give the trunk with --model and one module with --module."
        )
    if settings.name is not None and not is_plain(settings.name):
        raise UserError(f"--name {settings.name!r} must be {PLAIN[0]}.")
    if settings.output_dir.exists():
        raise UserError(f"--output-dir {settings.output_dir} exists. Name a new folder.")
    modules = [published(settings.module, "module")] if settings.module else []
    adapters = [settings.peft] if settings.peft else []
    check_outside(settings.output_dir, [published(Path(settings.model), "trunk"), *modules, *adapters])


def _publish(settings: Settings, title: str, metadata: dict[str, Any], write: Callable[[Path], float]) -> None:
    """Publishes the folder that `write` fills. `write` returns the largest difference of a logit from the model here,
    which must be small, and is on the card.
    """
    from .artifacts.card import model_card
    from .exporting import proof
    from .files.atomic import publish
    from .files.untrusted import read_bounded

    def write_proven(temp_dir: Path) -> None:
        largest = write(temp_dir)
        proof.check(f"--as {settings.format}", largest)
        with_proof = metadata | {"exported_as": settings.format, "largest_logit_difference": largest}
        (temp_dir / "README.md").write_text(model_card(title, with_proof), encoding="utf-8")

    publish(settings.output_dir, write_proven, lambda temp_dir: read_bounded(temp_dir / "README.md"))


def _export_assembled(settings: Settings) -> None:
    from .artifacts.assembled import read_assembled
    from .artifacts.module_folder import read_module_metadata
    from .exporting import assembled_model
    from .files.hub import local_folder, origins

    model, tokenizer, metadata = read_assembled(settings.model, without=settings.without, top_k=settings.top_k)
    folder = local_folder(settings.model, None)
    if len(model.names) == 1:
        raise UserError(
            f"--without leaves out every module of {settings.model}. Leave one in, or export the trunk alone: --model {folder}/trunk."
        )
    module_metadata = {name: read_module_metadata(folder / "modules" / name) for name in model.names[1:]}

    def write(temp_dir: Path) -> float:
        assembled_model.write(temp_dir, model, tokenizer, module_metadata)
        return assembled_model.prove(temp_dir, model, tokenizer)

    digests = {name: metadata["digests"][name] for name in model.names}
    licences = {name: licence for name, licence in metadata.get("licences", {}).items() if name in model.names}
    known = metadata.get("origins", {}) | origins({"model": folder})
    exported_metadata = {
        "router": metadata["router"],
        "top_k": model.top_k,
        "digests": digests,
        "licences": licences,
        "origins": known,
    }
    _publish(settings, "assembled model", exported_metadata, write)


def _export_checkpoint(settings: Settings) -> None:
    """A trunk, or a trunk with one module, as an ordinary checkpoint or as GGUF."""
    import torch

    from .artifacts.metadata import merged_metadata
    from .artifacts.module_folder import read_model
    from .artifacts.statistics_file import read_statistics
    from .artifacts.trial import check_trial
    from .artifacts.trunk_folder import write_trunk
    from .exporting import gguf_file, proof
    from .files.hub import local_folder, origins
    from .model.modules import fold

    trunk, tokenizer, trunk_metadata, module = read_model(settings.model, settings.module)
    expected = proof.expect(trunk, tokenizer, spliced=False)
    if module is not None:
        fold(trunk)
        check_trial(trunk, settings.module)
    folder = local_folder(settings.model)
    metadata = trunk_metadata
    if module is not None:
        assert settings.module is not None
        places = {"trunk": folder, module["name"]: local_folder(settings.module, "module")}
        metadata = merged_metadata(trunk_metadata, module, origins(places))

    def write_transformers(temp_dir: Path) -> float:
        statistics = None if module else read_statistics(folder, trunk_metadata, trunk.config)
        write_trunk(temp_dir, trunk.state_dict(), trunk.config, tokenizer, metadata, statistics)
        exported = proof.load(temp_dir)
        with torch.no_grad():
            return proof.difference(expected, lambda ids: exported(ids).logits)

    def write_gguf(temp_dir: Path) -> float:
        name = module["name"] if module else folder.name
        split = gguf_file.write(temp_dir, name, trunk, tokenizer, gguf_file.chat_template_of(folder))
        return gguf_file.prove(temp_dir, expected, trunk, tokenizer, split)

    write = write_gguf if settings.format == "gguf" else write_transformers
    _publish(settings, f"trunk with {module['name']}" if module else "trunk", metadata, write)


def _export_adapter(settings: Settings) -> None:
    from .artifacts.module_folder import read_model, read_module
    from .exporting import peft_adapter
    from .files.hub import local_folder, origins

    assert settings.module is not None
    identity = hub_id(settings.model)
    base = identity[0] if identity else settings.model
    model, tokenizer, trunk_metadata, _ = read_model(settings.model, settings.module)
    tensors, metadata = read_module(settings.module, trunk_metadata)

    def write(temp_dir: Path) -> float:
        peft_adapter.write(temp_dir, base, tensors, metadata)
        return peft_adapter.prove(temp_dir, local_folder(settings.model), model, tokenizer)

    known = origins({"trunk": local_folder(settings.model)})
    _publish(settings, f"adapter {metadata['name']}", metadata | {"origins": known}, write)


def _make_module(settings: Settings) -> None:
    """A module of a PEFT adapter. Its loss is not known, and its tokens are counted only with --data."""
    import torch

    from .artifacts.module_folder import write_module
    from .artifacts.texts import count_statistics
    from .artifacts.trunk_folder import read_trunk
    from .exporting import peft_adapter, proof
    from .files.hub import local_folder, origins
    from .routing.statistics import BIGRAM_BUCKETS

    assert settings.peft is not None
    trunk, tokenizer, trunk_metadata = read_trunk(settings.model)
    config = trunk.config
    tensors, arguments = peft_adapter.read(settings.peft, trunk)
    proof.check(
        "the module of the adapter", peft_adapter.prove(settings.peft, local_folder(settings.model), trunk, tokenizer)
    )
    sizes = {"unigrams": config.vocab_size, "bigrams": BIGRAM_BUCKETS}
    statistics = {name: torch.zeros(size, dtype=torch.uint8) for name, size in sizes.items()}
    if settings.data:
        statistics = count_statistics(settings.data, settings, tokenizer, config.vocab_size)
    metadata = arguments | {
        "name": settings.name,
        "licence": settings.licence,
        "sources": list(settings.data),
        "origins": origins({"trunk": local_folder(settings.model)}),
        "trunk_digest": trunk_metadata["digest"],
        "tokenizer_digest": trunk_metadata["tokenizer_digest"],
    }
    write_module(settings.output_dir, tensors, metadata, statistics, config)


if __name__ == "__main__":
    run_main(main, read_settings(Settings, __doc__))
