"""Small artifacts for tests of untrusted ones: a trunk, two modules and the assembled model, written in milliseconds."""

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from forge_common import assemble
from forge_common.artifacts import assembled
from forge_common.artifacts.metadata import module_arguments
from forge_common.artifacts.module_folder import read_model, write_module
from forge_common.artifacts.statistics_file import read_statistics
from forge_common.artifacts.trunk_folder import read_trunk, write_trunk
from forge_common.data.tokenizer import byte_tokenizer
from forge_common.errors import UserError
from forge_common.model.config import ModelConfig
from forge_common.model.modules import plug_in
from forge_common.model.trunk import Trunk
from forge_common.routing import statistics

CONFIG = ModelConfig(
    vocab_size=258,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
    rope_scaling={
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
)
MODULES = {"one": {"kind": "narrow+head", "width": 5, "rank": 0}, "two": {"kind": "lora", "width": 0, "rank": 3}}
DTYPES = {"one": "float32", "two": "bf16"}  # that the modules are stored in
ONE = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'  # a tensor in a safetensors header
TOKENS = torch.tensor([[1, *range(70, 90), 1, *range(100, 110)]])


def counts(seed: int, moments: bool = True) -> dict[str, torch.Tensor]:
    """Random statistics."""
    draw = torch.Generator().manual_seed(seed)
    sizes = {"unigrams": CONFIG.vocab_size, "bigrams": statistics.BIGRAM_BUCKETS}
    tensors = {name: torch.randint(0, 90, (size,), dtype=torch.uint8, generator=draw) for name, size in sizes.items()}
    if moments:
        x = torch.randn(2, 40, 8, generator=draw)
        tensors |= {"second": (x.transpose(1, 2) @ x / 40).half(), "first": x.mean(1).half()}
    return tensors


def build(folder: Path, router: str = "context") -> Path:
    """folder/trunk, folder/one, folder/two, folder/assembled."""
    torch.manual_seed(0)
    trunk, tokenizer = Trunk(CONFIG), byte_tokenizer()
    write_trunk(
        folder / "trunk", trunk.state_dict(), CONFIG, tokenizer, {"val_fraction": 0.1}, counts(0, moments=False)
    )
    _, _, trunk_metadata = read_trunk(str(folder / "trunk"))
    digests = {"trunk_digest": trunk_metadata["digest"], "tokenizer_digest": trunk_metadata["tokenizer_digest"]}
    for number, (name, sizes) in enumerate(MODULES.items()):
        plain = Trunk(CONFIG)
        names = plug_in(plain, sizes["kind"], [1], width=sizes["width"], rank=sizes["rank"])
        tensors = {key: torch.randn_like(plain.state_dict()[key]) * 0.1 for key in names}
        metadata = {"name": name, "layers": [1], "val_fraction": 0.1, "licence": "mit", "steps": 3, "tokens_seen": 9}
        write_module(folder / name, tensors, metadata | sizes | digests, counts(1 + number), CONFIG, DTYPES[name])
    modules = tuple(folder / name for name in MODULES)
    assemble.main(assemble.Settings(str(folder / "trunk"), modules, folder / "assembled", router=router))
    return folder


def load(folder: Path) -> Any:
    """(what a folder of `build` holds, the model), by the functions that evaluate and generate use."""
    if (folder / "assembled.json").exists() or (folder / "trunk").exists():
        model, tokenizer, metadata = assembled.read_assembled(str(folder))
        router = {name: value for name, value in vars(model.router).items() if name != "tuning"}
        described = {key: metadata[key] for key in ("modules", "router", "top_k", "tuning")}
        return [model.state_dict(), dataclasses.asdict(model.config), tokenizer.digest, router, described], model
    if (folder / "module.json").exists() or (folder / "module.safetensors").exists():
        model, _, _, metadata = read_model(str(folder.parent / "trunk"), folder)
        assert metadata is not None
        counts_read = read_statistics(folder, metadata, model.config)
        return [model.state_dict(), counts_read, module_arguments(metadata), metadata["name"]], model
    trunk, tokenizer, metadata = read_trunk(str(folder))
    counts_read = read_statistics(folder, metadata, trunk.config)
    return [trunk.state_dict(), counts_read, dataclasses.asdict(trunk.config), tokenizer.digest], trunk


def same(one: Any, other: Any) -> bool:
    """Equal to the bit, through lists and dictionaries of tensors and arrays."""
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def refused(call, *arguments, **named) -> str:
    """The message of the UserError that the call must raise."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **named)
    return str(caught.value)


def assembling(folder: Path, *names: str, **how) -> assemble.Settings:
    """Settings that assemble `folder`/trunk and its modules to `folder`/new/assembled."""
    modules = tuple(folder / name for name in names or MODULES)
    return assemble.Settings(str(folder / "trunk"), modules, folder / "new" / "assembled", **how)


def edit(path: Path, **changes) -> None:
    """Changes fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def header(text: bytes, claimed: int | None = None, body: bytes = b"") -> bytes:
    """The bytes of a safetensors file, valid or not."""
    return struct.pack("<Q", len(text) if claimed is None else claimed) + text + body


def tokenizer_with(*path, value):
    """The JSON of the byte tokenizer with another value at a path."""
    content = json.loads(byte_tokenizer().backend.to_str())
    inside = content
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    return json.dumps(content)
