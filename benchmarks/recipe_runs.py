"""The training runs of the comparison, by the scripts as users run them: the text and the number of updates of each recipe."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from script_process import launched, run

from forge_common.artifacts import artifact
from forge_common.data import local
from forge_common.files.atomic import publish
from forge_common.model.trunk import Trunk

DOMAINS = ("docs", "python", "cpp", "perl")
MIX = {"docs": 0.76, "python": 0.08, "cpp": 0.08, "perl": 0.08}  # shares of the trunk's text
PARTS = {
    "test": 0.05,
    "tune": 0.10,
    "module": 0.55,
    "trunk": 1.0,
}  # upper ends of the parts, in the hash of a document's content
SCORED = 64  # documents of a domain that are scored, at most
EXCERPT = 3_000  # characters of each, at most: many documents instead of long ones
RATES = {
    "docs": 3e-4,
    "python": 3e-4,
    "cpp": 3e-3,
    "perl": 3e-3,
}  # second rate of each module, besides --module-lr; the better one on tune is used
CONFIG = Path("accelerate_configs/cpu.yaml")


@dataclass(frozen=True)
class Settings:
    output_dir: Path = Path("runs/compare")
    seeds: tuple[int, ...] = (1, 2)
    """Seeds of the trunk, the modules and the order of the data; one process each."""
    vocabulary: int = 2048
    sequence_length: int = 256
    batch_size: int = 16
    """Windows in an update: 4,096 tokens."""
    trunk_steps: int = 1_840
    """Updates of the trunk: 7.5 M tokens."""
    short_steps: int = 500
    """Updates of a second, shorter trunk: 2 M tokens."""
    module_steps: int = 100
    """Updates of a module: 0.41 M tokens."""
    trunk_lr: float = 3e-3
    module_lr: float = 1e-3
    whole_lrs: tuple[float, ...] = (1e-3, 3e-4, 3e-3)
    """Rates of the union; the best one on tune is used."""
    worker: int = 0
    """Internal: the seed that this process works on; 0: start the workers."""


def export(folder: Path) -> None:
    """Writes each domain's documents into one file per part; no document is in two of them."""

    def write(temp_dir: Path) -> None:
        for domain in DOMAINS:
            lines: dict[str, list[str]] = {part: [] for part in PARTS}
            for document in local.documents(domain):
                place = int.from_bytes(document.digest[:8], "big") / 2**64
                part = next(part for part, end in PARTS.items() if place < end)
                text = "".join(document.pieces)
                if part in ("test", "tune"):
                    if len(lines[part]) == SCORED:
                        continue
                    if len(text) > EXCERPT:
                        text = text[: text.rfind("\n", 0, EXCERPT) + 1] or text[:EXCERPT]
                lines[part].append(json.dumps({"text": text}) + "\n")
            for part, rows in lines.items():
                (temp_dir / f"{domain}.{part}.jsonl").write_text("".join(rows), encoding="utf-8")

    def read_back(temp_dir: Path) -> None:
        for path in temp_dir.iterdir():
            for line in path.read_text(encoding="utf-8").splitlines():
                json.loads(line)

    if not folder.exists():
        publish(folder, write, read_back)


