"""A trunk is in memory once: when it is read, and when a module on it is published."""

import argparse
import re
import subprocess
import sys
from typing import Any

import edits
import launch
import pytest
import torch
from test_model import make, saved_bytes, text

from forge_common.artifacts.trunk_folder import write_trunk
from forge_common.data.tokenizer import byte_tokenizer
from forge_common.model.config import ModelConfig
from forge_common.model.modules import plug_in
from forge_common.model.trunk import Trunk
from forge_common.run.ledger import Ledger
from forge_common.run.plan import memory

SIZES = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8}
START = "open('/proc/self/clear_refs', 'w').write('5'); before = status('VmRSS')"  # VmHWM starts from here
STATUS = (
    'status = lambda key: int(__import__("re").search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10'
)
READ = f"""
import sys, torch, safetensors.torch
from forge_common.artifacts.trunk_folder import read_trunk, write_trunk
torch.empty(1, device="meta").normal_()  # for which torch imports 70 MB of code once
{STATUS}
{START}
trunk, _, _ = read_trunk(sys.argv[1], dtype=sys.argv[2])
size = sum(p.numel() * p.element_size() for p in trunk.parameters())
print((status("VmHWM") - before) / size, (status("VmRSS") - before) / size)
"""

# A tied trunk with 64 MiB of embedding, after a small one for which torch imports what it needs.
UPDATES = f"""
import argparse, torch
from forge_common.model.config import ModelConfig
from forge_common.model.trunk import Trunk
from forge_common.run.plan import memory
{STATUS}

def update_twice(vocab_size, width):
    config = ModelConfig(vocab_size=vocab_size, hidden_size=width, intermediate_size=width, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, eos_token_id=1, pad_token_id=0)
    trunk = Trunk(config)
    optimizer = torch.optim.AdamW(trunk.parameters(), fused=True)
    for _ in range(2):
        trunk(torch.full((1, 65), 2)).objective.backward()
        optimizer.step()
        optimizer.zero_grad()
    return trunk

update_twice(512, 32)
{START}
trunk = update_twice(65_536, 256)
settings = argparse.Namespace(sequence_length=64, micro_batch_size=1, activation_checkpointing=False)
print(status("VmHWM") - before, sum(memory(trunk, settings, gradients_stay=False)))
"""

# Two micro-batches of a trunk with an embedding of 96 MiB and some 120 MiB of activations.
GIVE_BACK = f"""
import sys, torch
from forge_common.model.config import ModelConfig
from forge_common.model.trunk import Trunk
from forge_common.run.engines import give_back_in_updates
{STATUS}
sizes = dict(hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2)
config = ModelConfig(vocab_size=98_304, max_position_embeddings=256, eos_token_id=1, pad_token_id=0, **sizes)
torch.manual_seed(0)
trunk = Trunk(config)
if sys.argv[1] == "given back":
    give_back_in_updates(trunk)
tokens = torch.randint(2, 2048, (2, 4, 257))
{START}
for micro_batch in tokens:
    trunk(micro_batch).objective.backward()
print(status("VmHWM") - before, sum(float(p.grad.double().norm()) for p in trunk.parameters()).hex())
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A trunk of 21 million random parameters: its folder, and the bytes of its weights."""
    tokenizer = byte_tokenizer()
    config = ModelConfig(
        vocab_size=258, num_key_value_heads=8, max_position_embeddings=64, eos_token_id=1, pad_token_id=0, **SIZES
    )
    torch.manual_seed(0)
    trunk, folder = Trunk(config), tmp_path_factory.mktemp("large") / "trunk"
    write_trunk(folder, trunk.state_dict(), config, tokenizer, {"kind": "trunk"})
    return folder, 4 * sum(parameter.numel() for parameter in trunk.parameters())


@pytest.mark.parametrize(("dtype", "copies", "more"), [("float32", 1, 0.15), ("bf16", 2, 0.3)])
def test_reading_a_trunk_makes_no_second_copy(large, dtype, copies, more):
    """In bf16 the file, in float32, is in memory once while it is verified, and not afterwards."""
    line = [sys.executable, "-c", READ, large[0], dtype]
    done = subprocess.run(line, env=launch.environment(), cwd=launch.ROOT, text=True, capture_output=True, check=True)
    peak, afterwards = (float(number) for number in done.stdout.split())
    assert copies - 0.1 < peak < copies + more
    assert 0.9 < afterwards < 1 + more


def printed_numbers(script, *arguments) -> list[int]:
    line = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(line, env=launch.environment(), cwd=launch.ROOT, text=True, capture_output=True, check=True)
    return [int(number) for number in done.stdout.split()]


def test_an_update_of_a_large_tied_vocabulary_has_the_peak_of_the_plan():
    """At the end of the backward pass, where the gradients of the head and of the embedding become one."""
    measured, planned = printed_numbers(UPDATES)
    assert measured == pytest.approx(planned, rel=0.1)


def test_what_activations_leave_free_is_not_kept_beside_the_gradients_of_a_large_vocabulary():
    """It is given back in each micro-batch. The gradients have the same bits."""
    printed = []
    for how in ("given back", "kept"):
        line = [sys.executable, "-c", GIVE_BACK, how]
        done = subprocess.run(
            line, env=launch.environment(), cwd=launch.ROOT, text=True, capture_output=True, check=True
        )
        printed.append(done.stdout.split())
    (peak, norms), (peak_where_kept, wanted) = printed
    assert int(peak) < int(peak_where_kept) - (40 << 20)
    assert norms == wanted


