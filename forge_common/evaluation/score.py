"""Scores a column: nats per token with a standard error, bits per byte, and which candidates served its tokens."""

import math
from collections.abc import Callable
from typing import Any

import torch

from ..artifacts.trial import check_finite
from ..labels import is_scored
from ..model.protocol import LanguageModel
from ..routing.mixture import Mixture
from .columns import Column
from .table import CREDITS


def score(
    model: LanguageModel,
    column: Column,
    settings: Any,
    device: Any,
    report: Callable[[int], None] = lambda tokens: None,
) -> dict[str, Any]:
    """The row of the table for a model and a column. The standard error is over documents, weighted by their tokens.

    Of an assembled model also the credits of its candidates: the means over the tokens of the layers' gates and of the
    heads' weights. UserError for a loss that is not finite. `report` is called with the number of tokens of each batch.
    """
    nats: dict[Any, float] = {}  # by document
    counts: dict[Any, int] = {}
    credits = torch.zeros(2, len(model.names), dtype=torch.float64, device=device)
    for start in range(0, len(column.pieces), settings.batch_size):
        batch = column.pieces[start : start + settings.batch_size]
        longest = max(piece.size for piece in batch) + 1
        tokens = torch.stack([torch.from_numpy(piece.tokens()[:longest]) for piece in batch]).to(device)
        before = torch.stack([torch.from_numpy(piece.before()) for piece in batch]).to(device)
        sums = model.nats(tokens, before).double().sum(1).tolist()
        for piece, value in zip(batch, sums, strict=True):
            nats[piece.document] = nats.get(piece.document, 0.0) + check_finite(value, "a window")
            counts[piece.document] = counts.get(piece.document, 0) + piece.scored
        report(sum(piece.scored for piece in batch))
        if isinstance(model, Mixture):
            assert model.gates is not None and model.weights is not None
            scored = is_scored(tokens[:, 1:], model.config.ignore_index)
            credits += torch.stack((model.gates[scored].double().sum(0), model.weights[scored].double().sum(0)))
    total = sum(nats.values())
    num_scored = sum(counts.values())
    loss = total / num_scored
    row: dict[str, Any] = {
        "loss": loss,
        "stderr": _standard_error(nats, counts),
        "tokens": num_scored,
        "documents": len(nats),
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": total / math.log(2) / column.bytes if column.bytes else None,
    }
    if isinstance(model, Mixture):
        for name, means in zip(CREDITS, (credits / num_scored).tolist(), strict=True):
            row[name] = dict(zip(model.names, means, strict=True))
    return row


def _standard_error(nats: dict[Any, float], counts: dict[Any, int]) -> float | None:
    """The standard error of the ratio estimate sum(nats) / sum(counts) over documents; None for a single document."""
    num_documents = len(nats)
    if num_documents < 2:
        return None
    num_scored = sum(counts.values())
    loss = sum(nats.values()) / num_scored
    squares = math.fsum((nats[document] - loss * counts[document]) ** 2 for document in nats)
    return math.sqrt(squares * num_documents / (num_documents - 1)) / num_scored
