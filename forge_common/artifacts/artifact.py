"""Writes and reads trunks and modules: folders of safetensors and JSON with their metadata. What is read is verified.

trunk/      config.json, model.safetensors, tokenizer.json, tokenizer_config.json, forge.json, statistics.safetensors
module/     module.safetensors, module.json, statistics.safetensors
assembled/  assembled.json, trunk/, modules/NAME/ ...
Each has a README.md (the model card). Pickles are neither written nor opened.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..data.tokenizer import Tokenizer, load_tokenizer
from ..errors import UserError
from ..files.atomic import publish, read_json, write_json
from ..files.hub import local_folder
from ..files.tensors import (
    PICKLES,
    Tensors,
    digest,
    digests,
    drop_pages,
    dtype_name,
    read_tensors,
    verify,
    weight_files,
)
from ..files.untrusted import PLAIN, is_plain, naming, quoted, without_links
from ..model.config import ModelConfig
from ..model.modules import put_in
from ..model.trunk import Trunk
from ..routing.statistics import BIGRAM_BUCKETS, moment_shapes
from .card import model_card
from .metadata import FORMAT_VERSION, module_arguments, read_metadata

STATISTICS = (torch.uint8, torch.float16)  # the dtypes of codes and of moments
NO_MODULES = {  # a file of a folder without module.json -> what the folder is
    "config.json": "a trunk, not a module",
    "assembled.json": "an assembled model, not a module",
    "settings.json": "the folder of a run that has published no module",
}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bf16": torch.bfloat16}


# ---- Write ----


def write_trunk(
    folder: Path,
    tensors: Tensors,
    config: ModelConfig,
    tokenizer: Tokenizer,
    metadata: dict[str, Any],
    statistics: Tensors | None = None,
) -> str:
    """Publishes a trunk as a Transformers checkpoint, with the statistics of its text; returns its digest.

    The folder has its name only after it was read back and verified. UserError where that fails; an older trunk with
    that name then stays.
    """
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    trunk_digest = digest(stored)
    metadata = {
        "format_version": FORMAT_VERSION,
        "digest": trunk_digest,
        "tokenizer_digest": tokenizer.digest,
        **metadata,
        "config_digest": _config_digest(_with_ids(config, tokenizer)),
        "chat_template_digest": tokenizer.chat.digest if tokenizer.chat else None,
        "tensor_digests": digests(stored | (statistics or {})),
    }
    if statistics:
        metadata["statistics_digest"] = digest(statistics)

    def write(temp_dir: Path) -> None:
        if statistics:
            save_file(statistics, temp_dir / "statistics.safetensors")
        save_file(stored, temp_dir / "model.safetensors", metadata={"format": "pt"})
        write_json(temp_dir / "config.json", config.to_hf())
        tokenizer.save(temp_dir)
        write_json(temp_dir / "forge.json", metadata)
        (temp_dir / "README.md").write_text(model_card("trunk", metadata), encoding="utf-8")

    def read_back(temp_dir: Path) -> None:
        trunk, _, trunk_metadata = read_trunk(str(temp_dir))
        read_statistics(temp_dir, trunk_metadata, trunk.config)

    publish(folder, write, read_back)
    return trunk_digest


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


# ---- Read a trunk ----


def read_trunk(
    place: str, eos_token: str | None = None, dtype: str = "float32"
) -> tuple[Trunk, Tokenizer, dict[str, Any]]:
    """A trunk on the CPU, its tokenizer and its metadata.

    Weights, configuration and tokenizer are verified against forge.json. A checkpoint without that file was not made
    here: its metadata are only the digests, which are computed. dtype: a key of DTYPES, for the weights in memory;
    weights that are stored in it stay mapped to the file. With bf16 only matrices have it, so that the norms and the
    residual stream are in float32.
    """
    folder = without_links(local_folder(place))
    weights = weight_files(folder)
    raw = read_json(folder / "config.json")
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"{folder} has no tokenizer.json. AutoTokenizer.from_pretrained(...).save_pretrained(...) writes one."
        )
    tokenizer = load_tokenizer(folder, eos_token)
    config = ModelConfig.from_hf(raw | {"eos_token_id": tokenizer.eos_token_id}, str(folder / "config.json"))
    config = _with_ids(config, tokenizer)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}. "
            "They are not of the same checkpoint, or tokens were added and the embeddings not resized."
        )
    tensors = _read_weights(weights, config)
    metadata = read_metadata(folder / "forge.json") if (folder / "forge.json").exists() else {}
    actual = {"config_digest": _config_digest(config), "tokenizer_digest": tokenizer.digest}
    if tokenizer.chat or "chat_template_digest" in metadata:
        actual["chat_template_digest"] = tokenizer.chat.digest if tokenizer.chat else "none"
    for name, value in actual.items():
        if metadata.get(name, value) != value:
            raise UserError(
                f"{folder}: the {name} is {value}, but forge.json says {metadata[name]}. The files were changed or damaged "
                "since they were published. Fetch or export the trunk again."
            )
    if metadata:
        verify(folder, tensors, metadata, "digest", "forge.json")
    else:
        actual["digest"] = digest(tensors)
    return _load_exactly(config, tensors, folder, DTYPES[dtype]), tokenizer, metadata | actual


def _with_ids(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The configuration with PAD and EOS of the tokenizer: the loss must ignore the id that fills up the windows."""
    return dataclasses.replace(config, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)


