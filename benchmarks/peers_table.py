"""The tables, the goals and the chart of benchmarks/peers.py, from the measurements in peers.json."""

import statistics

from script_process import spread

from forge_common.evaluation.chart import draw

Found = dict[str, list[dict[str, float]]]  # the measurements of each contender, one a round

TOLERANCE = 1e-3  # nats, between the last losses of contenders that train the same thing
PRODUCTS, PEER = "matrix products", "the fastest other loop"
OURS = ("train_shared", "train_shared, compiled")
OTHERS = (
    "bare loop",
    "bare loop, compiled",
    "Accelerate",
    "Accelerate, compiled",
    "HF Trainer",
    "HF Trainer, compiled",
)
OTHERS += ("litgpt, compiled",)
LARGE = ("train_shared, large vocabulary", "bare loop, large vocabulary")
COLUMNS = {"tokens/s": 0, "share": 2, "peak": 0, "above start": 0, "loss": 5, "start": 1}  # and their decimals
HEAD = "| contender | tokens/s | share of the matrix rate | peak MiB | above the start | last loss | start, s |"
MEMORY = ("peak", "above start")
GOALS = [  # what is divided by what, which measurement of the two, and the goal
    ("train_shared, compiled", PEER, "tokens/s", ">=", 1.05),
    ("train_shared", "bare loop", "tokens/s", ">=", 1.0),
    *((name, PRODUCTS, "FLOP/s", ">=", 0.8) for name in OURS),
    *((f"train_module {kind}", "bare loop", "tokens/s", ">=", 1.6) for kind in ("ffn", "ffn+head", "lora")),
    ("train_module lora", "PEFT LoRA", "tokens/s", ">=", 1.3),
    (*LARGE, "tokens/s", ">=", 1.4),
    ("train_shared, 2 processes", "train_shared", "tokens/s", ">=", 1.0),
    *(("train_shared", "bare loop", memory, "<=", 0.7) for memory in MEMORY),
    *((f"train_module {kind}", "bare loop", memory, "<=", 0.45) for kind in ("ffn", "lora") for memory in MEMORY),
    *(("train_module lora", "PEFT LoRA", memory, "<=", 0.6) for memory in MEMORY),
    *((*LARGE, memory, "<=", 0.4) for memory in MEMORY),
    *((f"start of train_{script}", "start of HF Trainer", "start", "<=", 0.5) for script in ("shared", "module")),
]


def report(found: Found, groups: dict[str, tuple[str, str]]) -> tuple[str, str, str]:
    """The tables in Markdown, the chart, and what is wrong with the losses ("": nothing).

    groups: contender -> its work and what it trains; the last losses of a group must agree.
    """
    lines = ["", HEAD, "| --- " * 7 + "|"]
    for name in (name for name in found if name != PRODUCTS):
        shown = {key: [one[key] for one in found[name]] for key in COLUMNS if key in found[name][0]}
        shown["share"] = ratios(found, name, PRODUCTS, "FLOP/s")
        cells = [spread(shown[key], digits) if shown.get(key) else "" for key, digits in COLUMNS.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if PRODUCTS in found:
        lines += ["", f"Matrix products alone: {spread([one['FLOP/s'] / 1e9 for one in found[PRODUCTS]], 1)} GFLOP/s."]

    lines += ["", "| ratio | of | median (min-max) | goal | reached |", "| --- " * 5 + "|"]
    measured = [name for name in OTHERS if name in found]
    fastest = max(measured, key=lambda name: statistics.median(one["tokens/s"] for one in found[name]), default=PEER)
    for above, below, key, sign, goal in GOALS:
        below = fastest if below == PEER else below
        if values := ratios(found, above, below, key):
            middle = statistics.median(values)
            reached = "yes" if (middle >= goal if sign == ">=" else middle <= goal) else "no"
            lines.append(f"| {above} / {below} | {key} | {spread(values)} | {sign} {goal} | {reached} |")

    lines += ["", "Last losses, less that of the first contender that trains the same thing:", ""]
    wrong, first = [], {}
    for name in (name for name in groups if name in found):
        expected = first.setdefault(groups[name], found[name][0]["loss"])
        apart = max((one["loss"] - expected for one in found[name]), key=abs)
        lines.append(f"- {name}: {apart:+.1e}")
        if not abs(apart) <= TOLERANCE:
            wrong.append(
                f"The last loss of {name} is {apart:+.1e} nats from that of the others that train the same thing."
            )
    hint = "Compare the logs of their runs: something that they train, or how, is not the same." if wrong else ""
    return "\n".join(lines), chart(found), " ".join([*wrong, hint]).strip()


def ratios(found: Found, above: str, below: str, key: str) -> list[float]:
    """Of each round; [] where one of the two was not measured."""
    one, other = found.get(above, []), found.get(below, [])
    rounds = range(min(len(one), len(other)))  # an interrupted round has measured only some contenders
    return [one[i][key] / other[i][key] for i in rounds if key in one[i] and key in other[i]]


def chart(found: Found) -> str:
    """What trains everything, relative to the bare loop of the same round; a line to each side of half of max - min."""
    points = []
    for key in ("tokens/s", "peak", "above start"):
        for name in (*OURS, *OTHERS):
            if values := ratios(found, name, "bare loop", key):
                half = (max(values) - min(values)) / 2
                points.append({"model": name, "domain": key, "loss": statistics.median(values), "stderr": half})
    return draw(points, "relative to the bare PyTorch loop") if points else ""
