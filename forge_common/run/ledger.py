"""A count of the bytes and collectives of an update, by looking at every operation: of a real run, or of one without memory.

For a run without memory: fake tensors, which have a shape and no data, and `fake_group`, a world of any size in one process.
torch's own trackers (torch.distributed._tools, 2.13) are not used: under fake tensors they count, for a step of the fused AdamW
of 8 B parameters on 64 ranks, 112 GiB of whole tensors that DTensor only looks at, and for one device they take six times as long.
"""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._guards import active_fake_mode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
COLLECTIVES = {"_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter", "allreduce_": "all-reduce"}


class Collective(NamedTuple):
    phase: str
    name: str
    size: int  # bytes of the whole tensor: the result of an all-gather, what goes into a reduction


class Ledger(TorchDispatchMode):
    """Within it: the bytes of live tensors by the phase that made them, their peak, and the collectives.

    What is alive after a phase named "backward..." are gradients, and tensors that are freed and filled again are gathered
    weights (FSDP2), whichever phase made them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = "weights"
        self.live: dict[str, int] = {}  # phase -> bytes
        self.at_peak: dict[str, int] = {}
        self.collectives: list[Collective] = []
        self._held: dict[int, tuple[weakref.ref, str, int, int]] = {}  # storage -> itself, phase, bytes, number of birth
        self._births = 0
        self._births_at_peak = 0
        self._total = 0
        self._peak = 0

    @property
    def peak(self) -> int:
        return self._peak

    def begin(self, phase: str) -> None:
        """Names what follows. Gradients that a backward pass leaves, and were there at its peak, are counted as such."""
        if self.phase.startswith("backward"):
            for key, (storage, kind, size, birth) in list(self._held.items()):
                if kind == self.phase:
                    self._held[key] = (storage, "gradients", size, birth)
                    self._move(self.live, size)
                    if birth <= self._births_at_peak:
                        self._move(self.at_peak, size)
        self.phase = phase

    def forget_peak(self) -> None:
        self._peak = 0

    def add(self, tensor: torch.Tensor) -> None:
        """Counts the storage of a tensor, which may be older than the ledger."""
        local = getattr(tensor, "_local_tensor", tensor)  # of a DTensor
        storage = local.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return
        self._births += 1
        reference = weakref.ref(storage, lambda _: self._count(*self._held.pop(key)[1:3], sign=-1))
        self._held[key] = (reference, self.phase, storage.nbytes(), self._births)
        self._count(self.phase, storage.nbytes())

    def _move(self, counts: dict[str, int], size: int) -> None:
        counts[self.phase] = counts.get(self.phase, 0) - size
        counts["gradients"] = counts.get("gradients", 0) + size

    def _count(self, kind: str, size: int, sign: int = 1) -> None:
        self.live[kind] = self.live.get(kind, 0) + sign * size
        self._total += sign * size
        if self._total > self._peak:
            self._peak = self._total
            self.at_peak = dict(self.live)
            self._births_at_peak = self._births

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(kind, "_local_tensor") or kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # DTensor replaces it by operations on its local tensors, which come here again
        result = func(*args, **(kwargs or {}))
        if active_fake_mode() is not self._fake_mode:  # DTensor computes a shape
            return result
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        name = COLLECTIVES.get(func._opname) if func.namespace == "c10d" else None
        if name:
            whole = args[1] if name == "reduce-scatter" else args[0]
            size = sum(tensor.nbytes for tensor in tree_leaves(whole) if isinstance(tensor, torch.Tensor))
            self.collectives.append(Collective(self.phase, name, size))
        return result

    def __enter__(self) -> "Ledger":
        self._fake_mode = active_fake_mode()
        self._resize = resize = torch.UntypedStorage.resize_

        def counted_resize(storage: Any, size: int) -> Any:  # FSDP2 frees and fills with it, which is no operation
            result = resize(storage, size)
            entry = self._held.get(storage._cdata)
            if entry:
                self._count(entry[1], entry[2], sign=-1)
                self._held[storage._cdata] = (entry[0], "gathered weights", size, entry[3])
                self._count("gathered weights", size)
            return result

        torch.UntypedStorage.resize_ = counted_resize
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*error)


class GpuKernels(TorchFunctionMode):
    """Replaces, for fake tensors on the CPU, two functions that a CPU and a GPU compute in different steps.

    RMSNorm: one kernel, which keeps its input and a number a row. Attention: one kernel, which keeps no scores, and whose
    mask of documents is none in memory (flex_attention, run/kernels.py; FlashAttention keeps the same tensors).
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.rms_norm:
            x = args[0].float() if torch.is_autocast_enabled("cpu") else args[0]  # as autocast does on a GPU
            return aten._fused_rms_norm(x, args[1], kwargs["weight"], kwargs["eps"])[0]
        if func is F.scaled_dot_product_attention:
            return aten._scaled_dot_product_flash_attention(*args[:3], 0.0, True)[0]
        return func(*args, **(kwargs or {}))


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
