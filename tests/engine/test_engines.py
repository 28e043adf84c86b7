"""FSDP2 as accelerate_configs/fsdp2.yaml has it, on CPU processes (tests/engines_on_cpu), held against one process.

docs/ENGINES.md says which tests run where: those of seconds in `make test`, those marked `engines` in `make engines`.
"""

import json
import pickle
from pathlib import Path

import edits
import launch
import pytest
import torch
from safetensors.torch import load_file

FSDP2 = launch.fsdp2()
BF16 = {"ACCELERATE_MIXED_PRECISION": "bf16"}
STEPS = 4
MORE = ("--steps", STEPS, "--save-every", 1, "--keep", 100, "--val-every", 3, "--val-fraction", 0.02)
MORE += ("--batch-size", 16, "--micro-batch-size", 4)
BOUND = {"float32": 1e-6, "float64": 1e-12}
MODELS = {"dense": (), "mixture": ("--num-experts", 4)}
FILES = ["manifest.json", "model.safetensors", "optimizer.bin", "progress.json"]


@pytest.fixture(scope="module")
def trained(shared, tmp_path_factory):
    """trained(model, dtype, processes) -> the folder of an uninterrupted run with all its checkpoints; two: FSDP2."""
    folders = {}

    def call(model: str, dtype: str, processes: int) -> Path:
        key = (model, dtype, processes)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("trained") / "run"
            how = {"processes": processes, **(FSDP2 if processes > 1 else {})}
            shared(folders[key], *MORE, *MODELS[model], "--dtype", dtype, **how)
        return folders[key]

    return call


def published(folder: Path, kind: str = "trunk") -> dict[str, torch.Tensor]:
    return load_file(folder / kind / f"{'model' if kind == 'trunk' else kind}.safetensors")


LATER = pytest.mark.engines  # each model and each dtype is in `make test` once
CASES = [("dense", "float32"), ("mixture", "float64")]
CASES += [pytest.param(*case, marks=LATER) for case in (("dense", "float64"), ("mixture", "float32"))]


@pytest.mark.parametrize(("model", "dtype"), CASES)
def test_fsdp2_trains_what_one_process_trains(model, dtype, trained):
    one, two = (trained(model, dtype, processes) for processes in (1, 2))
    assert launch.difference(launch.weights(one, STEPS), launch.weights(two, STEPS)) < BOUND[dtype]
    assert launch.difference(published(one), published(two)) < BOUND[dtype]
    for row, reference in zip(launch.rows(two), launch.rows(one), strict=True):
        assert row["train/tokens"] == reference["train/tokens"]
        for key in ("train/loss", "train/grad_norm"):
            assert row[key] == pytest.approx(reference[key], rel=10 * BOUND[dtype])
    [one], [two] = (launch.rows(folder, "val/tokens")[:1] for folder in (one, two))
    assert two["val/tokens"] == one["val/tokens"]
    assert two["val/loss"] == pytest.approx(one["val/loss"], rel=10 * BOUND[dtype])


def test_a_checkpoint_of_fsdp2_is_that_of_one_process(trained):
    """The same files (but random states, which the script does not need), names, groups and shapes, and no other pickle."""
    one, two = (trained("dense", "float32", processes) / "checkpoints" / "step-00000004" for processes in (1, 2))
    assert sorted(path.name for path in two.iterdir()) == FILES
    first, second = (torch.load(path / "optimizer.bin", weights_only=True) for path in (one, two))
    assert second["param_groups"] == first["param_groups"] and list(second["state"]) == list(first["state"])
    for index, state in first["state"].items():
        assert launch.difference(state, second["state"][index]) < 1e-6
        assert {k: (v.shape, v.dtype) for k, v in state.items()} == {
            k: (v.shape, v.dtype) for k, v in second["state"][index].items()
        }


def test_fsdp2_resumes_with_the_same_bits(trained, shared, tmp_path):
    straight, folder = trained("dense", "float32", 2), tmp_path / "run"
    launch.copy_until(straight, folder, 2)
    assert "at update 2" in shared(folder, *MORE, processes=2, **FSDP2)
    assert launch.same_bits(launch.weights(straight, STEPS), launch.weights(folder, STEPS))
    first, second = (launch.optimizer_state(run, STEPS)["state"] for run in (straight, folder))
    assert all(launch.same_bits(state, second[index]) for index, state in first.items())
    assert launch.same_bits(published(straight), published(folder))
    assert launch.without_times(straight) == launch.without_times(folder)


