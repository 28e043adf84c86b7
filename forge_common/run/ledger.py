"""A count of the bytes and collectives of an update, by looking at every operation: of a real run, or of one without memory.

torch's own trackers (torch.distributed._tools, 2.13) are not used: under fake tensors they count, for a step of the
fused AdamW of 8 B parameters on 64 ranks, 112 GiB of whole tensors that DTensor only looks at, and for one device they
take six times as long.
"""

import weakref
from typing import Any, NamedTuple

import torch
from torch._guards import active_fake_mode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COLLECTIVES = {"_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter", "allreduce_": "all-reduce"}


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a DTensor; another tensor itself."""
    return getattr(tensor, "_local_tensor", tensor)


class Collective(NamedTuple):
    phase: str
    name: str
    size: int  # bytes of the whole tensor: the result of an all-gather, what goes into a reduction


class Ledger(TorchDispatchMode):
    """Within it: the bytes of live tensors by the phase that made them, their peak, and the collectives.

    What is alive after a phase named "backward..." are gradients, and what FSDP2 gathers into are gathered weights,
    whichever phase made them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = "weights"
        self.live: dict[str, int] = {}  # phase -> bytes
        self.at_peak: dict[str, int] = {}
        self.collectives: list[Collective] = []
        # storage -> itself, phase, bytes, number of birth
        self._held: dict[int, tuple[weakref.ref, str, int, int]] = {}
        self._births = 0
        self._births_at_peak = 0
        self._total = 0
        self._sum: weakref.ref | None = None  # the storage of a sum that is not counted yet
        self.peak = 0

    def begin(self, phase: str) -> None:
        """Names what follows. Gradients that a backward pass leaves, and were there at its peak, are counted as such."""
        self._count_sum()
        if self.phase.startswith("backward"):
            for key, (storage, kind, size, birth) in list(self._held.items()):
                if kind == self.phase:
                    self._held[key] = (storage, "gradients", size, birth)
                    self._move(self.live, size)
                    if birth <= self._births_at_peak:
                        self._move(self.at_peak, size)
        self.phase = phase

    def forget_peak(self) -> None:
        self.peak = 0

    def add(self, tensor: torch.Tensor) -> None:
        """Counts the storage of a tensor, which may be older than the ledger."""
        self._add(local_part(tensor).untyped_storage())

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._held:
            return
        self._births += 1
        reference = weakref.ref(storage, lambda _: self._count(*self._held.pop(key)[1:3], sign=-1))
        self._held[key] = (reference, self.phase, storage.nbytes(), self._births)
        self._count(self.phase, storage.nbytes())

    def _count_sum(self) -> None:
        storage = self._sum and self._sum()
        self._sum = None
        if storage is not None:
            self._add(storage)

    def _move(self, counts: dict[str, int], size: int) -> None:
        counts[self.phase] = counts.get(self.phase, 0) - size
        counts["gradients"] = counts.get("gradients", 0) + size

    def _move_to(self, storage: torch.UntypedStorage, kind: str) -> None:
        entry = self._held.get(storage._cdata)
        if entry:
            self._count(entry[1], entry[2], sign=-1)
            self._held[storage._cdata] = (entry[0], kind, storage.nbytes(), entry[3])
            self._count(kind, storage.nbytes())

    def _count(self, kind: str, size: int, sign: int = 1) -> None:
        self.live[kind] = self.live.get(kind, 0) + sign * size
        self._total += sign * size
        if self._total > self.peak:
            self.peak = self._total
            self.at_peak = dict(self.live)
            self._births_at_peak = self._births

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(kind, "_local_tensor") or kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # DTensor replaces it by operations on its local tensors, which come here again
        self._count_sum()
        result = func(*args, **(kwargs or {}))
        if active_fake_mode() is not self._fake_mode:  # DTensor computes a shape
            return result
        if func is torch.ops.aten.add.Tensor and not torch.is_grad_enabled():
            # In a backward pass: autograd adds two gradients of one tensor in place, but not where it sees a dispatch mode.
            # Both are freed after it, so the sum is counted when the next operation begins, in the place of one of them.
            self._sum = weakref.ref(local_part(result).untyped_storage())
            return result
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        if func.namespace == "fsdp" and func._opname == "split_with_sizes_copy":
            for leaf in (kwargs or {})["out"]:
                self._move_to(leaf.untyped_storage(), "gathered weights")
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
            self._move_to(storage, "gathered weights")
            return result

        torch.UntypedStorage.resize_ = counted_resize  # type: ignore[method-assign]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._count_sum()
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*error)
