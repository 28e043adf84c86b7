"""report.html: complete, harmless whatever it shows, made again from the run's files, and of no weight while it trains."""

import json
import re
import shutil
import time

import launch
import pytest
import reading_html
import torch
from small_artifacts import refused

from forge_common import evaluate, report
from forge_common.artifacts import assembled
from forge_common.evaluation.columns import read_columns
from forge_common.evaluation.tokens import read_along
from forge_common.reporting import charts, page, runs

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
PROMPT = "def <b>"


@pytest.fixture(scope="module")
def run(shared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "run"
    return folder, shared(folder, "--steps", 6, "--val-every", 3, "--sample-prompt", PROMPT)


def written(folder, *rows, **settings):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder


def remade(*paths, output):
    assert report.main(report.Settings(paths, output)) == 0
    return reading_html.read(output)


def test_a_run_leaves_its_curves_plan_settings_and_samples(run):
    folder, printed = run
    found = reading_html.read(folder / "report.html")
    assert not list(folder.glob(".tmp-*"))
    for title, keys in {
        "Loss": {"training": "train/loss", "validation": "val/loss"},
        "Learning rate": {"learning rate": "train/lr"},
        "Gradient norm": {"gradient norm": "train/grad_norm"},
        "Speed": {"speed": "train/tokens_per_second"},
        "Peak memory": {"device": "memory/peak_mb"},
    }.items():
        series = {one["name"]: one for one in found.chart(title)["series"]}
        assert series.keys() == keys.keys()
        for name, key in keys.items():
            rows = launch.rows(folder, key)
            assert series[name]["x"] == [row["step"] for row in rows]
            assert series[name]["y"] == pytest.approx([row[key] for row in rows], rel=1e-5)
    assert not any(chart["title"].startswith("val/") for chart in found.charts), "they are in the cards"
    plan = printed[printed.index("data  ") : printed.index("tracking")]
    assert plan.count("\n") > 5 and plan in found.text
    assert f"report      {folder}/report.html, refreshed while it trains\n" in printed
    assert "warmup_steps" in found.text and "6 of 6" in found.text and "b" not in found.tags
    for row in launch.rows(folder, "val/samples"):
        assert f"{row['step']}{row['val/samples'][0]['continuation']}" in found.text


def test_text_can_be_read_on_every_colour():
    """At its strongest each colour has a contrast of 4.5 to the text: WCAG 2.2, success criterion 1.4.3."""
    css = (page.FOLDER / "page.css").read_text()
    mixes = re.findall(r"color-mix\((.*?)\);", css + (page.FOLDER / "chat.css").read_text())
    assert len(mixes) == 6 and all("var(--strongest)" in mix for mix in mixes)
    assert ".heat small" not in css, "it has the colour of the text"

    def luminance(rgb):
        parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in rgb]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    dark = css.index("@media")
    values = {}
    for part in (css[:dark], css[dark : css.index("* {")]):  # the light theme, and what the dark one has instead
        values |= dict(re.findall(r"--(\w+): (#\w{6}|\d+%)", part))
        share = int(values["strongest"].rstrip("%")) / 100
        rgb = {name: [b / 255 for b in bytes.fromhex(value[1:])] for name, value in values.items() if value[0] == "#"}
        for name in ("better", "worse", *(f"c{number}" for number in range(8))):
            for back in (rgb["back"], rgb["panel"]):
                mixed = luminance([share * a + (1 - share) * b for a, b in zip(rgb[name], back, strict=True)])
                low, high = sorted((mixed, luminance(rgb["text"])))
                assert (high + 0.05) / (low + 0.05) >= 4.5, name


def test_a_report_is_made_again_from_the_files(run, tmp_path):
    folder, _ = run
    before = (folder / "report.html").read_text()
    again = remade(shutil.copytree(folder, tmp_path / folder.name), output=tmp_path / "again.html")
    assert again.charts == reading_html.Page(before).charts
    assert "<body>" in before, "it does not load itself again"


