"""Trunks of the families of Transformers: read, with modules and published, they have Transformers' logits and gradients.

Each has random weights and a real model's proportions at about 1/32 of its width. `pytest -s` prints the largest
differences: of a logit with attention by sdpa and by eager, of the gradient of the embedding, and of a logit of the
published trunk.
"""

import dataclasses
import functools
import itertools
import json
import types

import pytest
import torch
import torch.nn.functional as F
import transformers

from forge_common.artifacts.trunk_folder import read_trunk, write_trunk
from forge_common.data.tokenizer import byte_tokenizer
from forge_common.errors import UserError
from forge_common.model import config as config_module
from forge_common.model.config import ModelConfig
from forge_common.model.modules import fold, plug_in
from forge_common.model.trunk import Trunk
from forge_common.routing.mixture import Mixture, with_module
from forge_common.routing.routers import UniformRouter
from forge_common.routing.statistics import moments

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH = 160  # tokens; the context before it is scaled, or the window, is 64
SIZES = "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"
LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "original_max_position_embeddings": 64,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "rope_theta": 5e5,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
MSCALE = {"rope_theta": 1e6, "truncate": False, "mscale": 1.2, "mscale_all_dim": 0.8}
SHORT = {"max_position_embeddings": 64}
FAMILIES = {  # the model that has these proportions -> model_type, SIZES, and the rest
    "Llama 1 7B": ("llama", (128, 344, 8, 8, 16, 1000), {"max_position_embeddings": 2048}),
    "Llama 2 7B, linear": ("llama", (128, 344, 8, 8, 16, 1000), {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "Llama 2 7B, dynamic": (
        "llama",
        (128, 344, 8, 8, 16, 1000),
        SHORT | {"rope_scaling": {"type": "dynamic", "factor": 8.0}},
    ),
    "Llama 2 7B, yarn": (
        "llama",
        (128, 344, 8, 8, 16, 1000),
        SHORT | {"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": 16.0, "finetuned": True}},
    ),
    "Llama 3 8B": ("llama", (128, 448, 8, 2, 16, 4008), {"rope_theta": 5e5}),
    "Llama 3.2 1B, llama3": (
        "llama",
        (64, 256, 8, 2, 8, 4008),
        {"tie_word_embeddings": True, "rope_parameters": LLAMA_3},
    ),
    "Mistral 7B": ("mistral", (128, 448, 8, 2, 16, 1000), {"sliding_window": 64}),
    "Mistral Nemo 12B": ("mistral", (160, 448, 8, 2, 16, 4096), {"sliding_window": None, "rope_theta": 1e6}),
    "Mixtral 8x7B": ("mixtral", (64, 224, 8, 2, 8, 500), {"num_local_experts": 8, "sliding_window": 64}),
    "Qwen2 0.5B": ("qwen2", (56, 304, 14, 2, 4, 9496), {"tie_word_embeddings": True, "rope_theta": 1e6}),
    "Qwen2.5 7B, yarn": ("qwen2", (112, 592, 7, 1, 16, 4752), SHORT | {"rope_theta": 1e6, "rope_scaling": YARN}),
    "Qwen3 0.6B, yarn": (
        "qwen3",
        (64, 192, 16, 8, 8, 9496),
        {"tie_word_embeddings": True, "rope_parameters": YARN | MSCALE},
    ),
    "OLMo2 7B": ("olmo2", (128, 344, 8, 8, 16, 3136), {"rope_theta": 5e5}),
    "OLMo2 32B": ("olmo2", (160, 864, 10, 2, 16, 3136), {"rope_theta": 5e5}),
    "Gemma 2B": ("gemma", (64, 512, 8, 1, 8, 8000), {"hidden_act": "gelu"}),
}
every_family = pytest.mark.parametrize("family", FAMILIES)
DIFFERENT = ("Mistral 7B", "Mixtral 8x7B", "Qwen2.5 7B, yarn", "OLMo2 7B", "Gemma 2B")
QUICK = {
    *itertools.product(DIFFERENT, ["attention+ffn+head"]),
    *itertools.product(DIFFERENT[-2:], ["lora+head", "narrow"]),
}
MODULES = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.soak)
    for case in itertools.product(DIFFERENT, ("ffn", "attention+ffn+head", "lora+head", "narrow"))
    if case != ("Mixtral 8x7B", "narrow")  # which a Mixtral checkpoint cannot express
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """family -> the folder of its checkpoint, which Transformers wrote."""

    @functools.cache
    def write(family):
        model_type, sizes, settings = FAMILIES[family]
        plain = {"num_hidden_layers": 2, "max_position_embeddings": 512, "pad_token_id": 0, "eos_token_id": 1}
        settings = plain | dict(zip(SIZES, sizes, strict=True)) | settings
        torch.manual_seed(3)
        config = transformers.AutoConfig.for_model(model_type, **settings, bos_token_id=None)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.05))
        folder = tmp_path_factory.mktemp("checkpoint")
        model.save_pretrained(folder)
        if "rope_scaling" in settings:  # as Transformers 4 writes it
            written = json.loads((folder / "config.json").read_text())
            del written["rope_parameters"]
            given = {name: settings[name] for name in ("rope_scaling", "rope_theta") if name in settings}
            (folder / "config.json").write_text(json.dumps(written | given))
        byte_tokenizer().save(folder)
        return folder

    return write


