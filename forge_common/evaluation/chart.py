"""Draws the losses as an SVG: a line for each domain, a dot for each model with its standard error."""

from html import escape
from typing import Any

COLOURS = ("#888888", "#4477aa", "#66ccee", "#228833", "#ccbb44", "#aa3377", "#bbbbbb", "#994455", "#ee6677")
LEFT, RIGHT, LINE, TOP = 120, 620, 46, 40
CHARACTER = 7.5  # its width at most, on average
STYLE = "text { fill: #1c1e21 } .grid { stroke: #dddddd } "
STYLE += "@media (prefers-color-scheme: dark) { text { fill: #e6e8eb } .grid { stroke: #373d44 } }"


def draw(rows: list[dict[str, Any]], title: str = "nats per token on held-out documents, lower is better") -> str:
    """The SVG of rows with model, domain, loss and stderr."""
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    models = list(dict.fromkeys(row["model"] for row in rows))
    ends = [row["loss"] + sign * (row["stderr"] or 0) for row in rows for sign in (-1, 1)]
    low, high = min(ends), max(ends)
    step = next(size for size in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10) if (high - low) / size <= 12)
    low, high = low // step * step, (high // step + 1) * step

    def x(loss: float) -> float:
        return LEFT + (loss - low) / (high - low) * (RIGHT - LEFT)

    bottom = TOP + LINE * len(domains)
    parts = [f'<text x="{LEFT}" y="18" font-size="14">{escape(title)}</text>']
    for number in range(round((high - low) / step) + 1):
        loss = low + number * step
        parts.append(f'<line x1="{x(loss):.1f}" x2="{x(loss):.1f}" y1="{TOP - 8}" y2="{bottom}" class="grid"/>')
        parts.append(f'<text x="{x(loss):.1f}" y="{bottom + 16}" text-anchor="middle">{loss:.2f}</text>')
    for line, domain in enumerate(domains):
        y = TOP + LINE * line
        parts.append(f'<text x="{LEFT - 10}" y="{y + 20}" text-anchor="end">{escape(domain)}</text>')
        domain_rows = [row for row in rows if row["domain"] == domain]
        for place, row in enumerate(domain_rows):
            height = y + (place + 1) * (LINE - 6) / (len(domain_rows) + 1)
            colour = COLOURS[models.index(row["model"]) % len(COLOURS)]
            error = row["stderr"] or 0
            parts.append(
                f'<line x1="{x(row["loss"] - error):.1f}" x2="{x(row["loss"] + error):.1f}" y1="{height:.1f}" '
                f'y2="{height:.1f}" stroke="{colour}"/>'
            )
            hint = escape(f"{row['model']}, {domain}: {row['loss']:.4f}")
            parts.append(
                f'<circle cx="{x(row["loss"]):.1f}" cy="{height:.1f}" r="4" fill="{colour}"><title>{hint}</title></circle>'
            )
    for place, model in enumerate(models):
        y, colour = TOP + 16 * place, COLOURS[place % len(COLOURS)]
        parts.append(f'<circle cx="{RIGHT + 26}" cy="{y}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{RIGHT + 36}" y="{y + 4}">{escape(model)}</text>')
    height = max(bottom + 26, TOP + 16 * len(models))
    width = RIGHT + 44 + CHARACTER * max(map(len, models))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}" font-family="sans-serif" font-size="12">'
    return "\n".join((head, f"<style>{STYLE}</style>", *parts, "</svg>\n"))
