"""The tables that `evaluate` prints: one row for each model, one column for each text, in blocks that fit the terminal."""

import shutil
import textwrap
from collections.abc import Callable
from typing import Any

CREDITS = ("layer_gates", "head_weights")  # keys of a row of an assembled model
Row = dict[str, Any]


def table(rows: list[Row], *, details: bool = False) -> str:
    """Nats per token and perplexity, and the credits of the assembled model.

    details: also standard errors, bits per byte, and the credits of the rows without a module.
    """
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    models = list(dict.fromkeys(row["model"] for row in rows))
    at = {(row["model"], row["domain"]): row for row in rows}

    def grid(cell: Callable[[Row], str]) -> str:
        return blocks(domains, [(model, [cell(at[model, domain]) for domain in domains]) for model in models])

    tables = ["nats per token (perplexity)\n" + grid(lambda row: f"{row['loss']:.3f} ({short(row['perplexity'])})")]
    if details:
        tables.append("standard error over the documents, in nats\n" + grid(lambda row: number(row["stderr"])))
        tables.append("bits per byte\n" + grid(lambda row: number(row["bits_per_byte"])))
    for model in models:
        credits = at[model, domains[0]].get(CREDITS[0], {})
        if not credits or (model != "assembled" and not details):
            continue
        shares = [
            (name, [" / ".join(f"{at[model, domain][key][name]:.0%}" for key in CREDITS) for domain in domains])
            for name in credits
        ]
        title = f"credits in {model}: mean gate of the layers / mean weight of the head"
        tables.append(f"{title}\n{blocks(domains, shares)}")
    return "\n\n".join(tables)


def blocks(columns: list[str], rows: list[tuple[str, list[str]]]) -> str:
    """A grid as text, with names on the left.

    Columns that do not fit beside each other in the terminal (80 without one) follow in further blocks.
    """
    first = max(len(name) for name, _ in rows)
    widths = [2 + max(len(name), *(len(cells[i]) for _, cells in rows)) for i, name in enumerate(columns)]
    width = shutil.get_terminal_size().columns
    parts: list[list[int]] = [[]]  # the numbers of the columns in each block
    for i in range(len(columns)):
        if parts[-1] and first + sum(widths[j] for j in parts[-1]) + widths[i] > width:
            parts.append([])
        parts[-1].append(i)
    grids = []
    for part in parts:
        lines = []
        for name, cells in [("", columns), *rows]:
            line = f"{name:<{first}}" + "".join(f"  {cells[i]:<{widths[i] - 2}}" for i in part)
            lines.append(line.rstrip())
        grids.append("\n".join(lines))
    return "\n\n".join(grids)


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def short(perplexity: float) -> str:
    """49.3 -> 49, 7.61 -> 7.6, 1234567 -> 1.2e+06."""
    return f"{perplexity:,.0f}" if 10 <= perplexity < 1e6 else f"{perplexity:.2g}"


def removals(rows: list[Row]) -> str:
    """A line for each module that is left out: the loss on the domain of its name, and the change of the others."""
    losses = {(row["model"], row["domain"]): row["loss"] for row in rows}
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows if row["model"].startswith("without:")):
        name = model.removeprefix("without:")
        domains = [row["domain"] for row in rows if row["model"] == model and row["domain"] != "spliced"]
        line = f"left out    {name}: "
        if name in domains:
            line += f"{name} {losses['assembled', name]:.3f} -> {losses[model, name]:.3f}"
            line += f", trunk {losses['trunk', name]:.3f}; " if ("trunk", name) in losses else "; "
        changes = {domain: losses[model, domain] - losses["assembled", domain] for domain in domains if domain != name}
        # textwrap must not break a line at the space within an item.
        items = [f"{domain}\N{NO-BREAK SPACE}{round(change, 3) + 0.0:+.3f}" for domain, change in changes.items()]
        line = textwrap.fill(
            line + "others " + ", ".join(items), 80, subsequent_indent=" " * 12, break_on_hyphens=False
        )
        lines.append(line.replace("\N{NO-BREAK SPACE}", " ") + "\n")
    return "".join(lines)
