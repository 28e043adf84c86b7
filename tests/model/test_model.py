"""The trunk computes what Hugging Face's model of the same config does; causality, padding, documents, experts, freezing."""

import dataclasses
import inspect
import json
import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from forge_common.errors import UserError
from forge_common.loss import CHUNK_ROWS
from forge_common.model.attention import rotary, rotate
from forge_common.model.config import PRESETS, ModelConfig
from forge_common.model.feed_forward import SparseFeedForward
from forge_common.model.gated import GatedLinear, gated_product
from forge_common.model.modules import chosen_layers, plug_in, put_in, untie
from forge_common.model.norm import RMSNorm, rms_norm
from forge_common.model.trunk import Trunk, even_load, load_of
from forge_common.optimizers import parameter_groups
from forge_common.routing.mixture import Mixture, with_module
from forge_common.routing.routers import UniformRouter

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
KINDS = {
    "llama": {"tie_word_embeddings": False},
    "tied": {},
    "head_dim": {"head_dim": 12, "rms_norm_eps": 1e-3},
    "llama3": {"rope_scaling": LLAMA3, "rope_theta": 500000.0},
    "qwen2": {"qkv_bias": True, "tie_word_embeddings": False},
    "qwen3": {"qk_norm": True, "head_dim": 16},
    "mixtral": {"num_local_experts": 4, "tie_word_embeddings": False},
    "mixtral_tied": {"num_local_experts": 5, "num_experts_per_tok": 1},
    "mistral": {"family": "mistral", "sliding_window": 7},
    "olmo2": {"family": "olmo2", "qk_norm": True, "num_key_value_heads": 4},
    "gemma": {"family": "gemma", "head_dim": 12, "num_key_value_heads": 1, "rope_theta": 500.0},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def config_of(kind="llama", **changes):
    return ModelConfig(**SIZES | KINDS[kind] | changes)


def make(kind="llama", seed=0, **changes):
    """A trunk without parameters at their initial 0 or 1, so that a test notices when one is not used."""
    torch.manual_seed(seed)
    trunk = Trunk(config_of(kind, **changes))
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.05))
    return trunk


def text(batch, length):
    """Tokens [batch, length]: the bytes of a file of the standard library."""
    with open(inspect.__file__, "rb") as file:
        return torch.tensor(list(file.read(batch * length))).view(batch, length) + 2


def mean(trunk, tokens):
    sums = trunk(tokens)
    return (sums.nats / sums.tokens).item()


def gradients(trunk, value):
    trunk.zero_grad()
    value.backward()
    return {name: parameter.grad for name, parameter in trunk.named_parameters()}


# ---- Hugging Face ----


@every_kind
def test_hugging_face_computes_the_same_from_our_checkpoint(kind, tmp_path):
    trunk, tokens = make(kind), text(2, 200)
    (tmp_path / "config.json").write_text(json.dumps(trunk.config.to_hf()))
    state = {name: tensor.contiguous() for name, tensor in trunk.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="sdpa"
    )
    assert not any(report.values()), report
    assert theirs.num_parameters() == sum(parameter.numel() for parameter in trunk.parameters())
    with torch.no_grad():
        out = theirs(tokens, labels=tokens)
        assert mean(trunk, tokens) == pytest.approx(out.loss.item(), abs=1e-5)
        torch.testing.assert_close(trunk.next_logits(tokens), out.logits[:, -1], rtol=1e-4, atol=1e-4)
        hidden, _ = trunk.model(tokens)
        torch.testing.assert_close(hidden @ trunk.head.T, out.logits, rtol=1e-4, atol=1e-4)


@every_kind
def test_a_config_round_trips_through_hugging_faces_json(kind):
    config = config_of(kind, bos_token_id=5, eos_token_id=7, pad_token_id=None, cross_document_attention=False)
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf())), "here") == config


# ---- The loss ----


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_the_initial_loss_is_that_of_a_uniform_guess(preset, tied):
    torch.manual_seed(0)
    sizes = PRESETS[preset] | {"vocab_size": 4096, "max_position_embeddings": 64, "tie_word_embeddings": tied}
    trunk = Trunk(ModelConfig(**sizes))
    with torch.no_grad():
        assert mean(trunk, torch.randint(1, 4096, (8, 65))) == pytest.approx(math.log(4096), rel=0.02)
        assert mean(trunk, text(8, 65)) == pytest.approx(math.log(4096), rel=0.02)


