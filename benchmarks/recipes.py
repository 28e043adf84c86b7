"""The comparison of recipes: assembled modules, whole models, merges, ensembles and other routers.

    python benchmarks/recipes.py [--seeds 1 2] [--workers 1] [--smoke]

Three groups of domains are divided by the hash of each document into the trunk's text, the modules' text, the text that
settings are selected on (tune) and the text that is reported (test). Every recipe gets the same trunk, the same number
of tokens and the same grid of rates, by the scripts as users run them. Seeds follow one another. Every run and every
row is kept in OUTPUT_DIR: the same command continues where it was interrupted, an interrupted run from its last
checkpoint. It writes table.md and chart.svg there after every seed, and after every stage of one.
"""

import os
import signal
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import tyro
from script_process import ROOT

sys.path.insert(0, str(ROOT))

import recipe_baselines as baselines
import torch
from recipe_rates import Rates
from recipe_runs import Recipe, Runs, Settings
from recipe_scores import SPLICE, Scores, by_document, read_rows
from recipe_table import SPLICED, Row, report
from recipe_texts import GROUPS, documents, export_texts, export_training

from forge_common.artifacts import assembled
from forge_common.artifacts.trunk_folder import read_trunk
from forge_common.evaluation import columns as texts
from forge_common.evaluation.chart import draw
from forge_common.files.atomic import write_text
from forge_common.routing.mixture import Mixture
from forge_common.routing.tuning import Tuning

ORACLE_TOKENS = 6_000  # of tune, of each domain, on which constant gates are fitted


