"""The lines, tables and chart of benchmarks/growth.py, from the measurements in growth.json and growth_curves.theory."""

import statistics
from typing import NamedTuple

import numpy as np
from growth_curves import Curves, Point, name_of, theory
from script_process import spread

from forge_common.evaluation.chart import draw

Found = dict[str, list[dict[str, float]]]  # the measurements of each point, one a round
SMALLEST = 2  # points that the line of a curve is fitted to
OFF = 0.15  # from the line, as a share of it: what is reported


class Metric(NamedTuple):
    key: str
    title: str
    digits: int
    theory: str
    offset: bool = False  # the line is theory + a constant, else theory * a constant


TRAINING = (
    Metric("update", "s an update", 3, "seconds"),
    Metric("above start", "MiB above the start", 0, "plan", offset=True),
)
TEXT = (
    Metric("tokenize", "s to tokenize", 2, "megabytes"),
    Metric("first update", "s to the first update, cached", 2, "one"),
    Metric("tokenize peak", "peak MiB, tokenizing", 0, "one"),
    Metric("resident", "MiB before the first update, cached", 0, "one"),
)
MODULES = (
    Metric("assemble", "s to assemble", 2, "parts"),
    Metric("assemble peak", "MiB above the start, assembling", 0, "one"),
    Metric("open", "s to open", 2, "parts"),
    Metric("score peak", "MiB above the start, scoring", 0, "parts", offset=True),
    Metric("all", "ms a token, all gates", 3, "all"),
    Metric("top-1", "ms a token, top-1", 3, "top-1"),
)


def metrics(point: Point) -> tuple[Metric, ...]:
    return MODULES if point.modules else TEXT if point.megabytes else TRAINING


def speeds(flops: list[float], moved: list[float], seconds: list[float]) -> tuple[float, float]:
    """Seconds of a FLOP and of a byte that the optimizer moves, neither negative, with the smallest relative errors."""
    parts = np.stack((flops, moved), axis=1) / np.array(seconds)[:, None]
    both = np.linalg.lstsq(parts, np.ones(len(parts)), rcond=None)[0]
    if (both >= 0).all():
        return float(both[0]), float(both[1])
    alone = parts.sum(0) / (parts**2).sum(0)
    return (float(alone[0]), 0.0) if both[1] < 0 else (0.0, float(alone[1]))


def line(values: list[float], expected: list[float], offset: bool) -> list[float]:
    """The line through the smallest points: expected + a constant (offset), or expected * a constant."""
    y, t = np.array(values), np.array(expected, dtype=np.float64)
    few = slice(0, SMALLEST)
    if offset:
        return list(t + (y[few] - t[few]).mean())
    return list(t * (y[few] @ t[few]) / (t[few] @ t[few]))


def report(curves: Curves, start: Point, found: Found) -> tuple[str, str]:
    """The tables in Markdown with what leaves its line, and the chart."""
    measured = {
        name: {size: point for size, point in points.items() if name_of(point, start) in found}
        for name, points in curves.items()
    }
    measured = {name: points for name, points in measured.items() if points}
    expected = {point: theory(point) for points in measured.values() for point in points.values()}
    smallest = {
        point: statistics.median(one["update"] for one in found[name_of(point, start)])
        for points in measured.values()
        for point in list(points.values())[:SMALLEST]
        if metrics(point) == TRAINING
    }
    lines = []
    if smallest:
        flops, moved = ([expected[point][part] for point in smallest] for part in ("flops", "moved"))
        flop, byte = speeds(flops, moved, list(smallest.values()))
        for values in expected.values():
            values["seconds"] = values.get("flops", 0) * flop + values.get("moved", 0) * byte
        rates = [f"{1 / each / 1e9:,.1f} {unit}" for each, unit in ((flop, "GFLOP/s"), (byte, "GB/s")) if each]
        lines += [f"Time by theory, fitted to the smallest points of all curves: {', '.join(rates)}.", ""]
    rows, away = [], []
    for name, points in measured.items():
        shown = metrics(next(iter(points.values())))
        head = [f"{metric.title} | line | off" for metric in shown]
        lines += [f"| {name} | {' | '.join(head)} |", "| --- " * (1 + 3 * len(shown)) + "|"]
        cells: dict[int, list[str]] = {size: [] for size in points}
        for metric in shown:
            each = {size: [one[metric.key] for one in found[name_of(p, start)]] for size, p in points.items()}
            middle = [statistics.median(values) for values in each.values()]
            predicted = line(middle, [expected[point][metric.theory] for point in points.values()], metric.offset)
            for number, (size, values) in enumerate(each.items()):
                ratio = middle[number] / predicted[number]
                text = spread(values, metric.digits) if len(values) > 1 else f"{values[0]:,.{metric.digits}f}"
                cells[size] += [text, f"{predicted[number]:,.{metric.digits}f}", f"{ratio - 1:+.0%}"]
                if abs(ratio - 1) > OFF:
                    away.append(f"- {name} {size:,}, {metric.title}: {ratio - 1:+.0%}")
                rows.append(
                    {"model": f"point {number + 1}", "domain": f"{name}: {metric.key}", "loss": ratio, "stderr": 0}
                )
        lines += [f"| {size:,} | {' | '.join(each)} |" for size, each in cells.items()] + [""]
    lines += [f"More than {OFF:.0%} from the line:", "", *(away or ["- nothing"])]
    return "\n".join(lines), draw(rows, "measured cost / the line through the smallest points") if rows else ""
