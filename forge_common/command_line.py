"""The words of a command line before tyro reads them: a file of settings, flags that do not exist, the groups of --help.

Imports nothing heavy.
"""

import ast
import contextlib
import dataclasses
import difflib
import inspect
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from .files.places import nearest
from .schedule import default_warmup

FLAG = re.compile(r"--(no-)?([A-Za-z][\w-]*)(=.*)?", re.DOTALL)
LENGTH = {"steps", "epochs", "budget"}  # of which a run has one
IN_ANY_COMMAND = ("help", "help_verbose")
EPILOG = """--config FILE.yaml reads settings from a file, such as the settings.json of a
run: flags go before the file, the file before the defaults. --print-config
prints all settings as such a file, --print-completion a program for bash and
zsh that completes flags."""
# What is sourced of each program adds to one table; the same function serves all. bash 4 or newer, or zsh with bashcompinit.
COMPLETION = """declare -gA _forge_flags
_forge_flags[{program}]="{flags}"
_forge() {{
  local word program="" current="${{COMP_WORDS[COMP_CWORD]}}"
  for word in "${{COMP_WORDS[@]:1:$((COMP_CWORD - 1))}}"; do
    word="${{word##*/}}"
    if [[ -n $word && -n ${{_forge_flags[$word]-}} ]]; then program="$word"; fi
  done
  COMPREPLY=()
  if [[ -n $program && $current == -* ]]; then COMPREPLY=($(compgen -W "${{_forge_flags[$program]}}" -- "$current")); fi
}}
complete -o default -F _forge python python3 accelerate
"""
# What other trainers call a setting -> its name here, or what there is instead.
OTHER_NAMES = {
    "learning_rate": "lr", "max_lr": "lr", "max_time": "budget", "num_epochs": "epochs", "num_train_epochs": "epochs", "max_epochs": "epochs",
    "max_steps": "steps", "max_iters": "steps", "num_steps": "steps", "train_steps": "steps", "total_steps": "steps",
    "train_batch_size": "batch_size", "global_batch_size": "batch_size", "device_batch_size": "micro_batch_size",
    "per_device_train_batch_size": "micro_batch_size", "block_size": "sequence_length", "seq_len": "sequence_length",
    "max_seq_len": "sequence_length", "max_seq_length": "sequence_length", "context_length": "sequence_length",
    "eval_steps": "val_every", "eval_interval": "val_every", "logging_steps": "log_every", "save_steps": "save_every",
    "save_total_limit": "keep", "lr_scheduler_type": "schedule", "lr_scheduler": "schedule", "adam_beta1": "beta1",
    "warmup_ratio": "warmup_steps", "warmup_iters": "warmup_steps",
    "adam_beta2": "beta2", "adam_epsilon": "eps", "grad_clip": "max_grad_norm", "optim": "optimizer", "report_to": "tracker",
    "wandb_project": "project", "resume_from_checkpoint": "resume", "train_file": "data", "dataset": "data",
    "dataset_name": "data", "n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
    "gradient_checkpointing": "activation_checkpointing", "model_name_or_path": "trunk_from", "out_dir": "output_dir",
    "gradient_accumulation_steps": "it follows from --batch-size / (--micro-batch-size x processes)",
    "bf16": "give --mixed_precision bf16 to accelerate launch", "fp16": "give --mixed_precision fp16 to accelerate launch",
    "mixed_precision": "give it to accelerate launch, before the script", "num_processes": "give it to accelerate launch, before the script",
}  # fmt: skip


def flag_of(name: str) -> str:
    """The flag of a setting: batch_size -> --batch-size."""
    return f"--{name.replace('_', '-')}"


class BadConfig(ValueError):
    """A file of settings that cannot be used; the message names it."""


