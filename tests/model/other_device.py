"""Every forward, backward, router and generation on a device that is not the CPU, and that refuses to mix with it.

Run by test_other_device.py in a process of its own.
"""

import types

import pytest
import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from forge_common.generation.sampling import Sampling, sample
from forge_common.model.config import ModelConfig
from forge_common.model.modules import plug_in
from forge_common.model.trunk import Trunk
from forge_common.routing import statistics
from forge_common.routing.mixture import Mixture, with_module
from forge_common.routing.routers import ContextRouter, LearnedRouter, RidgeRouter, Tuning, UniformRouter

NAME = "other"
# What torch itself lets a tensor on the CPU take part in: copies, and an index.
MAY_MIX = ("aten::copy_", "aten::_to_copy", "aten::index.Tensor", "aten::index_put_", "aten::_index_put_impl_")


class OtherTensor(torch.Tensor):
    """Says that it is on the device; `held`, on the CPU, has its numbers."""

    @staticmethod
    def __new__(cls, held, requires_grad=False):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
            requires_grad=requires_grad,
        )
        made.held = held
        return made

    def tolist(self):
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


def dispatch(func, args, kwargs):
    """Runs an operation on the numbers. RuntimeError where a tensor of the device meets one of the CPU that is no scalar."""
    flat, spec = tree_flatten((args, kwargs))
    there = any(isinstance(value, OtherTensor) for value in flat)
    name = str(func._schema.name) + (f".{func._schema.overload_name}" if func._schema.overload_name else "")
    if there and not name.startswith(MAY_MIX):
        for value in flat:
            if isinstance(value, torch.Tensor) and not isinstance(value, OtherTensor) and value.dim():
                raise RuntimeError(f"{name} mixes the devices: a tensor {tuple(value.shape)} is on the CPU")
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == NAME
        flat, spec = tree_flatten((args, {**kwargs, "device": torch.device("cpu")}))
    bare_args, bare_kwargs = tree_unflatten([v.held if isinstance(v, OtherTensor) else v for v in flat], spec)
    result = func(*bare_args, **bare_kwargs)
    known = {id(value.held): value for value in flat if isinstance(value, OtherTensor)}

    def wrap(value):
        if not isinstance(value, torch.Tensor):
            return value
        return known[id(value)] if id(value) in known else OtherTensor(value)

    return tree_map(wrap, result) if there else result