def test_a_run_of_fsdp2_is_continued_and_published_compiled(trained, shared, tmp_path):
    """torch.compile with the backend that runs the captured graphs with torch's own operations: the same bits."""
    straight, folder = trained("dense", "float32", 2), tmp_path / "run"
    launch.copy_until(straight, folder, 2)
    assert "at update 2" in shared(folder, *MORE, processes=2, ACCELERATE_DYNAMO_BACKEND="EAGER", **FSDP2)
    assert launch.same_bits(launch.weights(straight, STEPS), launch.weights(folder, STEPS))
    assert launch.same_bits(published(straight), published(folder))
    assert launch.without_times(straight) == launch.without_times(folder)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)], ids=["FSDP2 to 1", "1 to FSDP2"])
def test_a_run_resumes_under_another_engine(before, after, trained, shared, tmp_path):
    """In float64 to 1e-12: sums over two processes and over one are rounded differently, so not the same bits."""
    straight, folder = trained("mixture", "float64", after), tmp_path / "run"
    launch.copy_until(trained("mixture", "float64", before), folder, 2)
    how = {"processes": after, **(FSDP2 if after > 1 else {})}
    assert "at update 2" in shared(folder, *MORE, *MODELS["mixture"], "--dtype", "float64", **how)
    assert launch.difference(launch.weights(straight, STEPS), launch.weights(folder, STEPS)) < 1e-12
    first, second = (launch.optimizer_state(run, STEPS)["state"] for run in (straight, folder))
    assert all(launch.difference(state, second[index]) < 1e-12 for index, state in first.items())


class Evil:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.mkdir, (self.marker,)


def test_a_sharded_checkpoint_of_an_earlier_version_is_not_opened(trained, shared, tmp_path):
    """accelerate's load_state unpickles `.metadata`."""
    folder, marker = tmp_path / "run", tmp_path / "ran"
    launch.copy_until(trained("dense", "float32", 2), folder, 1)
    path = folder / "checkpoints" / "step-00000001"
    shards = path / "pytorch_model_fsdp_0"
    shards.mkdir(exist_ok=True)
    (shards / ".metadata").write_bytes(pickle.dumps(Evil(marker)))
    launch.reseal(path)
    printed = shared(folder, *MORE, processes=2, fails=True, **FSDP2)
    assert "pytorch_model_fsdp_0 is not part of a checkpoint of this version" in printed and "Traceback" not in printed
    assert not marker.exists()
    pickle.loads((shards / ".metadata").read_bytes())
    assert marker.exists()


def test_bf16_keeps_what_is_exact(shared, altered, tmp_path):
    """A count of 639 tokens (bfloat16: 640), a load of 1/3, gradients added up in float32, a size of float32's bytes."""
    sgd = "torch.optim.SGD(optimizers.parameter_groups(trunk, 0.0), lr=settings.lr, momentum=0.9)"
    script = altered("train_shared.py", edits.OPTIMIZER, sgd)
    show = '    log.print_line(f"size {checkpoint_writer.size(model)} bytes")\n'  # after a validation: no backward pass reshards
    script = altered(script, edits.AFTER_TRAINING, edits.AFTER_TRAINING + show)
    more = (*MORE, "--steps", 2, "--sequence-length", 640, "--max-grad-norm", 1e9)
    more += ("--batch-size", 4, "--micro-batch-size", 1, "--val-fraction", 0.1, "--val-tokens", 1279)
    more += ("--num-experts", 3, "--router-aux-loss-coef", 1.0)
    one, two = tmp_path / "one", tmp_path / "two"
    printed_by_one = shared(one, *more, script=script, **BF16)
    printed = shared(two, *more, script=script, processes=2, **FSDP2 | BF16)
    [ours], [theirs] = (launch.rows(folder, "val/tokens") for folder in (two, one))
    assert ours["val/tokens"] == theirs["val/tokens"] == 1279
    assert ours["val/loss"] == pytest.approx(theirs["val/loss"], abs=2e-3)
    first, reference = (launch.rows(folder)[0] for folder in (two, one))
    assert first["train/loss"] == pytest.approx(reference["train/loss"], rel=1e-4)
    assert first["train/balance_loss"] == pytest.approx(1, abs=1e-6)
    gradients, references = (gradients_of_update_1(folder) for folder in (two, one))
    assert (gradients == gradients.bfloat16()).float().mean() < 0.5
    assert (gradients - references).norm() / references.norm() < 0.03
    assert printed.split("size ")[1].split(" bytes")[0] == printed_by_one.split("size ")[1].split(" bytes")[0]


