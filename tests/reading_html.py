"""What a page of forge_common/reporting holds: read with the standard library, and with Chromium where there is one."""

import base64
import hashlib
import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")


class Page(HTMLParser):
    """tags: of all elements, in order. attributes: of all elements. scripts: those that run.

    charts: the data of the curves. text: the rest.
    """

    def __init__(self, content: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.scripts: list[str] = []
        self.charts: list[dict[str, Any]] = []
        self.text = ""
        self._within = ""
        self.feed(content)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self._within = "charts" if ("type", "application/json") in attrs else tag

    def handle_endtag(self, tag: str) -> None:
        self._within = ""

    def handle_data(self, data: str) -> None:
        if self._within == "charts":
            self.charts = json.loads(data)
        elif self._within == "script":
            self.scripts.append(data)
        elif self._within != "style":
            self.text += data

    def chart(self, title: str) -> dict[str, Any]:
        return next(chart for chart in self.charts if chart["title"] == title)


def read(path: Path) -> Page:
    """A page, of which it is certain that it makes no request and that only its own scripts run."""
    page = Page(path.read_text(encoding="utf-8"))
    loaded = [value for name, value in page.attributes if name in ("src", "href", "data", "action", "srcset")]
    assert loaded == ["data:,"], "only the empty icon"
    policy = next(value for name, value in page.attributes if value.startswith("default-src 'none'"))
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in page.scripts]
    allowed = policy.split("script-src ")[1]
    assert allowed == (" ".join(f"'sha256-{digest}'" for digest in digests) or "'none'")
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    return page


def in_chromium(path: Path, folder: Path) -> tuple[Page, str]:
    """The document after its scripts ran, and what the browser printed to its console."""
    assert CHROMIUM
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}", "--enable-logging=stderr"]
    flags += ["--window-size=1100,900", "--virtual-time-budget=2000", "--dump-dom", path.absolute().as_uri()]
    done = subprocess.run([CHROMIUM, *flags], capture_output=True, text=True, timeout=300, check=True)
    return Page(done.stdout), "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
