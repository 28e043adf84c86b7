"""Losses of a model on named texts: python -m forge_common.evaluate --model DIR [--module DIR...] --data NAME=SOURCE...

--model is a trunk, or what `assemble` wrote; then the trunk, each module, the whole and the whole without single modules
are rows of the table. Each document stands alone (cut into windows of the context where it is longer), so that a loss
does not depend on its neighbours and its standard error over documents can be stated.

B batch, T time, E candidates (the trunk and the modules)
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .errors import UserError
from .files.atomic import write_json, write_text
from .settings import read_settings, run_main

if TYPE_CHECKING:  # torch is imported after the settings are checked
    from .model.protocol import LanguageModel


@dataclass(frozen=True)
class Settings:
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
    """Share of the documents, by the hash of their content, that is scored; 1: all. None: what the runs held out."""
    max_tokens: int = 0
    """Tokens of a source that are scored at most; 0: all."""
    sequence_length: int | None = None
    """Tokens in a window. None: the model's context, at most 2,048."""
    batch_size: int = 16
    """Windows that are scored at once."""

    # -- results --
    json: Path | None = None
    """File to write the rows to."""
    svg: Path | None = None
    """File to draw the rows to."""

    # -- reading --
    text_column: str = "text"
    """Column or key of the text in jsonl, json, csv, parquet, arrow and hub data."""
    document_separator: str | None = None
    """Text that separates the documents of a text file. None: a file is one document."""
    on_bad_text: Literal["refuse", "replace", "skip"] = "refuse"
    """What to do with bytes that are not UTF-8."""
    on_bad_line: Literal["refuse", "skip"] = "refuse"
    """What to do with rows that cannot be read."""
    cache_dir: Path = Path("~/.cache/forge")
    """Folder for tokens, which later commands use again."""


def main(settings: Settings) -> int:
    import torch

    from .evaluation.chart import draw
    from .evaluation.columns import columns as read_columns

    named = [text.partition("=") for text in settings.data]
    for text, (name, equals, source) in zip(settings.data, named, strict=True):
        if not (name and equals and source):
            raise UserError(f"--data {text}: say NAME=SOURCE, such as law=law/*.txt")
    if settings.spliced < 0 or settings.router_memory < 0:
        raise UserError("--spliced and --router-memory must be 0 or more")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fraction = held_out(settings)
    print(
        f"scoring     {'all documents' if fraction == 1 else f'documents held out by hash (the first {fraction:.2%})'}"
    )
    rows, columns = [], None
    for label, model, tokenizer in models(settings):  # what cannot be compared is refused before any text is read
        columns = columns or read_columns(named, tokenizer, model.config, settings, fraction)
        model = model.to(device).eval()
        for domain, pieces in columns.items():
            rows.append({"model": label, "domain": domain, **score(model, pieces, settings, device)})
    print(table(rows))
    print(receipt(rows), end="")
    if settings.json:
        write_json(settings.json, {"rows": rows})
    if settings.svg:
        write_text(settings.svg, draw(rows))
    return 0


def models(settings: Settings) -> Iterator[tuple[str, Any, Any]]:
    """(the row's name, model, tokenizer) of all that is compared, one after the other."""
    from .artifacts.artifact import read_model
    from .artifacts.assembled import is_assembled, read_assembled
    from .artifacts.metadata import leave_out

    if not is_assembled(settings.model):
        if settings.without or settings.top_k is not None:
            raise UserError(f"{settings.model} is not an assembled model: --without and --top-k say nothing of it")
        for folder in (None, *settings.module):
            model, tokenizer, _, passport = read_model(settings.model, folder)
            yield f"module:{passport['name']}" if passport else "trunk", model, tokenizer
        return
    if settings.module:
        raise UserError("--module is for a trunk; an assembled model brings its own")
    whole, tokenizer, _ = read_assembled(settings.model, top_k=settings.top_k)
    leave_out(whole.names[1:], settings.without, settings.model)
    if settings.parts:
        for name, candidate in zip(whole.names, whole.candidates, strict=True):
            yield name if name == "trunk" else f"module:{name}", candidate, tokenizer
    yield "assembled", whole, tokenizer
    for name in settings.without:
        yield f"without:{name}", read_assembled(settings.model, without=(name,), top_k=settings.top_k)[0], tokenizer


