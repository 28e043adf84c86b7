"""Which documents `evaluate` scores: of a text that a part was trained on, what it held out; of other texts, all."""

import json
import shutil

import pytest
from small_artifacts import assembling, edit

from forge_common import assemble, evaluate
from forge_common.data.readers.document import Reading
from forge_common.data.store import prepare
from forge_common.data.tokenizer import byte_tokenizer

DOCUMENTS = 80


@pytest.fixture
def texts(tmp_path):
    """Names of files of DOCUMENTS documents each."""
    names = {}
    for name in ("law", "news", "other"):
        names[name] = str(tmp_path / f"{name}.jsonl")
        lines = [json.dumps({"text": f"{name} {number} " + "word " * 5}) for number in range(DOCUMENTS)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return names


def corpus(source: str, fraction: float, tmp_path):
    return prepare(source, byte_tokenizer(), Reading(), cache_dir=tmp_path / "cache", val_fraction=fraction)


def trained_on(path, source: str, fraction: float, tmp_path) -> None:
    """States in the metadata what a run that was trained on `source` publishes."""
    data = {source: corpus(source, fraction, tmp_path).train.digest}
    edit(path, sources=[source], data=data, val_fraction=fraction)


@pytest.fixture
def scored(root, tmp_path, capsys):
    """scored(modules, source...) -> for each source: how it was chosen, documents scored, the line that says so."""

    def call(modules, *sources: str, model="trunk", **more) -> list[tuple[str, int, str]]:
        data = tuple(f"t{number}={source}" for number, source in enumerate(sources))
        out = tmp_path / "rows.json"
        paths = {"cache_dir": tmp_path / "cache", "json": out}
        settings = evaluate.Settings(str(root / model), data, tuple(root / name for name in modules), **paths, **more)
        evaluate.main(settings)
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("scoring ")]
        written = json.loads(out.read_text())
        documents = {row["domain"]: row["documents"] for row in written["rows"]}
        assert len(lines) == len(sources)
        return [(written["texts"][name]["text"], documents[name], lines[i]) for i, name in enumerate(documents)]

    return call


def test_the_held_out_part_of_a_text_that_was_trained_on(root, texts, scored, tmp_path):
    """It is known by its name, or by its content under another one; the smallest share of those trained on it counts."""
    trained_on(root / "trunk" / "forge.json", texts["law"], 0.25, tmp_path)
    trained_on(root / "one" / "module.json", texts["law"], 0.1, tmp_path)
    trained_on(root / "two" / "module.json", texts["news"], 0.25, tmp_path)
    copy = tmp_path / "copy.jsonl"
    shutil.copy(texts["law"], copy)
    held_out = {share: corpus(texts["law"], share, tmp_path).validation.documents for share in (0.1, 0.25)}
    assert 0 < held_out[0.1] < held_out[0.25] < DOCUMENTS
    for source in (texts["law"], f"{texts['law']}@2", str(copy)):
        text, number, line = scored(("one", "two"), source)[0]
        assert (text, number) == ("held out", held_out[0.1])
        assert f"{number} documents, held out by trunk, module one: the first 10.00%" in line
        assert scored(("two",), source)[0][:2] == ("held out", held_out[0.25])


@pytest.mark.parametrize("share", [0, 0.0, 1e-12])
def test_a_module_that_held_out_nothing(root, texts, scored, share, tmp_path):
    """All of its text was trained on, and is called so; what it states changes nothing for other texts."""
    trained_on(root / "trunk" / "forge.json", texts["law"], 0.25, tmp_path)
    trained_on(root / "one" / "module.json", texts["news"], share, tmp_path)
    news, law, other = scored(("one",), texts["news"], texts["law"], texts["other"])
    assert news[:2] == ("trained on", DOCUMENTS) and "TRAINED ON by module one" in news[2]
    assert law[:2] == ("held out", corpus(texts["law"], 0.25, tmp_path).validation.documents)
    assert other[:2] == ("other", DOCUMENTS) and "no part states" in other[2]
    trained_on(root / "one" / "module.json", texts["law"], share, tmp_path)
    assert scored(("one",), texts["law"])[0][:2] == ("trained on", DOCUMENTS)
    assert scored((), texts["law"])[0][0] == "held out"


def test_a_text_that_has_changed_since_is_known_by_its_name(root, texts, scored, tmp_path):
    trained_on(root / "trunk" / "forge.json", texts["law"], 0.25, tmp_path)
    with open(texts["law"], "a") as file:
        file.write('\n{"text": "a new document"}')
    assert scored((), texts["law"])[0][:2] == ("held out", corpus(texts["law"], 0.25, tmp_path).validation.documents)


def test_an_explicit_share_wins(root, texts, scored, tmp_path):
    trained_on(root / "trunk" / "forge.json", texts["law"], 0.25, tmp_path)
    for share, number in ((1.0, DOCUMENTS), (0.5, corpus(texts["law"], 0.5, tmp_path).validation.documents)):
        text, documents, line = scored((), texts["law"], val_fraction=share)[0]
        assert (text, documents) == ("chosen", number) and "--val-fraction" in line


def test_the_parts_of_an_assembled_model(root, texts, scored, tmp_path):
    trained_on(root / "trunk" / "forge.json", texts["law"], 0.25, tmp_path)
    trained_on(root / "two" / "module.json", texts["news"], 0, tmp_path)
    assemble.main(assembling(root))
    law, news, other = scored((), *texts.values(), model="new/assembled")
    assert [law[0], news[0], other[0]] == ["held out", "trained on", "other"]


def test_a_trunk_that_does_not_say_its_text(root, texts, scored, tmp_path):
    (root / "trunk" / "forge.json").unlink()
    text, number, line = scored((), texts["law"])[0]
    assert (text, number) == ("other", DOCUMENTS) and "what trunk was trained on is not known" in line
