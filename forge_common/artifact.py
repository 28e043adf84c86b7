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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .config import ModelConfig
from .data.tokenizer import Tokenizer, load_tokenizer
from .errors import UserError
from .files import publish, read_json, write_json
from .model import Trunk
from .modules import put_in
from .statistics import BIGRAM_BUCKETS

FORMAT_VERSION = 1
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
Tensors = dict[str, torch.Tensor]


def digest(tensors: Tensors) -> str:
    """SHA-256 over names, dtypes, shapes and bytes in the order of the names; a file's layout plays no part."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}\n".encode())
        total.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return total.hexdigest()


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
    if statistics:
        facts["statistics_digest"] = digest(statistics)

    def write(aside: Path) -> None:
        if statistics:
            save_file(statistics, aside / "statistics.safetensors")
        save_file(stored, aside / "model.safetensors", metadata={"format": "pt"})
        write_json(aside / "config.json", config.to_hf())
        tokenizer.save(aside)
        write_json(aside / "forge.json", facts)
        (aside / "README.md").write_text(_card("trunk", facts), encoding="utf-8")

    publish(folder, write)
    return own


def write_module(folder: Path, tensors: Tensors, facts: dict[str, Any], statistics: Tensors) -> str:
    """Publishes a module: its tensors, its passport `module.json`, the router's statistics; returns its digest."""
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    own = digest(stored)
    shapes = {name: list(tensor.shape) for name, tensor in sorted(stored.items())}
    facts = {"format_version": FORMAT_VERSION, "digest": own, "statistics_digest": digest(statistics), **facts}
    facts["shapes"] = shapes

    def write(aside: Path) -> None:
        save_file(statistics, aside / "statistics.safetensors")
        save_file(stored, aside / "module.safetensors", metadata={"format": "pt"})
        write_json(aside / "module.json", facts)
        (aside / "README.md").write_text(_card(f"module {facts['name']}", facts), encoding="utf-8")

    publish(folder, write)
    return own


def _card(title: str, facts: dict[str, Any]) -> str:
    """A model card: the facts, readable."""
    rows = "\n".join(
        f"| {name} | {json.dumps(value, ensure_ascii=False)} |" for name, value in facts.items() if name != "shapes"
    )
    licence = f"license: {facts['licence']}\n" if facts.get("licence") else ""
    return f"---\ntags: [forge]\n{licence}---\n\n# {title}\n\n| fact | value |\n| --- | --- |\n{rows}\n"


def read_tensors(path: Path) -> Tensors:
    """All tensors of a safetensors file; a malformed file, NaN or Inf is refused, and the tensor named."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as reason:
        raise UserError(f"{path} cannot be read as safetensors ({reason}). Fetch or export it again.") from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {name} holds NaN or Inf. Use an artifact of a run that did not diverge.")
    return tensors


def find(place: str) -> Path:
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

    A folder with a forge.json is verified against it, weights and tokenizer; another Transformers checkpoint is taken
    as it is, and its digest computed.
    """
    folder = find(place)
    weights = _weight_files(folder)
    raw = read_json(folder / "config.json")
    tokenizer = load_tokenizer(folder, eos_token)
    config = ModelConfig.from_hf(raw | {"eos_token_id": tokenizer.eos_token_id}, str(folder / "config.json"))
    config = _with_ids(config, tokenizer)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}. "
            "They are not of one checkpoint: fetch it again."
        )
    tensors: Tensors = {}
    for path in weights:
        tensors |= read_tensors(path)
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    for name in [name for name in tensors if name.endswith("rotary_emb.inv_freq")]:
        del tensors[name]  # old checkpoints hold what follows from rope_theta
    facts = read_json(folder / "forge.json") if (folder / "forge.json").exists() else {}
    own = digest(tensors)
    for name, found in (("digest", own), ("tokenizer_digest", tokenizer.digest)):
        if facts.get(name, found) != found:
            raise UserError(
                f"{folder}: the {name} is {found}, but forge.json says {facts[name]}. The files were changed or damaged "
                "since they were published: fetch or export the trunk again."
            )
    with torch.device("meta"):
        trunk = Trunk(config)
    _load_exactly(trunk, tensors, folder)
    return trunk, tokenizer, facts | {"digest": own, "tokenizer_digest": tokenizer.digest}


