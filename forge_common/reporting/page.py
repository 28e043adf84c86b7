"""One HTML file without network: sections, tables, and charts that uPlot draws in the browser.

Whatever is not markup of this folder is escaped. A Content-Security-Policy allows the page's own scripts, by their digests, and
no request: a text that is shown cannot run anything.
"""

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
LIBRARY = FOLDER / "uplot" / "uPlot.iife.min.js"  # 1.6.32 of the npm registry, as it is there


def page(title: str, sections: Iterable[str], charts: Sequence[dict[str, Any]] = (), *, running: bool = False) -> str:
    """The document. charts: those of charts.py, drawn where a section has `curves()`. running: it loads itself again."""
    library, missing = "", ""
    if charts:
        try:
            library = LIBRARY.read_text(encoding="utf-8")
        except OSError:
            missing = f"<p>The curves are not shown: {escape(str(LIBRARY))} is missing. Restore the checkout.</p>"
    scripts = [library, (FOLDER / "charts.js").read_text(encoding="utf-8")] if library else []
    digests = " ".join(f"'sha256-{_sha256(script)}'" for script in scripts) or "'none'"
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {digests}"
    styles = (FOLDER / "uplot" / "uPlot.min.css", FOLDER / "page.css")
    return "\n".join(
        (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">',
            f"<title>{escape(title)}</title>",
            *(f"<style>{path.read_text(encoding='utf-8')}</style>" for path in styles if path.exists()),
            f"</head>\n<body{' data-running' if running else ''}>\n<main>\n<h1>{escape(title)}</h1>",
            *sections,
            missing,
            f'</main>\n<script type="application/json" id="charts">{_embedded(list(charts))}</script>',
            *(f"<script>{script}</script>" for script in scripts),
            "</body>\n</html>\n",
        )
    )


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _embedded(content: Any) -> str:
    """JSON that ends no script element."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def section(heading: str, *parts: str) -> str:
    """A section of markup under a plain heading."""
    return "\n".join(("<section>", f"<h2>{escape(heading)}</h2>", *parts, "</section>"))


def curves() -> str:
    """Where charts.js draws the page's charts."""
    return '<div id="plots"></div><noscript><p>The curves need JavaScript; everything else is below.</p></noscript>'


def cards(values: dict[str, str]) -> str:
    """Numbers with their names, large."""
    pairs = (f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in values.items())
    return f'<dl class="cards">{"".join(pairs)}</dl>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, kind: str = "") -> str:
    """A table of plain texts, whose first column names the row. kind: its CSS class."""
    return table_of_cells(head, ([f"<td>{escape(cell)}</td>" for cell in row] for row in rows), kind=kind)


def table_of_cells(head: Sequence[str], rows: Iterable[Sequence[str]], *, kind: str = "") -> str:
    """A table of <td> elements, under plain headings."""
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "\n".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
    return (
        f'<div class="wide"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>\n{body}\n</tbody></table></div>'
    )