def _config_digest(config: ModelConfig) -> str:
    """SHA-256 over the fields that the computation uses, not over the rest of config.json."""
    optional = ("family", "sliding_window")  # left out at their defaults, as they are in the digests of older trunks
    fields = {name: value for name, value in dataclasses.asdict(config).items() if value or name not in optional}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _read_weights(files: list[Path], config: ModelConfig) -> Tensors:
    """The tensors of all the files, without those that follow from the configuration or from other tensors."""
    tensors: Tensors = {}
    for path in files:
        for name, tensor in read_tensors(path).items():
            if name in tensors:
                raise UserError(f"{path}: {name} is in another file too. Fetch the checkpoint again.")
            tensors[name] = tensor
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    # Checkpoints of old versions of Transformers have inv_freq, which follows from rope_theta.
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}


def _load_exactly(config: ModelConfig, tensors: Tensors, folder: Path, dtype: torch.dtype) -> Trunk:
    """The trunk with these tensors, whose names and shapes must be those of the configuration."""
    experts = max(1, config.num_local_experts)
    if config.num_hidden_layers * experts > len(tensors):  # refused here, before so many objects are made
        raise UserError(
            f"{folder}: config.json has {config.num_hidden_layers} layers of {experts} feed-forwards, "
            f"the files have {len(tensors)} tensors in all. Fetch the checkpoint again."
        )
    with torch.device("meta"):
        trunk = Trunk(config)
    expected = {name: tuple(parameter.shape) for name, parameter in trunk.named_parameters()}
    actual = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != actual:
        wrong = sorted(name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name))
        name = wrong[0]
        raise UserError(
            f"{folder}: {len(wrong)} tensors do not fit config.json, first {name}: {actual.get(name)} in the file, "
            f"{expected.get(name)} by the config. Fetch the checkpoint again."
        )
    wide = torch.promote_types(dtype, torch.float32)
    converted = {}
    for name, tensor in tensors.items():
        if tensor.ndim == 1:
            converted[name] = tensor.to(wide, copy=True)  # a vector of the file would keep all of the file mapped
            continue
        converted[name] = tensor.to(dtype)
        if tensor.dtype != dtype:
            drop_pages({name: tensor})  # verifying has read all of the file into memory
    trunk.load_state_dict(converted, strict=True, assign=True)
    return trunk


# ---- Read a module, statistics, or a trunk with a module ----


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
                f"{folder}: the module was made for another {name.split('_')[0]}: its {name} is {metadata.get(name)}, the "
                f"trunk has {trunk_metadata[trunk_key]}. Use the trunk that the module was trained on."
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


def replaced_tensors(place: str, config: ModelConfig, module_names: list[str], metadata: dict[str, Any]) -> Tensors:
    """Reads the trunk's tensors that the tensors `module_names` have replaced in memory from the trunk's files.

    UserError where the trunk has changed since `metadata`, the result of read_trunk. Where nothing is replaced, only
    the digest in forge.json is compared: reading the weights takes as much memory as the trunk.
    """
    with torch.device("meta"):
        own = {name for name, _ in Trunk(config).named_parameters() if name.startswith("model.")}
    folder = without_links(local_folder(place))
    replaced = [name for name in module_names if name in own]
    tensors: Tensors = {}
    if replaced:
        tensors = _read_weights(weight_files(folder), config)
        actual = digest(tensors)
    elif (folder / "forge.json").exists():
        actual = read_metadata(folder / "forge.json")["digest"]
    else:
        actual = metadata["digest"]
    if actual != metadata["digest"]:
        raise UserError(
            f"{folder}: the trunk has changed since the start of the run: its digest is {actual}, it was {metadata['digest']}. "
            "Nothing was published. Restore the trunk, and run the same command again to publish from the last checkpoint."
        )
    return {name: tensors[name] for name in replaced}


def read_statistics(folder: Path, metadata: dict[str, Any], config: ModelConfig) -> Tensors | None:
    """The verified statistics in the folder of a trunk or a module; None if it has none. config: of the trunk."""
    path = folder / "statistics.safetensors"
    if "statistics_digest" not in metadata and not path.exists():
        return None
    statistics = read_tensors(path, STATISTICS)
    verify(path, statistics, metadata, "statistics_digest", "its metadata")
    for name, size in (("unigrams", config.vocab_size), ("bigrams", BIGRAM_BUCKETS)):
        codes = statistics.get(name)
        if codes is None or codes.shape != (size,) or codes.dtype != torch.uint8:
            raise UserError(
                f"{path}: {name} are not {size} codes of 8 bits. Make the artifact again with this version."
            )
    moments = {name: (t.dtype, tuple(t.shape)) for name, t in statistics.items() if name not in ("unigrams", "bigrams")}
    shapes = moment_shapes(config.num_hidden_layers, config.hidden_size)
    if moments and moments != {name: (torch.float16, shape) for name, shape in shapes.items()}:
        raise UserError(
            f"{path} has the moments {quoted(moments)}; those of this trunk have the shapes {shapes} in float16. "
            "Make the artifact again with this version."
        )
    return statistics


def read_model(place: str, module: Path | None) -> tuple[Trunk, Tokenizer, dict[str, Any], dict[str, Any] | None]:
    """A trunk, or a trunk with one module in it: model, tokenizer, metadata of the trunk, metadata of the module."""
    trunk, tokenizer, trunk_metadata = read_trunk(place)
    if module is None:
        return trunk, tokenizer, trunk_metadata, None
    tensors, metadata = read_module(module, trunk_metadata)
    with naming(module):
        put_in(trunk, tensors, **module_arguments(metadata))
    return trunk, tokenizer, trunk_metadata, metadata
