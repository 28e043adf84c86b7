"""A SOURCE, as the user writes it, becomes documents: a file, folder or glob, hf:ID[:CONFIG[:SPLIT]] or local:NAME."""

import glob
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError
from . import local
from .readers import records, tables, text
from .readers.document import Document, Reading

READERS = {
    ".jsonl": records.documents,
    ".json": records.documents,
    ".csv": records.documents,
    ".parquet": tables.documents,
    ".arrow": tables.documents,
}
# Named like text, so taken as text in a folder without a look inside: what is wrong in them is not passed over.
TEXT_SUFFIXES = {".txt", ".text", ".md", ".rst", ".tex", ".html", ".xml", ".py", ".c", ".h", ".cc", ".cpp", ".js"}
WEIGHTS = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".safetensors", ".gguf", ".ckpt", ".npy", ".npz", ".onnx", ".h5"}
PACKED = {".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".7z"}


def parse(source: str) -> tuple[str, float | None]:
    """Split 'SPEC@0.7' into the spec and its weight (None without one).

    '@' counts only before a number at the end, and never where a path of that whole name exists. UserError when the
    weight is not a positive number.
    """
    match = re.fullmatch(r"(.+)@([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)", source, re.DOTALL)
    if match is None or os.path.lexists(source):
        return source, None
    weight = float(match[2])
    if not 0 < weight < math.inf:
        raise UserError(f"{source}: the weight {match[2]} is not greater than 0; write a positive number after '@'")
    return match[1], weight


def files_of(spec: str) -> list[Path]:
    """The files of a file, folder (all text and table files below it, hidden ones left out) or glob, sorted.

    UserError when there are none, or when one is named that holds weights or is packed.
    """
    path = Path(spec).expanduser()
    if not spec.strip():
        raise UserError("a source is empty; name a file, folder, glob, hf:ID or local:NAME")
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass  # perhaps a glob
    except (OSError, ValueError) as error:  # no permission, a link to itself, a name too long, a NUL in it
        raise _unreadable(spec, error) from error
    if path.is_dir():
        files = _files_below(path)
        if not files:
            raise UserError(f"{spec}: no text in this folder (hidden files do not count); name one that holds text")
        return files
    found = [path] if os.path.lexists(path) else sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    files = [name for name in found if not name.is_dir()]  # folders that a glob matches are not meant
    if not files:
        reason = "it matches folders only" if found else "no such file, and as a glob it matches nothing"
        raise UserError(f"{spec}: {reason}; name a file, folder, glob, hf:ID or local:NAME")
    for file in files:
        _check_regular(file)
        if file.suffix.lower() in WEIGHTS:
            raise UserError(f"{file}: holds weights or pickles, not text, and is not opened; name text files")
        if file.suffix.lower() in PACKED:
            raise UserError(f"{file}: is packed; unpack it and name what was inside")
    return files


def _unreadable(path: Path | str, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or error
    return UserError(f"{path}: cannot be read ({reason}); check the path and its permissions")


def _check_regular(file: Path) -> None:
    """UserError for what could not be read to its end, or at all: a pipe, a device, a socket, a link to nothing."""
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):
            raise UserError(f"{file}: not a regular file; name a file, folder, glob, hf:ID or local:NAME")
    except OSError as error:
        raise _unreadable(file, error) from error


def _files_below(folder: Path) -> list[Path]:
    """The files to read below a folder. UserError for what would be left out without a word."""

    def refuse(error: OSError) -> None:
        raise _unreadable(error.filename, error) from error

    files = []
    for here, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            if Path(here, name).is_symlink():
                raise UserError(f"{Path(here, name)}: a link to a folder is not followed; name the folder as a source")
        files += [Path(here, name) for name in names if not name.startswith(".")]
    return sorted(file for file in files if _is_text(file))


def _is_text(file: Path) -> bool:
    """Whether a file of a folder is one to read: by its suffix, else by its first bytes."""
    suffix = file.suffix.lower()
    if suffix in READERS or suffix in TEXT_SUFFIXES:
        _check_regular(file)
        return True
    if suffix in WEIGHTS or suffix in PACKED or not file.is_file():
        return False
    try:
        with open(file, "rb") as opened:
            head = opened.read(4096)
        head.decode()
    except OSError as error:
        raise _unreadable(file, error) from error
    except UnicodeDecodeError as error:
        # The cut at 4096 may go through a character: only a fault before the last one makes it binary.
        return error.start >= 4093 and b"\0" not in head
    return b"\0" not in head


def facts(spec: str) -> dict[str, Any]:
    """What tells whether a source has changed, without reading it: files with size in bytes and mtime in ns; versions.

    A hub data set is known by its name alone: a new revision under the same name is not noticed.
    """
    if spec.startswith("hf:"):
        return {"hub": spec}
    if spec.startswith("local:"):
        return {"local": spec, "versions": local.versions(spec.removeprefix("local:"))}
    try:
        stats = [(file, file.stat()) for file in files_of(spec)]
    except OSError as error:
        raise _unreadable(error.filename, error) from error
    return {"files": [[str(file.absolute()), found.st_size, found.st_mtime_ns] for file, found in stats]}


def read(spec: str, reading: Reading, counts: Counter | None = None) -> Iterator[Document]:
    """Read a source (without its weight) as documents, in a fixed order, in bounded memory.

    `counts` receives skipped_empty, skipped_bad_text, replaced_bad_text, skipped_bad_line (documents or rows),
    skipped_empty_file and skipped_bad_file. UserError, with file and line and the mend, for whatever cannot be read.
    """
    counts = Counter() if counts is None else counts
    if spec.startswith("hf:"):
        yield from tables.hub_documents(spec, reading, counts)
    elif spec.startswith("local:"):
        yield from local.documents(spec.removeprefix("local:"))
    else:
        files = files_of(spec)
        for file in files:
            try:
                if file.stat().st_size:
                    yield from READERS.get(file.suffix.lower(), text.documents)(file, reading, counts)
                elif len(files) == 1:
                    raise UserError(f"{file}: the file is empty; name one that holds text")
                else:
                    counts["skipped_empty_file"] += 1
            except OSError as error:  # it vanished, or its disk does not give it back
                raise _unreadable(file, error) from error
