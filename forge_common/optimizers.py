"""The optimizer of a training run, made from the model and the settings."""

import inspect
from typing import Any

import torch
from torch import nn

from .errors import UserError


def make(model: nn.Module, settings: Any, accelerator: Any) -> torch.optim.Optimizer:
    """The optimizer of the trained parameters. The scripts set the rate of all its groups before each update."""
    groups = parameter_groups(model, settings.weight_decay)
    adamw = {"betas": (settings.beta1, settings.beta2), "eps": settings.eps, "fused": accelerator.device.type != "mps"}
    if settings.optimizer == "muon":
        if accelerator.is_fsdp2 or accelerator.state.deepspeed_plugin:
            raise UserError(
                "--optimizer muon needs each matrix whole on one device, and FSDP2 and DeepSpeed divide them. "
                "Use --optimizer adamw, or start one process or DDP."
            )
        return MuonAdamW(layer_matrices(model), groups, settings.lr, settings.weight_decay, **adamw)
    if accelerator.state.deepspeed_plugin:  # which knows torch's optimizers by their type
        return torch.optim.AdamW(groups, lr=settings.lr, **adamw)
    return AdamW(groups, lr=settings.lr, **adamw)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """AdamW's groups of the trained parameters: weight decay for matrices, none for norms, biases and embeddings."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trained if parameter.ndim >= 2 and id(parameter) not in embeddings]
    not_decayed = [parameter for parameter in trained if parameter.ndim < 2 or id(parameter) in embeddings]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": not_decayed, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def layer_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The trained matrices of the layers, without those of routers, whose rows are no directions of a space."""
    routers = (".block_sparse_moe.gate.weight", ".addition.row.weight")
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [p for name, p in named if ".layers." in name and p.ndim == 2 and not name.endswith(routers)]


class AdamW(torch.optim.AdamW):
    """torch's AdamW without the wrappers of its methods, which are for an optimizer that is compiled: they import
    torch._dynamo, which takes a second or two.
    """

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    state_dict = inspect.unwrap(torch.optim.AdamW.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.AdamW.load_state_dict)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))

    def make_moments(self) -> None:
        """Those that the first step would make, of all parameters that have a gradient."""
        for group in self.param_groups:
            self._init_group(group, [], [], [], [], [], [])


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the matrices of the layers, AdamW for everything else, with one state: a checkpoint holds one optimizer.

    Muon's steps have the size of AdamW's, so that one rate and one decay suit both. Sources: Jordan et al., Muon, 2024;
    Liu et al., Muon is scalable for LLM training, arXiv 2502.16982.
    """

    def __init__(self, matrices: list[nn.Parameter], groups: list[dict], lr: float, weight_decay: float, **adamw: Any):
        """groups: all trained parameters. weight_decay: of the matrices."""
        by_muon = {id(parameter) for parameter in matrices}
        rest = [group | {"params": [p for p in group["params"] if id(p) not in by_muon]} for group in groups]
        rest = [group for group in rest if group["params"]]
        self.parts: list[torch.optim.Muon | torch.optim.AdamW] = []
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, lr, weight_decay, adjust_lr_fn="match_rms_adamw"))
        if rest:
            self.parts.append(torch.optim.AdamW(rest, lr, **adamw))
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    def step(self, closure: Any = None) -> None:
        self._share()
        for part in self.parts:
            part.step()

    def make_moments(self) -> None:
        """Those that the first step would make, of all parameters that have a gradient."""
        self._share()
        for part in self.parts:
            for group in part.param_groups:
                if isinstance(part, torch.optim.Muon):
                    part._init_group(group, [], [], [])
                else:
                    part._init_group(group, [], [], [], [], [], [])

    def _share(self) -> None:
        """Gives the parts the groups and the state of now, which load_state_dict replaces."""
        start = 0
        for part in self.parts:
            end = start + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[start:end], self.state
            start = end
