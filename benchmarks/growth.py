"""How cost grows: curves over context, width, layers, vocabulary, batch, experts, text and modules, beside theory.

    python benchmarks/growth.py [--rounds 2] [--only context experts] [--megabytes 1000] [--small]
    python benchmarks/growth.py --show     (the tables of what was measured, in Markdown)

docs/GROWTH.md says what is measured and how. Each measurement is a new process of the scripts and commands; the rounds
repeat the whole list. Everything measured is kept in OUTPUT_DIR/growth.json: the same command continues an interrupted
measurement. It ends with the tables, what is more than 15% from its line, and OUTPUT_DIR/growth.svg.
"""

import hashlib
import json
import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peers
import tyro
from growth_curves import Point, base, curves, name_of
from peers import MODEL, MODULE, SHARED, UPDATE, flags_of, training
from script_process import BIN, ROOT, THREADS, rows, run, speed

sys.path.insert(0, str(ROOT))

from forge_common.files.atomic import write_json

MODULES = "benchmarks/growth_modules.py"
ON_CPU = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no"}
TEXT_FOLDERS = ("/usr", sys.base_prefix, sysconfig.get_path("purelib"))
TEXT_SUFFIXES = (".py", ".md", ".txt", ".rst", ".html", ".xml", ".c", ".h", ".cc", ".cpp", ".js", ".tex")
TEXT_SIZES = range(200, 1 << 20)  # bytes of a file
SCORED = 4096  # tokens that an assembled model scores


@dataclass(frozen=True)
class Settings:
    output_dir: Path = Path("runs/growth")
    rounds: int = 1
    """Measurements of each point."""
    only: tuple[str, ...] = ()
    """Curves to measure, such as context or "MB of text", or points such as "context 1024"; none: all."""
    megabytes: int = 100
    """The largest text, in MB: 1000 takes ten minutes more."""
    small: bool = False
    """A tiny model and two points a curve, to test the benchmark; use another --output-dir."""
    show: bool = False
    """Measure nothing, print the tables in Markdown."""
    threads: int = THREADS
    """Threads of a process."""
    data: str = "local:docs"
    """Source of the text, except for the curve over text."""


def common(settings: Settings) -> peers.Settings:
    return peers.Settings(output_dir=settings.output_dir, threads=settings.threads, data=settings.data)


def train(settings: Settings, script: str, folder: Path, values: dict[str, Any]) -> float:
    """A run into `folder`, which is emptied; MiB of its resident set just before the first update."""
    shutil.rmtree(folder, ignore_errors=True)
    return run(
        [str(BIN / "python"), str(ROOT / script)],
        *flags_of(training(common(settings)) | values | {"output_dir": folder}),
        log=folder.with_suffix(".log"),
        threads=settings.threads,
        started=folder / "settings.json",
        variables=ON_CPU,
    )


def flags(point: Point) -> dict[str, object]:
    """The flags of train_shared.py for a new model."""
    values = point.flags(*MODEL, *UPDATE, "steps", "num_experts")
    return values | {"tokenizer": f"train:{point.tokens}", "log_every": point.warm_up}


def measure(settings: Settings, point: Point, name: str) -> dict[str, float]:
    """Seconds of an update, and the peak of the resident set above that before the first update, MiB."""
    folder = settings.output_dir.absolute() / "runs" / name.replace(", ", "-").replace(" ", "_")
    values = flags(point)
    if point.checkpoint:
        prepared = f"vocabulary-{point.vocabulary}"
        peers.prepare(common(settings), prepared, point)
        new = (*MODEL, "tokenizer", "num_experts")
        values = {flag: value for flag, value in values.items() if flag not in new}
        values["trunk_from"] = settings.output_dir.absolute() / prepared / "checkpoint"
    before = train(settings, SHARED, folder, values)
    found = rows(folder)
    shutil.rmtree(folder)
    tokens = point.batch_size * point.sequence_length
    return {"update": tokens / speed(found), "above start": found[-1]["memory/process_peak_mb"] - before}


def text_files() -> Iterator[Path]:
    """Text files of this machine, each content once, in an order that mixes the folders."""
    files: dict[bytes, Path] = {}
    for top in {str(Path(folder).resolve()) for folder in TEXT_FOLDERS}:
        for here, _, names in os.walk(top):
            for path in (Path(here, name) for name in names if name.endswith(TEXT_SUFFIXES)):
                if path.is_file() and not path.is_symlink() and path.stat().st_size in TEXT_SIZES:
                    files[hashlib.sha256(bytes(path)).digest()] = path
    seen = set()
    for _, path in sorted(files.items()):
        content = path.read_bytes()
        digest = hashlib.sha256(content).digest()
        try:
            plain = "\0" not in content.decode()
        except UnicodeDecodeError:
            continue
        if plain and digest not in seen:
            seen.add(digest)
            yield path


def text_folder(settings: Settings, megabytes: int) -> Path:
    """A folder of links to that much text, or to all that this machine has."""
    folder = settings.output_dir.absolute() / "text" / str(megabytes)
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        size = 0
        for number, path in enumerate(text_files()):
            size += path.stat().st_size
            (partial / f"{number:06}{path.suffix}").symlink_to(path)
            if size >= megabytes * 1e6:
                break
        partial.rename(folder)
    return folder


