"""Losses of a model on named texts: python -m forge_common.evaluate --model DIR [--module DIR...] --data NAME=SOURCE...

Each document stands alone (cut into windows of the context where it is longer), so that a loss does not depend on its
neighbours and its standard error over documents can be stated.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import config
from .errors import UserError
from .files import read_json, write_json


@dataclass(frozen=True)
class Settings:
    model: str  # a trunk: folder or hub id
    data: tuple[str, ...]  # NAME=SOURCE, each a column of the table
    module: tuple[Path, ...] = ()  # modules of this trunk; each is merged into it alone and becomes a row
    json: Path | None = None  # write the rows there as well
    val_fraction: float | None = None  # score documents whose hash is below it; none: as the runs held out; 1: all
    max_tokens: int = 0  # at most so many tokens a source; 0: all
    sequence_length: int | None = None  # tokens a window; none: the model's context, at most 2,048
    batch_size: int = 16  # windows at once
    text_column: str = "text"
    document_separator: str | None = None
    on_bad_text: str = "refuse"
    on_bad_line: str = "refuse"
    cache_dir: Path = Path("~/.cache/forge")


def main(settings: Settings) -> int:
    import torch

    from .artifact import read_model

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    named = [text.partition("=") for text in settings.data]
    for text, (name, equals, source) in zip(settings.data, named, strict=True):
        if not (name and equals and source):
            raise UserError(f"--data {text}: say NAME=SOURCE, such as law=law/*.txt")
    rows, fraction = [], settings.val_fraction
    for folder in (None, *settings.module):
        trunk, tokenizer, facts, passport = read_model(settings.model, folder)
        if fraction is None:
            fraction = _held_out(facts, settings.module)
            print(
                f"scoring     {'all documents' if fraction == 1 else f'documents held out by hash (the first {fraction:.2%})'}"
            )
        trunk = trunk.to(device).eval()
        label = f"module:{passport['name']}" if passport else "trunk"
        for name, _, source in named:
            rows.append({"model": label, "domain": name, **score(trunk, tokenizer, source, settings, fraction, device)})
    print(table(rows))
    if settings.json:
        write_json(settings.json, {"rows": rows})
    return 0


def _held_out(facts: dict[str, Any], modules: tuple[Path, ...]) -> float:
    """The share of documents that the trunk's run and every module's held out by hash; 1 where none held out any."""
    stated = [facts.get("val_fraction")] + [read_json(folder / "module.json").get("val_fraction") for folder in modules]
    return min((fraction for fraction in stated if fraction), default=1.0)


def score(trunk: Any, tokenizer: Any, source: str, settings: Settings, fraction: float, device: Any) -> dict[str, Any]:
    """Nats per token of `source`, its standard error over documents (weighted by their tokens), and bits per byte."""
    import numpy as np
    import torch

    from .data.sources import parse
    from .data.store import prepare
    from .data.windows import Windows

    reading = {k: getattr(settings, k) for k in ("text_column", "document_separator", "on_bad_text", "on_bad_line")}
    place = settings.cache_dir.expanduser()
    corpus = prepare(parse(source)[0], tokenizer, cache_dir=place, val_fraction=min(fraction, 0.999999), **reading)
    parts = [corpus.validation] if fraction < 1 else [corpus.validation, corpus.train]
    length = settings.sequence_length or min(trunk.config.max_position_embeddings, 2048)
    filler = trunk.config.ignore_index
    places = [
        (windows, i, (part, windows.spans(i)[0][0]))
        for part, tokens in enumerate(parts)
        for windows in [Windows(tokens, length, pack=False, filler=filler)]
        for i in range(len(windows))
    ]
    if settings.max_tokens:
        total = np.cumsum([windows.scored(i) for windows, i, _ in places])
        places = places[: int(np.searchsorted(total, settings.max_tokens)) + 1]
    if not places:
        raise UserError(f"{source}: no document to score among the first {fraction:.2%}. Use --val-fraction 1 for all.")
    places.sort(key=lambda place: place[0].scored(place[1]))  # like lengths together: short batches are cut short
    nats: dict[Any, float] = {}
    counts: dict[Any, int] = {}
    for start in range(0, len(places), settings.batch_size):
        batch = places[start : start + settings.batch_size]
        longest = max(windows.scored(i) for windows, i, _ in batch) + 1
        tokens = torch.from_numpy(np.stack([windows[i][:longest] for windows, i, _ in batch])).to(device)
        for (windows, i, document), value in zip(batch, trunk.nats(tokens).double().sum(1).tolist(), strict=True):
            nats[document] = nats.get(document, 0.0) + value
            counts[document] = counts.get(document, 0) + windows.scored(i)
    total, tokens_scored = sum(nats.values()), sum(counts.values())
    loss = total / tokens_scored
    spread = math.fsum((nats[d] - loss * counts[d]) ** 2 for d in nats)  # of a ratio estimate over documents
    documents = len(nats)
    error = math.sqrt(spread * documents / (documents - 1)) / tokens_scored if documents > 1 else None
    size = sum(part.bytes for part in parts)
    per_byte = None if settings.max_tokens else total / math.log(2) / size
    result = {"loss": loss, "stderr": error, "tokens": tokens_scored, "documents": documents}
    return result | {"perplexity": math.exp(min(loss, 700.0)), "bits_per_byte": per_byte}


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
    tokens = ", ".join(f"{domain} {at[models[0], domain]['tokens']:,}" for domain in domains)
    return "\n".join([*lines, f"nats per token ± standard error over documents; tokens scored: {tokens}"])


if __name__ == "__main__":
    config.run(main, config.read(Settings, __doc__))
