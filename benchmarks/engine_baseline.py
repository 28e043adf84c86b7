"""The loop that train_shared.py is compared with: the same model, windows and optimizer in plain PyTorch.

    PYTHONPATH=. python benchmarks/engine_baseline.py ...the flags of train_shared.py...

No accelerate, no logging, no schedule, no checkpoints. The windows are in memory before the first update, and the
logits of a micro-batch exist as a whole, as F.cross_entropy needs them. The measurements are written at the end, under
the names that train_shared.py uses. With --trunk-from it starts from the weights of a checkpoint. One process; device
and precision come from the environment of `accelerate launch`.

B batch, T time, V vocabulary
"""

import itertools
import json
import math
import os
import sys
import time

from forge_common.command_line import read_settings, run_main
from forge_common.settings import to_json
from train_shared import Settings

SETTLE_SECONDS = 0.2  # before the first update: engine.py reads the memory of this process in that time


def main(settings: Settings) -> int:
    import torch
    import torch.nn.functional as F

    from forge_common.artifacts.trunk_folder import read_trunk
    from forge_common.data.corpora import open_corpora, tokenizer_for
    from forge_common.data.order import updates
    from forge_common.files.atomic import write_json
    from forge_common.model.presets import model_config
    from forge_common.model.trunk import Trunk
    from forge_common.optimizers import parameter_groups
    from forge_common.run.log import peak_memory_mb, process_peak_mb

    use_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    device = (None if use_cpu else torch.accelerator.current_accelerator()) or torch.device("cpu")
    low = os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"
    torch.manual_seed(settings.seed)

    if settings.trunk_from:
        trunk, tokenizer, _ = read_trunk(settings.trunk_from)
    else:
        tokenizer = tokenizer_for(settings)
        trunk = Trunk(model_config(settings, tokenizer))
    sizes, trunk = trunk.config, trunk.to(device)
    optimizer = torch.optim.AdamW(
        parameter_groups(trunk, settings.weight_decay), lr=settings.lr, betas=(0.9, 0.95), fused=device.type != "mps"
    )
    stream = updates(
        open_corpora(settings, tokenizer, sizes, print).training,
        start=0,
        batch_size=settings.batch_size,
        micro_batch_size=settings.micro_batch_size,
        rank=0,
        processes=1,
        device=device,
    )
    batches = [next(stream) for _ in range(settings.steps)]  # each [micro-batches, micro_batch_size, T + 1]
    stream.close()

    def cross_entropy(tokens: torch.Tensor) -> torch.Tensor:
        """tokens [B, T + 1] -> mean nats. A function, so that nothing holds the logits [B * T, V] longer than needed."""
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=low):
            hidden, _ = trunk.model(inputs)
            logits = hidden.flatten(0, 1) @ trunk.head.T
            return F.cross_entropy(logits, labels.flatten(), ignore_index=sizes.ignore_index)

    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() == "inductor":
        cross_entropy = torch.compile(cross_entropy)

    def now() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    assert "accelerate" not in sys.modules, (
        "accelerate is loaded in the baseline, so its memory is not that of a plain loop"
    )
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(settings.output_dir / "settings.json", to_json(settings))
    time.sleep(SETTLE_SECONDS)

    trunk.train()
    marks = [(0, now(), math.nan)]
    nats = torch.zeros((), device=device)
    for step, windows in enumerate(batches, start=1):
        for micro_batch in windows:
            loss = cross_entropy(micro_batch) / len(windows)
            loss.backward()
            nats += loss.detach()
        torch.nn.utils.clip_grad_norm_(trunk.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if step % settings.log_every == 0 or step == settings.steps:
            marks.append((step, now(), float(nats)))
            nats.zero_()

    tokens_per_update = settings.batch_size * settings.sequence_length
    with open(settings.output_dir / "metrics.jsonl", "w", encoding="utf-8") as file:
        for (before, start, _), (step, end, loss) in itertools.pairwise(marks):
            row = {
                "step": step,
                "train/loss": loss / (step - before),
                "train/tokens": step * tokens_per_update,
                "train/tokens_per_second": (step - before) * tokens_per_update / (end - start),
                "memory/peak_mb": peak_memory_mb(device),
                "memory/process_peak_mb": process_peak_mb(),
            }
            file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    run_main(main, read_settings(Settings, __doc__))
