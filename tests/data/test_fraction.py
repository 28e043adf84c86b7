"""How many documents are held out: at least one, enough of a small corpus, one in a hundred of a large one."""

import dataclasses
import json
import re
import types
from pathlib import Path

import pytest
from small_artifacts import CONFIG

import train_shared
from forge_common.data.corpora import general_sample, open_corpora, tokenizer_for
from forge_common.data.fraction import FRACTION, fraction_for, too_few
from forge_common.data.readers.document import Reading
from forge_common.data.store import prepare
from forge_common.data.tokenizer import byte_tokenizer
from forge_common.errors import UserError


def corpus(folder: Path, texts: list[str], **changes) -> train_shared.Settings:
    file = folder / f"{len(list(folder.iterdir()))}.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    fixed = {"data": (str(file),), "output_dir": folder / "run", "cache_dir": folder / "cache"}
    return train_shared.Settings(**fixed | changes)


def numbered(count: int) -> list[str]:
    return [f"document {number}" for number in range(count)]


def held_out(settings: train_shared.Settings) -> int:
    fraction = fraction_for(settings)
    options = {"cache_dir": settings.cache_dir, "val_fraction": fraction, "report": lambda line: None}
    return prepare(settings.data[0], byte_tokenizer(), Reading(), **options).validation.documents


@pytest.mark.parametrize(
    ("documents", "given", "expected"),
    [(2, None, 1), (5, None, 1), (100, None, 10), (300, None, 20), (5, 1e-6, 1), (100, 1e-6, 1), (100, 0.0, 0)],
)
def test_at_least_one_document_and_enough_of_a_small_corpus(documents, given, expected, tmp_path):
    settings = corpus(tmp_path, numbered(documents), val_fraction=given)
    assert held_out(settings) == expected
    resumed = dataclasses.replace(settings, val_fraction=fraction_for(settings))
    assert fraction_for(resumed) == fraction_for(settings), "a settings.json gives the same"


def test_where_the_fraction_is_enough_it_stays(tmp_path):
    assert fraction_for(corpus(tmp_path, numbered(4000))) == FRACTION
    assert fraction_for(corpus(tmp_path, numbered(200), val_fraction=0.2)) == 0.2
    assert fraction_for(corpus(tmp_path, numbered(5), val_data=("elsewhere",))) == 0


def test_copies_count_once_and_are_never_in_both_parts(tmp_path):
    settings = corpus(tmp_path, numbered(4) * 100)
    assert held_out(settings) == 100
    with pytest.raises(UserError, match="no document was held out"):
        fraction_for(corpus(tmp_path, ["one"] * 50))


def test_a_source_of_which_every_row_is_left_out_has_no_text(tmp_path):
    """Of a table that is called .jsonl each line is a bad row."""
    settings = corpus(tmp_path, [], on_bad_line="skip")
    Path(settings.data[0]).write_text("a,b\n1,2\n3,4\n")
    with pytest.raises(UserError, match=r"holds no document \(left out: 3 skipped_bad_line\)\. "):
        fraction_for(settings)


def test_the_documents_of_all_sources_count_together(tmp_path):
    one, other = corpus(tmp_path, numbered(30)), corpus(tmp_path, [f"other {i}" for i in range(70)])
    both = dataclasses.replace(one, data=one.data + other.data, sequence_length=8, batch_size=16)
    corpora = open_corpora(both, byte_tokenizer(), CONFIG, lambda line: None)
    assert sum(part.tokens.documents for part in corpora.held_out) == 10 and corpora.fraction == fraction_for(both)


@pytest.mark.parametrize("content", ["", "{}", '{"val_fraction"'])
def test_a_cached_fraction_that_is_damaged_is_computed_again(content, tmp_path):
    settings = corpus(tmp_path, numbered(30))
    before = fraction_for(settings)
    (file,) = (settings.cache_dir / "fractions").iterdir()
    file.write_text(content)
    assert fraction_for(settings) == before == json.loads(file.read_text())["val_fraction"]


