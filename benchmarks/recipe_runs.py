"""The training runs of the comparison, by the scripts as users run them: the text and the number of updates of each recipe."""

import dataclasses
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import psutil
import recipe_trunks as trunks
import torch
from recipe_flexolmo import ROWS, initial_rows
from recipe_rates import Rates
from recipe_texts import GROUPS, HOME, MIX, SPLITS
from script_process import launched, run

from forge_common import evaluate
from forge_common.artifacts.module_folder import read_module
from forge_common.artifacts.statistics_file import read_statistics
from forge_common.artifacts.trunk_folder import read_trunk, write_trunk
from forge_common.data.readers.document import reading_of
from forge_common.data.store import prepare
from forge_common.data.tokenizer import Tokenizer
from forge_common.data.windows import Tokens
from forge_common.model.trunk import Trunk
from forge_common.routing import statistics

CONFIGS = {"cpu": Path("accelerate_configs/cpu.yaml"), "cuda": Path("accelerate_configs/single_gpu_fp32.yaml")}
TRUNK, MODULE, FLEXOLMO = "train_shared.py", "train_module.py", "benchmarks/recipe_flexolmo.py"
ORIGINAL_LR = 1e-3


@dataclass(frozen=True)
class Settings:
    output_dir: Path = Path("runs/compare")
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Seeds of the trunk, the modules and the order of the data, one after the other."""
    workers: int = 2
    """Training runs at once, of one thread each."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where models are trained and scored, in float32."""
    smoke: bool = False
    """Every step with two domains of a group, one rate and a few updates, into OUTPUT_DIR-smoke: ten minutes of processor time."""
    vocabulary: int = 2048
    sequence_length: int = 256
    batch_size: int = 16
    """Windows in an update: 4,096 tokens."""
    trunk_steps: int = 1_840
    """Updates of the trunk: 7.5 M tokens."""
    module_steps: int = 100
    """Updates of a module: 0.41 M tokens."""
    trunk_lr: float = 3e-3
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 6e-3)
    """Grid of learning rates for every recipe; searched by the first seed, on tune."""
    extensions: int = 4
    """Rates beyond the grid that are tried at most while the best one lies at its edge."""
    scored: int = 64
    """Documents of a domain that are scored at most."""
    domains: int = 4
    """Domains of a group that are used at most."""

    def group(self, name: str) -> tuple[str, ...]:
        return GROUPS[name][: self.domains]

    def chosen(self) -> "Settings":
        """Of --smoke: small sizes."""
        if not self.smoke:
            return self
        small = {"vocabulary": 512, "trunk_steps": 20, "module_steps": 5, "rates": (1e-3,), "extensions": 0}
        small |= {"sequence_length": 64, "batch_size": 4, "seeds": self.seeds[:1], "scored": 6, "domains": 2}
        return dataclasses.replace(self, output_dir=self.output_dir.with_name(self.output_dir.name + "-smoke"), **small)


class Recipe(NamedTuple):
    """A run whose rate is searched. Its folder is NAME-RATE."""

    name: str
    domains: tuple[str, ...]  # on whose tune text the rate is chosen
    train: Callable[[str, float], Path]  # (folder's name, rate) -> what was published