class OtherDevice(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


def in_autocast(operation):
    """The operation in bf16, as autocast runs it on a GPU."""

    def low(value):
        wide = isinstance(value, torch.Tensor) and value.dtype == torch.float32
        return value.to(torch.bfloat16) if wide else value

    def run(*args, **kwargs):
        key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
        with torch._C._ExcludeDispatchKeyGuard(key):
            return operation(*map(low, args), **{name: low(value) for name, value in kwargs.items()})

    return run


@pytest.fixture(scope="module", autouse=True)
def other():
    class Backend(backend_registration._DummyBackendModule):
        @staticmethod
        def get_amp_supported_dtype():
            return [torch.bfloat16, torch.float16]

    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
    library = torch.library.Library("aten", "IMPL")  # for what torch does below Python

    def empty_strided(size, stride, dtype=None, **_):
        return OtherTensor(torch.empty_strided(size, stride, dtype=dtype))

    def copy_from(source, target, non_blocking=False):
        target.held.copy_(source.held if isinstance(source, OtherTensor) else source)
        return target

    library.impl("empty_strided", empty_strided, "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in ("linear", "matmul", "mm", "scaled_dot_product_attention"):
        library.impl(name, in_autocast(getattr(torch.ops.aten, name)), "AutocastPrivateUse1")
    with OtherDevice():
        yield torch.device(NAME, 0)
    library._destroy()


SIZES = {"vocab_size": 258, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
KINDS = {
    "llama": {"tie_word_embeddings": False},
    "documents": {"cross_document_attention": False},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "mixtral": {"num_local_experts": 4},
}
MODULES = ("ffn", "ffn+head", "narrow", "narrow+head", "lora", "lora+head", "expert")
CASES = [(kind, None, False) for kind in KINDS] + [("llama", module, True) for module in MODULES]
CASES += [("documents", None, True), ("mixtral", None, True), ("mixtral", "narrow", False)]
ROUTED = [
    ("context", 0, False),
    ("context", 1, False),
    ("learned", 0, False),
    ("ridge", 0, False),
    ("uniform", 1, False),
]
ROUTED += [("context", 0, True), ("learned", 0, True), ("ridge", 1, True)]


def make(kind="llama", module=None):
    torch.manual_seed(0)
    trunk = Trunk(ModelConfig(**SIZES | KINDS[kind]))
    if module:
        plug_in(trunk, module, [1], rank=2)
    return trunk


def tokens(batch=2, length=20):
    draw = torch.Generator().manual_seed(3)
    drawn = torch.randint(2, 258, (batch, length), generator=draw)
    drawn[0, 7], drawn[-1, 15:] = 1, 0
    return drawn


def test_the_device_refuses_to_mix(other):
    here, there = torch.ones(3), torch.ones(3, device=other)
    assert there.device.type == NAME and (there + there).device.type == NAME
    assert (there.sum() * torch.tensor(2.0)).item() == 6
    with pytest.raises(RuntimeError, match=r"mixes the devices: a tensor \(3,\) is on the CPU"):
        here + there


@pytest.mark.parametrize(("kind", "module", "low"), CASES)
def test_forward_and_backward(kind, module, low, other):
    """The gradients of the device are those of the CPU. low: under autocast, with activation checkpointing."""
    found = []
    for device in (torch.device("cpu"), other):
        trunk = make(kind, module).to(device)
        trunk.activation_checkpointing = low
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            sums = trunk(tokens().to(device))
        sums.objective.backward()
        found.append({name: p.grad.cpu() for name, p in trunk.named_parameters() if p.grad is not None})
        found[-1]["objective"] = sums.objective.detach().cpu()
    bound = {"rtol": 0.02, "atol": 0.02} if low else {"rtol": 1e-5, "atol": 1e-6}
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, **bound, msg=name)


def counts(seed):
    draw = torch.Generator().manual_seed(seed)
    sizes = {"unigrams": 258, "bigrams": statistics.BIGRAM_BUCKETS}
    tensors = {name: torch.randint(0, 90, (size,), dtype=torch.uint8, generator=draw) for name, size in sizes.items()}
    x = torch.randn(2, 40, 16, generator=draw)
    return tensors | {"second": (x.transpose(1, 2) @ x / 40).half(), "first": x.mean(1).half()}


def assembled(router, top_k):
    """Two modules on a trunk, as artifacts.assembled makes it."""
    trunk = make()
    modules = {}
    first = "ffn+head" if router == "ridge" else "attention+ffn+head"
    for seed, kind in enumerate(["expert", "expert"] if router == "learned" else [first, "lora"]):
        plain = make(module=kind)
        names = [name for name, parameter in plain.named_parameters() if parameter.requires_grad]
        tensors = {name: plain.state_dict()[name] + 0.01 * (1 + seed) for name in names}
        modules[f"module {seed}"] = with_module(trunk, tensors, kind, [1], rank=2)
    prior = torch.full((3,), 1 / 3)
    every = [counts(seed) for seed in range(3)]
    if router == "context":
        solved = ContextRouter(every, prior, 1, Tuning())
    elif router == "ridge":
        solved = RidgeRouter(every[1:], prior, 16, Tuning())
    elif router == "learned":
        rows = [[getattr(layer.addition, "row", None) for layer in m.model.layers] for m in modules.values()]
        solved = LearnedRouter(rows, prior)
    else:
        solved = UniformRouter(prior)
    return Mixture(trunk, modules, solved, top_k=top_k)


@pytest.mark.parametrize(("router", "top_k", "autocast"), ROUTED)
def test_routers(router, top_k, autocast, other):
    found = []
    for device in (torch.device("cpu"), other):
        model = assembled(router, top_k).to(device).eval()
        window = tokens().to(device)
        before = torch.full((2, 5), 9, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            found.append([model.nats(window).cpu(), model.nats(window, before).cpu()])
            cache: list = []
            for part in window.split(12, dim=1):
                found[-1].append(model.next_logits(part, cache).cpu())
    for ours, expected in zip(*found, strict=True):
        bound = {"rtol": 0.1, "atol": 0.2} if autocast else {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(ours, expected, **bound)


@pytest.mark.parametrize("router", [None, "context", "ridge"])
def test_greedy_generation_is_that_of_the_cpu(router, other):
    """At temperature 0: the device has no random numbers of its own."""
    settings = Sampling(temperature=0, max_new_tokens=6)
    found = []
    for device in (torch.device("cpu"), other):
        model = (assembled(router, 0) if router else make()).to(device).eval()
        found.append(list(sample(model, [1, 5, 9], settings, types.SimpleNamespace(device=device))))
    assert found[0] == found[1] and len(found[0]) == 6


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_moments_are_those_of_the_cpu(kind, other):
    trunk = make(kind)
    documents = [tokens(1, 40)[0].numpy() for _ in range(2)]
    here, there = (
        statistics.moments(trunk.config, trunk.state_dict(), documents, 16, d) for d in (torch.device("cpu"), other)
    )
    for name in here:
        torch.testing.assert_close(there[name], here[name], rtol=1e-3, atol=1e-3)
