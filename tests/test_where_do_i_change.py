"""Each row of CONTRIBUTING.md's "Where do I change ...?", and docs/guides/EDITING.md: the change is made in a copy of
the repository, and the copy is run.
"""

import json
import re
import shutil
from pathlib import Path

import launch
import pytest
import torch
from safetensors.torch import load_file

TINY = ("--preset", "tiny", "--tokenizer", "bytes")
SIZES = ("--sequence-length", 32, "--batch-size", 4, "--micro-batch-size", 2, "--steps", 2, "--lr", 0.01)
SIZES += ("--schedule", "constant", "--warmup-steps", 0, "--val-fraction", 0, "--log-every", 1, "--tracker", "none")
SIZES += ("--statistics-tokens", 1000)
FILE = re.compile(r"`([\w/]+\.(?:py|yaml))`")


def rows() -> dict[str, str]:
    """The table: change -> what to edit."""
    section = (launch.ROOT / "CONTRIBUTING.md").read_text().split("## Where do I change ...?")[1].split("\n## ")[0]
    cells = [line.strip("| ").split(" | ", 1) for line in section.splitlines() if line.startswith("|")]
    return dict(cells[2:])


ROWS = rows()


class Copy:
    """A copy of the repository, and the files of it that were edited."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.edited: set[str] = set()
        for name in ("forge_common", "accelerate_configs"):
            shutil.copytree(launch.ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for script in ("train_shared.py", "train_module.py"):
            shutil.copy(launch.ROOT / script, folder)

    def write(self, file: str, text: str) -> None:
        self.edited.add(file)
        (self.folder / file).write_text(text)

    def replace(self, file: str, old: str, new: str) -> None:
        text = (self.folder / file).read_text()
        assert text.count(old) == 1, f"{file} has {old!r} {text.count(old)} times"
        self.write(file, text.replace(old, new))

    def insert(self, file: str, before: str, text: str) -> None:
        self.replace(file, before, text + before)


@pytest.fixture
def copy(request, tmp_path):
    """A copy whose edits must be in the files that the test's row names, and in no others."""
    copy = Copy(tmp_path / "forge")
    yield copy
    named = FILE.findall(ROWS[request.function.change])
    patterns = {file: re.escape(file).replace("NAME", r"\w+") for file in named}
    for file in copy.edited:
        assert any(re.fullmatch(pattern, file) for pattern in patterns.values()), f"the row does not name {file}"
    for file, pattern in patterns.items():
        assert any(re.fullmatch(pattern, edited) for edited in copy.edited), f"the row names {file}, not edited"


def changes(change: str):
    """Marks the test of a row by the row's first cell."""

    def mark(test):
        test.change = change
        return test

    return mark


def test_every_row_has_a_test():
    tested = [test.change for test in globals().values() if hasattr(test, "change")]
    assert sorted(tested) == sorted(ROWS)


def run(folder: Path, *line: object) -> None:
    """Runs `python LINE` in a copy of the repository to its end, which must be without an error."""
    launch.run_python(*line, cwd=folder, ACCELERATE_USE_CPU="true")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Sixteen short documents."""
    file = tmp_path_factory.mktemp("data") / "text.jsonl"
    texts = [f"{number} is followed by {number + 1}" for number in range(16)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


@pytest.fixture(scope="module")
def train(data, tmp_path_factory):
    """Runs train_shared.py or train_module.py of a folder: train(folder, script, *flags) -> its output directory."""
    cache = tmp_path_factory.mktemp("cache")

    def call(folder: Path, script: str, *flags: object, output: Path | None = None) -> Path:
        output = output or tmp_path_factory.mktemp("run")
        run(folder, folder / script, "--output-dir", output, "--cache-dir", cache, "--data", data, *SIZES, *flags)
        return output

    return call


@pytest.fixture(scope="module")
def unchanged(train, tmp_path_factory):
    """The repository as it is, the output directory of its trunk, and that of a module on it."""
    folder = Copy(tmp_path_factory.mktemp("unchanged") / "forge").folder
    trunk = train(folder, "train_shared.py", *TINY)
    return folder, trunk, train(folder, "train_module.py", *on(trunk))


def on(trunk: Path) -> tuple[object, ...]:
    """The flags of a module on a trunk's output directory."""
    return ("--trunk", trunk / "trunk", "--name", "numbers", "--general-tokens", 0)


