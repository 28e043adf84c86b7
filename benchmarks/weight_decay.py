"""Where shall weight decay pull a module's copies of the trunk's weights: to zero, nowhere, or to the trunk?

    python benchmarks/weight_decay.py

Trains a trunk of 0.2 M parameters, mostly on local:docs, and modules of kind ffn+head for local:python and local:cpp by
train_module.py, for each seed and variant: AdamW's decay to zero, none, and the same decay to the weights that the
module started with (a copy of the script, with a hook before each step). Decay 0.9 shrinks in 150 updates as much as
0.1 does in 1,350. Prints the held-out losses of the module's own domain and of the trunk's, and the size of the change
relative to the trunk's weights. About five minutes on one core; the same command continues an interrupted run. Each run
is a fork of this process, which saves the time to import the libraries.
"""

import json
import multiprocessing
import os
import random
import runpy
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}  # before torch is loaded: one thread can be forked

import torch._dynamo  # noqa: F401 (torch.optim imports it at the first step)
import tyro
from safetensors.torch import load_file
from script_process import ROOT

sys.path.insert(0, str(ROOT))

from forge_common.data import local
from forge_common.files.atomic import publish, write_json

DOMAINS = ("python", "cpp")
CHARACTERS = {"docs": 4_000_000, "python": 1_000_000, "cpp": 1_000_000}
SHAPE = ("--hidden-size", 64, "--intermediate-size", 192, "--num-hidden-layers", 2, "--num-attention-heads", 4)
SHAPE += ("--num-key-value-heads", 2, "--tokenizer", "train:1024")
SIZES = ("--sequence-length", 128, "--batch-size", 8, "--micro-batch-size", 8, "--val-fraction", 0.05)
SIZES += ("--val-every", 0)
SIZES += ("--save-every", 0, "--log-every", 50, "--tracker", "none", "--statistics-tokens", 1000)
VARIANTS = {  # where it pulls -> the values of --weight-decay
    "nowhere": (0.0,),
    "to zero": (0.1, 0.9),
    "to the trunk": (0.1, 0.9),
}
BEFORE = "    show(accelerator, settings, plan("
PULL = """\
    pulled = [(p, p.detach().clone()) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]]
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0

    def pull(optimizer, *_):
        for parameter, start in pulled:
            parameter.data.lerp_(start, optimizer.param_groups[0]["lr"] * settings.weight_decay)

    optimizer.register_step_pre_hook(pull)
"""


@dataclass(frozen=True)
class Settings:
    output_dir: Path = Path("runs/weight_decay")
    seeds: tuple[int, ...] = (1, 2)
    trunk_steps: int = 400
    module_steps: int = 150


