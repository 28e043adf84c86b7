"""What the scripts promise, on one GPU: the numbers of the CPU, the same bits after a kill, and every other engine and
command.

`make gpu` runs them, started by `accelerate launch` as users do. They need a GPU with bf16.
"""

import json
import re
import subprocess
import sys

import edits
import launch
import pytest
import torch

from forge_common import plan
from forge_common.model.config import ModelConfig
from forge_common.model.trunk import Trunk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

ON_GPU = {"ACCELERATE_USE_CPU": "false"}
PRECISIONS = {"float32": "single_gpu_fp32.yaml", "bf16": "single_gpu.yaml", "fp16": "single_gpu_fp16.yaml"}
# Wide and long enough for kernels that divide their sums among blocks, in an order that changes from run to run.
SHAPE = ("--preset", "tiny", "--tokenizer", "bytes", "--hidden-size", 256, "--intermediate-size", 512)
SHAPE += ("--num-hidden-layers", 2, "--num-attention-heads", 4, "--num-key-value-heads", 2)
SIZES = ("--sequence-length", 1024, "--batch-size", 16, "--micro-batch-size", 4, "--steps", launch.STEPS)
EVERY = ("--save-every", 1, "--keep", 100, "--val-every", 5)


def gpu(precision: str, *more: str) -> tuple[str, ...]:
    """The launcher for one GPU, as README has it."""
    file = launch.ROOT / "accelerate_configs" / PRECISIONS[precision]
    return ("accelerate", "launch", "--config_file", str(file), *more)


@pytest.fixture(scope="module")
def on_gpu(shared):
    """Runs train_shared.py on the GPU: on_gpu(output_dir, precision, *flags, more=flags of the launcher) -> its output."""

    def call(folder, precision, *flags, more=(), **extra):
        return shared(folder, *SIZES, *flags, shape=SHAPE, launcher=gpu(precision, *more), **ON_GPU | extra)

    return call


@pytest.fixture(scope="module")
def straight(on_gpu, tmp_path_factory):
    """straight(precision, *flags) -> an uninterrupted run on the GPU with all its checkpoints, made once."""
    made = {}

    def call(precision, *flags, more=()):
        key = (precision, *flags, *more)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("straight") / "run"
            on_gpu(made[key], precision, *EVERY, *flags, more=more)
        return made[key]

    return call


MODELS = {"dense": (), "experts": ("--num-experts", 4), "across": ("--cross-document-attention",)}
RESUMED = [("float32", "dense", ()), ("bf16", "dense", ()), ("bf16", "experts", ()), ("bf16", "across", ())]
RESUMED += [("fp16", "dense", ()), ("bf16", "dense", ("--dynamo_backend", "inductor"))]


@pytest.mark.parametrize(("precision", "model", "more"), RESUMED)
def test_a_resumed_run_has_the_same_bits(precision, model, more, straight, on_gpu, tmp_path):
    whole = straight(precision, *MODELS[model], more=more)
    launch.copy_until(whole, tmp_path / "run", 5)
    assert "resumed" in on_gpu(tmp_path / "run", precision, *EVERY, *MODELS[model], more=more)
    launch.same_run(whole, tmp_path / "run")


def test_a_killed_run_has_the_same_bits(straight, started, on_gpu, tmp_path):
    """kill -9 of the launcher and its process, in the middle of an update or a save."""
    whole = straight("bf16")
    flags = (*SIZES, *EVERY)
    running = started(tmp_path / "run", *SHAPE, *flags, launcher=gpu("bf16"), **ON_GPU)
    launch.wait_for(tmp_path / "run" / "checkpoints" / "step-00000004", running)
    launch.kill_tree(running)
    assert "resumed" in on_gpu(tmp_path / "run", "bf16", *EVERY)
    launch.same_run(whole, tmp_path / "run")


@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-9), ("float32", 2e-6)])
@pytest.mark.parametrize("model", MODELS)
def test_the_gpu_trains_what_the_cpu_trains(model, dtype, bound, shared, on_gpu, tmp_path):
    """Weights after six updates, and the losses of each. In float64 the difference is the sines of positions, which are float32."""
    flags = (*MODELS[model], "--dtype", dtype, "--steps", 6, "--eps", "1e-4")
    shared(tmp_path / "cpu", *SIZES, *flags, shape=SHAPE, OMP_NUM_THREADS="4")
    on_gpu(tmp_path / "gpu", "float32", *flags)
    one, other = (launch.weights(tmp_path / name, 6) for name in ("cpu", "gpu"))
    found = launch.difference(one, other)
    print(f"{model} {dtype}: largest difference of a weight {found:.1e}")
    assert found < bound
    for here, there in zip(*(launch.rows(tmp_path / name) for name in ("cpu", "gpu")), strict=True):
        assert here["train/loss"] == pytest.approx(there["train/loss"], rel=bound)
        assert here["train/tokens"] == there["train/tokens"]


