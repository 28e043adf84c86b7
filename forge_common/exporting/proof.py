"""Compares an exported model with the model that it was made of, on real text, before its files have their name.

T time, V vocabulary
"""

import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..data.tokenizer import Tokenizer
from ..errors import UserError
from ..model.protocol import LanguageModel
from ..model.trunk import Cache

LIMIT = 1e-4  # of a logit, in float32
WINDOW = 256  # tokens of a window at most
PIECES = 4  # of a window. All logits are compared after each piece; after the other tokens, only that of the next token
Logits = Callable[[torch.Tensor], torch.Tensor]  # ids [1, T] -> logits [1, T, V]


class Expected(NamedTuple):
    """A window of text, and what the model computes for it."""

    tokens: torch.Tensor
    """[1, T + 1]"""
    nats: torch.Tensor
    """[T]: of its labels."""
    logits: dict[int, torch.Tensor]
    """[V]: all logits after some of its positions."""


def texts() -> dict[str, str]:
    """Prose and code that come with Python."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return {"prose": topics["strings"] + topics["objects"], "code": inspect.getsource(textwrap)}


def windows(tokenizer: Tokenizer, context: int, *, spliced: bool) -> list[torch.Tensor]:
    """Windows of ids [1, T + 1] of different lengths: prose, code and, if spliced, a window in which an EOS stands
    between the two.
    """
    documents = tokenizer.encode_batch(list(texts().values()), continued=True)
    length = min(context, WINDOW)
    chosen = [documents[0][: length + 1], documents[1][: length * 3 // 4 + 1]]
    if spliced:
        half = length // 2
        chosen.append([*documents[1][-half:], tokenizer.eos_token_id, *documents[0][-half:]])
    return [torch.tensor([ids]) for ids in chosen]


def expect(model: LanguageModel, tokenizer: Tokenizer, *, spliced: bool) -> list[Expected]:
    """What the model computes for each of `windows`."""
    expected = []
    for tokens in windows(tokenizer, model.config.max_position_embeddings, spliced=spliced):
        cache: Cache = []
        logits = {}
        last = -1
        for piece in tokens[:, :-1].chunk(PIECES, dim=1):
            last += piece.shape[1]
            logits[last] = model.next_logits(piece, cache)[0]
        expected.append(Expected(tokens, model.nats(tokens)[0], logits))
    return expected


def difference(expected: list[Expected], exported: Logits) -> float:
    """The largest difference between `expected` and an exported model: of a logit, or of a token's log probability."""
    differences = []
    for window in expected:
        logits = exported(window.tokens[:, :-1])[0].float()
        differences += [float((logits[position] - row).abs().max()) for position, row in window.logits.items()]
        labels = window.tokens[0, 1:, None]
        nats = -logits.log_softmax(-1).gather(1, labels)[:, 0]
        differences.append(float((nats - window.nats).abs().max()))
    return largest_of(differences)


def largest_of(differences: Iterable[float]) -> float:
    """The largest one; NaN if one of them is NaN, which Python's max may skip."""
    return float(torch.tensor(list(differences)).max())


def check(what: str, largest: float) -> None:
    """Prints the largest difference. UserError above LIMIT, also for NaN."""
    if not largest <= LIMIT:
        raise UserError(
            f"nothing was written: {what} gives other logits than the model here, by up to {largest:.2e}; at most {LIMIT:.0e} "
            "is rounding. Check the disk and the versions of the packages, and run the same command again."
        )
    print(f"proven      {what}: the largest difference of a logit is {largest:.2e} (float32)")


def library(name: str, purpose: str) -> Any:
    """An optional package. UserError that says how to install it, where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as reason:
        raise UserError(f"{purpose} needs the package {name} ({reason}). Install it: pip install {name}.") from None


def load(folder: Path, **how: Any) -> Any:
    """Loads a model with Transformers, on the CPU, in float32. UserError where it fails or lacks a weight."""
    transformers = library("transformers", "the proof of an export")
    transformers.utils.logging.disable_progress_bar()
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, **how
        )
    except Exception as reason:
        raise UserError(
            f"nothing was written: Transformers cannot load what was exported ({type(reason).__name__}: {reason}). "
            "Check the versions of the packages (requirements.txt)."
        ) from reason
    wrong = {name: sorted(value) for name, value in report.items() if value}
    if wrong:
        raise UserError(f"nothing was written: Transformers does not find the weights that it expects: {wrong}.")
    return model.eval()
