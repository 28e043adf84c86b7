"""Generates text with a trunk, a trunk with one module, or an assembled model.

    python -m forge_common.generate --model DIR --prompt TEXT
    python -m forge_common.generate --model DIR --chat

With --chat each line of the standard input is a turn of the user, and the model answers in the form of its chat
template. It ends with the input (Ctrl-D).
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command_line import read_settings, run_main
from .errors import UserError
from .files.places import check_artifacts
from .generation import sampling

if TYPE_CHECKING:  # torch is imported after the settings are checked
    from .data.tokenizer import Tokenizer
    from .model.protocol import LanguageModel


@dataclass(frozen=True)
class Settings(sampling.Sampling):
    model: str
    """Trunk or assembled model: folder or hub id (org/name or org/name@revision)."""
    prompt: tuple[str, ...] = ()
    """Texts to continue, one after the other; with --chat the first turns."""
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


def main(settings: Settings) -> int:
    check_artifacts([("--model", settings.model), ("--module", settings.module)])
    _check(settings)
    prompts = read_prompts(settings)
    # Heavy imports come after the settings were checked, so that a wrong flag is reported at once.
    import torch

    from .artifacts.assembled import is_assembled, read_assembled
    from .artifacts.module_folder import read_model

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
        print("\n" * (number > 0) + text, end="", flush=True)
        print_continuation(model, tokenizer, settings, device, tokenizer.encode_prompt(text), [])
    return 0


def _check(settings: Settings) -> None:
    """UserError for a flag that is wrong whatever the model is."""
    sampling.check_sampling(settings)
    for text in settings.prompt:
        sampling.check_text(text, "--prompt")
    sampling.check_text(settings.system or "", "--system")
    if settings.system is not None and not settings.chat:
        raise UserError("--system is a message of a chat. Add --chat, or leave it out.")
    if not settings.prompt and settings.prompt_file is None and not settings.chat:
        raise UserError("there is nothing to continue. Give --prompt, --prompt-file or --chat.")


def read_prompts(settings: Settings) -> list[str]:
    """The texts of --prompt and --prompt-file.

    UserError for a file that cannot be read, or a line that is not JSON where it must be.
    """
    prompts = list(settings.prompt)
    path = settings.prompt_file
    if path is None:
        return prompts
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
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
            sampling.check_text(prompt, f"{path}:{number}")
            prompts.append(prompt)
        else:
            raise UserError(
                f'{path}:{number}: the line is not a JSON string. Write it as "text", with \\n for a line end.'
            )
    if not prompts:
        raise UserError(f"--prompt-file {path} has no prompt. Write one on each line.")
    return prompts


def chat(model: "LanguageModel", tokenizer: "Tokenizer", settings: Settings, device: Any, turns: list[str]) -> None:
    """Answers `turns`, then the lines of the standard input (not with --prompt-file), all in one conversation.

    The cache keeps the keys and values of the tokens that a prompt shares with the last one. If the conversation no
    longer fits the context, its oldest turns are left out.
    """
    from .data.readers.document import Message
    from .files.untrusted import naming
    from .generation.conversation import chat_template, conversation_prompt

    template = chat_template(tokenizer, settings.model)
    conversation: list[Message] = []
    cache: list = []
    for turn in _read_turns(settings, turns):
        conversation.append(Message("user", turn))
        with naming(settings.model):
            prompt = conversation_prompt(model, template, settings.system, conversation, settings.max_new_tokens)
        for _ in range(prompt.left_out):
            print("(the oldest turn is left out: the context is full)", file=sys.stderr)
        conversation = conversation[2 * prompt.left_out :]
        answer = print_continuation(model, tokenizer, settings, device, prompt.ids, cache)
        conversation.append(Message("assistant", answer))


def _read_turns(settings: Settings, turns: list[str]) -> Iterator[str]:
    """The user's turns: `turns`, then the lines of the standard input. Each is shown after "> "."""
    for turn in turns:
        print(f"> {turn}", flush=True)
        yield turn
    if settings.prompt_file:
        return
    is_terminal = sys.stdin.isatty()
    while True:
        if is_terminal:
            print("> ", end="", flush=True)
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError:
            raise UserError("a line of the standard input is not UTF-8. Write it in UTF-8.") from None
        if not line:
            return
        sampling.check_text(line, "a line of the standard input")
        if not line.strip():
            continue
        if not is_terminal:  # a terminal shows what is typed
            print(f"> {line.rstrip()}", flush=True)
        yield line.rstrip("\r\n")


def print_continuation(
    model: "LanguageModel", tokenizer: "Tokenizer", settings: Settings, device: Any, prompt: list[int], cache: list
) -> str:
    """Prints the tokens after `prompt` while they are generated; returns their text. cache: of `sampling.sample`."""
    context = model.config.context
    left_out = sampling.beyond_context(model, prompt, settings.max_new_tokens)
    used = len(prompt) - left_out
    if left_out:
        print(f"(only the last {used} tokens of the prompt are used: the context is {context})", file=sys.stderr)
    tokens = []
    for token in sampling.stream(model, tokenizer, prompt, settings, device, cache):
        print(token.text, end="", flush=True)
        tokens.append(token)
    print(flush=True)
    if used + len(tokens) == context and len(tokens) < settings.max_new_tokens:
        print(f"(the text ends here: the context of {context} tokens is full)", file=sys.stderr)
    if settings.show_routing:
        heads = [token.heads for token in tokens]
        layers = [token.layers for token in tokens]
        print(routing_lines(model.names, heads, layers, [tokenizer.decode([token.id]) for token in tokens]))
    return "".join(token.text for token in tokens)


def routing_lines(names: Sequence[str], heads: list[list[float]], layers: list[list[float]], pieces: list[str]) -> str:
    """A line for each stretch of tokens with the same heaviest head: their numbers, mean weights and gates, and text.

    heads, layers: for each token, the candidates' output weights and gates. pieces: the tokens' texts.
    """
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
    """The mean of each candidate in `rows`, without means below 0.5%."""
    means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    return ", ".join(f"{name} {mean:.0%}" for name, mean in zip(names, means, strict=True) if mean >= 0.005)


if __name__ == "__main__":
    run_main(main, read_settings(Settings, __doc__))