def theirs(folder):
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="sdpa", dtype=torch.float32
    )
    assert not any(report.values()), report
    return model.eval()


def text():
    with open(__file__, "rb") as file:
        return torch.tensor([list(file.read(LENGTH))]) + 2


def logits(trunk, tokens):
    hidden, _ = trunk.model(tokens)
    return hidden @ trunk.head.T


def difference(one, other):
    return (one - other).abs().max().item()


def published(folder, trunk):
    """What Transformers loads of the trunk that is published in `folder`."""
    write_trunk(folder, trunk.state_dict(), trunk.config, byte_tokenizer(), {})
    model = theirs(folder)
    assert model.config.model_type == trunk.config.model_type
    return model


@every_family
def test_logits_and_gradient_are_those_of_transformers(family, checkpoint, tmp_path):
    model = theirs(checkpoint(family))
    trunk, _, _ = read_trunk(str(checkpoint(family)))
    assert trunk.config.model_type == model.config.model_type
    tokens = text()
    inputs = tokens[:, :-1]
    expected = model(inputs).logits
    F.cross_entropy(expected.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    sums = trunk(tokens)
    (sums.nats / sums.tokens).backward()
    gradient = difference(trunk.model.embed_tokens.weight.grad, model.get_input_embeddings().weight.grad)
    with torch.no_grad():
        sdpa = difference(logits(trunk, inputs), expected)
        model.set_attn_implementation("eager")
        eager = difference(logits(trunk, inputs), model(inputs).logits)
        again = difference(logits(trunk, inputs), published(tmp_path / "trunk", trunk)(inputs).logits)
    shape = ", ".join(map(str, FAMILIES[family][1]))
    print(f"\n| {family} | {shape} | {sdpa:.1e} | {eager:.1e} | {gradient:.1e} | {again:.1e} |")
    assert max(sdpa, eager, gradient, again) < 1e-5


@pytest.mark.parametrize("family", ["Llama 2 7B, dynamic", *DIFFERENT])
@torch.no_grad()
def test_generation_with_a_cache_has_transformers_logits(family, checkpoint):
    """Beyond the original context too: with rope_type dynamic, keys keep the angles of the length at which they came in."""
    model, tokens = theirs(checkpoint(family)), text()
    trunk, _, _ = read_trunk(str(checkpoint(family)))
    ours, cache = [], None
    for piece in tokens.split((60, 20, 1, 1, LENGTH - 82), dim=1):
        output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        assert difference(trunk.next_logits(piece, ours), output.logits[:, -1]) < 1e-5


@pytest.mark.parametrize(("family", "kind"), MODULES)
def test_a_module_trains_assembles_and_is_merged(family, kind, checkpoint, tmp_path):
    trunk, _, _ = read_trunk(str(checkpoint(family)))
    how = {"kind": kind, "layers": [1], "width": 24, "rank": 4, "targets": ("q_proj", "o_proj")}
    bare = Trunk(trunk.config)
    torch.manual_seed(1)
    tensors = {name: torch.randn_like(bare.state_dict()[name]) * 0.05 for name in plug_in(bare, **how)}
    model = with_module(trunk, tensors, **how)
    tokens = text()
    inputs = tokens[:, :-1]
    model(tokens).nats.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == set(tensors)
    with torch.no_grad():
        alone = logits(model, inputs).log_softmax(-1)
        assert difference(alone, logits(trunk, inputs).log_softmax(-1)) > 1e-2
        mixture = Mixture(trunk, {"one": model}, UniformRouter(torch.tensor([0.0, 1.0])))
        assert difference(mixture.nats(tokens), model.nats(tokens)) < 1e-5
        fold(model)
        assert difference(logits(model, inputs).log_softmax(-1), alone) < 1e-5
        assert difference(published(tmp_path / "merged", model)(inputs).logits.log_softmax(-1), alone) < 1e-5


@pytest.mark.parametrize("family", ["OLMo2 7B", "Gemma 2B"])
def test_moments_are_of_the_inputs_of_the_feed_forwards(family, checkpoint):
    trunk, _, _ = read_trunk(str(checkpoint(family)))
    seen = []
    for layer in trunk.model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0][0].mean(0)))
    tokens = text()
    with torch.no_grad():
        trunk.model(tokens)
    first = moments(trunk.config, trunk.state_dict(), [tokens[0].numpy()], LENGTH, torch.device("cpu"))["first"]
    torch.testing.assert_close(first.float(), torch.stack(seen), rtol=2e-3, atol=2e-3)


