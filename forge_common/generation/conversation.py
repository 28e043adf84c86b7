"""The prompt of a conversation, by the tokenizer's chat template, cut to the context at its oldest turns."""

from collections.abc import Sequence
from typing import NamedTuple

from ..data.chat import ChatTemplate
from ..data.readers.document import Message
from ..data.tokenizer import Tokenizer
from ..errors import UserError
from ..model.protocol import LanguageModel


class Prompt(NamedTuple):
    ids: list[int]
    left_out: int
    """Turns at the beginning of the conversation that are not in it: the context has no room."""


def chat_template(tokenizer: Tokenizer, place: str) -> ChatTemplate:
    """UserError where there is none."""
    if tokenizer.chat is None:
        raise UserError(
            f"{place} has no chat template, so --chat cannot be used. Use a model with a template in "
            "tokenizer_config.json or chat_template.jinja."
        )
    return tokenizer.chat


def conversation_prompt(
    model: LanguageModel, template: ChatTemplate, system: str | None, turns: Sequence[Message], max_new_tokens: int
) -> Prompt:
    """turns: of the user and of the assistant in turn, the user's last. UserError where the template refuses them."""
    before = [] if system is None else [Message("system", system)]
    context = model.config.context
    room = context - min(max_new_tokens, context // 2)
    start = 0
    try:
        ids = template.prompt([*before, *turns])
        while len(ids) > room and start + 1 < len(turns):
            start += 2
            ids = template.prompt([*before, *turns[start:]])
    except ValueError as reason:
        raise UserError(f"{reason}. Leave out the system message, or use another model.") from None
    return Prompt(ids, start // 2)
