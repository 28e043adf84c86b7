"""From conversations to ids through the tokenizer's own chat template, and which of the ids are answers.

Special tokens enter where the template writes them: '<|im_end|>' in a message is ten characters.

A template is a program, so where it puts a message's text is found by running it again, with marks: characters that
occur in none of the texts, around each text. If the result without the marks is what the template writes without them,
the places of the marks are those of the texts. If it is not, the template changes the texts, and only what it encloses
in {% generation %} is known.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jinja2 import Template
from tokenizers import Tokenizer as Backend

from ..files.untrusted import quoted
from .jinja import compiled
from .readers.document import Message

PRIVATE = range(0xF0000, 0xFFFFE)  # characters without a meaning, of which a text rarely has any


class Mark(IntEnum):
    CONTEXT_BEGINS = 0  # before the text of a message that is not an answer
    ANSWER_BEGINS = 1  # before the text of an answer
    TEXT_ENDS = 2  # after either
    GENERATION_BEGINS = 3  # before and after what {% generation %} encloses
    GENERATION_ENDS = 4


NO_MARKS = ("",) * len(Mark)


class Encoded(NamedTuple):
    """A conversation. ids: those of apply_chat_template. scored: bool [len(ids)]. bytes: of its text without special tokens.

    is_open: the last id is of an answer, and no special token.
    """

    ids: list[int]
    scored: np.ndarray
    bytes: int
    is_open: bool


class Span(NamedTuple):
    """A part of a rendered conversation, in characters."""

    start: int
    end: int
    scored: bool


class Located(NamedTuple):
    """A rendered conversation, and places in it, in characters."""

    text: str
    contents: list[Span]
    """The messages' texts; [] where the template changes them."""
    answers: list[tuple[int, int]]
    """What is scored: [start, end)."""


