"""The trained state of a model that an engine has divided over the processes: gathered into whole tensors, and divided again.

A checkpoint has one format, that of accelerate's save_state for one process: model.safetensors has the trained tensors
by name, optimizer.bin torch's `optimizer.state_dict()`, whole tensors, indexed in the order of `parameter_groups`. So a
run resumes under another engine and with another number of processes.

To add an engine, write two functions and return them from `engine_of`. All ranks call both:
- gather(model, optimizer, keep) -> (weights, optimizer_state). The two files' contents on the CPU where `keep` (the
  main process), in float32 or the dtype that the optimizer updates; no tensor that a later update changes. What the
  others return is not read.
- scatter(model, optimizer, weights, optimizer_state). Every rank is handed both files, memory-mapped: take the own part
  only. `model` is without the wrappers of DDP and torch.compile, the `optimizer` that which `prepare` returned.
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..files.tensors import Tensors
from . import zero


class Engine(NamedTuple):
    gather: Callable[[torch.nn.Module, Any, bool], tuple[Tensors, dict[str, Any]]]
    scatter: Callable[[torch.nn.Module, Any, Tensors, dict[str, Any]], None]


def engine_of(accelerator: Any) -> Engine | None:
    """The engine that divides the trained state; None where every process has all of it, and save_state writes the format."""
    if accelerator.state.deepspeed_plugin:
        return Engine(zero.gather, zero.scatter)
    return Engine(_gather_fsdp2, _scatter_fsdp2) if accelerator.is_fsdp2 else None


def prepare(accelerator: Any, model: torch.nn.Module, optimizer: Any) -> tuple[Any, Any]:
    """`accelerator.prepare`, with which the loop's `optimizer.step` applies an update also under DeepSpeed.

    Frozen weights that are mapped from a file stay mapped: DDP does not broadcast them (all ranks have read the same,
    `new_progress` compares), and on CPUs they are not moved from "cpu" to "cpu:0", which copies.
    """
    if accelerator.state.deepspeed_plugin:
        return zero.prepare(accelerator, model, optimizer)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
    in_place = accelerator.device.type == "cpu" and not accelerator.is_fsdp2
    prepared = accelerator.prepare(model, optimizer, device_placement=[False, False] if in_place else None)
    if in_place and isinstance(optimizer, torch.optim.AdamW):
        reserve_before_forward(prepared[0], optimizer, keep_gradients=accelerator.gradient_accumulation_steps > 1)
    if not accelerator.is_fsdp2:  # accelerate's looks for DTensors, whose import takes 0.4 s and 40 to 60 MiB
        accelerator._clip_grad_norm_dtensor_aware = torch.nn.utils.clip_grad_norm_
    else:  # gathers the parameters for it as it does for `forward`
        from torch.distributed.fsdp import register_fsdp_forward_method

        register_fsdp_forward_method(model, "next_logits")
    return prepared


def reserve_before_forward(model: torch.nn.Module, adamw: Any, *, keep_gradients: bool) -> None:
    """Makes AdamW's moments just before the first forward pass, and gradients that are then set to zero and not freed.

    Else torch makes moments in the first step, and gradients in the first backward pass of each update. Where
    activations lay before, they divide what is free for the next ones: on a CPU this took 100 of 1,150 MiB
    (docs/PERFORMANCE.md).
    """
    zero_grad = adamw.zero_grad

    def reserve(*_: Any) -> None:
        hook.remove()
        for group in adamw.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
            adamw._init_group(group, [], [], [], [], [], [])
        adamw.zero_grad()

    hook = model.register_forward_pre_hook(reserve)
    if keep_gradients:
        adamw.zero_grad = lambda set_to_none=True: zero_grad(set_to_none=False)


def rounded(accelerator: Any, tensor: torch.Tensor) -> torch.Tensor:
    """A frozen tensor with the values that the engine gives it: DeepSpeed rounds it to the 16 bits that it computes with."""
    is_rounded = accelerator.state.deepspeed_plugin and accelerator.mixed_precision == "bf16"
    return tensor.bfloat16() if is_rounded else tensor


def prepared(accelerator: Any) -> tuple[torch.nn.Module, Any]:
    """The model and the optimizer that accelerate prepared, from where its save_state and load_state take them too."""
    return accelerator._models[0], accelerator._optimizers[0]


def bare(accelerator: Any, model: torch.nn.Module) -> torch.nn.Module:
    """`model` without the wrappers of DDP and torch.compile."""
    wrapped = isinstance(model, DistributedDataParallel) or accelerator.state.deepspeed_plugin
    if not wrapped and "torch._dynamo" not in sys.modules:  # accelerate would import it to see that nothing is compiled
        return model
    return accelerator.unwrap_model(model, keep_torch_compile=False)


def trained(model: torch.nn.Module) -> Tensors:
    """The parameters that require a gradient, by name: under FSDP2 those that the optimizer updates, never the gathered ones.

    Under DeepSpeed, which updates flat tensors of its own: their shapes and dtype, without storage.
    """
    if zero.is_used(model):
        return zero.shapes(model)
    model.state_dict()  # FSDP2 leaves the last forward pass's gathered copies in place of the parameters; this puts them back
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def in_host_memory(state: Any, memory: Any = None) -> Any:
    """A copy of nested dicts, lists and tuples, with a copy of each tensor on the CPU.

    memory: an earlier copy, which is overwritten where its tensors fit. New memory takes up to five times as long.
    """

    def copied(value: Any, kept: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if isinstance(kept, torch.Tensor) and (kept.shape, kept.dtype) == (value.shape, value.dtype):
            return kept.copy_(value.detach())
        return value.detach().to("cpu", copy=True)

    values, structure = tree_flatten(state)
    kept = tree_leaves(memory)
    if len(kept) != len(values):  # another state, or no copy yet
        kept = [None] * len(values)
    return tree_unflatten([copied(*pair) for pair in zip(values, kept, strict=True)], structure)


# ---- FSDP2: a DTensor for each parameter and for each of the optimizer's tensors of its shape ----
# torch.distributed.tensor is imported where it is used: it takes a second, which other runs need not wait.


def _gather_fsdp2(model: torch.nn.Module, optimizer: Any, keep: bool) -> tuple[Tensors, dict[str, Any]]:
    from torch.distributed.tensor import DTensor

    def whole(value: Any) -> Any:
        if isinstance(value, DTensor):  # offloaded ones have to be on the mesh's device for its collective
            value = cast(DTensor, value.detach().to(value.device_mesh.device_type)).full_tensor()
        if not keep:
            return None  # freed before the next one is gathered
        return in_host_memory(value)  # the loop changes a tensor that was whole, such as the count of steps

    weights = {name: whole(parameter) for name, parameter in trained(model).items()}
    state = optimizer.state_dict()
    entries = state["state"].items()
    return weights, state | {"state": {index: {k: whole(v) for k, v in entry.items()} for index, entry in entries}}


def _scatter_fsdp2(model: torch.nn.Module, optimizer: Any, weights: Tensors, optimizer_state: dict[str, Any]) -> None:
    from torch.distributed.tensor import distribute_tensor

    def own_part(value: torch.Tensor, parameter: Any) -> torch.Tensor:
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)

    with torch.no_grad():
        for name, parameter in trained(model).items():
            parameter.copy_(own_part(weights[name], parameter))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, entry in optimizer_state["state"].items():
        for key, value in entry.items():
            if isinstance(value, torch.Tensor) and value.shape == parameters[index].shape:
                entry[key] = own_part(value, parameters[index]).clone()  # not the mapped file, which rotation deletes
    optimizer.load_state_dict(optimizer_state)
