"""The loss on held-out windows: every label exactly once, for any number of processes and any batch size.

T time, P processes
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch


class Validation(NamedTuple):
    """loss: nats per token. tokens: scored labels. bits_per_byte: of the UTF-8 text (0 bytes: NaN)."""

    loss: float
    tokens: int
    bits_per_byte: float

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


@torch.no_grad()
def validate(
    accelerator: Any, model: torch.nn.Module, stores: Sequence[Any], batch_size: int, stop: Any = None
) -> Validation | None:
    """The mean loss over all windows [T + 1] of `stores` (data.windows), without gradients. A collective.

    Rank r scores the windows r, r + P, r + 2P, ...; no window is repeated. The sums of nats and tokens are reduced once, at
    the end. Padding, which adds 0, fills the last batches up: under FSDP every forward pass is a collective, so all ranks run
    the same number, and torch.compile would compile another shape again. None where `stop`, the run's StopRequest, interrupts it.
    """
    training = model.training
    model.eval()
    bare = accelerator.unwrap_model(model, keep_torch_compile=False)
    places = [(store, index) for store in stores for index in range(len(store))]
    processes = accelerator.num_processes
    rank = accelerator.process_index
    dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64  # MPS has no float64
    total = torch.zeros(2, dtype=dtype, device=accelerator.device)
    for start in range(0, len(places), processes * batch_size):
        if stop and stop.check(accelerator):
            model.train(training)
            return None
        batch = places[start + rank : start + processes * batch_size : processes]
        padding = np.full_like(places[0][0][0], bare.config.ignore_index)
        windows = np.stack([*(store[i] for store, i in batch), *[padding] * (batch_size - len(batch))])
        sums = model(torch.from_numpy(windows).to(accelerator.device))
        total += torch.stack((sums.nats, sums.tokens)).to(total.dtype)
        if stop:
            stop.heartbeat()
    total = accelerator.reduce(total, "sum")
    model.train(training)
    nats, tokens = total.tolist()
    size = sum(store.tokens.bytes for store in stores)
    return Validation(nats / max(tokens, 1), int(tokens), nats / math.log(2) / size if size else math.nan)


def domain_losses(
    accelerator: Any, model: torch.nn.Module, domains: dict[str, Sequence[Any]], batch_size: int
) -> dict[str, dict[str, Any]]:
    """Tokens and nats per token (None without tokens) of each domain's held-out windows. A collective."""
    results = {domain: validate(accelerator, model, windows, batch_size) for domain, windows in domains.items()}
    return {
        domain: {"tokens": result.tokens, "loss": result.loss if result.tokens else None}
        for domain, result in results.items()
        if result is not None
    }
