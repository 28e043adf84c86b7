"""Generates text with a trunk, a trunk with one module, or an assembled model.

    python -m forge_common.generate --model DIR --prompt TEXT
    python -m forge_common.generate --model DIR --chat

With --chat each line of the standard input is a turn of the user, and the model answers in the form of its chat template. It ends
with the input (Ctrl-D).
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError
from .settings import read_settings, run_main

if TYPE_CHECKING:  # torch is imported after the settings are checked
    from .data.tokenizer import Tokenizer
    from .model.protocol import LanguageModel


@dataclass(frozen=True)
class Settings:
    model: str
    """Trunk or assembled model: folder or hub id (org/name or org/name@revision)."""
    prompt: str | None = None
    """Text to continue; with --chat the first turn."""
    prompt_file: Path | None = None
    """File of prompts, one a line; in a .jsonl file each line is a JSON string. With --chat they are the turns."""
    chat: bool = False
    """Talk with the model: read turns of the user from the standard input, and answer each."""
    system: str | None = None
    """Message of the system at the beginning of a --chat."""
    module: Path | None = None
    """Module, which is merged into the trunk: folder or hub id."""
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

    _check(settings)
    prompts = read_prompts(settings)
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
    if settings.chat:
        chat(model, tokenizer, settings, device, prompts)
        return 0
    for number, text in enumerate(prompts):
        prompt = tokenizer.encode_batch([text])[0] or [tokenizer.eos_token_id]
        if tokenizer.eos_token_id in prompt[-1:] and len(prompt) > 1:
            prompt = prompt[:-1]
        print("\n" * (number > 0) + text, end="", flush=True)
        write(model, tokenizer, settings, device, prompt, [])
    return 0


def _check(settings: Settings) -> None:
    """UserError for a flag that is wrong by itself."""
    if not settings.temperature >= 0:
        raise UserError(f"--temperature is {settings.temperature}. Give 0 (always the likeliest token) or more.")
    if not 0 < settings.top_p <= 1:
        raise UserError(f"--top-p is {settings.top_p}. Give a share of the probability above 0, at most 1.")
    if settings.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {settings.max_new_tokens}. Give at least 1.")
    if settings.system is not None and not settings.chat:
        raise UserError("--system is a message of a chat. Add --chat, or leave it out.")
    if settings.prompt is None and settings.prompt_file is None and not settings.chat:
        raise UserError("there is nothing to continue. Give --prompt, --prompt-file or --chat.")


def read_prompts(settings: Settings) -> list[str]:
    """The texts of --prompt and --prompt-file. UserError for a file that cannot be read, or a line that is not JSON where it must be."""
    prompts = [] if settings.prompt is None else [settings.prompt]
    path = settings.prompt_file
    if path is None:
        return prompts
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as reason:
        raise UserError(f"--prompt-file {path} cannot be read ({reason}). Name a file of text, in UTF-8.") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            prompts.append(line)
            continue
        try:
            prompt = json.loads(line)
        except ValueError:
            prompt = None
        if isinstance(prompt, str):
            prompts.append(prompt)
        else:
            raise UserError(
                f'{path}:{number}: the line is not a JSON string. Write it as "text", with \\n for a line end.'
            )
    if not prompts:
        raise UserError(f"--prompt-file {path} has no prompt. Write one on each line.")
    return prompts


def chat(model: "LanguageModel", tokenizer: "Tokenizer", settings: Settings, device: Any, turns: list[str]) -> None:
    """Answers `turns`, then (unless they are from --prompt-file) the lines of the standard input, each with the conversation so far.

    Keys and values of what the conversation shares with the last one are kept. Where it no longer fits the context, its oldest turns are
    left out.
    """
    from .data.readers.document import Message

    template = tokenizer.chat
    if template is None:
        raise UserError(
            f"{settings.model} has no chat template, so --chat cannot be used. Use a model with a template in "
            "tokenizer_config.json or chat_template.jinja."
        )
    system = [] if settings.system is None else [Message("system", settings.system)]
    conversation: list[Message] = []
    cache: list = []
    for turn in _turns(settings, turns):
        conversation.append(Message("user", turn))
        try:
            prompt = template.prompt([*system, *conversation])
            while len(conversation) > 1 and _is_too_long(prompt, model, settings):
                print("(the oldest turn is left out: the context is full)", file=sys.stderr)
                conversation = conversation[2:]
                prompt = template.prompt([*system, *conversation])
        except ValueError as reason:
            raise UserError(f"{settings.model}: {reason}. Leave out --system, or use another model.") from None
        answer = write(model, tokenizer, settings, device, prompt, cache)
        conversation.append(Message("assistant", answer))


def _turns(settings: Settings, turns: list[str]) -> Iterator[str]:
    """The user's turns, each shown after "> "."""
    for turn in turns:
        print(f"> {turn}", flush=True)
        yield turn
    if settings.prompt_file:
        return
    typed = sys.stdin.isatty()
    while True:
        if typed:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if not line.strip():
            continue
        if not typed:
            print(f"> {line.rstrip()}", flush=True)
        yield line.rstrip("\r\n")


def _is_too_long(prompt: list[int], model: "LanguageModel", settings: Settings) -> bool:
    context = model.config.context
    return len(prompt) + min(settings.max_new_tokens, context // 2) > context


def write(
    model: "LanguageModel", tokenizer: "Tokenizer", settings: Settings, device: Any, prompt: list[int], cache: list
) -> str:
    """Prints what follows `prompt` as it is generated, until a token that ends a text; returns it.

    cache: of an earlier call, or empty. It is emptied where its tokens are not the beginning of `prompt`.
    """
    import torch

    from .routing.mixture import Mixture

    generator = torch.Generator(device).manual_seed(settings.seed)
    ends = set(tokenizer.ends)
    ids = list(prompt)
    before = tokenizer.decode(prompt)
    printed = before
    heads: list[list[float]] = []
    layers: list[list[float]] = []
    for token in sample(model, prompt, settings, generator, cache):
        if token in ends:
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
    print(flush=True)
    if settings.show_routing:
        print(routing(model.names, heads, layers, [tokenizer.decode([token]) for token in ids[len(prompt) :]]))
    return printed[len(before) :]


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


def sample(
    model: "LanguageModel", prompt: list[int], settings: Settings, generator: Any, cache: list | None = None
) -> Iterator[int]:
    """Token ids after `prompt`, one at a time, until the context is full.

    cache: of keys and values, filled by an earlier call, or empty. It is emptied where its tokens are not the beginning of `prompt`.
    """
    import torch

    context = model.config.context
    if len(prompt) >= context:
        print(f"(only the last {context - 1} tokens of the prompt are used: the context is {context})", file=sys.stderr)
        prompt = prompt[-(context - 1) :]
    cache = [] if cache is None else cache
    known = cache[0][0][0].tolist() if cache else []
    if known != prompt[: len(known)] or len(known) == len(prompt):
        cache.clear()
        known = []
    new = torch.tensor([prompt[len(known) :]], device=generator.device)
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
