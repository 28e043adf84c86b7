"""From a SOURCE to its documents: a file, folder or glob (local or a URL), hf:ID[:CONFIG[:SPLIT]] or local:NAME."""

import glob
import math
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files.places import nearest, split_weight
from . import local
from .readers import records, tables, text
from .readers.document import Document, Reading
from .readers.files import File, filesystem, is_url, suffixes, unreadable

READERS = {
    ".jsonl": records.documents,
    ".json": records.documents,
    ".csv": records.documents,
    ".parquet": tables.documents,
    ".arrow": tables.documents,
}
# In a folder, files of these suffixes are read as text without a look at their content: their faults are reported.
TEXT_SUFFIXES = {".txt", ".text", ".md", ".rst", ".tex", ".html", ".xml", ".py", ".c", ".h", ".cc", ".cpp", ".js"}
WEIGHTS = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".safetensors", ".gguf", ".ckpt", ".npy", ".npz", ".onnx", ".h5"}
ARCHIVES = {".zip", ".tar", ".tgz", ".7z"}
REMOTE_VERSION = ("size", "etag", "mtime", "modified", "created", "generation", "md5", "checksum", "blob_id", "sha")


def parse(source: str) -> tuple[str, float | None]:
    """Split 'SPEC@0.7' into the spec and its weight (None without one).

    '@' counts only before a number at the end, and not if a path of the whole name exists. UserError when the
    weight is not a positive number.
    """
    spec, number = split_weight(source)
    if number is None:
        return spec, None
    weight = float(number)
    if not 0 < weight < math.inf:
        raise UserError(f"{source}: the weight {number} is not greater than 0. Write a positive number after '@'.")
    return spec, weight


def files_of(spec: str) -> list[File]:
    """The files of a file, folder (all text and table files below it, hidden ones left out) or glob, sorted.

    UserError when there are none, or when one is named that cannot hold text: weights, archives, compressed tables.
    """
    if not spec.strip():
        raise UserError("a source is empty. Name a file, folder, glob, hf:ID or local:NAME.")
    files = _remote_files(spec) if is_url(spec) else _local_files(spec)
    for file in files:
        suffix, compression = suffixes(file)
        if suffix in WEIGHTS:
            raise UserError(f"{file}: holds weights or pickles, not text, and is not opened. Name text files.")
        if suffix in ARCHIVES:
            raise UserError(f"{file}: an archive of files. Unpack it, and name the files that were in it.")
        if compression and READERS.get(suffix) is tables.documents:
            raise UserError(f"{file}: a compressed {suffix} file cannot be read. Decompress it, and name the result.")
    return files


def _remote_files(url: str) -> list[File]:
    """The file of a URL, or the files of a folder or glob, as fsspec lists them."""
    system, path = filesystem(url)
    try:
        system.invalidate_cache()
        if not system.exists(path):
            found = [name for name in system.glob(path) if system.isfile(name)]
        elif system.info(path)["type"] == "directory":
            found = [name for name in system.find(path) if _has_text_suffix(name) and "/." not in name]
        else:
            return [url]
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{url}: cannot be listed ({reason}). Check the URL, the network and your rights.") from error
    if not found:
        raise UserError(f"{url}: no such file, and no text below it or that matches it. Name a file, folder or glob.")
    return sorted(system.unstrip_protocol(name) for name in found)


def _local_files(spec: str) -> list[File]:
    path = Path(spec).expanduser()
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass  # it may be a glob
    except (OSError, ValueError) as error:  # no permission, a link to itself, a name too long, a NUL in it
        raise unreadable(Path(spec), error) from error
    if path.is_dir():
        files = _files_below(path)
        if not files:
            raise UserError(
                f"{spec}: no text in this folder (hidden files are not read). Name a folder that holds text."
            )
        return files
    matches = [path] if os.path.lexists(path) else sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    files: list[File] = [name for name in matches if not name.is_dir()]  # a glob's folders are not read
    if not files:
        reason = "it matches folders only" if matches else "no such file, and as a glob it matches nothing"
        raise UserError(f"{spec}: {reason}{nearest(spec) or '.'} Name a file, folder, glob, hf:ID or local:NAME.")
    for name in matches:
        if not name.is_dir():
            _check_regular(name)
    return files


