"""What an artifact's files must be before anything in them is believed: plain files, small JSON, fields of known kinds.

An artifact is checked when it is read. Who can write into its folder while it is being read is not kept out.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UserError

JSON_BYTES = 8 << 20  # of a file; an index of 80,000 tensors, which becomes 200 MiB at the very worst
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # no files on Windows, wherever they stand
Field = tuple[str, Callable[[Any], bool]]  # what the value must be, in words and as a test


def is_plain(name: Any) -> bool:
    """Whether a module may be called that: a folder's name on every system, and no option, path or pattern in a shell."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        return False
    return name[-1] != "." and not DEVICE.fullmatch(name) and name.lower() != "trunk"  # which is the other candidate


def shown(value: Any) -> str:
    """A stranger's value for a message: escaped, and not at any length."""
    told = repr(value)
    return told if len(told) <= 200 else f"{told[:200]}..."


def closed(folder: Path) -> Path:
    """`folder`, if no link and no special file lies in it: what is read or copied from it, it holds itself.

    The links of the hub's cache are let pass: snapshots/REVISION/... -> blobs/DIGEST of the same repository.
    """
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                plain = entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False)
                if not plain and not _is_cached(folder, Path(entry.path)):
                    raise UserError(
                        f"{folder}: {entry.name!r} is a link or a special file. Put a copy of the file in its place, or do "
                        "not use this artifact."
                    )
    except OSError as reason:
        raise UserError(f"{folder} cannot be read as a folder ({reason.strerror}). Fetch it again.") from None
    return folder


def _is_cached(folder: Path, link: Path) -> bool:
    here, target = folder.resolve(), link.resolve()
    for revision in (here, *here.parents):
        repository = revision.parent.parent
        if revision.parent.name == "snapshots" and repository.name.startswith("models--"):
            return target.parent == repository / "blobs" and target.is_file()
    return False


def read_bounded(path: Path, most: int = JSON_BYTES) -> bytes:
    """The bytes of a regular file of at most `most` bytes; a FIFO or a device, which could hang the reader, is not opened."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is no regular file. Fetch or export it again.")
        with open(path, "rb") as file:
            content = file.read(most + 1)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist. Name a folder that holds it.") from None
    except OSError as reason:
        raise UserError(f"{path} cannot be read ({reason.strerror}). Fetch or export it again.") from None
    if len(content) > most:
        raise UserError(f"{path} is larger than the {most >> 20} MiB that are read of such a file. Export it again.")
    return content


def checked(facts: dict[str, Any], place: Any, fields: dict[str, Field], needed: Iterable[str] = ()) -> dict[str, Any]:
    """`facts` of a JSON file, if the `needed` fields are there and all known ones hold what they must; None is absent."""
    missing = [name for name in needed if facts.get(name) is None]
    if missing:
        raise UserError(f"{place} does not say {', '.join(missing)}. Fetch or export it again.")
    for name, (told, holds) in fields.items():
        value = facts.get(name)
        if value is not None and not holds(value):
            raise UserError(f"{place}: {name} is {shown(value)}; it must be {told}. Fetch or export it again.")
    return facts


def whole(least: int, most: int) -> Field:
    """A whole number of these bounds; JSON's true and 1.0 are none."""
    return f"a whole number from {least} to {most}", lambda value: type(value) is int and least <= value <= most


def number(least: float, most: float) -> Field:
    """A number of these bounds."""
    return f"a number from {least} to {most}", lambda value: type(value) in (int, float) and least <= value <= most


def one_of(*values: str) -> Field:
    return f"one of {', '.join(values)}", lambda value: isinstance(value, str) and value in values


def list_of(field: Field) -> Field:
    told, holds = field
    return f"a list, each {told}", lambda value: isinstance(value, list) and all(map(holds, value))


def dict_of(field: Field) -> Field:
    told, holds = field
    return f"an object, each value {told}", lambda value: isinstance(value, dict) and all(map(holds, value.values()))


FLAG: Field = ("true or false", lambda value: isinstance(value, bool))
LINE: Field = (
    "a line of at most 200 printable characters",
    lambda value: isinstance(value, str) and len(value) <= 200 and value.isprintable(),
)
DIGEST: Field = (
    "a SHA-256 in 64 hexadecimal digits",
    lambda value: isinstance(value, str) and bool(re.fullmatch("[0-9a-f]{64}", value)),
)
PLAIN: Field = ("a plain name: at most 64 letters, digits and ._+-, no device's and not trunk", is_plain)
ANY: Field = ("anything", lambda value: True)


@contextmanager
def naming(place: Any) -> Iterator[None]:
    """Puts the place in front of a refusal that does not know it."""
    try:
        yield
    except UserError as reason:
        raise UserError(f"{place}: {reason}") from None


@contextmanager
def naming_source(source: Path, copy: Path) -> Iterator[None]:
    """Names the source, which the user can fix, in a refusal about a copy of it."""
    try:
        yield
    except UserError as reason:
        raise UserError(str(reason).replace(str(copy), str(source))) from None
