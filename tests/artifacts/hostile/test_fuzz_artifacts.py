"""Fuzz tests: a changed artifact is refused by a UserError that names the folder, or loads as it was published.

If it loads, its tensors, configuration and tokenizer are those of the unchanged artifact. No digest covers the rest of
the metadata: a module's name, sources, licence, losses and counts; the share of documents held out; an assembled
model's router, its numbers and its top-k. If the digests were computed again, what loads must have the trunk's shapes
and finite tensors, and must run.
"""

import copy
import json
from contextlib import contextmanager

import pytest
import small_artifacts
import torch
from conftest import FUZZ
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from forge_common.errors import UserError
from forge_common.files.tensors import digest

FILES = {  # what is loaded -> its files that are changed
    "trunk": ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "forge.json"),
    "one": ("module.json", "module.safetensors", "statistics.safetensors"),
    "two": ("module.json", "module.safetensors"),
    "assembled": ("assembled.json", "modules/one/module.json", "modules/two/module.safetensors", "trunk/forge.json"),
}
PLACES = [(kind, name) for kind, names in FILES.items() for name in names] + [("trunk", "statistics.safetensors")]
ADDED = ("model.safetensors.index.json", "special_tokens_map.json", "generation_config.json")


def fuzz(examples: int):
    """The same examples in every run; FORGE_FUZZ=20 tries 20 times as many."""
    quiet = (HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large)
    return settings(max_examples=examples * FUZZ, deadline=None, derandomize=True, suppress_health_check=quiet)


class Artifacts:
    """The folder of small_artifacts.build, and what each artifact in it loads as; a class keeps it out of messages."""

    def __init__(self, folder):
        self.folder = small_artifacts.build(folder)
        self.expected = {kind: small_artifacts.load(folder / kind)[0] for kind in FILES}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory, one_thread):
    return Artifacts(tmp_path_factory.mktemp("artifacts"))


@contextmanager
def replaced(contents):
    """Replaces the contents of files (None: deletes them), and restores them."""
    before = {path: path.read_bytes() if path.exists() else None for path in contents}
    try:
        write(contents)
        yield
    finally:
        write(before)


def write(contents):
    for path, content in contents.items():
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)


def outcome(folder):
    """What a folder loads as, or None if it is refused with a printable message that names the folder."""
    try:
        state, model = small_artifacts.load(folder)
    except UserError as reason:
        message = str(reason)
        assert str(folder.parent) in message and len(message) < 3000, message
        assert all(line.isprintable() for line in message.splitlines()), message
        return None
    nats = model.nats(small_artifacts.TOKENS)
    return state, nats


def is_same_or_refused(artifacts, kind):
    """Nothing that a digest covers may have changed."""
    loaded, expected = outcome(artifacts.folder / kind), artifacts.expected
    if loaded is None:
        return
    covered = {"trunk": 4, "one": 2, "two": 2, "assembled": 3}[kind]
    assert small_artifacts.same(loaded[0][:covered], expected[kind][:covered])
    if kind == "assembled":
        assert loaded[0][4]["modules"] == expected[kind][4]["modules"]
    assert torch.isfinite(loaded[1]).all()


# ---- Bytes ----


@fuzz(100)
@given(place=st.sampled_from(PLACES), content=st.binary(max_size=200) | st.text(max_size=60).map(str.encode))
def test_any_bytes_in_place_of_a_file(artifacts, place, content):
    kind, name = place
    with replaced({artifacts.folder / kind / name: content}):
        is_same_or_refused(artifacts, kind)


@pytest.mark.parametrize(("kind", "name"), PLACES)
def test_a_missing_file(artifacts, kind, name):
    with replaced({artifacts.folder / kind / name: None}):
        is_same_or_refused(artifacts, kind)


def damaged(draw, content: bytes) -> bytes:
    """One change to the bytes, in the first 400 (headers) as often as anywhere."""
    end = draw(st.sampled_from([min(len(content), 400), len(content)]))
    start = draw(st.integers(0, max(end - 1, 0)))
    stop = draw(st.integers(start, min(start + 64, len(content))))
    change = draw(st.sampled_from(["flip", "flip", "cut", "insert", "remove", "repeat", "swap"]))
    if change == "flip":
        bit = draw(st.integers(0, 7))
        return content[:start] + bytes([content[start] ^ 1 << bit]) + content[start + 1 :]
    if change == "cut":
        return content[:start]
    if change == "insert":
        return content[:start] + draw(st.binary(min_size=1, max_size=16)) + content[start:]
    if change == "remove":
        return content[:start] + content[stop:]
    if change == "repeat":
        return content[:stop] + content[start:stop] * draw(st.integers(1, 50)) + content[stop:]
    return content[stop:] + content[:stop]


