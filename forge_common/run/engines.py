"""Engines that divide the trained state over the processes: it is gathered into whole tensors, and divided again.

A checkpoint has one format, that of accelerate's save_state for one process: model.safetensors has the trained tensors
by name; optimizer.bin is torch's `optimizer.state_dict()`, with whole tensors, numbered in the order of
`parameter_groups`. So a run can resume under another engine and with another number of processes.

To add an engine, write two functions and return them from `engine_of`. All ranks call both:
- gather(model, optimizer, keep) -> (weights, optimizer_state): the contents of the two files. Where `keep` (on the main
  process) they are on the CPU, in float32 or the dtype that the optimizer updates, and no later update changes them.
  What the other processes return is not read.
- scatter(model, optimizer, weights, optimizer_state). Every rank gets the contents of both files, memory-mapped, and
  takes its own part only.
`model` is without the wrappers of DDP and torch.compile; `optimizer` is what `prepare` returned.
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..files.tensors import Tensors
from ..heap import give_back_memory
from . import zero, zero_state
from .plan import gives_back


class Engine(NamedTuple):
    gather: Callable[[torch.nn.Module, Any, bool], tuple[Tensors, dict[str, Any]]]
    scatter: Callable[[torch.nn.Module, Any, Tensors, dict[str, Any]], None]


def engine_of(accelerator: Any) -> Engine | None:
    """The engine that divides the trained state; None where every process has all of it, and save_state writes the format."""
    if accelerator.state.deepspeed_plugin:
        return Engine(zero_state.gather, zero_state.scatter)
    return Engine(_gather_fsdp2, _scatter_fsdp2) if accelerator.is_fsdp2 else None


def prepare(accelerator: Any, model: torch.nn.Module, optimizer: Any) -> tuple[Any, Any]:
    """`accelerator.prepare`, after which the loop's `optimizer.step` applies an update also under DeepSpeed.

    Frozen weights that are mapped from a file stay mapped. DDP does not broadcast them: all ranks have read the same
    file, which `new_progress` checks. On CPUs they are not moved from "cpu" to "cpu:0", which would copy them.
    """
    if accelerator.state.deepspeed_plugin:
        return zero.prepare(accelerator, model, optimizer)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
    in_place = accelerator.device.type == "cpu" and not accelerator.is_fsdp2
    prepared = accelerator.prepare(model, optimizer, device_placement=[False, False] if in_place else None)
    if in_place:
        if hasattr(optimizer, "make_moments"):  # not one that an experiment puts in place of ours
            reserve_before_forward(prepared[0], optimizer, keep_gradients=accelerator.gradient_accumulation_steps > 1)
        if gives_back(model) and accelerator.state.dynamo_plugin.backend.value == "NO":
            give_back_in_updates(model)
    if not accelerator.is_fsdp2:  # accelerate's looks for DTensors, whose import takes 0.4 s and 40 to 60 MiB
        accelerator._clip_grad_norm_dtensor_aware = torch.nn.utils.clip_grad_norm_
    else:  # it then gathers the parameters for next_logits as it does for `forward`
        from torch.distributed.fsdp import register_fsdp_forward_method

        register_fsdp_forward_method(model, "next_logits")
    return prepared


def reserve_before_forward(model: torch.nn.Module, optimizer: Any, *, keep_gradients: bool) -> None:
    """Makes the optimizer's moments just before the first forward pass, and gradients that are then set to zero and not freed.

    Else torch makes moments in the first step, and gradients in the first backward pass of each update. Where
    activations lay before, they divide what is free for the next ones: on a CPU this took 100 of 1,150 MiB
    (docs/PERFORMANCE.md).
    """
    zero_grad = optimizer.zero_grad

    def reserve(*_: Any) -> None:
        hook.remove()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.make_moments()
        optimizer.zero_grad()

    hook = model.register_forward_pre_hook(reserve)
    if keep_gradients:
        optimizer.zero_grad = lambda set_to_none=True: zero_grad(set_to_none=False)


def give_back_in_updates(model: Any) -> None:
    """Returns the heap's free memory to the system before the head's gradient is made, and before the embedding's.

    Neither is made in the heap, so what the layers' activations leave free there would be in memory beside them.
    """

    def before_head(*_: Any) -> None:
        if torch.is_grad_enabled():
            give_back_memory()

    def before_embedding(embedding: Any, inputs: Any, rows: torch.Tensor) -> None:
        if rows.requires_grad:
            rows.register_hook(lambda _: give_back_memory())

    model.model.register_forward_hook(before_head)
    model.model.embed_tokens.register_forward_hook(before_embedding)


def rounded(accelerator: Any, tensor: torch.Tensor) -> torch.Tensor:
    """A frozen tensor with the values that it has under the engine: DeepSpeed in bf16 holds it rounded."""
    is_rounded = accelerator.state.deepspeed_plugin and accelerator.mixed_precision == "bf16"
    return tensor.bfloat16() if is_rounded else tensor


def model_and_optimizer(accelerator: Any) -> tuple[torch.nn.Module, Any]:
    """The model and the optimizer that accelerate prepared, from where its save_state and load_state also take them."""
    return accelerator._models[0], accelerator._optimizers[0]


def unwrap(accelerator: Any, model: torch.nn.Module) -> torch.nn.Module:
    """`model` without the wrappers of DDP and torch.compile."""
    wrapped = isinstance(model, DistributedDataParallel) or accelerator.state.deepspeed_plugin
    compiler_used = "torch._dynamo" in sys.modules  # accelerate would import it to find out
    if not wrapped and not compiler_used:
        return model
    return accelerator.unwrap_model(model, keep_torch_compile=False)


def trained_tensors(model: torch.nn.Module) -> Tensors:
    """The parameters that require a gradient, by name. Under FSDP2: the optimizer's own, not the gathered copies.

    Under DeepSpeed, which updates flat tensors of its own: tensors of the same shapes and dtype, without storage.
    """
    if zero_state.is_used(model):
        return zero_state.shapes(model)
    model.state_dict()  # puts FSDP2's parameters back, in whose place the last forward pass left the gathered copies
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def in_host_memory(state: Any, memory: Any = None) -> Any:
    """A copy of nested dicts, lists and tuples, with a copy of each tensor on the CPU.

    memory: an earlier copy, which is overwritten where its tensors fit: new memory takes up to five times as long.
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
# torch.distributed.tensor is imported where it is used: importing it takes a second, which other runs do not need.