@pytest.mark.parametrize("kind", ["ffn+head", "narrow", "lora+head", "expert"])
def test_a_module_of_the_gpu_is_that_of_the_cpu(kind, module, tmp_path):
    """float64: weights to 1e-8, for the same reason. In bf16 it is published, and its trunk may be stored in bf16."""
    flags = ("--kind", kind, "--steps", 3, "--eps", "1e-4")
    module(tmp_path / "cpu", *flags, "--dtype", "float64")
    module(tmp_path / "gpu", *flags, "--dtype", "float64", launcher=gpu("float32"), **ON_GPU)
    one, other = (launch.load_file(tmp_path / name / "module" / "module.safetensors") for name in ("cpu", "gpu"))
    found = launch.difference(one, other)
    print(f"{kind}: largest difference of a weight {found:.1e}")
    assert found < 1e-8
    printed = module(tmp_path / "bf16", *flags, "--trunk-dtype", "bf16", launcher=gpu("bf16"), **ON_GPU)
    assert "read back and verified" in printed
    losses = [json.loads((tmp_path / n / "module" / "module.json").read_text())["losses"] for n in ("cpu", "bf16")]
    assert losses[0]["own"]["after"] == pytest.approx(losses[1]["own"]["after"], rel=5e-3)


def test_compiled_it_trains_the_same(straight, tmp_path):
    """torch.compile in bf16: the losses of the run without it, to what bf16 rounds."""
    plain, compiled = straight("bf16"), straight("bf16", more=("--dynamo_backend", "inductor"))
    assert (compiled / "trunk" / "model.safetensors").exists()
    for here, there in zip(launch.rows(plain), launch.rows(compiled), strict=True):
        assert here["train/loss"] == pytest.approx(there["train/loss"], rel=5e-3)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_the_fused_mask_of_documents_is_the_mask(low):
    """Gradients in 16 bits, with the mask as blocks and as a tensor, beside float64: one is as near as the other."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 258, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    trunk = Trunk(ModelConfig(**sizes, cross_document_attention=False, eos_token_id=1)).cuda()
    tokens = torch.randint(2, 258, (4, 1001), device="cuda")
    tokens[torch.rand(4, 1001, device="cuda") < 0.01] = 1

    def gradients(fused, dtype=torch.float32):
        trunk.to(dtype).zero_grad()
        trunk.model.fused_document_mask = fused
        with torch.autocast("cuda", low, enabled=dtype == torch.float32):
            trunk(tokens).objective.backward()
        return torch.cat([p.grad.flatten().double() for p in trunk.parameters()])

    dense, fused, exact = gradients(False), gradients(True), gradients(False, torch.float64)
    errors = [((one - exact).norm() / exact.norm()).item() for one in (dense, fused)]
    print(f"{low}: relative error of the gradient, mask as a tensor {errors[0]:.1e}, as blocks {errors[1]:.1e}")
    assert errors[1] < 1.1 * errors[0] + 1e-4
    assert errors[0] < 0.05


@pytest.mark.parametrize("offload", ["false", "true"])
def test_fsdp2_on_one_gpu(offload, shared, on_gpu, straight, tmp_path):
    """NCCL and FSDP2's code for CUDA: what it publishes, and a checkpoint that a run without it continues."""
    sharded = (launch.ROOT / "accelerate_configs" / "fsdp2.yaml").read_text()
    sharded = sharded.replace("num_processes: 8", "num_processes: 1")
    (tmp_path / "fsdp2.yaml").write_text(sharded.replace("offload_params: false", f"offload_params: {offload}"))
    launcher = ("accelerate", "launch", "--config_file", str(tmp_path / "fsdp2.yaml"))
    printed = shared(tmp_path / "run", *SIZES, *EVERY, shape=SHAPE, launcher=launcher, **ON_GPU)
    assert "read back and verified" in printed
    for here, there in zip(launch.rows(straight("bf16")), launch.rows(tmp_path / "run"), strict=True):
        assert here["train/loss"] == pytest.approx(there["train/loss"], rel=5e-3)
    launch.copy_until(tmp_path / "run", tmp_path / "continued", 6)
    assert "resumed" in on_gpu(tmp_path / "continued", "bf16", *EVERY)