@fuzz(220)
@given(place=st.sampled_from(PLACES), data=st.data())
def test_damaged_bytes(artifacts, place, data):
    kind, name = place
    path = artifacts.folder / kind / name
    content = path.read_bytes()
    for _ in range(data.draw(st.integers(1, 3))):
        content = damaged(data.draw, content) if content else content
    with replaced({path: content}):
        is_same_or_refused(artifacts, kind)


# ---- JSON ----

NUMBERS = [0, 1, 2, 3, -1, 7, 64, 2**16, 2**20, 2**31, 2**32, 2**63, 10**30, 10**400]
NUMBERS += [0.0, 0.5, -0.5, 1.0, 1e-300, 1e300, float("nan"), float("inf")]
TEXTS = ["", ".", "..", "../one", "/etc/passwd", "one", "two", "trunk", "con", "a\x00b", "a\nb", "\x1b[31m", "\ud800"]
TEXTS += [
    "llama",
    "mixtral",
    "qwen3",
    "expert",
    "ffn",
    "lora+head",
    "ridge",
    "learned",
    "uniform",
    "<eos>",
    "x",
    "é" * 300,
]
SCALARS = st.sampled_from([None, True, False, *NUMBERS, *TEXTS])
KEYS = st.sampled_from(["name", "type", "id", "content", "factor", "x", "", "one", "two", "weight_map", "normalizers"])
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=6
)


def places(content, path=()):
    """The paths of all values in a JSON document; the first is the document."""
    yield path
    inside = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inside:
        if len(path) < 4 and not (isinstance(key, int) and key > 5):
            yield from places(value, (*path, key))


def edited(draw, content):
    """One value replaced, converted to another type, removed or added to."""
    content = copy.deepcopy(content)
    path = draw(st.sampled_from(list(places(content))[1:] or [()]))
    if not path:
        return draw(VALUES)
    inside = content
    for key in path[:-1]:
        inside = inside[key]
    change, last = draw(st.sampled_from(["replace", "replace", "remove", "add", "convert"])), path[-1]
    if change == "replace":
        inside[last] = draw(VALUES)
    elif change == "remove":
        del inside[last]
    elif change == "add" and isinstance(inside, dict):
        inside[draw(KEYS)] = draw(VALUES)
    elif change == "add":
        inside.insert(last, draw(VALUES))
    else:
        value = inside[last]
        inside[last] = draw(
            st.sampled_from([str(value), [value], {"x": value}, bool(value), [value] * 40, repr(value)])
        )
    return content


def written(content) -> bytes:
    return json.dumps(content).encode()


def test_each_field_missing_or_null(artifacts):
    """Each top-level field of each file."""
    for kind, name in JSON_PLACES:
        path = artifacts.folder / kind / name
        content = json.loads(path.read_bytes())
        for key in content:
            for change in ({key: None}, {}):
                with replaced({path: written({k: v for k, v in content.items() if k != key} | change)}):
                    is_same_or_refused(artifacts, kind)


JSON_PLACES = [(kind, name) for kind, name in PLACES if name.endswith(".json")]


@fuzz(250)
@given(place=st.sampled_from(JSON_PLACES), data=st.data())
def test_an_edited_json_file_is_refused_or_changes_nothing(artifacts, place, data):
    kind, name = place
    path = artifacts.folder / kind / name
    content = json.loads(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 2))):
        content = edited(data.draw, content)
    with replaced({path: written(content)}):
        is_same_or_refused(artifacts, kind)


def runs_or_is_refused(artifacts, kind):
    """The tensors are finite, and the model runs."""
    loaded = outcome(artifacts.folder / kind)
    if loaded is not None:
        assert all(torch.isfinite(tensor).all() for tensor in loaded[0][0].values())
        assert loaded[1].shape == (1, small_artifacts.TOKENS.shape[1] - 1)
    return loaded