def gradients_of_update_1(folder: Path) -> torch.Tensor:
    """All of them in one tensor: SGD's momentum."""
    state = launch.optimizer_state(folder, 1)["state"]
    return torch.cat([entry["momentum_buffer"].flatten() for entry in state.values()])


@pytest.fixture(scope="module")
def modules(module, tmp_path_factory):
    """The folders of a module trained by one process and by two under FSDP2, and what they printed."""
    one, two = (tmp_path_factory.mktemp("module") / name for name in ("one", "two"))
    more = (*MORE, "--steps", 3, "--lr", 1e-3)
    return one, module(one, *more), two, module(two, *more, processes=2, **FSDP2)


def test_no_thread_of_gloo_outlives_the_run(shared, altered, tmp_path):
    """One that frees the last collective's tensor while Python ends aborts the process: a launcher then reports failure."""
    show = (
        "    import atexit, pathlib\n"
        "    threads = lambda: [path.read_text() for path in pathlib.Path('/proc/self/task').glob('*/comm')]\n"
        "    atexit.register(lambda: print('AT THE END', threads().count('pt_gloo_runloop\\n'), flush=True))\n"
    )
    script = altered("train_shared.py", edits.START_LOG, show + edits.START_LOG)
    printed = shared(tmp_path / "run", *MORE, "--steps", 3, script=script, processes=2, **FSDP2)
    assert printed.count("AT THE END 0") == 2, printed


def test_a_module_of_fsdp2_is_that_of_one_process(modules):
    one, printed_by_one, two, printed = modules
    assert launch.difference(published(one, "module"), published(two, "module")) < 1e-6
    digests = [text.split("tensors, digest ")[1].split()[0] for text in (printed, printed_by_one)]
    assert digests[0] == digests[1] and "before and after" in printed


def test_a_modules_checkpoint_holds_no_frozen_tensor(modules):
    for folder in (modules[0], modules[2]):
        assert launch.weights(folder, 3).keys() == published(folder, "module").keys()


# ---- make engines ----

LONG = (*MORE, "--steps", launch.STEPS)
IN_FLOAT64 = (*LONG, "--dtype", "float64")
DDP = {"ACCELERATE_USE_CPU": "true"}
ENGINES = pytest.mark.parametrize("engine", [pytest.param(DDP, id="DDP"), pytest.param(FSDP2, id="FSDP2")])


@pytest.fixture(scope="module")
def straight64(shared, tmp_path_factory) -> Path:
    """An uninterrupted run of one process in float64, with all its checkpoints."""
    folder = tmp_path_factory.mktemp("straight64") / "run"
    shared(folder, *IN_FLOAT64)
    return folder


def same_results(folder: Path, straight: Path) -> None:
    """The weights of a run of one process to 1e-12, its rows, and a trunk."""
    assert launch.difference(launch.weights(straight, launch.STEPS), launch.weights(folder, launch.STEPS)) < 1e-12
    assert launch.difference(published(straight), published(folder)) < 1e-12
    for key in ("train/loss", "val/loss"):
        for row, reference in zip(launch.rows(folder, key), launch.rows(straight, key), strict=True):
            assert row["step"] == reference["step"] and row[key] == pytest.approx(reference[key], rel=1e-11)


