"""ZeRO-2 and ZeRO-3 as accelerate_configs/deepspeed_zero*.yaml have them, on CPU processes, held against one process.

DeepSpeed is not part of requirements.txt: `make engines` installs it into .engines. Each run has an update without a
scored token and one whose gradient is NaN.
"""

import json
import os
import pickle
from pathlib import Path

import edits
import launch
import pytest
import torch
from safetensors.torch import load_file

INSTALLED = (launch.ROOT / ".engines" / "deepspeed").is_dir()
pytestmark = [pytest.mark.engines, pytest.mark.skipif(not INSTALLED, reason="DeepSpeed is not installed: make engines")]

STEPS = 5
EMPTY, BAD = 2, 4
MORE = (
    "--steps",
    STEPS,
    "--save-every",
    1,
    "--keep",
    100,
    "--val-every",
    4,
    "--val-fraction",
    0.1,
    "--val-tokens",
    1279,
    "--lr",
    0.001,
)
MIXTURE = ("--num-experts", 4)
FLOAT32 = {"ACCELERATE_MIXED_PRECISION": "no"}
BF16 = {"ACCELERATE_MIXED_PRECISION": "bf16"}


ENGINES = {"one": {}, "zero2": launch.deepspeed(2), "zero3": launch.deepspeed(3)}


@pytest.fixture(scope="session")
def sharded(tmp_path_factory) -> dict[str, str]:
    """ZeRO-3 that shards small parameters too: by default it keeps those below 100,000 elements whole, so all of a test's model."""
    file = tmp_path_factory.mktemp("deepspeed") / "zero3.json"
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": 20_000}
    config = {"zero_optimization": zero, "gradient_clipping": 1.0, "gradient_accumulation_steps": "auto"}
    file.write_text(json.dumps(config))
    return ENGINES["zero3"] | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}


@pytest.fixture(scope="session")
def engine(sharded):
    """engine(name) -> the keywords of a run under it."""

    def keywords(name: str, precision: dict[str, str]) -> dict:
        chosen = sharded if name == "zero3-sharded" else ENGINES[name]
        return {"processes": 1 if name == "one" else 2, **chosen, **precision}

    return keywords


def with_bad_updates(altered, script: str) -> Path:
    script = altered(script, edits.TAKE_WINDOWS, edits.empty_update(EMPTY))
    return altered(script, edits.BACKWARD, edits.scaled_by(f'(float("nan") if step == {BAD} else scale)'))


@pytest.fixture(scope="session")
def script(altered):
    return with_bad_updates(altered, "train_shared.py")


@pytest.fixture(scope="module")
def trained(shared, script, engine, tmp_path_factory):
    """trained(engine, precision) -> the folder of an uninterrupted run with all its checkpoints. A mixture of experts."""
    folders = {}

    def call(name: str, precision: str) -> Path:
        if (name, precision) not in folders:
            folders[name, precision] = tmp_path_factory.mktemp(name) / "run"
            how = engine(name, BF16 if precision == "bf16" else FLOAT32)
            shared(folders[name, precision], *MORE, *MIXTURE, script=script, **how)
        return folders[name, precision]

    return call


def published(folder: Path, kind: str = "trunk") -> dict[str, torch.Tensor]:
    return load_file(folder / kind / f"{'model' if kind == 'trunk' else kind}.safetensors")


def same_state(one: Path, other: Path, step: int, other_step: int | None = None) -> bool:
    """Weights and moments, bit for bit."""
    first, second = launch.optimizer_state(one, step), launch.optimizer_state(other, other_step or step)
    same = all(launch.same_bits(state, second["state"][index]) for index, state in first["state"].items())
    return same and launch.same_bits(launch.weights(one, step), launch.weights(other, other_step or step))


NAMES = ["zero2", "zero3", "zero3-sharded"]
PRECISIONS = {
    "float32": 1e-6,
    "bf16": 1e-3,
}  # bounds; bf16's is that of the mean gradient, AdamW's first moment (0.09 at most)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", NAMES)
def test_deepspeed_trains_what_one_process_trains(name, precision, trained):
    """In bf16 one process keeps float32 weights and rounds in each product, DeepSpeed computes with rounded weights.

    1,279 held-out tokens: bfloat16 has 1,280 only.
    """
    bound = PRECISIONS[precision]
    one, two = trained("one", precision), trained(name, precision)
    if precision == "float32":
        assert launch.difference(launch.weights(one, STEPS), launch.weights(two, STEPS)) < bound
        assert launch.difference(published(one), published(two)) < bound
    first, second = (launch.optimizer_state(folder, STEPS)["state"] for folder in (one, two))
    for index, state in first.items():
        assert (state["exp_avg"] - second[index]["exp_avg"]).abs().max().item() < bound
    for row, reference in zip(launch.rows(two), launch.rows(one), strict=True):
        assert row["train/tokens"] == reference["train/tokens"]
        for key in ("train/loss", "train/balance_loss", "train/z_loss", "train/grad_norm"):
            expected = reference[key] if reference[key] is None else pytest.approx(reference[key], rel=10 * bound)
            assert row[key] == expected, key
    for row, reference in zip(launch.rows(two, "val/loss"), launch.rows(one, "val/loss"), strict=True):
        assert row["val/tokens"] == reference["val/tokens"] == 1279
        assert row["val/loss"] == pytest.approx(reference["val/loss"], rel=10 * bound)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", NAMES)
