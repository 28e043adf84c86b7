"""What a module with honest statistics and broken weights does to an assembled model, and which check of `assemble`
notices it.

    python benchmarks/broken_modules.py --trunk runs/demo/trunk/trunk --modules runs/demo/*/module --cache-dir runs/demo/cache

One module after the other is broken in each way, beside the good others. A row has the two excesses of `assemble`'s
trial (nats per token above the trunk's loss: on text that the trunk generates, and on text drawn from the module's own
counts), the largest change of a domain's loss against the model without the module, with all gates and with top-1, and
the loss that --check-data would measure on the module's domain less the trunk's. Each module's domain is the local
corpus of its name.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from script_process import ROOT

sys.path.insert(0, str(ROOT))

from forge_common import evaluate
from forge_common.artifacts import assembled, trial
from forge_common.artifacts.metadata import module_arguments
from forge_common.artifacts.statistics_file import read_statistics
from forge_common.artifacts.trunk_folder import read_trunk
from forge_common.evaluation.columns import open_columns
from forge_common.evaluation.score import score
from forge_common.files.tensors import Tensors, read_tensors
from forge_common.routing.mixture import Mixture, with_module
from forge_common.routing.tuning import Tuning


@dataclass(frozen=True)
class Settings:
    trunk: Path
    modules: tuple[Path, ...]
    cache_dir: Path
    domains: tuple[str, ...] = ("docs", "python", "cpp")
    """Local corpora that are scored; each module is called as its own."""
    ways: tuple[str, ...] = ()
    """Rows to measure: keys of WAYS. None: all."""
    max_tokens: int = 6000
    """Tokens of a domain that are scored at most."""


def times(factor: float) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor * factor for name, tensor in tensors.items()}


def noise(share: float) -> Callable[[Tensors], Tensors]:
    """share: of each tensor's standard deviation."""
    return lambda tensors: {
        name: tensor + share * tensor.std() * torch.randn_like(tensor) for name, tensor in tensors.items()
    }


def permuted(part: str) -> Callable[[Tensors], Tensors]:
    """The rows of the tensors whose name contains `part` in another order."""
    return lambda tensors: {
        name: tensor[torch.randperm(len(tensor))] if part in name else tensor for name, tensor in tensors.items()
    }


def flipped(part: str) -> Callable[[Tensors], Tensors]:
    """The other sign of the tensors whose name contains `part`."""
    return lambda tensors: {name: -tensor if part in name else tensor for name, tensor in tensors.items()}


WAYS: dict[str, Callable[[Tensors], Tensors]] = {
    "nothing": times(1),
    "all times 1.5": times(1.5),
    "all times 3": times(3),
    "all times 10": times(10),
    "noise, 0.3 of the standard deviation": noise(0.3),
    "noise, 1 standard deviation": noise(1),
    "noise, 3 standard deviations": noise(3),
    "first layer's rows permuted": permuted("layers.0."),
    "last layer's rows permuted": permuted("layers.3."),
    "head's rows permuted": permuted("lm_head"),
    "sign of all down_proj flipped": flipped("down_proj"),
    "sign of the last down_proj flipped": flipped("layers.3.mlp.down_proj"),
    "sign of the head flipped": flipped("lm_head"),
}


def main(settings: Settings) -> None:
    torch.set_num_threads(1)
    trunk, tokenizer, metadata = read_trunk(str(settings.trunk))
    background = read_statistics(settings.trunk, metadata, trunk.eval().config)
    parts = {part.name: part for part in assembled.read_parts(trunk, metadata, list(settings.modules))}
    scoring = evaluate.Settings("", (), cache_dir=settings.cache_dir, max_tokens=settings.max_tokens)
    described = {"trunk": metadata, **{name: part.metadata for name, part in parts.items()}}
    columns, _ = open_columns(
        {name: f"local:{name}" for name in settings.domains}, described, trunk, tokenizer, scoring
    )
    reference = trial.make_reference(trunk, settings.trunk)

    def losses(candidates: dict[str, assembled.Part], top_k: int) -> dict[str, float]:
        named = list(candidates.values())
        router = assembled.make_router(trunk, background, named, {"router": "context", "tuning": asdict(Tuning())})
        model = Mixture(trunk, {part.name: part.model for part in named}, router, top_k=top_k).eval()
        return {name: score(model, column, scoring, "cpu")["loss"] for name, column in columns.items()}

    ways = {way: change for way, change in WAYS.items() if way in (settings.ways or WAYS)}
    print("| module | weights | its own text | trunk's text | all gates | top-1 | real text |\n|" + " --- |" * 7)
    for place, (name, part) in zip(settings.modules, parts.items(), strict=True):
        others = {other: one for other, one in parts.items() if other != name}
        without = {top_k: losses(others, top_k) for top_k in (0, 1)}
        trunk_loss = score(trunk, columns[name], scoring, "cpu")["loss"]
        for way, change in ways.items():
            torch.manual_seed(0)
            tensors = change(read_tensors(place / "module.safetensors"))
            model = with_module(trunk, tensors, **module_arguments(part.metadata)).eval()
            broken = part._replace(model=model)
            moved = {}
            for top_k in (0, 1):
                now = losses(parts | {name: broken}, top_k)
                changes = {domain: now[domain] - without[top_k][domain] for domain in columns}
                worst = max(changes, key=lambda domain: changes[domain])
                moved[top_k] = f"{changes[worst]:+.3f} ({worst})"
            own = score(model, columns[name], scoring, "cpu")["loss"] - trunk_loss
            excess = trial.mean_loss(model, reference.text, way) - reference.loss
            assert part.statistics is not None
            on_own = trial.excess_on_own_text(model, trunk, part.statistics, way)
            print(
                f"| {name} | {way} | {on_own:+.2f} | {excess:+.2f} | {moved[0]} | {moved[1]} | {own:+.3f} |", flush=True
            )


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
