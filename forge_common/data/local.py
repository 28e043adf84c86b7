"""Corpora that every machine has: python, cpp and docs come with Python and torch, perl with Perl.

Nothing is downloaded. The text depends on the versions of Python and of the packages (`versions`), not on the order of
the file system: documents are sorted by the digest of their text, each at most once.
"""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

from ..errors import UserError
from ..files.places import missing_source
from .readers.document import Document

CAP = 16_000_000  # characters of a corpus
SIZES = range(200, 256 << 10)  # bytes of a document: shorter ones hold little text, longer ones mostly tables
# Fraction of a document's lines that earlier ones had, from which on it counts as a near copy (or a licence and little else).
SEEN_BEFORE = 0.7

# The domains share no text: a package whose code is in `python` is left out of `docs`.
CODE_PACKAGES = ("accelerate", "datasets", "torch")
HEADER_PACKAGES = ("torch", "pyarrow", "numpy")
NOT_DOCUMENTED = {*CODE_PACKAGES, "torchgen", "functorch", "caffe2", "pip", "setuptools", "pkg_resources"}
NOT_DOCUMENTED |= {"multiprocess"}  # a copy of the standard library's multiprocessing
NOT_CODE = {"site-packages", "dist-packages", "test", "tests", "testing", "idlelib", "idle_test", "lib2to3"}
NOT_CODE |= {"ensurepip", "encodings", "pydoc_data", "__pycache__", "_vendor", "_distutils", "node_modules"}

GENERATED = re.compile(r"@generated|torchgen|DO NOT EDIT|[Gg]enerated (?:by|from)|[Aa]uto-?generated")
# A string on lines of its own, first in its file or after the colon of a header. Some twenty times as fast as `ast`,
# also because the second pattern begins with a character that is searched for.
FIRST_DOCSTRING = re.compile(r'(?:#[^\n]*\n|\s)*[rRuU]?"""(.*?)"""', re.DOTALL)
DOCSTRING = re.compile(r':[ \t]*(?:#[^\n]*)?\n\s*[rRuU]?"""(.*?)"""', re.DOTALL)

Named = Iterator[tuple[str, str]]  # (name, text)


def documents(name: str) -> Iterator[Document]:
    """The corpus of that name. Origin: local:NAME:file. UserError listing the names for an unknown one."""
    for origin, text, digest in _corpus(name):
        yield Document(f"local:{name}:{origin}", digest, (text,))


@lru_cache(maxsize=4)  # all of them: at most 64 M characters
def _corpus(name: str) -> list[tuple[str, str, bytes]]:
    """(origin, text, digest) of its documents. A run reads them two or three times, and to find them takes most of that time."""
    corpus = {"python": _python, "cpp": _cpp, "docs": _docs, "perl": _perl}.get(name)
    if corpus is None:
        raise UserError(f"{missing_source(f'local:{name}')}.")
    return list(_distinct(corpus()))


def versions(name: str) -> dict[str, str]:
    """What the corpus depends on: the versions of Python and of the packages read, or of perl."""
    if name == "perl":
        return {"perl": _perl_config("version")}
    wanted = {"python": CODE_PACKAGES, "cpp": HEADER_PACKAGES, "docs": None}.get(name, ())
    installed = _installed()
    packages = {package: installed[package] for package in sorted(installed) if wanted is None or package in wanted}
    return {"python": platform.python_version(), **packages}


@lru_cache(maxsize=1)  # hundreds of files
def _installed() -> dict[str, str]:
    """The version of each package that is installed."""
    facts = [package.metadata for package in metadata.distributions()]  # parsed at each look
    return {fact["Name"]: fact["Version"] for fact in facts if fact["Name"]}  # a broken installation has no name


def _python() -> list[Named]:
    standard = Path(sysconfig.get_path("stdlib"))
    packages = (_files(_site(), package, {".py"}) for package in CODE_PACKAGES)
    return [_files(standard.parent, standard.name, {".py"}), (named for files in packages for named in files)]


def _cpp() -> list[Named]:
    headers = {".h", ".hpp", ".cpp", ".cc", ".cuh", ".cu", ".inl"}
    folders = ("torch/include", "pyarrow/include", "numpy/_core/include")
    return [_files(_site(), folder, headers) for folder in folders]


def _perl() -> list[Named]:
    """Perl's own library with its manual pages, without installed modules and Unicode's tables."""
    places = {Path(_perl_config(name)) for name in ("privlibexp", "archlibexp")}
    return [_files(place.parent, place.name, {".pm"}) for place in sorted(places)]