LLAMA = ModelConfig(258, 32, 48, 2, 4, 2, 512)
GEMMA = dataclasses.replace(LLAMA, family="gemma")
REFUSED = [  # (of the config.json of, with the change, is refused with the words)
    (LLAMA, {"model_type": "gemma3_text"}, "model_type 'gemma3_text' .*layers differ.* Use a Llama, Mistral,.* OLMo2"),
    (LLAMA, {"model_type": "gemma2"}, "model_type 'gemma2' .*caps its logits"),
    (LLAMA, {"model_type": "granite"}, "model_type 'granite'"),
    (LLAMA, {"model_type": None}, "model_type None"),
    (LLAMA, {"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}, "rope_type 'longrope' .*\"yarn\""),
    (LLAMA, {"rope_scaling": {"type": "mrope", "mrope_section": [2]}}, "rope_type 'mrope'"),
    (LLAMA, {"rope_parameters": {"rope_type": "default", "mrope_section": [2]}}, "mrope_section"),
    (LLAMA, {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
    (LLAMA, {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
    (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling and rope_parameters differ"),
    (LLAMA, {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters has no factor"),
    (LLAMA, {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1}}, "rope_theta is 1"),
    (LLAMA, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "head_dim": 2}, "head_dim is 2"),
    (LLAMA, {"original_max_position_embeddings": 64}, "original_max_position_embeddings 64"),
    (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    (LLAMA, {"mlp_bias": True}, "mlp_bias True .*null or false"),
    (LLAMA, {"attention_bias": True}, "attention_bias True"),
    (LLAMA, {"attention_multiplier": 0.5}, "attention_multiplier 0.5"),
    (LLAMA, {"logit_scale": 0.0625}, "logit_scale 0.0625"),
    (LLAMA, {"embedding_multiplier": 12.0}, "embedding_multiplier 12.0 .*null or 1"),
    (LLAMA, {"residual_multiplier": 0.2}, "residual_multiplier 0.2"),
    (LLAMA, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
    (LLAMA, {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
    (LLAMA, {"sliding_window": 64}, "sliding_window 64"),
    (LLAMA, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types 'sliding_attention'"),
    (LLAMA, {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    (LLAMA, {"rms_norm_eps": None}, "rms_norm_eps"),
    (LLAMA, {"hidden_size": None, "num_attention_heads": None}, "hidden_size, num_attention_heads"),
    (LLAMA, {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64}, "use_sliding_window True"),
    (GEMMA, {"hidden_act": "silu"}, "hidden_act 'silu' .*gelu_pytorch_tanh"),
    (GEMMA, {"hidden_activation": "relu"}, "hidden_activation 'relu'"),
    (GEMMA, {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
]


@pytest.mark.parametrize(("config", "change", "words"), REFUSED)
def test_what_is_not_implemented_is_refused_by_name(config, change, words):
    with pytest.raises(UserError, match=words) as refusal:
        ModelConfig.from_hf(config.to_hf() | change, "/its/config.json")
    assert "/its/config.json" in str(refusal.value)


def test_the_defaults_of_a_family_are_transformers():
    """What a config.json leaves out."""
    for model_type in config_module.FAMILIES:
        written = {"model_type": model_type, "vocab_size": 258, "hidden_size": 64, "intermediate_size": 48}
        written |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-6}
        written |= {"max_position_embeddings": 512}
        ours = ModelConfig.from_hf(written | {"num_local_experts": 8 * (model_type == "mixtral")}, "here")
        default = transformers.AutoConfig.for_model(**written)
        head_dim = getattr(default, "head_dim", None) or 16
        window = getattr(default, "sliding_window", None)
        expected = (default.tie_word_embeddings, head_dim, window, default.rope_parameters["rope_theta"])
        assert expected == (ours.tie_word_embeddings, ours.head_dim, ours.sliding_window, ours.rope_theta)
        assert ours.hidden_act == default.hidden_act and ours.model_type == model_type


def test_windows_may_be_as_long_as_the_scaled_context():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    for scaling, context in ((None, 512), (yarn, 1024), ({"rope_type": "dynamic", "factor": 3.0}, 1536)):
        config = dataclasses.replace(LLAMA, rope_scaling=scaling)
        config_module.check_context(types.SimpleNamespace(sequence_length=context), config)
        with pytest.raises(UserError, match=f"Use at most {context}"):
            config_module.check_context(types.SimpleNamespace(sequence_length=context + 1), config)
