"""A module that is published in bf16: stored in half the bytes, widened exactly when it is read, refused where metadata
and file differ.
"""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_artifacts import CONFIG, MODULES, TOKENS, assembling, counts, edit, load, refused, same

from forge_common import assemble, merge
from forge_common.artifacts.module_folder import read_model, read_module, write_module
from forge_common.artifacts.publish import round_tensors
from forge_common.artifacts.trunk_folder import read_trunk
from forge_common.files.tensors import digest
from forge_common.routing.routers import UniformRouter


def written(root, name: str, dtype: str, *, rounded: bool = False) -> dict:
    """Publishes the module `name` of `root` again, in `dtype`; returns its tensors before that. rounded: to bf16, in float32."""
    tensors, metadata = read_module(root / name, read_trunk(str(root / "trunk"))[2])
    described = {key: metadata[key] for key in ("name", "kind", "layers", "width", "rank", "val_fraction")}
    described |= {key: metadata[key] for key in ("trunk_digest", "tokenizer_digest")}
    stored = {key: tensor.bfloat16().float() for key, tensor in tensors.items()} if rounded else tensors
    write_module(root / name, stored, described, counts(1 + list(MODULES).index(name)), CONFIG, dtype)
    return tensors


@pytest.mark.parametrize("name", MODULES)
def test_half_the_bytes_and_the_nearest_values(root, name):
    path = root / name / "module.safetensors"
    numbers = sum(tensor.numel() for tensor in load_file(path).values())
    for dtype, stored_as, bytes_each in (("float32", torch.float32, 4), ("bf16", torch.bfloat16, 2)):
        before = written(root, name, dtype)
        header = int.from_bytes(path.read_bytes()[:8], "little")
        assert path.stat().st_size == 8 + header + bytes_each * numbers
        after = load_file(path)
        assert after.keys() == before.keys()
        assert all(same(after[key], before[key].to(stored_as)) for key in before)
        metadata = json.loads((root / name / "module.json").read_text())
        assert (metadata["dtype"], metadata["digest"]) == (str(stored_as).removeprefix("torch."), digest(after))


def test_it_computes_as_the_module_of_the_same_values_in_float32(root, tmp_path):
    """With the trunk alone, merged, and assembled with a module in float32."""
    results = []
    for number, dtype in enumerate(("bf16", "float32")):
        written(root, "two", dtype, rounded=True)
        place = root / str(number)
        merge.main(merge.Settings(str(root / "trunk"), root / "two", place / "merged"))
        assemble.main(dataclasses.replace(assembling(root), output_dir=place / "assembled"))
        models = [load(root / "two")[1], load(place / "merged")[1], load(place / "assembled")[1]]
        results.append([model.nats(TOKENS) for model in models])
        dtypes = {parameter.dtype for model in models for parameter in model.parameters()}
        assert dtypes == {torch.float32}
    assert same(*results)


def test_only_a_module_that_serves_is_widened(root):
    """Modules in bf16 stay as they are stored until they serve a token; then they compute the same as in float32, head included."""
    for name in MODULES:
        written(root, name, "bf16")
    assemble.main(assembling(root))
    model = load(root / "new" / "assembled")[1]
    shared = {id(parameter) for parameter in model.candidates[0].parameters()}
    own = [[p for p in candidate.parameters() if id(p) not in shared] for candidate in model.candidates]

    def dtypes(e: int) -> set[torch.dtype]:
        return {parameter.dtype for parameter in own[e]}

    model.top_k = 1
    for used, unused in ((1, 2), (2, None)):
        model.router = UniformRouter(torch.eye(3)[used])
        alone = read_model(str(root / "trunk"), root / model.names[used])[0]
        assert torch.allclose(model.nats(TOKENS), alone.nats(TOKENS), rtol=0, atol=1e-6)
        assert dtypes(used) == {torch.float32}
        assert unused is None or dtypes(unused) == {torch.bfloat16}


def test_another_dtype_than_the_metadata_says_is_refused(root):
    written(root, "one", "bf16")
    file, path = root / "one" / "module.json", root / "one" / "module.safetensors"
    for dtype in ("float32", "float64"):
        edit(file, dtype=dtype)
        assert f"is of bfloat16, module.json says {dtype}" in refused(load, root / "one")
    for dtype in ("float16", "int8", "torch.bfloat16", "", 16, ["bfloat16"]):
        edit(file, dtype=dtype)
        assert "must be one of float32, float64, bfloat16" in refused(load, root / "one")
    edit(file, dtype="bfloat16")
    tensors = load_file(path)
    name = sorted(tensors)[-1]
    for other in (torch.float32, torch.float16, torch.float64):
        changed = tensors | {name: tensors[name].to(other)}
        save_file(changed, path)
        edit(file, digest=digest(changed), tensor_digests={})
        message = refused(load, root / "one")
        assert f"{name!r} is of {str(other).removeprefix('torch.')}, module.json says bfloat16" in message
    for values in ([3e38, 3.4e38], [float("nan")]):
        tensors[name].view(-1)[0] = values[-1]
        save_file(tensors, path)
        assert f"{name} holds NaN or Inf" in refused(load, root / "one")


def test_a_module_of_a_version_without_the_field_loads(root):
    expected = load(root / "one")[0]
    edit(root / "one" / "module.json", dtype=None)
    assert same(load(root / "one")[0], expected)


def test_rounding_in_place_is_to_nearest():
    tensors = {"a": torch.randn(5, 7), "b": torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-9), 0.0])}
    expected = {name: tensor.bfloat16().float() for name, tensor in tensors.items()}
    assert expected["b"].tolist() == [1.0, 1 + 2**-6, -1.0, 0.0]
    round_tensors(tensors, None)
    assert not same(tensors, expected)
    round_tensors(tensors, "bf16")
    assert same(tensors, expected)
