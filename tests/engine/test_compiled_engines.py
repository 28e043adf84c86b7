"""Engines compiled (torch.compile with inductor), and every engine as `accelerate launch` starts it from its file, on
CPU processes.

`make engines` runs the trunk, `make soak` the modules: a compilation takes a minute or more.
"""

import json
import shutil
from pathlib import Path

import launch
import pytest
from safetensors.torch import load_file

INSTALLED = (launch.ROOT / ".engines" / "deepspeed").is_dir()
NEEDS_DEEPSPEED = pytest.mark.skipif(not INSTALLED, reason="DeepSpeed is not installed: make engines")
STEPS = 4
MORE = ("--steps", STEPS, "--save-every", 1, "--keep", 100, "--val-every", 3, "--lr", 1e-3)
MORE += ("--batch-size", 16, "--micro-batch-size", 4)
KINDS = ["ffn+head", "lora+head"]
DEEPSPEED = {f"deepspeed_zero{stage}": launch.deepspeed(stage) for stage in (2, 3)}
ENGINES = {
    "multi_gpu": {"ACCELERATE_USE_CPU": "true"},
    "fsdp2": launch.fsdp2(),
    **DEEPSPEED,
}  # by the names of accelerate_configs/
EACH = [pytest.param(name, marks=NEEDS_DEEPSPEED) if name in DEEPSPEED else name for name in ENGINES]
COMPILED = EACH[:-1]  # all but ZeRO-3, under which torch.compile is refused (run/zero.py)


def under(name: str, precision: str = "no") -> dict:
    """The keywords of a run of two processes under this engine."""
    return {"processes": 2, **ENGINES[name], "ACCELERATE_MIXED_PRECISION": precision}


@pytest.fixture(scope="session")
def inductor(tmp_path_factory) -> dict[str, str]:
    """With a cache of their own for these tests: what one has compiled, another one may use."""
    cache = str(tmp_path_factory.mktemp("inductor"))
    return {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "TORCHINDUCTOR_CACHE_DIR": cache}


@pytest.fixture(scope="module")
def eager(shared, module, tmp_path_factory):
    """eager(kind) -> the folder of a run of one process without torch.compile; kind None: train_shared.py."""
    folders: dict[str | None, Path] = {}

    def call(kind: str | None) -> Path:
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp("eager") / "run"
            module(folders[kind], *MORE, "--kind", kind) if kind else shared(folders[kind], *MORE)
        return folders[kind]

    return call


def same_result(folder: Path, eager: Path, artifact: str) -> None:
    """Moments of the last update and losses to 1e-6.

    Other kernels sum in another order, and AdamW divides by small gradients: weights to 5e-6.
    """
    assert launch.difference(launch.weights(eager, STEPS), launch.weights(folder, STEPS)) < 5e-6
    first, second = (launch.optimizer_state(run, STEPS)["state"] for run in (eager, folder))
    assert all(launch.difference(state, second[index]) < 1e-6 for index, state in first.items())
    assert launch.difference(load_file(eager / artifact), load_file(folder / artifact)) < 5e-6
    for key in ("train/loss", "val/loss"):
        for row, reference in zip(launch.rows(folder, key), launch.rows(eager, key), strict=True):
            assert row["step"] == reference["step"] and row[key] == pytest.approx(reference[key], rel=1e-6)


def resumed(run, straight: Path, folder: Path, artifact: str) -> None:
    """A run that is killed after its second update and continued, compiled: the same bits and rows."""
    launch.copy_until(straight, folder, 2)
    shutil.rmtree(folder / "module", ignore_errors=True)
    assert "at update 2" in run(folder)
    assert launch.same_bits(launch.weights(straight, STEPS), launch.weights(folder, STEPS))
    assert launch.same_bits(load_file(straight / artifact), load_file(folder / artifact))
    assert launch.without_times(straight) == launch.without_times(folder)


@pytest.mark.engines
@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_engine_trains_what_one_process_trains(name, eager, inductor, shared, tmp_path):
    def run(folder: Path) -> str:
        return shared(folder, *MORE, **under(name), **inductor)

    assert "read back and verified" in run(tmp_path / "run")
    same_result(tmp_path / "run", eager(None), "trunk/model.safetensors")
    resumed(run, tmp_path / "run", tmp_path / "resumed", "trunk/model.safetensors")


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", COMPILED)
def test_a_module_of_a_compiled_engine_is_that_of_one_process(name, kind, eager, inductor, module, tmp_path):
    def run(folder: Path) -> str:
        return module(folder, *MORE, "--kind", kind, **under(name), **inductor)

    assert "before and after" in run(tmp_path / "run")
    same_result(tmp_path / "run", eager(kind), "module/module.safetensors")
    digests = [
        json.loads((run / "module" / "module.json").read_text())["trunk_digest"]
        for run in (tmp_path / "run", eager(kind))
    ]
    assert digests[0] == digests[1]
    resumed(run, tmp_path / "run", tmp_path / "resumed", "module/module.safetensors")


@pytest.mark.engines
@pytest.mark.parametrize("name", EACH)
def test_accelerate_launch_starts_each_engine_from_its_file(name, shared, tmp_path):
    """In the file's own precision, bf16: the bits of a run in the environment that the other tests take from that file."""
    line = ("accelerate", "launch", "--config_file", f"accelerate_configs/{name}.yaml", "--num_processes", "2")
    hardware = (*launch.ENGINES_ON_CPU, "DS_ACCELERATOR")  # the rest is in the file
    only_cpus = {key: value for key, value in ENGINES[name].items() if key in hardware}
    shared(tmp_path / "launched", *MORE, launcher=line, **only_cpus)
    shared(tmp_path / "run", *MORE, **under(name, "bf16"))
    one, two = (tmp_path / folder for folder in ("launched", "run"))
    assert launch.same_bits(launch.weights(one, STEPS), launch.weights(two, STEPS))
    assert launch.without_times(one) == launch.without_times(two)
