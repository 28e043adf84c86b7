"""From the rows of tables to documents: a column of text, or a conversation in `messages` or in `prompt` and `completion`."""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator
from itertools import islice
from typing import Any

from ...errors import UserError
from .document import PIECE, Document, Message, Reading, bad_line, checked, from_text, nearest

COLUMNS_NAMED = 100  # in a message
CONVERSATIONS = (("messages",), ("prompt", "completion"))  # the columns that hold one
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
SHAREGPT = "`from` and `value` are not read: docs/CHAT.md has a program that writes them as `messages`"
LONGEST_CONVERSATION = 4 * PIECE  # characters: it is tokenized at once


def columns_of(names: Collection[Any], text_column: str) -> tuple[str, ...]:
    """The columns to read among these: the text, else those of a conversation; () where there are neither."""
    for columns in ((text_column,), *CONVERSATIONS):
        if all(column in names for column in columns):
            return columns
    return ()


def from_rows(rows: Iterator[tuple[str, dict[str, Any]]], reading: Reading, counts: Counter) -> Iterator[Document]:
    """Turn (origin, row) pairs into documents.

    UserError if the column is missing or holds no text. A column that the *first* row does not have is a wrong flag,
    and an error under every policy: skipping would skip every row.
    """
    column = reading.text_column
    column_seen = False
    for origin, row in rows:
        columns = columns_of(row, column)
        if not columns:
            names = [str(name) for name in islice(row, COLUMNS_NAMED)]
            shown = ", ".join(name if name.isprintable() and len(name) < 80 else ascii(name)[:80] for name in names)
            more = f" and {len(row) - len(names)} more" if len(row) > len(names) else ""
            message = f"{origin}: no column {column!a}, only {shown or 'none'}{more}{nearest(column, names)}"
            if not column_seen and "conversations" in row:
                raise UserError(f"{message}. {SHAREGPT}. Or name the column that holds the text with --text-column.")
            if not column_seen:
                raise UserError(f"{message}. Name the column that holds the text with --text-column.")
            bad_line(message, reading, counts)
            continue
        column_seen = True
        if columns in CONVERSATIONS and not (columns == (column,) and isinstance(row[column], str)):
            document = _conversation(origin, row, columns, reading, counts)
        elif isinstance(row[column], str):
            document = from_text(origin, row[column], reading, counts)
        else:
            kind = "null" if row[column] is None else f"a value of type {type(row[column]).__name__}"
            bad_line(f"{origin}: column {column!r} holds {kind} where text should be", reading, counts)
            continue
        if document is not None:
            yield document


def _conversation(
    origin: str, row: dict[str, Any], columns: tuple[str, ...], reading: Reading, counts: Counter
) -> Document | None:
    """The conversation of a row. None, and counted, where a policy leaves it out.

    Answers are the assistant's messages, with a prompt those of the completion. A prompt that is a text is a message of
    the user, such a completion one of the assistant.
    """
    try:
        if columns == ("messages",):
            messages = _messages(row["messages"], "messages", None)
        else:
            prompt = [message._replace(scored=False) for message in _messages(row["prompt"], "prompt", "user")]
            messages = prompt + _messages(row["completion"], "completion", "assistant")
        if not any(message.scored for message in messages):
            raise ValueError("no message of role assistant, so nothing to learn")
        if sum(len(message.content) for message in messages) > LONGEST_CONVERSATION:
            raise ValueError(f"a conversation of more than {LONGEST_CONVERSATION >> 20} Mi characters")
    except ValueError as reason:
        bad_line(f"{origin}: {reason}", reading, counts)
        return None
    valid = []
    for message in messages:
        found = checked(origin, message.content, reading, counts)
        if found is None:
            return None
        valid.append(message._replace(content=found[0]))
    digest = hashlib.sha256(json.dumps(valid).encode()).digest()
    return Document(origin, digest, ("\n".join(message.content for message in valid),), tuple(valid))


def _messages(value: Any, column: str, role_of_text: str | None) -> list[Message]:
    """The messages in a column's value. ValueError for what is none."""
    if isinstance(value, str) and role_of_text:
        return [Message(role_of_text, value, scored=role_of_text == "assistant")]
    if not isinstance(value, list) or not value:
        raise ValueError(f"column {column!r} holds no list of messages")
    return [_message(item, f"message {number} of {column!r}") for number, item in enumerate(value, 1)]


def _message(item: Any, place: str) -> Message:
    fields = {name: value for name, value in item.items() if value is not None} if isinstance(item, dict) else {}
    if "from" in fields:
        raise ValueError(f"{place}: {SHAREGPT}")
    role = fields.get("role")
    content = fields.get("content")
    if role not in ROLES:
        raise ValueError(f"{place} has the role {str(role)[:80]!a}, not one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise ValueError(f"{place} has no text as its content")
    others = sorted(str(name)[:80] for name in fields.keys() - {"role", "content"})
    if others:
        raise ValueError(f"{place} also has {', '.join(others[:9])!a}, which is not read")
    return Message(role, content, scored=role == "assistant")