def column(output: Path, key: str) -> list[float]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if key in row]


def weights(output: Path) -> dict[str, torch.Tensor]:
    """The tensors of a published trunk or module."""
    file = next(output / name for name in ("trunk/model", "module/module") if (output / f"{name}.safetensors").exists())
    return load_file(file.with_suffix(".safetensors"))


@changes("a learning-rate schedule")
def test_a_schedule(copy, train):
    file = "forge_common/schedule.py"
    curve = "def half(step, *, warmup_steps, total_steps, floor=0.0):\n    return 0.5\n\n\n"
    copy.insert(file, "SCHEDULES: ", curve)
    copy.replace(file, '"wsd": wsd', '"wsd": wsd, "half": half')
    output = train(copy.folder, "train_shared.py", *TINY, "--schedule", "half")
    assert column(output, "train/lr") == [0.005, 0.005]


@changes("the optimizer")
def test_the_optimizer(copy, train, unchanged):
    """An update of SGD is as long as the rate times the norm that the gradient is clipped to; one of AdamW is longer."""
    scripts = ("train_shared.py", "train_module.py")
    adamw = "return AdamW(groups, lr=settings.lr, **adamw)"
    copy.replace("forge_common/optimizers.py", adamw, "return torch.optim.SGD(groups, lr=settings.lr)")
    _, trunk, _ = unchanged
    before = weights(trunk)
    flags = ("--steps", 1, "--weight-decay", 0, "--max-grad-norm", 0.01)
    for script, start in zip(scripts, (("--trunk-from", trunk / "trunk"), on(trunk)), strict=True):
        output = train(copy.folder, script, *start, *flags, *(("--kind", "ffn") if script == "train_module.py" else ()))
        after = weights(output)
        length = sum(float((after[name] - before[name]).double().square().sum()) for name in after) ** 0.5
        assert length == pytest.approx(0.01 * 0.01, rel=1e-3)


@changes("a kind of module")
def test_a_kind_of_module(copy, train, unchanged, tmp_path):
    copy.replace("forge_common/model/config.py", "KINDS = (", 'KINDS = ("scale", ')
    file = "forge_common/model/modules.py"
    scale = (
        "class Scale(nn.Module):\n"
        '    """The feed-forward\'s result times 1 + s, s [D] at zero."""\n\n'
        "    def __init__(self, hidden_size):\n"
        "        super().__init__()\n"
        "        self.scale = nn.Parameter(torch.zeros(hidden_size))\n\n"
        "    def forward(self, normed, y, scored, router):\n"
        "        return y * (1 + self.scale), router\n\n\n"
    )
    copy.insert(file, "def chosen_layers(", scale)
    branch = 'if body == "scale":\n            layer.addition = Scale(config.hidden_size).to(trunk.head)\n        el'
    copy.insert(file, 'if body in ("ffn", "attention+ffn"):\n', branch)
    fold = (
        "    for layer in trunk.model.layers:\n"
        "        if isinstance(layer.addition, Scale):\n"
        "            layer.mlp.down_proj.weight.mul_(1 + layer.addition.scale[:, None])\n"
        "            layer.addition = None\n"
    )
    copy.insert(file, "    widest = 0\n", fold)
    _, trunk, _ = unchanged
    module = train(copy.folder, "train_module.py", *on(trunk), "--kind", "scale")
    merged = tmp_path / "merged"
    line = ("--trunk", trunk / "trunk", "--module", module / "module", "--output-dir", merged)
    run(copy.folder, "-m", "forge_common.merge", *line)
    before = weights(trunk)
    after = load_file(merged / "model.safetensors")
    scales = weights(module)
    assert len(scales) == 4, "one tensor in each layer"
    for layer, scale in enumerate(scales[name] for name in sorted(scales)):
        down_proj = f"model.layers.{layer}.mlp.down_proj.weight"
        assert scale.abs().max() > 0
        torch.testing.assert_close(after[down_proj], before[down_proj] * (1 + scale[:, None]))


