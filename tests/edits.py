"""The lines of the training scripts that tests replace, as a user edits them. No other test file has literal lines of them."""

BACKWARD = "accelerator.backward(sums[-1].objective * scale)"
SCALE = "scale = processes * accumulation / max(num_scored, 1)"
AFTER_MICRO_BATCH = "            stop.heartbeat()\n"
AFTER_UPDATE = "        progress.record(outcome, settings, corpora.training, log.print_line)\n"
AFTER_TRAINING = "    update_batches.close()\n"
PUBLISHED = "    exit_code = stop.end()\n"
TAKE_WINDOWS = "        windows, following = following, next(update_batches)"
LOSS = "update_outcome(totals.loss, "
CHECK_STOP = "        stop.agree(totals.stop > 0)\n"
SET_RATE = 'group["lr"] = rate'
CHECK_LAUNCH = "    check_launch(accelerator, accumulation, settings)\n"
BEGIN_TRAINING = "    stop.begin_training("
START_LOG = "    log = RunLog("
PREPARE = "    model, optimizer = engines.prepare(accelerator, trunk, optimizer)\n"
OPTIMIZER = "optimizers.make(trunk, settings, accelerator)"


def empty_update(step: int) -> str:
    """The update `step`, 2 or a later one, without a scored token: its windows are taken in the update before."""
    return f"{TAKE_WINDOWS}.fill_(0) if progress.global_step == {step - 2} else next(update_batches)"


def loss_of_update(value: str, step: int) -> str:
    """The loss of the update `step` replaced by `value`, an expression."""
    return f"update_outcome({value} if step == {step} else totals.loss, "


def scaled_by(factor: str) -> str:
    """The backward pass with `factor`, an expression, in place of the exact scale."""
    return BACKWARD.replace("* scale", f"* {factor}")


def interrupted_at(step: int) -> str:
    """A stop at the end of update `step`, as after a signal, but with exit code 0."""
    return CHECK_STOP + f'        stop.reason = "signal" if step == {step} else stop.reason\n'
