"""Artifacts from strangers: no code runs, nothing outside of the folder is read or written, and all refusals name the place."""

import faulthandler
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import specimens
import torch
from safetensors.torch import load_file, save_file
from specimens import ONE, edit, header, refused

from forge_common import assemble, evaluate
from forge_common.artifacts import artifact, assembled
from forge_common.data.tokenizer import load_tokenizer
from forge_common.errors import UserError
from forge_common.files.atomic import read_json

KINDS = ("trunk", "one", "assembled")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return specimens.build(tmp_path_factory.mktemp("original"))


@pytest.fixture
def made(original, tmp_path):
    """A copy of the specimens that a test may spoil."""
    shutil.copytree(original, tmp_path / "made")
    return tmp_path / "made"


@pytest.fixture(autouse=True)
def at_once():
    """No reader waits: whatever hangs, on a FIFO and in a library's own code, ends the process."""
    faulthandler.dump_traceback_later(30, exit=True, file=sys.__stderr__)
    yield
    faulthandler.cancel_dump_traceback_later()


def assembling(folder: Path, *names: str, **how) -> assemble.Settings:
    modules = tuple(folder / name for name in names or ("one", "two"))
    return assemble.Settings(str(folder / "trunk"), modules, folder / "new" / "assembled", **how)


# ---- Pickles ----


class Exploit:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture(params=["pickle", "torch.save", "torch.save, the old way"])
def exploit(request, tmp_path):
    """(the bytes of a pickle that runs code, the folder that its code makes)"""
    marker, path = tmp_path / "it-ran", tmp_path / "exploit"
    if request.param == "pickle":
        path.write_bytes(pickle.dumps(Exploit(marker)))
        pickle.loads(path.read_bytes())
    else:
        torch.save(Exploit(marker), path, _use_new_zipfile_serialization=request.param == "torch.save")
        torch.load(path, weights_only=False)
    assert marker.is_dir()  # it is a real one
    marker.rmdir()
    return path.read_bytes(), marker


@pytest.mark.parametrize("kind", KINDS)
def test_a_pickle_in_place_of_any_file_is_refused_and_does_not_run(made, exploit, kind):
    content, marker = exploit
    wanted = specimens.load(made / kind)[0]
    for path in sorted(path for path in (made / kind).rglob("*") if path.is_file()):
        before = path.read_bytes()
        path.write_bytes(content)
        if path.name == "README.md":  # which nobody reads
            assert specimens.same(specimens.load(made / kind)[0], wanted)
        else:
            assert str(path.parent) in refused(specimens.load, made / kind)
        assert not marker.exists(), path
        path.write_bytes(before)
    assert specimens.same(specimens.load(made / kind)[0], wanted)


EXTRAS = ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "module.pt", "model.ckpt")
EXTRAS += (
    "tokenizer.pkl",
    "tokenizer.model",
    "scheduler.pth",
    "random_states_0.pkl",
    "extra.safetensors",
    "extra.json",
)
EVIL = "import os\nos.mkdir({marker!r})\nclass Evil: pass\n"


def test_a_pickle_and_code_beside_the_files_play_no_part(made, exploit):
    """Not by their names, not by config.json's auto_map; and assemble does not carry them on."""
    content, marker = exploit
    wanted = {kind: specimens.load(made / kind)[0] for kind in KINDS}
    for folder in [made / "one", *(made / "assembled").glob("modules/*"), made / "trunk", made / "assembled" / "trunk"]:
        for name in EXTRAS:
            (folder / name).write_bytes(content)
        for name in ("modeling_evil.py", "tokenization_evil.py", "__init__.py", "conftest.py", "sitecustomize.py"):
            (folder / name).write_text(EVIL.format(marker=str(marker)))
        for name in ("config.json", "tokenizer_config.json"):
            auto_map = {"AutoConfig": "modeling_evil.Evil", "AutoTokenizer": ["tokenization_evil.Evil", None]}
            auto_map |= {"AutoModelForCausalLM": "modeling_evil.Evil"}
            if (folder / name).exists():
                edit(folder / name, auto_map=auto_map, trust_remote_code=True, tokenizer_class="Evil")
    for kind in KINDS:
        assert specimens.same(specimens.load(made / kind)[0], wanted[kind])
    assert assemble.main(assembling(made)) == 0
    assert len(list(evaluate.models(evaluate.Settings(str(made / "new" / "assembled"), (), without=("two",))))) == 5
    files = {path.relative_to(made / "new" / "assembled") for path in (made / "new").rglob("*") if path.is_file()}
    clean = {path.relative_to(made / "assembled") for path in (made / "assembled").rglob("*") if path.is_file()}
    assert files == {path for path in clean if path.name not in EXTRAS and path.suffix != ".py"}
    assert not marker.exists()


def test_a_pickle_offered_for_a_trunk_or_a_module_is_not_opened(made, exploit):
    """By its own name, as the only weights of a folder, or as what an index names."""
    content, marker = exploit
    for name in ("module.pt", "adapter_model.bin", "module.safetensors"):
        (made / name).write_bytes(content)
        said = refused(artifact.read_module, made / name, {})
        assert name in said and ("Pickles are not opened" in said or name.endswith("safetensors"))
        assert name in refused(artifact.read_trunk, str(made / name))
    (made / "trunk" / "pytorch_model.bin").write_bytes(content)
    index = made / "trunk" / "model.safetensors.index.json"
    for name in ("pytorch_model.bin", "pytorch_model.safetensors"):
        (made / "trunk" / name).write_bytes(content)
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        assert name in refused(artifact.read_trunk, str(made / "trunk"))
    index.unlink()
    (made / "trunk" / "model.safetensors").unlink()
    assert "pytorch_model.bin is a pickle and is not opened" in refused(artifact.read_trunk, str(made / "trunk"))
    assert not marker.exists()


# ---- Links, special files, names ----


@pytest.mark.parametrize("kind", KINDS)
def test_a_link_in_place_of_any_file_or_folder_is_refused(made, kind, tmp_path):
    """Even to the very file: what is read lies in the artifact's own folder."""
    elsewhere = tmp_path / "elsewhere"
    for path in sorted((made / kind).rglob("*")):
        path.rename(elsewhere)
        path.symlink_to(elsewhere)
        said = refused(specimens.load, made / kind)
        assert f"{path.name!r} is a link" in said and str(path.parent) in said
        path.unlink()
        elsewhere.rename(path)
    specimens.load(made / kind)


@pytest.mark.parametrize(
    "where", ["trunk/README.md", "one/README.md", "trunk/tokenizer.json", "two/statistics.safetensors"]
)
def test_assemble_follows_no_link(made, where, tmp_path):
    """A card that is a link to somebody's secret would be published with the rest."""
    (tmp_path / "secret").write_text("a secret")
    (made / where).unlink()
    (made / where).symlink_to(tmp_path / "secret")
    assert "is a link" in refused(assemble.main, assembling(made))
    assert not (made / "new" / "assembled").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_fifo_or_a_folder_in_place_of_any_file_is_refused_at_once(made, kind):
    for path in sorted(path for path in (made / kind).rglob("*") if path.is_file()):
        before = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        assert str(path.parent) in refused(specimens.load, made / kind)
        path.unlink()
        path.mkdir()
        if path.name != "README.md":
            assert str(path.parent) in refused(specimens.load, made / kind)
        path.rmdir()
        path.write_bytes(before)


@pytest.mark.parametrize("name", ["forge.json", "model.safetensors", "tokenizer.json"])
def test_readers_of_single_files_wait_for_no_fifo_either(tmp_path, name):
    os.mkfifo(tmp_path / name)
    reader = {"forge.json": read_json, "model.safetensors": artifact.read_tensors}.get(name, load_tokenizer)
    assert name in refused(reader, tmp_path / name)


@pytest.fixture
def snapshot(made, tmp_path):
    """The trunk as the hub's cache holds it."""
    repository = tmp_path / "hub" / "models--org--name"
    revision = repository / "snapshots" / "0123abcd"
    revision.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted((made / "trunk").iterdir())):
        shutil.copyfile(path, repository / "blobs" / f"{number:040x}")
        (revision / path.name).symlink_to(f"../../blobs/{number:040x}")
    return revision


def test_a_snapshot_of_the_hubs_cache_is_a_trunk(made, snapshot):
    assert specimens.same(specimens.load(snapshot)[0], specimens.load(made / "trunk")[0])
    line = assemble.Settings(str(snapshot), (made / "one", made / "two"), made / "new" / "assembled")
    assert assemble.main(line) == 0
    assert not any(path.is_symlink() for path in (made / "new").rglob("*"))
    assert specimens.same(specimens.load(made / "new" / "assembled")[0], specimens.load(made / "assembled")[0])


@pytest.mark.parametrize("how", ["outside", "absolute", "other repository", "link behind the link", "blobs is a link"])
def test_a_snapshot_that_leads_elsewhere_is_refused(snapshot, how, tmp_path):
    repository, link = snapshot.parent.parent, snapshot / "config.json"
    (snapshot / "forge.json").unlink()  # as any other checkpoint of the hub
    blob = link.resolve()
    elsewhere = tmp_path / "elsewhere.json"
    shutil.copyfile(blob, elsewhere)
    if how == "blobs is a link":
        (repository / "blobs").rename(tmp_path / "blobs")
        (repository / "blobs").symlink_to(tmp_path / "blobs")
    elif how == "link behind the link":
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
    assert "is a link" in refused(artifact.read_trunk, str(snapshot))


BAD_NAMES = [
    "",
    ".",
    "..",
    "../evil",
    "../../evil",
    "/tmp/evil",
    "a/b",
    "a\\b",
    "C:evil",
    "~",
    "-rf",
    ".hidden",
    "a\nb",
    "a\0b",
]
BAD_NAMES += [
    "a b",
    "$HOME",
    "a;b",
    "*",
    "con",
    "NUL.txt",
    "com1",
    "lpt9.x",
    "a.",
    "\x1b[31m",
    "é" * 9,
    "x" * 65,
    "trunk",
    "TRUNK",
]
BAD_NAMES += ["\u202egpj", 5, True, None, [], {}, ["one"]]


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
def test_a_name_that_is_not_plain_is_refused_and_nothing_is_written(made, name, tmp_path):
    edit(made / "one" / "module.json", name=name)
    before = sorted(tmp_path.rglob("*"))
    said = refused(assemble.main, assembling(made))
    assert "name" in said and str(made / "one" / "module.json") in said and said.isprintable()
    edit(made / "assembled" / "assembled.json", modules=[name, "two"])
    said = refused(assembled.read_assembled, str(made / "assembled"))
    assert "modules" in said and "assembled.json" in said and said.isprintable()
    assert sorted(tmp_path.rglob("*")) == before
    if name is not None:
        with pytest.raises(UserError, match="cannot be called"):
            artifact.write_module(tmp_path / "own", {}, {"name": name}, {})


@pytest.mark.parametrize("name", ["a", "law", "cpp-2.1", "Recht_und_Gesetz", "c++", "conx", "x" * 64])
def test_a_plain_name_is_a_name(made, name):
    edit(made / "one" / "module.json", name=name)
    assert assemble.main(assembling(made)) == 0
    assert (made / "new" / "assembled" / "modules" / name / "module.json").is_file()
    specimens.load(made / "new" / "assembled")


def test_names_that_differ_in_case_alone_are_refused(made):
    edit(made / "one" / "module.json", name="TWO")
    assert "both called" in refused(assemble.main, assembling(made))


# ---- An assembled model is what was assembled ----


def test_parts_that_were_exchanged_are_refused(made):
    """Each of them sound, made for this trunk, and no longer the one that was assembled."""
    torch.manual_seed(1)
    modules = made / "assembled" / "modules"
    tensors = {
        name: torch.randn_like(tensor) for name, tensor in load_file(made / "one" / "module.safetensors").items()
    }
    facts = json.loads((made / "one" / "module.json").read_text())
    facts = {name: value for name, value in facts.items() if "digest" not in name or name.startswith(("trunk", "tok"))}
    artifact.write_module(modules / "one", tensors, facts, specimens.counts(9))
    assert "assembled.json says" in refused(specimens.load, made / "assembled")
    shutil.rmtree(modules / "one")
    shutil.copytree(made / "two", modules / "one")
    assert "another module is called two" in refused(specimens.load, made / "assembled")
    shutil.rmtree(modules / "one")
    shutil.copytree(made / "one", modules / "one")
    specimens.load(made / "assembled")
    edit(made / "assembled" / "assembled.json", modules=["one"])
    assert "digests of other parts" in refused(specimens.load, made / "assembled")


@pytest.mark.parametrize("router", ["context", "ridge", "uniform"])
def test_the_trunk_alone_needs_no_statistics(original, tmp_path, router):
    shutil.copytree(original, tmp_path / "made")
    trunk = tmp_path / "made" / "trunk"
    facts = json.loads((trunk / "forge.json").read_text())
    del facts["statistics_digest"]
    (trunk / "forge.json").write_text(json.dumps(facts))
    (trunk / "statistics.safetensors").unlink()
    assert assemble.main(assembling(tmp_path / "made", router=router)) == 0
    whole = str(tmp_path / "made" / "new" / "assembled")
    alone, _, _ = assembled.read_assembled(whole, without=("one", "two"))
    wanted = artifact.read_trunk(str(trunk))[0].nats(specimens.TOKENS)
    torch.testing.assert_close(alone.nats(specimens.TOKENS), wanted, rtol=0, atol=1e-6)


# ---- Tensors ----


def test_a_flipped_bit_is_refused_and_the_tensor_named(made):
    for folder, name in (("one", "module"), ("trunk", "model"), ("one", "statistics"), ("trunk", "statistics")):
        path = made / folder / f"{name}.safetensors"
        before, tensors = path.read_bytes(), load_file(path)
        for key in list(tensors)[:3]:
            changed = load_file(path)
            changed[key].view(-1).view(torch.uint8)[-1] ^= 1
            save_file(changed, path)
            said = refused(specimens.load, made / folder)
            assert f"It is '{key}' that differs (1 in all)" in said and "changed or damaged" in said
            path.write_bytes(before)


@pytest.mark.parametrize("folder", ["trunk", "one"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_no_number_that_float32_does_not_know(made, folder, value):
    """1e300 is finite, in the float64 that it is stored in."""
    path = made / folder / ("model.safetensors" if folder == "trunk" else "module.safetensors")
    tensors = load_file(path)
    name = sorted(tensors)[-1]
    tensors[name] = tensors[name].double()
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path)
    assert f"{name} holds NaN or Inf" in refused(specimens.load, made / folder)


def test_moments_that_are_no_numbers_or_have_no_solution_are_refused(original, tmp_path):
    for number, value in enumerate((float("inf"), float("nan"), 0.0)):
        folder = tmp_path / str(number)
        shutil.copytree(original, folder)
        for name in ("one", "two"):
            path = folder / name / "statistics.safetensors"
            counts = load_file(path)
            counts["second"][:] = value
            save_file(counts, path)
            edit(folder / name / "module.json", statistics_digest=artifact.digest(counts), tensor_digests={})
        if value == 0:
            assert assemble.main(assembling(folder, router="ridge")) == 0
            assert "is singular" in refused(specimens.load, folder / "new" / "assembled")
        else:
            assert "second holds NaN or Inf" in refused(assemble.main, assembling(folder, router="ridge"))


@pytest.mark.parametrize("where", ["trunk/model.safetensors", "one/module.safetensors"])
@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64], ids=str
)
def test_weights_of_other_types_are_refused_by_name(made, where, dtype):
    tensors = load_file(made / where)
    key = sorted(tensors)[0]
    tensors[key] = tensors[key].to(dtype)
    save_file(tensors, made / where)
    assert f"{key} is of {dtype}" in refused(specimens.load, (made / where).parent)


MALFORMED = {
    "empty": b"",
    "seven bytes": b"1234567",
    "beyond the file": header(b"{}", 2**20),
    "a huge header": header(b"{}", 2**63),
    "no object": header(b"[1]"),
    "deep": header(b'{"a":' + b"[" * 100_000),
    "a name with a line's end": header(b'{"a\\n":' + ONE + b"}", body=bytes(4)),
    "overlapping": header(b'{"a":' + ONE + b',"b":' + ONE + b"}", body=bytes(4)),
    "a tail": header(b'{"a":' + ONE + b"}", body=bytes(5)),
    "too short": header(b'{"a":' + ONE + b"}", body=bytes(3)),
    "overflowing": header(b'{"a":{"dtype":"F32","shape":[0,9223372036854775808],"data_offsets":[0,0]}}'),
    "of an unknown type": header(ONE.join((b'{"a":', b"}")).replace(b"F32", b"F99"), body=bytes(4)),
    "no utf-8": header(b'{"\xff":1}'),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_safetensors_are_refused_by_name(tmp_path, name):
    path = tmp_path / "model.safetensors"
    path.write_bytes(MALFORMED[name])
    assert str(path) in refused(artifact.read_tensors, path)


def test_a_tensor_in_two_files_is_refused(made):
    path = made / "trunk" / "model.safetensors"
    shutil.copyfile(path, made / "trunk" / "again.safetensors")
    names = {"a": "model.safetensors", "b": "again.safetensors"}
    (made / "trunk" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert "stands in another file as well" in refused(specimens.load, made / "trunk")


@pytest.mark.parametrize(
    "index",
    [
        {},
        {"weight_map": []},
        {"weight_map": ["model.safetensors"]},
        {"weight_map": "x"},
        {"weight_map": {}},
        {"weight_map": {"a": 1}},
        {"weight_map": {"a": ["b"]}},
        {"weight_map": None},
    ]
    + [
        {"weight_map": {"a": name}}
        for name in ("../trunk/model.safetensors", "/etc/passwd", "", "..", "none.safetensors", "a\0b")
    ],
    ids=repr,
)
def test_an_index_that_names_no_files_of_the_folder_is_refused(made, index):
    (made / "trunk" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert str(made / "trunk") in refused(specimens.load, made / "trunk")
