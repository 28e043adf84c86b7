"""A checkpoint is complete or absent after a kill, a full disk or a damaged file; loading one executes no code."""

import errno
import json
import os
import pickle
import shutil
import threading
import types
from copy import deepcopy
from pathlib import Path

import launch
import psutil
import pytest
import torch
from accelerate import Accelerator
from disks import fill, missing_bytes, mounted
from launch import reseal

from forge_common import checkpoint
from forge_common.errors import UserError
from forge_common.run import checkpoint_writer
from forge_common.run.checkpoint_folder import fault
from forge_common.run.progress import Progress


@pytest.fixture(scope="module")
def prepared():
    """An accelerator, a model that has been trained a little, and its optimizer."""
    torch.set_num_threads(1)  # the tests fork
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 300), torch.nn.Linear(300, 2))
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    return accelerator, model, optimizer


def train(prepared) -> None:
    accelerator, model, optimizer = prepared
    accelerator.backward(model(torch.randn(4, 64)).square().sum())
    optimizer.step()
    optimizer.zero_grad()


def writer_of(prepared, folder: Path, keep: int = 1) -> checkpoint_writer.Writer:
    assert folder.name == "checkpoints"
    accelerator, model, _ = prepared
    return checkpoint_writer.Writer(accelerator, model, types.SimpleNamespace(output_dir=folder.parent, keep=keep))


def save(prepared, folder: Path, step: int, *, keep: int = 1, required: bool = True, best: int = 0) -> None:
    """Trains an update and writes a checkpoint to the end."""
    train(prepared)
    writer = writer_of(prepared, folder, keep)
    writer.save(Progress("id", {}, {}, global_step=step, best_step=best), required=required, print_line=print)
    writer.wait()


def steps(folder: Path) -> list[int]:
    """The updates of the checkpoints with a final name, all of which must verify."""
    found = sorted(folder.glob("step-????????"))
    assert all(fault(path) is None for path in found)
    return [int(path.name.removeprefix("step-")) for path in found]


CALLS = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir")


def die_at(number: int, calls: list[str]) -> None:
    """Ends this process, as a kill does, just before the `number`-th of its calls that change the disk."""

    def watched(name, call):
        def counted(*arguments, **named):
            if len(calls) == number:
                os._exit(9)
            calls.append(name)
            return call(*arguments, **named)

        return counted

    for name in CALLS:
        setattr(os, name, watched(name, getattr(os, name)))


def test_a_kill_before_every_call_of_a_save(prepared, tmp_path):
    """A fork ends before each call of a save (write, rename, delete): there is always a good checkpoint, old or new."""
    folder, before = tmp_path / "checkpoints", []
    save(prepared, folder, 1)
    for number in range(200):
        copy = tmp_path / f"at-{number}" / "checkpoints"
        shutil.copytree(folder, copy)
        child = os.fork()
        if not child:
            die_at(number, [])
            save(prepared, copy, 2)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found = steps(copy)
        assert found in ([1], [1, 2], [2]), (number, found)
        before.append(found)
        newest = checkpoint.newest(prepared[0], copy)
        assert newest and int(newest.name[-8:]) == before[-1][-1] and not list(copy.glob(".*"))
        if not code:
            break
    assert code == 0 and number > 10
    assert before[0] == [1] and before[-1] == [2] and [1, 2] in before, (
        "the old one is deleted after the new one has its name"
    )


def test_everything_is_synced_before_it_has_its_name(prepared, tmp_path, monkeypatch):
    """The order: every file and the folder are synced, the folder is renamed, its parent synced, the old one removed."""
    folder, calls = tmp_path / "checkpoints", []
    save(prepared, folder, 1)
    names = {}

    def noting(name, call):
        def noted(target, *more, **named):
            where = names.get(target) or (os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else target)
            calls.append((name, Path(where).name))
            return call(target, *more, **named)

        return noted

    for name in ("fsync", "rename"):
        monkeypatch.setattr(os, name, noting(name, getattr(os, name)))
    save(prepared, folder, 2)
    monkeypatch.undo()
    commit = calls.index(("rename", ".tmp-step-00000002"))
    synced = {name for call, name in calls[:commit] if call == "fsync"}
    whole = {path.name for path in (folder / "step-00000002").iterdir()}
    assert whole | {".tmp-step-00000002"} <= synced and {"model.safetensors", "optimizer.bin", "manifest.json"} <= whole
    assert calls[commit + 1] == ("fsync", "checkpoints")
    assert ("rename", "step-00000001") in calls[commit + 2 :]


