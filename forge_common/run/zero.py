"""DeepSpeed's ZeRO-2 and ZeRO-3: the loop decides which update is applied, and weights and moments are read and written
as float32.

Two things differ from the other engines, and are changed here:
- accelerate steps inside `accelerator.backward`, before loss and gradient norm are known. `prepare` moves the step to
  `optimizer.step`.
- In bf16 the float32 weights start from the rounded ones. `prepare` sets them to the model's own.

Both stages keep float32 weights and AdamW's moments in flat partitions; deepspeed.utils.safe_* gather and set them by
parameter.
"""

import math
import re
from collections.abc import Iterator
from typing import Any

import torch

from ..errors import UserError
from ..files.tensors import Tensors

OLDEST = (0, 19, 8)  # the first that was run, and whose ZeRO-3 and float32 discard a gradient that is not finite


def configure(accelerator: Any, settings: Any) -> None:
    """Completes DeepSpeed's configuration from `settings`; UserError where it contradicts them or asks for what was
    never run.

    The micro-batch size: DeepSpeed would read it from a prepared data loader. The sums of gradients, over micro-batches
    and over processes, are float32 also in bf16, unless a DeepSpeed file says otherwise.
    """
    plugin = accelerator.state.deepspeed_plugin
    config = plugin.deepspeed_config
    version = str(_deepspeed().__version__)
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
        squares = sum(gradient.double().square().sum() for gradient in _gradients(zero))
        total = torch.as_tensor(squares, dtype=torch.float64, device=self.engine.device).clone()
        torch.distributed.all_reduce(total, group=zero.dp_process_group)
        return total.sqrt().item()


class Optimizer:
    """In place of accelerate's DeepSpeedOptimizerWrapper, whose methods do nothing: `step` applies the update, and
    `zero_grad` discards one that was not applied. Before the last micro-batch both do nothing, as accelerate's do.

    DeepSpeed has no call that discards a gradient. It does so by itself where one is not finite; so an element is made NaN.
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
            _spoil_gradient(self.engine.optimizer)
        self.engine.step()
        if self.engine.was_step_applied() == discard:
            raise AssertionError(
                f"DeepSpeed {'applied' if discard else 'skipped'} an update that was to be {'skipped' if discard else 'applied'}"
            )


def prepare(accelerator: Any, model: Any, optimizer: Any) -> tuple[Any, Any]:
    """`accelerator.prepare` of a Trunk under DeepSpeed; returns the engine, and an optimizer that steps when the loop calls it."""
    weights = {
        name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    flops = [model.flops_per_token(length) for length in (0, 1)]
    engine, _ = accelerator.prepare(model, optimizer)
    # ZeRO-3's parameters have no elements outside of a forward pass: flops_per_token, which counts them, is linear in the
    # length, so two values from before give all others.
    model.flops_per_token = lambda length: flops[0] + length * (flops[1] - flops[0])
    if accelerator.mixed_precision != "no":
        set_weights(model, engine.optimizer, weights)
    accelerator.deepspeed_engine_wrapped = Engine(engine)
    return engine, Optimizer(accelerator, engine)


def _deepspeed() -> Any:
    """The library, which is installed where it is used."""
    import deepspeed  # pyright: ignore[reportMissingImports]

    return deepspeed


# ---- Whole tensors: `zero` is ZeRO-2's or ZeRO-3's optimizer, engine.optimizer ----


def is_used(model: torch.nn.Module) -> bool:
    """Whether DeepSpeed divided the weights of `model`, which has no wrapper."""
    return any(hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping") for parameter in model.parameters())


def _is_stage_3(zero: Any) -> bool:
    return hasattr(zero, "fp16_groups")


def _groups(zero: Any) -> list[list[torch.nn.Parameter]]:
    """The trained parameters in the order of the optimizer's groups. ZeRO-3 divides each group into several."""
    return zero.fp16_groups if _is_stage_3(zero) else zero.bit16_groups


def _partitions(zero: Any) -> list[torch.Tensor]:
    """This process's float32 weights, flat: one tensor for each of `_groups`."""
    return zero.fp32_partitioned_groups_flat if _is_stage_3(zero) else zero.single_partition_of_fp32_groups


def _gradients(zero: Any) -> Iterator[torch.Tensor]:
    """This process's part of the gradient, summed over micro-batches and processes."""
    return (gradient for group in zero.averaged_gradients.values() for gradient in group)


def _spoil_gradient(zero: Any) -> None:
    """Makes a part of the gradient NaN, on the process that has it."""
    utils = _deepspeed().utils
    parameter: Any = _groups(zero)[0][0]
    if _is_stage_3(zero):
        utils.safe_set_local_grad(parameter, torch.full_like(parameter.ds_tensor, math.nan, dtype=torch.float32))
    else:
        utils.safe_set_full_grad(parameter, torch.full_like(parameter, math.nan, dtype=torch.float32))


