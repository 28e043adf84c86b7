"""Memory, network traffic and time of an update of train_shared.py or train_module.py, before anyone rents the machines.

    python -m forge_common.plan --devices 64xH100 --preset llama-3-8b --engine fsdp2 --sequence-length 8192 --micro-batch-size 1

Memory and traffic are counted: the run's own model, loss and optimizer do one update with tensors that have no data, as
rank 0 of a world that does not exist (run/fake_update.py). Time is computed from data sheets and assumed shares of
them; it is not measured. (forge_common/run/plan.py is what a run itself prints when it starts.)
"""

import dataclasses
import re
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from .command_line import read_settings, run_main
from .errors import UserError
from .flags import flag_of
from .model.config import PRESETS, ModelConfig
from .model.module_settings import ModuleSettings, check_rank, module_problems
from .settings import UpdateSettings

if TYPE_CHECKING:
    from .model.trunk import Trunk
    from .run.hardware import Device
    from .run.ledger import Collective

# From the config.json of meta-llama/Meta-Llama-3-8B and -70B: the five sizes of PRESETS, in its order.
PUBLISHED = {"llama-3-8b": (4096, 14336, 32, 32, 8), "llama-3-70b": (8192, 28672, 80, 64, 8)}
LLAMA_3: dict[str, Any] = {"vocab_size": 128_256, "max_position_embeddings": 8192, "rope_theta": 5e5}


@dataclass(frozen=True, kw_only=True)
class Settings(ModuleSettings):
    devices: str
    """Number and name of the devices, such as 1xL40S or 64xH100."""
    engine: Literal["one", "ddp", "fsdp2"] = "fsdp2"
    """one device, ddp (accelerate_configs/multi_gpu.yaml) or fsdp2 (fsdp2.yaml); all with mixed_precision bf16."""

    # -- model --
    trunk: str | None = None
    """Folder or hub id (org/name@revision) of the trunk, of which config.json alone is fetched and read. None: --preset."""
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
    positive = ("sequence_length", "batch_size", "micro_batch_size", "tokens", "machine_size", "hidden_size")
    positive += ("intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    for name in (*positive, "between"):
        if getattr(settings, name) is not None and not getattr(settings, name) > 0:
            faults.append(f"{flag_of(name)} is {getattr(settings, name)}; it must be positive")
    for name in ("mfu", "link_share", "memory_share"):
        if not 0 < getattr(settings, name) <= 1:
            faults.append(f"{flag_of(name)} is {getattr(settings, name)}; it must lie in (0, 1]")
    count = int(found[1]) if found else 1
    if found and (settings.engine == "one") != (count == 1):
        faults.append(f"--engine {settings.engine} with {count} device(s); one is for 1, ddp and fsdp2 for several")
    at_once = max(settings.micro_batch_size, 1) * count
    if settings.batch_size % at_once:
        faults.append(
            f"--batch-size {settings.batch_size} does not divide into {count} devices x --micro-batch-size "
            f"{settings.micro_batch_size}; make it a multiple of {at_once}"
        )
    if settings.preset not in PRESETS | PUBLISHED:
        faults.append(f"--preset {settings.preset} is not one of {', '.join(PRESETS | PUBLISHED)}")
    faults += module_problems(vars(settings).get)
    if settings.trunk_dtype and (settings.kind is None or settings.engine == "fsdp2"):
        faults.append("--trunk-dtype bf16 is for a module (--kind) with --engine one or ddp; leave it out")
    return faults


def config_of(settings: Settings) -> ModelConfig:
    """The sizes of --trunk, else of --preset and the flags."""
    from .files.atomic import read_json
    from .files.hub import local_folder

    if settings.trunk:
        file = local_folder(settings.trunk, files=("config.json",)) / "config.json"
        config = ModelConfig.from_hf(read_json(file), str(file))
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
    if settings.kind:
        check_rank(settings.kind, settings, config)
    return config


def build(config: ModelConfig, settings: Settings) -> "Trunk":
    """The model as the scripts make it."""
    from .model.modules import chosen_layers, plug_in
    from .model.trunk import Trunk

    trunk = Trunk(config)
    if settings.trunk_dtype:
        for parameter in trunk.parameters():
            parameter.data = parameter.data.bfloat16() if parameter.ndim > 1 else parameter.data
    if settings.kind:
        layers = chosen_layers(settings.layers, config.num_hidden_layers)
        plug_in(trunk, settings.kind, layers, **settings.sizes)
    trunk.activation_checkpointing = settings.activation_checkpointing
    return trunk


def count(config: ModelConfig, settings: Settings, devices: int, on_gpu: bool = True) -> Counted:
    """One update on `devices` devices. on_gpu False: with a CPU's kernels and its mask of documents, which is in memory."""
    import torch

    from . import optimizers
    from .run.fake_update import fake_update

    accumulation = settings.batch_size // (settings.micro_batch_size * devices)
    engine = types.SimpleNamespace(deepspeed_plugin=None)
    launched = types.SimpleNamespace(device=torch.device("cpu"), is_fsdp2=settings.engine == "fsdp2", state=engine)
    chosen = types.SimpleNamespace(**vars(UpdateSettings(optimizer=settings.optimizer)), lr=1.0)
    with torch.device("meta"):
        bare = build(config, settings)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in bare.parameters()]
    flops = bare.flops_per_token(settings.sequence_length)
    forward = bare.requires_grad_(False).flops_per_token(settings.sequence_length)
    config = dataclasses.replace(config, cross_document_attention=on_gpu)  # a GPU has no mask in memory
    memory, micro_batches, own = fake_update(
        lambda: build(config, settings),
        lambda trunk: optimizers.make(trunk, chosen, launched),
        engine=settings.engine,
        devices=devices,
        accumulation=accumulation,
        window=(settings.micro_batch_size, settings.sequence_length + 1),
        on_gpu=on_gpu,
    )
    trained = sum(size for size, is_trained in sizes if is_trained)
    return Counted(memory, micro_batches, sum(size for size, _ in sizes), trained, own, (forward, flops))


