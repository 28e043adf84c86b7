"""accelerate_configs/: how the launcher reads each file, and what a run started with it gets.

The launcher ignores much without a message: a typo inside fsdp_config, a key that it takes from the command line only,
an unquoted `no` (False in YAML). So the tests pass each file through the launcher's own parser and dispatch, and read
the known names from there.
"""

import ast
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands import launch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.to_fsdp2 import ARGUMENT_KEY_MAPPING, ConversionStatus
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin, patch_environment
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)

from forge_common.settings import UpdateSettings

REPOSITORY = Path(__file__).parents[2]
CONFIGS = sorted((REPOSITORY / "accelerate_configs").glob("*.yaml"))

# file -> what starts its processes, and their precision
ENGINES = {
    "cpu": ("simple_launcher", "no"),
    "cpu_2_processes": ("multi_gpu_launcher", "no"),
    "single_gpu": ("simple_launcher", "bf16"),
    "single_gpu_fp16": ("simple_launcher", "fp16"),
    "single_gpu_fp32": ("simple_launcher", "no"),
    "multi_gpu": ("multi_gpu_launcher", "bf16"),
    "multi_gpu_fp16": ("multi_gpu_launcher", "fp16"),
    "multi_node": ("multi_gpu_launcher", "bf16"),
    "fsdp2": ("multi_gpu_launcher", "bf16"),
    "deepspeed_zero2": ("deepspeed_launcher", "bf16"),
    "deepspeed_zero3": ("deepspeed_launcher", "bf16"),
    "mps": ("simple_launcher", "no"),
}
PREPARE = {
    "simple_launcher": lambda args: prepare_simple_launcher_cmd_env(args)[1],
    "multi_gpu_launcher": prepare_multi_gpu_env,
    "deepspeed_launcher": lambda args: prepare_deepspeed_cmd_env(args)[1],
}
# environment variables that a launch of the tests themselves would pass on
INHERITED = ("ACCELERATE_", "FSDP_", "MASTER_", "LOCAL_RANK", "RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "CUDA_VISIBLE")


@pytest.fixture(autouse=True)
def no_inherited_launch(monkeypatch):
    for name in list(os.environ):
        if name.startswith(INHERITED):
            monkeypatch.delenv(name)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def parse(path: Path, *flags: str):
    """The launcher's arguments after it has read the file."""
    args = launch.launch_command_parser().parse_args(["--config_file", str(path), *flags, "train_shared.py"])
    return launch._validate_launch_command(args)[0]


def dispatch(path: Path, *flags: str) -> tuple[str, dict[str, str]]:
    """The launcher that `accelerate launch` chooses for the file, and the script's environment."""
    chosen = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("simple_launcher", "multi_gpu_launcher", "deepspeed_launcher"):
            patch.setattr(launch, name, lambda args, name=name: chosen.append((name, args)))
        parser = launch.launch_command_parser()
        launch.launch_command(parser.parse_args(["--config_file", str(path), *flags, "train_shared.py"]))
    [(name, args)] = chosen
    return name, PREPARE[name](args)


def known_keys(group: str) -> set[str]:
    """The options of one group of the launcher's parser, which are the keys of that sub-config."""
    [options] = [g._group_actions for g in launch.launch_command_parser()._action_groups if g.title == group]
    assert options
    return {action.dest for action in options}


def faults(path: Path) -> list[str]:
    """What is wrong in a file that accelerate accepts without a message. What it refuses raises."""
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    config = load_config_from_file(str(path))
    found = [
        f"{key} is {raw.get(key)!r}, not a string: quote it"
        for key in ("distributed_type", "mixed_precision", "gpu_ids")
        if not isinstance(raw.get(key, "all"), str)
    ]
    if found:
        return found
    sections = {key for key, value in vars(config).items() if isinstance(value, dict)}
    args = parse(path)
    for key in raw.keys() - sections - {"compute_environment", "distributed_type"}:
        if getattr(args, key) != raw[key]:
            found.append(f"{key}: {raw[key]!r} has no effect, the launcher uses {getattr(args, key)!r}")

    fsdp, deepspeed = raw.get("fsdp_config", {}), raw.get("deepspeed_config", {})
    for key in fsdp:
        if (key if key.startswith("fsdp") else f"fsdp_{key}") not in known_keys("FSDP Arguments"):
            found.append(f"fsdp_config: {key} is unknown to accelerate")
        if fsdp.get("fsdp_version") == 2 and isinstance(ARGUMENT_KEY_MAPPING.get(key), ConversionStatus):
            found.append(f"fsdp_config: {key} has no effect in FSDP2")
    for key in deepspeed.keys() - known_keys("DeepSpeed Arguments"):
        found.append(f"deepspeed_config: {key} is unknown to accelerate")
    if deepspeed and deepspeed.get("gradient_accumulation_steps") != "auto":
        found.append("deepspeed_config: gradient_accumulation_steps must be auto, the script counts them")
    for key in (raw.keys() & sections) - {"fsdp_config", "deepspeed_config"}:
        found.append(f"{key}: the tests don't know how to check it")
    return found


def head(path: Path) -> list[str]:
    """The lines of the comment at the top."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]


def documented_command(path: Path) -> list[str]:
    """The words of the command line in the comment at the top."""
    [line] = [line for line in head(path) if line.startswith("#   ")]
    return shlex.split(line.removeprefix("#"))


def each_config():
    return pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def test_every_engine_has_its_file():
    assert {path.stem for path in CONFIGS} >= set(ENGINES)


@each_config()
def test_the_launcher_uses_each_key(path):
    assert faults(path) == []


@each_config()
def test_launcher_precision_and_accumulation(path):
    port = ("--main_process_port", str(free_port())) if "node" in path.stem else ()
    launcher, environment = dispatch(path, *port)
    assert (launcher, environment["ACCELERATE_MIXED_PRECISION"]) == ENGINES.get(
        path.stem, (launcher, yaml.safe_load(path.read_text(encoding="utf-8"))["mixed_precision"])
    )
    # Only the DeepSpeed launcher exports it: accelerate/utils/launch.py, prepare_deepspeed_cmd_env.
    accumulation = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    assert accumulation == ("auto" if launcher == "deepspeed_launcher" else None)


@each_config()
def test_the_launcher_parses_the_command_in_the_comment(path):
    command = documented_command(path)
    start = command.index("accelerate")
    assert all("=" in word for word in command[:start])
    assert command[start + 1] == "launch" and command[-1] == "..."
    args = launch.launch_command_parser().parse_args(command[start + 2 : -1])
    assert args.config_file == f"accelerate_configs/{path.name}"
    assert args.training_script == "train_shared.py" and args.training_script_args == []
    assert 2 <= len(head(path)) <= 6


def test_fsdp2_reaches_the_plugin():
    _, environment = dispatch(REPOSITORY / "accelerate_configs/fsdp2.yaml")
    with patch_environment(**environment):
        plugin = FullyShardedDataParallelPlugin()
    assert environment["ACCELERATE_USE_FSDP"] == "true" and plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True and plugin.cpu_ram_efficient_loading is False
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    [name] = plugin.transformer_cls_names_to_wrap
    model = ast.parse((REPOSITORY / "forge_common/model/trunk.py").read_text(encoding="utf-8"))
    assert name in {node.name for node in model.body if isinstance(node, ast.ClassDef)}


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_reaches_the_plugin(stage):
    _, environment = dispatch(REPOSITORY / f"accelerate_configs/deepspeed_zero{stage}.yaml")
    with patch_environment(**environment):
        plugin = DeepSpeedPlugin()
    assert environment["ACCELERATE_USE_DEEPSPEED"] == "true" and plugin.zero_stage == stage
    assert plugin.gradient_accumulation_steps == "auto"
    assert plugin.gradient_clipping == UpdateSettings.max_grad_norm == 1.0
    assert plugin.zero3_save_16bit_model is False and plugin.zero3_init_flag is False


@pytest.mark.parametrize(
    ("name", "old", "new", "fault"),
    [
        ("fsdp2", "fsdp_auto_wrap_policy", "fsdp_auto_wrap_polcy", "fsdp_auto_wrap_polcy is unknown"),
        ("fsdp2", "fsdp_reshard_after_forward", "reshard_after_foward", "reshard_after_foward is unknown"),
        ("fsdp2", "fsdp_offload_params: false", "fsdp_use_orig_params: true", "no effect in FSDP2"),
        ("deepspeed_zero2", "gradient_clipping:", "gradient_cliping:", "gradient_cliping is unknown"),
        ("deepspeed_zero3", "zero_stage", "quiet", "quiet is unknown"),
        ("deepspeed_zero2", "steps: auto", "steps: 4", "must be auto"),
        ("deepspeed_zero3", "  gradient_accumulation_steps: auto", "  #", "must be auto"),
        ("cpu", 'mixed_precision: "no"', "mixed_precision: no", "mixed_precision is False"),
        ("cpu", 'distributed_type: "NO"', "distributed_type: NO", "distributed_type is False"),
        ("single_gpu", 'gpu_ids: "0"', "gpu_ids: 0", "gpu_ids is 0"),
        ("multi_node", "machine_rank: 0", "machine_rank: 0\nsame_network: true", "same_network: True has no effect"),
        ("multi_node", "machine_rank: 0", "machine_rank: 0\nrdzv_backend: c10d", "rdzv_backend: 'c10d' has no effect"),
        ("cpu", "num_processes: 1", "num_processes: 1\ndynamo_config: {backed: x}", "dynamo_config"),
    ],
)
def test_mistakes_that_accelerate_ignores_are_found(tmp_path, name, old, new, fault):
    text = (REPOSITORY / f"accelerate_configs/{name}.yaml").read_text(encoding="utf-8")
    comment, body = text.split("compute_environment", 1)
    assert body.count(old) == 1, f"{old!r} is {body.count(old)} times in {name}.yaml"
    path = tmp_path / "broken.yaml"
    path.write_text(comment + "compute_environment" + body.replace(old, new), encoding="utf-8")
    load_config_from_file(str(path))
    [found] = faults(path)
    assert fault in found


def test_an_unknown_key_at_the_top_is_refused_by_accelerate(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text('distributed_type: "NO"\nmixed_presicion: "no"\n', encoding="utf-8")
    assert "mixed_presicion" not in ClusterConfig.__dataclass_fields__
    with pytest.raises(ValueError, match="mixed_presicion"):
        faults(path)


PROBE = """
import json, os, sys
from pathlib import Path
import torch
from accelerate import Accelerator
from forge_common.run.launch_checks import check_processes

accelerator = Accelerator()
check_processes()
seen = {
    "processes": accelerator.num_processes,
    "rank": accelerator.process_index,
    "backend": accelerator.state.backend,
    "device": accelerator.device.type,
    "precision": accelerator.mixed_precision,
    "sum of ranks + 1": accelerator.reduce(torch.tensor(accelerator.process_index + 1), "sum").item(),
}
Path(sys.argv[1], f"{os.getpid()}.json").write_text(json.dumps(seen))
accelerator.end_training()
"""


def start(words: list[str], folder: Path) -> subprocess.Popen:
    """Starts a documented command line with the probe in place of train_shared.py."""
    (folder / "probe.py").write_text(PROBE, encoding="utf-8")
    (folder / "seen").mkdir(exist_ok=True)
    at = words.index("accelerate")
    flags = words[at + 2 : words.index("train_shared.py")]
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags]
    return subprocess.Popen(
        [*command, str(folder / "probe.py"), str(folder / "seen")],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | dict(word.split("=", 1) for word in words[:at]),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(*processes: subprocess.Popen, timeout_s: float = 600) -> None:
    """Waits until every launcher ends with 0; none outlives the test."""
    try:
        for process in processes:
            output, _ = process.communicate(timeout=timeout_s)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)  # the group: SIGTERM to the launcher alone orphans the script
                try:
                    process.wait(timeout=10)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)


def seen(folder: Path) -> list[dict]:
    return sorted((json.loads(path.read_text()) for path in (folder / "seen").iterdir()), key=lambda s: s["rank"])


def ranks(processes: int, backend: str | None, precision: str = "no") -> list[dict]:
    total = processes * (processes + 1) // 2
    keys = ("processes", "rank", "backend", "device", "precision", "sum of ranks + 1")
    return [
        dict(zip(keys, (processes, rank, backend, "cpu", precision, total), strict=True)) for rank in range(processes)
    ]


@pytest.mark.parametrize(("name", "expected"), [("cpu", ranks(1, None)), ("cpu_2_processes", ranks(2, "gloo"))])
def test_the_documented_command_starts_these_processes(tmp_path, name, expected):
    finish(start(documented_command(REPOSITORY / f"accelerate_configs/{name}.yaml"), tmp_path))
    assert seen(tmp_path) == expected


def test_two_machines_of_one_process_connect(tmp_path):
    """multi_node.yaml, with two launchers on this machine in place of two machines."""
    words = documented_command(REPOSITORY / "accelerate_configs/multi_node.yaml")
    here = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port()), "--num_processes", "2"]
    at, rank = words.index("train_shared.py"), words.index("--machine_rank") + 1
    machines = []
    for machine in ("0", "1"):
        mine = [*words[:rank], machine, *words[rank + 1 : at], *here, *words[at:]]
        machines.append(start(["ACCELERATE_USE_CPU=true", *mine], tmp_path))
    finish(*machines)
    assert seen(tmp_path) == ranks(2, "gloo", "bf16")


def test_without_its_variable_cpu_2_processes_does_not_connect_them(tmp_path):
    """Why the comment in cpu_2_processes.yaml asks for it. When this fails, accelerate exports it now."""
    variable, *words = documented_command(REPOSITORY / "accelerate_configs/cpu_2_processes.yaml")
    assert variable == "ACCELERATE_USE_CPU=true"
    finish(start(["CUDA_VISIBLE_DEVICES=", *words], tmp_path))
    assert seen(tmp_path) == ranks(1, None) * 2
