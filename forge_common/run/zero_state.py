"""The trained state under DeepSpeed's ZeRO-2 and ZeRO-3, gathered into whole float32 tensors and divided again.

Both stages keep float32 weights and AdamW's moments in flat partitions; deepspeed.utils.safe_* gather and set them by
parameter. `zero` is the optimizer of ZeRO-2 or ZeRO-3, engine.optimizer.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch

from ..errors import UserError
from ..files.tensors import Tensors

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, as torch names them


def library() -> Any:
    """DeepSpeed, which is installed only where it is used."""
    import deepspeed  # pyright: ignore[reportMissingImports]

    return deepspeed


def is_used(model: torch.nn.Module) -> bool:
    """Whether DeepSpeed divided the weights of `model`, which has no wrapper."""
    return any(hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping") for parameter in model.parameters())


def _is_stage_3(zero: Any) -> bool:
    return hasattr(zero, "fp16_groups")


def _groups(zero: Any) -> list[list[torch.nn.Parameter]]:
    """The trained parameters in the order of the optimizer's groups. ZeRO-3 divides each group into several."""
    return zero.fp16_groups if _is_stage_3(zero) else zero.bit16_groups


def _parameters(zero: Any) -> Iterator[torch.nn.Parameter]:
    """The trained parameters, in the order of their numbers in an optimizer's state."""
    return (parameter for group in _groups(zero) for parameter in group)


def _partitions(zero: Any) -> list[torch.Tensor]:
    """This process's float32 weights, flat: one tensor for each of `_groups`."""
    return zero.fp32_partitioned_groups_flat if _is_stage_3(zero) else zero.single_partition_of_fp32_groups


def gradients(zero: Any) -> Iterator[torch.Tensor]:
    """This process's part of the gradient, summed over micro-batches and processes."""
    return (gradient for group in zero.averaged_gradients.values() for gradient in group)


def make_gradient_nan(zero: Any) -> None:
    """Makes a part of the gradient NaN, on the process that has it."""
    utils = library().utils
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
    utils = library().utils
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if not _is_stage_3(zero):
            utils.safe_set_full_fp32_param(parameter, weights[name])
            continue
        utils.safe_set_local_fp32_param(parameter, _own_part(parameter, weights[name]))
        with torch.no_grad(), library().zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(weights[name])
    if not _is_stage_3(zero):
        zero.update_lp_params()


def gather(model: torch.nn.Module, optimizer: Any, keep: bool) -> tuple[Tensors, dict[str, Any]]:
    """The trained weights by name, and the optimizer's state as torch's AdamW has it; on the CPU, where `keep`.

    A collective.
    """
    utils = library().utils
    zero = optimizer.optimizer
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    weights = {}
    state = {}
    first_state = zero.optimizer.state.get(_partitions(zero)[0], {})  # {} before the first applied update
    keys = [key for key in MOMENTS if key in first_state]
    if first_state:
        _link_moments(zero)
    for index, parameter in enumerate(_parameters(zero)):
        value = utils.safe_get_full_fp32_param(parameter)
        moments = {key: utils.safe_get_full_optimizer_state(parameter, key) for key in keys}
        if keep:
            weights[names[id(parameter)]] = value.cpu()
        if keep and first_state:
            state[index] = {"step": torch.tensor(float(first_state["step"]))}
            state[index] |= {key: moment.cpu() for key, moment in moments.items()}
    sizes = [0] * len(zero.param_groups)  # parameters in each of the optimizer's groups
    for number, part in enumerate(_groups(zero)):
        sizes[zero.sub_group_to_group_id[number] if _is_stage_3(zero) else number] += len(part)
    groups = []
    first = 0
    for group, size in zip(zero.param_groups, sizes, strict=True):
        groups.append({**group, "params": list(range(first, first + size))})
        first += size
    return weights, {"state": state, "param_groups": groups}


def scatter(model: torch.nn.Module, optimizer: Any, weights: Tensors, optimizer_state: dict[str, Any]) -> None:
    """Sets weights, moments and the count of steps to what `gather` returned. A collective.

    The groups of the optimizer keep this run's settings.
    """
    utils = library().utils
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
    for index, parameter in enumerate(_parameters(zero)):
        for key in MOMENTS:
            value = state[index][key]
            if _is_stage_3(zero):
                utils.safe_set_local_optimizer_state(parameter, _own_part(parameter, value), key)
            else:
                utils.safe_set_full_optimizer_state(parameter, value, key)


def _link_moments(zero: Any) -> None:
    """Lets safe_*_optimizer_state find the moments under ZeRO-2, which itself looks for them once, too early."""
    utils = library().utils
    if not _is_stage_3(zero):
        for group, partition in zip(_groups(zero), _partitions(zero), strict=True):
            utils.lazy_init_hp_params_optimizer_state(group, partition, zero.optimizer.state)


def full_tensors(model: torch.nn.Module, keep: bool) -> Tensors:
    """All tensors of `model`, whole, on the CPU where `keep`. A collective.

    The trained ones are in float32, the frozen ones as the engine holds them.
    """
    utils = library().utils
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = utils.safe_get_full_fp32_param(parameter)
            if keep:
                tensors[name] = value.cpu()
            continue
        with library().zero.GatheredParameters([parameter]):  # does nothing under ZeRO-2
            if keep:
                tensors[name] = parameter.detach().to("cpu", copy=True)
    return tensors
