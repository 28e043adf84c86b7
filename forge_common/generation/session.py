"""A model in memory that answers requests of a page, one at a time: which modules it has, and what it generates."""

import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.readers.document import Message
from ..data.tokenizer import Tokenizer
from ..errors import UserError
from ..model.protocol import LanguageModel
from .conversation import chat_template, conversation_prompt
from .sampling import Sampling, beyond_context, check_sampling, check_text, stream

NUMBERS = {"temperature": (int, float), "top_p": (int, float), "max_new_tokens": (int,), "seed": (int,)}


@dataclass(frozen=True)
class Request:
    """What the page asks for. turns: of a conversation, the user's last; else `prompt` is continued."""

    prompt: str
    turns: tuple[Message, ...]
    system: str | None
    without: tuple[str, ...]
    sampling: Sampling


def read_request(content: Any) -> Request:
    """The JSON of a request, checked. UserError for what is wrong with it."""
    if not isinstance(content, dict):
        raise UserError("the request is not a JSON object. Load the page again.")
    fields = dict(content)
    prompt = fields.pop("prompt", "")
    system = fields.pop("system", None)
    without = fields.pop("without", [])
    messages = fields.pop("messages", [])
    if not isinstance(prompt, str) or not isinstance(system, str | None):
        raise UserError("prompt and system must be texts. Load the page again.")
    if not isinstance(without, list) or not all(isinstance(name, str) for name in without):
        raise UserError("without must be a list of names of modules. Load the page again.")
    if unknown := sorted(fields.keys() - NUMBERS.keys()):
        raise UserError(f"the request has the unknown field {unknown[0]!r}. Load the page again.")
    for name, value in fields.items():
        if type(value) not in NUMBERS[name]:
            kind = "a whole number" if NUMBERS[name] == (int,) else "a number"
            raise UserError(f"{name.replace('_', ' ')} is {value!r}. Give {kind}.")
    sampling = Sampling(**fields)
    check_sampling(sampling)
    turns = _turns(messages)
    for text in (prompt, system or "", *(turn.content for turn in turns)):
        check_text(text, "the text")
    return Request(prompt, turns, system, tuple(without), sampling)


def _turns(messages: Any) -> tuple[Message, ...]:
    roles = ("user", "assistant")
    if not isinstance(messages, list) or (messages and len(messages) % 2 == 0):
        raise UserError("messages must be a list that begins and ends with the user's. Load the page again.")
    turns = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            raise UserError(f"message {number} does not have a role and a content. Load the page again.")
        if message["role"] != roles[number % 2] or not isinstance(message["content"], str):
            raise UserError(f"message {number} is not a text of the {roles[number % 2]}. Load the page again.")
        turns.append(Message(**message))
    return tuple(turns)


class Session:
    """make: returns the model without some modules; the one of the last request is kept, with its keys and values.

    place: what errors call the model. busy: held while a text is generated. stopping: set to end the generation that runs.
    """

    def __init__(self, make: Callable[[Sequence[str]], LanguageModel], tokenizer: Tokenizer, device: Any, place: str):
        self.busy = threading.Lock()
        self.stopping = threading.Event()
        self._make = make
        self._tokenizer = tokenizer
        self._device = device
        self._place = place
        self._without: tuple[str, ...] = ()
        self._model = make(())
        self._cache: list = []

    def answer(self, request: Request) -> Generator[dict[str, Any]]:
        """The lines of the response, as they come: the names of the candidates, each token, and what ended the text or
        went wrong.

        The caller holds `busy`. A model may fail in any way, so every exception becomes a line; only those that are not
        a UserError are printed too.
        """
        try:
            yield from self._lines(request)
        except UserError as error:
            self._cache.clear()
            yield {"error": str(error)}
        except Exception as error:  # noqa: BLE001 (such as a lack of memory: the page must not wait for ever)
            self._cache.clear()
            traceback.print_exc()
            yield {"error": f"{type(error).__name__}: {error}. The console of forge_common.chat has more."}

    def _lines(self, request: Request) -> Iterator[dict[str, Any]]:
        if set(request.without) != set(self._without):
            self._cache.clear()
            self._model = self._make(request.without)
            self._without = request.without
        model = self._model
        sampling = request.sampling
        left_out = 0
        if request.turns:
            template = chat_template(self._tokenizer, self._place)
            ids, left_out = conversation_prompt(model, template, request.system, request.turns, sampling.max_new_tokens)
        else:
            ids = self._tokenizer.encode_prompt(request.prompt)
        left_out_tokens = beyond_context(model, ids, sampling.max_new_tokens)
        yield {"names": list(model.names), "turns_left_out": left_out, "tokens_left_out": left_out_tokens}
        for token in stream(model, self._tokenizer, ids, sampling, self._device, self._cache):
            if self.stopping.is_set():
                raise UserError("forge_common.chat was ended. Start it again.")
            yield {
                "text": token.text,
                "heads": [round(weight, 4) for weight in token.heads],
                "layers": [round(gate, 4) for gate in token.layers],
            }
        yield {"end": True}