def _with_ids(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """PAD and EOS as the tokenizer has them: the loss must ignore the id that the data is filled up with."""
    return dataclasses.replace(config, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / "model.safetensors.index.json").exists():
        names = set(read_json(folder / "model.safetensors.index.json")["weight_map"].values())
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise UserError(
                f"{folder}: the index names files outside of the folder: {outside}. Do not use this artifact."
            )
        return [folder / name for name in sorted(names)]
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    hint = f"; {pickles[0]} is a pickle and is not opened" if pickles else ""
    raise UserError(f"{folder} holds no model.safetensors{hint}. Export the model with safetensors.")


def _load_exactly(trunk: Trunk, tensors: Tensors, folder: Path) -> None:
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


def read_module(folder: Path, trunk_facts: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """A module's tensors and passport, verified against its own digest and against the trunk's."""
    if not folder.is_dir():
        hint = " Pickles are not opened." if folder.suffix in PICKLES else ""
        raise UserError(f"{folder} is not a module's folder.{hint} Name the folder with module.json in it.")
    facts = read_json(folder / "module.json")
    if facts.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{folder}: format version {facts.get('format_version')!r}, this program reads {FORMAT_VERSION}. "
            "Use the version of forge that the module was made with, or export it again."
        )
    for name, ours in (("trunk_digest", "digest"), ("tokenizer_digest", "tokenizer_digest")):
        if facts.get(name) != trunk_facts[ours]:
            raise UserError(
                f"{folder}: the module was made for another {name.split('_')[0]}: its {name} is {facts.get(name)}, here it "
                f"is {trunk_facts[ours]}. Use the trunk that the module names."
            )
    tensors = read_tensors(folder / "module.safetensors")
    if digest(tensors) != facts.get("digest"):
        raise UserError(
            f"{folder}: the tensors' digest is {digest(tensors)}, module.json says {facts.get('digest')}. The files were "
            "changed or damaged since they were published: fetch the module again."
        )
    return tensors, facts


def read_statistics(folder: Path, facts: dict[str, Any], vocab_size: int) -> Tensors | None:
    """The router's statistics beside a trunk or a module, verified; None where none were published."""
    path = folder / "statistics.safetensors"
    if "statistics_digest" not in facts and not path.exists():
        return None
    statistics = read_tensors(path)
    if digest(statistics) != facts.get("statistics_digest"):
        raise UserError(
            f"{path}: the digest is {digest(statistics)}, the passport says {facts.get('statistics_digest')}. The file was "
            "changed or damaged since it was published: fetch the artifact again."
        )
    for name, size in (("unigrams", vocab_size), ("bigrams", BIGRAM_BUCKETS)):
        found = statistics.get(name)
        if found is None or found.shape != (size,) or found.dtype != torch.uint8:
            raise UserError(
                f"{path}: {name} are not {size} codes of 8 bits. Make the artifact again with this version."
            )
    return statistics


def plug(module: Path, passport: dict[str, Any]) -> dict[str, Any]:
    """What modules.plug_in is told of a module, from its passport: kind, layers, width, rank."""
    layers, sizes = passport.get("layers"), {name: passport.get(name, 0) for name in ("width", "rank")}
    if not isinstance(layers, list) or not all(isinstance(layer, int) for layer in layers):
        raise UserError(f"{module}: module.json does not say which layers the module is for. Fetch the module again.")
    if not all(isinstance(size, int) and 0 <= size <= 1 << 20 for size in sizes.values()):
        raise UserError(f"{module}: module.json gives the sizes {sizes}. Fetch the module again.")
    return {"kind": passport.get("kind"), "layers": layers, **sizes}


def read_model(place: str, module: Path | None) -> tuple[Trunk, Tokenizer, dict[str, Any], dict[str, Any] | None]:
    """A trunk, or a trunk with one module merged into it: model, tokenizer, trunk's facts, module's facts."""
    trunk, tokenizer, facts = read_trunk(place)
    if module is None:
        return trunk, tokenizer, facts, None
    tensors, passport = read_module(module, facts)
    put_in(trunk, tensors, **plug(module, passport))
    return trunk, tokenizer, facts, passport
