"""PEFT's LoRA adapters: writes a module of kind lora as one, and makes a module of one.

D width, V vocabulary, R rank
"""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..data.tokenizer import Tokenizer
from ..errors import UserError
from ..files.atomic import read_json, write_json
from ..files.tensors import Tensors, read_tensors
from ..files.untrusted import checked, integer, number, quoted
from ..model.config import MATRICES, TARGETS
from ..model.modules import put_in
from ..model.trunk import Trunk
from . import proof

PREFIX = "base_model.model."
FIELDS = {"r": integer(1, 1 << 20), "lora_alpha": number(1e-9, 1e9)}
PLAIN = {  # fields of adapter_config.json -> the values with which the adapter is W + alpha / r * B A
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),  # the others change W
}
UNSET = (None, False, {}, [])
FREE = (  # fields that may have any value: they say how the adapter was trained, or which matrices it has
    *("auto_mapping", "base_model_name_or_path", "eva_config", "inference_mode", "lora_dropout", "megatron_core"),
    *("peft_version", "qalora_group_size", "revision", "task_type", "use_rslora"),
    *("exclude_modules", "layers_pattern", "layers_to_transform", "target_modules"),
)
COPIES = re.compile(r"base_model\.model\.(?:model\.embed_tokens|lm_head)(?:\.base_layer)?\.weight")
LAYER = r"model\.layers\.(?P<layer>\d+)\.(?:mlp|self_attn)\.(?P<matrix>\w+)"
TARGET = re.compile(rf"base_model\.model\.(?P<target>{LAYER}|lm_head)\.lora_(?P<factor>[AB])\.weight")


def write(folder: Path, base: str, tensors: Tensors, metadata: dict[str, Any]) -> None:
    """Writes the tensors of a module (names of modules.py) as an adapter of the trunk `base`.

    UserError for another kind than lora.
    """
    if metadata["kind"].partition("+")[0] != "lora":
        raise UserError(
            f"a module of kind {metadata['kind']} is no LoRA adapter. Export the trunk with the module merged into it: --as transformers."
        )
    renamed = {}
    for name, tensor in tensors.items():
        target, _, factor = name.replace("head_change.", "lm_head.").rpartition(".")
        renamed[f"{PREFIX}{target}.{factor}.weight"] = tensor.float().contiguous()
    targets = sorted({name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in renamed})
    rank = len(next(tensor for name, tensor in tensors.items() if name.endswith("lora_A")))
    save_file(renamed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": metadata.get("alpha") or rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": targets,
        "inference_mode": True,
    }
    write_json(folder / "adapter_config.json", config)


def prove(folder: Path, trunk_dir: Path, model: Trunk, tokenizer: Tokenizer) -> float:
    """Loads the adapter with PEFT, on the trunk in Transformers.

    Returns the largest difference of a logit from `model`, the trunk with the module.
    """
    peft = proof.library("peft", "an adapter")
    expected = proof.expect(model, tokenizer, spliced=False)
    adapted = peft.PeftModel.from_pretrained(proof.load(trunk_dir), str(folder)).eval()
    loaded = {name.replace(".default.", ".") for name in adapted.state_dict()}
    left_out = sorted(
        name
        for name in read_tensors(folder / "adapter_model.safetensors")
        if TARGET.fullmatch(name) and name not in loaded
    )
    if left_out:
        raise UserError(
            f"{folder}: PEFT does not load {quoted(left_out[0])}, which target_modules, exclude_modules or layers_to_transform in "
            "adapter_config.json leave out. Save the adapter again with PEFT, so that its two files agree."
        )
    with torch.no_grad():
        return proof.difference(expected, lambda ids: adapted(input_ids=ids).logits)


def read(folder: Path, trunk: Trunk) -> tuple[Tensors, dict[str, Any]]:
    """Reads an adapter as a module of `trunk`: its tensors, and the arguments of plug_in. Puts the module into `trunk`.

    B is multiplied by alpha / r. A matrix that the adapter changes in some layers only gets a change of 0 in the others.
    UserError where no kind of module can express the adapter.
    """
    file = folder / "adapter_config.json"
    config = checked(read_json(file), file, FIELDS, FIELDS)
    for name, value in (dict.fromkeys(PLAIN) | config).items():
        if name not in (*FIELDS, *FREE) and value not in PLAIN.get(name, UNSET):
            raise UserError(
                f"{file}: {name} is {quoted(value)}. A module is a plain LoRA: one rank, no biases, no other trained "
                "tensors. Train the adapter without it, or merge it into the trunk with PEFT (merge_and_unload)."
            )
    rank = config["r"]
    scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    factors: Tensors = {}
    layers: set[int] = set()
    changed: set[str] = set()
    for name, tensor in read_tensors(folder / "adapter_model.safetensors").items():
        if COPIES.fullmatch(name) and _is_copy(name, tensor, trunk):
            continue
        match = TARGET.fullmatch(name)
        if not match or match["matrix"] not in (None, *TARGETS):
            raise UserError(
                f"{folder}: {quoted(name)} is not in a module of kind lora, which changes {', '.join(TARGETS)} and lm_head. Train the "
                "adapter with these target_modules."
            )
        target = match["target"].replace("lm_head", "head_change")
        factors[f"{target}.lora_{match['factor']}"] = tensor.float() * (scale if match["factor"] == "B" else 1)
        if match["layer"]:
            layers.add(int(match["layer"]))
            changed.add(match["matrix"])
    if not layers:
        raise UserError(f"{folder} changes no layer. Train the adapter with target_modules among {', '.join(TARGETS)}.")
    targets = [name for name in TARGETS if name in changed]
    weights = dict(trunk.named_parameters())
    for layer in layers:  # a module changes the same matrices in each of its layers
        for name in targets:
            target = f"model.layers.{layer}.{'mlp' if name in MATRICES else 'self_attn'}.{name}"
            weight = weights.get(f"{target}.weight")
            if weight is not None and f"{target}.lora_A" not in factors:
                factors[f"{target}.lora_A"] = torch.zeros(rank, weight.shape[1])
                factors[f"{target}.lora_B"] = torch.zeros(weight.shape[0], rank)
    arguments = {
        "kind": "lora+head" if "head_change.lora_A" in factors else "lora",
        "layers": sorted(layers),
        "rank": rank,
        "alpha": rank,  # the scale is in B
        "targets": targets,
    }
    put_in(trunk, factors, **arguments)
    return factors, arguments


def _is_copy(name: str, tensor: torch.Tensor, trunk: Trunk) -> bool:
    """Whether a tensor that PEFT saved with the adapter is the trunk's embedding or head."""
    weight = trunk.model.embed_tokens.weight if "embed_tokens" in name else trunk.head
    return tensor.shape == weight.shape and torch.equal(tensor.to(weight.dtype), weight)
