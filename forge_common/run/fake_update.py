"""An update with tensors that have a shape and no data, as rank 0 of a world of any size in one process: what it would take.

Every operation is the run's own, but three: a GPU's attention (gpu_attention), DDP's buckets, which its C++ code cannot
make of such tensors, and FSDP2's optimizer and norm, which are given the local parts of its tensors, as DTensor gives
them one by one.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .ledger import Collective, Ledger, local_part

aten = torch.ops.aten


@contextlib.contextmanager
def gpu_attention() -> Iterator[None]:
    """Replaces attention, for fake tensors on the CPU, with a GPU's.

    It is one kernel, which keeps no scores, and whose mask of documents is none in memory (flex_attention,
    run/kernels.py; FlashAttention keeps the same tensors).
    """

    def attention(query, key, value, **_):
        return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True)[0]

    # Not a TorchFunctionMode: activation checkpointing computes again where that is not in effect.
    with mock.patch.object(F, "scaled_dot_product_attention", attention):
        yield


@contextlib.contextmanager
def fake_group(size: int) -> Iterator[Any]:
    """The mesh of a process group of `size` ranks, of which this process is rank 0 and no other exists."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (size,))
    finally:
        dist.destroy_process_group()


def fake_update(
    build: Callable[[], Any],
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    *,
    engine: str,
    devices: int,
    accumulation: int,
    window: tuple[int, int],
    on_gpu: bool,
) -> tuple[dict[str, int], list[list[Collective]], int]:
    """Bytes at the peak of an update by kind, the collectives of each of its micro-batches, and how many parameters
    this rank updates.

    engine: one, ddp or fsdp2, in bf16. window: [micro_batch_size, sequence_length + 1]. Of several micro-batches the
    first and the last are computed; those between them are like the first.
    """
    kernels = gpu_attention() if on_gpu else contextlib.nullcontext()
    world = fake_group(devices) if engine == "fsdp2" else contextlib.nullcontext()
    with torch.device("meta"):
        trunk = build()  # Module.to does not convert all fake tensors
    with world as mesh, FakeTensorMode():
        for path, parameter in list(trunk.named_parameters()):
            owner, _, name = path.rpartition(".")
            fake = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), parameter.requires_grad)
            setattr(trunk.get_submodule(owner), name, fake)
        if engine == "fsdp2":
            shard(trunk, mesh)
        optimizer = make_optimizer(trunk)
        own = {p: nn.Parameter(local_part(p).detach(), p.requires_grad) for p in trunk.parameters()}
        for group in optimizer.param_groups:
            group["params"] = [own[parameter] for parameter in group["params"]]
        trained = [parameter for parameter in own.values() if parameter.requires_grad]
        with Ledger() as ledger, kernels:
            for parameter in own.values():
                ledger.add(parameter)
            ledger.begin("optimizer")
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()  # makes its state, which a later update finds
            optimizer.zero_grad()
            ledger.begin("buckets")  # DDP copies the gradients into them and keeps both
            buckets = [torch.empty_like(parameter) for parameter in trained if engine == "ddp"]
            ledger.begin("windows")
            tokens = torch.zeros(window, dtype=torch.int64)
            ledger.forget_peak()
            for which in ("first", "last")[accumulation == 1 :]:
                ledger.begin(f"forward {which}")
                with torch.autocast("cpu", torch.bfloat16, enabled=engine != "fsdp2"):
                    objective = trunk(tokens).objective
                ledger.begin(f"backward {which}")
                (objective * 1.0).backward()
                del objective
            reduced = reversed([bucket.nbytes for bucket in buckets])  # the embedding is the last
            ledger.collectives += [Collective(ledger.phase, "all-reduce", size) for size in reduced]
            ledger.begin("step")
            for parameter, part in own.items():
                part.grad = None if parameter.grad is None else local_part(parameter.grad)
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
    first, last = ([c for c in ledger.collectives if c.phase.endswith(end)] for end in ("first", "last"))
    return ledger.at_peak, [first] * (accumulation - 1) + [last], sum(parameter.numel() for parameter in trained)


def shard(trunk: Any, mesh: Any) -> None:
    """FSDP2 as accelerate makes it of fsdp2.yaml, with what run/launch_checks.py keeps in float32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, None, cast_forward_inputs=False)
    for layer in trunk.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(trunk, mesh=mesh, mp_policy=policy)
