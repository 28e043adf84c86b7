"""The rows of the comparison -> tables in Markdown with paired standard errors, and the rows of its chart."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, variance
from typing import Any, NamedTuple

SPLICED = "spliced"
ASSEMBLED, LABEL, HEAD = "assembled", "best module by label", "union with a head of its own"
EQUAL = "output ensemble of modules, equal hearing"
SHOWN = ("trunk", LABEL, ASSEMBLED, "assembled, top-1", "union", HEAD, EQUAL, "upcycled mixture, trained jointly")
WAYS = {"home": 1.03, "unseen": 0.97, "pair": None}  # wanted of the assembled model, on the way from the trunk to LABEL


@dataclass(frozen=True)
class Row:
    """A model on a column. nats, tokens: of each document, in the same order for every model."""

    group: str
    model: str
    part: str
    domain: str
    nats: list[float]
    tokens: list[int]

    @property
    def loss(self) -> float:
        """The ratio of the sums: nats per token."""
        return math.fsum(self.nats) / sum(self.tokens)


Rows = dict[tuple[str, str], Row]  # of one seed, group and part: (model, domain) -> row


class Difference(NamedTuple):
    """mean over the seeds and domains, and its standard error over documents and over seeds."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {2 * self.error:.4f}"


def difference(pairs: list[dict[str, tuple[Row, Row]]]) -> Difference:
    """Nats per token of the first row of each pair minus the second's. pairs: of each seed, by domain; the documents
    are the same.

    In each domain it is a ratio of sums over the documents, and the domains count equally. The squares of two errors
    are added: that over documents of the mean over the seeds, and that over seeds. What is random in both is counted
    twice, so that the sum is rather too large.
    """
    domains = list(pairs[0])
    by_seed = [fmean(first.loss - second.loss for first, second in seed.values()) for seed in pairs]
    over_documents = math.fsum(_variance(domain, [seed[domain] for seed in pairs]) for domain in domains)
    over_seeds = variance(by_seed) / len(by_seed) if len(by_seed) > 1 else 0.0
    return Difference(fmean(by_seed), math.sqrt(over_documents / len(domains) ** 2 + over_seeds))


def _variance(domain: str, seeds: list[tuple[Row, Row]]) -> float:
    """Of the mean over the seeds of the difference in one domain, over its documents: that of a ratio estimate.

    The seeds may divide a document into tokens differently.
    """
    number = len(seeds[0][0].tokens)
    deviations = [0.0] * number  # of each document, from the mean difference
    for first, second in seeds:
        if first.tokens != second.tokens or len(first.tokens) != number:
            raise SystemExit(f"the rows of {domain} are not of the same documents. Remove rows.json of each seed.")
        ratio = first.loss - second.loss
        for place, tokens in enumerate(first.tokens):
            own = first.nats[place] - second.nats[place]
            deviations[place] += (own - ratio * tokens) / sum(first.tokens) / len(seeds)
    return math.fsum(deviation**2 for deviation in deviations) * number / max(number - 1, 1)


def report(seeds: dict[int, list[Row]]) -> tuple[str, list[dict[str, Any]]]:
    """The Markdown tables of all groups, and the rows of the chart of home: model, domain, loss and stderr."""
    lines: list[str] = []
    shown: list[dict[str, Any]] = []
    goals = ["## Goals", "", "| wanted | measured ± 2 s.e. | |", "| --- | --- | --- |"]
    for group, wanted in WAYS.items():
        found = [rows for rows in (_of_group(rows, group) for rows in seeds.values()) if rows]
        if not found:
            continue
        domains = [domain for domain in dict.fromkeys(domain for _, domain in found[0]) if domain != SPLICED]
        lines += [*_table(group, found, domains), ""]
        if group == "home":
            shown = _chart(found, domains)
            goals += _against(found, domains, HEAD, -0.05)
            goals += _against(found, domains, EQUAL, 0.0)
        ways = _ways(found, ASSEMBLED, LABEL, domains)
        if wanted and ways:
            met = "met" if fmean(ways) >= wanted else "**missed**"
            goals.append(
                f"| {group}: assembled, way to the best by label at least {wanted:.0%} | {fmean(ways):.1%} (each seed: {_percent(ways)}) | {met} |"
            )
    return "\n".join([*lines, *goals, ""]), shown


