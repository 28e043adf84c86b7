"""Losses of a model on named texts: python -m forge_common.evaluate --model DIR [--module DIR...] --data NAME=SOURCE...

--model is a trunk or an assembled model. Of an assembled model the rows of the table are the trunk, each module, all of them
together, and all without each module of --without. Each document is scored by itself, cut into windows where it is longer
than the context, so that a loss does not depend on other documents and has a standard error over the documents. Of a source that a
trunk or a module was trained on, according to their metadata, the documents that they held out are scored; of others, all.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from .errors import UserError
from .files.atomic import write_json, write_text
from .files.untrusted import naming
from .settings import ReadingSettings, read_settings, run_main

if TYPE_CHECKING:  # torch is imported after the settings are checked
    from .data.tokenizer import Tokenizer
    from .evaluation.columns import Column
    from .model.protocol import LanguageModel
    from .model.trunk import Trunk
    from .routing.mixture import Mixture


CREDITS = ("layer_gates", "head_weights")  # keys of a row of an assembled model


@dataclass(frozen=True)
class Settings(ReadingSettings):
    model: str
    """Trunk (folder or hub id) or assembled model."""
    data: tuple[str, ...]
    """NAME=SOURCE; each is a column of the table."""
    module: tuple[Path, ...] = ()
    """Folders of modules of this trunk. Each is merged into it alone and is a row of the table."""
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
    """Share of the documents, by the hash of their content, that is scored; 1: all. None: what was held out of a source, else all."""
    max_tokens: int = 0
    """Tokens of a source that are scored at most; 0: all."""
    sequence_length: int | None = None
    """Tokens in a window. None: the model's context, at most 2,048."""
    batch_size: int = 16
    """Windows that are scored at once."""

    # -- results --
    json: Path | None = None
    """File to write the rows to."""
    report: Path | None = None
    """HTML file to show them in: losses, which candidate serves which domain, texts token by token."""
    svg: Path | None = None
    """File to draw the rows to."""


