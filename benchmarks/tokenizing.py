"""How fast text becomes tokens on disk, against `tokenizers` alone on the same texts and all cores.

    python benchmarks/tokenizing.py        # a minute on 2 cores; exit code 1 if a ratio is below 0.8

Ours: a .jsonl and a .parquet file, read, checked, hashed, tokenized, split and written by data/store.py. Alone:
encode_batch_fast of the same texts, already in memory, in batches of 1,024. They take turns. Printed are the median and
the best repetition of each in MB of UTF-8 per second, and the ratio of the best ones, which other work on the machine
disturbs least.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pyarrow
import pyarrow.parquet

from forge_common.data import local
from forge_common.data.readers.document import Reading
from forge_common.data.store import prepare
from forge_common.data.tokenizer import Tokenizer, train_tokenizer

REQUIRED_RATIO = 0.8
BATCH = 1024  # texts that encode_batch gets at once


def seconds(work, *arguments) -> float:
    began = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - began


def alone(tokenizer: Tokenizer, texts: list[str]) -> None:
    for start in range(0, len(texts), BATCH):
        tokenizer.backend.encode_batch_fast(texts[start : start + BATCH], add_special_tokens=False)


def ours(tokenizer: Tokenizer, path: Path) -> None:
    with tempfile.TemporaryDirectory() as cache:
        prepare(str(path), tokenizer, Reading(), cache_dir=Path(cache), val_fraction=0.01, report=lambda line: None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--every", type=int, default=1, help="use every n-th text only")
    arguments = parser.parse_args()

    texts = ["".join(document.pieces) for document in local.documents("python")][:: arguments.every]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    tokenizer = train_tokenizer(iter(texts[:300]), arguments.vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        jsonl, parquet = Path(folder, "a.jsonl"), Path(folder, "a.parquet")
        jsonl.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), parquet)
        times: dict[str, list[float]] = {"alone": [], "jsonl": [], "parquet": []}
        for _ in range(arguments.repetitions):
            times["alone"].append(seconds(alone, tokenizer, texts))
            times["jsonl"].append(seconds(ours, tokenizer, jsonl))
            times["parquet"].append(seconds(ours, tokenizer, parquet))

    print(f"{len(texts):,} texts, {megabytes:.1f} MB, {os.cpu_count()} cores, {arguments.repetitions} repetitions")
    print(f"{'':16}{'median':>12}{'best':>12}{'ratio':>8}")
    ratios = {name: min(times["alone"]) / min(values) for name, values in times.items()}
    for name, values in times.items():
        median, best = megabytes / statistics.median(values), megabytes / min(values)
        print(f"{name:16}{median:>7.2f} MB/s{best:>7.2f} MB/s{ratios[name]:>8.2f}")
    return int(min(ratios.values()) < REQUIRED_RATIO)


if __name__ == "__main__":
    sys.exit(main())
