"""What unequal, lying and copied statistics do to an assembled model: losses with the parts that `make compare` trained.

    python benchmarks/router_strangers.py [--folder runs/compare/seed-1] [--max-tokens 8000]

The strangers' weights are those of the module cpp, so that what is measured is the router. `assemble` refuses copied
statistics and broken weights; here nothing is refused. About five minutes on one core; the text is `make compare`'s
test part.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from script_process import ROOT

sys.path.insert(0, str(ROOT))

from recipe_baselines import Ensemble
from recipe_rates import Rates
from recipe_texts import HOME as DOMAINS

from forge_common import evaluate
from forge_common.artifacts import assembled
from forge_common.artifacts.statistics_file import read_statistics
from forge_common.artifacts.trunk_folder import read_trunk
from forge_common.data.readers.document import reading_of
from forge_common.data.sources import parse
from forge_common.data.store import prepare
from forge_common.evaluation.columns import read_columns
from forge_common.evaluation.score import score
from forge_common.routing import statistics
from forge_common.routing.mixture import Mixture
from forge_common.routing.tuning import Tuning


@dataclass(frozen=True)
class Settings:
    folder: Path = Path("runs/compare/seed-1")
    """A seed's folder of benchmarks/recipes.py: its trunk and the modules head-*."""
    max_tokens: int = 8000
    """Tokens of a domain that are scored at most."""


class Models:
    def __init__(self, settings: Settings):
        data = settings.folder.parent
        self.trunk, self.tokenizer, metadata = read_trunk(str(settings.folder / "trunk" / "trunk"))
        self.background = read_statistics(settings.folder / "trunk" / "trunk", metadata, self.trunk.eval().config)
        self.settings = evaluate.Settings("", (), cache_dir=data / "cache", max_tokens=settings.max_tokens, spliced=64)
        rates = Rates(data / "rates.json", (), 0)
        self.parts = {
            name: assembled.read_part(
                self.trunk, metadata, settings.folder / f"head-{name}-{rates.best(f'head-{name}'):g}" / "module"
            )
            for name in sorted(DOMAINS)
        }
        self.source = str(data / "data" / "python.module.jsonl")
        sources = {name: str(data / "texts" / f"{name}.test.jsonl") for name in DOMAINS}
        self.columns = read_columns(sources, self.tokenizer, self.trunk.config, self.settings)

    def counted(self, tokens: int) -> dict[str, torch.Tensor]:
        """Statistics of `tokens` tokens of python."""
        cache_dir = self.settings.cache_dir
        spec, _ = parse(self.source)
        corpus = prepare(spec, self.tokenizer, reading_of(self.settings), cache_dir=cache_dir, val_fraction=0.0)
        sample = statistics.sample([(corpus.train, 1.0)], tokens)
        return statistics.count(sample, self.trunk.config.vocab_size, self.tokenizer.eos_token_id, 2)[0]

    def row(self, case: str, parts: dict[str, assembled.Part], top_k: int = 0) -> None:
        """Prints the losses of the parts, by their names here, assembled with the default router."""
        named = [part._replace(metadata=part.metadata | {"name": name}) for name, part in parts.items()]
        candidates = {part.name: part.model for part in named}
        self.print(case, Mixture(self.trunk, candidates, self.router(named), top_k=top_k).eval())

    def ensemble(self) -> Ensemble:
        candidates = [self.trunk, *(part.model for part in self.parts.values())]
        return Ensemble(candidates, self.router(list(self.parts.values())))

    def router(self, parts: list[assembled.Part]) -> Any:
        metadata = {"router": "context", "tuning": asdict(Tuning())}
        return assembled.make_router(self.trunk, self.background, parts, metadata)

    def print(self, case: str, model: Any) -> None:
        losses = {name: score(model, column, self.settings, "cpu")["loss"] for name, column in self.columns.items()}
        macro = sum(losses[name] for name in DOMAINS) / len(DOMAINS)
        print(f"| {case} | {macro:.4f} | " + " | ".join(f"{loss:.4f}" for loss in losses.values()) + " |", flush=True)


def main(settings: Settings) -> None:
    torch.set_num_threads(1)
    models = Models(settings)
    parts = models.parts
    python = parts["python"]
    names = ("model", "macro", *models.columns)
    print(f"| {' | '.join(names)} |\n|{' --- |' * len(names)}")
    models.print("trunk", models.trunk)
    for name, part in parts.items():
        models.print(f"module {name}", part.model)
    models.row("assembled", parts)
    models.print("output ensemble of the parts, a pass each", models.ensemble())
    models.row("assembled, top-1", parts, top_k=1)
    for tokens in (20_000, 60_000):
        thin = python._replace(statistics=models.counted(tokens))
        models.row(f"python counted on {tokens:,} tokens", parts | {"python": thin})
    weights = parts["cpp"]
    assert python.statistics is not None
    largest = {name: torch.full_like(python.statistics[name], 255) for name in ("unigrams", "bigrams")}
    nothing = {name: torch.zeros_like(codes) for name, codes in largest.items()}
    lies = {"all counts the largest": largest, "nothing counted": nothing, "the trunk's counts": models.background}
    lies["python's counts (refused by assemble)"] = python.statistics
    for lie, tensors in lies.items():
        models.row(f"and a stranger: {lie}", parts | {"stranger": weights._replace(statistics=tensors)})
    models.row("and 15 copies of cpp", parts | {f"copy {number}": weights for number in range(15)})


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
