"""Wrong settings are refused: all in one message, with how to fix them, a non-zero exit code, and nothing written."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import launch
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import train_module
import train_shared
from forge_common.command_line import run_main
from forge_common.data.tokenizer import Tokenizer, byte_tokenizer
from forge_common.model.presets import model_config
from forge_common.run import launch_checks
from forge_common.settings import HUGE_PAGES, MODEL_SETTINGS
from forge_common.settings_checks import problems


def test_all_problems_in_one_message(shared, tmp_path):
    more = (
        "--steps",
        -1,
        "--batch-size",
        30,
        "--lr",
        -1,
        "--num-attention-heads",
        5,
        "--min-lr-ratio",
        2,
        "--accept-change",
        "stepz",
        "--val-tokens",
        -1,
    )
    printed = shared(tmp_path / "run", *more, fails=True)
    for expected in (
        "--steps is -1",
        "multiple of 16, or lower --micro-batch-size",
        "--lr is -1",
        "--num-attention-heads 5",
        "--min-lr-ratio",
        "did you mean steps",
        "--val-tokens is -1; it cannot be negative",
    ):
        assert expected in printed
    assert "Traceback" not in printed and not (tmp_path / "run").exists()


def test_settings_without_text_or_updates_are_refused(monkeypatch, tmp_path):
    required = {"data": (), "output_dir": tmp_path / "run", "steps": -4}
    assert problems(train_shared.Settings(**required)) == [
        "--data names no source",
        "--steps is -4; it must be at least 1 (0 means those of --epochs)",
    ]


def test_the_folder_of_a_trunk_is_not_written_to(tmp_path):
    (tmp_path / "run" / "trunk").mkdir(parents=True)
    (tmp_path / "run" / "trunk" / "config.json").touch()
    common = {"data": ("local:docs",), "output_dir": tmp_path / "run" / "trunk" / "law"}
    expected = f"--output-dir {common['output_dir']} lies in the trunk that is read; name a folder outside of it"
    for trunk in (tmp_path / "run", tmp_path / "run" / "trunk"):
        assert problems(train_module.Settings(trunk=str(trunk), name="law", **common)) == [expected]
        assert problems(train_shared.Settings(trunk_from=str(trunk), **common)) == [expected]
    beside = common | {"output_dir": tmp_path / "run" / "law"}
    assert not problems(train_module.Settings(trunk=str(tmp_path / "run"), name="law", **beside))


@pytest.mark.parametrize("name", ["output_dir", "cache_dir"])
def test_an_empty_folder_is_not_the_current_one(name, monkeypatch, tmp_path):
    """However it is written; `.` is the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(f"{name}: ''\n")
    settings = train_shared.Settings(**{"data": ("local:docs",), "output_dir": tmp_path, name: Path("")})
    flag = f"--{name.replace('_', '-')}"
    for written in ((flag, ""), (f"--{name}=",), ("--config", "run.yaml")):
        monkeypatch.setattr(sys, "argv", ["train_shared.py", *written, "--data", "local:docs"])
        assert problems(settings) == [f"{flag} is empty; name a folder"]
    monkeypatch.setattr(sys, "argv", ["train_shared.py", flag, ".", "--data", "local:docs"])
    assert not problems(settings)


def test_a_name_that_cannot_be_published_is_refused_before_training(module, tmp_path):
    printed = module(tmp_path / "run", "--name", "../law", "--licence", "MIT\nnone", "--hang-timeout", -1, fails=True)
    for expected in (
        "--name '../law' must be a plain name",
        "--licence 'MIT\\nnone' must be a line",
        "--hang-timeout is -1",
    ):
        assert expected in printed
    assert "Traceback" not in printed and not (tmp_path / "run").exists()


def test_sizes_of_another_kind_of_module_are_refused(module, tmp_path):
    printed = module(tmp_path / "run", "--kind", "ffn+head", "--dropout", 0.1, "--rank", 64, "--width", 0, fails=True)
    assert "--dropout belongs to kind lora, and --kind is ffn+head" in printed and "--rank belongs to" in printed
    assert "--width" not in printed and not (tmp_path / "run").exists()


