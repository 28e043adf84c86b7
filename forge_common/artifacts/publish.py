"""Publishes the weights, metadata and statistics of a training run. They are read back before they have their name."""

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..data.corpora import Corpora
from ..data.tokenizer import Tokenizer
from ..files.hub import local_folder, origins
from ..files.places import hub_id
from ..files.tensors import Tensors, give_back_memory
from ..model.config import ModelConfig
from ..routing import statistics
from .artifact import DTYPES, replaced_tensors, write_module, write_trunk
from .metadata import training_texts

# Settings that are not in the published command: they change nothing that is published, or may hold private text.
OPERATING = {
    "output_dir",
    "cache_dir",
    "tracker",
    "project",
    "run_name",
    "log_artifact",
    "sample_prompt",
    "log_every",
    "save_every",
    "keep",
    "on_full_disk",
    "resume",
    "accept_change",
    "hang_timeout",
    "dry_run",
    "push_to_hub",
}
# Settings whose paths are published without their folders; --data is published as it was given.
PLACES = {"trunk", "trunk_from", "tokenizer", "val_data", "general_data"}
PUBLIC = re.compile("hf:|local:|train:")  # not a path


def publish_trunk(
    settings: Any,
    progress: Any,
    corpora: Corpora,
    config: ModelConfig,
    tokenizer: Tokenizer,
    tensors: Tensors,
    trunk_metadata: dict[str, Any],
) -> tuple[Path, str]:
    """Writes OUTPUT/trunk with its statistics, verified; returns its folder and digest.

    trunk_metadata: of the trunk that the run continued from; {} if it started from scratch.
    """
    give_back_memory()  # training has freed it, and reading the files back needs it
    sample = statistics.sample(corpora.training.shares(), settings.statistics_tokens)
    counts, sample_size = statistics.count(
        sample, config.vocab_size, tokenizer.eos_token_id, settings.statistics_min_documents
    )
    metadata = {
        "kind": "trunk",
        "statistics": sample_size,
        **_training_metadata(settings, progress, corpora),
        "validation_loss": progress.best_val_loss,
        "validation_tokens": sum(part.labels for part in corpora.held_out),
        "continued_from": trunk_metadata.get("digest"),
        "origins": origins({"trunk": local_folder(settings.trunk_from)} if settings.trunk_from else {}),
        "texts_before": [text._asdict() for text in training_texts(trunk_metadata)],
    }
    path = settings.output_dir / "trunk"
    return path, write_trunk(path, tensors, config, tokenizer, metadata, counts)


@torch.no_grad()
def round_tensors(tensors: Tensors, dtype: str | None) -> None:
    """Rounds a module's tensors to --module-dtype, in place: losses measured afterwards are of what will be stored."""
    if dtype is not None:
        for tensor in tensors.values():
            tensor.copy_(tensor.to(DTYPES[dtype]))


def losses_line(before: dict[str, Any], after: dict[str, Any]) -> str:
    """The console line for the results of `domain_losses` before and after training, and a warning where the module's
    own did not fall.
    """
    known = [domain for domain, part in before.items() if part["loss"] is not None and domain in after]
    shown = [f"{domain} {before[domain]['loss']:.4f} -> {after[domain]['loss']:.4f}" for domain in known]
    if not shown:
        return "losses      not measured: no text was held out"
    line = f"losses      held out, before -> after training: {', '.join(shown)} nats per token"
    if "own" in known and after["own"]["loss"] >= before["own"]["loss"]:
        line += "\nwarning     the module is no better than the trunk on its own held-out text. Lower --lr, train longer, or add text"
    return line


class TrainedModule(NamedTuple):
    """A module in the model that it was trained in."""

    tensors: Tensors
    """All tensors of the trunk with the module in it, whole, on the CPU."""
    names: list[str]
    """Which of them are the module's."""
    layers: list[int]
    """The layers that it changes."""
    losses: dict[str, Any]
    """The result of `domain_losses` after training."""


def publish_module(
    settings: Any,
    progress: Any,
    corpora: Corpora,
    config: ModelConfig,
    module: TrainedModule,
    trunk_metadata: dict[str, Any],
    device: torch.device,
) -> tuple[Path, str]:
    """Writes OUTPUT/module with its statistics, verified; returns its folder and digest.

    config: of the trunk without the module. device: where the moments are computed, with --statistics-moments.
    UserError where the trunk has changed since the run read it.
    """
    give_back_memory()
    assert config.eos_token_id is not None  # read_trunk takes it from the tokenizer
    # Before anything else, since it refuses a trunk that has changed. Only the moments need the tensors that the module
    # has replaced in memory.
    needed = module.names if settings.statistics_moments else []
    replaced = replaced_tensors(settings.trunk, config, needed, trunk_metadata)
    sample = list(statistics.sample(corpora.training.shares(), settings.statistics_tokens))
    counts, sample_size = statistics.count(
        sample, config.vocab_size, config.eos_token_id, settings.statistics_min_documents
    )
    if settings.statistics_moments:
        frozen = {name: tensor for name, tensor in module.tensors.items() if name not in module.names}
        counts |= statistics.moments(config, frozen | replaced, sample, settings.sequence_length, device)
    metadata = {
        "kind": settings.kind,
        "name": settings.name,
        "layers": module.layers,
        **settings.sizes,
        "origins": origins({"trunk": local_folder(settings.trunk)}),
        "statistics": sample_size,
        "trunk_digest": trunk_metadata["digest"],
        "tokenizer_digest": trunk_metadata["tokenizer_digest"],
        **_training_metadata(settings, progress, corpora),
        "licence": settings.licence,
        "losses": {
            domain: {"tokens": before["tokens"], "before": before["loss"], "after": module.losses[domain]["loss"]}
            for domain, before in progress.losses_before.items()
        },
    }
    path = settings.output_dir / "module"
    dtype = settings.module_dtype or settings.dtype
    tensors = {name: module.tensors[name] for name in module.names}
    return path, write_module(path, tensors, metadata, counts, config, dtype)


def _training_metadata(settings: Any, progress: Any, corpora: Corpora) -> dict[str, Any]:
    """The metadata that trunks and modules share: of the text, and of the update whose weights are published."""
    return {
        "data": corpora.digests,
        "sources": list(settings.data),
        "val_fraction": corpora.fraction,
        "command": command(settings),
        **progress.published(),
    }


def command(settings: Any) -> str:
    """The command line that trains the same again, without the settings of OPERATING and the folders of PLACES."""
    words = ["accelerate", "launch", "train_module.py" if "trunk" in vars(settings) else "train_shared.py"]
    own = type(settings).__annotations__  # the script's own settings go first
    for field in sorted(dataclasses.fields(settings), key=lambda field: field.name not in own):
        value = getattr(settings, field.name)
        if field.name in OPERATING or value == field.default:
            continue
        flag = f"--{field.name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
            continue
        shown = [str(part) for part in (value if isinstance(value, tuple) else (value,))]
        if field.name in PLACES:
            shown = [part if PUBLIC.match(part) or hub_id(part) else Path(part).name or part for part in shown]
        words += [flag, *shown]
    line = shlex.join(words)
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in line)[:4000]
