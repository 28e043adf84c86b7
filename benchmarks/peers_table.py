"""The table, the goals and the chart of benchmarks/peers.py, from what is in peers.json."""

import statistics
from typing import Any

from script_process import spread

from forge_common.evaluation.chart import draw

TOLERANCE = 1e-3  # nats, between the last losses of contenders that train the same thing
WHOLE = (
    "train_shared",
    "train_shared, compiled",
    "bare loop",
    "bare loop, compiled",
    "Accelerate",
    "Accelerate, compiled",
)
WHOLE += ("HF Trainer", "HF Trainer, compiled", "litgpt, compiled")
LARGE = ("train_shared, large vocabulary", "bare loop, large vocabulary")
# what is divided by what, of which value, and the goal; PEER: the fastest loop of others
PEER = "the fastest other loop"
GOALS = [
    ("train_shared, compiled", PEER, "tokens/s", ">=", 1.05),
    ("train_shared", "bare loop", "tokens/s", ">=", 1.0),
    ("train_module ffn", "bare loop", "tokens/s", ">=", 1.6),
    ("train_module ffn+head", "bare loop", "tokens/s", ">=", 1.6),
    ("train_module lora", "bare loop", "tokens/s", ">=", 1.6),
    ("train_module lora", "PEFT LoRA", "tokens/s", ">=", 1.3),
    (*LARGE, "tokens/s", ">=", 1.4),
    ("train_shared, 2 processes", "train_shared", "tokens/s", ">=", 1.0),
    *[("train_shared", "bare loop", memory, "<=", 0.7) for memory in ("peak", "above start")],
    *[("train_module ffn", "bare loop", memory, "<=", 0.45) for memory in ("peak", "above start")],
    *[("train_module lora", "PEFT LoRA", memory, "<=", 0.6) for memory in ("peak", "above start")],
    *[(*LARGE, memory, "<=", 0.4) for memory in ("peak", "above start")],
    ("start of train_shared", "start of HF Trainer", "start", "<=", 0.5),
    ("start of train_module", "start of HF Trainer", "start", "<=", 0.5),
]
SHARE_GOAL = 0.8


def report(kept: dict[str, Any], groups: dict[str, str]) -> tuple[str, str, str]:
    """The tables in Markdown, the chart, and what is wrong with the losses ("": nothing).

    kept: the content of peers.json. groups: contender -> what it trains; those of one group must have the same last loss.
    """
    found: dict[str, list[dict[str, float]]] = {name: results for name, results in kept["found"].items() if results}
    lines = ["", "| contender | tokens/s | of the matrix rate | peak MiB | above the start | last loss | start, s |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for name, results in found.items():
        if name != "matrix products":
            cells = [cell(results, "tokens/s", 0), share(kept, found, name, groups.get(name, ""))]
            cells += [cell(results, "peak", 0), cell(results, "above start", 0), cell(results, "loss", 5)]
            lines.append(f"| {name} | {' | '.join(cells)} | {cell(results, 'start', 1)} |")
    if "matrix products" in found:
        rate = spread([result["flops/s"] / 1e9 for result in found["matrix products"]], 0)
        lines += ["", f"Matrix products of the model's linear layers alone: {rate} GFLOP/s."]
    lines += ["", "| ratio | of | median (min-max) | goal | reached |", "| --- | --- | --- | --- | --- |"]
    others = [name for name in WHOLE if name in found and not name.startswith("train_")]
    for above, below, key, sign, goal in GOALS:
        if below == PEER and others:
            below = max(others, key=lambda name: statistics.median(values(found[name], "tokens/s")))
        if above in found and below in found:
            pairs = zip(values(found[above], key), values(found[below], key), strict=False)
            lines.append(goal_line(f"{above} / {below}", key, [one / other for one, other in pairs], sign, goal))
    for name in ("train_shared", "train_shared, compiled"):
        if name in found and "matrix products" in found:
            lines.append(
                goal_line(name, "share of the matrix rate", shares(kept, found, name, "whole"), ">=", SHARE_GOAL)
            )
    wrong = []
    lines += ["", "Last losses, less that of the first contender that trains the same:"]
    first: dict[str, str] = {}
    for name in (name for name in groups if name in found):
        reference = first.setdefault(groups[name], name)
        expected = found[reference][0]["loss"]
        apart = max((result["loss"] - expected for result in found[name]), key=abs)
        lines.append(f"- {name}: {apart:+.1e}" + ("" if name == reference else f" ({reference} {expected:.5f})"))
        if not abs(apart) <= TOLERANCE:
            wrong.append(f"{name} has another loss than {reference}: {apart:+.1e}, more than {TOLERANCE:g} apart.")
    hint = " They do not train the same thing: compare their logs in OUTPUT_DIR/runs." if wrong else ""
    return "\n".join(lines), chart(found), " ".join(wrong) + hint


def values(results: list[dict[str, float]], key: str) -> list[float]:
    return [result[key] for result in results]


def cell(results: list[dict[str, float]], key: str, digits: int) -> str:
    return spread(values(results, key), digits) if key in results[0] else ""


def shares(kept: dict[str, Any], found: dict[str, list[dict[str, float]]], name: str, trains: str) -> list[float]:
    """In each round, the FLOP/s of the contender as a share of those of the matrix products alone."""
    pairs = zip(values(found[name], "tokens/s"), values(found["matrix products"], "flops/s"), strict=False)
    return [tokens * kept["flops"][trains] / rate for tokens, rate in pairs]


def share(kept: dict[str, Any], found: dict[str, list[dict[str, float]]], name: str, group: str) -> str:
    work, _, trains = group.partition(" ")
    if work != "standard" or "matrix products" not in found:
        return ""
    return spread(shares(kept, found, name, trains), 2)


def goal_line(ratio: str, key: str, found: list[float], sign: str, goal: float) -> str:
    middle = statistics.median(found)
    reached = middle >= goal if sign == ">=" else middle <= goal
    return f"| {ratio} | {key} | {spread(found)} | {sign} {goal:.2f} | {'yes' if reached else 'no'} |"


def chart(found: dict[str, list[dict[str, float]]]) -> str:
    """The contenders that train everything, relative to the bare loop of the same round; the line is half of max - min."""
    points = []
    for key, title in (("tokens/s", "tokens/s"), ("peak", "peak memory")):
        for name in WHOLE:
            if name in found and "bare loop" in found:
                pairs = zip(values(found[name], key), values(found["bare loop"], key), strict=False)
                ratios = [one / other for one, other in pairs]
                half = (max(ratios) - min(ratios)) / 2
                points.append({"model": name, "domain": title, "loss": statistics.median(ratios), "stderr": half})
    return draw(points, "relative to the bare PyTorch loop") if points else ""
