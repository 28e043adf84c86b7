"""The loss on held-out windows: every label exactly once, for any number of processes and any batch size.

T time, P processes
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from .errors import UserError
from .run.engines import unwrap


class Validation(NamedTuple):
    """The result of a validation."""

    loss: float
    """Nats per token, over all sources."""
    tokens: int
    """Scored labels."""
    bits_per_byte: float
    """Of the text of these labels; NaN where its bytes are not known."""
    losses: dict[str, float]
    """Nats per token of each source."""

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


@torch.no_grad()
def validate(
    accelerator: Any, model: torch.nn.Module, stores: Sequence[Any], batch_size: int, stop: Any = None
) -> Validation | None:
    """The mean loss over all windows [T + 1] of `stores` (data.held_out), without gradients. A collective.

    Rank r scores the windows r, r + P, r + 2P, ... of each store; no window is repeated. The sums of nats and tokens
    are reduced once, at the end. None where `stop`, the run's StopRequest, interrupts it.

    The last batches are filled up with windows of padding, which add 0: under FSDP every forward pass is a collective,
    so all ranks must run the same number, and torch.compile would compile another shape again.
    """
    training = model.training
    model.eval()
    config: Any = unwrap(accelerator, model).config
    processes = accelerator.num_processes
    rank = accelerator.process_index
    dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64  # MPS has no float64
    totals = torch.zeros(len(stores), 2, dtype=dtype, device=accelerator.device)
    batches = [(i, start) for i, store in enumerate(stores) for start in range(0, len(store), processes * batch_size)]
    for i, start in batches:
        if stop and stop.check(accelerator):
            model.train(training)
            return None
        store = stores[i]
        batch = range(start + rank, min(start + processes * batch_size, len(store)), processes)
        windows = np.full((batch_size, store.windows.sequence_length + 1), config.ignore_index)
        for row, index in enumerate(batch):
            windows[row] = store[index]
        sums = model(torch.from_numpy(windows).to(accelerator.device))
        totals[i] += torch.stack((sums.nats, sums.tokens)).to(dtype)
        if stop:
            stop.heartbeat()
    totals = accelerator.reduce(totals, "sum").tolist()
    model.train(training)
    nats = math.fsum(part[0] for part in totals)
    tokens = sum(part[1] for part in totals)
    sizes = [store.bytes for store in stores]
    bits_per_byte = math.nan
    if None not in sizes and sum(sizes) > 0:
        bits_per_byte = nats / math.log(2) / sum(sizes)
    return Validation(
        loss=nats / max(tokens, 1),
        tokens=int(tokens),
        bits_per_byte=bits_per_byte,
        losses={store.source: n / max(t, 1) for store, (n, t) in zip(stores, totals, strict=True)},
    )


def domain_losses(
    accelerator: Any,
    model: torch.nn.Module,
    domains: Mapping[str, Sequence[Any]],
    batch_size: int,
    print_line: Callable[[str], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Tokens and nats per token (None without tokens) of each domain's held-out windows. A collective.

    print_line: prints what is scored; None: the accelerator's. UserError, on all ranks, for a loss that is not finite.
    """
    labels = {domain: sum(part.labels for part in windows) for domain, windows in domains.items()}
    scored = ", ".join(f"{domain} {number:,} tokens" for domain, number in labels.items() if number)
    if scored:
        (print_line or accelerator.print)(
            f"scoring     held-out text, for the losses before and after training: {scored}"
        )
    results = {domain: validate(accelerator, model, windows, batch_size) for domain, windows in domains.items()}
    for domain, result in results.items():
        if result is not None and result.tokens and not math.isfinite(result.loss):
            raise UserError(
                f"the loss on the held-out text ({domain}) is {result.loss}, not a finite number: some weights are too "
                "large. Use another trunk, or a lower --lr."
            )
    return {
        domain: {"tokens": result.tokens, "loss": result.loss if result.tokens else None}
        for domain, result in results.items()
        if result is not None
    }
