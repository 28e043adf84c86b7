"""Readers of .jsonl, .json and .csv files: row by row, with the line of every fault."""

import codecs
import csv
import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

from ...errors import UserError
from .document import PIECE, RECORD_LIMIT, Document, Reading, bad_line, bad_text
from .files import File, opened, suffixes
from .rows import columns_of, from_rows

SPACE = " \t\r\n"  # what JSON takes for white space; str.strip alone would take much more
NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what errors="surrogateescape" makes of such bytes

Rows = Iterator[tuple[str, dict[str, Any]]]


def documents(path: File, reading: Reading, counts: Counter) -> Iterator[Document]:
    """Read a .jsonl, .json or .csv file. Origin: path:line, where the record begins (from 1)."""
    rows = {".jsonl": _json_lines, ".json": _json_array, ".csv": _csv_rows}[suffixes(path)[0]]
    return from_rows(rows(path, reading, counts), reading, counts)


def _lines(path: File, reading: Reading, counts: Counter) -> Iterator[tuple[int, str]]:
    """(number, line with its end). Bytes that are not UTF-8 become lone surrogates, which from_text replaces or skips."""
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


def _decoder(reading: Reading) -> json.JSONDecoder:
    """As json.loads, but two texts in one object are an error, and long integers are accepted."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) < len(pairs) and sum(name == reading.text_column for name, _ in pairs) > 1:
            raise ValueError(f"{reading.text_column!r} is there twice")
        return row

    def number(digits: str) -> float:
        return int(digits) if len(digits) < 20 else float(digits)  # Python refuses integers of over 4300 digits

    return json.JSONDecoder(object_pairs_hook=unique, parse_int=number)


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else getattr(error, "msg", str(error))


def _json_lines(path: File, reading: Reading, counts: Counter) -> Rows:
    decoder = _decoder(reading)
    for number, line in _lines(path, reading, counts):
        record = line.strip(SPACE)
        if not record:
            continue
        try:
            row = decoder.decode(record)
        except (ValueError, RecursionError) as error:
            column = line.index(record) + getattr(error, "pos", 0) + 1
            torn = "" if line.endswith("\n") else " (the last line: the file may be cut off)"
            bad_line(f"{path}:{number}:{column}: broken JSON: {_reason(error)}{torn}", reading, counts)
            continue
        if isinstance(row, dict):
            yield f"{path}:{number}", row
        else:
            bad_line(f"{path}:{number}: not a JSON object but {type(row).__name__}", reading, counts)


class _Json:
    """The text of a JSON file, a block at a time; `line` is the line of the next character."""

    def __init__(self, path: File, reading: Reading):
        self.blocks = _characters(path, reading)
        self.decoder = _decoder(reading)
        self.buffer = ""
        self.at = 0
        self.line = 1

    def values(self) -> Iterator[tuple[int, Any]]:
        """(line, value) of each. ValueError or RecursionError for what is not JSON; `line` is then the line of the fault."""
        if self.skip_space("[") != "[":  # objects one after the other
            while self.skip_space():
                yield self.line, self.value()
            return
        following = self.skip_space("]")
        while following != "]":
            self.skip_space()
            yield self.line, self.value()
            following = self.skip_space(",]")
            if following not in (",", "]"):
                raise ValueError(f"',' or ']' expected, not {following!a}" if following else "no ']' at the end")
        if self.skip_space():
            raise ValueError("something follows the array's ']'")

    def skip_space(self, wanted: str = "") -> str:
        """The next character that is not white space, '' at the end. If it is in `wanted`, reading goes on after it."""
        while True:
            end = self.at
            while end < len(self.buffer) and self.buffer[end] in SPACE:
                end += 1
            self._to(end)
            if end < len(self.buffer):
                self.at += self.buffer[end] in wanted
                return self.buffer[end]
            block = next(self.blocks, None)
            if block is None:
                return ""
            self.buffer = block
            self.at = 0

    def value(self) -> Any:
        """The value that begins here."""
        while True:
            fault = None
            value = None
            end = self.at
            try:
                value, end = self.decoder.raw_decode(self.buffer, self.at)
                if end < len(self.buffer) or isinstance(value, dict):
                    self._to(end)
                    return value  # a number at the end of a block may continue in the next
            except (ValueError, RecursionError) as error:
                fault = error
            # The rest of the value may not be read yet. Reading twice as much each time keeps the work linear.
            held = len(self.buffer) - self.at
            if held > RECORD_LIMIT:
                raise ValueError(f"a value longer than {RECORD_LIMIT >> 20} MiB") from fault
            more = "".join(islice(self.blocks, min(1 + held // PIECE, RECORD_LIMIT // PIECE)))
            if more:
                self.buffer = self.buffer[self.at :] + more
                self.at = 0
            elif fault is None:
                self._to(end)
                return value
            else:
                self._to(max(getattr(fault, "pos", self.at), self.at))
                raise fault

    def _to(self, end: int) -> None:
        self.line = self.line + self.buffer.count("\n", self.at, end)
        self.at = end


def _json_array(path: File, reading: Reading, counts: Counter) -> Rows:
    """An array of objects (or objects one after the other), never holding much more than one of them.

    After broken JSON the next object cannot be found: skipping leaves out the rest of the file, counted once.
    """
    text = _Json(path, reading)
    try:
        for line, row in text.values():
            if isinstance(row, dict):
                yield f"{path}:{line}", row
            else:
                bad_line(f"{path}:{line}: not a JSON object but {type(row).__name__}", reading, counts)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        bad_line(f"{path}:{text.line}: broken or cut off JSON: {_reason(error)}", reading, counts)


def _characters(path: File, reading: Reading) -> Iterator[str]:
    """A file's text in blocks; bytes that are not UTF-8 are treated as in _lines."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
    line = 1
    column = 0
    block = b"more"
    with opened(path) as file:
        while block:
            block = file.read(PIECE)
            text = decoder.decode(block, final=not block)
            _check(text, path, line, column, reading)
            line += text.count("\n")
            last_line = text[text.rfind("\n") + 1 :]
            column = len(last_line.encode("utf-8", "surrogateescape")) + (column if last_line == text else 0)
            yield text


