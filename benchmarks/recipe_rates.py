"""The search of learning rates: one grid for every recipe, until the best rate has a worse one on either side."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forge_common.files.atomic import write_json

DECIMALS = 4  # of a loss: equal ones are decided by the lower rate


def beyond(losses: dict[float, float]) -> float | None:
    """The next rate to try: beyond the edge where the best rate lies; None if it lies inside the grid."""
    best = chosen(losses)
    if best == max(losses):
        return float(f"{best * 2:.1e}")
    if best == min(losses):
        return float(f"{best / 3:.1e}")
    return None


def chosen(losses: dict[float, float]) -> float:
    return min(losses, key=lambda rate: (round(losses[rate], DECIMALS), rate))


class Rates:
    """rates.json: for each recipe the loss on tune at each rate that was tried, and the seed. Other seeds read the best from it."""

    def __init__(self, path: Path, grid: tuple[float, ...], extensions: int):
        self.path, self.grid, self.extensions = path, grid, extensions
        self.found: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def losses(self, recipe: str) -> dict[float, float]:
        return {float(rate): loss for rate, loss in self.found.get(recipe, {}).get("losses", {}).items()}

    def missing(self, recipe: str) -> list[float]:
        """The rates to try next; [] when the search is over."""
        losses = self.losses(recipe)
        rates = [rate for rate in self.grid if rate not in losses]
        further = beyond(losses) if not rates else None
        if further is not None and len(losses) - len(self.grid) < self.extensions:
            rates = [further]
        return rates

    def best(self, recipe: str) -> float:
        return chosen(self.losses(recipe))

    def search(
        self,
        seed: int,
        recipes: list[str],
        train: Callable[[list[tuple[str, float]]], None],
        loss: Callable[[str, float], float],
    ) -> None:
        """Tries rates of all the recipes, a round of all of them at a time, until each has its best."""
        while True:
            round_ = [(recipe, rate) for recipe in recipes for rate in self.missing(recipe)]
            if not round_:
                return
            train(round_)
            for recipe, rate in round_:
                entry = self.found.setdefault(recipe, {"seed": seed, "losses": {}})
                entry["losses"][f"{rate:g}"] = loss(recipe, rate)
                write_json(self.path, self.found)

    def table(self) -> str:
        """Markdown: each recipe's rate, whether it lies inside what was tried, and the losses on tune."""
        lines = ["| recipe | rate | inside | loss on tune at each rate |", "| --- | --- | --- | --- |"]
        for recipe in self.found:
            losses = self.losses(recipe)
            inside = "yes" if len(losses) > 1 and beyond(losses) is None else "**no**"
            tried = ", ".join(f"{rate:g}: {losses[rate]:.4f}" for rate in sorted(losses))
            lines.append(f"| {recipe} | {self.best(recipe):g} | {inside} | {tried} |")
        return "\n".join(lines) + "\n"
