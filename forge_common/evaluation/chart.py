"""Draws the losses as an SVG: a line for each domain, a dot for each model with its standard error."""

from html import escape
from typing import Any

COLOURS = ("#888888", "#4477aa", "#66ccee", "#228833", "#ccbb44", "#aa3377", "#bbbbbb", "#994455", "#ee6677")
PLOT, LINE, TOP = 500, 46, 40  # width of the plot, height of a domain, height of the title
CHARACTER = 7.5  # width of a letter of a name, with room to spare
STYLE = """<style>
text { fill: #1f2328; } .grid { stroke: #d0d7de; } .paper { fill: #ffffff; }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3; } .grid { stroke: #3d444d; } .paper { fill: #0d1117; } }
</style>
<rect class="paper" width="100%" height="100%"/>"""


def draw(rows: list[dict[str, Any]], title: str = "nats per token on held-out documents, lower is better") -> str:
    """The SVG of rows with model, domain, loss and stderr."""
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    models = list(dict.fromkeys(row["model"] for row in rows))
    ends = [row["loss"] + sign * (row["stderr"] or 0) for row in rows for sign in (-1, 1)]
    low, high = min(ends), max(ends)
    step = next(size for size in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10) if (high - low) / size <= 12)
    low, high = low // step * step, (high // step + 1) * step
    left = 20 + round(CHARACTER * max(map(len, domains)))
    right = left + PLOT
    width = right + 46 + round(CHARACTER * max(map(len, models)))

    def x(loss: float) -> float:
        return left + (loss - low) / (high - low) * PLOT

    bottom = TOP + LINE * len(domains)
    parts = [f'<text x="{left}" y="18" font-size="14">{escape(title)}</text>']
    for number in range(round((high - low) / step) + 1):
        loss = low + number * step
        parts.append(f'<line x1="{x(loss):.1f}" x2="{x(loss):.1f}" y1="{TOP - 8}" y2="{bottom}" class="grid"/>')
        parts.append(f'<text x="{x(loss):.1f}" y="{bottom + 16}" text-anchor="middle">{loss:.2f}</text>')
    for line, domain in enumerate(domains):
        y = TOP + LINE * line
        parts.append(f'<text x="{left - 10}" y="{y + 20}" text-anchor="end">{escape(domain)}</text>')
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
        parts.append(f'<circle cx="{right + 26}" cy="{y}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{right + 36}" y="{y + 4}">{escape(model)}</text>')
    height = max(bottom + 26, TOP + 16 * len(models))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
    return head + 'font-family="sans-serif" font-size="12">\n' + "\n".join([STYLE, *parts]) + "\n</svg>\n"