@pytest.mark.engines
@pytest.mark.parametrize(("engine", "counts"), [(DDP, (4, 2, 1)), (FSDP2, (2, 4, 1))], ids=["DDP", "FSDP2"])
def test_three_numbers_of_processes_in_one_run(engine, counts, straight64, shared, altered, tmp_path):
    folder = tmp_path / "0"
    for number, (processes, end) in enumerate(zip(counts, (4, 8, launch.STEPS), strict=True)):
        if number:
            launch.copy_until(folder, tmp_path / str(number), 4 * number)
            folder = tmp_path / str(number)
        stopping = altered("train_shared.py", edits.CHECK_STOP, edits.interrupted_at(end))
        script = stopping if end < launch.STEPS else "train_shared.py"
        how = {"processes": processes, "script": script, **(engine if processes > 1 else {})}
        shared(folder, *IN_FLOAT64, "--micro-batch-size", 4, **how)
    same_results(folder, straight64)


def ended(*running) -> None:
    for process in running:
        assert process.wait(launch.PATIENCE) == 0


def machines(port: int) -> list[tuple[str, ...]]:
    """What is typed on each of two machines with two processes each; both are this one, over the loopback."""
    common = ("torchrun", "--nnodes", "2", "--nproc_per_node", "2", "--master_addr", "127.0.0.1")
    return [(*common, "--master_port", str(port), "--node_rank", rank) for rank in ("0", "1")]


@pytest.mark.engines
@ENGINES
def test_two_machines(engine, straight64, started, tmp_path):
    folder = tmp_path / "run"
    launchers = machines(launch.free_port())
    ended(*(started(folder, *IN_FLOAT64, launcher=line, out=tmp_path / line[-1], **engine) for line in launchers))
    same_results(folder, straight64)


@pytest.mark.engines
def test_two_machines_with_accelerate_launch(straight64, started, tmp_path):
    """As accelerate_configs/multi_node.yaml says, with CPUs for its GPUs."""
    common = ("accelerate", "launch", "--config_file", str(launch.ROOT / "accelerate_configs" / "multi_node.yaml"))
    common += ("--num_processes", "2", "--mixed_precision", "no", "--main_process_ip", "127.0.0.1")
    common += ("--main_process_port", str(launch.free_port()), "--machine_rank")
    running = [
        started(tmp_path / "run", *IN_FLOAT64, launcher=(*common, rank), out=tmp_path / rank, **DDP)
        for rank in ("0", "1")
    ]
    ended(*running)
    same_results(tmp_path / "run", straight64)


