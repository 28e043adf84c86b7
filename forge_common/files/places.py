"""The files of an artifact, and the files, folders and sources that a command line names: whether they exist, the
nearest name that does.
"""

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from ..errors import UserError

TRUNK_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
TRUNK_FILES += ("special_tokens_map.json", "chat_template.jinja", "forge.json", "statistics.safetensors", "README.md")
WEIGHT_FILES = ("model.safetensors.index.json", "model*.safetensors")  # of a trunk; the second is a pattern
MODULE_FILES = ("module.json", "module.safetensors", "statistics.safetensors", "README.md")
ASSEMBLED_FILES = ("assembled.json", "README.md", "statistics.safetensors")  # beside the folders trunk and modules
EXPORT_FILES = (
    "model.safetensors",
    "model.gguf",
    "adapter_config.json",
    "adapter_model.safetensors",
    "configuration_forge.py",
)
EXPORT_FILES += ("layers_forge.py", "modeling_forge.py", "router_forge.py")  # and those of a trunk
LOCAL_CORPORA = ("local:python", "local:cpp", "local:docs", "local:perl")  # forge_common/data/local.py reads them
HUB_ID = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?:@([\w][\w./-]*))?")
WEIGHT = re.compile(r"(.+)@([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)", re.DOTALL)


def split_weight(source: str) -> tuple[str, str | None]:
    """'SPEC@0.7' as spec and weight: '@' counts only before a number at the end, and not if a path of the whole name
    exists.
    """
    match = WEIGHT.fullmatch(source)
    return (source, None) if match is None or os.path.lexists(source) else (match[1], match[2])


def missing_source(source: str) -> str | None:
    """What is wrong with a source of text that names a file, a folder or a local: corpus which does not exist; None for
    globs, URLs and hf:.
    """
    spec = split_weight(source)[0]
    if spec.startswith("local:"):
        return None if spec in LOCAL_CORPORA else f"{spec}: no such corpus; there are {', '.join(LOCAL_CORPORA)}"
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", spec) or re.search(r"[*?[]", spec):
        return None
    return missing_file(spec)


def unused_weight(source: str) -> str | None:
    """What is wrong with a source of which all text is read, and that has a weight, as those of a mixture have."""
    weight = split_weight(source)[1]
    return weight and f"{source}: a weight has no effect here; leave out @{weight}"


def check_mixture(flag: str, sources: Iterable[str]) -> None:
    """UserError where one of the sources is not there, or some have a weight and others have none."""
    weights = []
    for source in sources:
        problem = missing_source(source)
        if problem:
            raise UserError(f"{flag} {problem}")
        weights.append(split_weight(source)[1])
    if any(weights) and not all(weights):
        raise UserError(f"{flag}: only some sources have a weight. Give every source a weight (SOURCE@0.7), or none.")


def missing_file(place: str) -> str | None:
    """What is wrong with a file or folder that does not exist."""
    try:
        return (
            None if os.path.lexists(os.path.expanduser(place)) else f"{place}: no such file or folder{nearest(place)}"
        )
    except ValueError:  # a NUL in it
        return f"{place!r} is no path"


def missing_artifact(place: str) -> str | None:
    """What is wrong with a trunk or module that is neither a folder nor may be a hub id (ORG/NAME[@REVISION], where ORG
    is no folder here).
    """
    path = Path(place).expanduser()
    if path.exists() or hub_id(place):
        return None
    return f"{place} is not there{nearest(place)}"


def check_artifacts(named: Iterable[tuple[str, str | Path | None]]) -> None:
    """UserError for the first (flag, trunk or module) that is not there and cannot be a hub id.

    Called before torch is imported.
    """
    for flag, place in named:
        problem = missing_artifact(str(place)) if place else None
        if problem:
            raise UserError(f"{flag} {problem}")


def check_output(flag: str, path: Path | None) -> None:
    """Makes the folder of a file that a command will write, so that hours of work are not lost for the lack of it.

    UserError where there can be no such file.
    """
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{flag} {path} is a folder. Name a file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as reason:
        raise UserError(f"{flag} {path} cannot be written ({reason.strerror}). Name another place.") from None


def check_outside(output: Path, parts: Iterable[Path]) -> None:
    """UserError where --output-dir lies in a folder of a trunk, a module or a model that is read."""
    for part in parts:
        if part.is_dir() and output.resolve().is_relative_to(part.resolve()):
            raise UserError(f"--output-dir {output} lies in {part}, which is read. Name a folder outside of it.")


def hub_id(place: str) -> tuple[str, str | None] | None:
    """(ORG/NAME, REVISION or None) of a name that is no folder and has the form of a hub id; None if ORG is a folder
    here.
    """
    match = HUB_ID.fullmatch(place)
    return None if match is None or Path(place.partition("/")[0]).is_dir() else (match[1], match[2])


def nearest(place: str) -> str:
    """'; did you mean X?' for the path that exists and is closest to `place` in its first part that does not; or ''."""
    first = Path(place).expanduser()
    rest: list[str] = []
    while not first.parent.exists():
        rest.insert(0, first.name)
        first = first.parent
    try:
        near = difflib.get_close_matches(first.name, os.listdir(first.parent), 1)
    except OSError:
        return ""
    found = [first.with_name(name) for name in near]
    found = [path.joinpath(*rest) if path.joinpath(*rest).exists() else path for path in found]
    return f"; did you mean {found[0]}?" if found else ""


def published(place: Path, kind: str) -> Path:
    """The folder of a trunk or a module (`kind`): PLACE/trunk or PLACE/module where `place` is the output directory of
    a run, else `place`.

    Also `place` for an assembled model: the trunk in it is only a part of it.
    """
    file = {"trunk": "config.json", "module": "module.json"}[kind]
    if (place / file).exists() or (place / "assembled.json").exists():
        return place
    return place / kind if (place / kind / file).is_file() else place
