"""The rows of one seed: nats and tokens of each scored document under each model, kept in rows.json."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from recipe_runs import Runs
from recipe_table import SPLICED, Row

from forge_common import evaluate
from forge_common.artifacts.module_folder import read_model
from forge_common.artifacts.statistics_file import read_statistics
from forge_common.artifacts.trunk_folder import read_trunk
from forge_common.evaluation import columns as texts
from forge_common.files.atomic import write_json

SPLICE = 64  # tokens between two changes of domain in the spliced texts
BATCH = 16  # windows


def by_document(model: Any, pieces: list[texts.Piece], device: str) -> tuple[list[float], list[int]]:
    """The sums of nats and the numbers of tokens of the pieces' documents, sorted by the documents' keys.

    device: where the model is.
    """
    sums: dict[Any, list[Any]] = {}
    for start in range(0, len(pieces), BATCH):
        batch = pieces[start : start + BATCH]
        longest = max(piece.scored for piece in batch) + 1
        tokens = torch.stack([torch.from_numpy(piece.tokens()[:longest]) for piece in batch]).to(device)
        before = torch.stack([torch.from_numpy(piece.before()) for piece in batch]).to(device)
        values = model.nats(tokens, before).double().sum(1).tolist()
        for piece, nats in zip(batch, values, strict=True):
            if not math.isfinite(nats):
                raise SystemExit(f"the loss of a window is {nats}. See the logs of the runs of this model.")
            total = sums.setdefault(piece.document, [0.0, 0])
            total[0] += nats
            total[1] += piece.scored
    ordered = [sums[key] for key in sorted(sums)]
    return [round(nats, 4) for nats, _ in ordered], [tokens for _, tokens in ordered]


class Scores:
    def __init__(self, runs: Runs):
        self.runs, self.file = runs, runs.folder / "rows.json"
        self.rows = read_rows(self.file)
        self.settings = evaluate.Settings("", (), cache_dir=runs.settings.output_dir / "cache", spliced=SPLICE)
        self.trunk, self.tokenizer, self.metadata = read_trunk(str(runs.trunk))
        self.trunk.eval()
        background = read_statistics(runs.trunk, self.metadata, self.trunk.config)
        assert background is not None
        self.background = background
        self._columns: dict[tuple[str, str], dict[str, texts.Column]] = {}

    def columns(self, group: str, part: str) -> dict[str, texts.Column]:
        """A column for each domain of the group, and the spliced texts."""
        if (group, part) not in self._columns:
            sources = {domain: self.runs.source(domain, part) for domain in self.runs.settings.group(group)}
            self._columns[group, part] = texts.read_columns(sources, self.tokenizer, self.trunk.config, self.settings)
        return self._columns[group, part]

    def add(
        self, group: str, name: str, make: Callable[[], Any], part: str = "test", only: tuple[str, ...] = ()
    ) -> None:
        """Scores the model that make() returns on the columns of a group, or on some of them, unless that was done before."""
        columns = self.columns(group, part)
        only = only or tuple(domain for domain in columns if part == "test" or domain != SPLICED)
        done = {row.domain for row in self.rows if (row.group, row.model, row.part) == (group, name, part)}
        missing = [domain for domain in only if domain not in done]
        if not missing:
            return
        device = self.runs.settings.device
        model, started = make().to(device), time.monotonic()
        for domain in missing:
            self.rows.append(Row(group, name, part, domain, *by_document(model, columns[domain].pieces, device)))
        write_json(self.file, [vars(row) for row in self.rows])
        losses = " ".join(f"{self.loss(group, name, part, domain):.4f}" for domain in missing)
        seconds = time.monotonic() - started
        print(f"seed {self.runs.seed}: {name} on {', '.join(missing)} ({part}): {losses}, {seconds:.0f} s", flush=True)

    def loss(self, group: str, name: str, part: str, domain: str) -> float:
        key = (group, name, part, domain)
        return next(row.loss for row in self.rows if (row.group, row.model, row.part, row.domain) == key)

    def model(self, published: Path) -> Any:
        """A module in the trunk, or a whole model."""
        if published.name == "module":
            return read_model(str(self.runs.trunk), published)[0].eval()
        return read_trunk(str(published))[0].eval()

    def sample(self, group: str, domain: str, tokens: int) -> list[texts.Piece]:
        """Pieces of a domain's tune text, of `tokens` tokens or a little more: long ones first."""
        chosen, total = [], 0
        for piece in self.columns(group, "tune")[domain].pieces[::-1]:
            if total < tokens:
                chosen.append(piece)
                total += piece.scored
        return chosen


def read_rows(path: Path) -> list[Row]:
    return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []
