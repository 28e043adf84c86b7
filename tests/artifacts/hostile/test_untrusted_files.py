"""Untrusted folders: no code in them runs, and nothing outside of them is read or written."""

import faulthandler
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from small_artifacts import assembling, edit, load, refused, same

from forge_common import assemble, evaluate
from forge_common.artifacts.module_folder import read_module
from forge_common.artifacts.trunk_folder import read_trunk
from forge_common.data.tokenizer_files import load_tokenizer
from forge_common.files.atomic import read_json
from forge_common.files.tensors import read_tensors

KINDS = ("trunk", "one", "assembled")


@pytest.fixture(autouse=True)
def no_hang():
    """Ends the process if a reader waits, even in a library's own code: on a FIFO, for example."""
    faulthandler.dump_traceback_later(30, exit=True, file=sys.__stderr__ or sys.stderr)
    yield
    faulthandler.cancel_dump_traceback_later()


# ---- Pickles ----


class Exploit:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture(params=["pickle", "torch.save", "torch.save, old format"])
def exploit(request, tmp_path):
    """(the bytes of a pickle that runs code, the folder that its code makes)"""
    marker, path = tmp_path / "it-ran", tmp_path / "exploit"
    if request.param == "pickle":
        path.write_bytes(pickle.dumps(Exploit(marker)))
        pickle.loads(path.read_bytes())
    else:
        torch.save(Exploit(marker), path, _use_new_zipfile_serialization=request.param == "torch.save")
        torch.load(path, weights_only=False)
    assert marker.is_dir()  # the pickle does run code
    marker.rmdir()
    return path.read_bytes(), marker


@pytest.mark.parametrize("kind", KINDS)
def test_a_pickle_in_place_of_any_file_is_refused_and_does_not_run(root, exploit, kind):
    content, marker = exploit
    expected = load(root / kind)[0]
    for path in sorted(path for path in (root / kind).rglob("*") if path.is_file()):
        before = path.read_bytes()
        path.write_bytes(content)
        if path.name == "README.md":  # it is not read
            assert same(load(root / kind)[0], expected)
        else:
            assert str(path.parent) in refused(load, root / kind)
        assert not marker.exists(), path
        path.write_bytes(before)
    assert same(load(root / kind)[0], expected)


EXTRAS = ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "module.pt", "model.ckpt")
EXTRAS += (
    "tokenizer.pkl",
    "tokenizer.model",
    "scheduler.pth",
    "random_states_0.pkl",
    "extra.safetensors",
    "extra.json",
)
CODE = "import os\nos.mkdir({marker!r})\nclass Evil: pass\n"


def test_pickles_and_code_beside_the_files_are_ignored(root, exploit):
    """Neither their names nor config.json's auto_map load them, and assemble does not copy them."""
    content, marker = exploit
    expected = {kind: load(root / kind)[0] for kind in KINDS}
    for folder in [
        root / "one",
        *(root / "assembled").glob("modules/*"),
        root / "trunk",
        root / "assembled" / "trunk",
    ]:
        for name in EXTRAS:
            (folder / name).write_bytes(content)
        for name in ("modeling_evil.py", "tokenization_evil.py", "__init__.py", "conftest.py", "sitecustomize.py"):
            (folder / name).write_text(CODE.format(marker=str(marker)))
        for name in ("config.json", "tokenizer_config.json"):
            auto_map = {"AutoConfig": "modeling_evil.Evil", "AutoTokenizer": ["tokenization_evil.Evil", None]}
            auto_map |= {"AutoModelForCausalLM": "modeling_evil.Evil"}
            if (folder / name).exists():
                edit(folder / name, auto_map=auto_map, trust_remote_code=True, tokenizer_class="Evil")
    for kind in KINDS:
        assert same(load(root / kind)[0], expected[kind])
    assert assemble.main(assembling(root)) == 0
    assert len(list(evaluate.models(evaluate.Settings(str(root / "new" / "assembled"), (), without=("two",))))) == 5
    files = {path.relative_to(root / "new" / "assembled") for path in (root / "new").rglob("*") if path.is_file()}
    clean = {path.relative_to(root / "assembled") for path in (root / "assembled").rglob("*") if path.is_file()}
    assert files == {path for path in clean if path.name not in EXTRAS and path.suffix != ".py"}
    assert not marker.exists()


def test_a_pickle_named_as_a_trunk_or_module_is_not_opened(root, exploit):
    """As the path itself, as the only weights in a folder, and in an index."""
    content, marker = exploit
    for name in ("module.pt", "adapter_model.bin", "module.safetensors"):
        (root / name).write_bytes(content)
        message = refused(read_module, root / name, {})
        assert name in message and ("Pickles are not opened" in message or name.endswith("safetensors"))
        assert name in refused(read_trunk, str(root / name))
    (root / "trunk" / "pytorch_model.bin").write_bytes(content)
    index = root / "trunk" / "model.safetensors.index.json"
    for name in ("pytorch_model.bin", "pytorch_model.safetensors"):
        (root / "trunk" / name).write_bytes(content)
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        assert name in refused(read_trunk, str(root / "trunk"))
    index.unlink()
    (root / "trunk" / "model.safetensors").unlink()
    assert "pytorch_model.bin is a pickle and is not opened" in refused(read_trunk, str(root / "trunk"))
    assert not marker.exists()


# ---- Links and special files ----


@pytest.mark.parametrize("kind", KINDS)
def test_a_link_in_place_of_any_file_or_folder_is_refused(root, kind, tmp_path):
    """Even a link to the same file: everything that is read must be in the artifact's folder."""
    elsewhere = tmp_path / "elsewhere"
    for path in sorted((root / kind).rglob("*")):
        path.rename(elsewhere)
        path.symlink_to(elsewhere)
        message = refused(load, root / kind)
        assert f"{path.name!r} is a link" in message and str(path.parent) in message
        path.unlink()
        elsewhere.rename(path)
    load(root / kind)


@pytest.mark.parametrize(
    "where", ["trunk/README.md", "one/README.md", "trunk/tokenizer.json", "two/statistics.safetensors"]
)
def test_assemble_does_not_follow_links(root, where, tmp_path):
    """A link to a private file would publish that file."""
    (tmp_path / "secret").write_text("a secret")
    (root / where).unlink()
    (root / where).symlink_to(tmp_path / "secret")
    assert "is a link" in refused(assemble.main, assembling(root))
    assert not (root / "new" / "assembled").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_fifo_or_a_folder_in_place_of_any_file_is_refused_without_waiting(root, kind):
    for path in sorted(path for path in (root / kind).rglob("*") if path.is_file()):
        before = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        assert str(path.parent) in refused(load, root / kind)
        path.unlink()
        path.mkdir()
        if path.name != "README.md":
            assert str(path.parent) in refused(load, root / kind)
        path.rmdir()
        path.write_bytes(before)


@pytest.mark.parametrize("name", ["forge.json", "model.safetensors", "tokenizer.json"])
def test_readers_of_single_files_do_not_wait_for_a_fifo(tmp_path, name):
    os.mkfifo(tmp_path / name)
    reader = {"forge.json": read_json, "model.safetensors": read_tensors}.get(name, load_tokenizer)
    assert name in refused(reader, tmp_path / name)


@pytest.fixture
def snapshot(root, tmp_path):
    """The trunk in the layout of the hub's cache."""
    repository = tmp_path / "hub" / "models--org--name"
    revision = repository / "snapshots" / "0123abcd"
    revision.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted((root / "trunk").iterdir())):
        shutil.copyfile(path, repository / "blobs" / f"{number:040x}")
        (revision / path.name).symlink_to(f"../../blobs/{number:040x}")
    return revision


def test_a_snapshot_in_the_hub_cache_is_a_trunk(root, snapshot):
    assert same(load(snapshot)[0], load(root / "trunk")[0])
    line = assemble.Settings(str(snapshot), (root / "one", root / "two"), root / "new" / "assembled")
    assert assemble.main(line) == 0
    assert not any(path.is_symlink() for path in (root / "new").rglob("*"))
    assert same(
        load(root / "new" / "assembled")[0],
        load(root / "assembled")[0],
    )


@pytest.mark.parametrize("how", ["outside", "absolute", "other repository", "link to a link", "blobs is a link"])
def test_a_snapshot_with_links_out_of_its_repository_is_refused(snapshot, how, tmp_path):
    repository, link = snapshot.parent.parent, snapshot / "config.json"
    (snapshot / "forge.json").unlink()  # like most checkpoints on the hub
    blob = link.resolve()
    elsewhere = tmp_path / "elsewhere.json"
    shutil.copyfile(blob, elsewhere)
    if how == "blobs is a link":
        (repository / "blobs").rename(tmp_path / "blobs")
        (repository / "blobs").symlink_to(tmp_path / "blobs")
    elif how == "link to a link":
        blob.unlink()
        blob.symlink_to(elsewhere)
    else:
        other = tmp_path / "hub" / "models--org--other" / "blobs"
        other.mkdir(parents=True)
        shutil.copyfile(elsewhere, other / blob.name)
        target = {"outside": "../../../../elsewhere.json", "absolute": elsewhere}.get(how, other / blob.name)
        link.unlink()
        link.symlink_to(target)
        assert link.exists()
    assert "is a link" in refused(read_trunk, str(snapshot))