def _of_group(rows: list[Row], group: str) -> Rows:
    """The rows of a group on test, and those of the part that is best for each domain on tune."""
    at = {(row.model, row.part, row.domain): row for row in rows if row.group == group}
    found = {(model, domain): row for (model, part, domain), row in at.items() if part == "test"}
    singles = ["trunk", *dict.fromkeys(model for model, _ in found if model.startswith("module "))]
    for domain in dict.fromkeys(domain for _, domain in found if domain != SPLICED):
        scored = [model for model in singles if (model, "tune", domain) in at and (model, domain) in found]
        if len(scored) == len(singles) > 1:
            best = min(scored, key=lambda model: at[model, "tune", domain].loss)
            found[LABEL, domain] = found[best, domain]
    return found


def _table(group: str, seeds: list[Rows], domains: list[str]) -> list[str]:
    columns = [*domains, "macro", "minus assembled ± 2 s.e.", "way to the best by label", SPLICED, "seeds"]
    tokens = ", ".join(
        f"{d} {len(row.tokens)} and {sum(row.tokens):,}" for d in domains if (row := seeds[0]["trunk", d])
    )
    lines = [f"## {group}", "", f"Documents and tokens scored: {tokens}.", ""]
    lines += [f"| recipe | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
    for name in sorted(dict.fromkeys(model for rows in seeds for model, _ in rows), key=_order):
        having = [rows for rows in seeds if all((name, domain) in rows for domain in domains)]
        spliced = [rows[name, SPLICED].loss for rows in seeds if (name, SPLICED) in rows]
        cells = ["" for _ in columns]
        if having:
            losses = [fmean(rows[name, domain].loss for rows in having) for domain in domains]
            cells[: len(domains)] = [f"{loss:.3f}" for loss in losses]
            cells[len(domains)] = f"**{fmean(losses):.3f}**"
            against = _minus(having, domains, name, ASSEMBLED)
            cells[-4] = str(against) if against and name != ASSEMBLED else ""
            ways = _ways(having, name, LABEL, domains)
            cells[-3] = f"{fmean(ways):.0%}" if ways else ""
        cells[-2] = f"{fmean(spliced):.3f}" if spliced else ""
        cells[-1] = str(len(having) or len(spliced))
        if having or spliced:
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _minus(seeds: list[Rows], domains: list[str], name: str, other: str) -> Difference | None:
    """None where a seed has no rows of the other one."""
    if not all((model, domain) in rows for rows in seeds for model in (name, other) for domain in domains):
        return None
    return difference([{domain: (rows[name, domain], rows[other, domain]) for domain in domains} for rows in seeds])


def _against(seeds: list[Rows], domains: list[str], other: str, wanted: float) -> list[str]:
    """A line of the goals: the assembled model minus another one is at most `wanted`, beyond 2 standard errors of 0
    where below 0.
    """
    having = [rows for rows in seeds if all((m, d) in rows for m in (ASSEMBLED, other) for d in domains)]
    found = _minus(having, domains, ASSEMBLED, other) if having else None
    if found is None:
        return []
    met = found.mean <= wanted and (wanted == 0 or found.mean + 2 * found.error < 0)
    return [f"| home: assembled minus {other} at most {wanted} | {found} | {'met' if met else '**missed**'} |"]


def _ways(seeds: list[Rows], name: str, goal: str, domains: list[str]) -> list[float]:
    """Of each seed that has the rows: how far from the trunk (0) to the goal (1) a model's mean over the domains lies."""
    ways = []
    for rows in seeds:
        if all((model, domain) in rows for model in (name, goal, "trunk") for domain in domains):
            ours, end, start = (fmean(rows[model, d].loss for d in domains) for model in (name, goal, "trunk"))
            if start != end:
                ways.append((start - ours) / (start - end))
    return ways


def _percent(values: list[float]) -> str:
    return ", ".join(f"{value:.1%}" for value in values)


def _chart(seeds: list[Rows], domains: list[str]) -> list[dict[str, Any]]:
    shown = []
    for name in SHOWN:
        for domain in [*domains, SPLICED]:
            rows = [found[name, domain] for found in seeds if (name, domain) in found]
            if rows:
                zero = [{domain: (row, dataclasses.replace(row, nats=[0.0] * len(row.nats)))} for row in rows]
                error = difference(zero).error
                shown.append({"model": name, "domain": domain, "loss": fmean(r.loss for r in rows), "stderr": error})
    return shown


def _order(name: str) -> tuple[int, str]:
    """The trunk first, then its modules, then the assembled models, then the others."""
    starts: tuple[Callable[[str], bool], ...] = (
        lambda n: n == "trunk",
        lambda n: n.startswith("module "),
        lambda n: n == LABEL,
        lambda n: n.startswith("assembled"),
        lambda n: n.startswith("union"),
        lambda n: n.startswith(("true labels", "oracle", "ridge", "uniform", "modules ")),
        lambda n: True,
    )
    return next(i for i, start in enumerate(starts) if start(name)), name