def times(counted: Counted, settings: Settings, device: "Device", devices: int) -> tuple[float, float, float]:
    """Seconds of an update: computation, the optimizer, and waiting for collectives that no computation hides.

    The first gathering of a forward pass and the last reduction of a backward pass are alone; the others run beside the
    layers.
    """
    from .run.hardware import seconds_on_links

    forward, total = counted.flops
    again = forward if settings.activation_checkpointing else 0
    speed = device.flops * settings.mfu / (settings.micro_batch_size * settings.sequence_length)
    links = device.within * settings.link_share, (settings.between or device.between) * settings.link_share
    computing = waiting = 0.0
    for collectives in counted.micro_batches:
        for phase, alone, work in (
            ("forward", 0, forward / speed),
            ("backward", -1, (total - forward + again) / speed),
        ):
            found = [c for c in collectives if c.phase.startswith(phase)]
            seconds = [seconds_on_links(c.name, c.size, devices, settings.machine_size, *links) for c in found]
            if found and (phase == "forward" or found[-1].name != "all-gather"):
                waiting += seconds.pop(alone)
            waiting += max(0.0, sum(seconds) - work)
            computing += work
    # Read for the norm; read and written when clipped; then weight, gradient and two moments read, three written: float32.
    return computing, 10 * 4 * counted.own / (device.memory_rate * 1e9), waiting


def report(counted: Counted, settings: Settings, device: "Device", name: str, devices: int) -> str:
    """The table that is printed."""
    kinds: dict[str, float] = {}
    for kind, size in counted.memory.items():
        first = kind.split()[0]
        printed = {"forward": "activations", "backward": "temporary", "step": "temporary", "windows": "temporary"}
        kinds[printed.get(first, kind)] = kinds.get(printed.get(first, kind), 0) + size / 1e9
    peak, room = sum(kinds.values()), device.memory * settings.memory_share
    parts = ", ".join(f"{kind} {size:.1f}" for kind, size in kinds.items() if size > 0)
    fits = "fits" if peak <= room else f"does not fit: {max(kinds, key=lambda kind: kinds[kind])} is the largest part"
    sent: dict[str, float] = {}
    for collective in (c for micro_batch in counted.micro_batches for c in micro_batch):
        share = (2 if collective.name == "all-reduce" else 1) * (1 - 1 / devices)
        sent[collective.name] = sent.get(collective.name, 0) + collective.size * share / 1e9
    computing, stepping, waiting = times(counted, settings, device, devices)
    update = computing + stepping + waiting
    tokens = settings.batch_size * settings.sequence_length
    what = (
        f"module {settings.kind} on {settings.trunk or settings.preset}"
        if settings.kind
        else settings.trunk or settings.preset
    )
    return "\n".join(
        (
            f"model       {what}: {counted.parameters:,} parameters, {counted.trained:,} trained",
            f"update      {settings.batch_size:,} windows = {tokens:,} tokens: {devices} {name} ({settings.engine}, bf16) x "
            f"{len(counted.micro_batches)} micro-batch(es) x {settings.micro_batch_size}",
            f"memory      {peak:.1f} GB of a device at the peak: {parts}",
            f"            {fits}; tensors may fill {room:.1f} of the {device.memory:.0f} GB (--memory-share)",
            f"network     a device sends {sum(sent.values()):.2f} GB an update"
            + "".join(f", {size:.2f} {collective}" for collective, size in sent.items()),
            f"time        computed, not measured: {update:.3f} s an update = {computing:.3f} computation at {settings.mfu:.0%} of "
            f"{device.flops / 1e12:.0f} TFLOP/s (--mfu) + {stepping:.3f} optimizer + {waiting:.3f} waiting for the network",
            f"            {tokens / update:,.0f} tokens/s, {settings.tokens / tokens * update / 86400:,.1f} days for "
            f"{settings.tokens:.3g} tokens (--tokens)",
        )
    )


def main(settings: Settings) -> int:
    from .model.config import check_context
    from .run.hardware import DEVICES

    number, _, name = settings.devices.partition("x")
    devices = int(number)
    usable = [known for known in DEVICES if known != "V100"]  # which has no bf16
    if name not in usable:
        raise UserError(f"--devices {settings.devices}: {name} cannot be planned. Use {', '.join(usable)}.")
    device = DEVICES[name]
    if devices > settings.machine_size and not (settings.between or device.between):
        raise UserError(
            f"--devices {settings.devices}: machines with {name} have no usual network. Give its GB/s with --between."
        )
    config = config_of(settings)
    check_context(settings, config)
    print(report(count(config, settings, devices), settings, device, name, devices))
    return 0


if __name__ == "__main__":
    run_main(main, read_settings(Settings, __doc__, problems))