KINDS = {"whole": None, "ffn of the last two": ("ffn", [2, 3]), "attention+ffn": ("attention+ffn", [1, 3])}
KINDS |= {name: (name, range(4)) for name in ("ffn", "narrow", "lora", "expert")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["tied", "within documents", "qwen3", "mixtral"])
def test_the_plan_estimates_what_the_backward_pass_needs(family, kind):
    within = family == "within documents"  # one mask for all layers: T numbers a token
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 4,
        "cross_document_attention": not within,
    }
    trunk, T = make("tied" if within else family, **sizes), 256 if within else 64
    if KINDS[kind]:
        name, layers = KINDS[kind]
        if family == "mixtral" and name in ("lora", "expert"):
            pytest.skip("for a dense trunk")
        plug_in(trunk, name, list(layers), rank=1)
    kept, _ = saved_bytes(trunk, text(4, T + 1))
    settings = argparse.Namespace(sequence_length=T, micro_batch_size=4, activation_checkpointing=False)
    assert memory(trunk, settings)[1] == pytest.approx(kept, rel=0.09)


UPDATED: dict[str, tuple] = {  # kind of module, changes of the trunk, windows, micro-batches
    "low rank": ("lora", {"num_hidden_layers": 12}, 8, 1),  # whose first step makes the product of gate and up again
    "low rank, in each of its layers much for a token": ("lora", {"intermediate_size": 1024}, 8, 1),
    "a changed head": ("lora+head", {"vocab_size": 8192}, 1, 1),
    "a head": ("ffn+head", {"vocab_size": 8192}, 1, 1),
    "a head, accumulated": ("ffn+head", {"vocab_size": 8192}, 1, 2),
    "whole, few tokens": (None, {"tie_word_embeddings": False, "hidden_size": 128}, 1, 1),
    "whole, few tokens, accumulated": (None, {"tie_word_embeddings": False, "hidden_size": 128}, 1, 2),
    "whole, a large tied vocabulary": (None, {"vocab_size": 32_768}, 1, 1),
    "whole, a large tied vocabulary, accumulated": (None, {"vocab_size": 32_768}, 1, 2),
    "whole, many tokens": (None, {"tie_word_embeddings": False, "num_hidden_layers": 12}, 8, 1),
}


@pytest.mark.parametrize("case", UPDATED)
def test_an_update_has_the_peak_of_the_plan(case):
    """Live tensors of the second update, where the optimizer has its state."""
    kind, changes, windows, micro_batches = UPDATED[case]
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, **changes}
    trunk = make("tied", **sizes)
    if kind:
        plug_in(trunk, kind, list(range(trunk.config.num_hidden_layers)), rank=2)
    trained, tokens = [p for p in trunk.parameters() if p.requires_grad], text(windows, 65)
    optimizer = torch.optim.AdamW(trained, fused=True)
    with Ledger() as ledger:
        for parameter in trunk.parameters():
            ledger.add(parameter)
        for _ in range(2):
            for _ in range(micro_batches):
                trunk(tokens).objective.backward()
            optimizer.step()
            optimizer.zero_grad()
    settings = argparse.Namespace(sequence_length=64, micro_batch_size=windows, activation_checkpointing=False)
    assert ledger.peak == pytest.approx(sum(memory(trunk, settings, gradients_stay=micro_batches > 1)), rel=0.1)


def small_module(trunk, domain, cache, output) -> tuple:
    """The flags of a module of the last layer, trained for one update."""
    flags = ("--trunk", trunk, "--name", "cpp", "--data", domain, "--output-dir", output, "--cache-dir", cache)
    flags += ("--kind", "lora", "--layers", "top:1", "--general-tokens", 0, "--val-fraction", 0, "--tracker", "none")
    flags += ("--steps", 1, "--warmup-steps", 0, "--batch-size", 2, "--micro-batch-size", 1, "--sequence-length", 64)
    return (*flags, "--statistics-tokens", 500)


def test_publishing_a_module_makes_no_second_trunk(large, domain, cache, altered, tmp_path):
    """The peak above the end of training is a small part of the trunk's weights."""
    folder, size = large
    start = f"    {STATUS}\n    {START}\n"
    script = altered("train_module.py", edits.AFTER_TRAINING, edits.AFTER_TRAINING + start)
    script = altered(script, edits.PUBLISHED, '    print("MORE", status("VmHWM") - before)\n' + edits.PUBLISHED)
    found = re.search(r"MORE (-?\d+)", launch.run(script, *small_module(folder, domain, cache, tmp_path / "run")))
    assert found and int(found[1]) < 0.25 * size
    assert (tmp_path / "run" / "module" / "module.safetensors").exists()


def test_ddp_makes_no_second_copy_of_frozen_weights(large, domain, cache, altered, tmp_path):
    """Every process has mapped the same file: DDP need not write rank 0's values into it, which would copy its pages."""
    folder, size = large
    start = f"    {STATUS}\n    before = status('RssAnon')\n"
    end = "    print(f'ANON {rank} {status(\"RssAnon\") - before} ', flush=True)\n"
    script = altered("train_module.py", edits.PREPARE, start + edits.PREPARE + end)
    printed = launch.run(script, *small_module(folder, domain, cache, tmp_path / "run"), processes=2)
    grown = {rank: int(anonymous) for rank, anonymous in re.findall(r"ANON (\d) (-?\d+) ", printed)}
    assert grown.keys() == {"0", "1"} and max(grown.values()) < 0.25 * size, grown
