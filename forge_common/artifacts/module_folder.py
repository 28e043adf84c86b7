"""The folder of a module: how it is written, and how it is read, verified and put into its trunk.

module/  module.safetensors, module.json (the metadata), statistics.safetensors, README.md (the model card)
Pickles are neither written nor opened.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..data.tokenizer import Tokenizer
from ..errors import UserError
from ..files.atomic import publish, write_json
from ..files.hub import local_folder
from ..files.tensors import PICKLES, Tensors, digest, digests, dtype_name, read_tensors, verify
from ..files.untrusted import PLAIN, is_plain, naming, quoted
from ..model.config import ModelConfig
from ..model.modules import put_in
from ..model.trunk import Trunk
from .card import model_card
from .metadata import FORMAT_VERSION, module_arguments, read_metadata
from .statistics_file import read_statistics
from .trunk_folder import DTYPES, read_trunk

NO_MODULES = {  # a file of a folder without module.json -> what the folder is
    "config.json": "a trunk, not a module",
    "assembled.json": "an assembled model, not a module",
    "settings.json": "the folder of a run that has published no module",
}


def write_module(
    folder: Path,
    tensors: Tensors,
    metadata: dict[str, Any],
    statistics: Tensors,
    config: ModelConfig,
    dtype: str = "float32",
) -> str:
    """Publishes a module: its tensors, its metadata, the statistics for routers; returns its digest.

    config: of the trunk. dtype: a key of DTYPES, to which the tensors are rounded. The folder has its name only after
    it was read back and verified, as in write_trunk.
    """
    if not is_plain(metadata["name"]):
        raise UserError(f"a module cannot be called {quoted(metadata['name'])}. Its name must be {PLAIN[0]}.")
    stored = {name: tensor.detach().to("cpu", DTYPES[dtype]).contiguous() for name, tensor in tensors.items()}
    module_digest = digest(stored)
    metadata = {
        "format_version": FORMAT_VERSION,
        "digest": module_digest,
        "statistics_digest": digest(statistics),
        **metadata,
        "dtype": dtype_name(DTYPES[dtype]),
        "shapes": {name: list(tensor.shape) for name, tensor in sorted(stored.items())},
        "tensor_digests": digests(stored | statistics),
    }

    def write(temp_dir: Path) -> None:
        save_file(statistics, temp_dir / "statistics.safetensors")
        save_file(stored, temp_dir / "module.safetensors", metadata={"format": "pt"})
        write_json(temp_dir / "module.json", metadata)
        (temp_dir / "README.md").write_text(model_card(f"module {metadata['name']}", metadata), encoding="utf-8")

    def read_back(temp_dir: Path) -> None:
        trunk_metadata = {"digest": metadata["trunk_digest"], "tokenizer_digest": metadata["tokenizer_digest"]}
        tensors, module_metadata = read_module(temp_dir, trunk_metadata)
        with torch.device("meta"):  # to compare names and shapes; the trunk's weights are not read again
            put_in(Trunk(config), tensors, **module_arguments(module_metadata))
        read_statistics(temp_dir, module_metadata, config)

    publish(folder, write, read_back)
    return module_digest


def read_module_metadata(folder: Path) -> dict[str, Any]:
    """module.json of a module: its folder, the output directory that holds it, or a hub id."""
    if folder.suffix in PICKLES:
        raise UserError(
            f"{folder} is not a module's folder. Pickles are not opened. Name the folder with module.json in it."
        )
    file = local_folder(folder, "module") / "module.json"
    for name, kind in NO_MODULES.items():
        if not file.exists() and file.with_name(name).exists():
            raise UserError(f"{folder} is {kind}. Name the folder of a module.")
    return read_metadata(file)


def read_module(folder: Path, trunk_metadata: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """A module's tensors as they are stored, and its metadata, verified against its digests and against the trunk's."""
    metadata = read_module_metadata(folder)
    folder = local_folder(folder, "module")
    for name, trunk_key in (("trunk_digest", "digest"), ("tokenizer_digest", "tokenizer_digest")):
        if metadata.get(name) != trunk_metadata[trunk_key]:
            raise UserError(
                f"{folder}: the module was made for another {name.split('_')[0]}: its {name} is {metadata.get(name)}, "
                f"the trunk has {trunk_metadata[trunk_key]}. Use the trunk that the module was trained on."
            )
    path = folder / "module.safetensors"
    tensors = read_tensors(path)
    verify(path, tensors, metadata, "digest", "module.json")
    actual = {name: list(tensor.shape) for name, tensor in tensors.items()}
    expected = metadata.get("shapes", actual)
    for name in sorted(actual.keys() | expected.keys()):
        if actual.get(name) != expected.get(name):
            raise UserError(
                f"{path}: {quoted(name)} has the shape {actual.get(name)}, module.json says {expected.get(name)}. "
                "Fetch the module again."
            )
    for name, tensor in tensors.items():
        stored = dtype_name(tensor.dtype)
        if metadata.get("dtype", stored) != stored:  # modules of earlier versions have no dtype
            raise UserError(
                f"{path}: {quoted(name)} is of {stored}, module.json says {metadata['dtype']}. Fetch the module again."
            )
    return tensors, metadata


def read_model(place: str, module: Path | None) -> tuple[Trunk, Tokenizer, dict[str, Any], dict[str, Any] | None]:
    """A trunk, or a trunk with one module in it: model, tokenizer, metadata of the trunk, metadata of the module."""
    trunk, tokenizer, trunk_metadata = read_trunk(place)
    if module is None:
        return trunk, tokenizer, trunk_metadata, None
    tensors, metadata = read_module(module, trunk_metadata)
    with naming(module):
        put_in(trunk, tensors, **module_arguments(metadata))
    return trunk, tokenizer, trunk_metadata, metadata
