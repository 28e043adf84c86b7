"""What a run gives to others: folders of safetensors and JSON that carry their facts and are verified when read.

trunk/      config.json, model.safetensors, tokenizer.json, tokenizer_config.json, forge.json, statistics.safetensors
module/     module.safetensors, module.json, statistics.safetensors
assembled/  assembled.json, trunk/, modules/NAME/ ...
A README.md (the card) stands in each. No pickle is written, and none is opened.
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
from ..files.tensors import PICKLES, Tensors, digest, digests, read_tensors, verify, weight_files
from ..files.untrusted import PLAIN, closed, is_plain, naming, shown
from ..model.config import ModelConfig
from ..model.modules import put_in
from ..model.trunk import Trunk
from ..routing.statistics import BIGRAM_BUCKETS, moment_shapes
from .card import model_card
from .metadata import FORMAT_VERSION, plug, read_passport

TRUNK_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
TRUNK_FILES += ("special_tokens_map.json", "forge.json", "statistics.safetensors", "README.md")
MODULE_FILES = ("module.json", "module.safetensors", "statistics.safetensors", "README.md")


def write_trunk(
    folder: Path,
    tensors: Tensors,
    config: ModelConfig,
    tokenizer: Tokenizer,
    facts: dict[str, Any],
    statistics: Tensors | None = None,
) -> str:
    """Publishes a trunk as a Transformers checkpoint, with the statistics of its text; returns its digest."""
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    own = digest(stored)
    facts = {"format_version": FORMAT_VERSION, "digest": own, "tokenizer_digest": tokenizer.digest, **facts}
    facts["config_digest"] = _config_digest(_with_ids(config, tokenizer))
    facts["tensor_digests"] = digests(stored | (statistics or {}))
    if statistics:
        facts["statistics_digest"] = digest(statistics)

    def write(aside: Path) -> None:
        if statistics:
            save_file(statistics, aside / "statistics.safetensors")
        save_file(stored, aside / "model.safetensors", metadata={"format": "pt"})
        write_json(aside / "config.json", config.to_hf())
        tokenizer.save(aside)
        write_json(aside / "forge.json", facts)
        (aside / "README.md").write_text(model_card("trunk", facts), encoding="utf-8")

    publish(folder, write)
    return own


def write_module(folder: Path, tensors: Tensors, facts: dict[str, Any], statistics: Tensors) -> str:
    """Publishes a module: its tensors, its passport `module.json`, the router's statistics; returns its digest."""
    if not is_plain(facts["name"]):
        raise UserError(f"a module cannot be called {shown(facts['name'])}; it needs {PLAIN[0]}")
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    own = digest(stored)
    shapes = {name: list(tensor.shape) for name, tensor in sorted(stored.items())}
    facts = {"format_version": FORMAT_VERSION, "digest": own, "statistics_digest": digest(statistics), **facts}
    facts |= {"shapes": shapes, "tensor_digests": digests(stored | statistics)}

    def write(aside: Path) -> None:
        save_file(statistics, aside / "statistics.safetensors")
        save_file(stored, aside / "module.safetensors", metadata={"format": "pt"})
        write_json(aside / "module.json", facts)
        (aside / "README.md").write_text(model_card(f"module {facts['name']}", facts), encoding="utf-8")

    publish(folder, write)
    return own


def local_folder(place: str) -> Path:
    """A folder on this machine for a path or a hub id; a hub id is fetched (safetensors, JSON and tokenizer only)."""
    folder = Path(place)
    if folder.is_dir():
        return folder
    if folder.exists() or folder.is_absolute() or place.count("/") != 1 or place.startswith("."):
        raise UserError(f"{place} is not a folder. Name the folder of a trunk, or a hub id such as org/name.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(place, allow_patterns=["*.json", "*.safetensors", "tokenizer.model"]))
    except Exception as reason:  # noqa: BLE001 (the hub's client raises a dozen kinds, all the same to the user)
        first = str(reason).splitlines()[0]
        raise UserError(f"{place} is no folder here and cannot be fetched from the hub ({first}).") from None


def read_trunk(place: str, eos_token: str | None = None) -> tuple[Trunk, Tokenizer, dict[str, Any]]:
    """A trunk in float32 on the CPU, its tokenizer, and its facts (digest, data, val_fraction where known).

    A folder with a forge.json is verified against it: weights, configuration, tokenizer. Another Transformers checkpoint
    is taken as it is, and its digest computed.
    """
    folder = closed(local_folder(place))
    weights = weight_files(folder)
    raw = read_json(folder / "config.json")
    tokenizer = load_tokenizer(folder, eos_token)
    config = ModelConfig.from_hf(raw | {"eos_token_id": tokenizer.eos_token_id}, str(folder / "config.json"))
    config = _with_ids(config, tokenizer)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}. "
            "They are not of one checkpoint: fetch it again."
        )
    tensors = _read_weights(weights, config)
    facts = read_passport(folder / "forge.json") if (folder / "forge.json").exists() else {}
    own = {"config_digest": _config_digest(config), "tokenizer_digest": tokenizer.digest}
    for name, found in own.items():
        if facts.get(name, found) != found:
            raise UserError(
                f"{folder}: the {name} is {found}, but forge.json says {facts[name]}. The files were changed or damaged "
                "since they were published: fetch or export the trunk again."
            )
    own["digest"] = facts.get("digest") or digest(tensors)
    if facts:
        verify(folder, tensors, facts["digest"], facts.get("tensor_digests", {}), "forge.json")
    return _load_exactly(config, tensors, folder), tokenizer, facts | own