@every_kind
def test_the_initial_weights_are_gpt2s(kind):
    torch.manual_seed(0)
    trunk = Trunk(config_of(kind, hidden_size=128, intermediate_size=192, initializer_range=0.03))
    for name, parameter in trunk.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == (0.0 if "bias" in name or kind == "gemma" else 1.0)).all()
            continue
        residual = name.endswith(("o_proj.weight", "down_proj.weight", "w2.weight"))
        wanted = 0.03 / math.sqrt(2 * 3) if residual else 0.03
        error = 5 / math.sqrt(2 * parameter.numel())  # five standard errors of a standard deviation
        assert parameter.std().item() == pytest.approx(wanted, rel=error)
        assert abs(parameter.mean().item()) < 5 * wanted / math.sqrt(parameter.numel())


@every_kind
def test_sums_and_nats_are_the_loss_of_each_token(kind):
    trunk, tokens = make(kind).double(), text(3, 41)
    tokens[1, 20:] = 0
    sums, nats = trunk(tokens), trunk.nats(tokens)
    hidden, _ = trunk.model(tokens[:, :-1])
    theirs = F.cross_entropy((hidden @ trunk.head.T).flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    scored = (tokens[:, 1:] != 0).flatten()
    torch.testing.assert_close(nats.flatten(), theirs * scored, rtol=1e-12, atol=1e-12)
    assert sums.nats.item() == pytest.approx(nats.sum().item(), rel=1e-12)
    assert sums.tokens.item() == 3 * 40 - 21


@every_kind
def test_all_sums_add_up_over_a_division_of_the_batch(kind):
    trunk, tokens = make(kind).double(), text(6, 33)
    tokens[2, 9:], tokens[5, 3:] = 0, 0
    load = even_load(trunk.config, tokens.device)
    if load is not None:
        load = load_of(torch.arange(load.numel()).view_as(load))
    whole, parts = trunk(tokens, load), [trunk(part, load) for part in tokens.split([1, 3, 2])]
    for name in whole._fields:
        total = sum(getattr(part, name) for part in parts)
        torch.testing.assert_close(total, getattr(whole, name), rtol=1e-11, atol=1e-11)
    once = gradients(trunk, whole.objective)
    summed = gradients(trunk, sum(part.objective for part in parts))
    torch.testing.assert_close(summed, once, rtol=1e-9, atol=1e-11)


@every_kind
@pytest.mark.parametrize("crossing", [True, False], ids=["crossing", "documents"])
def test_a_token_does_not_affect_the_loss_before_it(kind, crossing):
    trunk, tokens = make(kind, cross_document_attention=crossing), text(2, 40)
    tokens[0, 11] = 1
    nats = trunk.nats(tokens)
    for place in (1, 10, 11, 12, 25, 39):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 5) % 250 + 2
        if place < 39:
            changed[:, place + 1 :] = changed[:, place + 1 :].flip(1)
        torch.testing.assert_close(trunk.nats(changed)[:, : place - 1], nats[:, : place - 1], rtol=1e-5, atol=1e-5)
        assert (trunk.nats(changed)[:, place - 1] != nats[:, place - 1]).all()


@every_kind
def test_no_gradient_reaches_later_inputs(kind):
    trunk, tokens = make(kind), text(1, 20)
    embedded = []
    handle = trunk.model.embed_tokens.register_forward_hook(
        lambda module, inputs, out: embedded.append(out.detach().requires_grad_()) or embedded[-1]
    )
    hidden, _ = trunk.model(tokens[:, :-1])
    handle.remove()
    logits = hidden @ trunk.head.detach().T
    for place in (0, 7, 18):
        loss = F.cross_entropy(logits[0, place], tokens[0, place + 1])
        (gradient,) = torch.autograd.grad(loss, embedded[0], retain_graph=True)
        assert (gradient[0, place + 1 :] == 0).all()
        assert (gradient[0, : place + 1] != 0).any(-1).all()