class Seed:
    """All runs and rows of one seed."""

    def __init__(self, settings: Settings, seed: int, rates: Rates):
        self.settings, self.rates = settings, rates
        self.runs = Runs(settings, seed, rates)
        self.runs.train_trunk()
        self.scores = Scores(self.runs)

    def finish(self) -> None:
        """Trains and scores what is missing, the rows that matter most first."""
        rows = (self._home, self._union, partial(self._group, "unseen"), partial(self._group, "pair"))
        rows += (self._controls, self._attention, self._branches, partial(self._experts, "expert"))
        rows += (partial(self._experts, "expert+head"),)
        stages = self.runs.stages()
        for stage, score in zip(stages, rows, strict=True):
            self._train(stage)
            score()
            write_report(self.settings)
        if self.runs.seed in [entry["seed"] for entry in self.rates.found.values()]:
            self._original()
            write_report(self.settings)

    def _train(self, stage: list[Recipe]) -> None:
        """The stage's runs: at every rate of the grid where no seed has searched, otherwise at the best rate."""
        names = [recipe.name for recipe in stage]
        mine = [name for name in names if self.rates.found.get(name, {}).get("seed") in (None, self.runs.seed)]
        self.rates.search(self.runs.seed, mine, self._train_all, self._tune_loss)
        self._train_all([(name, self.rates.best(name)) for name in names])

    def _train_all(self, pairs: list[tuple[str, float]]) -> None:
        self.runs.all([partial(self.runs.train, name, rate) for name, rate in pairs])

    def _tune_loss(self, name: str, rate: float) -> float:
        """The mean over the recipe's domains of the loss on tune."""
        domains = self.runs.recipes[name].domains
        group = next(group for group, members in GROUPS.items() if domains[0] in members)
        run = f"{name}-{rate:g}"
        published = self.runs.train(name, rate)
        self.scores.add(group, run, lambda: self.scores.model(published), "tune", domains)
        return sum(self.scores.loss(group, run, "tune", domain) for domain in domains) / len(domains)

    # -- models --

    def _mixture(self, folders: list[Path], router: str = "context", trunk: Path | None = None) -> Mixture:
        """Modules assembled as forge_common.assemble does, with all gates."""
        base, metadata, background = self.scores.trunk, self.scores.metadata, self.scores.background
        if trunk:
            base, _, metadata = read_trunk(str(trunk))
        parts = [assembled.read_part(base, metadata, folder) for folder in folders]
        parts.sort(key=lambda part: part.name)
        solved = assembled.make_router(base, background, parts, {"router": router, "tuning": asdict(Tuning())})
        return Mixture(base, {part.name: part.model for part in parts}, solved).eval()

    def _recipe(self, name: str) -> Any:
        return self.scores.model(self.runs.published(name))

    def _modules(self, group: str) -> list[Path]:
        return [self.runs.published(f"head-{domain}") for domain in self.settings.group(group)]

    # -- rows --

    def _assembled(self, group: str) -> Mixture:
        """The trunk, each module alone, and the assembled model of a group."""
        add = partial(self.scores.add, group)
        for part in ("tune", "test"):
            add("trunk", lambda: self.scores.trunk, part)
            for domain in self.settings.group(group):
                add(f"module {domain}", lambda domain=domain: self._recipe(f"head-{domain}"), part)
        mixture = self._mixture(self._modules(group))
        for top_k in (0, 2, 1):
            name = "assembled" + (f", top-{top_k}" if top_k else "")
            add(name, lambda top_k=top_k: baselines.with_router(mixture, mixture.router, top_k))
        return mixture

    def _home(self) -> None:
        add, mixture = partial(self.scores.add, "home"), self._assembled("home")
        add("true labels given", lambda: self._true_labels(mixture), only=(SPLICED,))
        models = list(mixture.candidates)
        add(
            "output ensemble of modules, equal hearing", lambda: baselines.Ensemble(models, mixture.router, counts=True)
        )
        add("output ensemble of modules, even prior", lambda: baselines.Ensemble(models, mixture.router))
        add("soup of modules", lambda: baselines.soup(models[1:]))
        for router in ("ridge", "uniform"):
            add(f"{router} router", lambda router=router: self._mixture(self._modules("home"), router))
        for domain in self.settings.group("home"):
            add(
                "oracle: constant gates fitted on tune",
                lambda domain=domain: self._oracle(mixture, domain),
                only=(domain,),
            )

    def _union(self) -> None:
        self.scores.add("home", "union", lambda: self._recipe("union"))
        self.scores.add("home", "union with a head of its own", lambda: self._recipe("union-head"))

    def _group(self, group: str) -> None:
        self._assembled(group)
        self.scores.add(group, "union", lambda: self._recipe(f"union-{group}"))

    def _controls(self) -> None:
        splits = self.runs.train_splits()
        add = partial(self.scores.add, "home")
        add("modules on random splits, assembled", lambda: self._mixture(splits))
        add("upcycled mixture, trained jointly", lambda: self._recipe("upcycled"))

    def _attention(self) -> None:
        folders = [self.runs.published(f"attention-{domain}") for domain in self.settings.group("home")]
        mixture = self._mixture(folders)
        for top_k in (0, 1):
            name = "modules with attention, assembled" + (f", top-{top_k}" if top_k else "")
            make = lambda top_k=top_k: baselines.with_router(mixture, mixture.router, top_k)  # noqa: E731
            self.scores.add("home", name, make)
        ensemble = lambda: baselines.Ensemble(list(mixture.candidates), mixture.router, counts=True)  # noqa: E731
        self.scores.add("home", "output ensemble of modules with attention, equal hearing", ensemble)

    def _branches(self) -> None:
        router = self._mixture(self._modules("home")).router
        domains = sorted(self.settings.group("home"))  # in the router's order
        models = [self.scores.trunk, *(self._recipe(f"branch-{domain}") for domain in domains)]
        add, name = partial(self.scores.add, "home"), "output ensemble of whole models"
        add(f"{name}, equal hearing", lambda: baselines.Ensemble(models, router, counts=True))
        add(f"{name}, even prior", lambda: baselines.Ensemble(models, router))
        add("soup of whole models", lambda: baselines.soup(models[1:]))

    def _experts(self, kind: str) -> None:
        prefix = kind.replace("+", "-")
        name = "FlexOlmo's recipe" + (" with heads" if kind != "expert" else "")
        folders = [self.runs.published(f"{prefix}-{domain}") for domain in self.settings.group("home")]
        mixture = self._mixture(folders, "learned")
        for top_k in (0, 2):
            row = name + (f", top-{top_k}" if top_k else "")
            make = lambda top_k=top_k: baselines.with_router(mixture, mixture.router, top_k)  # noqa: E731
            self.scores.add("home", row, make)

    def _original(self) -> None:
        """Two rows of the seed that searched the rates."""
        folders = self.runs.train_original()
        self.runs.train_dense()
        self.scores.add("home", "the original system, top-2", lambda: self._drawn(folders))
        dense = self.runs.folder / "dense" / "trunk"
        self.scores.add("home", "one dense model from scratch", lambda: self.scores.model(dense))

    def _drawn(self, folders: list[Path]) -> Mixture:
        mixture = self._mixture(folders, "uniform", self.runs.fresh())
        config = mixture.config
        router = baselines.DrawnRouter(config.num_hidden_layers, config.hidden_size, len(folders), self.runs.seed)
        return baselines.with_router(mixture, router, 2)

    def _true_labels(self, mixture: Mixture) -> Any:
        """The assembled model that uses, for each domain, the candidate that is best for it on tune."""
        scores, home = self.scores, self.settings.group("home")
        stores = [
            texts.scored_stores(self.runs.source(d, "test"), scores.tokenizer, scores.settings, 1.0) for d in home
        ]
        _, labels = texts.spliced(stores, scores.trunk.config.max_position_embeddings, SPLICE)
        names = ["trunk", *(f"module {name}" for name in mixture.names[1:])]
        best = [min(range(len(names)), key=lambda e: scores.loss("home", names[e], "tune", d)) for d in home]
        return baselines.TrueLabels(mixture, best, torch.from_numpy(labels))

    def _oracle(self, mixture: Mixture, domain: str) -> Mixture:
        pieces = self.scores.sample("home", domain, ORACLE_TOKENS)

        def loss(model: Mixture) -> float:
            nats, tokens = by_document(model, pieces, self.settings.device)
            return sum(nats) / sum(tokens)

        gates = baselines.constant_gates(mixture, loss)
        print(f"constant gates on {domain}: {[f'{gate:.2f}' for gate in gates.tolist()]}", flush=True)
        return baselines.with_router(mixture, baselines.FixedGates(gates))