class Runs:
    """The training runs of one seed, each in a folder that is not changed once it is published."""

    def __init__(self, settings: Settings, seed: int):
        self.settings, self.seed = settings, seed
        self.folder = settings.output_dir / f"seed-{seed}"
        self.data = settings.output_dir / "data"

    def source(self, domain: str, part: str = "module") -> str:
        return str(self.data / f"{domain}.{part}.jsonl")

    def _run(self, script: str, name: str, published: str, *flags: object) -> Path:
        s, folder = self.settings, self.folder / name
        if not (folder / published).is_dir():
            started = time.monotonic()
            run(
                launched(CONFIG, script),
                *("--output-dir", folder, "--sequence-length", s.sequence_length, "--seed", self.seed),
                *("--batch-size", s.batch_size, "--micro-batch-size", s.batch_size, "--val-every", 0),
                *("--cache-dir", s.output_dir / "cache", "--tracker", "none", *flags),
                log=folder.with_suffix(".log"),
                threads=1,
            )
            print(f"seed {self.seed}: {name} in {time.monotonic() - started:.0f} s", flush=True)
        return folder / published

    def trunk(self, steps: int, name: str = "trunk") -> Path:
        """From scratch on the trunk's part of the corpora."""
        data = [f"{self.source(domain, 'trunk')}@{share}" for domain, share in MIX.items()]
        flags = ("--val-data", self.source("docs", "tune"), "--warmup-steps", 100)
        return self._scratch(name, steps, data, *flags)

    def _scratch(self, name: str, steps: int, data: list[str], *flags: object, tokenizer: object = "") -> Path:
        shape = ("--preset", "tiny", "--tokenizer", tokenizer or f"train:{self.settings.vocabulary}")
        shape += ("--lr", self.settings.trunk_lr)
        return self._run("train_shared.py", name, "trunk", "--data", *data, *shape, "--steps", steps, *flags)

    def whole(self, name: str, trunk: Path, domains: tuple[str, ...], steps: int, lr: float) -> Path:
        """Continues the trunk, training all parameters."""
        flags = (
            "--trunk-from",
            trunk,
            "--lr",
            lr,
            "--steps",
            steps,
            "--warmup-steps",
            steps // 10,
            "--val-fraction",
            0,
        )
        return self._run("train_shared.py", name, "trunk", "--data", *self.even(domains), *flags)

    def module(
        self, name: str, trunk: Path, domains: tuple[str, ...], *flags: object, steps: int = 0, lr: float = 0
    ) -> Path:
        """A module on the frozen trunk, named after its domain."""
        steps = steps or self.settings.module_steps
        fixed = ("--trunk", trunk, "--name", domains[0], "--steps", steps, "--warmup-steps", steps // 10)
        fixed += (
            "--lr",
            lr or self.settings.module_lr,
            "--val-fraction",
            0,
            "--general-tokens",
            0,
            "--statistics-moments",
        )
        return self._run("train_module.py", name, "module", *fixed, "--data", *self.even(domains), *flags)

    def modules(self, name: str, trunk: Path, *flags: object) -> list[Path]:
        return [self.module(f"{name}-{domain}", trunk, (domain,), *flags) for domain in DOMAINS]

    def even(self, domains: tuple[str, ...]) -> list[str]:
        """Equal tokens of each domain."""
        return [self.source(domain) + ("@1" if len(domains) > 1 else "") for domain in domains]

    def dense(self) -> Path:
        """From scratch on the text of the trunk and all modules together, in the same proportions."""
        s, total = self.settings, self.settings.module_steps * len(DOMAINS)
        data = [f"{self.source(domain, 'trunk')}@{share * s.trunk_steps:.0f}" for domain, share in MIX.items()]
        data += [f"{self.source(domain)}@{s.module_steps}" for domain in DOMAINS]
        tokenizer = self.folder / "trunk" / "trunk"  # the trunk's, so that nats per token are of the same tokens
        flags = ("--val-fraction", 0, "--warmup-steps", 100)
        return self._scratch("dense", s.trunk_steps + total, data, *flags, tokenizer=tokenizer)

    def fresh(self, trunk: Path) -> Path:
        """The trunk with newly initialized feed-forwards, from which the original system's experts start."""
        place = self.folder / "fresh-trunk"
        if not place.is_dir():
            model, tokenizer, _ = artifact.read_trunk(str(trunk))
            torch.manual_seed(self.seed)
            drawn = Trunk(model.config).state_dict()
            tensors = {name: drawn[name] if ".mlp." in name else t for name, t in model.state_dict().items()}
            artifact.write_trunk(place, tensors, model.config, tokenizer, {"kind": "trunk"})
        return place


def train(runs: Runs) -> None:
    """All runs of a seed, those that most rows need first; runs of a single seed come last, divided between the seeds."""
    s = runs.settings
    trunk, steps = runs.trunk(s.trunk_steps), s.module_steps * len(DOMAINS)
    runs.modules("head", trunk)
    for lr in s.whole_lrs:
        runs.whole(f"union-{lr:g}", trunk, DOMAINS, steps, lr)
    for domain, lr in RATES.items():
        runs.module(f"other-{domain}", trunk, (domain,), lr=lr)
    runs.modules("expert", trunk, "--kind", "expert", "--weight-decay", 0)
    for domain in DOMAINS:
        runs.whole(f"branch-{domain}", trunk, (domain,), s.module_steps, s.module_lr)
    runs.modules("original", runs.fresh(trunk), "--kind", "ffn")
    runs.module("union-module", trunk, DOMAINS, steps=steps)
    if runs.seed == s.seeds[0]:
        runs.modules("ffn", trunk, "--kind", "ffn")
        short = runs.trunk(s.short_steps, "short-trunk")
        runs.modules("short-head", short)
        runs.whole("short-union", short, DOMAINS, steps, s.module_lr)
        runs.modules("narrow", trunk, "--kind", "narrow+head")
        runs.modules("lora", trunk, "--kind", "lora+head")
    if runs.seed == s.seeds[-1]:
        runs.dense()
