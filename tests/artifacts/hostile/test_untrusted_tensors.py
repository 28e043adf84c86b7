"""Untrusted tensors: what does not match its digest, its type or its shape is refused, and the message names it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_artifacts import CONFIG, ONE, TOKENS, assembling, counts, edit, header, load, refused

from forge_common import assemble
from forge_common.artifacts import assembled
from forge_common.artifacts.module_folder import write_module
from forge_common.artifacts.trunk_folder import read_trunk
from forge_common.files.tensors import digest, read_tensors


def test_a_flipped_bit_is_refused_and_the_tensor_is_named(root):
    for folder, name in (("one", "module"), ("trunk", "model"), ("one", "statistics"), ("trunk", "statistics")):
        path = root / folder / f"{name}.safetensors"
        before, tensors = path.read_bytes(), load_file(path)
        for key in list(tensors)[:3]:
            changed = load_file(path)
            changed[key].view(-1).view(torch.uint8)[-1] ^= 1
            save_file(changed, path)
            message = refused(load, root / folder)
            assert f"'{key}' differs (1 in all)" in message and "changed or damaged" in message
            path.write_bytes(before)


@pytest.mark.parametrize("folder", ["trunk", "one"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_nan_and_values_beyond_float32_are_refused(root, folder, value):
    """1e300 is finite in float64, in which it is stored."""
    path = root / folder / ("model.safetensors" if folder == "trunk" else "module.safetensors")
    tensors = load_file(path)
    name = sorted(tensors)[-1]
    tensors[name] = tensors[name].double()
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path)
    assert f"{name} holds NaN or Inf" in refused(load, root / folder)


def test_moments_with_nan_or_a_singular_ridge_system_are_refused(valid_artifacts, tmp_path):
    for number, value in enumerate((float("inf"), float("nan"), 0.0)):
        folder = tmp_path / str(number)
        shutil.copytree(valid_artifacts, folder)
        for name in ("one", "two"):
            path = folder / name / "statistics.safetensors"
            statistics = load_file(path)
            statistics["second"][:] = value
            save_file(statistics, path)
            edit(folder / name / "module.json", statistics_digest=digest(statistics), tensor_digests={})
        if value == 0:
            assert "Use --router context" in refused(assemble.main, assembling(folder, router="ridge"))
            assert not (folder / "new" / "assembled").exists()
            assert assemble.main(assembling(folder)) == 0
            edit(folder / "new" / "assembled" / "assembled.json", router="ridge")
            assert "Use --router context" in refused(load, folder / "new" / "assembled")
        else:
            assert "second holds NaN or Inf" in refused(assemble.main, assembling(folder, router="ridge"))


@pytest.mark.parametrize("where", ["trunk/model.safetensors", "one/module.safetensors"])
@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64], ids=str
)
def test_weights_of_other_dtypes_are_refused(root, where, dtype):
    tensors = load_file(root / where)
    key = sorted(tensors)[0]
    tensors[key] = tensors[key].to(dtype)
    save_file(tensors, root / where)
    assert f"{key} is of {dtype}" in refused(load, (root / where).parent)


MALFORMED = {
    "empty": b"",
    "seven bytes": b"1234567",
    "beyond the file": header(b"{}", 2**20),
    "a huge header": header(b"{}", 2**63),
    "not an object": header(b"[1]"),
    "deeply nested": header(b'{"a":' + b"[" * 100_000),
    "a name with a line break": header(b'{"a\\n":' + ONE + b"}", body=bytes(4)),
    "overlapping": header(b'{"a":' + ONE + b',"b":' + ONE + b"}", body=bytes(4)),
    "extra bytes": header(b'{"a":' + ONE + b"}", body=bytes(5)),
    "too short": header(b'{"a":' + ONE + b"}", body=bytes(3)),
    "overflowing": header(b'{"a":{"dtype":"F32","shape":[0,9223372036854775808],"data_offsets":[0,0]}}'),
    "an unknown dtype": header(ONE.join((b'{"a":', b"}")).replace(b"F32", b"F99"), body=bytes(4)),
    "not UTF-8": header(b'{"\xff":1}'),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_safetensors_are_refused(tmp_path, name):
    path = tmp_path / "model.safetensors"
    path.write_bytes(MALFORMED[name])
    assert str(path) in refused(read_tensors, path)


def test_a_tensor_in_two_files_is_refused(root):
    path = root / "trunk" / "model.safetensors"
    shutil.copyfile(path, root / "trunk" / "again.safetensors")
    names = {"a": "model.safetensors", "b": "again.safetensors"}
    (root / "trunk" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert "is in another file too" in refused(load, root / "trunk")


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
def test_an_index_that_names_other_files_is_refused(root, index):
    (root / "trunk" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert str(root / "trunk") in refused(load, root / "trunk")


# ---- Parts of an assembled model ----


def test_replaced_parts_are_refused(root):
    """The replacements are valid and made for this trunk, but are not what was assembled."""
    torch.manual_seed(1)
    modules = root / "assembled" / "modules"
    tensors = {
        name: torch.randn_like(tensor) for name, tensor in load_file(root / "one" / "module.safetensors").items()
    }
    metadata = json.loads((root / "one" / "module.json").read_text())
    metadata = {
        name: value for name, value in metadata.items() if "digest" not in name or name.startswith(("trunk", "tok"))
    }
    write_module(modules / "one", tensors, metadata, counts(9), CONFIG)
    assert "assembled.json says" in refused(load, root / "assembled")
    shutil.rmtree(modules / "one")
    shutil.copytree(root / "two", modules / "one")
    assert "another module is called two" in refused(load, root / "assembled")
    shutil.rmtree(modules / "one")
    shutil.copytree(root / "one", modules / "one")
    load(root / "assembled")
    edit(root / "assembled" / "assembled.json", modules=["one"])
    assert "digests of other parts" in refused(load, root / "assembled")


@pytest.mark.parametrize("router", ["context", "ridge", "uniform"])
def test_the_trunk_alone_needs_no_statistics(valid_artifacts, tmp_path, router):
    shutil.copytree(valid_artifacts, tmp_path / "root")
    trunk = tmp_path / "root" / "trunk"
    metadata = json.loads((trunk / "forge.json").read_text())
    del metadata["statistics_digest"]
    (trunk / "forge.json").write_text(json.dumps(metadata))
    (trunk / "statistics.safetensors").unlink()
    assert assemble.main(assembling(tmp_path / "root", router=router)) == 0
    whole = str(tmp_path / "root" / "new" / "assembled")
    alone, _, _ = assembled.read_assembled(whole, without=("one", "two"))
    expected = read_trunk(str(trunk))[0].nats(TOKENS)
    torch.testing.assert_close(alone.nats(TOKENS), expected, rtol=0, atol=1e-6)
