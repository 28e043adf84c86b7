"""A text token by token: its loss, who predicted it, and what else was likely."""

from itertools import pairwise
from typing import Any

import torch

TOKENS = 160  # of a text at most
LIKELIEST = 3


@torch.no_grad()
def read_along(model: Any, tokenizer: Any, column: Any, device: torch.device) -> dict[str, Any]:
    """Steps of a mixture along the start of a document of a column, where there is one with TOKENS tokens.

    {"names": of the candidates, "start": text of the first token, which nothing predicts, "tokens": of the others [{"text",
    "loss": nats, "weights" of the heads and "gates" of the layers by candidate, "likeliest": [(text, probability)]}]}.
    """
    ids = _document(column)
    cache: list = []
    tokens = []
    for before, token in pairwise(ids):
        log_p = model.next_logits(torch.tensor([[before]], device=device), cache)[0].float().log_softmax(-1)
        best = log_p.topk(LIKELIEST)
        tokens.append(
            {
                "text": tokenizer.decode([token]),
                "loss": -float(log_p[token]),
                "weights": model.weights[0, -1].tolist(),
                "gates": model.gates[0, -1].tolist(),
                "likeliest": [
                    (tokenizer.decode([other]), share)
                    for other, share in zip(best.indices.tolist(), best.values.exp().tolist(), strict=True)
                ],
            }
        )
    return {"names": list(model.names), "start": tokenizer.decode(ids[:1]), "tokens": tokens}


def _document(column: Any) -> list[int]:
    """The first TOKENS + 1 ids of the shortest document with as many, else of the longest; its first window."""
    for piece in column.pieces:  # the shortest first
        if piece.scored >= TOKENS and (piece.before() < 0).all():
            break
    else:
        piece = column.pieces[-1]
    return piece.tokens()[: min(piece.scored, TOKENS) + 1].tolist()