def _own_part(parameter: Any, value: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole tensor [numel] under ZeRO-3, padded with zeros as DeepSpeed pads it."""
    size = parameter.ds_tensor.numel()
    start = size * torch.distributed.get_rank(parameter.ds_process_group)
    part = value.new_zeros(size)
    rows = value.flatten()[start : start + size]
    part[: rows.numel()] = rows
    return part


def shapes(model: torch.nn.Module) -> Tensors:
    """What `gather` returns for `model`, without storage: float32, whole, by name."""
    return {
        name: torch.empty(getattr(parameter, "ds_shape", parameter.shape), dtype=torch.float32, device="meta")
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def set_weights(model: torch.nn.Module, zero: Any, weights: Tensors) -> None:
    """Sets the float32 weights and what the model computes with to whole tensors, by name. A collective."""
    utils = _deepspeed().utils
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if not _is_stage_3(zero):
            utils.safe_set_full_fp32_param(parameter, weights[name])
            continue
        utils.safe_set_local_fp32_param(parameter, _own_part(parameter, weights[name]))
        with torch.no_grad(), _deepspeed().zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(weights[name])
    if not _is_stage_3(zero):
        zero.update_lp_params()


def gather(model: torch.nn.Module, optimizer: Any, keep: bool) -> tuple[Tensors, dict[str, Any]]:
    """The trained weights by name, and the optimizer's state as torch's AdamW writes it; on the CPU, where `keep`. A collective."""
    utils = _deepspeed().utils
    zero = optimizer.optimizer
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    weights = {}
    state = {}
    first_state = zero.optimizer.state.get(_partitions(zero)[0], {})  # {} before the first applied update
    keys = [key for key in ("exp_avg", "exp_avg_sq") if key in first_state]
    if first_state:
        _link_moments(zero)
    for index, parameter in enumerate(parameter for group in _groups(zero) for parameter in group):
        value = utils.safe_get_full_fp32_param(parameter)
        moments = {key: utils.safe_get_full_optimizer_state(parameter, key) for key in keys}
        if keep:
            weights[names[id(parameter)]] = value.cpu()
            if first_state:
                state[index] = {"step": torch.tensor(float(first_state["step"]))}
                state[index] |= {key: moment.cpu() for key, moment in moments.items()}
    counts = [0] * len(zero.param_groups)  # parameters of each of the optimizer's groups
    for number, part in enumerate(_groups(zero)):
        counts[zero.sub_group_to_group_id[number] if _is_stage_3(zero) else number] += len(part)
    groups = []
    first = 0
    for group, count in zip(zero.param_groups, counts, strict=True):
        groups.append({**group, "params": list(range(first, first + count))})
        first += count
    return weights, {"state": state, "param_groups": groups}


def scatter(model: torch.nn.Module, optimizer: Any, weights: Tensors, optimizer_state: dict[str, Any]) -> None:
    """Sets weights, moments and the count of steps to what `gather` returned. The groups keep this run's settings. A collective."""
    utils = _deepspeed().utils
    zero = optimizer.optimizer
    set_weights(model, zero, weights)
    state = optimizer_state["state"]
    zero.optimizer.state.clear()
    if not state:
        return
    counts = {float(entry["step"]) for entry in state.values()}
    if len(counts) != 1:
        raise UserError(
            f"the checkpoint's parameters were updated {sorted(counts)} times, DeepSpeed keeps one count for all."
        )
    [count] = counts
    for partition in _partitions(zero):
        zero.optimizer.state[partition] = {
            "step": torch.tensor(count, device=partition.device if zero.optimizer.defaults["fused"] else "cpu"),
            "exp_avg": torch.zeros_like(partition),
            "exp_avg_sq": torch.zeros_like(partition),
        }
    _link_moments(zero)
    for index, parameter in enumerate(parameter for group in _groups(zero) for parameter in group):
        for key in ("exp_avg", "exp_avg_sq"):
            value = state[index][key]
            if _is_stage_3(zero):
                utils.safe_set_local_optimizer_state(parameter, _own_part(parameter, value), key)
            else:
                utils.safe_set_full_optimizer_state(parameter, value, key)


def _link_moments(zero: Any) -> None:
    """Lets safe_*_optimizer_state find the moments under ZeRO-2, which looks for them once: before all groups have theirs."""
    utils = _deepspeed().utils
    if not _is_stage_3(zero):
        for group, partition in zip(_groups(zero), _partitions(zero), strict=True):
            utils.lazy_init_hp_params_optimizer_state(group, partition, zero.optimizer.state)


def full_tensors(model: torch.nn.Module, keep: bool) -> Tensors:
    """All tensors of `model`, whole, on the CPU where `keep`: the trained in float32, the frozen as the engine holds
    them. A collective.
    """
    utils = _deepspeed().utils
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = utils.safe_get_full_fp32_param(parameter)
            if keep:
                tensors[name] = value.cpu()
            continue
        with _deepspeed().zero.GatheredParameters([parameter]):  # does nothing under ZeRO-2
            if keep:
                tensors[name] = parameter.detach().to("cpu", copy=True)
    return tensors
