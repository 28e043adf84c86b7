"""Text from a trunk, or from a trunk with one module: python -m forge_common.generate --model DIR --prompt TEXT."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import config
from .errors import UserError


@dataclass(frozen=True)
class Settings:
    model: str  # a trunk: folder or hub id
    prompt: str
    module: Path | None = None  # merged into the trunk before it speaks
    max_new_tokens: int = 200
    temperature: float = 0.8  # 0: always the likeliest token
    top_p: float = 0.95  # draw from the likeliest tokens that hold this much of the probability
    seed: int = 42


def main(settings: Settings) -> int:
    import torch

    from .artifact import read_model

    if settings.temperature < 0 or not 0 < settings.top_p <= 1 or settings.max_new_tokens < 1:
        raise UserError("--temperature must be 0 or more, --top-p in (0, 1], --max-new-tokens at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trunk, tokenizer, _, _ = read_model(settings.model, settings.module)
    trunk = trunk.to(device).eval()
    prompt = tokenizer.encode_batch([settings.prompt])[0] or [tokenizer.eos_token_id]
    if tokenizer.eos_token_id in prompt[-1:] and len(prompt) > 1:
        prompt = prompt[:-1]
    generator = torch.Generator(device).manual_seed(settings.seed)
    ids, shown = list(prompt), settings.prompt
    print(settings.prompt, end="", flush=True)
    for token in sample(trunk, prompt, settings, generator):
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
        text = tokenizer.decode(ids)
        if text.startswith(shown) and not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character waits
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()
    return 0


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
    config.run(main, config.read(Settings, __doc__))