@pytest.mark.skipif(not reading_html.CHROMIUM, reason="no Chromium: the other tests read the page with html.parser")
def test_a_browser_draws_the_curves_without_an_error(run, tmp_path):
    drawn, console = reading_html.in_chromium(run[0] / "report.html", tmp_path)
    assert console == ""
    number = len(drawn.charts)
    assert drawn.tags.count("figure") == drawn.tags.count("canvas") == number >= 5
    for chart in drawn.charts:
        assert chart["title"] in drawn.text
    loss = launch.rows(run[0])[-1]["train/loss"]
    assert f"training{loss:.5g}" in drawn.text, "the legend has the newest value"


def test_nothing_that_is_shown_becomes_markup(tmp_path):
    rows = [{"step": 1, "train/loss": 2.0, f"train/{EVIL}": 1.0, f"val/loss/{EVIL}": 3.0, "val/loss": 3.0}]
    rows[0]["val/samples"] = [{"prompt": EVIL, "continuation": EVIL}]
    folder = written(tmp_path / "run", *rows, data=[EVIL], steps=1)
    (folder / "plan.txt").write_text(EVIL)
    one = remade(folder, output=tmp_path / "one.html")
    several = remade(folder, written(tmp_path / "other", *rows, data=[], steps=1), output=tmp_path / "several.html")
    shares = {"trunk": 0.5, EVIL: 0.5}
    row = {
        "model": "assembled",
        "domain": EVIL,
        "loss": 1.0,
        "stderr": None,
        "head_weights": shares,
        "layer_gates": shares,
    }
    token = {"text": EVIL, "loss": 1.0, "weights": [0.4, 0.6], "gates": [0.4, 0.6], "likeliest": [[EVIL, 0.1]]}
    texts = {EVIL: {"names": ["trunk", EVIL], "start": EVIL, "tokens": [token]}}
    (tmp_path / "losses.json").write_text(json.dumps({"rows": [row, row | {"model": EVIL}], "tokens": texts}))
    model = remade(tmp_path / "losses.json", output=tmp_path / "losses.html")
    for found in (one, several, model):
        assert "img" not in found.tags and "alert(1)" not in "".join(found.scripts) and EVIL in found.text
    assert one.chart(f"train/{EVIL}")["series"][0]["y"] == [1.0]


def test_several_runs_side_by_side(run, tmp_path):
    """A curve and a row for each, in the same colour everywhere, and the settings that differ."""
    other = shutil.copytree(run[0], tmp_path / "other")
    (other / "settings.json").write_text((other / "settings.json").read_text().replace('"lr": 0.003', '"lr": 0.5'))
    third = written(tmp_path / "third", {"step": 9, "val/loss": 1.5})
    (tmp_path / "assembled").mkdir()
    found = remade(run[0], tmp_path / "assembled", other, third, output=tmp_path / "all.html")
    losses = found.chart("Loss: training")["series"]
    validations = found.chart("Loss: validation")["series"]
    assert len(losses) == 2 and losses[0]["y"] == losses[1]["y"] and losses[0]["name"] != losses[1]["name"]
    assert [one["colour"] for one in losses] == [0, 1] and [one["colour"] for one in validations] == [0, 1, 2]
    assert "lr0.0030.5" in found.text and "hidden_size" in found.text and "1.5000 (update 9)" in found.text


def test_what_is_no_run_is_refused_with_its_place(tmp_path):
    folder = written(tmp_path / "run", {"step": 1, "train/loss": 2.0})
    log = folder / "metrics.jsonl"
    log.write_text(log.read_text() + '{"step": 2, "train/')  # killed while it wrote
    assert len(runs.read_run(folder).rows) == 1
    log.write_text(log.read_text() + '\n{"step": 3}\n')
    assert f"{log}:2 is not JSON" in refused(runs.read_run, folder)
    log.write_text('{"loss": 3}\n')
    assert f"{log}:1 is no row" in refused(runs.read_run, folder)
    (folder / "settings.json").write_text('{"steps"')
    log.write_text("")
    message = refused(runs.read_run, folder)
    assert message.startswith(f"{folder}/settings.json is not JSON") and message.endswith("then has no settings.")
    (tmp_path / "x.json").write_text("{}")
    for paths, problem in {
        (): "no path is given",
        (tmp_path / "none",): "does not exist",
        (tmp_path,): "no metrics.jsonl",
        (tmp_path / "x.json",): "no `rows`",
        (tmp_path, tmp_path / "x.json"): "none of the paths",
    }.items():
        assert problem in refused(report.main, report.Settings(paths))


