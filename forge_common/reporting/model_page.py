"""What evaluate found: losses by domain and model, which candidate serves which domain, and texts token by token."""

from collections.abc import Sequence
from html import escape
from typing import Any

from .page import candidate_colours, page, section, table_of_cells

SHARES = {"head_weights": "Weights of the heads", "layer_gates": "Gates of the layers"}  # keys of a row of evaluate
LOSS_OF_FULL_COLOUR = 8.0  # nats


def model_page(title: str, rows: Sequence[dict[str, Any]], texts: dict[str, Any]) -> str:
    """The page of the rows of evaluate. texts: domain -> what evaluation/tokens.py read along it; {} without an
    assembled model.
    """
    parts = [section("Losses", *_losses(rows))]
    shares = [row for row in rows if row["model"] == "assembled" and "head_weights" in row]
    if shares:
        tables = [_shares(shares, key, name) for key, name in SHARES.items()]
        parts.append(section("Which candidate serves which domain", '<div class="maps">', *tables, "</div>"))
    if texts:
        parts.append(section("Token by token", *_texts(texts)))
    return page(title, parts)


def _losses(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A row for each domain, a column for each model; the colour is the difference to the trunk."""
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    models = list(dict.fromkeys(row["model"] for row in rows))
    at = {(row["model"], row["domain"]): row for row in rows}
    gains = {key: at["trunk", key[1]]["loss"] - row["loss"] for key, row in at.items() if ("trunk", key[1]) in at}
    largest = max([abs(gain) for gain in gains.values()], default=0) or 1

    def cell(model: str, domain: str) -> str:
        row = at[model, domain]
        gain = gains.get((model, domain), 0)
        error = "" if row.get("stderr") is None else f" <small>± {row['stderr']:.4f}</small>"
        kind = "better" if gain > 0 else "worse"
        hint = escape(f"{model} on {domain}: {-gain:+.4f} nats to the trunk")
        return f'<td class="{kind}" style="--a:{abs(gain) / largest:.3f}" title="{hint}">{row["loss"]:.4f}{error}</td>'

    cells = [
        [f"<td>{escape(domain)}</td>", *(cell(model, domain) for model in models if (model, domain) in at)]
        for domain in domains
    ]
    colours = "; blue is lower and orange higher than the trunk" if gains else ""
    note = f"<p>Nats per token, ± standard error over documents{colours}.</p>"
    return [note, table_of_cells(["domain", *models], cells, kind="heat")]


def _shares(rows: Sequence[dict[str, Any]], key: str, name: str) -> str:
    """A row for each domain, a column for each candidate: its mean share over the tokens."""
    candidates = list(rows[0][key])
    cells = [
        [
            f"<td>{escape(row['domain'])}</td>",
            *(f'<td class="share" style="--a:{row[key][c]:.3f}">{row[key][c]:.1%}</td>' for c in candidates),
        ]
        for row in rows
    ]
    return f"<h3>{name}, means over the tokens</h3>" + table_of_cells(["domain", *candidates], cells, kind="heat")


def _texts(texts: dict[str, Any]) -> list[str]:
    """The colours' key, the switch between them, and each text with a tip at each token."""
    names = next(iter(texts.values()))["names"]
    colours = candidate_colours(len(names))
    key = (f'<span style="--c:var(--c{c});--a:1">{escape(name)}</span>' for c, name in zip(colours, names, strict=True))
    parts = [
        "<p>The colour is the candidate whose head has the largest weight in the prediction of the token, the stronger "
        "the larger. Point at a token, or step with Tab, for its loss, weights, gates, and what was likeliest.</p>",
        '<input type="radio" name="by" id="by-head" checked><label for="by-head"> by candidate</label>',
        '<input type="radio" name="by" id="by-loss"><label for="by-loss"> by loss</label>',
        f'<p class="key">{"".join(key)}</p>',
    ]
    for domain, text in texts.items():
        tokens = [_token(token, f"{domain}-{i}", names, colours) for i, token in enumerate(text["tokens"])]
        parts.append(f'<h3>{escape(domain)}</h3><div class="text">{escape(text["start"])}{"".join(tokens)}</div>')
    return parts


def _token(token: dict[str, Any], name: str, names: Sequence[str], colours: Sequence[int]) -> str:
    heads = token["weights"]
    heaviest = max(range(len(heads)), key=heads.__getitem__)
    likeliest = ", ".join(f"{text!r} {share:.1%}" for text, share in token["likeliest"])
    tip = "\n".join(
        (
            f"{token['text']!r}  loss {token['loss']:.3f} nats",
            f"weights of the heads  {_named(names, heads)}",
            f"gates of the layers   {_named(names, token['gates'])}",
            f"likeliest             {likeliest}",
        )
    )
    strength = min(token["loss"] / LOSS_OF_FULL_COLOUR, 1)
    style = f"--c:var(--c{colours[heaviest]});--a:{heads[heaviest]:.2f};--l:{strength:.2f}"
    return (
        f'<span class="token" tabindex="0" id="{escape(name)}" style="{style}" data-tip="{escape(tip)}">'
        f"{escape(token['text'])}</span>"
    )


def _named(names: Sequence[str], values: Sequence[float]) -> str:
    """The candidates with at least half a percent, the heaviest first."""
    pairs = sorted(zip(values, names, strict=True), key=lambda pair: -pair[0])
    return ", ".join(f"{name} {value:.1%}" for value, name in pairs if value >= 0.005)
