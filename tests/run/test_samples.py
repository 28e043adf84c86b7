"""--sample-prompt: what a validation prints beside its loss, and that the training does not notice it."""

import contextlib
import types

import launch
import pytest
import torch

from forge_common.data.tokenizer import byte_tokenizer
from forge_common.model.config import ModelConfig
from forge_common.model.trunk import Trunk
from forge_common.run.samples import continuations

PROMPTS = ("def ", "import os\n\x1b[31m<b>")
MORE = ("--steps", 4, "--val-every", 2, "--save-every", 0, "--dtype", "float64", "--lr", 0.03)
ACCELERATOR = types.SimpleNamespace(autocast=contextlib.nullcontext, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def sampled(shared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sampled") / "run"
    return folder, shared(folder, *MORE, "--sample-prompt", *PROMPTS)


def samples(folder):
    return [row["val/samples"] for row in launch.rows(folder, "val/loss")]


def test_training_has_the_same_bits_with_and_without(sampled, shared, tmp_path):
    folder, _ = sampled
    shared(tmp_path / "run", *MORE)
    assert launch.same_bits(launch.weights(folder, 4), launch.weights(tmp_path / "run", 4))
    rows = [{k: v for k, v in row.items() if k != "val/samples"} for row in launch.without_times(folder)]
    assert rows == launch.without_times(tmp_path / "run")


def test_each_validation_continues_each_prompt(sampled):
    """As Transformers does with the published weights, which are those of the last update.

    No escape sequence reaches the terminal.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, printed = sampled
    assert [[sample["prompt"] for sample in each] for each in samples(folder)] == [list(PROMPTS)] * 2
    assert launch.rows(folder, "val/loss")[1]["val/loss"] < launch.rows(folder, "val/loss")[0]["val/loss"]
    model = AutoModelForCausalLM.from_pretrained(folder / "trunk", dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(folder / "trunk")
    for sample in samples(folder)[1]:
        ids = torch.tensor([tokenizer(sample["prompt"])["input_ids"]])
        with torch.no_grad():
            while ids.shape[1] < 64 and ids[0, -1] != tokenizer.eos_token_id:
                ids = torch.cat((ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)), dim=1)
        text = tokenizer.decode(ids[0], skip_special_tokens=True)
        assert sample["continuation"] and text.startswith(sample["prompt"] + sample["continuation"])
        assert f"sample      {sample['prompt']!r} -> {sample['continuation']!r}" in printed
    assert "\x1b" not in printed


def test_fsdp2_continues_as_one_process_does(sampled, shared, tmp_path):
    shared(tmp_path / "run", *MORE, "--sample-prompt", *PROMPTS, processes=2, **launch.fsdp2())
    assert samples(tmp_path / "run") == samples(sampled[0])


def test_no_random_number_is_drawn_and_the_mode_stays():
    """A prompt longer than the context is continued from its end, as without a cache."""
    torch.manual_seed(0)
    config = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    trunk = Trunk(ModelConfig(vocab_size=257, max_position_embeddings=32, num_key_value_heads=1, **config))
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode_batch(["x"])[0][:1] * 16  # half of the context
    while len(ids) < 32:
        ids.append(int(trunk.next_logits(torch.tensor([ids])).argmax()))
    new = ids[16:]
    expected = tokenizer.decode(new[: new.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in new else new)
    before = torch.get_rng_state()
    for training in (True, False):
        trunk.train(training)
        (sample,) = continuations(ACCELERATOR, trunk, tokenizer, ["x" * 99])
        assert trunk.training == training and sample["continuation"] == expected
    assert torch.equal(torch.get_rng_state(), before)


def test_prompts_that_would_never_be_used_are_refused(shared, tmp_path):
    printed = shared(tmp_path, *MORE, "--sample-prompt", "def ", "--val-fraction", 0, fails=True)
    assert "--sample-prompt" in printed and "--val-fraction" in printed and "Traceback" not in printed