def test_one_text_is_one_source(tmp_path):
    """Under two names, its copies would be trained on and scored twice."""
    one = dataclasses.replace(corpus(tmp_path, numbered(30)), sequence_length=8, batch_size=16)
    (source,) = one.data
    by_another_name = str(Path(source).parent / ".." / Path(source).parent.name / Path(source).name)
    for data in ((source, source), (f"{source}@0.5", f"{source}@0.2"), (source, by_another_name)):
        with pytest.raises(UserError, match="has the text of"):
            open_corpora(dataclasses.replace(one, data=data), byte_tokenizer(), CONFIG, print)
    lines: list[str] = []
    open_corpora(dataclasses.replace(one, val_data=(source,)), byte_tokenizer(), CONFIG, lines.append)
    assert lines == [f"warning     --val-data {source} has the text of a source of --data: it is trained on"]


def test_a_file_of_two_sources_is_found_before_it_is_read(tmp_path):
    """A folder and a file in it: nothing is tokenized. With weights it is meant, and said."""
    folder = tmp_path / "texts"
    folder.mkdir()
    (corpus(folder, numbered(30)), corpus(folder, [f"other {i}" for i in range(30)]))
    data = (str(folder), f"{folder}/../texts/1.*")
    settings = corpus(tmp_path, [], data=data, sequence_length=8, batch_size=16, tokenizer="train:300")
    expected = f"--data: {data[1]} has the text of {folder}: both read {folder / '1.jsonl'}. Name it once"
    for read in (tokenizer_for, lambda settings: open_corpora(settings, byte_tokenizer(), CONFIG, print)):
        with pytest.raises(UserError, match=re.escape(expected)):
            read(settings)
    assert not settings.cache_dir.exists()
    lines: list[str] = []
    weighted = dataclasses.replace(settings, data=(f"{data[0]}@0.5", f"{data[1]}@0.5"))
    open_corpora(weighted, byte_tokenizer(), CONFIG, lines.append)
    assert lines == [f"warning     --data: {data[1]}@0.5 and {data[0]}@0.5 both read {folder / '1.jsonl'}"]


def test_a_file_that_is_trained_on_and_validated_on_is_named(tmp_path):
    """A file of a folder that --data names."""
    folder = tmp_path / "texts"
    folder.mkdir()
    (corpus(folder, numbered(30)), corpus(folder, [f"other {i}" for i in range(9)]))
    shape = {"sequence_length": 8, "batch_size": 16, "cache_dir": tmp_path / "cache", "data": (str(folder),)}
    settings = dataclasses.replace(corpus(tmp_path, numbered(9)), **shape)
    outside = str(tmp_path / "1.jsonl")
    lines: list[str] = []
    val_data = (outside, f"{folder}/../texts/1.json*")
    open_corpora(dataclasses.replace(settings, val_data=val_data), byte_tokenizer(), CONFIG, lines.append)
    assert lines == [f"warning     --val-data {val_data[1]}: --data reads 1 of its files too: it is trained on"]


def test_a_general_sample_of_few_documents_is_said_to_be_empty(tmp_path):
    settings = corpus(tmp_path, numbered(10))
    lines: list[str] = []
    general = types.SimpleNamespace(**vars(settings), general_data=settings.data, general_tokens=100)
    assert general_sample(general, byte_tokenizer(), -100, lines.append) == []
    assert lines[-1].startswith(f"warning     the loss on {settings.data[0]} is not measured")


def test_a_few_documents_are_said_to_be_few():
    assert too_few(20) is too_few(0) is None
    assert "5 held-out documents" in str(too_few(5)) and "about 0.45 nats" in str(too_few(5))


def test_only_what_is_held_out_is_tokenized(tmp_path):
    """The same tokens as of the whole corpus, which is not needed for them, and is used where it is there."""
    settings = corpus(tmp_path, numbered(300))
    options = {"val_fraction": 0.1, "report": lambda line: None}
    source, tokenizer = settings.data[0], byte_tokenizer()
    part = prepare(source, tokenizer, Reading(), cache_dir=tmp_path / "a", only_held_out=True, **options)
    whole = prepare(source, tokenizer, Reading(), cache_dir=tmp_path / "b", **options)
    again = prepare(source, tokenizer, Reading(), cache_dir=tmp_path / "b", only_held_out=True, **options)
    assert part.train.documents == 0 < part.validation.documents and len(list((tmp_path / "b").iterdir())) == 1
    assert part.validation.digest == whole.validation.digest == again.validation.digest
    assert prepare(source, tokenizer, Reading(), cache_dir=tmp_path / "a", **options).train.documents > 0
    nothing = options | {"val_fraction": 0.0}
    assert not prepare(
        source, tokenizer, Reading(), cache_dir=tmp_path / "c", only_held_out=True, **nothing
    ).validation.documents