def _check_regular(file: Path) -> None:
    """UserError for a file that cannot be read to its end: a pipe, a device, a socket, a link to nothing."""
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):
            raise UserError(f"{file}: not a regular file. Name a file, folder, glob, hf:ID or local:NAME.")
    except OSError as error:
        raise unreadable(file, error) from error


def _files_below(folder: Path) -> list[File]:
    """The files to read below a folder. UserError for links to folders and what cannot be read: nothing is left out silently."""

    def refuse(error: OSError) -> None:
        raise unreadable(Path(error.filename), error) from error

    files: list[Path] = []
    for here, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            if Path(here, name).is_symlink():
                raise UserError(f"{Path(here, name)}: a link to a folder is not followed. Name the folder as a source.")
        files += [Path(here, name) for name in names if not name.startswith(".")]
    return [file for file in sorted(files) if _is_text(file)]


def _is_text(file: Path) -> bool:
    """Whether a file of a folder is read: by its suffix, else by its first bytes."""
    if _has_text_suffix(file):
        _check_regular(file)
        return True
    suffix, compression = suffixes(file)
    if suffix in WEIGHTS or suffix in ARCHIVES or compression or not file.is_file():
        return False
    try:
        with open(file, "rb") as stream:
            head = stream.read(4096)
    except OSError as error:
        raise unreadable(file, error) from error
    try:
        head.decode()
    except UnicodeDecodeError as error:
        # Byte 4096 may be in the middle of a character: only an error before the last character means a binary file.
        return error.start >= 4093 and b"\0" not in head
    return b"\0" not in head


def _is_hub(spec: str) -> bool:
    return spec.startswith("hf:") and not is_url(spec)


def _has_text_suffix(file: File) -> bool:
    suffix, compression = suffixes(file)
    return suffix in TEXT_SUFFIXES or (suffix in READERS and not (compression and READERS[suffix] is tables.documents))


def facts(spec: str) -> dict[str, Any]:
    """What changes when a source changes, without reading it.

    Local files: size in bytes and mtime in ns. Remote files: what the server says of size, ETag, time or checksum.
    hf:ID: the commit. local:NAME: the versions of the packages.
    """
    if _is_hub(spec):
        return {"hub": spec, "commit": tables.hub_commit(spec)}
    if spec.startswith("local:"):
        return {"local": spec, "versions": local.versions(spec.removeprefix("local:"))}
    return {"files": [_version(file) for file in files_of(spec)]}


def _version(file: File) -> list[Any]:
    try:
        if isinstance(file, Path):
            stat = file.stat()
            return [str(file.absolute()), stat.st_size, stat.st_mtime_ns]
        system, path = filesystem(file)
        info = system.info(path)
    except Exception as error:
        raise unreadable(file, error) from error
    return [file, {key: str(info[key]) for key in sorted(info) if any(part in key.lower() for part in REMOTE_VERSION)}]


def read(spec: str, reading: Reading, counts: Counter | None = None) -> Iterator[Document]:
    """Read a source (without its weight) as documents, in a fixed order, in bounded memory.

    `counts` receives skipped_empty, skipped_bad_text, replaced_bad_text, skipped_bad_line (documents or rows),
    skipped_empty_file and skipped_bad_file. UserError, with file, line and how to fix it, for what cannot be read.
    """
    counts = Counter() if counts is None else counts
    if _is_hub(spec):
        yield from tables.hub_documents(spec, reading, counts)
    elif spec.startswith("local:"):
        yield from local.documents(spec.removeprefix("local:"))
    else:
        files = files_of(spec)
        for file in files:
            try:
                if not isinstance(file, Path) or file.stat().st_size:
                    yield from READERS.get(suffixes(file)[0], text.documents)(file, reading, counts)
                elif len(files) == 1:
                    raise UserError(f"{file}: the file is empty. Name one that holds text.")
                else:
                    counts["skipped_empty_file"] += 1
            except OSError as error:  # it was deleted, or the disk failed
                raise unreadable(file, error) from error
