"""Memory, network traffic and time of an update of train_shared.py or train_module.py, before anyone rents the machines.

    python -m forge_common.plan --devices 64xH100 --preset llama-3-8b --engine fsdp2 --sequence-length 8192 --micro-batch-size 1

Memory and traffic are counted: the run's own model, loss and optimizer do one update with tensors that have no data, as rank 0
of a world that does not exist (run/ledger.py). Time is computed from data sheets and assumed shares of them; it is not measured.
(forge_common/run/plan.py is what a run itself prints when it starts.)
"""

import re
import types
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from .errors import UserError
from .model.config import KINDS, PRESETS, ModelConfig
from .settings import OptimizerSettings, read_settings, run_main

if TYPE_CHECKING:
    from .model.trunk import Trunk
    from .run.hardware import Device
    from .run.ledger import Collective

# From the config.json of meta-llama/Meta-Llama-3-8B and -70B: the five sizes of PRESETS, in its order.
PUBLISHED = {"llama-3-8b": (4096, 14336, 32, 32, 8), "llama-3-70b": (8192, 28672, 80, 64, 8)}
LLAMA_3: dict[str, Any] = {"vocab_size": 128_256, "max_position_embeddings": 8192, "rope_theta": 5e5}


@dataclass(frozen=True, kw_only=True)
class Settings:
    devices: str
    """Number and name of the devices, such as 1xL40S or 64xH100."""
    engine: Literal["one", "ddp", "fsdp2"] = "fsdp2"
    """one device, ddp (accelerate_configs/multi_gpu.yaml) or fsdp2 (fsdp2.yaml); all with mixed_precision bf16."""

    # -- model --
    trunk: Path | None = None
    """Folder with the trunk's config.json; weights are not read. None: --preset."""
    preset: str = "small"
    """Sizes: tiny, small, base or large as in train_shared.py, llama-3-8b or llama-3-70b."""
    hidden_size: int | None = None
    """Width of the residual stream; None: the preset's."""
    intermediate_size: int | None = None
    """Width of the feed-forward; None: the preset's."""
    num_hidden_layers: int | None = None
    """Layers; None: the preset's."""
    num_attention_heads: int | None = None
    """Query heads; None: the preset's."""
    num_key_value_heads: int | None = None
    """Key and value heads; None: the preset's."""
    vocab_size: int | None = None
    """Tokens in the vocabulary; None: 128,256 of Llama 3, else 4,096 as of train_shared.py's default tokenizer."""
    tie_word_embeddings: bool | None = None
    """Use the embedding as the output head; None: as the preset (Llama 3 does not)."""

    # -- module --
    kind: str | None = None
    """Kind of module that is trained on the frozen trunk, as in train_module.py. None: the trunk itself is trained."""
    layers: str = "all"
    """Layers that the module changes: all, top:N, or numbers from 0 such as 2,5."""
    width: int = 0
    """Width of the feed-forward of kind narrow; 0: a quarter of the trunk's."""
    rank: int = 16
    """Rank of kind lora."""
    trunk_dtype: Literal["bf16"] | None = None
    """Type of the frozen matrices in memory; None: float32."""

    # -- updates --
    sequence_length: int = 512
    """Tokens in a window."""
    batch_size: int = 64
    """Windows in an update, over all devices."""
    micro_batch_size: int = 16
    """Windows that a device holds at once."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Optimizer of the layers' matrices, as in train_shared.py."""
    activation_checkpointing: bool = False
    """Compute each layer again in the backward pass instead of keeping its activations."""
    tokens: float = 1e12
    """Tokens to train on, for the days of the run."""

    # -- assumptions --
    mfu: float = 0.4
    """Share of the device's peak FLOP/s that the computation reaches: an assumption."""
    link_share: float = 0.8
    """Share of the links' GB/s that collectives reach: an assumption."""
    memory_share: float = 0.9
    """Share of the device's memory for tensors; the rest is for CUDA, NCCL and fragmentation: an assumption."""
    machine_size: int = 8
    """Devices in a machine."""
    between: float | None = None
    """GB/s from a machine to the others, one direction; None: the data sheet's (400 for H100 and H200, 200 for A100)."""