def test_an_update_that_is_not_applied_changes_neither_weights_nor_moments(name, precision, trained):
    folder = trained(name, precision)
    for step in (EMPTY, BAD):
        assert same_state(folder, folder, step - 1, step)
        assert not same_state(folder, folder, step, step + 1)
    last = launch.rows(folder)[-1]
    assert (last["train/empty_updates"], last["train/bad_updates"]) == (1, 1)
    assert {int(entry["step"]) for entry in launch.optimizer_state(folder, STEPS)["state"].values()} == {STEPS - 2}


@pytest.mark.parametrize("name", NAMES)
def test_float32_weights_are_saved_and_published_in_bf16(name, trained):
    """What the engine computes with has 16 bits; its weights, those of the checkpoint and of the trunk, have 32."""
    folder = trained(name, "bf16")
    for tensors in (launch.weights(folder, STEPS), published(folder)):
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
        assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in tensors.values())
    assert launch.same_bits(launch.weights(folder, STEPS), published(folder))


def test_a_checkpoint_of_deepspeed_is_that_of_one_process(trained):
    one, two = (trained(name, "float32") / "checkpoints" / f"step-{STEPS:08d}" for name in ("one", "zero3-sharded"))
    names = {path.name for path in one.iterdir()} - {"random_states_0.pkl"}
    assert {path.name for path in two.iterdir()} == names
    first, second = (torch.load(path / "optimizer.bin", weights_only=True) for path in (one, two))
    assert list(second["state"]) == list(first["state"])
    assert [group["params"] for group in first["param_groups"]] == [group["params"] for group in second["param_groups"]]
    for index, state in first["state"].items():
        assert launch.difference(state, second["state"][index]) < 1e-6
        assert {k: (v.shape, v.dtype) for k, v in state.items()} == {
            k: (v.shape, v.dtype) for k, v in second["state"][index].items()
        }


@pytest.mark.parametrize(
    ("name", "precision"),
    [("zero2", "float32"), ("zero2", "bf16"), ("zero3", "bf16"), ("zero3-sharded", "bf16")],
)
def test_deepspeed_resumes_with_the_same_bits(name, precision, trained, shared, script, engine, tmp_path):
    straight, folder = trained(name, precision), tmp_path / "run"
    launch.copy_until(straight, folder, 3)
    how = engine(name, BF16 if precision == "bf16" else FLOAT32)
    assert "at update 3" in shared(folder, *MORE, *MIXTURE, script=script, **how)
    assert same_state(straight, folder, STEPS)
    assert launch.same_bits(published(straight), published(folder))
    assert launch.without_times(straight) == launch.without_times(folder)


def test_a_killed_run_resumes_with_the_same_bits(trained, started, shared, script, engine, tmp_path):
    straight, folder = trained("zero2", "bf16"), tmp_path / "run"
    how = engine("zero2", BF16)
    running = started(folder, *MORE, *MIXTURE, script=script, new=True, **how)
    launch.wait_for(folder / "checkpoints" / "step-00000002", running)
    launch.kill_tree(running)
    assert "resumed" in shared(folder, *MORE, *MIXTURE, script=script, **how)
    assert same_state(straight, folder, STEPS)
    assert launch.same_bits(published(straight), published(folder))
    assert launch.without_times(straight) == launch.without_times(folder)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("zero2", "one"),
        ("one", "zero2"),
        ("zero2", "zero3-sharded"),
        ("zero3-sharded", "one"),
        ("one", "zero3-sharded"),
    ],
)
def test_a_run_resumes_under_another_engine(before, after, trained, shared, script, engine, tmp_path):
    straight, folder = trained(after, "float32"), tmp_path / "run"
    launch.copy_until(trained(before, "float32"), folder, 3)
    assert "at update 3" in shared(folder, *MORE, *MIXTURE, script=script, **engine(after, FLOAT32))
    assert launch.difference(launch.weights(straight, STEPS), launch.weights(folder, STEPS)) < 1e-6
    first, second = (launch.optimizer_state(run, STEPS)["state"] for run in (straight, folder))
    assert all(launch.difference(state, second[index]) < 1e-6 for index, state in first.items())


