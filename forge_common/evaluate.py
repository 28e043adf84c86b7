"""Losses of a model on named texts: python -m forge_common.evaluate --model DIR [--module DIR...] --data NAME=SOURCE...

--model is a trunk or an assembled model. The rows of the table of an assembled model are the trunk, each module, all of
them together, and all without each module of --without. Each document is scored by itself, cut into windows where it is
longer than the context. So a loss does not depend on other documents, and has a standard error over the documents. If
the trunk or a module was trained on a source, according to its metadata, only the documents that it held out are
scored; otherwise all are.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .command_line import read_settings, run_main
from .errors import UserError
from .evaluation.table import removals, table
from .files.atomic import write_json, write_text
from .files.places import check_artifacts, check_output, missing_source
from .files.untrusted import naming
from .settings import ReadingSettings

if TYPE_CHECKING:  # torch is imported after the settings are checked
    from .data.tokenizer import Tokenizer
    from .evaluation.columns import Choice, Column
    from .model.protocol import LanguageModel
    from .model.trunk import Trunk
    from .routing.mixture import Mixture


TIMED_WINDOWS = 8  # that are scored first, to estimate the time


@dataclass(frozen=True)
class Settings(ReadingSettings):
    model: str
    """Trunk or assembled model: folder or hub id (org/name or org/name@revision)."""
    data: tuple[str, ...]
    """NAME=SOURCE; each is a column of the table."""
    module: tuple[Path, ...] = ()
    """Modules of this trunk: folders or hub ids. Each is merged into it alone and is a row of the table."""
    without: tuple[str, ...] = ()
    """Names of modules of an assembled model. Each is left out in a row of its own."""
    parts: bool = True
    """Add rows for the trunk and for each module of an assembled model."""

    # -- routing --
    top_k: int | None = None
    """Candidates (the trunk and the modules) that serve a token; 0: all. None: as the model was assembled."""
    router_memory: int = 128
    """Tokens of the document before a window that the router reads."""
    spliced: int = 0
    """Tokens after which the domain changes in the texts of an additional column; 0: no such column."""

    # -- scoring --
    val_fraction: float | None = None
    """Share of the documents, by the hash of their text, that is scored; 1: all. None: those held out, else all."""
    max_tokens: int = 0
    """Tokens of a source to score, in whole windows, so that the last one may exceed them; 0: all."""
    sequence_length: int | None = None
    """Tokens in a window. None: the model's context, at most 2,048."""
    batch_size: int = 16
    """Windows that are scored at once."""

    # -- results --
    details: bool = False
    """Print standard errors and bits per byte too, and the credits of the rows without a module."""
    json: Path | None = None
    """File to write the rows to."""
    report: Path | None = None
    """HTML file to show them in: losses, which candidate serves which domain, texts token by token."""
    svg: Path | None = None
    """File to draw the rows to."""