def _gather_fsdp2(model: torch.nn.Module, optimizer: Any, keep: bool) -> tuple[Tensors, dict[str, Any]]:
    from torch.distributed.tensor import DTensor

    def whole(value: Any) -> Any:
        if isinstance(value, DTensor):  # an offloaded one has to be on the mesh's device for the collective
            value = cast(DTensor, value.detach().to(value.device_mesh.device_type)).full_tensor()
        if not keep:
            return None  # freed before the next one is gathered
        # A copy: the loop changes tensors that were whole before, such as the count of steps.
        return in_host_memory(value)

    weights = {name: whole(parameter) for name, parameter in trained_tensors(model).items()}
    state = optimizer.state_dict()
    gathered = {}
    for index, entry in state["state"].items():
        gathered[index] = {key: whole(value) for key, value in entry.items()}
    return weights, state | {"state": gathered}


def _scatter_fsdp2(model: torch.nn.Module, optimizer: Any, weights: Tensors, optimizer_state: dict[str, Any]) -> None:
    from torch.distributed.tensor import distribute_tensor

    def own_part(value: torch.Tensor, parameter: Any) -> torch.Tensor:
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)

    with torch.no_grad():
        for name, parameter in trained_tensors(model).items():
            parameter.copy_(own_part(weights[name], parameter))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, entry in optimizer_state["state"].items():
        for key, value in entry.items():
            if isinstance(value, torch.Tensor) and value.shape == parameters[index].shape:
                entry[key] = own_part(value, parameters[index]).clone()  # not the mapped file, which rotation deletes
    optimizer.load_state_dict(optimizer_state)
