"""torch.compile, as the launcher asks for it: the same training, checkpoints and artifacts, under the names of the model."""

import json
import subprocess
import sys

import launch
import pytest
import torch
from launch import MORE, same_run

from forge_common.loss import head_cross_entropy
from forge_common.model.config import ModelConfig
from forge_common.model.gated import gated_product
from forge_common.model.low_rank import LowRankLinear
from forge_common.model.modules import plug_in
from forge_common.model.trunk import Trunk

# The backend that only runs the graphs that were captured, with torch's own operations: the same numbers, bit for bit.
EAGER = (*launch.LAUNCH, "--dynamo_backend", "eager")
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "eos_token_id": 1}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}


@pytest.fixture(scope="module")
def compiled(straight, shared, tmp_path_factory):
    """A run resumed with torch.compile from the sixth update of one without, and what it printed."""
    folder = tmp_path_factory.mktemp("compiled") / "run"
    launch.copy_until(straight, folder, 6)
    return folder, shared(folder, *MORE, launcher=EAGER, TORCH_LOGS="recompiles")


def test_a_run_is_continued_and_published_compiled(compiled, straight):
    """Weights, moments, artifact and log are those of the run without torch.compile."""
    folder, printed = compiled
    assert "resumed" in printed and "read back and verified" in printed
    same_run(straight, folder)
    assert not any("_orig_mod" in name for name in launch.load_file(folder / "trunk" / "model.safetensors"))


def test_a_compiled_run_is_continued_without_torch_compile(compiled, straight, shared, tmp_path):
    launch.copy_until(compiled[0], tmp_path / "run", 9)
    shared(tmp_path / "run", *MORE)
    same_run(straight, tmp_path / "run")


def test_no_batch_of_a_validation_compiles_again(compiled):
    """The last batch has fewer windows. torch reports what it compiles again, and why."""
    folder, printed = compiled
    windows = launch.rows(folder, "val/loss")[0]["val/tokens"] / 256
    assert windows % 16, "the held-out windows fill their last batch: this shows nothing"
    assert "Recompiling function forward" in printed and "grad_mode" in printed, (
        "once without gradients, once with them"
    )
    assert printed.count("Recompiling function forward") == 1 and "size mismatch" not in printed, printed


def test_a_module_is_published_compiled(module, tmp_path):
    """The same module as without torch.compile, with the same losses before and after."""
    for name, backend in (("plain", "NO"), ("compiled", "EAGER")):
        module(tmp_path / name, "--steps", 3, ACCELERATE_DYNAMO_BACKEND=backend)
    plain, compiled = (tmp_path / name / "module" for name in ("plain", "compiled"))
    tensors = [launch.load_file(folder / "module.safetensors") for folder in (plain, compiled)]
    assert launch.same_bits(*tensors)
    assert (plain / "module.json").read_text() == (compiled / "module.json").read_text()


@pytest.mark.parametrize(
    ("experts", "kind"),
    [(0, kind) for kind in ("", "ffn+head", "attention+ffn", "narrow", "lora+head", "expert+head")]
    + [(4, kind) for kind in ("", "ffn+head", "narrow")],
)
def test_compiled_gradients_are_those_without_torch_compile(experts, kind):
    """Of a trunk, dense and with experts, and of every kind of module."""
    torch.manual_seed(0)
    trunk = Trunk(ModelConfig(**SIZES, num_local_experts=experts))
    if kind:
        plug_in(trunk, kind, [1], width=16, rank=4, alpha=4, dropout=0.0)
        for parameter in trunk.parameters():  # B of a low-rank change is 0 at first, and so is the gradient of A
            parameter.data += 0.01 * torch.randn_like(parameter)
    trained = [parameter for parameter in trunk.parameters() if parameter.requires_grad]
    tokens = torch.randint(2, 64, (2, 33))
    torch._dynamo.reset()
    compiled = torch.compile(trunk, backend="aot_eager")
    expected, found = (torch.autograd.grad(model(tokens).objective, trained) for model in (trunk, compiled))
    for mine, other in zip(found, expected, strict=True):
        assert other.any()
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


