"""The table of modules that `assemble` prints: what they claim beside what was checked, the warnings, the licences.

V vocabulary
"""

import math
import textwrap
from collections.abc import Mapping

import torch

from .checks import (
    CheckedModule,
    as_number,
    claimed_losses,
    copy_warnings,
    loss_warnings,
    statistics_warnings,
    weight_warnings,
)

COLUMNS = 100


def table(modules: list[CheckedModule], trunk_counts: torch.Tensor | None, licences: Mapping[str, str]) -> str:
    """A row for each module, the warnings, and the licences of all parts, at most COLUMNS wide.

    licences: those that are stated, by the part's name.
    """
    warnings = [
        [
            *weight_warnings(module),
            *statistics_warnings(module.metadata, module.counts),
            *copied,
            *loss_warnings(module),
        ]
        for module, copied in zip(modules, copy_warnings(modules, trunk_counts), strict=True)
    ]
    rows = [
        ("", "", "", "", "claimed", "claimed", "checked", "checked", ""),
        ("module", "kind", "layers", "size", "seen", "loss", "loss", "result", "licence"),
    ]
    for module, own_warnings in zip(modules, warnings, strict=True):
        row = (
            module.name,
            module.metadata["kind"],
            _layers(module.metadata["layers"]),
            _short(module.parameters),
            _short(as_number(module.metadata.get("tokens_seen"))),
            _losses(*claimed_losses(module.metadata)),
            _losses(*(module.measured or (None, None))),
            ", ".join(warning.keyword for warning in own_warnings) or "ok",
            licences.get(module.name, "-"),
        )
        rows.append(row)
    limits = (11, 11, 6, 6, 7, 12, 12, 9, 10)  # with two spaces between them, COLUMNS
    widths = [min(limit, max(len(row[i]) for row in rows)) for i, limit in enumerate(limits)]
    lines = ["  ".join(_cell(text, width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for module, own_warnings in zip(modules, warnings, strict=True):
        lines += [_wrap(f"warning     {module.name}: {warning.sentence}.") for warning in own_warnings]
    return "\n".join([*lines, _wrap(licence_line(["trunk", *(module.name for module in modules)], licences))])


def licence_line(names: list[str], licences: Mapping[str, str]) -> str:
    """Whether all parts state the same licence. Whether different ones may be combined is not decided."""
    users: dict[str, list[str]] = {}
    for name in names:
        users.setdefault(licences.get(name, "").strip().casefold(), []).append(name)
    missing = users.pop("", [])
    if len(users) == 1 and not missing:
        return f"licences    all parts: {licences[names[0]]}"
    groups = [f"{licences[parts[0]]} ({', '.join(parts)})" for parts in users.values()]
    groups += [f"not stated ({', '.join(missing)})"] if missing else []
    return f"licences    {'; '.join(groups)}. Check that they may be combined."


def _layers(layers: list[int]) -> str:
    """0-3, or the number of layers where some between the first and the last are left out."""
    if layers[-1] - layers[0] >= len(layers):
        return f"{len(layers)}"
    return f"{layers[0]}" if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"


def _losses(before: float | None, after: float | None) -> str:
    if after is None:
        return "-"
    shown_before = "-" if before is None else f"{before:.2f}"
    return f"{shown_before} -> {after:.2f}"


def _short(number: float | None) -> str:
    """1234567 -> 1.2M."""
    if number is None:
        return "-"
    power = min(int(math.log10(max(number, 1)) / 3), 4)
    return f"{number / 1000**power:.1f}{'KMGT'[power - 1]}" if power else f"{number:.0f}"


def _cell(text: str, width: int) -> str:
    return f"{text if len(text) <= width else text[: width - 3] + '...':<{width}}"


def _wrap(line: str) -> str:
    return textwrap.fill(line, COLUMNS, subsequent_indent=" " * 12, break_on_hyphens=False)