class Expanded(NamedTuple):
    """A command line with the settings of --config FILE in it."""

    words: list[str]
    """Without --config itself. A flag that occurs twice has its last value, so flags go before the file."""
    file: Path | None
    notes: list[str]
    """What of the file may not be meant, since flags replace what it followed from."""


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
    """Whether the settings have the warm-up that a run of as many updates computes, and writes to its settings.json."""
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
    for key, _ in tree.value:  # safe_load keeps the last one
        line = key.start_mark.line + 1
        name = str(key.value).replace("-", "_")
        if name in lines:
            raise BadConfig(f"--config {file} has {key.value} twice, in lines {lines[name]} and {line}; leave one")
        lines[name] = line
    return {str(key).replace("-", "_"): value for key, value in content.items()}


def _words_of(content: dict[str, Any], file: Path, kind: type[Any], given: set[str]) -> list[str]:
    """The settings of `file` as words, without those that a flag replaces. BadConfig, naming all that are wrong."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    words: list[str] = []
    faults = []
    for name, value in content.items():
        if name not in fields:
            faults.append(f"--config {file} has {name}, which is no setting{_meant(name, kind)}")
            continue
        if name in given or (name in LENGTH and given & LENGTH) or value == _plain(fields[name].default):
            continue
        flag_word = flag_name(fields[name])
        flag = flag_of(flag_word or name)
        expected = _expected(fields[name].type, value)
        if expected:
            shown = value if isinstance(value, str) else json.dumps(value, default=str)
            faults.append(f"--config {file} has {name}: {shown[:80]}; it must be {expected}")
        elif isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif flag_word is None:
            words = [*map(str, value if isinstance(value, list) else [value]), *words]
        elif isinstance(value, list):
            words += [flag, *map(str, value)]
        else:
            words.append(f"{flag}={value}")
    if faults:
        raise BadConfig("\n  - ".join(faults))
    return words


def _expected(kind: Any, value: Any) -> str | None:
    """What a setting of this type takes, in words; None where `value`, as YAML has it, is of it."""
    options = get_args(kind)
    if get_origin(kind) is Annotated:
        return _expected(options[0], value)
    if type(None) in options:
        return None if value is None else _expected(options[0], value)
    if get_origin(kind) is Literal:
        return None if value in options else f"{', '.join(options[:-1])} or {options[-1]}"
    if get_origin(kind) is tuple:
        parts = value if isinstance(value, list) else [value]
        return "text, or a list of it" if any(_expected(str, part) for part in parts) else None
    if kind is bool:
        return None if isinstance(value, bool) else "true or false"
    if kind in (int, float):
        with contextlib.suppress(ValueError):
            kind(str(value))
            return None
        return "a whole number" if kind is int else "a number"
    return "text" if value is None or isinstance(value, (bool, list, dict)) else None


def _plain(default: Any) -> Any:
    """A default as YAML has it."""
    if isinstance(default, Path):
        return str(default)
    return list(default) if isinstance(default, tuple) else default


def given_settings(words: list[str]) -> set[str]:
    """The names of the settings whose flags are among the words, be they at their defaults."""
    return {match[2].replace("-", "_") for match in map(FLAG.fullmatch, words) if match}


def unknown_flags(words: list[str], kind: type[Any]) -> list[str]:
    """A line for each flag that does not exist, with the one that was probably meant."""
    fields = flag_types(kind)
    faults = []
    for word in words:
        match = FLAG.fullmatch(word)
        name = match[2].replace("-", "_") if match else ""
        if not match or name.startswith("tyro") or name in IN_ANY_COMMAND:
            continue
        if (name not in fields and f"no_{name}" not in fields) or (match[1] and fields.get(name) is not bool):
            faults.append(f"{word.partition('=')[0]} is no flag{_meant(name, kind)}")
    return faults


def flag_types(kind: type[Any]) -> dict[str, Any]:
    """Name of each flag -> type of its setting. tyro.conf.arg may give it another name; tyro.conf.Positional has no flag."""
    fields = dataclasses.fields(kind)
    return {name: field.type for field in fields if (name := flag_name(field)) is not None}


def flag_name(field: dataclasses.Field[Any]) -> str | None:
    """The name of a setting's flag; None of one whose words have no flag before them."""
    marks = getattr(field.type, "__metadata__", ())
    if "Positional" in map(str, marks):
        return None
    return next((mark.name for mark in marks if getattr(mark, "name", None)), field.name)