@fuzz(250)
@given(
    name=st.sampled_from(["config.json", "config.json", "tokenizer.json", "tokenizer_config.json", *ADDED]),
    data=st.data(),
)
def test_a_trunk_without_digests(artifacts, name, data):
    """Without forge.json there are no digests: it is a Transformers checkpoint."""
    folder = artifacts.folder / "trunk"
    path, old = folder / name, {}
    if name == "model.safetensors.index.json":
        names = list(load_file(folder / "model.safetensors"))
        old = {"weight_map": dict.fromkeys(names, "model.safetensors"), "metadata": {}}
    content = edited(data.draw, json.loads(path.read_bytes()) if path.exists() else old or {"eos_token": "<eos>"})
    with replaced({path: written(content), folder / "forge.json": None, folder / "statistics.safetensors": None}):
        loaded = runs_or_is_refused(artifacts, "trunk")
    if loaded is not None and name == "config.json" and content.get("model_type") == "llama":
        sizes = ("hidden_size", "num_attention_heads", "rms_norm_eps", "num_hidden_layers", "vocab_size")
        assert all(loaded[0][2][key] == content[key] for key in sizes)


# ---- Tensors ----

DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64)


def other_tensors(draw, tensors):
    """One tensor removed, added, renamed, or with another dtype, shape or value."""
    tensors = dict(tensors)
    name = draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[name]
    change = draw(
        st.sampled_from(["remove", "add", "rename", "dtype", "shape", "value", "empty", "scalar", "transposed"])
    )
    if change in ("remove", "rename"):
        del tensors[name]
    if change == "rename":
        tensors[
            draw(st.sampled_from([name.upper(), f"{name}.x", "", "a\nb", "../x", "model.layers.9.mlp.up_proj.weight"]))
        ] = tensor
    elif change == "add":
        tensors[f"{name}.more"] = torch.zeros(draw(st.sampled_from([(), (0,), (3, 3)])))
    elif change == "dtype":
        tensors[name] = tensor.to(draw(st.sampled_from(DTYPES)))
    elif change == "shape":
        tensors[name] = torch.zeros(
            draw(st.sampled_from([(1,), (0, 8), (8, 0), (2, 2), (1, 1, 1)])), dtype=tensor.dtype
        )
    elif change == "value":
        value = draw(st.sampled_from([float("nan"), float("inf"), 0.0, 3.0, 200.0, 1e30]))
        tensors[name] = tensor.clone()
        tensors[name].view(-1)[0] = value if tensor.is_floating_point() else min(value if value == value else 0, 255)
    elif change == "empty":
        tensors = {}
    elif change == "scalar":
        tensors[name] = tensor.reshape(-1)[0].clone()
    elif change == "transposed":
        tensors[name] = tensor.T.contiguous() if tensor.ndim == 2 else tensor[: len(tensor) // 2].clone()
    return tensors


def saved(tensors, folder) -> bytes:
    path = folder / "temporary.bin"
    save_file(tensors, path)
    content = path.read_bytes()
    path.unlink()
    return content


@fuzz(120)
@given(kind=st.sampled_from(["one", "two", "trunk"]), counted=st.booleans(), data=st.data())
def test_changed_tensors_with_new_digests(artifacts, kind, counted, data):
    folder, expected = artifacts.folder, artifacts.expected
    which = "statistics" if counted else "model" if kind == "trunk" else "module"
    metadata_file = folder / kind / ("forge.json" if kind == "trunk" else "module.json")
    path = folder / kind / f"{which}.safetensors"
    tensors = other_tensors(data.draw, load_file(path))
    metadata = json.loads(metadata_file.read_bytes())
    metadata["statistics_digest" if counted else "digest"] = digest(tensors)
    del metadata["tensor_digests"]
    metadata.pop("shapes", None)
    with replaced({path: saved(tensors, folder), metadata_file: written(metadata)}):
        loaded = runs_or_is_refused(artifacts, kind)
    if loaded is not None:
        shapes = [{name: tensor.shape for name, tensor in part.items()} for part in (loaded[0][0], loaded[0][1])]
        expected = [{name: tensor.shape for name, tensor in part.items()} for part in expected[kind][:2]]
        assert shapes[0] == expected[0] and shapes[1].items() <= expected[1].items()
