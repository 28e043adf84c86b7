"""Draws tokens from a model, one after the other, and decodes them.

Imports nothing heavy before a function needs it: `Sampling` is part of the settings of commands.

E candidates of an assembled model (the trunk first), V vocabulary
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import UserError

if TYPE_CHECKING:
    from ..data.tokenizer import Tokenizer
    from ..model.protocol import LanguageModel

SEEDS = 1 << 63
LOWEST_TEMPERATURE = 1e-6  # a logit divided by less may be beyond float32


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn; generate inherits it, and chat gets one with each request."""

    # -- sampling --
    max_new_tokens: int = 200
    """Tokens to generate at most."""
    temperature: float = 0.8
    """Temperature of the distribution that tokens are drawn from; 0: always the likeliest token."""
    top_p: float = 0.95
    """Share of the probability: tokens are drawn from the likeliest ones that hold it together."""
    seed: int = 42
    """Seed of the random numbers."""


class Token(NamedTuple):
    """A generated token."""

    id: int
    text: str
    """What it adds to the text: "" where the rest of its character follows."""
    heads: list[float]
    """The weights of the E heads in its prediction; empty without a router."""
    layers: list[float]
    """The gates of the layers, E; empty without a router."""


def check_sampling(sampling: Sampling) -> None:
    """UserError for a setting that is wrong by itself."""
    if not sampling.temperature >= 0:
        raise UserError(f"--temperature is {sampling.temperature}. Give 0 (always the likeliest token) or more.")
    if 0 < sampling.temperature < LOWEST_TEMPERATURE:
        raise UserError(
            f"--temperature is {sampling.temperature}. Give 0 (always the likeliest token) or at least "
            f"{LOWEST_TEMPERATURE}."
        )
    if not 0 < sampling.top_p <= 1:
        raise UserError(f"--top-p is {sampling.top_p}. Give a share of the probability above 0, at most 1.")
    if sampling.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {sampling.max_new_tokens}. Give at least 1.")
    if not -SEEDS <= sampling.seed < SEEDS:
        raise UserError(f"--seed is {sampling.seed}. Give a number of at most 63 bits.")


def check_text(text: str, place: str) -> None:
    """UserError for a text with half of a pair of UTF-16: a byte of a command line that is not UTF-8, or "\\ud800" in
    JSON.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{place} is not UTF-8. Write it in UTF-8.") from None


def beyond_context(model: "LanguageModel", prompt: list[int], max_new_tokens: int) -> int:
    """How many tokens at the beginning of a prompt `sample` leaves out; 0 where the context has room for one more.

    What is left has room for `max_new_tokens` new tokens after it, at most for half of the context.
    """
    context = model.config.context
    if len(prompt) < context:
        return 0
    room = min(max_new_tokens, context // 2)
    return len(prompt) - (context - room)


def stream(
    model: "LanguageModel", tokenizer: "Tokenizer", prompt: list[int], sampling: Sampling, device: Any, cache: list
) -> Iterator[Token]:
    """What follows `prompt`, until a token that ends a text. cache: of `sample`."""
    import torch

    from ..routing.mixture import Mixture

    generator = torch.Generator(device).manual_seed(sampling.seed)
    ends = set(tokenizer.ends)
    ids = list(prompt)
    shown = tokenizer.decode(prompt)
    for token in sample(model, prompt, sampling, generator, cache):
        if token in ends:
            return
        ids.append(token)
        heads: list[float] = []
        layers: list[float] = []
        if isinstance(model, Mixture):
            assert model.weights is not None and model.gates is not None
            heads = model.weights[0, -1].tolist()
            layers = model.gates[0, -1].tolist()
        text = tokenizer.decode(ids)
        new = ""
        if text.startswith(shown) and not text.endswith("\N{REPLACEMENT CHARACTER}"):  # hold back incomplete UTF-8
            new = text[len(shown) :]
            shown = text
        yield Token(token, new, heads, layers)


def sample(
    model: "LanguageModel", prompt: list[int], sampling: Sampling, generator: Any, cache: list | None = None
) -> Iterator[int]:
    """Token ids after `prompt`, one at a time, until the context is full.

    cache: of keys and values, filled by an earlier call, or empty. It is emptied where its tokens are not the beginning
    of `prompt`.
    """
    import torch

    prompt = prompt[beyond_context(model, prompt, sampling.max_new_tokens) :]
    cache = [] if cache is None else cache
    known = cache[0][0][0].tolist() if cache else []
    if known != prompt[: len(known)] or len(known) == len(prompt):
        cache.clear()
        known = []
    new = torch.tensor([prompt[len(known) :]], device=generator.device)
    for _ in range(min(sampling.max_new_tokens, model.config.context - len(prompt))):
        logits = model.next_logits(new, cache)[0].float()  # [V]
        if not torch.isfinite(logits).all():
            raise UserError(
                "the probabilities of the next token are not finite: some weights are too large. Leave out the module "
                "with these weights; assemble names it."
            )
        if sampling.temperature == 0:
            token = int(logits.argmax())
        else:
            probabilities, order = (logits / sampling.temperature).softmax(-1).sort(descending=True)
            probabilities[probabilities.cumsum(0) - probabilities > sampling.top_p] = 0
            token = int(order[torch.multinomial(probabilities, 1, generator=generator)])
        yield token
        new = torch.tensor([[token]], device=generator.device)
