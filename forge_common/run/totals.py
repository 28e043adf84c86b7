"""What the processes of a run tell each other after an update: one collective, read from the device once."""

from typing import Any, NamedTuple

import torch


class Totals(NamedTuple):
    """Sums over all ranks. loss: nats of the update. num_scored: of the windows of the next update. stop: ranks with a
    signal.

    grad_norm: before clipping; it is the same on every rank. expert_counts: [L][E] assignments, [] without experts.
    assignments: the same [L, E] on the device, where a copy from the host would be another wait.
    """

    loss: float
    grad_norm: float
    num_scored: int
    stop: int
    expert_counts: list[list[int]]
    assignments: torch.Tensor


def update_totals(accelerator: Any, sums: list[Any], grad_norm: Any, num_scored: torch.Tensor, stop: Any) -> Totals:
    """The totals of an update of micro-batches `sums` (loss.Sums). A collective, and the only wait for the device in an
    update.

    num_scored: this rank's labels in the next update. stop: the run's StopRequest.
    """
    dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
    counts = torch.stack([part.expert_counts for part in sums]).sum(0)
    # Filled on the device: a copy from the host would wait for it.
    stopping = torch.full((), bool(stop.exit_code), dtype=dtype, device=accelerator.device)
    objective = torch.stack([part.objective.detach() for part in sums]).sum(dtype=dtype)
    scalars = torch.stack((objective, num_scored.to(dtype), stopping))
    total = accelerator.reduce(torch.cat((scalars, counts.flatten().to(dtype))), "sum")
    grad_norm = getattr(grad_norm, "full_tensor", lambda: grad_norm)()  # a DTensor under FSDP2
    norm = torch.as_tensor(grad_norm, dtype=dtype, device=accelerator.device)
    norm, loss, labels, stopped, *numbers = torch.cat((norm.reshape(1), total)).tolist()
    layers, experts = counts.shape
    rows = [[int(number) for number in numbers[i * experts : (i + 1) * experts]] for i in range(layers)]
    return Totals(loss, norm, int(labels), int(stopped), rows, total[len(scalars) :].to(counts.dtype).view_as(counts))
