"""Files of records that are text themselves: .jsonl, .json, .csv. Read row by row, with the line of every fault."""

import codecs
import csv
import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import UserError
from .document import PIECE, Document, Reading, bad_line, bad_text, from_rows, opened

RECORD_LIMIT = 256 << 20  # bytes of one line or record: what is longer is a fault of the file, not a document
NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what errors="surrogateescape" makes of such bytes

Rows = Iterator[tuple[str, dict[str, Any]]]


def documents(path: Path, reading: Reading, counts: Counter) -> Iterator[Document]:
    """Read a .jsonl, .json or .csv file. Origin: path:line, where the record begins (from 1)."""
    rows = {".jsonl": _json_lines, ".json": _json_array, ".csv": _csv_rows}[path.suffix.lower()]
    return from_rows(rows(path, reading, counts), reading, counts)


def _lines(path: Path, reading: Reading, counts: Counter) -> Iterator[tuple[int, str]]:
    """(number, line with its end). What is not UTF-8 comes as lone surrogates, for from_text to replace or skip."""
    with opened(path) as file:
        number = 0
        while line := file.readline(RECORD_LIMIT + 1):
            number += 1
            if len(line) > RECORD_LIMIT:
                bad_line(f"{path}:{number}: the line is longer than {RECORD_LIMIT >> 20} MiB", reading, counts)
                while line and not line.endswith(b"\n"):
                    line = file.readline(PIECE)
                continue
            text = line.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape")
            _check(text, path, number, 0, reading)
            yield number, text


def _json_lines(path: Path, reading: Reading, counts: Counter) -> Rows:
    for number, line in _lines(path, reading, counts):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", "nested too deeply")
            torn = "" if line.endswith("\n") else " (the last line: the file may be cut off)"
            message = f"{path}:{number}:{getattr(error, 'pos', 0) + 1}: broken JSON: {reason}{torn}"
            bad_line(message, reading, counts)
            continue
        if isinstance(row, dict):
            yield f"{path}:{number}", row
        else:
            bad_line(f"{path}:{number}: not a JSON object but {type(row).__name__}", reading, counts)


def _json_array(path: Path, reading: Reading, counts: Counter) -> Rows:
    """An array of objects (or objects one after the other), never holding much more than one of them.

    After broken JSON nothing can be told apart any more: skipping gives up the rest of the file, counted once.
    """
    decoder, blocks = json.JSONDecoder(), _characters(path, reading)
    buffer, line, at = next(blocks, ""), 1, 0
    is_array = buffer.lstrip().startswith("[")
    between = re.compile(r"\s*\[\s*" if is_array else r"\s*")
    while True:
        start = between.match(buffer, at).end()
        between = re.compile(r"[\s,]*")
        line, at = line + buffer.count("\n", at, start), start
        if is_array and buffer.startswith("]", at):
            return
        try:
            row, end = decoder.raw_decode(buffer, at)
        except (ValueError, RecursionError) as error:
            # Perhaps the rest has not been read yet. To read twice as much each time keeps the work linear.
            more = "".join(islice(blocks, 1 + (len(buffer) - at) // PIECE))
            if more and len(buffer) - at < RECORD_LIMIT:
                buffer, at = buffer[at:] + more, 0
            elif at == len(buffer) and not is_array:
                return
            else:
                fault = line + buffer.count("\n", at, getattr(error, "pos", at))
                reason = getattr(error, "msg", "nested too deeply")
                return bad_line(f"{path}:{fault}: broken or cut off JSON: {reason}", reading, counts)
            continue
        if isinstance(row, dict):
            yield f"{path}:{line}", row
        else:
            bad_line(f"{path}:{line}: not a JSON object but {type(row).__name__}", reading, counts)
        line, at = line + buffer.count("\n", at, end), end


def _characters(path: Path, reading: Reading) -> Iterator[str]:
    """A file's text in blocks; what is not UTF-8 is treated as in _lines."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
    line, column, block = 1, 0, b"more"
    with opened(path) as file:
        while block:
            block = file.read(PIECE)
            text = decoder.decode(block, final=not block)
            _check(text, path, line, column, reading)
            line += text.count("\n")
            last_line = text[text.rfind("\n") + 1 :]
            column = len(last_line.encode("utf-8", "surrogateescape")) + (column if last_line == text else 0)
            yield text


def _check(text: str, path: Path, line: int, column: int, reading: Reading) -> None:
    """UserError for a byte that is not UTF-8, unless a policy allows it; `column`: bytes before text in its line."""
    bad = NOT_UTF8.search(text) if reading.on_bad_text == "refuse" and not text.isascii() else None
    if bad:
        before = text[: bad.start()]
        byte = len(before[before.rfind("\n") + 1 :].encode()) + 1 + (0 if "\n" in before else column)
        where = f"{path}:{line + before.count(chr(10))}:{byte}"
        raise bad_text(f"{where}: byte 0x{ord(bad[0]) - 0xDC00:02x} is not UTF-8")


def _csv_rows(path: Path, reading: Reading, counts: Counter) -> Rows:
    """Every cell is text, so that 'NA' and '007' stay what they are. The first row names the columns."""
    csv.field_size_limit(RECORD_LIMIT)
    reader = csv.reader((line for _, line in _lines(path, reading, counts)), strict=True)
    names: list[str] | None = None
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            bad_line(f"{path}:{number}: broken CSV: {error}", reading, counts)
            continue
        if not cells:
            continue
        if names is None:
            names = cells
            if len(set(names)) < len(names):
                raise UserError(f"{path}:{number}: two columns have the same name; rename one")
        elif len(cells) != len(names):
            bad_line(f"{path}:{number}: {len(cells)} cells where the header has {len(names)}", reading, counts)
        else:
            yield f"{path}:{number}", dict(zip(names, cells, strict=True))
