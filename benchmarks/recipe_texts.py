"""The text of the comparison: three groups of domains, divided by the hash of each document's content.

Everything is on any Debian machine with this project's environment. No document is in two parts of its domain.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from functools import cache
from itertools import chain
from pathlib import Path

from forge_common.data import local
from forge_common.files.atomic import publish

GROUPS = {
    "home": ("docs", "python", "cpp", "perl"),  # in the trunk's text; the router was designed on them
    "unseen": ("shell", "copyright", "stubs", "cython"),  # not in the trunk's text, never used in the design
    "pair": ("transformers", "pandas"),  # two code bases in one language
}
HOME = GROUPS["home"]
MIX = {"docs": 0.76, "python": 0.08, "cpp": 0.08, "perl": 0.08}  # shares of the trunk's text
HOME_PARTS = {"test": 0.05, "tune": 0.10, "module": 0.55, "trunk": 1.0}  # upper ends of the parts, in the hash
OTHER_PARTS = {"test": 0.25, "tune": 0.4, "module": 1.0}
EXCERPT = 3_000  # characters of a document that are scored: many documents instead of long ones
BEGINNINGS = 64  # documents of docs on which the trunk's run measures a loss, which no row uses
CAP = 6_000_000  # characters of a domain that is not at home
SPLITS = 4  # random parts of the home domains' module text
SCRIPT = re.compile(r"#! ?/(usr/)?bin/(env )?(ba|da)?sh\b")
Document = tuple[bytes, str]  # (digest, text)


@cache
def documents(domain: str) -> list[Document]:
    """The documents of a domain in the order of their digests, without copies and near copies."""
    if domain in HOME:
        return [(document.digest, "".join(document.pieces)) for document in local.documents(domain)]
    found, size = [], 0
    for _, text, digest in local._distinct([_OTHERS[domain]()]):
        size += len(text)
        if size > CAP:
            break
        found.append((digest, text))
    return found


def _shell() -> local.Named:
    """Scripts of the system: commands, those that packages run when they are installed, and settings of the shell."""
    places = ("usr/bin", "usr/sbin", "usr/lib/git-core", "var/lib/dpkg/info", "etc")
    suffixes = {"", ".sh", ".preinst", ".postinst", ".prerm", ".postrm", ".config"}
    found = (local._files(Path("/"), place, suffixes) for place in places)
    return ((name, text) for name, text in chain.from_iterable(found) if SCRIPT.match(text))


def _copyright() -> local.Named:
    """The copyright files of Debian's packages: lists of files with their licences."""
    return local._files(Path("/"), "usr/share/doc", {""}, keep=lambda name: name == "copyright")


def _packages(suffixes: set[str]) -> local.Named:
    return local._files(local._site(), "", suffixes)


def _code(package: str) -> local.Named:
    """A package's Python without its docstrings, which are in docs."""
    for name, text in local._files(local._site(), package, {".py"}):
        yield name, without_docstrings(text)


def without_docstrings(code: str) -> str:
    for found in reversed(local.docstrings(code)):
        code = code[: found.start(1) - 3] + "\n" + code[found.end() :]
    return code


_OTHERS: dict[str, Callable[[], local.Named]] = {
    "shell": _shell,
    "copyright": _copyright,
    "stubs": lambda: _packages({".pyi"}),
    "cython": lambda: _packages({".pyx", ".pxd", ".pxi"}),
    "transformers": lambda: _code("transformers"),
    "pandas": lambda: _code("pandas"),
}


def part_of(digest: bytes, parts: dict[str, float]) -> str:
    ordered = parts is HOME_PARTS  # `documents` sorts by these bytes, and CAP cuts the last ones
    place = int.from_bytes(digest[:8] if ordered else digest[16:24], "big") / 2**64
    return next(part for part, end in parts.items() if place < end)


def excerpt(digest: bytes, text: str) -> str:
    """At most EXCERPT characters of whole lines, from a place that the digest decides."""
    if len(text) <= EXCERPT:
        return text
    place = int.from_bytes(digest[8:16], "big") % (len(text) - EXCERPT + 1)
    start = text.rfind("\n", 0, place) + 1
    if place - start > EXCERPT // 4:  # a line that is too long to go back to its beginning
        start = place
    chosen = text[start : start + EXCERPT]
    return chosen[: chosen.rfind("\n") + 1] or chosen


def export_training(folder: Path, domains: Iterable[str]) -> None:
    """These home domains' text of the trunk and of the modules, and beginnings of docs for the trunk's own validation."""

    def write(temp_dir: Path) -> None:
        for domain in domains:
            lines: dict[str, list[str]] = {part: [] for part in HOME_PARTS}
            for digest, text in documents(domain):
                part = part_of(digest, HOME_PARTS)
                if part == "tune" and len(lines[part]) < BEGINNINGS:
                    beginning = text[: text.rfind("\n", 0, EXCERPT) + 1] or text[:EXCERPT]
                    lines[part].append(_line(text if len(text) <= EXCERPT else beginning))
                elif part in ("trunk", "module"):
                    lines[part].append(_line(text))
            for part in ("trunk", "module", *(["tune"] if domain == "docs" else [])):
                (temp_dir / f"{domain}.{part}.jsonl").write_text("".join(lines[part]), encoding="utf-8")

    _publish(folder, write)


def export_texts(folder: Path, training: Path, domains: Iterable[str], scored: int) -> None:
    """Excerpts of at most `scored` documents of each of these domains and parts; the other domains' module text; the
    random splits.
    """

    def write(temp_dir: Path) -> None:
        for domain in domains:
            parts = HOME_PARTS if domain in HOME else OTHER_PARTS
            lines: dict[str, list[str]] = {part: [] for part in parts}
            for digest, text in documents(domain):
                part = part_of(digest, parts)
                if part in ("trunk", "module"):
                    lines[part].append(_line(text))
                elif len(lines[part]) < scored:
                    lines[part].append(_line(excerpt(digest, text)))
            for part in ("test", "tune") if domain in HOME else parts:
                (temp_dir / f"{domain}.{part}.jsonl").write_text("".join(lines[part]), encoding="utf-8")
            if domain in HOME:
                path = training / f"{domain}.module.jsonl"
                _split(path.read_text(encoding="utf-8").splitlines(True), domain, temp_dir)

    _publish(folder, write)


def _split(lines: list[str], domain: str, folder: Path) -> None:
    """Each document in one of SPLITS files, by a hash."""
    split_of = [hashlib.sha256(line.encode()).digest()[0] % SPLITS for line in lines]
    for split in range(SPLITS):
        chosen = (line for line, place in zip(lines, split_of, strict=True) if place == split)
        (folder / f"{domain}.split-{split}.jsonl").write_text("".join(chosen), encoding="utf-8")


def _line(text: str) -> str:
    return json.dumps({"text": text}) + "\n"


def _publish(folder: Path, write: Callable[[Path], None]) -> None:
    def read_back(temp_dir: Path) -> None:
        for path in temp_dir.iterdir():
            if not _lines(path):
                raise SystemExit(f"{path.name}: there is no such text on this machine.")

    if not folder.exists():
        publish(folder, write, read_back)


def _lines(path: Path) -> int:
    """The number of its lines, each read as JSON."""
    lines: Iterable[str] = path.read_text(encoding="utf-8").splitlines()
    return sum(1 for line in lines if json.loads(line))
