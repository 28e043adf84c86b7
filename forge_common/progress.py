"""Where a run is, as JSON beside what `save_state` wrote; and whether a run that resumes is still the same run."""

import dataclasses
from pathlib import Path
from typing import Any

from .config import differences, to_json
from .errors import UserError
from .files import read_json

# What a resumed run may change without a word: none of it changes what is learned, or in which order.
FREE = {"output_dir", "resume", "accept_change", "micro_batch_size", "log_every", "save_every", "val_every", "keep"}
FREE |= {"tracker", "project", "run_name", "cache_dir", "dry_run", "patience", "max_bad_updates", "hang_timeout"}
FREE |= {"on_full_disk"}
# What it may change by saying so (--accept-change): the data's order and the model's shape stay what they were.
ACCEPTABLE = {"steps", "lr", "schedule", "warmup_steps", "min_lr_ratio", "weight_decay", "max_grad_norm", "licence"}


@dataclasses.dataclass
class Progress:
    """Where a run is. Everything a resume needs and `save_state` does not keep."""

    run_id: str
    settings: dict[str, Any]
    data: dict[str, Any]  # digests of the tokens of each source, and of the tokenizer and the trunk
    global_step: int = 0  # updates done; the next one takes the windows from global_step * batch_size on
    epoch: float = 0.0
    tokens: int = 0  # scored tokens seen
    best_val_loss: float | None = None
    best_step: int = 0
    validations_without_gain: int = 0
    validation_due: bool = False  # of global_step: the run was asked to stop before it was through
    bad_updates: int = 0  # not applied, for a gradient that was NaN or Inf
    bad_in_a_row: int = 0
    empty_updates: int = 0  # not applied, for there was no token to learn from
    scaler_skips: int = 0  # fp16: not applied while the loss scale was looking for its place
    seconds: float = 0.0  # spent in updates
    expert_counts: list[list[int]] = dataclasses.field(default_factory=list)  # of the last update; the balance loss's f
    interval: list[float] = dataclasses.field(default_factory=list)  # sums since the last line of the log
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)  # what a script wants to know again at its end


def begin(settings: Any, data: dict[str, Any], run_id: str) -> Progress:
    """The progress of a run that has not begun."""
    return Progress(run_id=run_id, settings=to_json(settings), data=data)


def read_progress(file: Path) -> Progress:
    try:
        return Progress(**read_json(file))
    except TypeError as reason:
        raise UserError(f"{file} is of another version of forge ({reason}). Go on with that one.") from None


def check_same(before: Progress, fresh: Progress, accepted: tuple[str, ...], where: Path) -> None:
    """Refuses a run whose settings or data are not the checkpoint's, with the difference and the mend."""
    changed = differences(before.settings, fresh.settings) | {
        f"digest of {name}": (str(old)[:12], str(new)[:12])
        for name, (old, new) in differences(before.data, fresh.data).items()
    }
    said = {name.replace("-", "_") for name in accepted} & ACCEPTABLE
    refused = {name: pair for name, pair in changed.items() if name not in FREE | said}
    if refused:
        lines = "\n".join(f"  {name}: {old!r} -> {new!r}" for name, (old, new) in refused.items())
        mend = [f"--accept-change {name.replace('_', '-')}" for name in refused if name in ACCEPTABLE]
        raise UserError(
            f"{where} is of a run with other settings or data:\n{lines}\n"
            + (f"Say so with {' '.join(mend)}, " if len(mend) == len(refused) else "Restore them, ")
            + "or start another run with another --output-dir."
        )