@pytest.mark.parametrize("output", ["", "runs/a", "./runs/../b"])
def test_a_folder_that_is_read_is_not_written_to(output, shared, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    printed = shared(tmp_path / output, "--data", f"{tmp_path}/@0.5", "local:cpp@0.5", fails=True)
    assert f"lies in --data {tmp_path}/@0.5" in printed and "as text" in printed
    found = problems(train_shared.Settings(data=(str(tmp_path),), output_dir=tmp_path / ".runs" / "a"))
    assert not found


@pytest.mark.parametrize(
    ("dtype", "launched", "expected"),
    [
        ("float32", {}, []),
        ("float64", {}, ["leave out --dtype float64"]),
        ("float32", {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_MIXED_PRECISION": "bf16"}, []),
        ("float32", {"ACCELERATE_USE_DEEPSPEED": "true"}, ["needs --mixed_precision bf16"]),
    ],
)
def test_a_module_that_cannot_be_rounded_with_its_losses_is_refused(dtype, launched, expected, monkeypatch, tmp_path):
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    required = {"trunk": "org/trunk", "name": "law", "data": ("local:docs",), "output_dir": tmp_path / "run"}
    found = problems(train_module.Settings(**required, dtype=dtype, module_dtype="bf16"))
    assert len(found) == len(expected) and all(part in fault for part, fault in zip(expected, found, strict=True))
    assert not problems(train_module.Settings(**required, dtype=dtype))


def test_a_weight_of_text_that_is_not_mixed_is_refused(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("text")
    settings = train_module.Settings(
        trunk="org/trunk",
        name="law",
        data=(f"{text}@0.3", "local:cpp@0.7"),
        output_dir=tmp_path / "run",
        val_data=(f"{text}@0.3",),
        general_data=("local:docs@2", str(text)),
    )
    assert problems(settings) == [
        f"--val-data {text}@0.3: a weight has no effect here; leave out @0.3",
        "--general-data local:docs@2: a weight has no effect here; leave out @2",
    ]


def test_for_an_unknown_flag_the_nearest_is_named(shared, tmp_path):
    printed = shared(tmp_path / "run", "--warmup-stepz", 3, fails=True)
    assert "--warmup-steps" in printed and "Traceback" not in printed


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--tokenizer", "nothing.json"), "--tokenizer nothing.json"),
        (("--sequence-length", 20_000), "fewer than one update"),
        (("--resume", "require"), "--resume require"),
        (("--tracker", "trackio"), "pip install trackio"),
        (("--log-artifact",), "needs --tracker wandb"),
        (("--document-separator", ""), "document_separator"),
    ],
)
def test_refused_before_the_first_update(more, expected, shared, tmp_path):
    printed = shared(tmp_path / "run", *more, fails=True)
    assert expected.replace("_", "-") in printed.replace("_", "-") and "Traceback (most" not in printed
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_that_has_published_no_trunk_and_a_module_are_no_trunks(module, tmp_path):
    for name, expected in (("settings.json", "has published no trunk"), ("module.json", "is a module, not a trunk")):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text("{}")
        printed = module(tmp_path / "run", "--trunk", folder, "--steps", 2, fails=True)
        assert expected in printed and "Traceback" not in printed


def test_a_trunk_from_nowhere_is_refused(shared, tmp_path):
    printed = shared(tmp_path / "run", "--trunk-from", "no/such/place", shape=(), fails=True)
    assert "no/such/place is not there" in printed and "Traceback" not in printed


def test_flags_of_a_new_model_are_refused_beside_trunk_from(shared, tmp_path):
    """Also at their defaults, and in each form that the command line has."""
    more = ("--preset", "small", "--num_experts=0", "--no-tie-word-embeddings", "--cross-document-attention")
    more += ("--tokenizer", "train:4096", "--hidden-size", 32, "--router-aux-loss-coef", 0.01)
    printed = shared(tmp_path / "run", "--trunk-from", "some/where", *more, shape=(), fails=True)
    expected = "--tokenizer, --preset, --hidden-size, --tie-word-embeddings, --cross-document-attention, --num-experts"
    assert f"leave out {expected}, --router-aux-loss-coef" in printed and "Traceback" not in printed
    assert not (tmp_path / "run").exists()


def test_every_setting_that_shapes_a_new_model_is_refused_beside_trunk_from():
    """What model_config reads of the settings, but for the length of the windows, and the tokenizer."""
    read = set()

    class Recorder:
        def __getattr__(self, name):
            read.add(name)
            return "tiny" if name == "preset" else 4

    model_config(Recorder(), Recorder())
    tokenizer = {"vocab_size", "pad_token_id", "eos_token_id"}
    assert read - tokenizer - {"sequence_length"} | {"tokenizer"} == set(MODEL_SETTINGS)


@pytest.mark.parametrize("content", [None, "", "  \n\n "], ids=["no file", "empty file", "blank file"])
def test_no_text_is_refused(content, shared, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    if content is not None:
        (folder / "one.txt").write_text(content)
    printed = shared(tmp_path / "run", "--data", folder, fails=True)
    assert str(folder) in printed and "Traceback" not in printed


def test_too_long_for_the_trunk(module, tmp_path):
    printed = module(tmp_path / "run", "--sequence-length", 128, fails=True)
    assert "context of 64 tokens" in printed and "Traceback" not in printed


def test_a_dry_run_plans_and_writes_nothing(shared, text, domain, tmp_path):
    weighted = ("--data", f"{text}@0.98", f"{domain}@0.02")
    printed = shared(tmp_path / "run", "--dry-run", "--steps", 1000, *weighted)
    windows = [int(number.replace(",", "")) for number in re.findall(r"^data .* ([\d,]+) windows", printed, re.M)]
    passes = [share * 64_000 / number for share, number in zip((0.98, 0.02), windows, strict=True)]
    found = re.search(r"^passes +text0 ([\d.]+), domain0 ([\d.]+) ", printed, re.M)
    assert found and [float(number) for number in found.groups()] == pytest.approx(passes, rel=0.03)  # 20 of 1,024
    warned = re.search(r"^warning +the run sees text0 ([\d.]+) times: more than 4 times", printed, re.M)
    assert warned and float(warned[1]) == pytest.approx(passes[0], rel=0.01) and passes[1] < 4
    for expected in (
        "parameters",
        "4 micro-batch(es) x 16",
        "epochs",
        "memory",
        "s an update (4 timed)",
        "only the token cache was written",
    ):
        assert expected in printed
    assert not (tmp_path / "run").exists()


def test_a_launcher_that_contradicts_is_refused(shared, tmp_path):
    printed = shared(tmp_path / "run", "--steps", 2, fails=True, ACCELERATE_GRADIENT_ACCUMULATION_STEPS="7")
    assert "gradient_accumulation_steps to 7" in printed and "make it 4" in printed


def test_processes_that_would_train_separate_models_are_refused(shared, tmp_path):
    printed = shared(tmp_path / "run", "--steps", 2, processes=2, fails=True, ACCELERATE_USE_CPU="false")
    assert "train separate models" in printed


@pytest.mark.soak
def test_fewer_processes_than_requested_by_a_flag_are_refused(shared, tmp_path):
    launcher = ("accelerate", "launch", "--cpu", "--num_processes", "2")
    printed = shared(tmp_path / "run", "--steps", 2, launcher=launcher, fails=True)
    assert "asked for 2 processes and started 1" in printed and "torchrun --nproc_per_node 2" in printed
    assert not (tmp_path / "run").exists()


def test_fewer_processes_than_requested_by_a_file_are_refused(shared, tmp_path):
    file = tmp_path / "two.yaml"
    file.write_text("distributed_type: MULTI_CPU\nuse_cpu: true\nnum_processes: 2\nnum_machines: 1\n")
    launcher = (sys.executable, "-m", "accelerate.commands.launch", f"--config-file={file}")
    printed = shared(tmp_path / "run", "--steps", 2, launcher=launcher, fails=True)
    assert "asked for 2 processes and started 1" in printed and not (tmp_path / "run").exists()


SCRIPT = ["train_shared.py", "--steps", "2"]


@pytest.mark.parametrize(
    ("command", "requested"),
    [
        (["python", "/bin/accelerate", "launch", "--cpu", "--num_processes", "3", *SCRIPT], 3),
        (["python", "/bin/accelerate", "launch", "--num-processes=4", "--quiet", *SCRIPT], 4),
        (["/bin/accelerate-launch", "--num_processes", "2", "--num_processes", "5", *SCRIPT], 5),
        (["python", "-m", "accelerate.commands.launch", "--config_file", "two.yaml", *SCRIPT], 2),
        (["python", "-m", "accelerate.commands.launch", "--config-file=two.json", *SCRIPT], 2),
        (["accelerate", "launch", "--config_file", "two.yaml", "--num_processes", "1", *SCRIPT], 1),
        (["accelerate", "launch", *SCRIPT], 6),  # the launcher's own default file
        (["accelerate", "launch", "--cpu", *SCRIPT], 0),  # with --cpu the launcher does not read it
        (["accelerate", "launch", "--config_file", "gone.yaml", *SCRIPT], 0),
        (["accelerate", "launch", "--num_processes", "2", "wrapper.sh"], 0),  # another script
        (["torchrun", "--nproc_per_node", "2", *SCRIPT], 0),
        (["make", "num_processes=2"], 0),
        (["bash"], 0),
        ([], 0),
    ],
)
def test_the_processes_that_a_launcher_was_asked_for(command, requested, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    (tmp_path / "two.yaml").write_text("num_processes: 2\n")
    (tmp_path / "two.json").write_text('{"num_processes": 2}')
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate" / "default_config.yaml").write_text("num_processes: 6\n")
    assert launch_checks.processes_requested(command, SCRIPT[1:]) == requested


def test_without_a_launcher_nothing_is_refused():
    launch_checks.check_processes()


def test_fsdp_that_becomes_ddp_is_refused(shared, tmp_path):
    """On a CPU accelerate uses DDP instead, without a message."""
    printed = shared(tmp_path, "--steps", 2, fails=True, ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    assert "FSDP was requested" in printed and "Traceback" not in printed


def test_fp16_on_a_cpu_is_refused(shared, tmp_path):
    printed = shared(tmp_path / "run", "--steps", 2, fails=True, ACCELERATE_MIXED_PRECISION="fp16")
    assert "would train in float32" in printed


def test_bf16_trains(shared, tmp_path):
    """Mixed precision on a CPU: the weights stay float32, and the loss falls."""
    shared(tmp_path / "run", "--steps", 4, "--lr", 0.01, ACCELERATE_MIXED_PRECISION="bf16")
    losses = [row["train/loss"] for row in launch.rows(tmp_path / "run")]
    assert losses[-1] < losses[0]
    assert all(tensor.dtype.itemsize == 4 for tensor in launch.weights(tmp_path / "run", 4).values())


def test_settings_are_written(shared, text, tmp_path):
    shared(tmp_path / "run", "--steps", 2)
    written = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert written["data"] == [str(text)] and written["steps"] == 2 and written["sequence_length"] == 64


@pytest.mark.parametrize("script", ["train_shared.py", "train_module.py"])
def test_wrong_settings_are_reported_before_heavy_imports(script, tmp_path):
    code = f"""
import runpy, sys
sys.argv = [{script!r}, "--data", "x", "--output-dir", {str(tmp_path / "run")!r}, "--steps", "-1", "--lr", "-1", "--seed", "1"]
sys.argv += ["--trunk", "x", "--name", "x"] if "module" in {script!r} else []
try:
    runpy.run_path({script!r}, run_name="__main__")
except SystemExit as ended:
    assert ended.code == 2
print("HEAVY", sorted({{"torch", "accelerate", "datasets", "numpy", "transformers"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=launch.ROOT, text=True, capture_output=True, check=True)
    assert "--steps is -1" in done.stderr and "--lr is -1" in done.stderr
    assert done.stdout.rstrip().endswith("HEAVY []"), done.stdout


def test_an_unknown_router_is_reported_before_heavy_imports(tmp_path):
    code = f"""
import runpy, sys
sys.argv = ["assemble", "--trunk", "x", "--modules", "x", "--output-dir", {str(tmp_path / "new")!r}, "--router", "magic"]
try:
    runpy.run_module("forge_common.assemble", run_name="__main__")
except SystemExit as ended:
    assert ended.code == 1
print("HEAVY", sorted({{"torch", "accelerate", "datasets", "numpy", "transformers"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=launch.ROOT, text=True, capture_output=True, check=True)
    assert "--router magic is not a router. Choose one of context, learned, ridge, uniform." in done.stderr
    assert done.stdout.rstrip().endswith("HEAVY []"), done.stdout


def test_a_tokenizer_larger_than_the_models_vocabulary_is_refused(shared, tmp_path):
    config_ = LlamaConfig(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    checkpoint = tmp_path / "checkpoint"
    LlamaForCausalLM(config_).save_pretrained(checkpoint)
    backend = byte_tokenizer().backend
    backend.add_tokens(["one more", "and another"])
    Tokenizer(backend, 1, 0).save(checkpoint)
    printed = shared(tmp_path / "run", "--trunk-from", checkpoint, "--steps", 2, fails=True, shape=())
    assert "the tokenizer has 260 tokens, the model 258" in printed and "Traceback" not in printed
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


COMMANDS = (
    "train_shared.py",
    "train_module.py",
    *(f"-m forge_common.{name}" for name in ("assemble", "evaluate", "generate", "merge", "plan")),
)
UNITS = (
    "bytes tokens? documents? windows? updates? validations checkpoints seconds share experts layers heads candidates"
)
UNITS += " devices GB/s width rank seed rate decay norm temperature weight"  # what has no unit names the quantity


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_has_a_help_text_with_its_unit(command):
    """The real --help: a flag and its type, then its text, on the same line or on the lines below."""
    line = [sys.executable, *command.split(), "--help"]
    wide = launch.environment(COLUMNS="1000")
    printed = subprocess.run(line, env=wide, cwd=launch.ROOT, text=True, capture_output=True, check=True).stdout
    flags: list[str] = []
    for row in re.findall(r"^│ (.*?) *│$", printed, re.MULTILINE):
        if row.startswith("-"):
            flags.append(row)
        else:
            flags[-1] += "  " + row.strip()
    assert len(flags) > 3 and flags.pop(0).startswith("-h")
    for flag in flags:
        name, _, text = flag.partition("  ")
        text = re.sub(r"\((default: .*|required)\)$", "", text.strip())
        assert len(text) > 10 and not text.startswith("-- "), f"{name} has no help text"
        if re.search("INT|FLOAT", name):
            assert re.search(rf"\b({'|'.join(UNITS.split())})\b", text, re.IGNORECASE), f"{name} has no unit: {text}"


@pytest.mark.parametrize(
    ("kind", "file", "expected"),
    [("auto", "config.json", True), ("auto", "forge.json", False), ("lora", "forge.json", True), ("ffn", "", False)],
)
def test_memory_comes_in_huge_pages_for_kind_lora_alone(kind, file, expected, monkeypatch, tmp_path):
    """Also where the trunk decides on the kind: one with forge.json has ffn+head."""
    name, value = HUGE_PAGES
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(Path, "exists", lambda path: path.name in (file, "transparent_hugepage"))
    settings = train_module.Settings(kind=kind, trunk=str(tmp_path), name="law", data=("law",), output_dir=tmp_path)
    with pytest.raises(SystemExit, match="0"):
        run_main(lambda settings: 0, settings)
    assert (os.environ.get(name) == value) == expected