def _with_ids(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """PAD and EOS as the tokenizer has them: the loss must ignore the id that the data is filled up with."""
    return dataclasses.replace(config, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)


def _config_digest(config: ModelConfig) -> str:
    """SHA-256 over what is computed with; what else stands in a config.json plays no part."""
    return hashlib.sha256(json.dumps(dataclasses.asdict(config), sort_keys=True).encode()).hexdigest()


def _read_weights(files: list[Path], config: ModelConfig) -> Tensors:
    """The tensors of all the files, without what follows from others."""
    tensors: Tensors = {}
    for path in files:
        for name, tensor in read_tensors(path).items():
            if name in tensors:
                raise UserError(f"{path}: {name} stands in another file as well. Fetch the checkpoint again.")
            tensors[name] = tensor
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    for name in [name for name in tensors if name.endswith("rotary_emb.inv_freq")]:
        del tensors[name]  # old checkpoints hold what follows from rope_theta
    return tensors


def _load_exactly(config: ModelConfig, tensors: Tensors, folder: Path) -> Trunk:
    parts = config.num_hidden_layers * max(1, config.num_local_experts)
    if parts > len(tensors):  # before so many are made
        raise UserError(
            f"{folder}: config.json speaks of {config.num_hidden_layers} layers of {max(1, config.num_local_experts)} "
            f"feed-forwards, the files hold {len(tensors)} tensors in all. Fetch the checkpoint again."
        )
    with torch.device("meta"):
        trunk = Trunk(config)
    expected = {name: tuple(parameter.shape) for name, parameter in trunk.named_parameters()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != found:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        name = wrong[0]
        raise UserError(
            f"{folder}: {len(wrong)} tensors do not fit config.json, first {name}: {found.get(name)} in the file, "
            f"{expected.get(name)} by the config. Fetch the checkpoint again."
        )
    widened = {name: tensor.to(torch.float32) for name, tensor in tensors.items()}
    trunk.load_state_dict(widened, strict=True, assign=True)
    return trunk


def read_module_metadata(folder: Path) -> dict[str, Any]:
    """module.json of a module's folder."""
    if not folder.is_dir():
        hint = " Pickles are not opened." if folder.suffix in PICKLES else ""
        raise UserError(f"{folder} is not a module's folder.{hint} Name the folder with module.json in it.")
    return read_passport(folder / "module.json")


def read_module(folder: Path, trunk_facts: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """A module's tensors and passport, verified against its own digest and against the trunk's."""
    facts = read_module_metadata(folder)
    for name, ours in (("trunk_digest", "digest"), ("tokenizer_digest", "tokenizer_digest")):
        if facts.get(name) != trunk_facts[ours]:
            raise UserError(
                f"{folder}: the module was made for another {name.split('_')[0]}: its {name} is {facts.get(name)}, here it "
                f"is {trunk_facts[ours]}. Use the trunk that the module names."
            )
    path = folder / "module.safetensors"
    tensors = read_tensors(path)
    verify(path, tensors, facts["digest"], facts.get("tensor_digests", {}), "module.json")
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    stated = facts.get("shapes", shapes)
    for name in sorted(shapes.keys() | stated.keys()):
        if shapes.get(name) != stated.get(name):
            raise UserError(
                f"{path}: {shown(name)} has the shape {shapes.get(name)}, module.json says {stated.get(name)}. "
                "Fetch the module again."
            )
    return tensors, facts


def read_statistics(folder: Path, facts: dict[str, Any], config: ModelConfig) -> Tensors | None:
    """The router's statistics beside a trunk or a module, verified; None where none were published. config: the trunk's."""
    path = folder / "statistics.safetensors"
    if "statistics_digest" not in facts and not path.exists():
        return None
    statistics = read_tensors(path, (torch.uint8, torch.float16))
    verify(path, statistics, facts.get("statistics_digest"), facts.get("tensor_digests", {}), "the passport")
    for name, size in (("unigrams", config.vocab_size), ("bigrams", BIGRAM_BUCKETS)):
        found = statistics.get(name)
        if found is None or found.shape != (size,) or found.dtype != torch.uint8:
            raise UserError(
                f"{path}: {name} are not {size} codes of 8 bits. Make the artifact again with this version."
            )
    moments = {name: (t.dtype, tuple(t.shape)) for name, t in statistics.items() if name not in ("unigrams", "bigrams")}
    shapes = moment_shapes(config.num_hidden_layers, config.hidden_size)
    if moments and moments != {name: (torch.float16, shape) for name, shape in shapes.items()}:
        raise UserError(
            f"{path}: beside its codes it holds {shown(moments)}; moments of this trunk are {shapes} in float16. "
            "Make the artifact again with this version."
        )
    return statistics


def read_model(place: str, module: Path | None) -> tuple[Trunk, Tokenizer, dict[str, Any], dict[str, Any] | None]:
    """A trunk, or a trunk with one module merged into it: model, tokenizer, trunk's facts, module's facts."""
    trunk, tokenizer, facts = read_trunk(place)
    if module is None:
        return trunk, tokenizer, facts, None
    tensors, passport = read_module(module, facts)
    with naming(module):
        put_in(trunk, tensors, **plug(passport))
    return trunk, tokenizer, facts, passport
