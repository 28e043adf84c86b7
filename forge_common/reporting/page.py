"""One HTML file that loads nothing from the network: sections, tables, and charts that uPlot draws in the browser.

Whatever is not markup of this folder is escaped. A Content-Security-Policy allows the page's own scripts, by their
digests, and no request (of forge_common.chat's page: those to its server): a text that is shown cannot run anything.
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


def page(
    title: str,
    sections: Iterable[str],
    charts: Sequence[dict[str, Any]] = (),
    *,
    running: bool = False,
    program: str | None = None,
) -> str:
    """The document. charts: those of charts.py, drawn where a section has `curves()`. running: it loads itself again.

    program: NAME of NAME.js and NAME.css in this folder, for a page of a server, to which it may send requests.
    """
    library = ""
    missing = ""
    if charts:
        try:
            library = LIBRARY.read_text(encoding="utf-8")
        except OSError:
            missing = f"<p>The curves are not shown: {escape(str(LIBRARY))} is missing. Restore the checkout.</p>"
    scripts = [library, (FOLDER / "charts.js").read_text(encoding="utf-8")] if library else []
    styles = [FOLDER / "uplot" / "uPlot.min.css", FOLDER / "page.css"]
    if program:
        scripts.append((FOLDER / f"{program}.js").read_text(encoding="utf-8"))
        styles.append(FOLDER / f"{program}.css")
    digests = " ".join(f"'sha256-{_sha256(script)}'" for script in scripts) or "'none'"
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {digests}"
    if program:
        policy += "; connect-src 'self'; form-action 'none'; base-uri 'none'"
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
            f"</main>\n{embedded('charts', list(charts))}",
            *(f"<script>{script}</script>" for script in scripts),
            "</body>\n</html>\n",
        )
    )


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def embedded(name: str, content: Any) -> str:
    """An element of this id with JSON that scripts read. Nothing in it ends the element."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'


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


def candidate_colours(number: int) -> list[int]:
    """The n of the CSS colours --cn of candidates: the trunk, the first one, is grey, the others have the colours of
    the curves.
    """
    return [7, *(index % 7 for index in range(number - 1))]


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
