"""A text token by token: the loss of each, the candidates' weights, and the likeliest tokens in its place."""

from itertools import pairwise
from typing import Any

import torch

TOKENS = 160  # of a text at most
LIKELIEST = 3


@torch.no_grad()
def read_along(model: Any, tokenizer: Any, column: Any, device: torch.device) -> dict[str, Any]:
    """Reads the start of a document of a column with a mixture, token by token.

    Returns {"names": of the candidates, "start": text of the first token, which nothing predicts, "tokens": [...]}.
    Each other token has {"text", "loss": nats, "weights" of the heads and "gates" of the layers by candidate,
    "likeliest": [(text, probability)]}.
    """
    ids = _document(column, model.config.eos_token_id)
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


def _document(column: Any, eos_token_id: int) -> list[int]:
    """The first TOKENS + 1 ids of the shortest document whose first window has as many, else of the longest first window."""
    # The pieces are sorted by their size.
    long_enough = [piece for piece in column.pieces if piece.scored >= TOKENS]
    shorter_ones = [piece for piece in reversed(column.pieces) if piece.scored < TOKENS]
    begins = (-1, eos_token_id)  # the id before the first window of a document
    piece = next(piece for piece in (*long_enough, *shorter_ones) if piece.before()[-1] in begins)
    return piece.tokens()[: min(piece.scored, TOKENS) + 1].tolist()