@every_kind
@pytest.mark.parametrize("pad", [0, None])
def test_padding_at_the_end_adds_0(kind, pad):
    trunk = make(kind, pad_token_id=pad).double()
    tokens = text(2, 30)
    filled = F.pad(tokens, (0, 13), value=trunk.config.ignore_index)
    torch.testing.assert_close(trunk.nats(filled)[:, :29], trunk.nats(tokens), rtol=1e-11, atol=1e-11)
    assert (trunk.nats(filled)[:, 29:] == 0).all()
    ours, theirs = trunk(tokens), trunk(filled)
    for name in ours._fields:
        torch.testing.assert_close(getattr(theirs, name), getattr(ours, name), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(
        gradients(trunk, theirs.objective), gradients(trunk, ours.objective), rtol=1e-9, atol=1e-11
    )


@every_kind
@pytest.mark.parametrize("pad", [0, None])
@pytest.mark.parametrize("crossing", [True, False], ids=["crossing", "documents"])
def test_a_batch_of_padding_adds_0(kind, pad, crossing):
    trunk = make(kind, pad_token_id=pad, cross_document_attention=crossing)
    sums = trunk(torch.full((2, 17), trunk.config.ignore_index))
    assert sums.objective.item() == sums.nats.item() == sums.tokens.item() == 0
    assert not sums.expert_counts.any()
    found = gradients(trunk, sums.objective)
    assert all(gradient is not None and (gradient == 0).all() for gradient in found.values())


@every_kind
def test_documents_are_independent_without_cross_document_attention(kind):
    trunk = make(kind, cross_document_attention=False).double()
    first, second = text(1, 60)[:, :25], text(1, 60)[:, 25:]
    end = torch.tensor([[1]])
    window = torch.cat((first, end, second, end), dim=1)
    together = trunk.nats(window)
    torch.testing.assert_close(together[:, :25], trunk.nats(torch.cat((first, end), 1)), rtol=1e-10, atol=1e-10)
    alone = trunk.nats(torch.cat((second, end), dim=1))  # its first token is not a label here
    torch.testing.assert_close(
        together[:, 26:], alone, rtol=1e-6, atol=1e-6
    )  # positions are float32: cos(a + b) differs
    crossing = make(kind).double()
    assert (crossing.nats(window)[:, 26:] - together[:, 26:]).abs().max() > 1e-3
    torch.testing.assert_close(crossing.nats(window)[:, :25], together[:, :25])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@every_kind
def test_documents_as_blocks_are_the_mask(kind):
    """Blocks of 128 tokens, for flex_attention: within a document, across its end, and without any pair that may attend.

    The gradients are compared on a GPU (tests/gpu): on a CPU flex_attention has no backward pass.
    """
    trunk, tokens = make(kind, cross_document_attention=False).double(), text(2, 400)
    tokens[0, [3, 127, 128, 300]], tokens[1, [130, 131, 399]] = 1, 1
    found = []
    for fused in (False, True):
        trunk.model.fused_document_mask = fused
        with torch.compiler.set_stance("force_eager"):
            found.append(trunk.nats(tokens))
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)
    crossing = make(kind).double().nats(tokens)
    assert (crossing - found[1]).abs().max() > 1e-3


# ---- Generation ----


@every_kind
@pytest.mark.parametrize("crossing", [True, False], ids=["crossing", "documents"])
def test_the_cache_does_not_change_the_logits(kind, crossing):
    trunk, tokens = make(kind, cross_document_attention=crossing).double(), text(2, 24)
    tokens[0, 3], tokens[1, 9], tokens[0, 15] = 1, 1, 1  # documents end within the prompt, and after it
    wanted = [trunk.next_logits(tokens[:, :length]) for length in range(1, 25)]
    for pieces in ([1] * 24, [12] + [1] * 12, [5, 7, 1, 11], [24]):
        cache, done = [], 0
        for piece in pieces:
            logits = trunk.next_logits(tokens[:, done : done + piece], cache)
            done += piece
            torch.testing.assert_close(logits, wanted[done - 1], rtol=1e-10, atol=1e-10)


# ---- Experts ----