@pytest.mark.parametrize(
    ("flags", "variables", "named"),
    [
        (("--dtype", "float64"), {}, "--dtype float64"),
        (("--max-grad-norm", 0.5), {}, "gradient_clipping is 1.0, --max-grad-norm is 0.5"),
        ((), {"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed precision fp16"),
        ((), {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "zero_stage is 1"),
        (
            (),
            {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"},
            "--dynamo_backend inductor: ",
        ),
        ((), {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "offload_optimizer_device is cpu"),
    ],
)
def test_what_deepspeed_cannot_keep_is_refused(flags, variables, named, shared, engine, tmp_path):
    printed = shared(tmp_path / "run", *flags, fails=True, **engine("zero2", FLOAT32) | variables)
    assert named in printed and "Traceback" not in printed
    assert not (tmp_path / "run" / "checkpoints").exists()


class Evil:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_checkpoint_that_deepspeed_wrote_is_not_opened(trained, shared, script, engine, tmp_path):
    """DeepSpeed's load_checkpoint unpickles its files."""
    folder, marker = tmp_path / "run", tmp_path / "ran"
    launch.copy_until(trained("zero2", "float32"), folder, 1)
    path = folder / "checkpoints" / "step-00000001"
    shards = path / "pytorch_model"
    shards.mkdir()
    (shards / "mp_rank_00_model_states.pt").write_bytes(pickle.dumps(Evil(marker)))
    launch.reseal(path)
    printed = shared(folder, *MORE, *MIXTURE, script=script, fails=True, **engine("zero2", FLOAT32))
    assert "pytorch_model is not part of a checkpoint of this version" in printed and "Traceback" not in printed
    assert not marker.exists()


@pytest.fixture(scope="module")
def modules(module, engine, tmp_path_factory):
    """modules(engine, precision) -> the folder of a module of the upper layer, and what its run printed."""
    made = {}

    def call(name: str, precision: str) -> tuple[Path, str]:
        if (name, precision) not in made:
            folder = tmp_path_factory.mktemp(name) / "run"
            more = ("--steps", 3, "--save-every", 1, "--keep", 9, "--lr", 1e-3, "--layers", "top:1")
            printed = module(folder, *more, **engine(name, BF16 if precision == "bf16" else FLOAT32))
            made[name, precision] = folder, printed
        return made[name, precision]

    return call


@pytest.mark.parametrize(
    ("name", "precision"), [("zero2", "float32"), ("zero2", "bf16"), ("zero3", "bf16"), ("zero3-sharded", "bf16")]
)
def test_a_module_of_deepspeed_is_that_of_one_process(name, precision, modules):
    """Published in float32, with the trunk unchanged (DeepSpeed rounds the frozen tensors it holds), and none of it in
    a checkpoint.
    """
    (one, _), (two, printed) = modules("one", precision), modules(name, precision)
    if precision == "float32":
        assert launch.difference(published(one, "module"), published(two, "module")) < PRECISIONS[precision]
    first, second = (launch.optimizer_state(folder, 3)["state"] for folder in (one, two))
    for index, state in first.items():
        assert (state["exp_avg"] - second[index]["exp_avg"]).abs().max().item() < PRECISIONS[precision]
    assert {tensor.dtype for tensor in published(two, "module").values()} == {torch.float32}
    assert "before and after" in printed
    assert launch.weights(two, 3).keys() == published(two, "module").keys()
    files = [folder / "module" / "module.json" for folder in (one, two)]
    first, second = (json.loads(file.read_text()) for file in files)
    assert first["trunk_digest"] == second["trunk_digest"]


@pytest.mark.parametrize("name", ["zero2", "zero3-sharded"])
def test_a_module_of_deepspeed_that_is_stored_in_bf16(name, module, engine, tmp_path):
    """Its 16 bits are those that the engine computed with, so the losses are of them."""
    module(tmp_path / "run", "--steps", 2, "--lr", 1e-3, "--module-dtype", "bf16", **engine(name, BF16))
    trained = launch.weights(tmp_path / "run", 2)
    assert launch.same_bits({k: v.bfloat16() for k, v in trained.items()}, published(tmp_path / "run", "module"))
    losses = json.loads((tmp_path / "run" / "module" / "module.json").read_text())["losses"]["own"]
    assert losses["after"] == launch.rows(tmp_path / "run", "val/loss")[-1]["val/loss"]


def test_a_module_starts_from_the_float32_weights_of_the_trunk(module, trunk, engine, tmp_path):
    """Not from the 16 bits that the engine makes of them: at a rate of almost zero it is published as it was copied."""
    more = ("--steps", 2, "--lr", 1e-30, "--kind", "ffn", "--warmup-steps", 1)
    module(tmp_path / "run", *more, **engine("zero2", BF16))
    copied = published(tmp_path / "run", "module")
    source = load_file(trunk / "model.safetensors")
    assert launch.same_bits(copied, {name: source[name] for name in copied})


LOW_RANK = ("--steps", 2, "--lr", 1e-3, "--kind", "lora+head", "--rank", 2)


@pytest.fixture(scope="module")
def low_rank_of_one(module, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("low_rank") / "run"
    module(folder, *LOW_RANK)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_low_rank_module_of_deepspeed_is_that_of_one_process(name, low_rank_of_one, module, engine, tmp_path):
    """Its head is computed from an embedding that ZeRO-3 gathers for the forward pass only."""
    module(tmp_path / "run", *LOW_RANK, **engine(name, FLOAT32))
    assert launch.difference(published(low_rank_of_one, "module"), published(tmp_path / "run", "module")) < 1e-6
