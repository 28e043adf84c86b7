"""What evaluate scores: with --max-tokens the first windows of a text, at a cost that does not grow with the text."""

import json
import sys
from types import SimpleNamespace

import pytest

from forge_common.data.tokenizer import byte_tokenizer
from forge_common.evaluate import Settings
from forge_common.evaluation.columns import read_columns

CONFIG = SimpleNamespace(max_position_embeddings=16, ignore_index=-100, eos_token_id=byte_tokenizer().eos_token_id)


def settings(folder, max_tokens):
    return Settings(model="", data=(), sequence_length=16, max_tokens=max_tokens, cache_dir=folder / "cache")


def written(folder, documents):
    path = folder / f"{documents}.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i}: " + "word " * (i % 9)}) + "\n" for i in range(documents)))
    return str(path)


@pytest.mark.parametrize("max_tokens", [1, 15, 16, 17, 300, 10**6])
def test_max_tokens_takes_whole_windows_from_the_beginning_until_there_are_as_many(tmp_path, max_tokens):
    source = {"text": written(tmp_path, 60)}
    all_pieces = read_columns(source, byte_tokenizer(), CONFIG, settings(tmp_path, 0))["text"].pieces
    in_order = sorted(all_pieces, key=lambda piece: piece.document)
    chosen = sorted(
        read_columns(source, byte_tokenizer(), CONFIG, settings(tmp_path, max_tokens))["text"].pieces,
        key=lambda piece: piece.document,
    )
    sizes = [piece.scored for piece in chosen]
    assert [piece.tokens().tolist() for piece in chosen] == [p.tokens().tolist() for p in in_order[: len(chosen)]]
    assert len(chosen) == len(in_order) or sum(sizes) >= max_tokens
    assert sum(sizes[:-1]) < max_tokens


def test_the_work_of_max_tokens_does_not_grow_with_the_text(tmp_path):
    calls = []
    for documents in (300, 3000):
        source = {"text": written(tmp_path, documents)}
        read_columns(source, byte_tokenizer(), CONFIG, settings(tmp_path, 200))  # tokenizes it
        counted = 0

        def count(*_):
            nonlocal counted
            counted += 1

        sys.setprofile(count)
        try:
            read_columns(source, byte_tokenizer(), CONFIG, settings(tmp_path, 200))
        finally:
            sys.setprofile(None)
        calls.append(counted)
    assert calls[1] < 1.2 * calls[0], calls
