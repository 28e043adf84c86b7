"""The progress of a run, stored as JSON in its checkpoints, and the check that a resumed run has the same settings."""

import dataclasses
import math
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError
from ..files.atomic import read_json
from ..settings import defaults, differences, to_json
from .agreement import check_agreement

# Settings that a resumed run may change. They affect neither the updates nor the order of the data.
FREE = {
    "output_dir",
    "resume",
    "accept_change",
    "micro_batch_size",
    "log_every",
    "save_every",
    "val_every",
    "keep",
    "tracker",
    "project",
    "run_name",
    "log_artifact",
    "cache_dir",
    "dry_run",
    "patience",
    "max_bad_updates",
    "hang_timeout",
    "on_full_disk",
    "activation_checkpointing",
    "deterministic",
    "sample_prompt",
    "push_to_hub",
}
# Settings that a resumed run may change with --accept-change. They affect the updates, but neither the order of the
# data nor the model's shape.
ACCEPTABLE = {
    "steps",
    "lr",
    "schedule",
    "warmup_steps",
    "min_lr_ratio",
    "weight_decay",
    "max_grad_norm",
    "licence",
    "beta1",
    "beta2",
    "eps",
    "wsd_decay_share",
    "module_dtype",
    "mixed_precision",  # of the launcher
}


def due(step: int, every: int, last: int) -> bool:
    """Whether what happens every `every` updates (0: never) happens after update `step`; always after the last."""
    return step == last or (every > 0 and step % every == 0)


class UpdateOutcome(NamedTuple):
    loss: float
    """Sum over the scored tokens, in nats."""
    grad_norm: float
    num_scored: int
    finite: bool
    """Whether loss and gradient are."""
    overflow: bool
    """fp16: the loss scale was too large."""
    applied: bool


PENDING = UpdateOutcome(math.nan, math.nan, 0, finite=False, overflow=False, applied=False)


def update_outcome(loss: float, grad_norm: float, num_scored: int, scaler: Any) -> UpdateOutcome:
    """Decides whether an update is applied: only with a finite loss, a finite gradient and at least one scored token.

    scaler: of fp16, else None. After an overflow the optimizer is called too: the scaler then skips the update and
    lowers its scale. For an update without a call of the optimizer, `scaler.update` is called here, with the same
    scale: otherwise the scaler would refuse the next update.
    """
    finite = math.isfinite(grad_norm) and math.isfinite(loss)
    overflow = scaler is not None and not finite and math.isfinite(loss)
    applied = num_scored > 0 and (finite or overflow)
    if scaler is not None and not applied:
        scaler.update(scaler.get_scale())
    return UpdateOutcome(loss, grad_norm, num_scored, finite, overflow, applied)


