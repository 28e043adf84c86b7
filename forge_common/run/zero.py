"""DeepSpeed's ZeRO-2 and ZeRO-3 in the training loop, which decides whether an update is applied.

Two things differ from the other engines, and are changed here:
- accelerate steps inside `accelerator.backward`, before loss and gradient norm are known. `prepare` moves the step to
  `optimizer.step`.
- In bf16 the float32 weights start from the rounded ones. `prepare` sets them to the model's own.

zero_state.py reads and writes the weights and moments.
"""

import re
from typing import Any

import torch

from ..errors import UserError
from . import zero_state

OLDEST = (0, 19, 8)  # the first that was run, and whose ZeRO-3 and float32 discard a gradient that is not finite


def configure(accelerator: Any, settings: Any) -> None:
    """Completes DeepSpeed's configuration from `settings`.

    UserError where it contradicts them, or asks for what was never run. The micro-batch size is set because DeepSpeed
    would read it from a prepared data loader, and there is none. Gradients are summed in float32, over micro-batches
    and over processes, also in bf16, unless a DeepSpeed file says otherwise.
    """
    plugin = accelerator.state.deepspeed_plugin
    config = plugin.deepspeed_config
    version = str(zero_state.library().__version__)
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < OLDEST:
        raise UserError(
            f"DeepSpeed {version} applies gradients that are not finite. Install {'.'.join(map(str, OLDEST))} or newer."
        )
    if plugin.zero_stage not in (2, 3):
        raise UserError(
            f"DeepSpeed's zero_stage is {plugin.zero_stage}. Use 2 or 3, or accelerate_configs/multi_gpu.yaml."
        )
    backend = accelerator.state.dynamo_plugin.backend.value.lower()
    if plugin.zero_stage == 3 and backend != "no":  # the head's weight is used outside its module: it would be empty
        raise UserError(
            f"--dynamo_backend {backend}: torch.compile does not find the weights that ZeRO-3 gathers. Leave it out, or use "
            "accelerate_configs/fsdp2.yaml or deepspeed_zero2.yaml."
        )
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise UserError(
            f"DeepSpeed with mixed precision {accelerator.mixed_precision} is not supported: its loss scale is not part of "
            "the checkpoints. Launch with --mixed_precision bf16 or no, or use accelerate_configs/multi_gpu_fp16.yaml."
        )
    if settings.dtype != "float32":
        raise UserError(f"--dtype {settings.dtype}: DeepSpeed updates float32 weights. Use float32, or another engine.")
    for part in ("offload_optimizer", "offload_param"):
        device = config.get("zero_optimization", {}).get(part, {}).get("device") or "none"
        if device != "none":
            raise UserError(f"DeepSpeed's {part}_device is {device}, which was never run with these scripts. Use none.")
    clipping = config.get("gradient_clipping", "auto")
    if clipping not in ("auto", settings.max_grad_norm):
        raise UserError(
            f"DeepSpeed's gradient_clipping is {clipping}, --max-grad-norm is {settings.max_grad_norm}. Set both to the same "
            "number, or gradient_clipping to auto."
        )
    config["gradient_clipping"] = settings.max_grad_norm
    config["train_micro_batch_size_per_gpu"] = settings.micro_batch_size
    config.setdefault("communication_data_type", "fp32")
    config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    if accelerator.mixed_precision == "bf16":
        config["bf16"]["check_grad_overflow"] = True  # Optimizer needs it


class Engine:
    """In place of accelerate's DeepSpeedEngineWrapper: `backward` does not step, and the norm is known before the step."""

    def __init__(self, engine: Any):
        self.engine = engine  # accelerate calls engine.destroy at the end

    def backward(self, loss: torch.Tensor, sync_gradients: bool = True, **more: Any) -> None:
        """As accelerate's, without the step. DeepSpeed divides by the number of micro-batches."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss, **more)

    def get_global_grad_norm(self) -> float:
        """The norm of the whole gradient, NaN or Inf where an element is; DeepSpeed's is that of the last step. A collective."""
        zero = self.engine.optimizer
        squares = sum(gradient.double().square().sum() for gradient in zero_state.gradients(zero))
        total = torch.as_tensor(squares, dtype=torch.float64, device=self.engine.device).clone()
        torch.distributed.all_reduce(total, group=zero.dp_process_group)
        return total.sqrt().item()


class Optimizer:
    """In place of accelerate's DeepSpeedOptimizerWrapper, whose methods do nothing.

    `step` applies the update; `zero_grad` discards one that was not applied. Both do nothing before the last
    micro-batch, as with the other engines. DeepSpeed has no call that discards a gradient, but it discards one that is
    not finite: so `zero_grad` makes an element NaN.
    """

    def __init__(self, accelerator: Any, engine: Any):
        self.accelerator = accelerator
        self.engine = engine
        self._applied = False

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.engine.optimizer.param_groups

    def step(self) -> None:
        if self.accelerator.sync_gradients:
            self._end_update(discard=False)
            self._applied = True

    def zero_grad(self) -> None:
        if self.accelerator.sync_gradients:
            if not self._applied:
                self._end_update(discard=True)
            self._applied = False

    def _end_update(self, *, discard: bool) -> None:
        if discard:
            zero_state.make_gradient_nan(self.engine.optimizer)
        self.engine.step()
        applied = self.engine.was_step_applied()
        if applied == discard:
            raise AssertionError(
                f"DeepSpeed {'applied' if applied else 'skipped'} an update that was to be the other way"
            )


def prepare(accelerator: Any, model: Any, optimizer: Any) -> tuple[Any, Any]:
    """`accelerator.prepare` of a Trunk under DeepSpeed; returns the engine, and an optimizer that steps when the loop calls it."""
    weights = {
        name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    flops = [model.flops_per_token(length) for length in (0, 1)]
    engine, _ = accelerator.prepare(model, optimizer)
    # flops_per_token counts the parameters' elements, and ZeRO-3's have none outside of a forward pass. It is linear in
    # the length, so two values from before give all others.
    model.flops_per_token = lambda length: flops[0] + length * (flops[1] - flops[0])
    if accelerator.mixed_precision != "no":
        zero_state.set_weights(model, engine.optimizer, weights)
    accelerator.deepspeed_engine_wrapped = Engine(engine)
    return engine, Optimizer(accelerator, engine)