def test_an_expert_without_tokens_has_a_zero_gradient():
    trunk = make("mixtral", num_experts_per_tok=1)
    with torch.no_grad():
        for layer in trunk.model.layers:
            layer.block_sparse_moe.gate.weight.zero_()  # a tie: topk takes one and the same expert for every token
    sums = trunk(text(2, 20))
    assert ((sums.expert_counts > 0).sum(-1) == 1).all()
    found = gradients(trunk, sums.nats)
    busy = sums.expert_counts.argmax(-1).tolist()
    for layer, expert in enumerate(busy):
        for index in range(4):
            for name in ("w1", "w2", "w3"):
                gradient = found[f"model.layers.{layer}.block_sparse_moe.experts.{index}.{name}.weight"]
                assert gradient.any() == (index == expert)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_experts_are_those_of_a_loop_over_tokens(top_k):
    """Values and gradients, also with an expert that no token chooses."""
    config = config_of("mixtral", num_experts_per_tok=top_k)
    torch.manual_seed(0)
    sparse = SparseFeedForward(config).double()
    with torch.no_grad():
        sparse.gate.weight[3] = -sparse.gate.weight[:3].sum(0) - 3  # far from the others for half of all inputs
    x, scored = torch.randn(2, 9, 32, dtype=torch.float64).abs().requires_grad_(), torch.rand(2, 9) < 0.8
    load = torch.rand(4).double()

    def loop():
        rows = []
        for row in x.flatten(0, 1):
            p = (sparse.gate.weight @ row).softmax(0)
            best = p.topk(top_k).indices.tolist()
            rows.append(sum(p[e] / p[best].sum() * sparse.experts[e](row) for e in best))
        return torch.stack(rows).view_as(x)

    y, _, _, counts = sparse(x, scored, load)
    assert (counts[3] == 0) == (top_k < 4)
    torch.testing.assert_close(y, loop(), rtol=1e-12, atol=1e-13)
    wanted = {"x": x, **dict(sparse.named_parameters())}
    towards = torch.randn_like(x)
    for value, other in ((y, loop()), (y.square(), loop().square())):
        found = torch.autograd.grad((value * towards).sum(), wanted.values(), retain_graph=True)
        expected = torch.autograd.grad((other * towards).sum(), wanted.values(), allow_unused=True)
        for name, ours, theirs in zip(wanted, found, expected, strict=True):
            theirs = torch.zeros_like(ours) if theirs is None else theirs
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13, msg=name)


@pytest.mark.parametrize("module", ["ffn", "attention+ffn", "narrow"])
@pytest.mark.parametrize("top_k", [0, 1])
def test_modules_are_assembled_on_a_mixture_of_experts(module, top_k):
    """New modules change nothing, so neither does their mixture."""
    trunk, tokens = make("mixtral"), text(2, 30)
    new = make("mixtral")
    names = plug_in(new, module, [1])
    tensors = {name: new.state_dict()[name] for name in names}
    modules = {name: with_module(trunk, tensors, module, [1]) for name in ("one", "other")}
    mixture = Mixture(trunk, modules, UniformRouter(torch.full((3,), 1 / 3)), top_k=top_k)
    torch.testing.assert_close(mixture.nats(tokens), trunk.nats(tokens), rtol=1e-5, atol=1e-5)


@every_kind
@pytest.mark.parametrize("top_k", [0, 1, 2])
def test_copies_of_the_attention_are_assembled_to_the_trunk(kind, top_k):
    """In one pass, and with a cache: each candidate attends with its own queries, keys and values."""
    trunk, tokens = make(kind, cross_document_attention=False).double(), text(2, 30)
    tokens[0, 12] = 1
    new = make(kind)
    names = plug_in(new, "attention+ffn", [0, 2])
    tensors = {name: new.state_dict()[name].double() for name in names}
    modules = {name: with_module(trunk, tensors, "attention+ffn", [0, 2]) for name in ("one", "other")}
    mixture = Mixture(trunk, modules, UniformRouter(torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)), top_k=top_k)
    assert mixture.attention_by == mixture.changed_by == [(1, 2), (), (1, 2)]
    torch.testing.assert_close(mixture.nats(tokens), trunk.nats(tokens), rtol=1e-9, atol=1e-9)
    cache: list = []
    for start, end in ((0, 9), (9, 10), (10, 25)):
        found = mixture.next_logits(tokens[:, start:end], cache)
        expected = trunk.next_logits(tokens[:, :end]).log_softmax(-1)
        torch.testing.assert_close(
            found.double(), expected, rtol=1e-5, atol=1e-5
        )  # its log probabilities are in float32


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_counts_are_of_the_scored_tokens(top_k):
    trunk, tokens = make("mixtral", num_experts_per_tok=top_k), text(3, 30)
    tokens[1, 12:] = 0
    sums = trunk(tokens)
    assert sums.expert_counts.sum(-1).tolist() == [top_k * sums.tokens.item()] * 3
    torch.testing.assert_close(load_of(sums.expert_counts).sum(-1), torch.ones(3))
    assert (load_of(torch.zeros(3, 4)) == 0).all()
    assert load_of(torch.zeros(0, 0)) is None
    assert even_load(config_of("llama"), tokens.device) is None