class Runs:
    """The training runs of one seed, each in a folder that is not changed once it is published."""

    def __init__(self, settings: Settings, seed: int, rates: Rates):
        self.settings, self.seed, self.rates = settings, seed, rates
        self.folder = settings.output_dir / f"seed-{seed}"
        self.training = settings.output_dir / "data"
        self.texts = settings.output_dir / "texts"
        self.recipes: dict[str, Recipe] = {}
        self.lock = threading.Lock()  # for what runs of one stage share

    @property
    def trunk(self) -> Path:
        return self.folder / "trunk" / "trunk"

    def source(self, domain: str, part: str) -> str:
        training = domain in HOME and part in ("trunk", "module")
        return str((self.training if training else self.texts) / f"{domain}.{part}.jsonl")

    def run(self, script: str, name: str, *flags: object, variables: dict[str, str] | None = None) -> Path:
        s, folder = self.settings, self.folder / name
        published = folder / ("trunk" if script == TRUNK else "module")
        if not published.is_dir():
            started = time.monotonic()
            run(
                launched(CONFIGS[s.device], script),
                *("--output-dir", folder, "--sequence-length", s.sequence_length, "--seed", self.seed),
                *("--batch-size", s.batch_size, "--micro-batch-size", s.batch_size, "--val-every", 0),
                *("--cache-dir", s.output_dir / "cache", "--tracker", "none", *flags),
                log=self.folder / f"{name}.log",
                threads=1,
                variables=variables,
            )
            print(f"seed {self.seed}: {name} in {time.monotonic() - started:.0f} s", flush=True)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return published

    def all(self, jobs: Iterable[Callable[[], object]]) -> None:
        """Runs the jobs, --workers of them at once; what they started ends with this process."""
        with ThreadPoolExecutor(self.settings.workers) as pool:
            futures = [pool.submit(job) for job in jobs]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                for future in futures:
                    future.cancel()
                for child in psutil.Process().children(recursive=True):
                    child.terminate()
                raise

    # -- trunks --

    def train_trunk(self) -> None:
        """From scratch on the trunk's part of the home domains."""
        data = [f"{self.source(domain, 'trunk')}@{MIX[domain]}" for domain in self.settings.group("home")]
        flags = ("--val-data", self.training / "docs.tune.jsonl", "--warmup-steps", min(100, self.settings.trunk_steps))
        self._scratch("trunk", self.settings.trunk_steps, data, *flags)

    def train_dense(self) -> None:
        """From scratch on the text of the trunk and of the home modules together, in the same proportions."""
        s, home = self.settings, self.settings.group("home")
        data = [f"{self.source(domain, 'trunk')}@{MIX[domain] * s.trunk_steps:.0f}" for domain in home]
        data += [f"{self.source(domain, 'module')}@{s.module_steps}" for domain in home]
        flags = ("--val-fraction", 0, "--warmup-steps", min(100, s.trunk_steps))
        # The trunk's tokenizer, so that nats per token are of the same tokens.
        self._scratch("dense", s.trunk_steps + s.module_steps * len(home), data, *flags, tokenizer=self.trunk)

    def _scratch(self, name: str, steps: int, data: list[str], *flags: object, tokenizer: object = "") -> None:
        shape = ("--preset", "tiny", "--tokenizer", tokenizer or f"train:{self.settings.vocabulary}")
        self.run(TRUNK, name, "--data", *data, *shape, "--lr", self.settings.trunk_lr, "--steps", steps, *flags)

    def derived(self, name: str, change: Callable[[Trunk], Trunk]) -> Path:
        """A changed copy of the trunk, without statistics."""
        place = self.folder / f"{name}-trunk"
        with self.lock:
            if not place.is_dir():
                model, tokenizer, _ = read_trunk(str(self.trunk))
                torch.manual_seed(self.seed)
                model = change(model)
                write_trunk(place, model.state_dict(), model.config, tokenizer, {"kind": "trunk"})
        return place

    def untied(self) -> Path:
        return self.derived("untied", trunks.untied)

    def upcycled(self) -> Path:
        experts = len(self.settings.group("home")) + 1
        return self.derived("upcycled", lambda model: trunks.upcycled(model, experts))

    def fresh(self) -> Path:
        return self.derived("fresh", trunks.fresh)

    # -- recipes --

    def even(self, domains: tuple[str, ...], part: str = "module") -> list[str]:
        """Equal tokens of each domain."""
        return [self.source(domain, part) + ("@1" if len(domains) > 1 else "") for domain in domains]

    def whole(self, name: str, domains: tuple[str, ...], trunk: Callable[[], Path] | None = None) -> Recipe:
        """Continues the trunk, or a copy, training all parameters on as many tokens as a module for each domain has."""
        steps = self.settings.module_steps * len(domains)

        def train(folder: str, lr: float) -> Path:
            flags = ("--lr", lr, "--steps", steps, "--warmup-steps", steps // 10, "--val-fraction", 0)
            start = trunk() if trunk else self.trunk
            return self.run(TRUNK, folder, "--trunk-from", start, *flags, "--data", *self.even(domains))

        return self._add(Recipe(name, domains, train))

    def module(self, name: str, domain: str, *flags: object) -> Recipe:
        """A module on the frozen trunk, named after its domain."""
        data = self.even((domain,))
        return self._add(
            Recipe(name, (domain,), lambda folder, lr: self.train_module(folder, domain, lr, data, *flags))
        )

    def train_module(
        self,
        folder: str,
        name: str,
        lr: float,
        data: list[str],
        *flags: object,
        trunk: Path | None = None,
        script: str = MODULE,
        variables: dict[str, str] | None = None,
    ) -> Path:
        steps = self.settings.module_steps
        fixed = ("--trunk", trunk or self.trunk, "--name", name, "--steps", steps, "--warmup-steps", steps // 10)
        fixed += ("--lr", lr, "--val-fraction", 0, "--general-tokens", 0, "--statistics-moments", "--data", *data)
        return self.run(script, folder, *fixed, *flags, variables=variables)

    def split(self, number: int) -> Recipe:
        """A module on a random part of the union's text, equal tokens of each home domain. The rate is that of part 0."""
        home = self.settings.group("home")
        data = self.even(home, f"split-{number}")
        return self._add(
            Recipe(f"split-{number}", home, lambda folder, lr: self.train_module(folder, f"split-{number}", lr, data))
        )

    def expert(self, domain: str, kind: str) -> Recipe:
        """FlexOlmo's recipe, or with a head of its own: the rows of the router start from embeddings of the two texts."""

        def train(folder: str, lr: float) -> Path:
            flags = ("--kind", kind, "--weight-decay", 0)
            variables = {ROWS: str(self.rows(domain).resolve())}
            data = self.even((domain,))
            return self.train_module(folder, domain, lr, data, *flags, script=FLEXOLMO, variables=variables)

        return self._add(Recipe(f"{kind.replace('+', '-')}-{domain}", (domain,), train))

    def rows(self, domain: str) -> Path:
        """The file with the initial rows of a domain's expert: from its module's moments and those of the trunk's text."""
        path = self.folder / f"rows-{domain}.npy"
        with self.lock:
            if not path.exists():
                trunk, tokenizer, metadata = read_trunk(str(self.trunk))
                module = self.published(f"head-{domain}")
                own = read_statistics(module, read_module(module, metadata)[1], trunk.config)
                assert own is not None
                stores = [(self._store(home, tokenizer), MIX[home]) for home in self.settings.group("home")]
                sample = statistics.sample(stores, statistics.MOMENT_TOKENS)
                length, device = self.settings.sequence_length, torch.device("cpu")
                broad = statistics.moments(trunk.config, trunk.state_dict(), sample, length, device)
                np.save(path, initial_rows(own["first"].float().numpy(), broad["first"].float().numpy()))
        return path

    def _store(self, domain: str, tokenizer: Tokenizer) -> Tokens:
        settings = evaluate.Settings("", (), cache_dir=self.settings.output_dir / "cache")
        source = self.source(domain, "trunk")
        return prepare(source, tokenizer, reading_of(settings), cache_dir=settings.cache_dir, val_fraction=0.0).train

    def _add(self, recipe: Recipe) -> Recipe:
        self.recipes[recipe.name] = recipe
        return recipe

    def stages(self) -> list[list[Recipe]]:
        """The recipes whose rates are searched, those that most rows need first. The other splits use the first one's rate."""
        home, unseen, pair = (self.settings.group(name) for name in GROUPS)
        return [
            [self.module(f"head-{domain}", domain) for domain in home],
            [self.whole("union", home), self.whole("union-head", home, self.untied)],
            [*(self.module(f"head-{domain}", domain) for domain in unseen), self.whole("union-unseen", unseen)],
            [*(self.module(f"head-{domain}", domain) for domain in pair), self.whole("union-pair", pair)],
            [self.split(0), self.whole("upcycled", home, self.upcycled)],
            [self.module(f"attention-{domain}", domain, "--kind", "attention+ffn+head") for domain in home],
            [self.whole(f"branch-{domain}", (domain,)) for domain in home],
            [self.expert(domain, "expert") for domain in home],
            [self.expert(domain, "expert+head") for domain in home],
        ]

    def train(self, recipe: str, lr: float) -> Path:
        return self.recipes[recipe].train(f"{recipe}-{lr:g}", lr)

    def published(self, recipe: str) -> Path:
        """What the recipe published at its best rate."""
        folder = self.folder / f"{recipe}-{self.rates.best(recipe):g}"
        return next(path for path in (folder / "module", folder / "trunk") if path.is_dir())

    def train_splits(self) -> list[Path]:
        """The modules on random parts of the text."""
        lr = self.rates.best("split-0")
        splits = [self.split(number) for number in range(min(SPLITS, len(self.settings.group("home"))))]
        self.all([lambda recipe=recipe: self.train(recipe.name, lr) for recipe in splits])
        return [self.folder / f"{recipe.name}-{lr:g}" / "module" for recipe in splits]

    def train_original(self) -> list[Path]:
        """The original system's experts: new feed-forwards on a frozen trunk that has new feed-forwards too."""
        trunk = self.fresh()
        names = {domain: f"original-{domain}" for domain in self.settings.group("home")}
        job = lambda domain: self.train_module(  # noqa: E731
            names[domain], domain, ORIGINAL_LR, self.even((domain,)), "--kind", "ffn", trunk=trunk
        )
        self.all([lambda domain=domain: job(domain) for domain in names])
        return [self.folder / name / "module" for name in names.values()]