def held_out(settings: Settings) -> float:
    """The share of documents that every part's run held out by hash; 1 where none held out any."""
    from .artifacts.artifact import local_folder
    from .artifacts.assembled import is_assembled
    from .artifacts.metadata import read_passport, smallest_held_out_share

    if settings.val_fraction is not None:
        return settings.val_fraction
    if is_assembled(settings.model):
        files = [Path(settings.model) / "assembled.json"]
    else:
        trunk_file = (
            local_folder(settings.model) / "forge.json"
        )  # not there in a Transformers checkpoint of another maker
        files = [trunk_file] if trunk_file.exists() else []
        files += [folder / "module.json" for folder in settings.module]
    return smallest_held_out_share(map(read_passport, files)) or 1.0


def score(model: "LanguageModel", column: Any, settings: Settings, device: Any) -> dict[str, Any]:
    """Nats per token of a column, its standard error over documents (weighted by their tokens), and bits per byte."""
    import torch

    nats: dict[Any, float] = {}
    counts: dict[Any, int] = {}
    gates = torch.zeros(len(model.names), dtype=torch.float64, device=device)
    for start in range(0, len(column.pieces), settings.batch_size):
        batch = column.pieces[start : start + settings.batch_size]
        longest = max(piece.scored for piece in batch) + 1
        tokens = torch.stack([torch.from_numpy(piece.tokens()[:longest]) for piece in batch]).to(device)
        before = torch.stack([torch.from_numpy(piece.before()) for piece in batch]).to(device)
        found = model.nats(tokens, before)
        for piece, value in zip(batch, found.double().sum(1).tolist(), strict=True):
            nats[piece.document] = nats.get(piece.document, 0.0) + value
            counts[piece.document] = counts.get(piece.document, 0) + piece.scored
        if model.weights is not None:
            real = torch.arange(longest - 1, device=device) < torch.tensor([[p.scored] for p in batch], device=device)
            gates += model.weights[real].double().sum(0)
    total, tokens_scored = sum(nats.values()), sum(counts.values())
    loss = total / tokens_scored
    spread = math.fsum((nats[d] - loss * counts[d]) ** 2 for d in nats)  # of a ratio estimate over documents
    documents = len(nats)
    error = math.sqrt(spread * documents / (documents - 1)) / tokens_scored if documents > 1 else None
    per_byte = total / math.log(2) / column.bytes if column.bytes else None
    result = {"loss": loss, "stderr": error, "tokens": tokens_scored, "documents": documents}
    result |= {"perplexity": math.exp(min(loss, 700.0)), "bits_per_byte": per_byte}
    if model.weights is not None:
        result["shares"] = dict(zip(model.names, (gates / tokens_scored).tolist(), strict=True))
    return result


def table(rows: list[dict[str, Any]]) -> str:
    """Losses in nats per token, +- standard error; a row a model, a column a domain, perplexity and bits/byte below."""
    domains, models = (list(dict.fromkeys(row[key] for row in rows)) for key in ("domain", "model"))
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
        if "shares" in at[model, domains[0]]:
            lines.append(f"\nwho spoke in {model}, share of the tokens")
            for name in at[model, domains[0]]["shares"]:
                cells = "".join(f"{at[model, domain]['shares'][name]:>30.1%}" for domain in domains)
                lines.append(f"{name:<{width}}{cells}")
    tokens = ", ".join(f"{domain} {at[models[0], domain]['tokens']:,}" for domain in domains)
    return "\n".join([*lines, f"nats per token ± standard error over documents; tokens scored: {tokens}"])


def receipt(rows: list[dict[str, Any]]) -> str:
    """What leaving a module out did: to the domain of its name, beside the trunk, and to the others; "" where none was."""
    at = {(row["model"], row["domain"]): row["loss"] for row in rows}
    lines = []
    for left in dict.fromkeys(row["model"] for row in rows if row["model"].startswith("without:")):
        name = left.removeprefix("without:")
        domains = [domain for model, domain in at if model == left and domain != "spliced"]
        moved = {domain: at[left, domain] - at["assembled", domain] for domain in domains if domain != name}
        said = [f"receipt     without {name}:"]
        if name in domains:
            beside = f", the trunk {at['trunk', name]:.4f}" if ("trunk", name) in at else ""
            said.append(f"{name} {at['assembled', name]:.4f} -> {at[left, name]:.4f}{beside};")
        said.append("others " + ", ".join(f"{domain} {change:+.4f}" for domain, change in moved.items()))
        lines.append(" ".join(said) + "\n")
    return "".join(lines)


if __name__ == "__main__":
    run_main(main, read_settings(Settings, __doc__))