@dataclasses.dataclass
class Progress:
    """The part of a run's state that is not in the files of `save_state`."""

    run_id: str
    settings: dict[str, Any]
    data: dict[str, Any]  # digests of the tokens of each source, and of the tokenizer and the trunk
    global_step: int = 0  # updates done; the next one takes the windows from global_step * batch_size on
    epoch: float = 0.0
    passes: dict[str, float] = dataclasses.field(default_factory=dict)  # of each source of a weighted mixture
    tokens: int = 0  # scored tokens seen
    best_val_loss: float | None = None
    best_step: int = 0
    best_tokens: int | None = None  # scored tokens seen at best_step
    validations_without_gain: int = 0
    validation_due: bool = False  # the validation of global_step was interrupted by a signal
    bad_updates: int = 0  # not applied: the gradient or the loss was NaN or Inf
    bad_in_a_row: int = 0
    empty_updates: int = 0  # not applied: no token was scored
    scaler_skips: int = 0  # fp16: not applied while the loss scale was being adjusted
    expert_counts: list[list[int]] = dataclasses.field(default_factory=list)  # of the last update, for the balance loss
    interval: list[float] = dataclasses.field(default_factory=list)  # sums since the log's last row
    losses_before: dict[str, Any] = dataclasses.field(default_factory=dict)  # held-out losses before training

    def record(self, outcome: UpdateOutcome, settings: Any, training: Any, print_line: Callable[[str], None]) -> None:
        """Counts one update by its outcome.

        UserError where the gradient is 0, and, naming the documents, after too many bad updates in a row.
        """
        self.global_step += 1
        self.epoch = training.epoch(self.global_step * settings.batch_size)
        self.passes = training.passes(self.global_step * settings.batch_size)
        if outcome.finite:
            self.tokens += outcome.num_scored
            self.empty_updates += outcome.num_scored == 0
            self.bad_in_a_row = 0
            if outcome.loss > 0 and outcome.grad_norm == 0 and outcome.num_scored > 0:
                raise UserError(
                    f"the gradient of update {self.global_step} is 0, and its loss is not: nothing would be learned. "
                    "Versions of torch before the one in requirements.txt can lose gradients with torch.compile: "
                    "install that one, or launch without --dynamo_backend."
                )
        elif outcome.overflow:
            self.scaler_skips += 1
        else:
            self.bad_updates += 1
            self.bad_in_a_row += 1
            print_line(
                f"update {self.global_step}: loss {outcome.loss}, gradient {outcome.grad_norm}: not applied "
                f"({self.bad_updates} so far)"
            )
            if self.bad_in_a_row >= settings.max_bad_updates:
                self._diverged(settings.batch_size, training)

    def _diverged(self, batch_size: int, training: Any) -> None:
        first = self.global_step - self.bad_in_a_row
        documents = training.origins(range(first * batch_size, self.global_step * batch_size))
        named = ", ".join(documents[:20]) + (f" and {len(documents) - 20} more" if len(documents) > 20 else "")
        raise UserError(
            f"the loss or the gradient was NaN or Inf in updates {first + 1} to {self.global_step}; none of them was "
            f"applied. Their documents: {named}. Lower --lr, raise --warmup-steps, or check these documents; the same "
            "command resumes from the last checkpoint."
        )

    def record_validation(self, result: Any) -> bool:
        """Records a `Validation`; None was interrupted and stays due. Returns whether it is the best so far."""
        self.validation_due = result is None
        if result is None:
            return False
        improved = result.loss < (math.inf if self.best_val_loss is None else self.best_val_loss)
        if improved:
            self.best_val_loss = result.loss
            self.best_step = self.global_step
            self.best_tokens = self.tokens
        self.validations_without_gain = 0 if improved else self.validations_without_gain + 1
        return improved

    def patience_is_over(self, patience: int) -> bool:
        """Whether none of the last `patience` validations was the best so far; never with 0."""
        return 0 < patience <= self.validations_without_gain

    def published(self) -> dict[str, int]:
        """The counts at the update whose weights are published: the best by validation, else the newest."""
        return {
            "steps": self.best_step or self.global_step,
            "tokens_seen": self.tokens if self.best_tokens is None else self.best_tokens,
            "bad_updates": self.bad_updates,
        }


def new_progress(
    accelerator: Any, settings: Any, corpora: Any, tokenizer: Any, trunk_metadata: dict[str, Any], general: Any = ()
) -> Progress:
    """The progress of a run before its first update, with a new run id. A collective.

    trunk_metadata: {} for a new trunk. general: the windows of a general sample. UserError where the processes of the
    run have other settings, data or versions than the main process, or do not see its output directory.
    """
    data = {**corpora.digests, "tokenizer": tokenizer.digest, "trunk": trunk_metadata.get("digest")}
    general_digests = {f"general sample {i}": windows.tokens.digest for i, windows in enumerate(general)}
    check_agreement(accelerator, settings, data | general_digests)
    identity = to_json(settings) | {"mixed_precision": accelerator.mixed_precision}
    return Progress(run_id=secrets.token_hex(4), settings=identity, data=data)


def read_progress(file: Path) -> Progress:
    """The content of a checkpoint's progress.json."""
    try:
        return Progress(**read_json(file))
    except TypeError as reason:
        raise UserError(
            f"{file} was written by another version of forge ({reason}). Resume with that version."
        ) from None


def check_same(before: Progress, fresh: Progress, settings: Any, where: Path) -> None:
    """UserError that lists the differences, where the settings or the data are not the checkpoint's.

    A setting that was added to the script since the checkpoint counts as having had its default.
    """
    changed = differences(defaults(settings) | before.settings, fresh.settings)
    for name, (old, new) in differences(before.data, fresh.data).items():
        changed[f"digest of {name}"] = (str(old)[:12], str(new)[:12])
    acceptable = set(ACCEPTABLE)
    if fresh.settings["mixed_precision"] == "fp16":  # the checkpoint has no loss scale
        acceptable.remove("mixed_precision")
    accepted = {name.replace("-", "_") for name in settings.accept_change}
    allowed = FREE | (accepted & acceptable)
    refused = {name: pair for name, pair in changed.items() if name not in allowed}
    if refused:
        lines = "\n".join(f"  {name}: {old!r} -> {new!r}" for name, (old, new) in refused.items())
        names = " ".join(name.replace("_", "-") for name in [*settings.accept_change, *refused])
        remedy = f"Accept with --accept-change {names}" if refused.keys() <= acceptable else "Restore them"
        raise UserError(
            f"{where} belongs to a run with other settings or data:\n{lines}\n"
            f"{remedy}, or start another run with another --output-dir."
        )