def main(settings: Settings) -> int:
    check_artifacts([("--model", settings.model), *(("--module", folder) for folder in settings.module)])
    sources = named_sources(settings)
    _check(settings)
    for flag, path in (("--json", settings.json), ("--report", settings.report), ("--svg", settings.svg)):
        check_output(flag, path)
    # Heavy imports come after the settings were checked, so that a wrong flag is reported at once.
    import torch

    from .evaluation.chart import draw
    from .evaluation.columns import open_columns
    from .evaluation.progress import Progress
    from .evaluation.score import score
    from .evaluation.tokens import read_along
    from .model.config import check_context
    from .reporting.model_page import model_page
    from .run.log import duration

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = metadata_of_parts(settings)
    work = work_of_rows(settings, len(parts))
    rows = []
    columns: dict[str, Column] = {}
    choices: dict[str, Choice] = {}
    texts_read: dict[str, Any] = {}  # token by token, for --report
    progress = Progress()
    for (label, model, tokenizer), weight in zip(models(settings), work, strict=True):
        model.to(device).eval()
        if not columns:
            if settings.sequence_length:
                check_context(settings, model.config)
            columns, choices = open_columns(sources, parts, model, tokenizer, settings)
            tokens = sum(piece.scored for column in columns.values() for piece in column.pieces)
            with naming(label):
                seconds = seconds_per_token(model, columns, settings, device) / weight * sum(work) * tokens
            print(
                f"evaluate    {len(work)} models on {len(columns)} texts, {tokens:,} tokens each: about "
                f"{duration(seconds)} on {device.type}"
            )
            print_choices(columns, choices, settings.max_tokens)
            progress.start(sum(work) * tokens)
        for domain, column in columns.items():
            progress.begin(f"{label} on {domain}", weight)
            with naming(f"{label} on {domain}"):
                rows.append({"model": label, "domain": domain, **score(model, column, settings, device, progress.add)})
            progress.end(rows[-1])
            if settings.report and label == "assembled":
                texts_read[domain] = read_along(model, tokenizer, column, device)
    progress.close()
    print("\n" + table(rows, details=settings.details) + "\n\n" + removals(rows), end="")
    if settings.json:
        texts = {name: {"text": choice.text, "share": choice.share} for name, choice in choices.items()}
        write_json(settings.json, {"rows": rows, "texts": texts, "tokens": texts_read})
    if settings.report:
        write_text(settings.report, model_page(settings.model, rows, texts_read))
    if settings.svg:
        write_text(settings.svg, draw(rows))
    return 0


def print_choices(columns: "dict[str, Column]", choices: "dict[str, Choice]", max_tokens: int) -> None:
    """A line for each text: how many of its tokens and documents are scored, and why these."""
    for name, choice in choices.items():
        pieces = columns[name].pieces
        num_scored = sum(piece.scored for piece in pieces)
        num_documents = len({piece.document for piece in pieces})
        more = f" (--max-tokens {max_tokens:,}, in whole windows)" if 0 < max_tokens < num_scored else ""
        print(
            f"scoring     {name}: {num_scored:,} tokens of {num_documents:,} documents{more}, {choice.reason}",
            flush=True,
        )


def _check(settings: Settings) -> None:
    """UserError for a flag that is wrong by itself."""
    numbers = {"--spliced": settings.spliced, "--router-memory": settings.router_memory}
    numbers |= {"--max-tokens": settings.max_tokens}
    for flag, number in numbers.items():
        if number < 0:
            raise UserError(f"{flag} is {number}. Give 0 or more tokens.")
    if settings.batch_size < 1 or (settings.sequence_length is not None and settings.sequence_length < 1):
        raise UserError(
            f"--batch-size is {settings.batch_size}, --sequence-length is {settings.sequence_length}. Give at least 1."
        )
    if settings.val_fraction is not None and not 0 < settings.val_fraction <= 1:
        raise UserError(f"--val-fraction is {settings.val_fraction}. Give a share above 0, at most 1 (all documents).")
    for flag, names in (("--module", settings.module), ("--without", settings.without)):
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise UserError(f"{flag} {twice[0]} is given twice. Name it once.")


def named_sources(settings: Settings) -> dict[str, str]:
    """Name of a column -> source of its text, of --data NAME=SOURCE.

    UserError where one is not of this form or not there, or has the name of another column.
    """
    if not settings.data:
        raise UserError("--data names no source. Give NAME=SOURCE, such as law=law/*.txt.")
    sources = {}
    for text in settings.data:
        name, _, source = text.partition("=")
        if not (name and source):
            raise UserError(f"--data {text} is not NAME=SOURCE. Give a name and a source, such as law=law/*.txt.")
        problem = missing_source(source)
        if problem:
            raise UserError(f"--data {problem}")
        if name in sources or (name == "spliced" and settings.spliced):
            raise UserError(f"--data {text}: there is another column called {name}. Give this one another name.")
        sources[name] = source
    return sources


