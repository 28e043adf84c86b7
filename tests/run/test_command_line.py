"""What a newcomer types wrong: the flag or the path that was meant is named; files of settings; the groups of --help."""

import dataclasses
import errno
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
import types
from itertools import pairwise
from pathlib import Path

import launch
import pytest
import small_artifacts
import yaml

import train_module
import train_shared
from forge_common import export, report
from forge_common.artifacts.module_folder import read_model, read_module_metadata
from forge_common.artifacts.trunk_folder import read_trunk
from forge_common.command_line import read_settings, run_main
from forge_common.data.sources import files_of
from forge_common.errors import UserError
from forge_common.files.places import missing_artifact, missing_source, published
from forge_common.flags import OTHER_NAMES, unknown_flags
from forge_common.help import EPILOG, groups
from forge_common.settings import to_json
from forge_common.settings_checks import problems

COMMANDS = ("assemble", "chat", "evaluate", "export", "generate", "merge", "plan", "push", "report")
REQUIRED = ("--data", "local:docs", "--output-dir", "run")


@pytest.fixture
def read(monkeypatch, tmp_path):
    """The settings of train_shared.py for these words, checked, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["train_shared.py", *map(str, words)])
        return read_settings(train_shared.Settings, "", problems)

    return call


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("--learning-rate=3", "--learning-rate is no flag; did you mean --lr?"),
        ("--num_train_epochs", "--num_train_epochs is no flag; did you mean --epochs?"),
        ("--stepz", "--stepz is no flag; did you mean --steps?"),
        ("--per-device-train-batch-size", "did you mean --micro-batch-size?"),
        ("--gradient-accumulation-steps", "it follows from --batch-size / (--micro-batch-size x processes)"),
        ("--no-lr", "--no-lr is no flag; did you mean --lr?"),
        ("--frobnicate", "--frobnicate is no flag"),
    ],
)
def test_the_flag_that_was_meant_is_named(word, expected):
    [fault] = unknown_flags([word, "---", "-1", "--no-pack", "--lr", "--data=x"], train_shared.Settings)
    assert fault.endswith(expected)


def test_a_flag_with_another_name_than_its_setting_exists():
    assert unknown_flags(["--as", "gguf"], export.Settings) == []
    assert unknown_flags(["--paths"], report.Settings) == ["--paths is no flag"], "a word without a flag"


def test_the_names_of_other_trainers_lead_to_flags():
    names = {field.name for kind in (train_shared, train_module) for field in dataclasses.fields(kind.Settings)}
    assert {other for other in OTHER_NAMES.values() if " " not in other} <= names
    assert not OTHER_NAMES.keys() & names


def test_all_unknown_flags_are_in_one_message(read, capsys):
    with pytest.raises(SystemExit) as ended:
        read(*REQUIRED, "--learning-rate", 1, "--max-steps", 3)
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and "--lr?" in printed and "--steps?" in printed


def test_flags_go_before_the_file_and_the_file_before_the_defaults(read, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(
        "data: [local:docs, local:cpp]\noutput-dir: run\nlr: 1e-3\npack: false\nsteps: 7\nrun_name: null\n"
    )
    settings = read("--config", "mine.yaml", "--steps", 9)
    assert (settings.data, settings.lr, settings.pack, settings.steps) == (("local:docs", "local:cpp"), 1e-3, False, 9)
    assert settings.batch_size == train_shared.Settings.batch_size
    assert "of mine.yaml, but the flags --steps; the rest are defaults" in capsys.readouterr().err
    assert read("--epochs", 2, "--config=mine.yaml").steps == 0, "one length replaces the other"


def test_a_warm_up_that_followed_from_the_steps_of_another_run_follows_from_the_new_ones(read, tmp_path, capsys):
    """settings.json of a run holds the numbers that followed from its steps and its text."""
    written = {"data": ["local:docs"], "output_dir": "run", "steps": 200, "warmup_steps": 20, "val_fraction": 0.03}
    (tmp_path / "settings.json").write_text(json.dumps(written))
    settings = read("--config", "settings.json", "--steps", 1000)
    assert (settings.steps, settings.warmup_steps, settings.val_fraction) == (1000, None, 0.03)
    printed = capsys.readouterr().err
    assert "its --warmup-steps 20 followed from its steps and follows from the new length" in printed
    assert "val-fraction" not in printed
    assert read("--config", "settings.json", "--budget", "30m").warmup_steps is None
    assert read("--config", "settings.json", "--steps", 1000, "--warmup-steps", 20).warmup_steps == 20
    capsys.readouterr()
    assert read("--config", "settings.json", "--data", "local:cpp").warmup_steps == 20
    printed = capsys.readouterr().err
    assert "its --val-fraction 0.03 stays, and may have followed from its text" in printed and "warmup" not in printed
    (tmp_path / "settings.json").write_text(json.dumps(written | {"warmup_steps": 50}))
    assert read("--config", "settings.json", "--steps", 1000).warmup_steps == 50, "it did not follow from the steps"


def test_what_is_printed_and_what_a_run_has_written_are_files_of_settings(read, tmp_path, capsys):
    words = (*REQUIRED, "--lr", 0.002, "--eps", 1e-7, "--no-tie-word-embeddings", "--accept-change", "steps", "lr")
    settings = read(*words)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        read(*words, "--print-config")
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed) == to_json(settings)
    (tmp_path / "printed.yaml").write_text(printed)
    (tmp_path / "settings.json").write_text(json.dumps(to_json(settings)))
    assert read("--config", "printed.yaml") == read("--config", "settings.json") == settings


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (export, ("--model", "some/where", "--as", "gguf", "--output-dir", "out")),
        (report, ("runs/a", "runs/b", "--output", "all.html")),
    ],
)
def test_what_a_command_prints_is_a_file_of_settings_also_without_a_flag_of_the_same_name(
    command, words, monkeypatch, tmp_path, capsys
):
    def read(*words):
        monkeypatch.setattr(sys, "argv", [f"{command.__name__}.py", *words])
        return read_settings(command.Settings, "")

    settings = read(*words)
    with pytest.raises(SystemExit):
        read(*words, "--print-config")
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert read("--config", str(tmp_path / "printed.yaml")) == settings


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("stepz: 3\nlr: 1\nbatch: 3", "has stepz, which is no setting; did you mean --steps?"),
        ("[1, 2]", "has no settings"),
        ("a: [", "cannot be read as YAML or JSON"),
        (None, "is not there; did you mean mine.yml?"),
        ("lr: 1\nsteps: 3\nlr: 2", "has lr twice, in lines 1 and 3"),
        ("batch_size: 1\nbatch-size: 2", "has batch-size twice, in lines 1 and 2"),
        ('{"lr": 1, "lr": 2}', "has lr twice, in lines 1 and 1"),
        ("lr: fast", "has lr: fast; it must be a number"),
        ("steps: 1.5", "has steps: 1.5; it must be a whole number"),
        ("steps:", "has steps: null; it must be a whole number"),
        ("pack: 3", "has pack: 3; it must be true or false"),
        ("on_bad_text: no", "has on_bad_text: false; it must be refuse, replace or skip"),
        ("data: {a: 1}", 'has data: {"a": 1}; it must be text, or a list of it'),
        ("data: [a, [b]]", 'has data: ["a", ["b"]]; it must be text, or a list of it'),
        ("tokenizer: [a, b]", 'has tokenizer: ["a", "b"]; it must be text'),
    ],
)
def test_a_wrong_file_of_settings_is_refused(content, expected, read, tmp_path, capsys):
    (tmp_path / ("mine.yml" if content is None else "mine.yaml")).write_text(content or "")
    with pytest.raises(SystemExit) as ended:
        read("--config", "mine.yaml")
    assert ended.value.code == 2 and f"--config mine.yaml {expected}" in capsys.readouterr().err


def test_the_only_choice_of_a_setting_is_named(monkeypatch, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("module_dtype: fp16\n")
    monkeypatch.setattr(sys, "argv", ["train_module.py", "--config", str(tmp_path / "mine.yaml")])
    with pytest.raises(SystemExit):
        read_settings(train_module.Settings, "")
    assert "has module_dtype: fp16; it must be bf16\n" in capsys.readouterr().err


def test_a_setting_of_the_file_is_given_where_it_is_not_the_default(read, tmp_path, capsys):
    """A settings.json holds all settings: at their defaults they do not contradict --trunk-from."""
    (tmp_path / "trunk").mkdir()
    (tmp_path / "mine.yaml").write_text("trunk_from: trunk\npreset: auto\nnum_hidden_layers: 3\n")
    with pytest.raises(SystemExit):
        read(*REQUIRED, "--config", "mine.yaml")
    assert "leave out --num-hidden-layers\n" in capsys.readouterr().err


def test_the_nearest_path_is_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "laws" / "all").mkdir(parents=True)
    (tmp_path / "runs" / "trunk" / "trunk").mkdir(parents=True)
    assert missing_source("law/all@0.5") == "law/all: no such file or folder; did you mean laws/all?"
    assert missing_source("elsewhere.txt") == "elsewhere.txt: no such file or folder"
    for present in ("laws", "laws@2", "laws/*.txt", "hf:org/name", "local:docs", "https://host/x", "s3://bucket/x"):
        assert missing_source(present) is None
    assert missing_source("local:dosc@0.5") == (
        "local:dosc: no such corpus; there are local:python, local:cpp, local:docs, local:perl"
    )
    with pytest.raises(UserError, match=r"matches nothing; did you mean laws\? Name a file"):
        files_of("lawz")
    assert missing_artifact("runs/trnk") == "runs/trnk is not there; did you mean runs/trunk?"
    assert missing_artifact("run/trunk") is missing_artifact("runs/trunk") is None, "it may be on the hub"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("generate --model runs/trnk --prompt a", "--model runs/trnk is not there; did you mean runs/trunk?"),
        ("generate --model runs/trunk --prompt a --temperature -1", "--temperature is -1.0. Give 0"),
        ("chat --model runs/trunk --module modul", "--module modul is not there"),
        ("merge --trunk runs/trnk --module runs --output-dir x", "--trunk runs/trnk is not there; did you mean"),
        ("export --model missing --as gguf --output-dir x", "--model missing is not there"),
        ("evaluate --model runs/trunk --data local:docs", "--data local:docs is not NAME=SOURCE."),
        ("evaluate --model runs/trunk --data a=local:dosc", "--data local:dosc: no such corpus; there are"),
        ("evaluate --model runs/trunk --data a=rnus", "--data rnus: no such file or folder; did you mean runs?"),
    ],
)
def test_a_command_refuses_what_is_not_there_before_torch_is_imported(line, expected, tmp_path):
    (tmp_path / "runs" / "trunk").mkdir(parents=True)
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')\n")
    command, *flags = line.split()
    path = f"{tmp_path}{os.pathsep}{launch.ROOT}"
    done = subprocess.run(
        [sys.executable, "-m", f"forge_common.{command}", *flags],
        cwd=tmp_path,
        env=launch.environment(PYTHONPATH=path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and f"{command}.py: error: {expected}" in done.stderr, done.stderr


def test_ctrl_c_ends_a_command_with_one_line():
    """And by the signal, so that a script in which it is ends too."""
    code = "import os, signal, sys, time, types; from forge_common.command_line import run_main\n"
    code += "sys.argv[0] = 'evaluate.py'\n"
    code += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore Ctrl-C
    code += "run_main(lambda _: (os.kill(os.getpid(), signal.SIGINT), time.sleep(9)), types.SimpleNamespace())"
    done = subprocess.run([sys.executable, "-c", code], cwd=launch.ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "evaluate.py: ended by Ctrl-C\n")


MAKE_OBJECTS = """
import gc, types
from forge_common.command_line import run_main