def test_compiled_blocks_of_documents_have_the_gradients_of_the_mask(monkeypatch):
    """What a GPU trains with in 16 bits (run/kernels.py), with torch's own operations, which have a backward pass."""
    flex_attention = sys.modules["torch.nn.attention.flex_attention"]
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)  # refuses a CPU: it lacks the kernel
    torch.manual_seed(0)
    trunk = Trunk(ModelConfig(**SIZES | {"max_position_embeddings": 256}, cross_document_attention=False))
    torch._dynamo.reset()
    compiled = torch.compile(trunk, backend="aot_eager")
    for _ in range(2):  # other documents: the mask is no constant of the graph
        tokens = torch.randint(2, 64, (2, 257))
        tokens[torch.rand(tokens.shape) < 0.02] = 1
        trunk.model.fused_document_mask = False
        expected = torch.autograd.grad(trunk(tokens).objective, [*trunk.parameters()])
        trunk.model.fused_document_mask = True
        found = torch.autograd.grad(compiled(tokens).objective, [*trunk.parameters()])
        for mine, other in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


@pytest.mark.parametrize(
    ("name", "result"),
    [
        ("the head's loss", lambda x: head_cross_entropy(x, x, torch.arange(8), -100)),
        ("a gated product", lambda x: gated_product(x, x)),
        ("a low-rank product", lambda x: LowRankLinear(torch.nn.Linear(8, 8), 2, 2.0, 0.0)(x)),
    ],
)
def test_no_function_returns_a_tensor_that_it_changed_in_place(name, result):
    """torch.compile of torch 2.11 takes it for a constant, whose gradient is 0, unless it is a view.

    (Not so where only views of it are changed, as in a rotation.)
    """
    tensor = result(torch.randn(8, 8, requires_grad=True))
    assert tensor.grad_fn, name
    assert tensor._version == 0 or tensor._is_view(), name


@pytest.mark.soak
def test_inductor_trains_the_same(straight, shared, module, tmp_path):
    """The compiler itself, with an empty cache and little patience for a standstill. Float32, other kernels: weights to 2e-3."""
    inductor = (*launch.LAUNCH, "--dynamo_backend", "inductor")
    cache = str(tmp_path / "inductor")
    folder = tmp_path / "run"
    printed = shared(folder, *MORE, "--hang-timeout", 20, launcher=inductor, TORCHINDUCTOR_CACHE_DIR=cache)
    assert "read back and verified" in printed
    assert launch.difference(launch.weights(straight, launch.STEPS), launch.weights(folder, launch.STEPS)) < 2e-3
    one, other = (launch.rows(run, "val/loss")[-1]["val/loss"] for run in (straight, folder))
    assert one == pytest.approx(other, rel=1e-4)
    for name, launcher in (("plain", ()), ("compiled", inductor)):
        more = ("--steps", 3, "--hang-timeout", 20)
        module(tmp_path / name, *more, launcher=launcher, TORCHINDUCTOR_CACHE_DIR=cache)
    plain, compiled = (tmp_path / name / "module" for name in ("plain", "compiled"))
    tensors = [launch.load_file(folder / "module.safetensors") for folder in (plain, compiled)]
    assert launch.difference(*tensors) < 2e-3
    one, other = (json.loads((folder / "module.json").read_text())["losses"]["own"] for folder in (plain, compiled))
    assert one["after"] == pytest.approx(other["after"], rel=1e-4)


@pytest.mark.parametrize("script", ["train_shared.py", "train_module.py"])
def test_a_run_that_compiles_nothing_does_not_import_the_compiler(script, request, text, cache, tmp_path):
    """From the first import to the published artifact, with validation and checkpoints. It takes seconds; DTensor, which
    accelerate looks for where gradients are clipped, takes 0.4 s and 40 MiB.
    """
    code = f"""
import runpy, sys
sys.argv = [{script!r}, *sys.argv[1:]]
try:
    runpy.run_path({script!r}, run_name="__main__")
except SystemExit as ended:
    assert not ended.code
print("IMPORTED", {{"torch._dynamo", "torch.distributed.tensor"}} & sys.modules.keys())
"""
    flags = [*launch.SHAPE, "--data", text]
    if script == "train_module.py":
        flags = ["--trunk", request.getfixturevalue("trunk"), "--name", "text", "--data", text, "--general-tokens", 640]
    flags += [*launch.SIZES, "--steps", 2, "--output-dir", tmp_path, "--cache-dir", cache]
    line = [sys.executable, "-c", code, *map(str, flags)]
    environment = launch.environment(ACCELERATE_USE_CPU="true")
    done = subprocess.run(line, cwd=launch.ROOT, env=environment, text=True, capture_output=True, check=False)
    assert done.stdout.rstrip().endswith("IMPORTED set()"), done.stdout[-300:] + done.stderr[-300:]