def work_of_rows(settings: Settings, parts: int) -> list[float]:
    """The work for a token in each row of the table; that of the trunk is 1. parts: how many, the trunk included."""
    from .artifacts.assembled import is_assembled

    if not is_assembled(settings.model):
        return [1.0] * (1 + len(settings.module))
    alone = [1.0] * parts if settings.parts else []
    return [*alone, float(parts), *[parts - 1.0] * len(settings.without)]


def seconds_per_token(model: "LanguageModel", columns: "dict[str, Column]", settings: Settings, device: Any) -> float:
    """The time of scoring a token, measured on a few windows of middle length of the text with the most windows."""
    from .evaluation.columns import Column
    from .evaluation.score import score

    pieces = max(columns.values(), key=lambda column: len(column.pieces)).pieces
    few = Column(pieces[len(pieces) // 2 :][:TIMED_WINDOWS], None)
    times = []
    tokens = 0
    for _ in range(2):  # the first pass reads the weights and starts threads
        start = time.perf_counter()
        tokens = score(model, few, settings, device)["tokens"]
        times.append(time.perf_counter() - start)
    return min(times) / tokens


def models(settings: Settings) -> "Iterator[tuple[str, Trunk | Mixture, Tokenizer]]":
    """(name of the row, model, tokenizer) of the models that are compared, one after the other."""
    from .artifacts.assembled import is_assembled, read_assembled
    from .artifacts.metadata import leave_out
    from .artifacts.module_folder import read_model

    if not is_assembled(settings.model):
        if settings.without or settings.top_k is not None:
            raise UserError(f"{settings.model} is not an assembled model. Leave out --without and --top-k.")
        model, tokenizer, _, _ = read_model(settings.model, None)
        yield "trunk", model, tokenizer
        for name, folder in zip(metadata_of_modules(settings.module), settings.module, strict=True):
            model, tokenizer, _, _ = read_model(settings.model, folder)
            yield f"module:{name}", model, tokenizer
        return
    if settings.module:
        raise UserError(f"{settings.model} is an assembled model, which has its modules. Leave out --module.")
    assembled, tokenizer, _ = read_assembled(settings.model, top_k=settings.top_k)
    leave_out(assembled.names[1:], settings.without, settings.model)
    if settings.parts:
        for name, candidate in zip(assembled.names, assembled.candidates, strict=True):
            yield name if name == "trunk" else f"module:{name}", cast("Trunk", candidate), tokenizer
    yield "assembled", assembled, tokenizer
    for name in settings.without:
        yield f"without:{name}", read_assembled(settings.model, without=(name,), top_k=settings.top_k)[0], tokenizer


def metadata_of_parts(settings: Settings) -> dict[str, dict[str, Any]]:
    """The metadata of the trunk and of each module by name; {} of a plain Transformers checkpoint."""
    from .artifacts.assembled import is_assembled
    from .artifacts.metadata import read_metadata
    from .files.hub import local_folder

    if is_assembled(settings.model):
        folder = local_folder(settings.model, None)
        trunk_file = folder / "trunk" / "forge.json"
        names = read_metadata(folder / "assembled.json")["modules"]
        modules = metadata_of_modules([folder / "modules" / name for name in names])
    else:
        trunk_file = local_folder(settings.model) / "forge.json"
        modules = metadata_of_modules(settings.module)
    trunk = read_metadata(trunk_file) if trunk_file.exists() else {}
    return {"trunk": trunk} | {f"module {name}": metadata for name, metadata in modules.items()}


def metadata_of_modules(folders: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """The modules' metadata by name, or by folder where two have the same name (as modules of two runs may)."""
    from .artifacts.module_folder import read_module_metadata

    metadata = [read_module_metadata(folder) for folder in folders]
    names = [module["name"] for module in metadata]
    labels = [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)]
    return dict(zip(labels, metadata, strict=True))


if __name__ == "__main__":
    run_main(main, read_settings(Settings, __doc__))
