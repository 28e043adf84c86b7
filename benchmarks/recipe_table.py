"""The rows of a comparison -> a table in Markdown, and the rows of its picture."""

from collections.abc import Callable
from statistics import fmean
from typing import Any

SPLICED = "spliced"
SHOWN = (  # of the picture
    "trunk",
    "best module by label",
    "assembled",
    "assembled, top-1",
    "union",
    "FlexOlmo's recipe",
    "output ensemble of whole models",
    "one dense model from scratch",
)
Rows = list[dict[str, Any]]


def report(seeds: list[Rows]) -> tuple[str, Rows]:
    """The Markdown table over all seeds, and what the picture shows: rows with model, domain, loss and stderr."""
    domains = [domain for domain in dict.fromkeys(row["domain"] for row in seeds[0]) if domain != SPLICED]
    seeds = [[*rows, *_best_by_label(rows, domains)] for rows in seeds]
    at = [{(row["model"], row["domain"]): row for row in rows if row["part"] == "test"} for rows in seeds]
    names = list(dict.fromkeys(model for found in at for model, _ in found))
    names = [
        name for name in names if not (name.startswith("module ") and name.endswith(")"))
    ]  # single ones of the kinds
    names.sort(key=_order)
    lines = [
        f"| recipe | {' | '.join(domains)} | macro, mean ± s.e. | each seed | {SPLICED} | way to the best by label | to the union |",
        "| --- " * (len(domains) + 6) + "|",
    ]
    for name in names:
        here = [found for found in at if (name, domains[0]) in found or (name, SPLICED) in found]
        whole = all((name, domain) in found for found in here for domain in domains)
        losses = [fmean(found[name, d]["loss"] for found in here) for d in domains] if whole else []
        macros = [fmean(found[name, d]["loss"] for d in domains) for found in here] if whole else []
        errors = (
            [sum(found[name, d]["stderr"] ** 2 for d in domains) ** 0.5 / len(domains) for found in here]
            if whole
            else []
        )
        suffix = " (short)" if name.endswith(" (short)") else ""
        mixed = [found[name, SPLICED]["loss"] for found in here if (name, SPLICED) in found]
        cells = [f"{loss:.3f}" for loss in losses] or ["" for _ in domains]
        cells += [f"**{fmean(macros):.3f}** ± {fmean(errors):.3f}" if whole else ""]
        cells += [", ".join(f"{value:.3f}" for value in macros)]
        cells += [f"{fmean(mixed):.3f}" if mixed else ""]
        for goal in ("best module by label", "union"):
            ways = [way(found, name, goal + suffix, "trunk" + suffix, domains) for found in here] if whole else []
            known = [value for value in ways if value is not None]
            cells.append(f"{fmean(known):.0%}" if known else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    shown = [
        {
            "model": name,
            "domain": domain,
            "loss": fmean(found[name, domain]["loss"] for found in at if (name, domain) in found),
            "stderr": fmean(found[name, domain]["stderr"] for found in at if (name, domain) in found),
        }
        for name in SHOWN
        for domain in [*domains, SPLICED]
        if any((name, domain) in found for found in at)
    ]
    return "\n".join(lines) + "\n", shown


def way(found: dict[tuple[str, str], Any], name: str, goal: str, trunk: str, domains: list[str]) -> float | None:
    """How far from the trunk (0) to a goal (1) a model's macro-average lies."""
    if any((model, domains[0]) not in found for model in (name, goal, trunk)):
        return None
    ours, end, start = (fmean(found[model, d]["loss"] for d in domains) for model in (name, goal, trunk))
    return (start - ours) / (start - end)


def _best_by_label(rows: Rows, domains: list[str]) -> Rows:
    """Rows of the part that is best for each domain on tune, the trunk among them; for each kind of module."""
    at = {(row["model"], row["part"], row["domain"]): row for row in rows}
    modules = list(dict.fromkeys(row["model"] for row in rows if row["model"].startswith("module ")))
    found = []
    for suffix in dict.fromkeys(model.partition(" (")[2] for model in modules):
        end = f" ({suffix}" if suffix else ""
        trunk = "trunk (short)" if end == " (short)" else "trunk"
        own = [trunk, *(model for model in modules if model.partition(" (")[2] == suffix)]
        for domain in domains:
            best = min(own, key=lambda model: at[model, "tune", domain]["loss"])
            found.append(at[best, "test", domain] | {"model": f"best module by label{end}"})
    return found


def _order(name: str) -> tuple[int, str]:
    """The trunk first, then its modules, then what is assembled, then the others."""
    starts: tuple[Callable[[str], bool], ...] = (
        lambda n: n.startswith("trunk"),
        lambda n: n.startswith("module"),
        lambda n: n.startswith("best"),
        lambda n: n.startswith("assembled"),
        lambda n: n.startswith(("told", "without", "ridge", "uniform")),
        lambda n: True,
    )
    return next(i for i, start in enumerate(starts) if start(name)), name