def write_report(settings: Settings) -> str:
    """table.md and chart.svg of the rows so far."""
    rates = Rates(settings.output_dir / "rates.json", settings.rates, settings.extensions)
    seeds: dict[int, list[Row]] = {}
    for path in sorted(settings.output_dir.glob("seed-*/rows.json")):
        seeds[int(path.parent.name.removeprefix("seed-"))] = read_rows(path)
    table, shown = report(seeds)
    text = f"{table}\n## Rates\n\n{rates.table()}"
    write_text(settings.output_dir / "table.md", text)
    write_text(settings.output_dir / "chart.svg", draw(shown))
    return text


def main(settings: Settings) -> None:
    settings = settings.chosen()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    torch.set_num_threads(1)
    started = time.monotonic()
    training, domains = settings.output_dir / "data", [domain for group in GROUPS for domain in settings.group(group)]
    export_training(training, settings.group("home"))
    export_texts(settings.output_dir / "texts", training, domains, settings.scored)
    documents.cache_clear()  # 60 MB
    rates = Rates(settings.output_dir / "rates.json", settings.rates, settings.extensions)
    for number in settings.seeds:
        Seed(settings, number, rates).finish()
        print(write_report(settings), flush=True)
    print(f"{(time.monotonic() - started) / 60:.0f} minutes in this process")


if __name__ == "__main__":
    os.chdir(ROOT)
    main(tyro.cli(Settings, description=__doc__))