def test_a_long_curve_is_drawn_by_means_and_a_gap_stays_a_gap():
    rows = [{"step": step, "train/loss": float(step)} for step in range(1, 5001)]
    [chart] = charts.charts({"run": rows})
    [series] = chart["series"]
    assert series["name"] == "training, means of 3 rows" and len(series["x"]) == 1667 <= charts.POINTS
    assert series["x"][:2] == [3, 6] and series["y"][:2] == [2.0, 5.0] and series["y"][-1] == 4999.5
    [chart] = charts.charts({"run": [{"step": 1, "train/loss": None}, {"step": 2, "train/loss": float("nan")}]})
    assert chart["series"][0]["y"] == [None, None]


def test_a_report_takes_its_share_of_the_time_and_ends_nothing(tmp_path):
    rows = [{"step": step, "train/loss": 1.0, "train/lr": 0.1} for step in range(2000)]
    folder, lines = written(tmp_path / "run", *rows, steps=3000), []
    live = runs.LiveReport(folder, 3000, lines.append)
    start = time.perf_counter()
    live.refresh()
    first = time.perf_counter() - start
    assert "<body data-running>" in (folder / "report.html").read_text()
    (folder / "report.html").unlink()
    while time.perf_counter() < start + min(20 * first, 2):
        live.refresh()
    assert not (folder / "report.html").exists(), "the next one is due after a hundred times as long"
    live.refresh(last=True)
    assert "<body>" in (folder / "report.html").read_text()
    shutil.rmtree(folder)
    live.refresh(last=True)
    live.refresh(last=True)
    assert len(lines) == 1 and "report.html was not written" in lines[0]


def test_a_missing_library_is_said(run, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "LIBRARY", tmp_path / "none.js")
    found = remade(run[0], output=tmp_path / "page.html")
    assert f"{tmp_path / 'none.js'} is missing" in found.text and not found.scripts and "6 of 6" in found.text


def test_evaluate_shows_domains_modules_and_tokens(valid_artifacts, text, cache, tmp_path):
    """The losses of the tokens are those of one pass over the document."""
    model_dir = str(valid_artifacts / "assembled")
    files = {"json": tmp_path / "losses.json", "report": tmp_path / "losses.html"}
    settings = evaluate.Settings(model_dir, (f"python={text}",), max_tokens=900, cache_dir=cache, **files)
    assert evaluate.main(settings) == 0
    content = json.loads(files["json"].read_text())
    found = reading_html.read(files["report"])
    for row in content["rows"]:
        assert f"{row['loss']:.4f}" in found.text
        for share in row.get("head_weights", {}).values():
            assert f"{share:.1%}" in found.text
    read = content["tokens"]["python"]
    tips = [value for name, value in found.attributes if name == "data-tip"]
    assert len(tips) == len(read["tokens"]) > 30
    assert f"loss {read['tokens'][0]['loss']:.3f} nats" in tips[0] and "gates of the layers   " in tips[0]
    assert remade(files["json"], output=tmp_path / "again.html").text.count("±") == found.text.count("±")

    model, tokenizer, _ = assembled.read_assembled(model_dir)
    column = read_columns({"python": str(text)}, tokenizer, model.config, settings)["python"]
    again = read_along(model.eval(), tokenizer, column, torch.device("cpu"))
    assert again["tokens"] == [
        token | {"likeliest": [tuple(x) for x in token["likeliest"]]} for token in read["tokens"]
    ]
    size = len(read["tokens"]) + 1
    shown = read["start"] + "".join(token["text"] for token in read["tokens"])
    window = next(
        w for w in (piece.tokens()[:size] for piece in column.pieces) if tokenizer.decode(w.tolist()) == shown
    )
    assert shown in found.text
    nats = model.nats(torch.from_numpy(window)[None])[0]
    assert nats.tolist() == pytest.approx([token["loss"] for token in read["tokens"]], abs=1e-4)
