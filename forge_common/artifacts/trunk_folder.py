"""The folder of a trunk: how it is written, and how it is read and verified.

trunk/  config.json, model.safetensors, tokenizer.json, tokenizer_config.json, forge.json (the metadata),
        statistics.safetensors, README.md (the model card)
A Transformers checkpoint by others has no forge.json. Pickles are neither written nor opened.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..data.tokenizer import Tokenizer
from ..data.tokenizer_files import load_tokenizer
from ..errors import UserError
from ..files.atomic import publish, read_json, write_json
from ..files.hub import local_folder
from ..files.tensors import Tensors, digest, digests, drop_pages, read_tensors, verify, weight_files
from ..files.untrusted import without_links
from ..model.config import ModelConfig
from ..model.trunk import Trunk
from .card import model_card
from .metadata import FORMAT_VERSION, read_metadata
from .statistics_file import read_statistics

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bf16": torch.bfloat16}


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
                f"{folder}: the {name} is {value}, but forge.json says {metadata[name]}. The files were changed or "
                "damaged since they were published. Fetch or export the trunk again."
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


def replaced_tensors(place: str, config: ModelConfig, module_names: list[str], metadata: dict[str, Any]) -> Tensors:
    """Reads the trunk's tensors that the tensors `module_names` have replaced in memory from the trunk's files.

    UserError where the trunk has changed since `metadata`, the result of read_trunk. Where nothing is replaced, only
    the digest in forge.json is compared: reading the weights takes as much memory as the trunk.
    """
    with torch.device("meta"):
        trunk_names = {name for name, _ in Trunk(config).named_parameters() if name.startswith("model.")}
    folder = without_links(local_folder(place))
    replaced = [name for name in module_names if name in trunk_names]
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
            f"{folder}: the trunk has changed since the start of the run: its digest is {actual}, it was "
            f"{metadata['digest']}. Nothing was published. Restore the trunk, and run the same command again to "
            "publish from the last checkpoint."
        )
    return {name: tensors[name] for name in replaced}