class Counted(NamedTuple):
    """Of rank 0, in an update."""

    memory: dict[str, int]  # bytes at the peak by kind, which add up to the peak
    micro_batches: list["list[Collective]"]  # the collectives of each
    parameters: int
    trained: int
    own: int  # trained parameters that this rank updates
    flops: tuple[int, int]  # a token's: of the forward pass, of an update


def problems(settings: Settings) -> list[str]:
    """Problems with the settings, each with how to fix it."""
    faults = []
    found = re.fullmatch(r"([1-9]\d*)x(\w+)", settings.devices)
    if not found:
        faults.append(f"--devices {settings.devices} is not a number and a name; write it as 64xH100")
    positive = ("sequence_length", "batch_size", "micro_batch_size", "rank", "tokens", "machine_size", "hidden_size")
    positive += ("intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    for name in (*positive, "between"):
        if getattr(settings, name) is not None and not getattr(settings, name) > 0:
            faults.append(f"--{name.replace('_', '-')} is {getattr(settings, name)}; it must be positive")
    for name in ("mfu", "link_share", "memory_share"):
        if not 0 < getattr(settings, name) <= 1:
            faults.append(f"--{name.replace('_', '-')} is {getattr(settings, name)}; it must lie in (0, 1]")
    count = int(found[1]) if found else 1
    if (settings.engine == "one") != (count == 1):
        faults.append(f"--engine {settings.engine} with {count} device(s); one is for 1, ddp and fsdp2 for several")
    at_once = max(settings.micro_batch_size, 1) * count
    if settings.batch_size % at_once:
        faults.append(
            f"--batch-size {settings.batch_size} does not divide into {count} devices x --micro-batch-size "
            f"{settings.micro_batch_size}; make it a multiple of {at_once}"
        )
    if settings.preset not in PRESETS | PUBLISHED:
        faults.append(f"--preset {settings.preset} is not one of {', '.join(PRESETS | PUBLISHED)}")
    if settings.kind is not None and settings.kind not in KINDS:
        faults.append(f"--kind {settings.kind} is not one of {', '.join(KINDS)}")
    if settings.trunk_dtype and (settings.kind is None or settings.engine == "fsdp2"):
        faults.append("--trunk-dtype bf16 is for a module (--kind) with --engine one or ddp; leave it out")
    return faults


def config_of(settings: Settings) -> ModelConfig:
    """The sizes of --trunk, else of --preset and the flags."""
    from .files.atomic import read_json

    if settings.trunk:
        config = ModelConfig.from_hf(read_json(settings.trunk / "config.json"), str(settings.trunk / "config.json"))
    else:
        names = PRESETS["small"]
        llama = settings.preset in PUBLISHED
        sizes = dict(zip(names, PUBLISHED[settings.preset], strict=True)) if llama else PRESETS[settings.preset]
        more = LLAMA_3 if llama else {"vocab_size": 4096, "max_position_embeddings": settings.sequence_length}
        values = {"tie_word_embeddings": not llama, **more, **sizes}
        given = {name: getattr(settings, name) for name in (*names, "vocab_size", "tie_word_embeddings")}
        config = ModelConfig(**values | {name: value for name, value in given.items() if value is not None})
    if config.num_local_experts:
        raise UserError("--trunk is a mixture of experts, whose sizes depend on the data. Plan for a dense trunk.")
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if not settings.trunk and (config.hidden_size % (2 * heads) or heads % groups):
        raise UserError(
            f"--hidden-size {config.hidden_size} must be an even multiple of --num-attention-heads {heads}, and that a "
            f"multiple of --num-key-value-heads {groups}. Change one of them."
        )
    return config


def build(config: ModelConfig, settings: Settings) -> "Trunk":
    """The model as the scripts make it."""
    import torch

    from .model.modules import chosen_layers, plug_in
    from .model.trunk import Trunk

    trunk = Trunk(config)
    if settings.trunk_dtype:
        for parameter in trunk.parameters():
            parameter.data = parameter.data.bfloat16() if parameter.ndim > 1 else parameter.data
    if settings.kind:
        layers = chosen_layers(settings.layers, config.num_hidden_layers)
        plug_in(trunk, settings.kind, layers, width=settings.width, rank=settings.rank)
    trunk.activation_checkpointing = settings.activation_checkpointing
    return trunk


def count(config: ModelConfig, settings: Settings, devices: int, on_gpu: bool = True) -> Counted:
    """One update on `devices` devices with tensors that have no data. on_gpu False: as a CPU computes it, with its kernels and masks.

    One window more or less changes nothing but the size: of several micro-batches, the first and the last are done.
    """
    import contextlib
    import dataclasses

    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from . import optimizers
    from .run.ledger import Collective, GpuKernels, Ledger, fake_group

    fsdp2, accumulation = settings.engine == "fsdp2", settings.batch_size // (settings.micro_batch_size * devices)
    launched = types.SimpleNamespace(
        device=torch.device("cpu"), is_fsdp2=fsdp2, state=types.SimpleNamespace(deepspeed_plugin=None)
    )
    chosen = types.SimpleNamespace(**vars(OptimizerSettings(optimizer=settings.optimizer)), lr=1.0)
    with torch.device("meta"):
        bare = build(config, settings)
    numbers = [p.numel() for p in bare.parameters()], [p.numel() for p in bare.parameters() if p.requires_grad]
    flops = bare.flops_per_token(settings.sequence_length)
    forward = bare.requires_grad_(False).flops_per_token(settings.sequence_length)
    if on_gpu:
        config = dataclasses.replace(config, cross_document_attention=True)
    kernels = GpuKernels() if on_gpu else contextlib.nullcontext()
    world = fake_group(devices) if fsdp2 else contextlib.nullcontext()
    with world as mesh, FakeTensorMode():
        trunk = build(config, settings)
        if fsdp2:
            shard(trunk, mesh)
        optimizer = optimizers.make(trunk, chosen, launched)
        with Ledger() as ledger, kernels:
            # FSDP2's optimizer works on the local parts of its tensors, one by one: so does this one.
            locals_ = {p: torch.nn.Parameter(_local(p).detach(), p.requires_grad) for p in trunk.parameters()}
            for parameter in locals_:
                ledger.add(parameter)
            for group in optimizer.param_groups:
                group["params"] = [locals_[p] for p in group["params"]]
            own = [p for group in optimizer.param_groups for p in group["params"]]
            ledger.begin("optimizer")
            for parameter in own:
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad()
            ledger.begin("buckets")  # DDP copies all gradients into them, beside the gradients
            buckets = [torch.empty_like(p) for p in own if settings.engine == "ddp"]
            tokens = torch.zeros(settings.micro_batch_size, settings.sequence_length + 1, dtype=torch.int64)
            ledger.forget_peak()
            for last in (False, True)[accumulation == 1 :]:
                if fsdp2:
                    trunk.set_requires_gradient_sync(last)  # type: ignore[operator]
                ledger.begin(f"forward {last}")
                with torch.autocast("cpu", torch.bfloat16, enabled=not fsdp2):
                    objective = trunk(tokens).objective
                ledger.begin(f"backward {last}")
                (objective * 1.0).backward()
                del objective
            if buckets:
                sizes = [bucket.nbytes for bucket in buckets]
                ledger.collectives += [Collective(ledger.phase, "all-reduce", size) for size in reversed(sizes)]
            ledger.begin("step")
            for parameter, local in locals_.items():
                local.grad = None if parameter.grad is None else _local(parameter.grad)
            torch.nn.utils.clip_grad_norm_(own, 1.0)
            optimizer.step()
    phases = [[c for c in ledger.collectives if c.phase.endswith(str(last))] for last in (False, True)]
    micro_batches = [phases[0]] * (accumulation - 1) + [phases[1]]
    own_size = sum(p.numel() for p in own)
    return Counted(ledger.at_peak, micro_batches, sum(numbers[0]), sum(numbers[1]), own_size, (forward, flops))


def _local(tensor: Any) -> Any:
    return getattr(tensor, "_local_tensor", tensor)


def shard(trunk: "Trunk", mesh: Any) -> None:
    """FSDP2 as accelerate makes it of fsdp2.yaml, with what run/launch_checks.py keeps in float32."""
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, None, cast_forward_inputs=False)
    for layer in trunk.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)  # type: ignore[arg-type]
    fully_shard(trunk, mesh=mesh, mp_policy=policy)