def _perl_config(name: str) -> str:
    """A value of perl's own configuration. UserError where there is no perl."""
    perl = shutil.which("perl")
    if perl is None:
        raise UserError("local:perl: there is no perl on this machine. Install it, or use another corpus.")
    done = subprocess.run([perl, "-MConfig=%Config", "-e", f"print $Config{{{name}}}"], capture_output=True, text=True)
    if done.returncode or not done.stdout:
        raise UserError(
            f"local:perl: {perl} does not print its {name} ({done.stderr.strip()}). Fix it, or use another corpus."
        )
    return done.stdout


def _docs() -> list[Named]:
    return [_topics(), _descriptions(), _docstrings()]


def _site() -> Path:
    """Where torch is installed; all the other packages are expected beside it."""
    torch = find_spec("torch")  # finds it without importing it
    return Path(torch.origin).parent.parent if torch and torch.origin else Path(sysconfig.get_path("platlib"))


def _files(root: Path, below: str, suffixes: set[str], keep: Callable[[str], bool] = lambda name: True) -> Named:
    """(path below root, text) of the files of these suffixes, without generated ones, those outside SIZES and those
    that are not UTF-8.
    """
    for here, folders, names in os.walk(root / below):
        folders[:] = [folder for folder in folders if folder not in NOT_CODE and not folder.startswith(".")]
        if here.endswith(os.path.join("ATen", "ops")):
            continue  # generated, and by far the largest folder of the headers
        for name in names:
            if os.path.splitext(name)[1] not in suffixes or not keep(name):
                continue
            path = os.path.join(here, name)
            if not os.path.isfile(path) or os.path.getsize(path) not in SIZES:
                continue
            try:
                with open(path, encoding="utf-8") as file:
                    text = file.read()
            except (OSError, UnicodeDecodeError):
                continue
            if "\0" not in text and not _is_generated(text[:2048]):
                yield Path(path).relative_to(root).as_posix(), text


def _is_generated(head: str) -> bool:
    return any(part in head for part in ("enerated", "torchgen", "DO NOT EDIT")) and bool(GENERATED.search(head))


def _topics() -> Named:
    """The language reference that `help()` shows, topic by topic."""
    try:
        topics = import_module("pydoc_data.topics").topics
    except ImportError:
        return
    for topic, text in topics.items():
        yield f"pydoc/{topic}", text


def _descriptions() -> Named:
    """The descriptions of packages: the body of METADATA, and the text files in them."""
    for distribution in metadata.distributions():
        if not distribution.name:
            continue
        body = (distribution.read_text("METADATA") or "").partition("\n\n")[2]
        yield f"{distribution.name}/METADATA", body
    legal = re.compile(r"licen[cs]e|copying|notice|authors|top_level|entry_points|requirements|sources|cmake", re.I)
    yield from _files(_site(), "", {".md", ".rst", ".txt"}, keep=lambda name: not legal.search(name))


def _docstrings() -> Named:
    """Module by module, the docstrings of packages whose code is not in `python`."""
    for folder in sorted(_site().iterdir()):
        if folder.name in NOT_DOCUMENTED or not (folder / "__init__.py").is_file():
            continue
        for name, source in _files(_site(), folder.name, {".py"}):
            found = (_dedented(match[1]) for match in docstrings(source))
            text = "\n\n".join(docstring for docstring in found if len(docstring) >= 80)
            if len(text) >= 400:
                yield name, text + "\n"


def docstrings(source: str) -> list[re.Match]:
    """The docstrings of Python code, in order; group 1 is the text between the quotes."""
    first = FIRST_DOCSTRING.match(source)
    if first is None:
        return list(DOCSTRING.finditer(source))
    return [first, *DOCSTRING.finditer(source, first.end())]


def _dedented(docstring: str) -> str:
    first, *rest = docstring.expandtabs().strip().split("\n")
    margin = min((len(line) - len(line.lstrip()) for line in rest if line.strip()), default=0)
    return "\n".join([first, *(line[margin:].rstrip() for line in rest)])


def _distinct(parts: Iterable[Named]) -> Iterator[tuple[str, str, bytes]]:
    """(name, text, digest) in the order of the digests, part by part, up to CAP, without copies and near copies.

    A near copy is a text most of whose lines (longer than 15 characters, without digits and spaces) were in earlier ones.
    """
    size = 0
    seen = set()
    for part in parts:
        documents = [(hashlib.sha256(text.encode("utf-8", "replace")).digest(), name, text) for name, text in part]
        for digest, name, text in sorted(documents):
            if size + len(text) > CAP or len(text.encode("utf-8", "replace")) not in SIZES:
                continue
            squeezed = text.translate(_NO_DIGITS_OR_SPACES).split("\n")
            lines = {hash(line) for line in squeezed if len(line) > 15}
            if not lines or len(lines & seen) >= SEEN_BEFORE * len(lines):
                continue
            seen |= lines
            size += len(text)
            yield name, text, digest


_NO_DIGITS_OR_SPACES = {ord(character): None for character in "0123456789 \t\r"}