def main(settings: Settings) -> None:
    folder = settings.output_dir.absolute()
    if not (folder / "text").exists():
        publish(folder / "text", write_texts, read_texts)
    script = (ROOT / "train_module.py").read_text(encoding="utf-8")
    if script.count(BEFORE) != 1:
        raise SystemExit(f"train_module.py does not have {BEFORE!r} once. Change BEFORE.")
    to_trunk = folder / "train_module_to_the_trunk.py"
    to_trunk.write_text(script.replace(BEFORE, PULL + BEFORE), encoding="utf-8")
    rows = []
    for seed in settings.seeds:
        trunk = trained(
            settings, folder / f"trunk-{seed}", "trunk", ROOT / "train_shared.py", *trunk_flags(settings, seed)
        )
        for domain in DOMAINS:
            for pull, values in VARIANTS.items():
                for decay in values:
                    name = f"{domain}-{seed}-{pull.replace(' ', '-')}-{decay}"
                    flags = ("--trunk", trunk, "--name", domain, "--data", text(folder, domain), "--seed", seed)
                    flags += ("--general-data", text(folder, "docs"), "--weight-decay", decay)
                    flags += ("--steps", settings.module_steps, "--warmup-steps", settings.module_steps // 10)
                    source = to_trunk if pull == "to the trunk" else ROOT / "train_module.py"
                    module = trained(settings, folder / name, "module", source, *flags)
                    losses = json.loads((module / "module.json").read_text(encoding="utf-8"))["losses"]
                    rows.append(
                        {"seed": seed, "domain": domain, "pull": pull, "decay": decay, "change": change(trunk, module)}
                        | {f"{which}_{when}": losses[which][when] for which in losses for when in ("before", "after")}
                    )
    write_json(folder / "losses.json", {"rows": rows})
    print(table(rows))


def text(folder: Path, domain: str) -> Path:
    return folder / "text" / f"{domain}.jsonl"


def write_texts(folder: Path) -> None:
    """Documents of each corpus, drawn at random, up to its number of characters."""
    for domain, characters in CHARACTERS.items():
        documents = list(local.documents(domain))  # in the order of their digests, which decide what is held out
        random.Random(0).shuffle(documents)
        with open(folder / f"{domain}.jsonl", "w", encoding="utf-8") as file:
            for document in documents:
                content = "".join(document.pieces)
                characters -= len(content)
                if characters < 0:
                    break
                file.write(json.dumps({"text": content}) + "\n")


def read_texts(folder: Path) -> None:
    for domain in CHARACTERS:
        json.loads((folder / f"{domain}.jsonl").read_text(encoding="utf-8").splitlines()[-1])


def trunk_flags(settings: Settings, seed: int) -> tuple[object, ...]:
    folder = settings.output_dir.absolute()
    data = [f"{text(folder, domain)}@{share}" for domain, share in (("docs", 0.8), ("python", 0.1), ("cpp", 0.1))]
    flags = ("--data", *data, *SHAPE, "--lr", 3e-3, "--seed", seed)
    return (*flags, "--steps", settings.trunk_steps, "--warmup-steps", settings.trunk_steps // 10)


def trained(settings: Settings, folder: Path, published: str, script: Path, *flags: object) -> Path:
    """The published folder of a run of `script`, which is started unless it has ended before."""
    if not (folder / published).exists():
        more = (*SIZES, "--output-dir", folder, "--cache-dir", settings.output_dir.absolute() / "cache")
        argv = [str(script), *map(str, (*flags, *more))]
        log = folder.with_name(f"{folder.name}.log")
        process = multiprocessing.get_context("fork").Process(target=run, args=(argv, log))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"exit code {process.exitcode}; see {log}")
        print(f"trained     {folder.name}", flush=True)
    return folder / published


def run(argv: list[str], log: Path) -> None:
    """Runs a script in this process, its output into `log`."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def change(trunk: Path, module: Path) -> float:
    """The norm of what the module changed, relative to that of the weights that it started with."""
    before = load_file(trunk / "model.safetensors")
    before.setdefault("lm_head.weight", before["model.embed_tokens.weight"])
    after = load_file(module / "module.safetensors")
    moved = sum(float((tensor - before[name]).square().sum()) for name, tensor in after.items())
    return (moved / sum(float(before[name].square().sum()) for name in after)) ** 0.5


def table(rows: list[dict[str, Any]]) -> str:
    """For each variant the means over seeds; beside the losses how much they differ from those without decay, for each seed."""
    lines = [f"{'decay':<18}{'domain':<8}{'own':>8}{'- none':>20}{'general':>10}{'- none':>20}{'change':>8}"]
    for domain in DOMAINS:
        none = {row["seed"]: row for row in rows if (row["domain"], row["pull"]) == (domain, "nowhere")}
        trunk = {
            which: statistics.mean(row[f"{which}_before"] for row in none.values()) for which in ("own", "general")
        }
        lines.append(f"{'(the trunk)':<18}{domain:<8}{trunk['own']:8.4f}{'':>20}{trunk['general']:10.4f}")
        for pull, values in VARIANTS.items():
            for decay in values:
                of = [row for row in rows if (row["domain"], row["pull"], row["decay"]) == (domain, pull, decay)]
                line = f"{f'{pull} {decay}':<18}{domain:<8}"
                for which, width in (("own_after", 8), ("general_after", 10)):
                    apart = ", ".join(f"{row[which] - none[row['seed']][which]:+.4f}" for row in of)
                    line += f"{statistics.mean(row[which] for row in of):{width}.4f}{apart:>20}"
                lines.append(f"{line}{statistics.mean(row['change'] for row in of):8.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