def test_the_loop_goes_on_while_a_checkpoint_is_written(prepared, tmp_path, monkeypatch):
    """The thread waits before it writes until the loop has trained on: every file holds the state at `save`."""
    accelerator, model, optimizer = prepared
    folder = tmp_path / "checkpoints"
    save(prepared, folder, 1)
    go_on, in_loop, save_state = threading.Event(), threading.current_thread(), accelerator.save_state

    def held_up(place):
        assert threading.current_thread() is in_loop or go_on.wait(60)
        return save_state(place)

    writer = writer_of(prepared, folder)
    writer.save(Progress("id", {}, {}, global_step=2), required=False, print_line=print)  # its memory is used again
    train(prepared)
    writer.wait()
    monkeypatch.setattr(accelerator, "save_state", held_up)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moments, random_state = deepcopy(optimizer.state_dict()), torch.get_rng_state()
    progress = Progress("id", {}, {}, global_step=3, passes={"a": 1.0})
    writer.save(progress, required=False, print_line=print)
    for _ in range(3):
        train(prepared)
        progress.global_step += 1
        progress.passes["a"] += 1
    assert steps(folder) == [2] and (folder / ".tmp-step-00000003").is_dir()
    go_on.set()
    writer.wait()
    assert steps(folder) == [3]
    path = folder / "step-00000003"
    assert not launch.same_bits(before, model.state_dict())
    assert launch.same_bits(before, launch.load_file(path / "model.safetensors"))
    stored = torch.load(path / "optimizer.bin", weights_only=True)
    assert stored["param_groups"] == moments["param_groups"]
    assert all(launch.same_bits(state, stored["state"][index]) for index, state in moments["state"].items())
    written = json.loads((path / "progress.json").read_text())
    assert (written["global_step"], written["passes"]) == (3, {"a": 1.0})
    states = torch.load(path / "random_states_0.pkl", weights_only=False)
    assert torch.equal(states["torch_manual_seed"], random_state)