def test_router_losses_have_the_weights_of_the_config():
    tokens = text(2, 30)
    trunk = make("mixtral", router_aux_loss_coef=0.5, router_z_loss_coef=0.25).double()
    sums = trunk(tokens)
    assert sums.objective.item() == pytest.approx((sums.nats + 0.5 * sums.balance + 0.25 * sums.z).item(), rel=1e-12)
    # With an even load the balance is 1 per token and layer for any router.
    assert sums.balance.item() == pytest.approx(sums.tokens.item(), rel=1e-6)
    dense = make("llama")(tokens)
    assert dense.objective.item() == dense.nats.item()
    assert dense.balance.item() == dense.z.item() == 0


# ---- What is trained ----


@pytest.mark.parametrize("kind", ["llama", "tied", "qwen2", "qwen3", "mixtral", "mixtral_tied"])
@pytest.mark.parametrize("module", [None, "ffn", "ffn+head", "attention+ffn"])
def test_each_trained_parameter_is_in_one_group(kind, module):
    trunk = make(kind)
    if module:
        plug_in(trunk, module, [1])
    groups = parameter_groups(trunk, 0.1)
    names = {id(parameter): name for name, parameter in trunk.named_parameters()}
    grouped = [names[id(parameter)] for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(name for name, p in trunk.named_parameters() if p.requires_grad)
    bare = {names[id(p)] for group in groups if not group["weight_decay"] for p in group["params"]}
    assert bare == {name for name in grouped if "norm" in name or "bias" in name or "embed" in name}
    assert {group["weight_decay"] for group in groups} <= {0.1, 0.0}


# A product added in place, which torch's counter does not know.
ADDED = {torch.ops.aten.addmm_: lambda total, a, b, *_, **__: 2 * a[0] * a[1] * b[1]}
PRODUCTS = ("mm", "addmm", "addmm_")  # of weights; those of attention are bmm, or sdpa's own


@pytest.mark.parametrize("kind", ["llama", "tied", "qwen2", "mixtral"])
@pytest.mark.parametrize(
    "trained",
    [
        *("all", "ffn 0", "ffn 1", "ffn 2", "ffn 0,2", "ffn+head 2", "embedding", "nothing"),
        *(
            "attention+ffn 0",
            "attention+ffn 2",
            "attention+ffn+head 1,2",
            "narrow 1",
            "narrow+head 2",
            "lora 0",
            "lora 2",
            "lora 1,2",
            "lora+head 2",
            "expert 0",
            "expert 2",
        ),
    ],
)
def test_flops_are_those_that_torch_counts(kind, trained):
    trunk, tokens = make(kind), text(2, 33)
    if trained in ("embedding", "nothing"):
        trunk.requires_grad_(False)
        trunk.model.embed_tokens.requires_grad_(trained == "embedding")
    elif trained != "all":
        module, layers = trained.split()
        if trunk.config.num_local_experts and module.startswith(("lora", "expert")):
            pytest.skip("lora and expert need a dense trunk")
        plug_in(trunk, module, chosen_layers(layers, 3))
    with FlopCounterMode(display=False, custom_mapping=ADDED) as counter:
        objective = trunk(tokens).nats
        if trained != "nothing":
            objective.backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for operation, count in counts.items() if str(operation).split(".")[-1] in PRODUCTS)
    # Attention: forward in three layers, backward in those at or above the lowest that a gradient reaches.
    module, _, layers = trained.partition(" ")
    lowest = 0 if module in ("all", "embedding") else int(layers[0]) + ("attention" not in module) if layers else 3
    attention = (3 + 2 * (3 - lowest)) * 2 * 32 * 4 * 8
    # The change of a low-rank head is computed once for all tokens: forward, and the gradients of both its factors.
    once = 3 * 2 * 258 * 16 * 32 if module == "lora+head" else 0
    assert trunk.flops_per_token(32) - attention == (products - once) / 64


