"""--config FILE: settings from a YAML or JSON file, as words of the command line. Imports nothing heavy."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from .files.places import nearest
from .files.untrusted import BOOLEAN, Field
from .flags import flag_name, flag_of, given_settings, meant, switch_of
from .schedule import default_warmup
from .settings import json_value

LENGTH = {"steps", "epochs", "budget"}  # of which a run has one


class BadConfig(ValueError):
    """A file of settings that cannot be used; the message names it."""


class Expanded(NamedTuple):
    """A command line with the settings of --config FILE in it."""

    words: list[str]
    """Without --config itself. Of a flag that is there twice the last value counts, so those of the file are first."""
    file: Path | None
    notes: list[str]
    """Settings of the file that followed from others, where flags replace those others."""


def expanded(words: list[str], kind: type[Any]) -> Expanded:
    """The command line with the words of --config FILE. BadConfig where the file is wrong.

    What the file has at its default is left out.
    """
    rest: list[str] = []
    file = None
    waiting = iter(words)
    for word in waiting:
        name, _, value = word.partition("=")
        if name != "--config":
            rest.append(word)
            continue
        value = value or next(waiting, "")
        if not value or file is not None:
            raise BadConfig("--config: name one file of settings")
        file = Path(value)
    if file is None:
        return Expanded(rest, None, [])
    given = given_settings(rest)
    content = _content_of(file)
    notes = []
    if given & LENGTH and "warmup_steps" not in given and _has_default_warmup(content):
        warmup = content.pop("warmup_steps")
        notes.append(f"its --warmup-steps {warmup} followed from its steps and follows from the new length")
    if "data" in given and "val_fraction" not in given and content.get("val_fraction") is not None:
        notes.append(f"its --val-fraction {content['val_fraction']} stays, and may have followed from its text")
    return Expanded([*_words_of(content, file, kind, given), *rest], file, notes)


def _has_default_warmup(content: dict[str, Any]) -> bool:
    """Whether the warm-up is the one that a run of as many steps computes, and writes to its settings.json."""
    steps = content.get("steps")
    return isinstance(steps, int) and steps > 0 and content.get("warmup_steps") == default_warmup(steps)


def _content_of(file: Path) -> dict[str, Any]:
    """The file's settings by their names. BadConfig where it cannot be read, or has one twice."""
    import yaml

    try:
        if not file.exists():
            raise BadConfig(f"--config {file} is not there{nearest(str(file))}")
        text = file.read_text(encoding="utf-8")
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadConfig(f"--config {file} cannot be read as YAML or JSON ({error})") from None
    if not isinstance(content, dict) or not isinstance(tree, yaml.MappingNode):
        raise BadConfig(f"--config {file} has no settings; write one a line, such as steps: 1000")
    lines: dict[str, int] = {}
    for key, _ in tree.value:  # safe_load would take the last of two
        line = key.start_mark.line + 1
        name = str(key.value).replace("-", "_")
        if name in lines:
            raise BadConfig(f"--config {file} has {key.value} twice, in lines {lines[name]} and {line}; leave one")
        lines[name] = line
    return {str(key).replace("-", "_"): value for key, value in content.items()}


def _words_of(content: dict[str, Any], file: Path, kind: type[Any], given: set[str]) -> list[str]:
    """The settings of `file` as words, without those that a flag replaces. BadConfig, naming all that are wrong."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    types = get_type_hints(kind)
    positional: list[str] = []
    words: list[str] = []
    faults = []
    for name, value in content.items():
        if name not in fields:
            faults.append(f"--config {file} has {name}, which is no setting{meant(name, kind)}")
            continue
        is_replaced = name in given or (name in LENGTH and given & LENGTH)
        if is_replaced or value == json_value(fields[name].default):
            continue
        description, is_valid = _field_of(types[name])
        flag = flag_name(fields[name])
        if not is_valid(value):
            shown = value if isinstance(value, str) else json.dumps(value, default=str)
            faults.append(f"--config {file} has {name}: {shown[:80]}; it must be {description}")
        elif flag is None:
            positional = [str(part) for part in (value if isinstance(value, list) else [value])]
        elif isinstance(value, bool):
            words.append(switch_of(flag, value))
        elif isinstance(value, list):
            words += [flag_of(flag), *map(str, value)]
        else:
            words.append(f"{flag_of(flag)}={value}")
    if faults:
        raise BadConfig("\n  - ".join(faults))
    return [*positional, *words]


def _field_of(kind: Any) -> Field:
    """What the value of a setting of this type must be, as YAML has it."""
    options = get_args(kind)
    if get_origin(kind) is Literal:
        *others, last = options
        return f"{', '.join(others)} or {last}" if others else last, lambda value: value in options
    if get_origin(kind) is tuple:
        return "text, or a list of it", lambda value: all(map(_is_text, value if isinstance(value, list) else [value]))
    if options:  # KIND | None
        description, is_valid = _field_of(options[0])
        return description, lambda value: value is None or is_valid(value)
    if kind is bool:
        return BOOLEAN
    if kind is int:
        return "a whole number", _is_read_by(int)
    if kind is float:
        return "a number", _is_read_by(float)
    return "text", _is_text


def _is_text(value: Any) -> bool:
    """Whether tyro reads the value as text: also a number, such as the name 2024."""
    return value is not None and not isinstance(value, (bool, list, dict))


def _is_read_by(kind: type[int] | type[float]) -> Callable[[Any], bool]:
    """A test of whether a value is a number of this kind. YAML has 1e-3 as text."""

    def is_valid(value: Any) -> bool:
        try:
            kind(str(value))
        except ValueError:
            return False
        return True

    return is_valid
