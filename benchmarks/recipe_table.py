"""The rows of the comparison -> a table in Markdown, and the rows of its chart."""

from collections.abc import Callable
from statistics import fmean
from typing import Any

SPLICED = "spliced"
SHOWN = (  # in the chart
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
    """The Markdown table over all seeds, and the rows of the chart: model, domain, loss and stderr."""
    domains = [domain for domain in dict.fromkeys(row["domain"] for row in seeds[0]) if domain != SPLICED]
    seeds = [[*rows, *_best_by_label(rows, domains)] for rows in seeds]
    by_seed = [{(row["model"], row["domain"]): row for row in rows if row["part"] == "test"} for rows in seeds]
    names = list(dict.fromkeys(model for seed_rows in by_seed for model, _ in seed_rows))
    names = [
        name for name in names if not (name.startswith("module ") and name.endswith(")"))
    ]  # single modules of the other kinds
    names.sort(key=_order)
    lines = [
        f"| recipe | {' | '.join(domains)} | macro, mean ± s.e. | each seed | {SPLICED} | way to the best by label | to the union |",
        "| --- " * (len(domains) + 6) + "|",
    ]
    for name in names:
        here = [seed_rows for seed_rows in by_seed if (name, domains[0]) in seed_rows or (name, SPLICED) in seed_rows]
        whole = all((name, domain) in seed_rows for seed_rows in here for domain in domains)
        losses = [fmean(seed_rows[name, d]["loss"] for seed_rows in here) for d in domains] if whole else []
        macros = [fmean(seed_rows[name, d]["loss"] for d in domains) for seed_rows in here] if whole else []
        errors = (
            [sum(seed_rows[name, d]["stderr"] ** 2 for d in domains) ** 0.5 / len(domains) for seed_rows in here]
            if whole
            else []
        )
        suffix = " (short)" if name.endswith(" (short)") else ""
        mixed = [seed_rows[name, SPLICED]["loss"] for seed_rows in here if (name, SPLICED) in seed_rows]
        cells = [f"{loss:.3f}" for loss in losses] or ["" for _ in domains]
        cells += [f"**{fmean(macros):.3f}** ± {fmean(errors):.3f}" if whole else ""]
        cells += [", ".join(f"{value:.3f}" for value in macros)]
        cells += [f"{fmean(mixed):.3f}" if mixed else ""]
        for goal in ("best module by label", "union"):
            ways = (
                [way(seed_rows, name, goal + suffix, "trunk" + suffix, domains) for seed_rows in here] if whole else []
            )
            known = [value for value in ways if value is not None]
            cells.append(f"{fmean(known):.0%}" if known else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    shown = [
        {
            "model": name,
            "domain": domain,
            "loss": fmean(seed_rows[name, domain]["loss"] for seed_rows in by_seed if (name, domain) in seed_rows),
            "stderr": fmean(seed_rows[name, domain]["stderr"] for seed_rows in by_seed if (name, domain) in seed_rows),
        }
        for name in SHOWN
        for domain in [*domains, SPLICED]
        if any((name, domain) in seed_rows for seed_rows in by_seed)
    ]
    return "\n".join(lines) + "\n", shown


def way(seed_rows: dict[tuple[str, str], Any], name: str, goal: str, trunk: str, domains: list[str]) -> float | None:
    """How far from the trunk (0) to a goal (1) a model's macro-average lies."""
    if any((model, domains[0]) not in seed_rows for model in (name, goal, trunk)):
        return None
    ours, end, start = (fmean(seed_rows[model, d]["loss"] for d in domains) for model in (name, goal, trunk))
    return (start - ours) / (start - end)


def _best_by_label(rows: Rows, domains: list[str]) -> Rows:
    """Rows of the part (the trunk or a module) that is best for each domain on tune; for each kind of module."""
    at = {(row["model"], row["part"], row["domain"]): row for row in rows}
    modules = list(dict.fromkeys(row["model"] for row in rows if row["model"].startswith("module ")))
    best_rows = []
    for suffix in dict.fromkeys(model.partition(" (")[2] for model in modules):
        end = f" ({suffix}" if suffix else ""
        trunk = "trunk (short)" if end == " (short)" else "trunk"
        candidates = [trunk, *(model for model in modules if model.partition(" (")[2] == suffix)]
        for domain in domains:
            best = min(candidates, key=lambda model: at[model, "tune", domain]["loss"])
            best_rows.append(at[best, "test", domain] | {"model": f"best module by label{end}"})
    return best_rows


def _order(name: str) -> tuple[int, str]:
    """The trunk first, then its modules, then the assembled models, then the others."""
    starts: tuple[Callable[[str], bool], ...] = (
        lambda n: n.startswith("trunk"),
        lambda n: n.startswith("module"),
        lambda n: n.startswith("best"),
        lambda n: n.startswith("assembled"),
        lambda n: n.startswith(("true labels", "without", "ridge", "uniform")),
        lambda n: True,
    )
    return next(i for i, start in enumerate(starts) if start(name)), name
