"""The curves of runs, as data that charts.js draws: {"title", "y": its unit, "series": [{"name", "colour": its number,
"x": updates, "y"}]}.
"""

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

POINTS = 2000  # of a curve at most: a longer one is drawn by the means of groups of its rows

# title, unit, keys of metrics.jsonl -> names of the curves; a key that ends with / stands for all that start with it
LAYOUT: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("Loss", "nats per token", {"train/loss": "training", "val/loss": "validation"}),
    ("Validation loss by source", "nats per token", {"val/loss/": ""}),
    ("Learning rate", "", {"train/lr": "learning rate"}),
    ("Gradient norm", "before clipping", {"train/grad_norm": "gradient norm"}),
    ("Speed", "tokens per second", {"train/tokens_per_second": "speed"}),
    ("Peak memory", "MiB", {"memory/peak_mb": "device", "memory/process_peak_mb": "process"}),
    ("Passes over each source", "times seen", {"train/passes/": ""}),
)
OF_ONE_RUN = ("train/passes/", "memory/process_peak_mb")  # not drawn for several
IN_CARDS = {"train/tokens", "train/epoch", "train/mfu", "train/bad_updates", "train/empty_updates"}
IN_CARDS |= {"train/scaler_skips", "val/tokens", "val/perplexity", "val/bits_per_byte"}
IN_CARDS |= {"val/best_loss", "val/best_step"}


def charts(runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The charts of the rows of each named run: of one run its curves together, of several a chart for each curve."""
    keys = dict.fromkeys(key for row in chain.from_iterable(runs.values()) for key in row)
    layout = [(title, unit, _named(names, keys)) for title, unit, names in LAYOUT]
    known = {"step", *IN_CARDS}.union(*(names for _, _, names in layout))
    layout += [(key, "", {key: key}) for key in keys if key not in known]  # a metric that someone added
    if len(runs) == 1:
        [rows] = runs.values()
        drawn = [(title, unit, [(rows, key, name) for key, name in names.items()]) for title, unit, names in layout]
    else:
        drawn = [
            (f"{title}: {name}" if len(names) > 1 else title, unit, [(rows, key, run) for run, rows in runs.items()])
            for title, unit, names in layout
            for key, name in names.items()
            if not key.startswith(OF_ONE_RUN)
        ]
    found = []
    for title, unit, curves in drawn:
        series = [_series(*curve) | {"colour": colour} for colour, curve in enumerate(curves)]
        series = [one for one in series if one["x"]]
        if len(series) == 2 and len(runs) == 1 and series[0]["y"] == series[1]["y"]:
            series.pop()  # on a CPU the device's memory is that of the process
        if series:
            found.append({"title": title, "y": unit, "series": series})
    return found


def _named(names: dict[str, str], keys: dict[str, None]) -> dict[str, str]:
    """The keys that the rows have, with the names of their curves."""
    named = {}
    for start, name in names.items():
        named |= {key: name or key.removeprefix(start) for key in keys if key == start or _is_below(key, start)}
    return named


def _is_below(key: str, start: str) -> bool:
    return start.endswith("/") and key.startswith(start)


def _series(rows: Sequence[dict[str, Any]], key: str, name: str) -> dict[str, Any]:
    """A curve; null, which the log has for NaN and Inf, is a gap in it. Six digits are more than a screen shows."""
    points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key, ""), int | float | None)]
    if len(points) <= POINTS:
        return {"name": name, "x": [x for x, _ in points], "y": [_rounded(y) for _, y in points]}
    size = math.ceil(len(points) / POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    means = [_mean([y for _, y in group]) for group in groups]
    return {"name": f"{name}, means of {size} rows", "x": [group[-1][0] for group in groups], "y": means}


def _mean(values: list[float | None]) -> float | None:
    finite = [value for value in values if value is not None]
    return _rounded(sum(finite) / len(finite)) if finite else None


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")
