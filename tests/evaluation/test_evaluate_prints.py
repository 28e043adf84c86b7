"""What `evaluate` prints: tables that fit, what is scored before it is scored, how far it is, what is missing."""

import itertools
import json
import os
import pty
import re
import select
import sys
import termios
from dataclasses import replace

import pytest
from small_artifacts import assembling, edit, refused

from forge_common import assemble, evaluate
from forge_common.data.windows import Tokens
from forge_common.evaluation.chart import draw
from forge_common.evaluation.progress import Progress
from forge_common.evaluation.table import removals, table


def made_up(models: list[str], domains: list[str]) -> list[dict]:
    """Rows with a different loss each."""
    rows = []
    for number, (model, domain) in enumerate(itertools.product(models, domains)):
        loss = 2 + number / 100
        row = {"model": model, "domain": domain, "loss": loss, "perplexity": 2.0**loss, "stderr": 0.01}
        row |= {"bits_per_byte": None if domain == "spliced" else loss / 3}
        if model.startswith(("assembled", "without:")):
            names = ["trunk", *(name.removeprefix("module:") for name in models if name.startswith("module:"))]
            row |= {kind: dict.fromkeys(names, 1 / len(names)) for kind in ("layer_gates", "head_weights")}
        rows.append(row)
    return rows


@pytest.mark.parametrize("number", [1, 3, 12])
def test_tables_fit_80_columns_and_have_every_loss_once(number, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    names = [f"domain-{i}" for i in range(number)]
    models = ["trunk", *(f"module:{name}" for name in names), "assembled", f"without:{names[0]}"]
    rows = made_up(models, [*names, "spliced"])
    for text in (table(rows), table(rows, details=True), removals(rows)):
        assert max(map(len, text.splitlines())) <= 80
    losses = table(rows).split("\n\ncredits")[0]
    assert sorted(re.findall(r"\d\.\d{3}(?= \()", losses)) == sorted(f"{row['loss']:.3f}" for row in rows)
    for block in losses.removeprefix("nats per token (perplexity)\n").split("\n\n"):  # each with its names
        assert [line.split()[0] for line in block.splitlines()[1:]] == models


def test_a_chart_is_as_wide_as_its_names():
    """The legend stands right of the plot, and the names of the texts left of it, at 7 units a letter or more."""
    rows = made_up(["trunk", "a model whose name takes all of this line"], ["a text with a long name"])
    chart = draw(rows)
    width = int(re.search(r'<svg[^>]* width="(\d+)"', chart)[1])
    for row in rows:
        x = int(re.search(rf'<text x="(\d+)"[^>]*>{row["model"]}<', chart)[1])
        assert x + 7 * len(row["model"]) <= width
    assert int(re.search(r'<text x="(\d+)"[^>]*>a text with', chart)[1]) >= 7 * len(rows[0]["domain"])


def test_a_cell_is_nats_and_perplexity_and_the_rest_comes_on_request():
    rows = made_up(["trunk", "assembled", "without:law"], ["law", "spliced"])
    rows[0] |= {"loss": 3.8974, "perplexity": 49.27, "stderr": 0.0681}
    short, long = table(rows), table(rows, details=True)
    assert "3.897 (49)" in short and "0.068" not in short and "bits" not in short and "in without" not in short
    assert "3.897 (49)" in long and "0.068" in long and "bits per byte" in long and "credits in without:law" in long


def test_it_says_first_what_is_scored_and_opens_each_corpus_once(root, tmp_path, capsys):
    """Without a terminal also a line for each text of each model; the JSON has what the table leaves out."""
    source = tmp_path / "text.jsonl"
    source.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(9)))
    edit(root / "trunk" / "forge.json", sources=[str(source)], data={str(source): "0" * 64}, val_fraction=0.5)
    assemble.main(assembling(root))
    settings = evaluate.Settings(
        str(root / "new" / "assembled"),
        (f"a={source}",),
        without=("one",),
        cache_dir=tmp_path / "cache",
        json=tmp_path / "rows.json",
    )
    evaluate.main(settings)
    capsys.readouterr()
    opened = 0

    def count(frame, event, _):
        nonlocal opened
        opened += event == "call" and frame.f_code is Tokens.__init__.__code__

    sys.setprofile(count)
    try:
        evaluate.main(settings)
    finally:
        sys.setprofile(None)
    lines = capsys.readouterr().out.splitlines()
    assert opened == 2, "the training part and the held-out part"
    assert re.fullmatch(r"evaluate    5 models on 1 texts, \d\d tokens each: about \d+s on cpu", lines[0])
    assert re.match(r"scoring     a: \d\d tokens of [1-8] documents, held out by trunk", lines[1])
    models = ["trunk", "module:one", "module:two", "assembled", "without:one"]
    assert [re.sub(r": \d.*", "", line) for line in lines[2:7]] == [f"scored      {model} on a" for model in models]
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {"stderr", "bits_per_byte", "perplexity"} <= rows[0].keys()


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, (24, 80))
    monkeypatch.setattr(sys, "stderr", os.fdopen(writer, "w"))
    progress = Progress()
    progress.start(4.0)
    progress.begin("assembled on law", 2.0)
    progress.add(1)
    progress.end({"loss": 1.0})
    progress.begin("without:law on law", 1.0)
    shown = ""
    while "without:law on law  50%" not in shown and select.select([reader], [], [], 60)[0]:
        shown += os.read(reader, 10_000).decode()  # a terminal may pass it on in pieces
    progress.close()
    assert "assembled on law   0%" in shown and "without:law on law  50%" in shown
    assert capsys.readouterr().out == ""


