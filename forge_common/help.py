"""What --help and --print-completion print: the settings in groups, and a program that completes flags in a shell.

Imports nothing heavy.
"""

import ast
import contextlib
import dataclasses
import inspect
import io
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .flags import flag_types, switch_of

EPILOG = """--config FILE.yaml reads settings from a file, such as the settings.json of a
run: flags go before the file, the file before the defaults. --print-config
prints all settings as such a file, --print-completion a program for bash and
zsh that completes flags."""
# What is sourced of each program adds to one table; the same function serves all. bash 4 or newer, or zsh with
# bashcompinit.
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


def program_name(path: Path) -> str:
    """train_shared.py or forge_common.NAME: the word of a command line that names the script or command at `path`."""
    return f"forge_common.{path.stem}" if path.parent.name == "forge_common" else path.name


def completion(program: str, kind: type[Any]) -> str:
    """Shell code to source in bash or zsh, which completes the flags of `program`, and other words as files."""
    flags = ["--help", "--config", "--print-config"]
    on = {field.name for field in dataclasses.fields(kind) if field.default is True}
    flags += [switch_of(name, name not in on) for name in flag_types(kind)]
    return COMPLETION.format(program=program, flags=" ".join(flags))


@contextlib.contextmanager
def grouped_help(words: list[str], kind: type[Any]) -> Iterator[None]:
    """Prints tyro's --help, which is one list, in groups: the headings `# -- name --` in the settings' source."""
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
        if hasattr(signal, "SIGPIPE"):
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` ends without a traceback
        print(f"{_in_groups(printed.read(), groups(kind))}\n{EPILOG}")


def groups(kind: type[Any]) -> dict[str, str]:
    """Setting -> heading above it in the source: the settings of the class itself, then those that it inherits."""
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