def test_an_update_waits_for_the_gpu_once(shared, altered, tmp_path):
    """torch's own report of the operations that make the host wait."""
    script = altered(
        "train_shared.py", edits.AFTER_UPDATE, f"{edits.AFTER_UPDATE}        __import__('waits').report(step)\n"
    )
    (script.parent / "waits.py").write_text(WAITS)
    flags = (*SIZES, "--steps", 5, "--val-every", 0, "--save-every", 0, "--log-every", 100)
    printed = shared(tmp_path / "run", *flags, shape=SHAPE, script=script, launcher=gpu("bf16"), **ON_GPU)
    assert re.findall(r"update (\d): (\d+) waits", printed) == [("2", "1"), ("3", "1"), ("4", "1"), ("5", "1")], printed


WAITS = """
import warnings

import torch

found = []


def report(step):
    if step == 1:
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, category, filename, line, *_: found.append(f"{filename}:{line} {message}")
        torch.cuda.set_sync_debug_mode("warn")
    else:
        waits = [place for place in found if "synchronizing CUDA operation" in place]
        print(f"update {step}: {len(waits)} waits", *waits, sep="\\n", flush=True)
    found.clear()
"""


@pytest.mark.parametrize("more", [(), ("--activation-checkpointing",)])
def test_the_peak_of_the_gpu_is_that_of_the_plan(more, shared, tmp_path):
    """forge_common.plan counts it without a GPU: 110 M parameters in bf16, beside torch's own count of the allocator."""
    sizes = {"sequence_length": 1024, "batch_size": 8, "micro_batch_size": 8}
    flags = [word for name, size in sizes.items() for word in (f"--{name.replace('_', '-')}", size)]
    flags += ["--steps", 3, "--warmup-steps", 0, "--val-fraction", 0, "--preset", "base", "--tokenizer", "bytes", *more]
    shared(tmp_path / "run", *flags, shape=(), launcher=gpu("bf16"), **ON_GPU)
    chosen = plan.Settings(
        devices="1xH100", engine="one", preset="base", vocab_size=258, activation_checkpointing=bool(more), **sizes
    )
    counted = sum(plan.count(plan.config_of(chosen), chosen, 1).memory.values()) / 2**20
    found = launch.rows(tmp_path / "run")[-1]["memory/peak_mb"]
    print(f"{more}: {found:.0f} MiB on the GPU, {counted:.0f} MiB counted without it")
    assert found == pytest.approx(counted, rel=0.1)


def test_the_commands_give_on_the_gpu_what_they_give_on_the_cpu(trunk, module, text, domain, cache, tmp_path):
    """evaluate and generate, in float32, with a model assembled by `assemble`."""
    module(tmp_path / "cpp", "--steps", 8)
    parts = ("--trunk", trunk, "--modules", tmp_path / "cpp" / "module")
    python("assemble", *parts, "--output-dir", tmp_path / "assembled")
    data = ("--data", f"text={text}", f"cpp={domain}", "--cache-dir", cache)
    prompt = ("--prompt", "#include", "--temperature", 0, "--max-new-tokens", 20)
    tables, texts = [], []
    for name, environment in (("gpu", {}), ("cpu", {"CUDA_VISIBLE_DEVICES": ""})):
        json_file = tmp_path / f"{name}.json"
        python("evaluate", "--model", tmp_path / "assembled", *data, "--json", json_file, **environment)
        tables.append(json.loads(json_file.read_text())["rows"])
        texts.append(python("generate", "--model", tmp_path / "assembled", *prompt, **environment))
    assert texts[0] == texts[1]
    for here, there in zip(*tables, strict=True):
        assert here["tokens"] == there["tokens"] and here["loss"] == pytest.approx(there["loss"], rel=1e-5)


def python(command: str, *flags: object, **environment: str) -> str:
    """Runs `python -m forge_common.COMMAND` in a process of its own: a fork could not use the GPU."""
    line = [sys.executable, "-m", f"forge_common.{command}", *map(str, flags)]
    where = {"env": launch.environment(**environment), "cwd": launch.ROOT, "timeout": launch.PATIENCE}
    done = subprocess.run(line, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, **where)
    assert done.returncode == 0, done.stdout
    return done.stdout