@changes("a router")
def test_a_router(copy, unchanged, data, tmp_path):
    """A router that gives every token to the trunk: the assembled model has the trunk's loss."""
    copy.insert("forge_common/routing/tuning.py", '    "uniform": (', '    "trunk": (),\n')
    file = "forge_common/routing/routers.py"
    router = (
        "class TrunkRouter:\n"
        "    def __init__(self, candidates):\n"
        "        self.candidates = candidates\n\n"
        "    def layer(self, index, normed):\n"
        "        gates = normed.new_zeros(*normed.shape[:2], self.candidates)\n"
        "        gates[..., 0] = 1\n"
        "        return gates\n\n\n"
    )
    copy.insert(file, "class UniformRouter:", router)
    file = "forge_common/artifacts/assembled.py"
    copy.replace(file, "RidgeRouter, UniformRouter\n", "RidgeRouter, TrunkRouter, UniformRouter\n")
    branch = '    if router == "trunk":\n        return TrunkRouter(len(prior))\n'
    copy.insert(file, '    if router == "uniform":\n', branch)
    _, trunk, module = unchanged
    assembled = tmp_path / "assembled"
    line = ("--trunk", trunk / "trunk", "--modules", module / "module", "--output-dir", assembled)
    run(copy.folder, "-m", "forge_common.assemble", *line, "--router", "trunk", "--allow-copies")  # the same text
    losses = tmp_path / "losses.json"
    line = ("--model", assembled, "--data", f"numbers={data}", "--val-fraction", 1, "--json", losses)
    run(copy.folder, "-m", "forge_common.evaluate", *line, "--cache-dir", tmp_path / "cache")
    loss = {row["model"]: row["loss"] for row in json.loads(losses.read_text())["rows"]}
    assert loss["assembled"] == pytest.approx(loss["trunk"], abs=1e-5)
    assert loss["module:numbers"] < loss["trunk"] - 0.01


@changes("a data source")
def test_a_data_source(copy, train, tmp_path):
    """A format in which every line is a document."""
    reader = (
        "import hashlib\n\n"
        "from .document import Document\n\n\n"
        "def documents(path, reading, counts):\n"
        "    for number, line in enumerate(path.read_text().splitlines(), start=1):\n"
        '        yield Document(f"{path}:{number}", hashlib.sha256(line.encode()).digest(), (line,))\n'
    )
    copy.write("forge_common/data/readers/lines.py", reader)
    file = "forge_common/data/sources.py"
    copy.replace(file, "from .readers import ", "from .readers import lines, ")
    copy.replace(file, "READERS = {\n", 'READERS = {\n    ".lines": lines.documents,\n')
    source = tmp_path / "text.lines"
    source.write_text("".join(f"line {number:02} of some\n" for number in range(16)))
    output = train(copy.folder, "train_shared.py", *TINY, "--no-pack", "--data", source)
    assert column(output, "train/tokens") == [60, 120], "four documents of 15 bytes in each update"


@changes("a logged metric")
def test_a_logged_metric(copy, train):
    """`train/updates`, known where the row is written, and `train/ends`, the sum of scored ends of documents."""
    file = "forge_common/run/log.py"
    copy.replace(
        file, 'PARTS = ("nats", "tokens", "balance", "z")', 'PARTS = ("nats", "tokens", "balance", "z", "ends")'
    )
    copy.replace(file, "nats, tokens, balance, z = ", "nats, tokens, balance, z, ends = ")
    copy.replace(file, '"train/lr": rate,\n', '"train/lr": rate, "train/updates": updates, "train/ends": ends,\n')
    copy.replace(
        "forge_common/loss.py",
        "    expert_counts: torch.Tensor\n",
        "    expert_counts: torch.Tensor\n    ends: torch.Tensor\n",
    )
    file = "forge_common/model/trunk.py"
    copy.insert(
        file, "        none = nats.new_zeros(())\n", "        ends = (labels == self.config.eos_token_id).sum()\n"
    )
    copy.replace(file, "labels.new_zeros(0, 0))", "labels.new_zeros(0, 0), ends)")
    copy.replace(
        file, "torch.stack([router[2] for router in routers]))", "torch.stack([router[2] for router in routers]), ends)"
    )
    output = train(copy.folder, "train_shared.py", *TINY, "--no-pack")
    assert column(output, "train/updates") == [1, 1]
    assert column(output, "train/ends") == [4, 4], "one document in each of an update's four windows"


