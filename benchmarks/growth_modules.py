"""The processes of benchmarks/growth.py that deal with modules; each writes what it measured to a JSON file.

    PYTHONPATH=. python benchmarks/growth_modules.py score --model runs/growth/assembled --top-k 1 --result result.json ...

They call the functions of forge_common.assemble and forge_common.evaluate, so that importing torch is in no time.
"""

import time
from pathlib import Path

import tyro

from forge_common.artifacts.module_folder import read_module, write_module
from forge_common.artifacts.statistics_file import read_statistics
from forge_common.artifacts.trunk_folder import read_trunk
from forge_common.files.atomic import write_json
from forge_common.run.log import process_peak_mb

OF_THE_FILES = ("digest", "statistics_digest", "shapes", "tensor_digests")  # metadata that write_module computes


def resident_mb() -> float:
    import psutil

    return psutil.Process().memory_info().rss / 2**20


def copy(trunk: str, module: Path, number: int, output_dir: Path) -> None:
    """Modules m0, m1 ... from one: the same tensors, and counts that are permuted, so that the gates of the modules differ."""
    import torch

    model, _, trunk_metadata = read_trunk(trunk)
    tensors, metadata = read_module(module, trunk_metadata)
    statistics = read_statistics(module, metadata, model.config)
    assert statistics
    kept = {name: value for name, value in metadata.items() if name not in OF_THE_FILES}
    for index in range(number):
        generator = torch.Generator().manual_seed(index)
        counts = {name: statistics[name] for name in ("unigrams", "bigrams")}
        own = {name: codes[torch.randperm(len(codes), generator=generator)] for name, codes in counts.items()}
        write_module(output_dir / f"m{index}", tensors, kept | {"name": f"m{index}"}, statistics | own, model.config)


def assemble(trunk: str, modules: tuple[Path, ...], output_dir: Path, result: Path) -> None:
    """Seconds, and the peak of the resident set above that before, MiB."""
    import torch  # noqa: F401 (before the clock starts)

    from forge_common.assemble import Settings, main

    before, started = resident_mb(), time.perf_counter()
    main(Settings(trunk=trunk, modules=modules, output_dir=output_dir))
    seconds = time.perf_counter() - started
    write_json(result, {"assemble": seconds, "assemble peak": process_peak_mb() - before})


def score(
    model: Path, top_k: int, data: str, max_tokens: int, sequence_length: int, cache_dir: Path, result: Path
) -> None:
    """Seconds to open the model, ms a token to score, and the peak of the resident set above that before, MiB."""
    import torch

    from forge_common import evaluate
    from forge_common.artifacts.assembled import read_assembled
    from forge_common.evaluation.columns import Column, read_columns
    from forge_common.evaluation.score import score

    settings = evaluate.Settings(
        model=str(model),
        data=(f"text={data}",),
        max_tokens=max_tokens,
        sequence_length=sequence_length,
        cache_dir=cache_dir,
    )
    before, started = resident_mb(), time.perf_counter()
    mixture, tokenizer, _ = read_assembled(str(model), top_k=top_k)
    opened = time.perf_counter()
    column = read_columns({"text": data}, tokenizer, mixture.config, settings)["text"]
    mixture.eval()
    device = torch.device("cpu")
    score(mixture, Column(column.pieces[-2:], None), settings, device)  # a warm-up
    ready = time.perf_counter()
    tokens = score(mixture, column, settings, device)["tokens"]
    seconds = time.perf_counter() - ready
    write_json(
        result,
        {"open": opened - started, "token": 1000 * seconds / tokens, "score peak": process_peak_mb() - before},
    )


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"copy": copy, "assemble": assemble, "score": score})
