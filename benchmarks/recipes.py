"""The comparison of recipes: assembled modules, whole models, merges, ensembles and other routers.

    python benchmarks/recipes.py [--seeds 1 2]

Four local corpora are divided by the hash of each document into the trunk's text, the modules' text, the text that settings
are selected on (tune) and the text that is reported (test). Every recipe gets the same trunk and the same number of tokens, by
the scripts as users run them; one process with one thread per seed. Every run and every row is kept in OUTPUT_DIR: the same
command continues where it was interrupted, an interrupted run from its last checkpoint. It writes table.md and chart.svg there.
"""

import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import torch
import tyro
from script_process import BIN, ROOT

sys.path.insert(0, str(ROOT))

import recipe_baselines as baselines
from recipe_runs import DOMAINS, Runs, Settings, export, train
from recipe_table import report

from forge_common import assemble as assembling
from forge_common import evaluate
from forge_common.artifacts import artifact, assembled
from forge_common.evaluation import columns as texts
from forge_common.evaluation.chart import draw
from forge_common.files.atomic import write_json
from forge_common.model.trunk import Trunk

SPLICE = 64  # tokens between two changes of domain in the spliced texts


class Scores:
    """The rows of one seed: one per model, part (tune or test) and domain, written to rows.json as soon as they are computed."""

    def __init__(self, runs: Runs, trunk: Path):
        self.runs, self.file = runs, runs.folder / "rows.json"
        self.rows = json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else []
        self.settings = evaluate.Settings("", (), cache_dir=runs.settings.output_dir / "cache", spliced=SPLICE)
        self.trunk, self.tokenizer, self.metadata = artifact.read_trunk(str(trunk))
        self.trunk.eval()
        self._columns: dict[str, dict[str, texts.Column]] = {}

    def columns(self, part: str) -> dict[str, texts.Column]:
        if part not in self._columns:
            sources = {domain: self.runs.source(domain, part) for domain in DOMAINS}
            self._columns[part] = texts.read_columns(sources, self.tokenizer, self.trunk.config, self.settings)
        return self._columns[part]

    def add(self, name: str, make: Callable[[], Any], part: str = "test", only: tuple[str, ...] = ()) -> None:
        """Scores the model that make() returns on each column of the part, unless that was done before."""
        if any((row["model"], row["part"]) == (name, part) for row in self.rows):
            return
        model, started = make(), time.monotonic()
        for domain, column in self.columns(part).items():
            if not only or domain in only:
                row = evaluate.score(model, column, self.settings, "cpu")
                self.rows.append({"seed": self.runs.seed, "model": name, "part": part, "domain": domain, **row})
        write_json(self.file, self.rows)
        print(
            f"seed {self.runs.seed}: {name} ({part}) {macro(self.rows, name, part):.4f} in {time.monotonic() - started:.0f} s",
            flush=True,
        )

    def whole(self, name: str, lr_of: list[str]) -> None:
        """Scores on test, under `name`, the run among lr_of that is best on tune."""
        for tried in lr_of:
            self.add(tried, lambda tried=tried: model_of(self.runs.folder / tried / "trunk"), "tune")
        best = min(lr_of, key=lambda tried: macro(self.rows, tried, "tune"))
        self.add(name, lambda: model_of(self.runs.folder / best / "trunk"))

    def better(self, domain: str) -> str:
        """Of a domain's two modules (two rates), the one that is better on the domain's tune text."""
        trunk = str(self.runs.folder / "trunk" / "trunk")
        tried = [f"{rate}-{domain}" for rate in ("head", "other")]
        for name in tried:
            place = self.runs.folder / name / "module"
            self.add(name, lambda place=place: artifact.read_model(trunk, place)[0].eval(), "tune", only=(domain,))
        return min(tried, key=lambda name: self.loss(name, "tune", domain))

    def loss(self, name: str, part: str, domain: str) -> float:
        return next(
            row["loss"] for row in self.rows if (row["model"], row["part"], row["domain"]) == (name, part, domain)
        )


def macro(rows: list[dict[str, Any]], name: str, part: str = "test") -> float:
    """The mean over the domains of a model's loss."""
    losses = [row["loss"] for row in rows if (row["model"], row["part"]) == (name, part) and row["domain"] in DOMAINS]
    return sum(losses) / len(losses) if losses else float("nan")