@changes("dropout in the trunk")
def test_dropout(copy, train, unchanged):
    """The loss changes, and a run that was resumed after its first update is the same as one that was not."""
    file = "forge_common/model/trunk.py"
    copy.replace(
        file,
        "        return x + y, router\n",
        "        return x + nn.functional.dropout(y, 0.5, self.training), router\n",
    )
    _, trunk, _ = unchanged
    whole = train(copy.folder, "train_shared.py", *TINY)
    resumed = train(copy.folder, "train_shared.py", *TINY, "--steps", 1)
    train(copy.folder, "train_shared.py", *TINY, "--accept-change", "steps", output=resumed)
    assert column(whole, "train/loss") == column(resumed, "train/loss")
    assert column(whole, "train/loss")[0] != column(trunk, "train/loss")[0]


@changes("devices, precision, engine")
def test_an_engine(copy, unchanged, data, tmp_path):
    """A file for a CPU in bf16, started by `accelerate launch`: the loss is that of float32 but for rounding."""
    text = (copy.folder / "accelerate_configs/cpu.yaml").read_text()
    assert text.count('mixed_precision: "no"') == 1
    copy.write("accelerate_configs/cpu_bf16.yaml", text.replace('mixed_precision: "no"', "mixed_precision: bf16"))
    line = ("--output-dir", tmp_path / "run", "--cache-dir", tmp_path / "cache", "--data", data, *TINY, *SIZES)
    config = ("--config_file", "accelerate_configs/cpu_bf16.yaml")
    run(copy.folder, "-m", "accelerate.commands.launch", *config, "train_shared.py", *line)
    _, trunk, _ = unchanged
    low, full = column(tmp_path / "run", "train/loss"), column(trunk, "train/loss")
    assert low != full
    assert low == pytest.approx(full, abs=0.02)


def guide_copy(folder: Path, *numbers: int) -> Copy:
    """A copy with these experiments of docs/guides/EDITING.md, each a block of a diff whose lines occur once in the script."""
    blocks = re.findall(r"^```diff\n(.*?)^```", (launch.ROOT / "docs/guides/EDITING.md").read_text(), re.M | re.S)
    assert len(blocks) == 3
    copy = Copy(folder)
    for number in numbers:
        header, hunk = blocks[number].split("@@\n")
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] != "+")
        new = "".join(line[1:] for line in lines if line[0] != "-")
        copy.replace(header.split("+++ b/")[1].strip(), old, new)
    return copy


def test_the_guide_adds_to_the_objective(train, unchanged, tmp_path):
    """Update 1 has the same loss and another gradient."""
    copy = guide_copy(tmp_path / "forge", 0)
    output, trunk = train(copy.folder, "train_shared.py", *TINY), unchanged[1]
    assert column(output, "train/loss")[0] == column(trunk, "train/loss")[0]
    assert column(output, "train/grad_norm")[0] != column(trunk, "train/grad_norm")[0]


def test_the_guide_freezes_a_tensor(train, tmp_path):
    """With the third experiment, the line in the log, beside it."""
    copy = guide_copy(tmp_path / "forge", 1, 2)
    one, two = (weights(train(copy.folder, "train_shared.py", *TINY, "--steps", steps)) for steps in (1, 2))
    same = {name for name in one if torch.equal(one[name], two[name])}
    assert same == {"model.embed_tokens.weight"}
