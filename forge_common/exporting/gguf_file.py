"""Writes a trunk, or a trunk with a module merged into it, as one GGUF file (float32), which llama.cpp and others load.

D width, H heads, d width of a head, V vocabulary
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from ..data.tokenizer import Tokenizer
from ..errors import UserError
from ..model.attention import frequencies
from ..model.trunk import Trunk
from . import llama_cpp, proof

FILE = "model.gguf"
NAMES = {  # a part of a layer in the checkpoint -> its name in the file
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
REFUSED = {"gemma": "llama.cpp reads its GELU from a table in float16, so that logits would differ by more than 1e-4"}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {WORDS % r"\p{N}{1,3}": "llama-bpe", WORDS % r"\p{N}": "qwen2"}
READ_BY_TRANSFORMERS = ("gpt-2", "llama-bpe", "qwen2")  # rules that Transformers knows; smollm's is missing


def write(folder: Path, name: str, trunk: Trunk, tokenizer: Tokenizer, chat_template: str | None) -> str:
    """Writes FILE; returns the name of the rule by which its tokenizer splits text.

    UserError for what the format cannot express.
    """
    gguf = proof.library("gguf", "--as gguf")
    config = trunk.config
    if config.num_local_experts:
        raise UserError(
            "a mixture of experts is not written as GGUF here. Export it as transformers, and convert that with llama.cpp."
        )
    rope_type = config.rope_scaling["rope_type"] if config.rope_scaling else "default"
    if config.model_type not in ARCHITECTURES or rope_type not in ("default", "llama3"):
        reason = REFUSED.get(config.model_type, f"only {', '.join(ARCHITECTURES)} with default or llama3")
        raise UserError(
            f"a {config.model_type} with the rope_type {rope_type} is not written as GGUF here: {reason}. Export "
            "it as transformers, and convert that with llama.cpp's convert_hf_to_gguf.py."
        )
    split = _split(tokenizer)
    architecture = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(folder / FILE, architecture)
    writer.add_name(name)
    # The architecture llama has no sliding window: within one, attention is full attention.
    writer.add_context_length(
        min(config.max_position_embeddings, config.sliding_window or config.max_position_embeddings)
    )
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    _add_tokenizer(writer, gguf, tokenizer, config.vocab_size, split, chat_template)
    for key, parameter in trunk.named_parameters():
        tensor = parameter.detach().float()
        if architecture == "llama" and key.split(".")[-2] in ("q_proj", "k_proj"):
            # llama.cpp rotates neighbours in Llama, the checkpoint halves: (i, i + d/2) becomes (2 i, 2 i + 1).
            heads = tensor.unflatten(0, (-1, 2, config.head_dim // 2))
            tensor = heads.transpose(1, 2).flatten(0, 2)
        writer.add_tensor(_name(key), tensor.contiguous().numpy())
    if config.rope_scaling:
        plain, _ = frequencies(dataclasses.replace(config, rope_scaling=None), 1)
        writer.add_tensor("rope_freqs.weight", (plain / frequencies(config, 1)[0]).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return split


def prove(folder: Path, expected: list[proof.Expected], trunk: Trunk, tokenizer: Tokenizer, split: str) -> float:
    """Loads the file with Transformers, which has its own code for GGUF, and with llama.cpp if it is installed. Returns
    the largest difference of a logit from `expected`.

    The tokenizers are compared too, in Transformers if it knows the rule by which text is split. Transformers does not
    read Llama 3's scaling of positions and another width of a head than D / H from the file: then it gets the configuration.
    """
    transformers = proof.library("transformers", "the proof of an export")
    config = trunk.config
    arguments: dict[str, Any] = {"gguf_file": FILE}
    if config.rope_scaling or config.head_dim * config.num_attention_heads != config.hidden_size or config.qk_norm:
        in_file = config.to_hf() | {"model_type": ARCHITECTURES[config.model_type]}
        arguments["config"] = transformers.AutoConfig.for_model(**in_file)
    exported = proof.load(folder, **arguments)
    if split in READ_BY_TRANSFORMERS:
        read = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
        for text in proof.texts().values():
            if read(text, add_special_tokens=False)["input_ids"] != tokenizer.encode_batch([text], continued=True)[0]:
                raise UserError("nothing was written: the tokenizer in the GGUF file makes other tokens of a text.")
    with torch.no_grad():
        in_transformers = proof.difference(expected, lambda ids: exported(ids).logits)
    if not llama_cpp.is_installed():
        print(f"llama.cpp   not compared with: pip install {llama_cpp.PACKAGE}")
        return in_transformers
    in_llama_cpp = llama_cpp.difference(folder / FILE, expected, tokenizer)
    print(f"llama.cpp   the largest difference of a logit is {in_llama_cpp:.2e} (float32)")
    return proof.largest_of((in_transformers, in_llama_cpp))


def chat_template_of(folder: Path) -> str | None:
    """The chat template beside a tokenizer, as the gguf package finds it; None if there is none, or several."""
    template = proof.library("gguf", "--as gguf").SpecialVocab(folder).chat_template
    return template if isinstance(template, str) else None


def _name(key: str) -> str:
    """The name in the file of a parameter of the checkpoint."""
    part, _, kind = key.rpartition(".")
    if part in OUTSIDE:
        return f"{OUTSIDE[part]}.{kind}"
    _, _, layer, inside = part.split(".", 3)
    return f"blk.{layer}.{NAMES[inside]}.{kind}"


def _split(tokenizer: Tokenizer) -> str:
    """llama.cpp's name of the rule by which a byte-level BPE splits text. UserError for a tokenizer that has none."""
    content = json.loads(tokenizer.backend.to_str())
    splitters = content["pre_tokenizer"] or {}
    steps = splitters["pretokenizers"] if splitters.get("type") == "Sequence" else [splitters]
    kinds = [step.get("type") for step in steps]
    last = steps[-1]
    if content["model"]["type"] != "BPE" or kinds[-1] != "ByteLevel" or last["add_prefix_space"]:
        problem = "is not a byte-level BPE"
    elif not content["model"]["merges"]:
        problem = "has no merges"
    elif kinds == ["ByteLevel"] and last["use_regex"]:
        return "gpt-2"
    elif kinds == ["Digits", "ByteLevel"] and last["use_regex"] and steps[0]["individual_digits"]:
        return "smollm"
    elif kinds == ["Split", "ByteLevel"] and not last["use_regex"] and steps[0]["pattern"].get("Regex") in SPLITS:
        return SPLITS[steps[0]["pattern"]["Regex"]]
    else:
        problem = "splits text by a rule that is not GPT-2's, SmolLM's, Llama 3's or Qwen2's"
    raise UserError(
        f"the tokenizer {problem}: a GGUF file names the rule, and cannot hold another. Export as transformers, and convert that with "
        "llama.cpp's convert_hf_to_gguf.py, which knows more tokenizers."
    )


def _add_tokenizer(
    writer: Any, gguf: Any, tokenizer: Tokenizer, vocab_size: int, split: str, chat_template: str | None
) -> None:
    content = json.loads(tokenizer.backend.to_str())
    special = {token["id"]: token["special"] for token in content["added_tokens"]}
    tokens = []
    kinds = []
    for number in range(vocab_size):
        token = tokenizer.backend.id_to_token(number)
        tokens.append(f"[PAD{number}]" if token is None else token)
        if token is None:
            kinds.append(gguf.TokenType.UNUSED)
        elif number in special:
            kinds.append(gguf.TokenType.CONTROL if special[number] else gguf.TokenType.USER_DEFINED)
        else:
            kinds.append(gguf.TokenType.NORMAL)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    if len(tokenizer.prefix) == 1:
        writer.add_bos_token_id(tokenizer.prefix[0])
    writer.add_add_bos_token(len(tokenizer.prefix) == 1)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
