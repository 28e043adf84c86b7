"""What the processes of a run exchange: the sums of an update, in one collective, and values of the main process."""

from typing import Any, NamedTuple, TypeVar

import torch

Value = TypeVar("Value")


class Totals(NamedTuple):
    """Sums over all ranks, but for grad_norm."""

    loss: float
    """Nats of the update."""
    grad_norm: float
    """Before clipping; the same on every rank."""
    following_scored: int
    """Scored labels of the update that follows."""
    stop: int
    """Ranks that received a signal."""
    expert_counts: list[list[int]]
    """Assignments [L][E]; [] without experts."""
    assignments: torch.Tensor
    """The same [L, E] on the device: to copy them there would wait for it once more."""


def update_totals(
    accelerator: Any, sums: list[Any], grad_norm: Any, following_scored: torch.Tensor, stop: Any
) -> Totals:
    """The totals of an update of micro-batches `sums` (loss.Sums). A collective, and the only wait for the device in an
    update.

    following_scored: this rank's scored labels in the update that follows. stop: the run's StopRequest.
    """
    dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
    counts = torch.stack([part.expert_counts for part in sums]).sum(0)
    # Filled on the device: a copy from the host would wait for it.
    stopping = torch.full((), bool(stop.exit_code), dtype=dtype, device=accelerator.device)
    objective = torch.stack([part.objective.detach() for part in sums]).sum(dtype=dtype)
    scalars = torch.stack((objective, following_scored.to(dtype), stopping))
    total = accelerator.reduce(torch.cat((scalars, counts.flatten().to(dtype))), "sum")
    if hasattr(grad_norm, "full_tensor"):  # a DTensor under FSDP2
        grad_norm = grad_norm.full_tensor()
    norm = torch.as_tensor(grad_norm, dtype=dtype, device=accelerator.device)
    norm, loss, following, stopped, *numbers = torch.cat((norm.reshape(1), total)).tolist()  # the wait
    layers, experts = counts.shape
    rows = [[int(number) for number in numbers[i * experts : (i + 1) * experts]] for i in range(layers)]
    return Totals(
        loss=loss,
        grad_norm=norm,
        following_scored=int(following),
        stop=int(stopped),
        expert_counts=rows,
        assignments=total[len(scalars) :].to(counts.dtype).view_as(counts),
    )


def from_main_process(accelerator: Any, value: Value) -> Value:
    """The main process's `value`, on all ranks; the others' is not read. A collective."""
    values = [value]
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(values, src=0)
    return values[0]