def model_of(folder: Path) -> Any:
    return artifact.read_trunk(str(folder))[0].eval()


def assemble(
    scores: Scores,
    name: str,
    trunk: Path,
    modules: list[str],
    router: Literal["context", "learned", "uniform"] = "context",
) -> Path:
    """The assembled folder of some of a seed's runs."""
    folder = scores.runs.folder
    if not (folder / name).exists():
        places = tuple(folder / module / "module" for module in modules)
        line = assembling.Settings(str(trunk), places, folder / name, router=router)
        assembling.main(line)
    return folder / name


def score(runs: Runs) -> None:
    """All rows of a seed."""
    folder = runs.folder
    trunk = folder / "trunk" / "trunk"
    scores = Scores(runs, trunk)
    for part in ("tune", "test"):
        scores.add("trunk", lambda: scores.trunk, part)
    ours = assemble(scores, "assembled", trunk, [scores.better(domain) for domain in DOMAINS])
    _assembled(scores, ours, "", routers=True)
    heads = assembled.read_assembled(str(ours))[0].eval()
    candidates = cast(list[Trunk], list(heads.candidates))
    routing_share(scores, heads)
    scores.add("true labels given", lambda: _true_labels(scores, heads), only=("spliced",))
    scores.add("output ensemble of modules", lambda: baselines.Ensemble(candidates, heads.router))
    scores.add("soup of modules", lambda: baselines.soup(candidates[1:]))
    for domain in DOMAINS:
        without = lambda domain=domain: assembled.read_assembled(str(ours), without=(domain,))[0].eval()  # noqa: E731
        scores.add(f"without {domain}", without)
    scores.whole("union", [f"union-{lr:g}" for lr in runs.settings.whole_lrs])
    union = folder / "union-module" / "module"
    scores.add("union, one module", lambda: artifact.read_model(str(trunk), union)[0].eval())
    branches = [f"branch-{domain}" for domain in DOMAINS]
    whole = [scores.trunk, *(model_of(folder / branch / "trunk") for branch in branches)]
    scores.add("output ensemble of whole models", lambda: baselines.Ensemble(whole[1:], heads.router))
    scores.add("soup of whole models", lambda: baselines.soup(whole[1:]))
    experts = assemble(scores, "flexolmo", trunk, [f"expert-{domain}" for domain in DOMAINS], "learned")
    for top_k in (0, 2):
        name = "FlexOlmo's recipe" + (", top-2" if top_k else "")
        scores.add(name, lambda top_k=top_k: assembled.read_assembled(str(experts), top_k=top_k)[0].eval())
    original = assemble(
        scores, "original", folder / "fresh-trunk", [f"original-{domain}" for domain in DOMAINS], "uniform"
    )
    scores.add("the original system, top-2", lambda: _drawn(original, runs.seed))
    for kind in ("ffn", "narrow", "lora"):
        if (folder / f"{kind}-{DOMAINS[0]}" / "module").is_dir():
            place = assemble(scores, f"assembled-{kind}", trunk, [f"{kind}-{domain}" for domain in DOMAINS])
            _assembled(scores, place, f" ({kind})", routers=False)
    if (folder / "short-trunk" / "trunk").is_dir():
        place = assemble(
            scores, "assembled-short", folder / "short-trunk" / "trunk", [f"short-head-{domain}" for domain in DOMAINS]
        )
        for part in ("tune", "test"):
            scores.add("trunk (short)", lambda: model_of(folder / "short-trunk" / "trunk"), part)
        _assembled(scores, place, " (short)", routers=False)
        scores.add("union (short)", lambda: model_of(folder / "short-union" / "trunk"))
    if (folder / "dense" / "trunk").is_dir():
        scores.add("one dense model from scratch", lambda: model_of(folder / "dense" / "trunk"))


