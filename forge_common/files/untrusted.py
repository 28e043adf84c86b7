"""Validates artifact files before use: regular files, no links, small JSON, fields of known types and ranges.

An artifact is checked when it is read. A process that changes its folder during the reading is not detected.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UserError

JSON_BYTES = 8 << 20  # of a file at most; enough for an index of 80,000 tensors; takes up to 200 MiB when parsed
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # device names on Windows, in every folder
Field = tuple[str, Callable[[Any], bool]]  # what the value must be: a description and a test


def is_plain(name: Any) -> bool:
    """Whether a module may have this name: a valid folder name everywhere; no option, path or pattern in a shell."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        return False
    return name[-1] != "." and not DEVICE.fullmatch(name) and name.lower() != "trunk"  # the name of the other candidate


def quoted(value: Any) -> str:
    """An untrusted value for a message: escaped, at most 200 characters."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def without_links(folder: Path) -> Path:
    """Returns `folder` if there is no link and no special file in it, so that nothing outside of it is read or copied.

    The links of the hub's cache are allowed: snapshots/REVISION/... -> blobs/DIGEST of the same repository.
    """
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                regular = entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False)
                if not regular and not _is_cached(folder, Path(entry.path)):
                    raise UserError(
                        f"{folder}: {entry.name!r} is a link or a special file. Replace it with a copy of the file, or "
                        "do not use this artifact."
                    )
    except OSError as reason:
        raise UserError(f"{folder} cannot be read as a folder ({reason.strerror}). Fetch it again.") from None
    return folder


def _is_cached(folder: Path, link: Path) -> bool:
    here = folder.resolve()
    target = link.resolve()
    for revision in (here, *here.parents):
        repository = revision.parent.parent
        if revision.parent.name == "snapshots" and repository.name.startswith("models--"):
            return target.parent == repository / "blobs" and target.is_file()
    return False


def read_bounded(path: Path, most: int = JSON_BYTES) -> bytes:
    """The bytes of a regular file of at most `most` bytes. A FIFO or a device is not opened: the reader could hang."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a regular file. Fetch or export it again.")
        with open(path, "rb") as file:
            content = file.read(most + 1)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist. Name a folder that holds it.") from None
    except OSError as reason:
        raise UserError(f"{path} cannot be read ({reason.strerror}). Fetch or export it again.") from None
    if len(content) > most:
        raise UserError(f"{path} is larger than {most >> 20} MiB, the limit for such a file. Export it again.")
    return content


def checked(
    content: dict[str, Any], place: Any, fields: dict[str, Field], required: Iterable[str] = ()
) -> dict[str, Any]:
    """Returns the content of a JSON file if the `required` fields are there and all known ones are valid; None is
    absent.
    """
    missing = [name for name in required if content.get(name) is None]
    if missing:
        raise UserError(f"{place} has no {', '.join(missing)}. Fetch or export it again.")
    for name, (description, is_valid) in fields.items():
        value = content.get(name)
        if value is not None and not is_valid(value):
            raise UserError(f"{place}: {name} is {quoted(value)}; it must be {description}. Fetch or export it again.")
    return content


def matches(value: Any, field: Field) -> bool:
    """Whether a value is what a field must be."""
    _, is_valid = field
    return is_valid(value)


def integer(least: int, most: int) -> Field:
    """An integer in these bounds; true and 1.0 are not integers."""
    return f"an integer from {least} to {most}", lambda value: type(value) is int and least <= value <= most


def number(least: float, most: float) -> Field:
    """A number in these bounds."""
    return f"a number from {least} to {most}", lambda value: type(value) in (int, float) and least <= value <= most


def one_of(*values: str) -> Field:
    return f"one of {', '.join(values)}", lambda value: isinstance(value, str) and value in values


def list_of(field: Field) -> Field:
    description, is_valid = field
    return f"a list, each {description}", lambda value: isinstance(value, list) and all(map(is_valid, value))


def dict_of(field: Field) -> Field:
    description, is_valid = field
    return (
        f"an object, each value {description}",
        lambda value: isinstance(value, dict) and all(map(is_valid, value.values())),
    )


BOOLEAN: Field = ("true or false", lambda value: isinstance(value, bool))
LINE: Field = (
    "a line of at most 200 printable characters",
    lambda value: isinstance(value, str) and len(value) <= 200 and value.isprintable(),
)
DIGEST: Field = (
    "a SHA-256 in 64 hexadecimal digits",
    lambda value: isinstance(value, str) and bool(re.fullmatch("[0-9a-f]{64}", value)),
)
PLAIN: Field = ("a plain name: at most 64 letters, digits and ._+-, not a device and not trunk", is_plain)
ANY: Field = ("anything", lambda value: True)


@contextmanager
def naming(place: Any) -> Iterator[None]:
    """Puts the place in front of a UserError that does not name it."""
    try:
        yield
    except UserError as reason:
        raise UserError(f"{place}: {reason}") from None


@contextmanager
def naming_source(source: Path, copy: Path) -> Iterator[None]:
    """Names the source, which the user can fix, in a UserError about its copy."""
    try:
        yield
    except UserError as reason:
        raise UserError(str(reason).replace(str(copy), str(source))) from None