def _check(text: str, path: File, line: int, column: int, reading: Reading) -> None:
    """UserError for a byte that is not UTF-8, unless a policy allows it; `column`: bytes before text in its line."""
    bad = NOT_UTF8.search(text) if reading.on_bad_text == "refuse" and not text.isascii() else None
    if bad:
        before = text[: bad.start()]
        byte = len(before[before.rfind("\n") + 1 :].encode()) + 1 + (0 if "\n" in before else column)
        where = f"{path}:{line + before.count(chr(10))}:{byte}"
        raise bad_text(f"{where}: byte 0x{ord(bad[0]) - 0xDC00:02x} is not UTF-8")


def _csv_rows(path: File, reading: Reading, counts: Counter) -> Rows:
    """Every cell is text, so that 'NA' and '007' stay what they are. The first row names the columns.

    After a record that is too long (an open quote) skipping leaves out the rest of the file, counted once: its lines
    may be parts of a cell.
    """
    csv.field_size_limit(RECORD_LIMIT)
    lines = _Record(_lines(path, reading, counts))
    reader = csv.reader(lines, strict=True)
    names: list[str] | None = None
    places: dict[str, int] = {}  # of the columns that are read
    while True:
        lines.length = 0
        number = lines.number + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if lines.length > RECORD_LIMIT:
                return bad_line(
                    f"{path}:{number}: the record is longer than {RECORD_LIMIT >> 20} MiB; is a quote open?",
                    reading,
                    counts,
                )
            bad_line(f"{path}:{number}: broken CSV: {error}", reading, counts)
            continue
        if not cells:
            continue
        if names is None:
            names = cells
            if len(set(names)) < len(names):
                raise UserError(f"{path}:{number}: two columns have the same name. Rename one.")
            places = {column: names.index(column) for column in columns_of(names, reading.text_column)}
            if not places:
                yield f"{path}:{number}", dict.fromkeys(names)
                return
        elif len(cells) != len(names):
            bad_line(f"{path}:{number}: {len(cells)} cells where the header has {len(names)}", reading, counts)
        else:
            yield f"{path}:{number}", {column: cells[place] for column, place in places.items()}


class _Record:
    """Lines for csv.reader, which has no limit of its own for a record. length: characters of it so far; number: its last line."""

    def __init__(self, lines: Iterator[tuple[int, str]]):
        self.lines = lines
        self.length = 0
        self.number = 0

    def __iter__(self) -> "_Record":
        return self

    def __next__(self) -> str:
        self.number, line = next(self.lines)
        self.length += len(line)
        if self.length > RECORD_LIMIT:
            raise csv.Error
        return line
