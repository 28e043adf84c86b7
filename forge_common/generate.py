"""Generates text with a trunk, a trunk with one module, or an assembled model.

python -m forge_common.generate --model DIR --prompt TEXT
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError
from .settings import read_settings, run_main

if TYPE_CHECKING:  # torch is imported after the settings are checked
    from .model.protocol import LanguageModel


@dataclass(frozen=True)
class Settings:
    model: str
    """Trunk (folder or hub id) or assembled model."""
    prompt: str
    """Text to continue."""
    module: Path | None = None
    """Folder of a module, which is merged into the trunk."""
    without: tuple[str, ...] = ()
    """Names of modules of an assembled model to leave out."""
    top_k: int | None = None
    """Candidates (the trunk and the modules) that serve a token; 0: all. None: as the model was assembled."""
    show_routing: bool = False
    """Print the heads' weights and the layers' gates below the text, for each stretch of tokens with the same heaviest head."""

    # -- sampling --
    max_new_tokens: int = 200
    """Tokens to generate at most."""
    temperature: float = 0.8
    """Temperature of the distribution that tokens are drawn from; 0: always the likeliest token."""
    top_p: float = 0.95
    """Share of the probability: tokens are drawn from the likeliest ones that hold it together."""
    seed: int = 42
    """Seed of the random numbers."""


def main(settings: Settings) -> int:
    import torch

    from .artifacts.artifact import read_model
    from .artifacts.assembled import is_assembled, read_assembled
    from .routing.mixture import Mixture

    if settings.temperature < 0 or not 0 < settings.top_p <= 1 or settings.max_new_tokens < 1:
        raise UserError(
            f"--temperature is {settings.temperature}, --top-p is {settings.top_p}, --max-new-tokens is "
            f"{settings.max_new_tokens}. The first must be 0 or more, the second in (0, 1], the third at least 1."
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if is_assembled(settings.model):
        if settings.module:
            raise UserError(f"{settings.model} is an assembled model, which has its modules. Leave out --module.")
        model, tokenizer, _ = read_assembled(settings.model, without=settings.without, top_k=settings.top_k)
    else:
        if settings.without or settings.top_k is not None or settings.show_routing:
            raise UserError(
                f"{settings.model} is not an assembled model. Leave out --without, --top-k and --show-routing."
            )
        model, tokenizer, _, _ = read_model(settings.model, settings.module)
    model.to(device).eval()
    prompt = tokenizer.encode_batch([settings.prompt])[0] or [tokenizer.eos_token_id]
    if tokenizer.eos_token_id in prompt[-1:] and len(prompt) > 1:
        prompt = prompt[:-1]
    generator = torch.Generator(device).manual_seed(settings.seed)
    ids = list(prompt)
    printed = settings.prompt
    heads: list[list[float]] = []
    layers: list[list[float]] = []
    print(settings.prompt, end="", flush=True)
    for token in sample(model, prompt, settings, generator):
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
        if isinstance(model, Mixture):
            assert model.weights is not None and model.gates is not None
            heads.append(model.weights[0, -1].tolist())
            layers.append(model.gates[0, -1].tolist())
        text = tokenizer.decode(ids)
        if text.startswith(printed) and not text.endswith("\N{REPLACEMENT CHARACTER}"):  # hold back incomplete UTF-8
            print(text[len(printed) :], end="", flush=True)
            printed = text
    print()
    if settings.show_routing:
        print(routing(model.names, heads, layers, [tokenizer.decode([token]) for token in ids[len(prompt) :]]))
    return 0


def routing(names: Sequence[str], heads: list[list[float]], layers: list[list[float]], pieces: list[str]) -> str:
    """A line for each stretch of tokens with the same heaviest head: its tokens, the means of heads' weights and layers' gates, the text."""
    lines = []
    start = 0
    heaviest = [max(range(len(names)), key=weights.__getitem__) for weights in heads]
    for end in range(1, len(heads) + 1):
        if end < len(heads) and heaviest[end] == heaviest[start]:
            continue
        shown = f"heads {_means(names, heads[start:end])}; layers {_means(names, layers[start:end])}"
        lines.append(f"{start + 1:>5}-{end:<5} {shown}: {''.join(pieces[start:end])!r}")
        start = end
    return "\n".join(lines)


def _means(names: Sequence[str], rows: list[list[float]]) -> str:
    """The mean of each column of `rows`, without those below 0.5%."""
    means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    return ", ".join(f"{name} {mean:.0%}" for name, mean in zip(names, means, strict=True) if mean >= 0.005)


def sample(model: "LanguageModel", prompt: list[int], settings: Settings, generator: Any) -> Iterator[int]:
    """Token ids after `prompt`, one at a time, with a cache of keys and values, until the context is full."""
    import torch

    context = model.config.max_position_embeddings
    if len(prompt) >= context:
        print(f"(only the last {context - 1} tokens of the prompt are used: the context is {context})", file=sys.stderr)
        prompt = prompt[-(context - 1) :]
    cache: list = []
    new = torch.tensor([prompt], device=generator.device)
    for _ in range(min(settings.max_new_tokens, context - len(prompt))):
        logits = model.next_logits(new, cache)[0].float()
        if not torch.isfinite(logits).all():
            raise UserError(
                "the probabilities of the next token are not finite: some weights are too large. Leave out the module with "
                "these weights; assemble names it."
            )
        if settings.temperature == 0:
            token = int(logits.argmax())
        else:
            probabilities, order = (logits / settings.temperature).softmax(-1).sort(descending=True)
            probabilities[probabilities.cumsum(0) - probabilities > settings.top_p] = 0
            token = int(order[torch.multinomial(probabilities, 1, generator=generator)])
        yield token
        new = torch.tensor([[token]], device=generator.device)


if __name__ == "__main__":
    run_main(main, read_settings(Settings, __doc__))
