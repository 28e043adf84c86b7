"""The sandbox that chat templates run in. They are Jinja programs that were fetched with a tokenizer, and not trusted.

It is the one that Transformers runs them in, with the same functions and the block {% generation %}.
"""

import json
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


def compiled(source: str) -> Template:
    """A template that can be rendered; its variable `generation_marks` is a pair of strings. Raises Jinja's errors."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment.from_string(source)


class _Generation(Extension):
    """{% generation %}...{% endgeneration %}: the text inside, between the two `generation_marks` of the context."""

    tags = {"generation"}  # noqa: RUF012 (declared by the base class)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks = nodes.Name("generation_marks", "load")
        return nodes.CallBlock(self.call_method("_enclosed", [marks]), [], [], body).set_lineno(line)

    def _enclosed(self, marks: tuple[str, str], caller: Any) -> str:
        return f"{marks[0]}{caller()}{marks[1]}"


class _Dict:
    """dict for a template, without the attributes of a class."""

    def __call__(self, *args: Any, **values: Any) -> dict:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """namespace for a template, without names that begin with an underscore: those are Python's own."""

    def __init__(*args: Any, **values: Any):
        Namespace.__init__(*args, **values)
        for name in dict(*args[1:], **values):
            _refuse_private(name)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a template may not set {name!r}")


def _to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """JSON without the escapes for HTML of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise TemplateError(message)