def test_without_memory_for_a_copy_the_loop_waits(prepared, tmp_path, monkeypatch):
    """The bytes are then those of the model itself, so nothing may change them while they are written."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=0))
    folder = tmp_path / "checkpoints"
    train(prepared)
    writer_of(prepared, folder).save(Progress("id", {}, {}, global_step=1), required=False, print_line=print)
    assert steps(folder) == [1]


def test_a_damaged_best_checkpoint_is_not_published(prepared, tmp_path, capsys):
    accelerator, model, _ = prepared
    folder = tmp_path / "checkpoints"
    save(prepared, folder, 1)
    save(prepared, folder, 2, best=1)
    now = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    progress = Progress("id", {}, {}, global_step=2, best_step=1, best_val_loss=3.0)
    file = folder / "step-00000001" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert not checkpoint.load_best(accelerator, types.SimpleNamespace(output_dir=tmp_path), progress, print)
    assert launch.same_bits(now, model.state_dict())
    assert progress.best_step == 2 and progress.best_val_loss is None
    assert "missing or damaged" in capsys.readouterr().out and (folder / "step-00000001.broken").is_dir()


def test_a_run_does_not_start_again_when_all_checkpoints_are_damaged(prepared, tmp_path):
    folder = tmp_path / "checkpoints"
    save(prepared, folder, 1)
    for _ in range(2):  # the second time the name with .broken is taken
        (folder / "step-00000001" / "optimizer.bin").write_bytes(b"")
        with pytest.raises(UserError, match=r"only damaged checkpoints: step-00000001\.broken"):
            checkpoint.newest(prepared[0], folder)
        assert not (folder / "step-00000001").exists()
        save(prepared, folder, 1)
    assert checkpoint.newest(prepared[0], folder) == folder / "step-00000001"


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("form", ["pickle", "torch"])
@pytest.mark.parametrize(
    "name",
    ["optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl", "scaler.pt", "scheduler.bin", "sampler.bin"],
)
def test_a_planted_pickle_does_not_run(name, form, prepared, tmp_path):
    """With and without a matching manifest. A refused checkpoint changes nothing in memory."""
    accelerator, model, _ = prepared
    folder, marker = tmp_path / "checkpoints", tmp_path / "ran"
    save(prepared, folder, 1)
    path = folder / "step-00000001"
    save(prepared, folder, 2, keep=2)  # what is in memory is not what is in the checkpoint
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with open(path / name, "wb") as file:
        pickle.dump(Evil(marker), file) if form == "pickle" else torch.save(Evil(marker), file)
    assert name in fault(path)
    reseal(path)
    if name == "random_states_0.pkl":  # accelerate skips it; every random number follows from seed, update and rank
        checkpoint.load(accelerator, path)
    else:
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            checkpoint.load(accelerator, path)
        assert launch.same_bits(before, model.state_dict())
    assert not marker.exists()
    with open(tmp_path / "allowed", "wb") as file:  # a plain load does execute it
        pickle.dump(Evil(marker), file)
    pickle.loads((tmp_path / "allowed").read_bytes())
    assert marker.exists()


def test_a_checkpoint_with_other_shapes_changes_nothing(prepared, tmp_path):
    accelerator, model, _ = prepared
    folder = tmp_path / "checkpoints"
    save(prepared, folder, 1)
    path = folder / "step-00000001"
    tensors = launch.load_file(path / "model.safetensors")
    name = list(tensors)[-1]
    tensors[name] = tensors[name][..., :1].contiguous()
    from safetensors.torch import save_file

    save_file(tensors, path / "model.safetensors")
    reseal(path)
    train(prepared)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError, match=name):
        checkpoint.load(accelerator, path)
    assert launch.same_bits(before, model.state_dict())


@pytest.fixture
def small_disk(tmp_path):
    with mounted(tmp_path / "disk", "size=8m") as disk:
        yield disk


@pytest.mark.parametrize("foreseen", [True, False])
@pytest.mark.parametrize("leaving", [0, 30_000, 150_000, 250_000])
def test_on_a_full_disk_only_the_new_checkpoint_is_lost(leaving, foreseen, prepared, small_disk, capsys, monkeypatch):
    """Not started where the lack of space is known before; removed where the disk fills up in the middle of a file."""
    folder = small_disk / "checkpoints"
    save(prepared, folder, 1)
    missing = checkpoint_writer.size(prepared[1]) - leaving
    if foreseen:
        monkeypatch.setattr(prepared[0], "save_state", lambda folder: pytest.fail("it was started"))
    else:
        monkeypatch.setattr(checkpoint_writer, "size", lambda model: 0)
    filler = fill(small_disk, leaving=leaving)
    save(prepared, folder, 2, required=False)
    printed = capsys.readouterr().out
    assert "the checkpoint of update 2 was not saved" in printed and "The older ones are kept" in printed
    if foreseen:
        assert missing_bytes(printed) == pytest.approx(missing, rel=0.01, abs=5000)  # a disk gives whole pages
    assert steps(folder) == [1] and not list(folder.glob(".*"))
    with pytest.raises(UserError, match="was not saved"):
        save(prepared, folder, 3)
    filler.unlink()
    monkeypatch.undo()
    save(prepared, folder, 4)
    assert steps(folder) == [4]


def test_another_error_in_a_save_does_not_count_as_a_full_disk(prepared, tmp_path, monkeypatch):
    def broken(folder):
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(prepared[0], "save_state", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        save(prepared, tmp_path / "checkpoints", 1)


def test_an_error_of_the_thread_is_printed_at_once_and_raised_by_the_next_save(prepared, tmp_path, capsys, monkeypatch):
    folder, writer = tmp_path / "checkpoints", writer_of(prepared, tmp_path / "checkpoints")
    save(prepared, folder, 1)

    def broken(old, new):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "rename", broken)
    train(prepared)
    writer.save(Progress("id", {}, {}, global_step=2), required=False, print_line=print)
    with pytest.raises(OSError, match="Input/output error"):
        writer.save(Progress("id", {}, {}, global_step=3), required=True, print_line=print)
    assert "step-00000002 was not written ([Errno 5] Input/output error)" in capsys.readouterr().out
    monkeypatch.undo()
    assert steps(folder) == [1] and checkpoint.newest(prepared[0], folder) == folder / "step-00000001"


@pytest.mark.parametrize("fault", ["removed", "a file"])
def test_without_its_output_directory_a_save_is_an_error_that_names_it(prepared, tmp_path, fault):
    """Nothing is made again in its place: an older checkpoint would be missing there."""
    folder = tmp_path / "run" / "checkpoints"
    folder.parent.mkdir()
    save(prepared, folder, 1)
    folder.parent.rename(tmp_path / "elsewhere")
    if fault == "a file":
        folder.parent.touch()
    with pytest.raises(UserError, match=rf"--output-dir {folder.parent} (does not exist any|is no longer a folder)"):
        save(prepared, folder, 2)
    assert not folder.exists() and steps(tmp_path / "elsewhere" / "checkpoints") == [1]