def main(_):
    collections = gc.get_stats()[0]["collections"]
    kept = [[] for _ in range(9000)]
    print(gc.get_stats()[0]["collections"] - collections)
    return 0

run_main(main, types.SimpleNamespace())
"""


def test_what_a_command_imports_is_not_looked_through_again_and_again():
    """Python's collector of cycles looks at new objects; by default in groups of 700, so 13 times here."""
    done = subprocess.run([sys.executable, "-c", MAKE_OBJECTS], cwd=launch.ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and int(done.stdout) <= 1


def test_a_path_without_permission_is_named(read, monkeypatch, tmp_path, capsys):
    """Raised here, since no path is closed to root."""
    denied = PermissionError(errno.EACCES, "Permission denied", "closed/trunk")

    def refuse(*_):
        raise denied

    with pytest.raises(SystemExit) as ended:
        run_main(refuse, types.SimpleNamespace())
    assert ended.value.code == 1
    assert "error: closed/trunk: permission denied. Check who may read and write it" in capsys.readouterr().err
    monkeypatch.setattr(Path, "exists", refuse)
    for words in ((*REQUIRED, "--trunk-from", "closed/trunk"), ("--config", "closed/trunk")):
        with pytest.raises(SystemExit) as ended:
            read(*words)
        assert ended.value.code == 2 and "closed/trunk" in capsys.readouterr().err


def test_what_is_no_trunk_or_no_module_is_called_what_it_is(root, tmp_path):
    for name in ("texts", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "run" / "settings.json").write_text("{}")
    for folder, what in (
        (root / "trunk", "is a trunk, not a module"),
        (root / "assembled", "is an assembled model, not a module"),
        (tmp_path / "run", "is the folder of a run that has published no module"),
        (tmp_path / "texts", "module.json does not exist"),
    ):
        with pytest.raises(UserError, match=what):
            read_module_metadata(folder)
    with pytest.raises(UserError, match=r"texts has no config.json and no model.safetensors, so it is no trunk. Name "):
        read_trunk(str(tmp_path / "texts"))


def test_the_output_directory_of_a_run_stands_for_what_it_published(tmp_path):
    for kind, file in (("trunk", "config.json"), ("module", "module.json")):
        run = tmp_path / kind
        (run / kind).mkdir(parents=True)
        assert published(run, kind) == run
        (run / kind / file).touch()
        assert published(run, kind) == published(run / kind, kind) == run / kind


def test_trunks_and_modules_are_read_from_the_output_directories_of_their_runs(root):
    (root / "run").mkdir()
    (root / "one").rename(root / "run" / "module")
    trunk, _, metadata, module = read_model(str(root), root / "run")
    direct = read_model(str(root / "trunk"), root / "run" / "module")
    assert small_artifacts.same(trunk.state_dict(), direct[0].state_dict()) and (metadata, module) == direct[2:]
    with pytest.raises(UserError, match=r"runn/x is not there; did you mean .*/run\? Name the folder"):
        read_module_metadata(root / "runn" / "x")
    with pytest.raises(UserError):
        read_trunk(str(root / "assembled"))


def test_help_that_nobody_reads_to_its_end_prints_no_traceback():
    line = [sys.executable, "train_shared.py", "--help"]
    with subprocess.Popen(line, cwd=launch.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()  # as `head` does
        assert process.stderr.read() == ""


def test_help_has_the_groups_of_the_source():
    line = [sys.executable, "train_shared.py", "--help"]
    environment = launch.environment(PYTHONIOENCODING="utf-8")
    printed = subprocess.run(line, env=environment, cwd=launch.ROOT, capture_output=True, check=True).stdout.decode()
    boxes = dict.fromkeys(groups(train_shared.Settings).values())
    assert list(boxes)[:3] == ["data", "model", "updates"] and "limits" in boxes
    start = [printed.index(f"╭─ {name} ─") for name in boxes]
    assert start == sorted(start)
    for flag, box in (
        ("--data", "data"),
        ("--preset", "model"),
        ("--lr", "updates"),
        ("--text-column", "reading text"),
    ):
        assert printed.rindex("╭─ ", 0, printed.index(f"│ {flag} ")) == printed.index(f"╭─ {box} ─")
    assert "--config FILE.yaml" in printed


@pytest.mark.parametrize("script", [train_shared, train_module])
def test_each_setting_of_a_script_is_in_a_group_with_a_plain_name(script):
    """Those that a script inherits too; `options` is the box without a heading."""
    headings = groups(script.Settings)
    assert headings.keys() == {field.name for field in dataclasses.fields(script.Settings)}
    assert "options" not in headings.values() and not any(set(":/.") & set(name) for name in headings.values())


@pytest.mark.parametrize(
    "program", ["train_shared.py", "train_module.py", *(f"-m forge_common.{name}" for name in COMMANDS)]
)
def test_help_fills_its_lines(program):
    """In 80 columns: no row is blank, and none ends where the next word would have fitted in."""
    line = [sys.executable, *program.split(), "--help"]
    environment = launch.environment(PYTHONIOENCODING="utf-8", COLUMNS="80")
    printed = subprocess.run(line, env=environment, cwd=launch.ROOT, capture_output=True, check=True).stdout.decode()
    assert f"usage: {'python ' * program.startswith('-m')}{program} [-h]" in printed
    assert max(map(len, EPILOG.splitlines())) <= 80 and EPILOG in printed
    rows = [row[2:-2] for row in printed.splitlines() if row.startswith("│")]
    start = next(row for row in rows if row.startswith("-h, --help")).index("show")
    for row, following in pairwise(rows):
        assert row.strip()
        begins_here = not row[:start].strip() or row[start - 2 : start] == "  "  # else a long flag fills the row
        if begins_here and row[start:].strip() and not following[:start].strip():
            [word] = following[start:].split(maxsplit=1)[:1]
            assert len(row.rstrip()) + 1 + len(word) > len(row), f"{row}\n{following}"


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_bash_completes_the_flags_of_scripts_and_commands(tmp_path):
    """Where the program is a word of the line, as after accelerate launch; not a flag of another program, nor a file."""
    sourced = tmp_path / "completion.bash"
    programs = (("train_shared.py",), ("-m", "forge_common.generate"), ("-m", "forge_common.report"))
    sourced.write_text("".join(launch.run_python(*program, "--print-completion") for program in programs))

    def completed(*words):
        line = f'source {sourced}; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _forge; echo "${{COMPREPLY[*]}}"'
        return subprocess.run(
            ["bash", "-uc", line, "bash", *words], text=True, capture_output=True, check=True
        ).stdout.split()

    script = ("accelerate", "launch", "--config_file", "x.yaml", "../train_shared.py")
    assert completed(*script, "--ste") == ["--steps"]
    assert completed(*script, "--data", "x", "--no-pa") == ["--no-pack"]
    assert completed("python", "-m", "forge_common.generate", "--s") == ["--seed", "--system", "--show-routing"]
    assert completed("python", "-m", "forge_common.report", "--") == [
        "--help",
        "--config",
        "--print-config",
        "--output",
    ]
    assert completed(*script, "da") == completed("python", "other.py", "--s") == completed("python", "") == []
    assert (
        "complete -o default -F _forge accelerate"
        in subprocess.run(
            ["bash", "-c", f"source {sourced}; complete -p accelerate"], text=True, capture_output=True
        ).stdout
    )


@pytest.mark.skipif(not shutil.which("zsh"), reason="no zsh")
def test_zsh_completes_flags_in_a_terminal(tmp_path):
    """TAB after the first letters of a flag and of a file, with the lines of docs/QUICKSTART.md."""
    (tmp_path / "sourced").write_text(launch.run_python("train_shared.py", "--print-completion"))
    (tmp_path / "only.txt").touch()
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(tmp_path)
        os.execvpe("zsh", ["zsh", "-f", "-i"], launch.environment(TERM="dumb", COLUMNS="200", ZDOTDIR=str(tmp_path)))
    printed = ""

    def type_until(keys, expected):
        nonlocal printed
        printed = ""
        os.write(terminal, keys.encode())
        deadline = time.monotonic() + launch.PATIENCE
        while expected not in printed:
            assert time.monotonic() < deadline, printed
            if select.select([terminal], [], [], 1)[0]:
                printed += os.read(terminal, 65536).decode(errors="replace")

    try:
        type_until("autoload -Uz compinit bashcompinit && compinit -u -d dump && bashcompinit; echo read''y\n", "ready")
        type_until("source sourced; echo source''d\n", "sourced\r")
        type_until("accelerate launch train_shared.py --val-f\t", "--val-fraction ")
        type_until("\x15python train_shared.py --data onl\t", "only.txt ")
        assert "unrecognized" not in printed
    finally:
        os.close(terminal)
        os.waitpid(process, 0)