def main(settings: Settings) -> int:
    import torch

    from .evaluation.chart import draw
    from .evaluation.columns import read_columns
    from .evaluation.tokens import read_along
    from .reporting.model_page import model_page

    sources = {}
    for text in settings.data:
        name, _, source = text.partition("=")
        if not (name and source):
            raise UserError(f"--data {text} is not NAME=SOURCE. Give a name and a source, such as law=law/*.txt.")
        sources[name] = source
    if settings.spliced < 0 or settings.router_memory < 0:
        raise UserError(
            f"--spliced is {settings.spliced}, --router-memory is {settings.router_memory}. Give 0 or more tokens."
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = metadata_of_parts(settings)
    rows = []
    columns: dict[str, Column] = {}
    choices: dict[str, Choice] = {}
    tokens: dict[str, Any] = {}
    for label, model, tokenizer in models(settings):
        if not columns:
            choices = {name: choose(source, parts, tokenizer, settings) for name, source in sources.items()}
            shares = {name: choice.share for name, choice in choices.items()}
            columns = read_columns(sources, tokenizer, model.config, settings, shares)
            for name, choice in choices.items():
                documents = len({piece.document for piece in columns[name].pieces})
                print(f"scoring     {name}: {documents:,} documents, {choice.reason}")
        model.to(device).eval()
        for domain, column in columns.items():
            with naming(f"{label} on {domain}"):
                rows.append({"model": label, "domain": domain, **score(model, column, settings, device)})
            if settings.report and label == "assembled":
                tokens[domain] = read_along(model, tokenizer, column, device)
    print(table(rows))
    print(removals(rows), end="")
    if settings.json:
        texts = {name: {"text": choice.text, "share": choice.share} for name, choice in choices.items()}
        write_json(settings.json, {"rows": rows, "texts": texts, "tokens": tokens})
    if settings.report:
        write_text(settings.report, model_page(settings.model, rows, tokens))
    if settings.svg:
        write_text(settings.svg, draw(rows))
    return 0


def models(settings: Settings) -> "Iterator[tuple[str, Trunk | Mixture, Tokenizer]]":
    """(name of the row, model, tokenizer) of the models that are compared, one after the other."""
    from .artifacts.artifact import read_model
    from .artifacts.assembled import is_assembled, read_assembled
    from .artifacts.metadata import leave_out

    if not is_assembled(settings.model):
        if settings.without or settings.top_k is not None:
            raise UserError(f"{settings.model} is not an assembled model. Leave out --without and --top-k.")
        for folder in (None, *settings.module):
            model, tokenizer, _, metadata = read_model(settings.model, folder)
            yield f"module:{metadata['name']}" if metadata else "trunk", model, tokenizer
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


class Choice(NamedTuple):
    """Which documents of a source are scored, and why."""

    share: float
    """Share of the documents, by the hash of their content."""
    text: Literal["held out", "trained on", "other", "chosen"]
    """held out: no part was trained on these documents. other: no part says that it was trained on the text. chosen: --val-fraction."""
    reason: str


def metadata_of_parts(settings: Settings) -> dict[str, dict[str, Any]]:
    """The metadata of the trunk and of each module by name; {} of a plain Transformers checkpoint."""
    from .artifacts.artifact import local_folder, read_module_metadata
    from .artifacts.assembled import is_assembled
    from .artifacts.metadata import read_metadata

    if is_assembled(settings.model):
        folder = Path(settings.model)
        trunk_file = folder / "trunk" / "forge.json"
        names = read_metadata(folder / "assembled.json")["modules"]
        modules = [read_module_metadata(folder / "modules" / name) for name in names]
    else:
        trunk_file = local_folder(settings.model) / "forge.json"
        modules = [read_module_metadata(folder) for folder in settings.module]
    trunk = read_metadata(trunk_file) if trunk_file.exists() else {}
    return {"trunk": trunk} | {f"module {module['name']}": module for module in modules}


def choose(source: str, parts: dict[str, dict[str, Any]], tokenizer: "Tokenizer", settings: Settings) -> Choice:
    """The documents of a source to score: --val-fraction; else, of a text that parts were trained on, what all of them held out.

    A text that parts were trained on has the name of one of their sources, or the digest of its training documents. All of it
    is scored where one of them held out nothing, as is any other text.
    """
    from .artifacts.metadata import training_texts
    from .data.sources import parse
    from .evaluation.columns import divided

    if settings.val_fraction is not None:
        return Choice(
            settings.val_fraction, "chosen", f"the first {settings.val_fraction:.2%} by hash (--val-fraction)"
        )
    spec = parse(source)[0]
    corpus = cache(lambda fraction: divided(source, tokenizer, settings, fraction))
    shares: dict[str, float] = {}
    for name, metadata in parts.items():
        for text in training_texts(metadata):
            if text.is_called(spec) or (text.digest and text.digest == corpus(text.val_fraction).train.digest):
                shares[name] = min(text.val_fraction, shares.get(name, 1.0))
    if not shares:
        silent = [name for name, metadata in parts.items() if not training_texts(metadata)]
        unknown = f"; what {', '.join(silent)} was trained on is not known" if silent else ""
        return Choice(1.0, "other", f"all of them: no part states that it was trained on this text{unknown}")
    share = min(shares.values())
    names = ", ".join(name for name in shares if shares[name] == share)
    if not share or not corpus(share).validation.documents:
        return Choice(1.0, "trained on", f"all of them: TRAINED ON by {names}, which held out nothing of this text")
    return Choice(share, "held out", f"held out by {', '.join(shares)}: the first {share:.2%} by hash")


def score(model: "LanguageModel", column: "Column", settings: Settings, device: Any) -> dict[str, Any]:
    """Nats per token of a column, its standard error over documents (weighted by their tokens), and bits per byte.

    Of an assembled model also the credits of its candidates: the means over the tokens of the layers' gates and of the heads'
    weights. UserError for a loss that is not finite.
    """
    import torch

    from .artifacts.checks import check_finite
    from .routing.mixture import Mixture

    nats: dict[Any, float] = {}
    counts: dict[Any, int] = {}
    credits = torch.zeros(2, len(model.names), dtype=torch.float64, device=device)
    for start in range(0, len(column.pieces), settings.batch_size):
        batch = column.pieces[start : start + settings.batch_size]
        longest = max(piece.scored for piece in batch) + 1
        tokens = torch.stack([torch.from_numpy(piece.tokens()[:longest]) for piece in batch]).to(device)
        before = torch.stack([torch.from_numpy(piece.before()) for piece in batch]).to(device)
        sums = model.nats(tokens, before).double().sum(1).tolist()
        for piece, value in zip(batch, sums, strict=True):
            nats[piece.document] = nats.get(piece.document, 0.0) + check_finite(value, "a window")
            counts[piece.document] = counts.get(piece.document, 0) + piece.scored
        if isinstance(model, Mixture):
            assert model.gates is not None and model.weights is not None
            lengths = torch.tensor([[piece.scored] for piece in batch], device=device)
            scored = torch.arange(longest - 1, device=device) < lengths
            credits += torch.stack((model.gates[scored].double().sum(0), model.weights[scored].double().sum(0)))
    total = sum(nats.values())
    num_scored = sum(counts.values())
    num_documents = len(nats)
    loss = total / num_scored
    squares = math.fsum((nats[d] - loss * counts[d]) ** 2 for d in nats)  # of a ratio estimate over documents
    result: dict[str, Any] = {
        "loss": loss,
        "stderr": math.sqrt(squares * num_documents / (num_documents - 1)) / num_scored if num_documents > 1 else None,
        "tokens": num_scored,
        "documents": num_documents,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": total / math.log(2) / column.bytes if column.bytes else None,
    }
    if isinstance(model, Mixture):
        for name, means in zip(CREDITS, (credits / num_scored).tolist(), strict=True):
            result[name] = dict(zip(model.names, means, strict=True))
    return result


def table(rows: list[dict[str, Any]]) -> str:
    """Nats per token ± standard error, with perplexity and bits per byte below. Rows are models, columns are domains."""
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    models = list(dict.fromkeys(row["model"] for row in rows))
    at = {(row["model"], row["domain"]): row for row in rows}
    width = max(len(model) for model in models)
    lines = [" " * width + "".join(f"{domain:>30}" for domain in domains)]
    for model in models:
        cells, below = [], []
        for domain in domains:
            row = at[model, domain]
            cells.append(f"{row['loss']:.4f}" + (f" ± {row['stderr']:.4f}" if row["stderr"] is not None else ""))
            bits = f", {row['bits_per_byte']:.3f} bits/byte" if row["bits_per_byte"] is not None else ""
            below.append(f"ppl {row['perplexity']:,.1f}{bits}")
        lines.append(f"{model:<{width}}" + "".join(f"{cell:>30}" for cell in cells))
        lines.append(" " * width + "".join(f"{cell:>30}" for cell in below))
    for model in models:
        if CREDITS[0] not in at[model, domains[0]]:
            continue
        lines.append(f"\ncredits in {model}: gates of the layers / weights of the heads, means over the tokens")
        for name in at[model, domains[0]][CREDITS[0]]:
            cells = [" / ".join(f"{at[model, domain][key][name]:.1%}" for key in CREDITS) for domain in domains]
            lines.append(f"{name:<{width}}" + "".join(f"{cell:>30}" for cell in cells))
    tokens = ", ".join(f"{domain} {at[models[0], domain]['tokens']:,}" for domain in domains)
    return "\n".join([*lines, f"nats per token ± standard error over documents; tokens scored: {tokens}"])


def removals(rows: list[dict[str, Any]]) -> str:
    """A line for each module left out: the loss of the domain of its name, and how much the other losses change."""
    losses = {(row["model"], row["domain"]): row["loss"] for row in rows}
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows if row["model"].startswith("without:")):
        name = model.removeprefix("without:")
        domains = [row["domain"] for row in rows if row["model"] == model and row["domain"] != "spliced"]
        line = f"left out    {name}: "
        if name in domains:
            line += f"{name} {losses['assembled', name]:.4f} -> {losses[model, name]:.4f}"
            line += f", trunk {losses['trunk', name]:.4f}; " if ("trunk", name) in losses else "; "
        changes = {domain: losses[model, domain] - losses["assembled", domain] for domain in domains if domain != name}
        line += "others " + ", ".join(f"{domain} {change:+.4f}" for domain, change in changes.items())
        lines.append(line + "\n")
    return "".join(lines)


if __name__ == "__main__":
    run_main(main, read_settings(Settings, __doc__))