# ---- Memory ----


def saved_bytes(trunk, tokens):
    """Bytes of the different tensors that the graph of one forward pass keeps, without the parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in trunk.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        sums = trunk(tokens)
    return sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in own), sums


@every_kind
@pytest.mark.parametrize("module", [None, "ffn"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
def test_activation_checkpointing_keeps_less_and_changes_no_bit(kind, module, autocast):
    trunk, tokens = make(kind, num_hidden_layers=6, cross_document_attention=False), text(4, 65)
    if module:
        plug_in(trunk, module, [2, 4])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        usual, sums = saved_bytes(trunk, tokens)
        expected = gradients(trunk, sums.objective)
        trunk.activation_checkpointing = True
        less, sums_again = saved_bytes(trunk, tokens)
        found = gradients(trunk, sums_again.objective)
    assert torch.equal(sums.objective, sums_again.objective)
    for name, gradient in expected.items():
        assert (gradient is None and found[name] is None) or torch.equal(gradient, found[name]), name
    assert less < 0.4 * usual


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rotation_has_torchs_bits_and_keeps_the_angles_alone(dtype):
    draw = torch.Generator().manual_seed(0)
    x, upstream = torch.randn(2, 3, 5, 7, 8, generator=draw).to(dtype)
    cos, sin = (part.to(dtype) for part in rotary(make("tied").config, 7))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        found = rotate(x.requires_grad_(), cos, sin)
    assert set(kept) == {cos.shape}
    first, second = x.chunk(2, dim=-1)
    expected = x * cos + torch.cat((-second, first), dim=-1) * sin
    assert torch.equal(found, expected)
    assert torch.equal(*(torch.autograd.grad(y, x, upstream)[0] for y in (found, expected)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gated_product_has_torchs_bits_and_keeps_its_two_factors_alone(dtype):
    gate, up, upstream = torch.randn(3, 5, 7, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    pair = [gate.requires_grad_(), up.requires_grad_()]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        found = gated_product(*pair)
    assert kept == [gate.data_ptr(), up.data_ptr()]
    expected = F.silu(gate) * up
    assert torch.equal(found, expected)
    for mine, other in zip(
        torch.autograd.grad(found, pair, upstream), torch.autograd.grad(expected, pair, upstream), strict=True
    ):
        assert torch.equal(mine, other)


def test_the_gradient_of_the_gated_product_is_its_derivative():
    pair = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(gated_product, [part.requires_grad_() for part in pair.unbind()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_last_matrix_of_a_feed_forward_has_torchs_bits_and_keeps_no_product(dtype):
    draw = torch.Generator().manual_seed(0)
    gate, up = torch.randn(2, 5, 7, 48, generator=draw).to(dtype)
    layer = GatedLinear(48, 16, bias=False).to(dtype)
    upstream = torch.randn(5, 7, 16, generator=draw).to(dtype)
    inputs = [gate.requires_grad_(), up.requires_grad_(), layer.weight]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        found = layer(gate, up)
    assert kept == [x.data_ptr() for x in inputs]
    expected = F.linear(F.silu(gate) * up, layer.weight)
    assert torch.equal(found, expected)
    gradients = [torch.autograd.grad(y, inputs, upstream) for y in (found, expected)]
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_norm_is_torchs_and_keeps_its_input_and_one_number_a_row(dtype):
    draw = torch.Generator().manual_seed(0)
    x, upstream = torch.randn(2, 5, 7, 48, generator=draw).to(dtype)
    layer = RMSNorm(48, 1e-3).to(dtype)
    torch.nn.init.normal_(layer.weight, 1, 0.3, generator=draw)
    inputs = [x.requires_grad_(), layer.weight]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        found = layer(x)
    assert kept == [x.numel(), 48, 5 * 7]
    expected = F.rms_norm(x, (48,), layer.weight, 1e-3)
    assert found.dtype == dtype and torch.allclose(found, expected, rtol=8 * torch.finfo(dtype).eps, atol=0)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact = torch.autograd.grad(F.rms_norm(wide[0], (48,), wide[1], 1e-3), wide, upstream.double())
    for mine, other in zip(torch.autograd.grad(found, inputs, upstream), exact, strict=True):
        assert mine.dtype == dtype
        assert (mine - other).abs().max() < 8 * torch.finfo(dtype).eps * other.abs().max()


@pytest.mark.parametrize("reads", ["both", "x", "weight"])
def test_the_gradient_of_a_norm_is_its_derivative(reads):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, dtype=torch.float64, generator=draw).requires_grad_(reads != "weight")
    weight = torch.randn(4, dtype=torch.float64, generator=draw).requires_grad_(reads != "x")
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 1e-3), [x, weight])


@pytest.mark.parametrize(
    "module",
    ["ffn", "ffn+head", "attention+ffn", "narrow", "narrow+head", "lora", "lora+head", "expert", "expert+head"],
)
def test_a_trunk_stored_in_bf16_trains_modules_in_float32(module):
    """Under autocast its loss is that of a float32 trunk with the same rounded matrices."""
    tokens = text(2, 60)
    rounded, low = make("qwen2"), make("qwen2")
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.bfloat16() if parameter.ndim > 1 else parameter)
        for parameter in low.parameters():
            parameter.data = parameter.data.bfloat16() if parameter.ndim > 1 else parameter.data
    for trunk in (rounded, low):
        torch.manual_seed(2)
        plug_in(trunk, module, [1, 2], rank=4)
    for name, parameter in low.named_parameters():
        expected = torch.bfloat16 if parameter.ndim > 1 and not parameter.requires_grad else torch.float32
        assert parameter.dtype == expected, name
    with torch.autocast("cpu", torch.bfloat16):
        sums, reference = low(tokens), rounded(tokens)
        assert sums.nats.dtype == torch.float32
        assert sums.nats.item() == pytest.approx(reference.nats.item(), rel=1e-3)
        found, expected = gradients(low, sums.nats), gradients(rounded, reference.nats)
    for name, gradient in expected.items():
        if gradient is not None:
            assert found[name].dtype == torch.float32
            assert (found[name] - gradient).norm() <= 0.05 * gradient.norm() + 1e-6, name


# ---- Modules ----


@pytest.mark.parametrize("kind", ["llama", "tied", "qwen2", "qwen3", "mixtral", "mixtral_tied"])
@pytest.mark.parametrize("module", ["ffn", "ffn+head", "attention+ffn", "attention+ffn+head"])
@pytest.mark.parametrize("layers", [[0], [1, 2], [0, 1, 2]])
def test_a_new_module_changes_nothing_and_has_the_trunks_names(kind, module, layers):
    trunk, tokens = make(kind), text(2, 40)
    before, state = trunk.nats(tokens), {name: t.clone() for name, t in trunk.state_dict().items()}
    names = plug_in(trunk, module, layers)
    assert torch.equal(trunk.nats(tokens), before)
    feed_forward = "block_sparse_moe" if trunk.config.num_local_experts else "mlp"
    parts = (feed_forward, "self_attn") if "attention" in module else (feed_forward,)
    wanted = [name for name in state if name.startswith(tuple(f"model.layers.{i}.{p}." for i in layers for p in parts))]
    wanted += ["lm_head.weight"] * (module.endswith("+head") and "lm_head.weight" not in wanted)
    assert sorted(names) == sorted(wanted)
    assert sorted(names) == sorted(name for name, p in trunk.named_parameters() if p.requires_grad)
    if module.endswith("+head"):
        assert trunk.lm_head.weight.data_ptr() != trunk.model.embed_tokens.weight.data_ptr()
        assert not trunk.config.tie_word_embeddings
    found = gradients(trunk, trunk(tokens).nats)
    assert {name for name, gradient in found.items() if gradient is not None} == set(names)


@pytest.mark.parametrize("module", ["ffn", "ffn+head"])
@pytest.mark.parametrize("layers", [[0], [1], [2], [1, 2]])
@pytest.mark.parametrize("kind", ["tied", "mixtral"])
def test_no_gradient_graph_below_the_lowest_module(kind, module, layers):
    trunk, seen = make(kind), {}
    plug_in(trunk, module, layers)
    for number, layer in enumerate(trunk.model.layers):
        layer.register_forward_pre_hook(lambda m, args, n=number: seen.update({f"layer {n}": args[0]}))
        layer.feed_forward.register_forward_pre_hook(lambda m, args, n=number: seen.update({f"ffn {n}": args[0]}))
    trunk(text(2, 10))
    lowest = min(layers)
    for number in range(3):
        assert seen[f"layer {number}"].requires_grad == (number > lowest)
        assert seen[f"ffn {number}"].requires_grad == (number > lowest)
        if number <= lowest:
            assert seen[f"layer {number}"].grad_fn is None
            assert seen[f"ffn {number}"].grad_fn is None


@pytest.mark.parametrize(
    ("spec", "layers"),
    [("all", [0, 1, 2, 3]), ("top:1", [3]), ("top:4", [0, 1, 2, 3]), ("0", [0]), ("3,1", [1, 3]), ("2, 2,0", [0, 2])],
)
def test_layers_are_chosen_in_three_ways(spec, layers):
    assert chosen_layers(spec, 4) == layers


@pytest.mark.parametrize(
    "spec", ["", "top:", "top:0", "top:5", "top:-1", "top:x", "4", "-1", "1,", "1;2", "bottom", "1.0"]
)
def test_invalid_layers_are_refused(spec):
    with pytest.raises(UserError, match=f"--layers {spec} "):
        chosen_layers(spec, 4)


def module_of(trunk, kind, layers):
    """Tensors of a module of that kind, all of them changed."""
    copy = make("tied", seed=1)
    names = plug_in(copy, kind, layers)
    return {name: copy.state_dict()[name].clone() for name in names}


@pytest.mark.parametrize("kind", ["ffn", "ffn+head", "attention+ffn"])
def test_put_in_replaces_the_trunks_tensors(kind):
    trunk, tokens = make("tied"), text(2, 30)
    tensors = module_of(trunk, kind, [0, 2])
    wanted = make("tied")
    if kind == "ffn+head":
        untie(wanted)
    wanted.load_state_dict(wanted.state_dict() | tensors)
    put_in(trunk, tensors, kind, [0, 2])
    assert torch.equal(trunk.nats(tokens), wanted.nats(tokens))
    assert not torch.equal(trunk.nats(tokens), make("tied").nats(tokens))
    assert trunk.config == dataclasses.replace(config_of("tied"), tie_word_embeddings=not kind.endswith("+head"))


LAST = "model.layers.2.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tensors: tensors.pop(LAST), "missing .*2.mlp.up_proj"),
        (lambda tensors: tensors.update({"lm_head.weight": torch.zeros(258, 32)}), "surplus .*lm_head"),
        (lambda tensors: tensors.update({LAST: tensors[LAST].T.contiguous()}), r"2.mlp.up_proj.* \(32, 48\)"),
    ],
    ids=["missing", "surplus", "shape"],
)
def test_a_module_that_does_not_match_is_refused_and_changes_nothing(change, named):
    trunk = make("tied")
    tensors, before = module_of(trunk, "ffn", [1, 2]), {name: t.clone() for name, t in trunk.state_dict().items()}
    change(tensors)
    with pytest.raises(UserError, match=named):
        put_in(trunk, tensors, "ffn", [1, 2])
    assert all(torch.equal(tensor, before[name]) for name, tensor in trunk.state_dict().items())


@pytest.mark.parametrize(("kind", "layers"), [("adapter", [0]), ("ffn", [3]), ("ffn", [0, -1])])
def test_an_unknown_kind_or_layer_is_refused(kind, layers):
    trunk = make("tied")
    with pytest.raises(UserError, match=r"adapter|layers \["):
        plug_in(trunk, kind, layers)
    assert all(parameter.requires_grad for parameter in trunk.parameters())


def test_the_loss_is_the_same_in_one_chunk_and_in_several():
    trunk, tokens = make("llama").double(), text(3, CHUNK_ROWS // 2 + 2)
    assert trunk(tokens).nats.item() == pytest.approx(sum(trunk(row[None]).nats.item() for row in tokens), rel=1e-12)
