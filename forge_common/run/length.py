"""How long a run is and how large a new model, from the text, --budget and the speed of the machine.

A resumed run keeps both.
"""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import UserError
from ..files.atomic import read_json
from ..flags import flag_of
from ..schedule import default_warmup
from ..settings import seconds_of
from .checkpoint_folder import checkpoints_of, complete
from .hardware import compute_dtype, peak_flops
from .pace import duration
from .totals import from_main_process

MANY_PASSES = 4  # over a text; more of them teach little. Source: Muennighoff et al., arXiv 2305.16264
MOST_UPDATES = 10_000  # of a run whose length is not given
# That a preset needs. 20 are best for a given time (Hoffmann et al., arXiv 2203.15556), and presets lie far apart.
TOKENS_PER_PARAMETER = 10
# Share of the peak that an update reaches, about, where none is timed (docs/PERFORMANCE.md, docs/ENGINES.md).
ASSUMED_MFU = 0.4


def with_preset(settings: Any, corpora: Any, presets: dict[str, tuple[int, int]], accelerator: Any) -> Any:
    """The settings with a preset in place of auto: the largest that the run's tokens teach, within --budget. A
    collective.

    presets: parameters, and FLOPs of an update per token, the smallest first; {} where a preset is given.
    """
    if not presets:
        return settings
    earlier = _earlier_settings(settings, accelerator)
    if earlier:
        return dataclasses.replace(settings, preset=earlier["preset"])
    if settings.steps:
        windows = settings.steps * settings.batch_size
    elif settings.epochs is not None:
        windows = settings.epochs * corpora.training.size
    else:
        windows = min(MANY_PASSES * corpora.training.size, MOST_UPDATES * settings.batch_size)
    affordable = math.inf  # FLOPs
    if settings.budget:
        affordable = _flops(settings, accelerator) * seconds_of(settings.budget)
    preset = next(iter(presets))  # the smallest, if the tokens are too few even for it
    tokens: dict[str, float] = {}
    for name, (parameters, flops) in presets.items():
        tokens[name] = min(windows * settings.sequence_length, affordable / flops)
        if tokens[name] >= TOKENS_PER_PARAMETER * parameters:
            preset = name
    parameters = presets[preset][0]
    accelerator.print(
        f"size        preset {preset}: the run has {tokens[preset] / 1e6:,.3g} M tokens, "
        f"{tokens[preset] / parameters:,.2g} for each of its {parameters / 1e6:,.3g} M parameters. --preset changes it"
    )
    return dataclasses.replace(settings, preset=preset)


def with_length(settings: Any, corpora: Any, trunk: Any, accelerator: Any) -> Any:
    """The settings with numbers for --steps, --warmup-steps and --val-fraction in place of None, --epochs and --budget.
    A collective.

    UserError where the warm-up is longer than the run.
    """
    size = corpora.training.size
    steps = settings.steps or max(1, int((settings.epochs or MANY_PASSES) * size / settings.batch_size))
    if settings.budget:
        steps = min(steps, _within_budget(settings, corpora, trunk, accelerator))
    elif not settings.steps and settings.epochs is None:
        steps = min(steps, MOST_UPDATES)
        accelerator.print(
            f"length      {steps:,} updates: {MANY_PASSES} passes over the text, since more teach little, but at most "
            f"{MOST_UPDATES:,}. --epochs, --budget or --steps change it"
        )
    warmup = default_warmup(steps) if settings.warmup_steps is None else settings.warmup_steps
    if warmup > steps:
        raise UserError(f"--warmup-steps {warmup} exceeds the {steps} updates of the run. Lower it, or train longer.")
    fraction = (settings.val_fraction or 0.01) if settings.val_data else corpora.fraction
    return dataclasses.replace(
        settings, steps=steps, epochs=None, budget=None, warmup_steps=warmup, val_fraction=fraction
    )


def _within_budget(settings: Any, corpora: Any, trunk: Any, accelerator: Any) -> int:
    """Updates that --budget allows, validations included; of a run that continues, those that it has."""
    earlier = _earlier_settings(settings, accelerator)
    if earlier:
        accelerator.print(f"length      {earlier['steps']:,} updates, as when this run began")
        return earlier["steps"]
    micro_batch, how = _micro_batch_seconds(settings, corpora, trunk, accelerator)
    windows = settings.micro_batch_size * accelerator.num_processes
    update = micro_batch * settings.batch_size / windows
    labels = sum(part.labels for part in corpora.held_out)
    validation = micro_batch / 3 * labels / (windows * settings.sequence_length)  # a third: there is no backward pass
    budget = seconds_of(settings.budget)
    each = update + (validation / settings.val_every if settings.val_every else 0)
    steps = max(1, int((budget - validation) / each))
    accelerator.print(
        f"length      at most {steps:,} updates in {duration(budget)}: an update takes about {update:.2g} s, a "
        f"validation {validation:.2g} s ({how}), and {MANY_PASSES} passes over the text teach most of it"
    )
    return steps


def _micro_batch_seconds(settings: Any, corpora: Any, trunk: Any, accelerator: Any) -> tuple[float, str]:
    """Seconds of a micro-batch, forward and backward, the mean of all processes; and how they were found."""
    if accelerator.distributed_type.value in ("FSDP", "DEEPSPEED"):  # one device may not hold the model
        tokens = settings.micro_batch_size * settings.sequence_length
        seconds = tokens * trunk.flops_per_token(settings.sequence_length) / _flops(settings, accelerator)
        return seconds * accelerator.num_processes, f"computed from {ASSUMED_MFU:.0%} of the device's peak"
    trunk.to(accelerator.device)
    windows = corpora.training.windows(np.arange(settings.micro_batch_size) % corpora.training.size)
    windows = torch.from_numpy(windows).to(accelerator.device)
    for _ in range(2):  # the first one starts threads and allocates
        start = time.perf_counter()
        with accelerator.autocast():
            sums = trunk(windows)
        sums.objective.backward()
        sums.objective.item()  # waits for the device
        seconds = time.perf_counter() - start
        trunk.zero_grad(set_to_none=True)
    return _mean(seconds, accelerator), "timed"


def _flops(settings: Any, accelerator: Any) -> float:
    """FLOP/s that training reaches on all devices, about."""
    peak = peak_flops(accelerator.device, compute_dtype(accelerator.mixed_precision, settings.dtype))
    return ASSUMED_MFU * _mean(peak, accelerator) * accelerator.num_processes


def _mean(value: float, accelerator: Any) -> float:
    """The same number on each process."""
    return float(accelerator.reduce(torch.tensor(value, device=accelerator.device), "mean"))


def _earlier_settings(settings: Any, accelerator: Any) -> dict[str, Any]:
    """The settings of the run that this one continues, or {}, as the main process finds them. A collective.

    UserError where they are damaged.
    """
    found: dict[str, Any] = {}
    file = Path(settings.output_dir) / "settings.json"
    checkpoints = complete(checkpoints_of(settings))
    if settings.resume != "never" and accelerator.is_main_process and checkpoints and file.is_file():
        followed = {"steps": int, "preset": str} if "preset" in vars(settings) else {"steps": int}
        problem = f"{file} has no {' and '.join(followed)}"
        try:
            found = read_json(file)
        except UserError as reason:
            problem = str(reason).split(". ")[0]
        if not all(isinstance(found.get(name), kind) for name, kind in followed.items()):
            flags = " and ".join(map(flag_of, followed))
            raise UserError(
                f"{problem}, from which a run that continues has its length and size. Give the {flags} that "
                f"{checkpoints[-1]}/progress.json has, in place of --budget."
            )
    return from_main_process(accelerator, found)