def program_name(path: Path) -> str:
    """train_shared.py or forge_common.NAME: the word of a command line that names the script or command at `path`."""
    return f"forge_common.{path.stem}" if path.parent.name == "forge_common" else path.name


def completion(path: Path, kind: type[Any]) -> str:
    """A program to source in bash or zsh that completes the flags of the script or command at `path`; other words are files."""
    program = program_name(path)
    flags = ["--help", "--config", "--print-config"]
    on = {field.name for field in dataclasses.fields(kind) if field.default is True}
    flags += [f"--no-{name}" if name in on else f"--{name}" for name in flag_types(kind)]
    return COMPLETION.format(program=program, flags=" ".join(flags).replace("_", "-"))


def _meant(name: str, kind: type[Any]) -> str:
    names = list(flag_types(kind))
    other = OTHER_NAMES.get(name, "")
    if " " in other:
        return f": {other}"
    if other == "trunk_from" and "trunk" in names:
        other = "trunk"
    near = [other] if other in names else difflib.get_close_matches(name, names, 1)
    return f"; did you mean {flag_of(near[0])}?" if near else ""


@contextlib.contextmanager
def grouped_help(words: list[str], kind: type[Any]) -> Iterator[None]:
    """Prints tyro's --help, which is one list, in the groups of the headings `# -- name --` in the source of the settings."""
    if not {"-h", "--help"} & set(words):
        yield
        return
    console = sys.stdout
    sys.stdout = printed = io.TextIOWrapper(io.BytesIO(), encoding=console.encoding)  # tyro draws what it can print
    try:
        yield
    finally:
        sys.stdout = console
        printed.seek(0)
        print(f"{_in_groups(printed.read(), groups(kind))}\n{EPILOG}")


def groups(kind: type[Any]) -> dict[str, str]:
    """Setting -> heading above it in the source, the settings of the class itself first, then those that it inherits."""
    found: dict[str, str] = {}
    for part in kind.__mro__:
        if not dataclasses.is_dataclass(part):
            continue
        heading = "options"
        try:
            source = inspect.getsource(part).splitlines()
        except (OSError, TypeError):  # there is no file: its settings stay in one list
            continue
        fields = {
            node.lineno: node.target.id
            for node in ast.walk(ast.parse("\n".join(source)))
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        }
        for number, line in enumerate(source, 1):
            if match := re.fullmatch(r" +# -- (.+) --", line):
                heading = match[1]
            if number in fields:
                found.setdefault(fields[number], heading)
    return found


def _in_groups(text: str, headings: dict[str, str]) -> str:
    """tyro's help with one box a group: a row that begins with a flag begins an entry."""
    lines = text.rstrip("\n").split("\n")
    top = next((i for i, line in enumerate(lines) if line.startswith("╭─ options")), None)
    if top is None:
        return text
    width = len(lines[top])
    boxes: dict[str, list[str]] = {heading: [] for heading in ["options", *headings.values()]}
    box = boxes["options"]
    end = next(i for i in range(top, len(lines)) if lines[i].startswith("╰"))
    for line in lines[top + 1 : end]:
        if match := re.match(r"│ --([\w-]+)", line):
            box = boxes[headings.get(match[1].replace("-", "_"), "options")]
        box.append(line)
    printed = lines[:top]
    for heading, rows in boxes.items():
        if rows:
            printed += [f"╭─ {heading} ".ljust(width - 1, "─") + "╮", *rows, lines[end]]
    return "\n".join([*printed, *lines[end + 1 :], ""])
