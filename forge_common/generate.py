"""Text from a trunk, a trunk with one module, or an assembled model.

python -m forge_common.generate --model DIR --prompt TEXT
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UserError
from .settings import read_settings, run_main


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
    """Print the gate weights below the text: a line for each stretch of tokens with the same heaviest candidate."""

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

    if settings.temperature < 0 or not 0 < settings.top_p <= 1 or settings.max_new_tokens < 1:
        raise UserError("--temperature must be 0 or more, --top-p in (0, 1], --max-new-tokens at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    whole = is_assembled(settings.model)
    if whole and settings.module:
        raise UserError("--module is for a trunk; an assembled model brings its own")
    if not whole and (settings.without or settings.top_k is not None or settings.show_routing):
        raise UserError(
            f"{settings.model} is no assembled model: --without, --top-k and --show-routing say nothing of it"
        )
    if whole:
        trunk, tokenizer, _ = read_assembled(settings.model, without=settings.without, top_k=settings.top_k)
    else:
        trunk, tokenizer, _, _ = read_model(settings.model, settings.module)
    trunk = trunk.to(device).eval()
    prompt = tokenizer.encode_batch([settings.prompt])[0] or [tokenizer.eos_token_id]
    if tokenizer.eos_token_id in prompt[-1:] and len(prompt) > 1:
        prompt = prompt[:-1]
    generator = torch.Generator(device).manual_seed(settings.seed)
    ids, shown, voices = list(prompt), settings.prompt, []
    print(settings.prompt, end="", flush=True)
    for token in sample(trunk, prompt, settings, generator):
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
        if settings.show_routing:
            voices.append(trunk.weights[0, -1].tolist())
        text = tokenizer.decode(ids)
        if text.startswith(shown) and not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character waits
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()
    if settings.show_routing:
        print(routing(trunk.names, voices, [tokenizer.decode([token]) for token in ids[len(prompt) :]]))
    return 0


def routing(names: list[str], voices: list[list[float]], pieces: list[str]) -> str:
    """A line for each stretch of tokens with the same first voice: its tokens, the voices' mean weights, the text."""
    lines, start = [], 0
    first = [max(range(len(names)), key=weights.__getitem__) for weights in voices]
    for end in range(1, len(voices) + 1):
        if end < len(voices) and first[end] == first[start]:
            continue
        mean = [sum(column) / (end - start) for column in zip(*voices[start:end], strict=True)]
        shares = ", ".join(f"{name} {share:.0%}" for name, share in zip(names, mean, strict=True) if share >= 0.005)
        lines.append(f"{start + 1:>5}-{end:<5} {shares}: {''.join(pieces[start:end])!r}")
        start = end
    return "\n".join(lines)


def sample(trunk: Any, prompt: list[int], settings: Settings, generator: Any) -> Iterator[int]:
    """Token ids after `prompt`, one at a time, with a cache of keys and values, as long as the context has room."""
    import torch

    device = trunk.head.device
    room = trunk.config.max_position_embeddings
    if len(prompt) >= room:
        print(f"(the prompt's last {room - 1} tokens are used: the context is {room})", file=sys.stderr)
        prompt = prompt[-(room - 1) :]
    cache: list = []
    new = torch.tensor([prompt], device=device)
    for _ in range(min(settings.max_new_tokens, room - len(prompt))):
        logits = trunk.next_logits(new, cache)[0].float()
        if settings.temperature == 0:
            token = int(logits.argmax())
        else:
            probabilities, order = (logits / settings.temperature).softmax(-1).sort(descending=True)
            probabilities[probabilities.cumsum(0) - probabilities > settings.top_p] = 0
            token = int(order[torch.multinomial(probabilities, 1, generator=generator)])
        yield token
        new = torch.tensor([[token]], device=device)


if __name__ == "__main__":
    run_main(main, read_settings(Settings, __doc__))