def elastic(started, folder: Path, port: int, agent: int, script: Path, engine: dict[str, str]):
    """The agent of one of one to two machines with a process each. The first one keeps the rendezvous."""
    launcher = ("torchrun", "--nnodes", "1:2", "--nproc_per_node", "1", "--max_restarts", "3")
    launcher += ("--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "elastic")
    launcher += ("--rdzv_conf", f"last_call_timeout=3,keep_alive_interval=1,is_host={agent == 0}")
    # torch 2.13 without this: a machine that joins waits forever for a store that ended with the earlier round
    engine = engine | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return started(folder, *IN_FLOAT64, script=script, launcher=launcher, out=folder.with_suffix(f".{agent}"), **engine)


@pytest.mark.engines
def test_elastic_torchrun_loses_a_machine(straight64, started, altered, tmp_path):
    """Two machines, one of which is lost with its process; the run goes on with the other from the last checkpoint."""
    folder, port = tmp_path / "run", launch.free_port()
    slow = altered(
        "train_shared.py", edits.AFTER_UPDATE, edits.AFTER_UPDATE + "        __import__('time').sleep(0.3)\n"
    )
    first, second = (elastic(started, folder, port, agent, slow, FSDP2) for agent in (0, 1))
    launch.wait_for(folder / "checkpoints" / "step-00000004", first)
    launch.kill_tree(second)
    assert first.wait(launch.PATIENCE) == 0
    assert "of 12" in (text := folder.with_suffix(".0").read_text()) and "resumed" in text
    same_results(folder, straight64)


@pytest.mark.engines
def test_elastic_torchrun_is_joined_by_a_machine(straight64, started, altered, tmp_path):
    folder, port = tmp_path / "run", launch.free_port()
    slow = altered("train_shared.py", edits.AFTER_UPDATE, edits.AFTER_UPDATE + "        __import__('time').sleep(3)\n")
    first = elastic(started, folder, port, 0, slow, DDP)
    launch.wait_for(folder / "checkpoints" / "step-00000002", first)
    second = elastic(started, folder, port, 1, slow, DDP)
    ended(first, second)
    assert "resumed" in folder.with_suffix(".0").read_text() + folder.with_suffix(".1").read_text()
    same_results(folder, straight64)


@pytest.fixture(scope="module")
def straight_fsdp2(shared, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("straight_fsdp2") / "run"
    shared(folder, *LONG, processes=2, **FSDP2)
    return folder


@pytest.mark.engines
@pytest.mark.parametrize("moment", [".tmp-step-00000003", ".tmp-step-00000005/manifest.json"])
def test_killed_inside_a_save(moment, straight_fsdp2, started, shared, tmp_path):
    """kill -9 for the launcher and both processes, on a slow disk: as soon as the partial checkpoint, or its last file,
    is there.
    """
    folder = tmp_path / "run"
    slow = launch.slow_disk(0.1) | FSDP2
    running = started(folder, *LONG, processes=2, new=True, **slow)
    launch.wait_for(folder / "checkpoints" / moment, running)
    launch.kill_tree(running)
    assert list((folder / "checkpoints").glob(".tmp-*")), "the kill came too late"
    shared(folder, *LONG, processes=2, **FSDP2)
    launch.same_run(straight_fsdp2, folder)


@pytest.mark.engines
def test_stopped_by_a_signal_under_fsdp2(straight_fsdp2, started, shared, tmp_path):
    folder = tmp_path / "run"
    running = started(folder, *LONG, "--save-every", 3, processes=2, new=True, **FSDP2)
    launch.wait_for(folder / "checkpoints" / "step-00000003", running)
    running.terminate()
    running.wait(launch.PATIENCE)
    assert not (folder / "trunk").exists()
    shared(folder, *LONG, processes=2, **FSDP2)
    launch.same_run(straight_fsdp2, folder)


@pytest.mark.engines
@pytest.mark.parametrize("kind", ["lora+head", "narrow+head", "expert", "ffn"])
def test_every_kind_of_module_under_fsdp2(kind, module, tmp_path):
    more = (*MORE, "--kind", kind, "--lr", 1e-3, "--layers", "top:1")
    module(tmp_path / "one", *more)
    module(tmp_path / "two", *more, processes=2, **FSDP2)
    assert launch.difference(*(published(tmp_path / name, "module") for name in ("one", "two"))) < 1e-6


@pytest.mark.engines
def test_a_module_stored_in_bf16_under_fsdp2(module, tmp_path):
    """What was trained, rounded, and the losses are those of the rounded values, as of one process."""
    more = (*MORE, "--lr", 1e-3, "--module-dtype", "bf16")
    module(tmp_path / "one", *more)
    module(tmp_path / "two", *more, processes=2, **FSDP2)
    rounding = []
    after = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        trained = launch.weights(folder, json.loads((folder / "module" / "module.json").read_text())["steps"])
        assert launch.same_bits({k: v.bfloat16() for k, v in trained.items()}, published(folder, "module"))
        after.append(json.loads((folder / "module" / "module.json").read_text())["losses"]["own"]["after"])
        rounding.append(after[-1] - launch.rows(folder, "val/loss")[-1]["val/loss"])
    assert after[0] == pytest.approx(after[1], abs=2e-6)
    assert min(map(abs, rounding)) > 5e-6, "the losses are of weights that were not rounded"


@pytest.mark.engines
def test_a_module_in_bf16_under_fsdp2(module, tmp_path):
    """Its frozen tensors are those of the trunk (the script compares the digests), and its losses those of one process."""
    more = (*MORE, "--lr", 1e-3)
    module(tmp_path / "one", *more, **BF16)
    module(tmp_path / "two", *more, processes=2, **FSDP2 | BF16)
    one, two = (launch.rows(tmp_path / name, "val/tokens")[-1] for name in ("one", "two"))
    assert two["val/tokens"] == one["val/tokens"]
    assert two["val/loss"] == pytest.approx(one["val/loss"], abs=1e-3)