class ChatTemplate:
    """A chat template with the tokenizer that it was written for. The errors of all methods are ValueErrors.

    source: the Jinja program. tokens: the names of special tokens that it may use, such as {"bos_token": "<s>"}.
    """

    def __init__(self, source: str, tokens: dict[str, str], backend: Backend):
        self.source = source
        self.tokens = tokens
        self._plain_backend = backend
        self._special = {i: token.content for i, token in backend.get_added_tokens_decoder().items() if token.special}
        longest_first = sorted(self._special.values(), key=len, reverse=True)
        matches_nothing = "(?!)"
        self._special_text = re.compile("|".join(map(re.escape, longest_first)) or matches_nothing)

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """The ids of a conversation and which of them are answers: the texts of messages that are `scored`, with what
        ends them.

        Where the template encloses something in {% generation %}, that is the answer instead. A token that is only in
        part of an answer is scored.
        """
        text, contents, answers = self._located(messages)
        if not answers:
            raise ValueError("the chat template leaves no answer of it")
        is_answer = np.zeros(len(text) + 1, dtype=np.int64)
        for start, end in answers:
            is_answer[start + 1 : end + 1] = 1
        answer_before = is_answer.cumsum()  # characters of answers before each place
        ids, starts, ends = self._ids(text, contents)
        scored = answer_before[np.maximum(ends, starts + 1).clip(max=len(text))] > answer_before[starts]
        special = sum(
            len(text[start:end].encode())
            for number, start, end in zip(ids, starts.tolist(), ends.tolist(), strict=True)
            if number in self._special
        )
        return Encoded(ids, scored, len(text.encode()) - special, bool(scored[-1]) and ids[-1] not in self._special)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation up to where the next answer begins."""
        text = self._render(messages, add_generation_prompt=True)
        if not any(self._special_text.search(message.content) for message in messages):
            return self._ids(text, [])[0]
        marked = self._marked(messages, text, add_generation_prompt=True)
        if marked is None:
            raise ValueError("a message spells a special token, and the chat template changes the messages' texts")
        return self._ids(text, marked[0])[0]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the template."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    @cached_property
    def _backend(self) -> Backend:
        """A copy whose special tokens are recognized in a text, without the post-processor, which would move offsets."""
        backend = Backend.from_str(self._plain_backend.to_str())
        backend.post_processor = None  # pyright: ignore[reportAttributeAccessIssue] (the stub does not allow None)
        return backend

    @cached_property
    def end_of_turn(self) -> int | None:
        """The special token that the template writes after an answer; None where there is none."""
        try:
            text, _, answers = self._located((Message("user", "x"), Message("assistant", "y", scored=True)))
        except ValueError:
            return None
        found = [match[0] for start, end in answers for match in self._special_text.finditer(text, start, end)]
        return self._backend.token_to_id(found[-1]) if found else None

    def _render(
        self, messages: Sequence[Message], marks: Sequence[str] = NO_MARKS, add_generation_prompt: bool = False
    ) -> str:
        try:
            return self._template.render(
                messages=[{"role": message.role, "content": message.content} for message in messages],
                tools=None,
                documents=None,
                generation_marks=(marks[Mark.GENERATION_BEGINS], marks[Mark.GENERATION_ENDS]),
                add_generation_prompt=add_generation_prompt,
                **self.tokens,
            )
        except Exception as reason:  # noqa: BLE001 (the program may do anything that ends in an error)
            raise ValueError(f"the chat template refuses it ({quoted(str(reason) or type(reason).__name__)})") from None

    @cached_property
    def _template(self) -> Template:
        return compiled(self.source)

    def _located(self, messages: Sequence[Message]) -> Located:
        """The rendered conversation with the places of the messages' texts and of the answers."""
        text = self._render(messages)
        marked = self._marked(messages, text)
        if marked is None:
            return Located(text, [], self._generations_alone(messages))
        contents, generations = marked
        if not generations:
            return Located(text, contents, self._answers(text, contents))
        unscored = [span.start for span in contents if not span.scored]
        scored = [(start, end) for start, end in generations if not any(start <= place < end for place in unscored)]
        return Located(text, contents, scored)

    def _generations_alone(self, messages: Sequence[Message]) -> list[tuple[int, int]]:
        """What {% generation %} encloses, of a template that changes the texts. ValueError where that is not enough."""
        *_, generations = self._parsed(*self._with_marks(messages, lambda content, begins, ends: content))
        is_partly_scored = any(message.role == "assistant" and not message.scored for message in messages)
        spells_special = any(self._special_text.search(message.content) for message in messages)
        if not generations or is_partly_scored or spells_special:
            raise ValueError(
                "the chat template changes the texts of its messages, so that they cannot be found in what it writes; "
                "enclose the answers in {% generation %} and {% endgeneration %} in the template"
            )
        return generations

    def _answers(self, text: str, contents: list[Span]) -> list[tuple[int, int]]:
        """The texts that are scored, each with the special token that ends it, or, of the last message, with the rest."""
        answers = []
        for number, span in enumerate(contents):
            if not span.scored:
                continue
            limit = contents[number + 1].start if number + 1 < len(contents) else len(text)
            end_of_turn = self._special_text.search(text, span.end, limit)
            if end_of_turn:
                end = end_of_turn.end()
            elif limit == len(text):
                end = limit
            else:
                end = span.end
            answers.append((span.start, end))
        return answers

    def _marked(
        self, messages: Sequence[Message], text: str, add_generation_prompt: bool = False
    ) -> tuple[list[Span], list[tuple[int, int]]] | None:
        """The places of the messages' texts in `text`, and of what {% generation %} encloses; None where the template
        changes the texts.
        """

        def around(content: str, begins: str, ends: str) -> str:
            return f"{begins}{content}{ends}"

        def within(content: str, begins: str, ends: str) -> str:  # a template may strip white space
            inner = content.strip()
            start = content.index(inner)
            return f"{content[:start]}{begins}{inner}{ends}{content[start + len(inner) :]}"

        for mark in (around, within):
            unmarked, contents, generations = self._parsed(*self._with_marks(messages, mark, add_generation_prompt))
            if unmarked == text and contents is not None:
                return contents, generations
        return None

    def _with_marks(
        self,
        messages: Sequence[Message],
        mark: Callable[[str, str, str], str],
        add_generation_prompt: bool = False,
    ) -> tuple[str, list[str]]:
        """What the template writes for the messages with marks, and the marks, which occur in none of the texts.

        mark: from a text and the marks of its beginning and end to the text with them.
        """
        used = set().union(*(message.content for message in messages))
        unused = (chr(code) for code in PRIVATE if chr(code) not in used)
        marks = [next(unused) for _ in Mark]
        marked = []
        for message in messages:
            begins = marks[Mark.ANSWER_BEGINS if message.scored else Mark.CONTEXT_BEGINS]
            marked.append(message._replace(content=mark(message.content, begins, marks[Mark.TEXT_ENDS])))
        return self._render(marked, marks, add_generation_prompt), marks

    def _parsed(self, marked: str, marks: list[str]) -> tuple[str, list[Span] | None, list[tuple[int, int]]]:
        """The text without marks, the messages' texts (None where a mark is missing) and the generations."""
        text = []
        at = 0  # characters so far, without marks
        contents: list[Span] | None = []
        generations = []
        opened: tuple[int, bool] | None = None
        generation_start = 0
        for part in re.split(f"([{''.join(marks)}])", marked):
            if part not in marks:
                text.append(part)
                at += len(part)
                continue
            kind = marks.index(part)
            if kind == Mark.GENERATION_BEGINS:
                generation_start = at
            elif kind == Mark.GENERATION_ENDS:
                generations.append((generation_start, at))
            elif contents is None or (kind == Mark.TEXT_ENDS) == (opened is None):
                contents = None  # an end without a beginning, or a beginning within a text
            elif opened is None:
                opened = (at, kind == Mark.ANSWER_BEGINS)
            else:
                contents.append(Span(opened[0], at, opened[1]))
                opened = None
        return "".join(text), contents if opened is None else None, generations

    def _ids(self, text: str, contents: Sequence[Span]) -> tuple[list[int], np.ndarray, np.ndarray]:
        """The ids of a rendered text, and where each begins and ends: int64 [len(ids)]. Special tokens in `contents` are text."""
        spelled = [
            match.span() for span in contents for match in self._special_text.finditer(text, span.start, span.end)
        ]
        cuts = [0, *(place for span in spelled for place in span), len(text)]
        ids: list[int] = []
        places = []
        for number, (start, end) in enumerate(pairwise(cuts)):
            self._backend.encode_special_tokens = number % 2 == 1
            # A piece in the middle is read after a line end, so that SentencePiece puts no space before it.
            before = "\n" if start else ""
            line_end = self._backend.encode(before, add_special_tokens=False).ids
            encoding = self._backend.encode(before + text[start:end], add_special_tokens=False)
            if encoding.ids[: len(line_end)] != line_end:
                before = ""
                line_end = []
                encoding = self._backend.encode(text[start:end], add_special_tokens=False)
            ids += encoding.ids[len(line_end) :]
            offsets = np.array(encoding.offsets[len(line_end) :], dtype=np.int64).reshape(-1, 2)
            places.append(offsets + (start - len(before)))
        starts, ends = np.concatenate(places).T
        return ids, starts, ends