def _assembled(scores: Scores, place: Path, suffix: str, *, routers: bool) -> None:
    """The rows of an assembled model: each module alone and the whole, with each router."""
    model, _, metadata = assembled.read_assembled(str(place))
    model.eval()
    for part in ("tune", "test"):
        for name, candidate in zip(model.names[1:], list(model.candidates)[1:], strict=True):
            scores.add(f"module {name}{suffix}", lambda candidate=candidate: candidate, part)
    router_of_model = model.router
    for top_k in (0, 2, 1) if routers else (0, 1):
        scores.add(
            "assembled" + (f", top-{top_k}" if top_k else "") + suffix,
            lambda top_k=top_k: _with(model, router_of_model, top_k),
        )
    if routers:
        for router in ("ridge", "uniform"):
            parts = assembled.read_parts(
                scores.trunk, scores.metadata, [place / "modules" / name for name in metadata["modules"]]
            )
            solved = assembled.route(scores.trunk, None, parts, metadata | {"router": router})
            scores.add(f"{router} router", lambda solved=solved: _with(model, solved, 0))


def routing_share(scores: Scores, model: Any) -> None:
    """The share of a scoring pass's processor time that the router takes, the smallest of five; kept in routing.json."""
    place = scores.runs.folder / "routing.json"
    if place.exists():
        return
    pieces = scores.columns("test")[DOMAINS[0]].pieces[-scores.settings.batch_size :]  # the longest windows
    tokens = torch.stack([torch.from_numpy(piece.tokens()) for piece in pieces])
    before = torch.stack([torch.from_numpy(piece.before()) for piece in pieces])
    router, spent, shares = model.router, [0.0], []

    def timed(function: Callable) -> Callable:
        def call(*arguments):
            started = time.process_time()
            result = function(*arguments)
            spent[0] += time.process_time() - started
            return result

        return call

    model.router = copy.copy(router)
    model.router.route, model.router.weigh = timed(router.route), timed(router.weigh)
    for _ in range(5):
        spent[0], started = 0.0, time.process_time()
        model.nats(tokens, before)
        shares.append(spent[0] / (time.process_time() - started))
    model.router = router
    write_json(place, {"share": min(shares), "all": shares, "tokens": tokens.numel(), "before": before.numel()})
    print(f"seed {scores.runs.seed}: routing takes {min(shares):.1%} of a pass", flush=True)


def _with(model: Any, router: Any, top_k: int) -> Any:
    model.router, model.top_k = router, top_k
    return model


def _drawn(place: Path, seed: int) -> Any:
    model = assembled.read_assembled(str(place), top_k=2)[0].eval()
    config = model.config
    model.router = baselines.DrawnRouter(config.num_hidden_layers, config.hidden_size, len(model.names) - 1, seed)
    return model


def _true_labels(scores: Scores, model: Any) -> Any:
    """The assembled model that uses, for each domain, the candidate that is best for it on tune."""
    stores = [texts.held_out(scores.runs.source(d, "test"), scores.tokenizer, scores.settings, 1.0) for d in DOMAINS]
    _, labels = texts.spliced(stores, scores.trunk.config.max_position_embeddings, SPLICE)
    names = ["trunk", *(f"module {name}" for name in model.names[1:])]
    best = [min(range(len(names)), key=lambda e: scores.loss(names[e], "tune", domain)) for domain in DOMAINS]
    return baselines.TrueLabels(model, best, torch.from_numpy(labels))


def main(settings: Settings) -> None:
    if settings.worker:
        runs = Runs(settings, settings.worker)
        train(runs)
        score(runs)
        return
    started = time.monotonic()
    export(settings.output_dir / "data")
    line = [str(BIN / "python"), __file__, *sys.argv[1:], "--worker"]
    workers = [
        subprocess.Popen([*line, str(seed)], env=os.environ | {"OMP_NUM_THREADS": "1"}) for seed in settings.seeds
    ]
    try:
        codes = [worker.wait() for worker in workers]
    finally:
        for worker in workers:
            worker.terminate()
    if any(codes):
        raise SystemExit("a worker failed. Run the same command to continue.")
    seeds = [settings.output_dir / f"seed-{seed}" / "rows.json" for seed in settings.seeds]
    table, shown = report([json.loads(path.read_text(encoding="utf-8")) for path in seeds])
    (settings.output_dir / "table.md").write_text(table, encoding="utf-8")
    (settings.output_dir / "chart.svg").write_text(draw(shown), encoding="utf-8")
    print(table)
    print(f"{(time.monotonic() - started) / 60:.0f} minutes in this process")


if __name__ == "__main__":
    os.chdir(ROOT)
    main(tyro.cli(Settings, description=__doc__))
