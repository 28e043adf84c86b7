"""Writes an assembled model as a Transformers model with a modeling file of its own (trust_remote_code).

No model family of Transformers computes what an assembled model does: it mixes the heads' probabilities, and its router
compares the document so far with counts of tokens. Mixtral and Qwen3-MoE choose experts by a token's hidden state.

B batch, T time, S states of the filter
"""

import inspect
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..data.tokenizer import Tokenizer
from ..errors import UserError
from ..files.atomic import write_json
from ..model.attention import frequencies
from ..model.config import TARGETS
from ..routing.mixture import Mixture
from ..routing.routers import ContextRouter
from . import proof

CODE = ("configuration_forge.py", "layers_forge.py", "modeling_forge.py", "router_forge.py")
NUMBERS = ("temperature", "switch", "unknown", "repeats", "own")  # of the router's tuning
FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
FIELDS += ("head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "qkv_bias", "qk_norm")
FIELDS += ("cross_document_attention", "pad_token_id", "eos_token_id", "bos_token_id")
FIELDS += ("hidden_act", "embed_scale", "norm_after", "sliding_window")
NAMES = (  # a module's parameter in a candidate -> its name in modeling_forge.py; {} is the number of the candidate
    (r"(model\.layers\.\d+)\.(?:mlp|addition)\.((?:gate|up|down)_proj\.(?:weight|lora_[AB]))", r"\1.candidates.{}.\2"),
    (
        r"(model\.layers\.\d+)\.self_attn\.([qkvo]_proj\.(?:weight|bias|lora_[AB])|[qk]_norm\.weight)",
        r"\1.attentions.{}.\2",
    ),
    (r"lm_head\.(weight)", r"heads.{}.\1"),
    (r"head_change\.(lora_[AB])", r"heads.{}.\1"),
)


def write(folder: Path, model: Mixture, tokenizer: Tokenizer, module_metadata: dict[str, dict[str, Any]]) -> None:
    """Writes the weights, the configuration, the tokenizer and the code. UserError for what the code does not compute.

    module_metadata: by the modules' names.
    """
    if not isinstance(model.router, ContextRouter):
        raise UserError(
            f"a {type(model.router).__name__} cannot be exported: the exported code computes the context router. Assemble the "
            "modules with --router context."
        )
    if model.config.num_local_experts:
        raise UserError(
            "this trunk is a mixture of experts: the exported code has no modules for it. Export the trunk, or the trunk with one "
            "module, or use forge_common.generate."
        )
    if model.config.rope_scaling and model.config.rope_scaling["rope_type"] == "dynamic":
        raise UserError(
            "this trunk has the rope_type dynamic, whose angles depend on the length of the text: the exported code has fixed ones. "
            "Use forge_common.generate, or export the trunk with one module."
        )
    tensors = {name: parameter.detach() for name, parameter in model.candidates[0].named_parameters()}
    if model.config.family == "gemma":  # its norms multiply with 1 + weight, those of the exported code with weight
        tensors |= {name: 1 + tensor for name, tensor in tensors.items() if name.endswith("norm.weight")}
    shared = {id(parameter) for parameter in model.candidates[0].parameters()}
    modules = []
    for number, (name, candidate) in enumerate(zip(model.names[1:], list(model.candidates)[1:], strict=True), 1):
        own = {key: parameter for key, parameter in candidate.named_parameters() if id(parameter) not in shared}
        modules.append(_entry(name, own))
        for key, parameter in own.items():
            scale = _scale(module_metadata[name]) if key.endswith("lora_B") else 1.0
            tensors[_exported_name(name, key, number)] = parameter.detach().float() * scale  # it may be in bf16
    tensors["router.unigram_codes"] = torch.from_numpy(model.router.unigram_codes)
    tensors["router.bigram_codes"] = torch.from_numpy(model.router.bigram_codes)
    stored = {
        name: (tensor.float() if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in tensors.items()
    }
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", _config(model, modules))
    tokenizer.save(folder)
    for name in CODE:
        shutil.copyfile(Path(__file__).with_name(name), folder / name)


def prove(folder: Path, model: Mixture, tokenizer: Tokenizer) -> float:
    """Loads what was written, and returns the largest difference of a logit from `model`.

    Windows are computed in three ways: each alone, in pieces with a cache, and all in one batch, padded on the left.
    """
    expected = proof.expect(model, tokenizer, spliced=True)
    exported = proof.load(folder, trust_remote_code=True)
    inputs = [window.tokens[0, :-1] for window in expected]
    longest = max(map(len, inputs))
    padded = torch.full((len(inputs), longest), tokenizer.eos_token_id)
    mask = torch.zeros_like(padded)
    for row, ids in enumerate(inputs):
        padded[row, longest - len(ids) :] = ids
        mask[row, longest - len(ids) :] = 1
    with torch.no_grad():
        batch = iter(exported(padded, attention_mask=mask).logits)

    def with_cache(ids: torch.Tensor) -> torch.Tensor:
        cache, logits = None, []
        for piece in (*ids[:, :-2].chunk(2, dim=1), ids[:, -2:-1], ids[:, -1:]):
            output = exported(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
        return torch.cat(logits, dim=1)

    with torch.no_grad():
        ways = (
            lambda ids: exported(ids, use_cache=False).logits,
            with_cache,
            lambda ids: next(batch)[None, longest - ids.shape[1] :],
        )
        largest = proof.largest_of(proof.difference(expected, way) for way in ways)
    # Transformers has copied the code into its cache, under the folder's temporary name.
    shutil.rmtree(Path(inspect.getfile(type(exported))).parents[1])
    return largest


def _entry(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """The entry of a module in the configuration."""
    layers = {int(key.split(".")[2]) for key in parameters if key.startswith("model.layers.")}
    sizes = {key: len(value) for key, value in parameters.items() if key.endswith(("gate_proj.weight", "lora_A"))}
    kind = "ffn"
    if any(key.endswith("lora_A") for key in parameters):
        kind = "lora"
    elif any(".addition." in key for key in parameters):
        kind = "narrow"
    head = any(not key.startswith("model.layers.") for key in parameters)
    targets = [target for target in TARGETS if any(f".{target}." in key for key in parameters)]
    return {
        "name": name,
        "kind": kind,
        "layers": sorted(layers),
        "targets": targets,
        "size": next(iter(sizes.values()), 0),
        "head": head,
    }


def _scale(metadata: dict[str, Any]) -> float:
    """alpha / rank of a module of kind lora; 1 where its metadata have no alpha."""
    rank = metadata.get("rank") or 1
    return (metadata.get("alpha") or rank) / rank


def _exported_name(module: str, key: str, number: int) -> str:
    """The name of a module's parameter in modeling_forge.py."""
    for pattern, target in NAMES:
        if match := re.fullmatch(pattern, key):
            return match.expand(target).format(number)
    raise UserError(
        f"module {module} has {key}, which the exported code does not compute. Leave it out with --without {module}, or export the "
        "trunk with that module alone."
    )


def _config(model: Mixture, modules: list[dict[str, Any]]) -> dict[str, Any]:
    """config.json: the trunk's sizes, the modules and the router."""
    inv_freq, attention_scaling = frequencies(model.config, model.config.max_position_embeddings)
    router: ContextRouter = model.router
    return {name: getattr(model.config, name) for name in FIELDS} | {
        "model_type": "forge",
        "architectures": ["ForgeForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_forge.ForgeConfig",
            "AutoModelForCausalLM": "modeling_forge.ForgeForCausalLM",
        },
        "inv_freq": inv_freq.tolist(),
        "attention_scaling": attention_scaling,
        "dtype": "float32",
        "modules": modules,
        "router": {name: getattr(router.tuning, name) for name in NUMBERS} | {"shares": router.shares.tolist()},
        "candidates_per_token": model.top_k,
    }