def measure_text(settings: Settings, point: Point) -> dict[str, float]:
    """A run of one update of a tiny model, first without and then with the tokens in the cache."""
    folder, cache = (settings.output_dir.absolute() / name for name in ("runs/text", "text_cache"))
    text = text_folder(settings, point.megabytes)
    values = flags(point) | {"data": text, "cache_dir": cache, "tokenizer": trunk_folder(settings)}
    shutil.rmtree(cache, ignore_errors=True)
    seconds, resident, peaks = [], 0.0, []
    for _ in ("tokenized", "cached"):
        started = time.time()
        resident = train(settings, SHARED, folder, values)
        seconds.append((folder / "metrics.jsonl").stat().st_mtime - started)
        peaks.append(rows(folder)[-1]["memory/process_peak_mb"])
    found = {"tokenize": seconds[0] - seconds[1], "first update": seconds[1]}
    found["MB"] = sum(path.stat().st_size for path in text.iterdir()) / 1e6
    return found | {"tokenize peak": peaks[0], "resident": resident, "peak": peaks[1]}


def trunk_folder(settings: Settings) -> Path:
    """The trunk of the base model after one update, with its tokenizer; made once."""
    folder = settings.output_dir.absolute() / "trunk"
    if not (folder / "trunk").exists():
        train(settings, SHARED, folder, flags(base(settings.small)) | {"steps": 1})
    return folder / "trunk"


def module_folders(settings: Settings) -> list[Path]:
    """64 modules of kind ffn+head, copies of one that had one update; made once."""
    folder = settings.output_dir.absolute()
    number = 64 if not settings.small else 4
    if not (folder / "modules" / f"m{number - 1}").exists():
        values = {"trunk": trunk_folder(settings), "name": "module", "general_tokens": 0, "steps": 1}
        train(settings, MODULE, folder / "module", values | base(settings.small).flags(*UPDATE))
        shutil.rmtree(folder / "modules", ignore_errors=True)
        values = {"trunk": trunk_folder(settings), "module": folder / "module/module", "number": number}
        child(settings, "copy", values | {"output_dir": folder / "modules"})
    return [folder / "modules" / f"m{index}" for index in range(number)]


def child(settings: Settings, action: str, values: dict[str, Any], *more: object) -> None:
    command = [str(BIN / "python"), str(ROOT / MODULES), action]
    log = settings.output_dir.absolute() / "runs" / f"{action}.log"
    run(command, *flags_of(values), *more, log=log, threads=settings.threads)


def measure_modules(settings: Settings, point: Point) -> dict[str, float]:
    """Assembles that many modules, and scores text with all gates and with one candidate a token."""
    folder = settings.output_dir.absolute()
    model, result = folder / "assembled", folder / "runs" / "result.json"
    shutil.rmtree(model, ignore_errors=True)
    chosen = module_folders(settings)[: point.modules]
    values = {"trunk": trunk_folder(settings), "output_dir": model, "result": result}
    child(settings, "assemble", values, "--modules", *chosen)
    found = json.loads(result.read_text(encoding="utf-8"))
    values = {"model": model, "data": settings.data, "max_tokens": SCORED, "sequence_length": point.sequence_length}
    values |= {"cache_dir": training(common(settings))["cache_dir"], "result": result}
    for key, top_k in (("top-1", 1), ("all", 0)):
        child(settings, "score", values | {"top_k": top_k})
        scored = json.loads(result.read_text(encoding="utf-8"))
        found |= scored | {key: scored["token"]}
    return found


def main(settings: Settings) -> None:
    start, chosen = base(settings.small), curves(settings.small, settings.megabytes)
    named = {f"{curve} {size}": point for curve, sizes in chosen.items() for size, point in sizes.items()}
    if unknown := set(settings.only) - chosen.keys() - named.keys():
        raise SystemExit(f"--only {', '.join(unknown)}: the curves are {', '.join(chosen)}")
    # A point that is on several curves is measured once a round.
    wanted = (name for name in named if not settings.only or {name, name.rpartition(" ")[0]} & {*settings.only})
    points = {name_of(named[name], start): named[name] for name in wanted}
    conditions = {"threads": settings.threads, "data": settings.data, "base": asdict(start)}
    file = settings.output_dir / "growth.json"
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"conditions": conditions, "found": {}}
    if kept["conditions"] != conditions and not settings.show:
        raise SystemExit(f"{file} has measurements of other settings. Choose another --output-dir, or remove it.")
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    if not settings.show:
        trunk_folder(settings)  # which tokenizes the text, so that no measured run has the peak of that
    for number in range(0 if settings.show else settings.rounds):
        for name, point in points.items():
            results = kept["found"].setdefault(name, [])
            if len(results) > number:
                continue
            began = time.time()
            if point.modules:
                results.append(measure_modules(settings, point))
            elif point.megabytes:
                results.append(measure_text(settings, point))
            else:
                results.append(measure(settings, point, name))
            write_json(file, kept)
            values = "".join(f"  {key} {value:,.5g}" for key, value in results[-1].items())
            print(f"{number + 1}/{settings.rounds} {name:<44}{values}  ({time.time() - began:.0f} s)", flush=True)
    from growth_table import report  # theory needs torch: a process whose parent is large seems to have that peak

    table, chart = report(
        curves(settings.small, 1000), start, {name: found for name, found in kept["found"].items() if found}
    )
    print(table)
    (settings.output_dir / "growth.svg").write_text(chart, encoding="utf-8")


if __name__ == "__main__":
    os.chdir(ROOT)  # --output-dir is the repository's
    main(tyro.cli(Settings, description=__doc__))