def test_what_is_not_there_is_named_with_the_nearest_name(root):
    settings = evaluate.Settings(str(root / "trunc"), ("a=b",))
    assert refused(evaluate.main, settings) == f"--model {root}/trunc is not there; did you mean {root}/trunk?"
    settings = evaluate.Settings("missing", ("a=b",))
    assert refused(evaluate.main, settings) == "--model missing is not there"
    settings = evaluate.Settings(str(root / "trunk"), ("a=b",), module=(root / "one", root / "twos"))
    assert refused(evaluate.main, settings) == f"--module {root}/twos is not there; did you mean {root}/two?"


def test_modules_of_one_name_have_a_row_each(root, tmp_path, capsys):
    """Two runs of one module are compared; what each of them held out counts."""
    source = tmp_path / "text.txt"
    source.write_text("some text " * 30)
    edit(root / "one" / "module.json", name="same")
    edit(root / "two" / "module.json", name="same")
    modules = (root / "one", root / "two")
    settings = evaluate.Settings(str(root / "trunk"), (f"a={source}",), module=modules, cache_dir=tmp_path / "cache")
    assert list(evaluate.metadata_of_parts(settings)) == ["trunk", *(f"module {folder}" for folder in modules)]
    evaluate.main(settings)
    printed = capsys.readouterr().out.split("nats per token (perplexity)")[1].split("\n\n")[0]
    assert [line.split()[0] for line in printed.splitlines()[2:]] == [
        "trunk",
        *(f"module:{folder}" for folder in modules),
    ]
    assert "given twice" in refused(evaluate.main, replace(settings, module=(root / "one", root / "one")))
    assert "--without one is given twice" in refused(
        evaluate.main, replace(settings, module=(), without=("one", "one"))
    )


def test_two_texts_of_one_name_are_refused(root, tmp_path):
    source = tmp_path / "text.txt"
    source.write_text("some text")
    settings = evaluate.Settings(str(root / "trunk"), (f"a={source}", f"a={tmp_path}"))
    assert "another column called a" in refused(evaluate.main, settings)
    settings = evaluate.Settings(str(root / "trunk"), (f"a={source}", f"spliced={source}"), spliced=8)
    assert "another column called spliced" in refused(evaluate.main, settings)


def test_no_text_is_refused(root):
    assert "--data names no source" in refused(evaluate.main, evaluate.Settings(str(root / "trunk"), ()))


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", 0), ("sequence_length", 0), ("max_tokens", -5), ("spliced", -1), ("val_fraction", 2.0)],
)
def test_impossible_numbers_are_refused(root, tmp_path, name, value):
    settings = evaluate.Settings(str(root / "trunk"), (f"a={tmp_path}",), **{name: value})
    assert f"--{name.replace('_', '-')} is {value}" in refused(evaluate.main, settings)


def test_windows_longer_than_the_context_are_refused(root, tmp_path):
    """Their positions are none that the model was trained on."""
    source = tmp_path / "text.txt"
    source.write_text("some text " * 30)
    assemble.main(assembling(root))
    for model in ("trunk", "new/assembled"):
        settings = evaluate.Settings(str(root / model), (f"a={source}",), sequence_length=65, cache_dir=tmp_path)
        assert "--sequence-length 65 exceeds the trunk's context of 64 tokens" in refused(evaluate.main, settings)
    evaluate.main(replace(settings, sequence_length=64, max_tokens=64))


@pytest.mark.parametrize(("max_tokens", "said"), [(100, True), (128, False), (0, False)])
def test_max_tokens_takes_whole_windows_and_says_so(root, tmp_path, capsys, max_tokens, said):
    source = tmp_path / "text.txt"
    source.write_text("some text " * 30)
    evaluate.main(
        evaluate.Settings(str(root / "trunk"), (f"a={source}",), max_tokens=max_tokens, cache_dir=tmp_path / "cache")
    )
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("scoring "))
    assert (f"128 tokens of 1 documents (--max-tokens {max_tokens}, in whole windows)" in line) == said
    assert ("128 tokens" in line) == (max_tokens > 0) and ("whole" in line) == said


def test_the_folder_of_a_result_is_made_before_anything_is_scored(root, tmp_path, capsys):
    source = tmp_path / "text.txt"
    source.write_text("some text " * 30)
    outputs = {name: tmp_path / "new" / name / f"rows.{name}" for name in ("json", "svg", "report")}
    settings = evaluate.Settings(
        str(root / "trunk"), (f"a={source}",), cache_dir=tmp_path / "cache", max_tokens=64, **outputs
    )
    evaluate.main(settings)
    assert all(path.is_file() for path in outputs.values())
    capsys.readouterr()
    for path, problem in ((tmp_path, "is a folder"), (source / "rows.json", "cannot be written")):
        assert problem in refused(evaluate.main, replace(settings, json=path))
        assert not capsys.readouterr().out, "it is known before anything is scored"
