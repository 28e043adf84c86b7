"""What is trained on a frozen trunk, and under which names it travels.

| kind | in the chosen layers | +head |
| --- | --- | --- |
| ffn | a copy of the trunk's feed-forward, in its place | an output head of its own |
| narrow | a narrower feed-forward beside the trunk's, `width` wide | an output head of its own |
| lora | a change of rank `rank` to each matrix of the feed-forward | a change of rank `rank` to the head |
| expert | a copy that competes with the trunk's feed-forward, token by token, through a row of a router (FlexOlmo's way) | |

The frozen tensors keep their names, and a fresh module changes nothing. `fold` turns a trunk with a module into an
ordinary checkpoint.

D width, V vocabulary, R rank
"""

import copy
import dataclasses

import torch
from torch import nn

from ..errors import UserError
from ..loss import balance_sum, z_sum
from .config import KINDS
from .trunk import FeedForward, Trunk


class Beside(FeedForward):
    """A narrower feed-forward whose output is added to the trunk's; it starts at zero."""

    def __init__(self, hidden_size: int, width: int):
        super().__init__(hidden_size, width)
        nn.init.zeros_(self.down_proj.weight)

    def forward(self, normed, y, scored, router):
        return y + super().forward(normed), router


class Rival(nn.Module):
    """A copy of the frozen feed-forward and the row of a router: y = (1 - p) F_0(x) + p F(x), p = sigmoid(row(x)).

    That is FlexOlmo's softmax over two rows with the frozen one at zero, both experts active. Source: arXiv 2507.07024.
    """

    def __init__(self, feed_forward: nn.Module, hidden_size: int):
        super().__init__()
        self.expert = copy.deepcopy(feed_forward)
        self.row = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.row.weight)
        nn.init.zeros_(self.row.bias)

    def forward(self, normed, y, scored, router):
        logit = self.row(normed)
        p = logit.sigmoid()
        both = torch.cat((torch.zeros_like(logit), logit), dim=-1).flatten(0, 1).float()
        scored = scored.flatten()
        even = both.new_full((2,), 0.5)  # both experts are always active: a constant, so only z has a gradient
        counts = scored.sum().expand(2)
        router = (balance_sum(both.softmax(-1), even, scored), z_sum(both, scored), counts)
        return y + p * (self.expert(normed) - y), router


class LowRankLinear(nn.Linear):
    """A frozen matrix and a change of low rank: W + B A, B [out, R] at zero, A [R, in]. Source: LoRA, arXiv 2106.09685."""

    def __init__(self, frozen: nn.Linear, rank: int):
        nn.Module.__init__(self)
        self.in_features, self.out_features = frozen.in_features, frozen.out_features
        self.weight, self.bias = frozen.weight, None
        self.lora_A, self.lora_B = _low_rank(frozen.weight, rank)

    def forward(self, x):
        return x @ self.weight.T + (x @ self.lora_A.T) @ self.lora_B.T

    @torch.no_grad()
    def folded(self) -> torch.Tensor:
        return self.weight + self.lora_B @ self.lora_A


class LowRankHead(nn.Module):
    """weight [V, D] -> weight + B A."""

    def __init__(self, weight: torch.Tensor, rank: int):
        super().__init__()
        self.lora_A, self.lora_B = _low_rank(weight, rank)

    def forward(self, weight):
        return weight + self.lora_B @ self.lora_A


def _low_rank(weight: torch.Tensor, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """A [R, in] as nn.Linear starts, B [out, R] at zero."""
    a, b = weight.new_empty(rank, weight.shape[1]), weight.new_zeros(weight.shape[0], rank)
    nn.init.uniform_(a, -(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5)
    return nn.Parameter(a), nn.Parameter(b)


def chosen_layers(spec: str, num_hidden_layers: int) -> list[int]:
    """`all`, `top:N` (the N nearest to the head) or numbers from 0 such as `2,5`, as a sorted list."""
    try:
        if spec == "all":
            layers = range(num_hidden_layers)
        elif spec.startswith("top:"):
            count = int(spec.removeprefix("top:"))
            layers = range(num_hidden_layers - count, num_hidden_layers) if count > 0 else ()
        else:
            layers = {int(number) for number in spec.split(",")}
    except ValueError:
        raise UserError(f"--layers {spec}: say all, top:N, or numbers such as 2,5") from None
    chosen = sorted(layers)
    if not chosen or chosen[0] < 0 or chosen[-1] >= num_hidden_layers:
        raise UserError(f"--layers {spec}: the trunk's layers are 0 to {num_hidden_layers - 1}; choose among them")
    return chosen


def plug_in(trunk: Trunk, kind: str, layers: list[int], *, width: int = 0, rank: int = 0) -> list[str]:
    """Freezes `trunk` in place, but for a module of `kind` in `layers`; returns the names of the module's tensors.

    width: of the feed-forward of kind narrow (0: a quarter of the trunk's). rank: of kind lora (0: 16). What is copied
    starts as the trunk's own tensors, what is new starts at zero: nothing changes. A head of its own is cut loose from a
    tied embedding.
    """
    if kind not in KINDS:
        raise UserError(f"--kind {kind}: the kinds of module are {', '.join(KINDS)}")
    surplus = [layer for layer in layers if layer not in range(len(trunk.model.layers))]
    if surplus:
        raise UserError(f"layers {surplus[:9]}: the trunk's layers are 0 to {len(trunk.model.layers) - 1}")
    config, (body, _, head) = trunk.config, kind.partition("+")
    if config.num_local_experts and body in ("lora", "expert"):
        raise UserError(f"--kind {kind} needs a dense trunk, this one is a mixture of experts. Use ffn or narrow.")
    trunk.requires_grad_(False)
    for layer in (trunk.model.layers[index] for index in layers):
        if body == "ffn":
            layer.feed_forward.requires_grad_(True)
        elif body == "narrow":
            layer.addition = Beside(config.hidden_size, width or config.intermediate_size // 4).to(trunk.head)
        elif body == "lora":
            for name, matrix in layer.mlp.named_children():
                setattr(layer.mlp, name, LowRankLinear(matrix, rank or 16))
        else:
            layer.addition = Rival(layer.mlp, config.hidden_size).to(trunk.head).requires_grad_(True)
    if head and body == "lora":
        trunk.head_change = LowRankHead(trunk.head, rank or 16)
    elif head:
        untie(trunk)
        trunk.lm_head.requires_grad_(True)
    return [name for name, parameter in trunk.named_parameters() if parameter.requires_grad]


def untie(trunk: Trunk) -> None:
    """Gives the trunk a head of its own, a copy of its embedding; does nothing where it has one."""
    if trunk.lm_head is not None:
        return
    weight = trunk.model.embed_tokens.weight
    trunk.lm_head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        trunk.lm_head.weight.copy_(weight)
    trunk.config = dataclasses.replace(trunk.config, tie_word_embeddings=False)


@torch.no_grad()
def put_in(trunk: Trunk, tensors: dict[str, torch.Tensor], kind: str, layers: list[int], **sizes: int) -> None:
    """Puts a module's tensors into `trunk`, in place. Every name and shape must be what the kind asks for."""
    with torch.device("meta"):  # what a stranger's width or rank would ask for is not allocated, but compared
        bare = Trunk(trunk.config)
        names = plug_in(bare, kind, layers, **sizes)
    parameters = dict(bare.named_parameters())
    expected = {name: tuple(parameters[name].shape) for name in names}
    missing, surplus = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or surplus:
        raise UserError(
            f"the module's tensors are not those of kind {kind}: missing {missing[:9]}, surplus {surplus[:9]}. "
            "Fetch or train the module again."
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise UserError(
                f"the module's {name} has the shape {tuple(tensors[name].shape)}, the trunk's {shape}. "
                "Fetch or train the module again."
            )
    plug_in(trunk, kind, layers, **sizes)
    parameters = dict(trunk.named_parameters())
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)


@torch.no_grad()
def fold(trunk: Trunk) -> None:
    """Turns what a module put beside the trunk's tensors into tensors of an ordinary checkpoint, in place.

    Low-rank changes are added up. Feed-forwards side by side become one wider feed-forward; in layers without one it is
    filled up with zeros, since a Transformers checkpoint has one intermediate size. UserError for what no checkpoint of
    Transformers can say.
    """
    if trunk.head_change is not None:
        weight = trunk.head.detach().clone()
        trunk.head_change = None
        untie(trunk)
        trunk.lm_head.weight = nn.Parameter(weight)
    widest = 0
    for layer in trunk.model.layers:
        for name, matrix in list(layer.feed_forward.named_children()):
            if isinstance(matrix, LowRankLinear):
                plain = nn.Linear(matrix.in_features, matrix.out_features, bias=False, device="meta")
                plain.weight = nn.Parameter(matrix.folded())
                setattr(layer.mlp, name, plain)
        if layer.addition is not None and not (isinstance(layer.addition, Beside) and hasattr(layer, "mlp")):
            raise UserError("no Transformers model has this module's shape; use the trunk and the module side by side")
        widest = max(widest, 0 if layer.addition is None else layer.addition.gate_proj.weight.shape[0])
    if not widest:
        return
    config = trunk.config
    for layer in trunk.model.layers:
        wide = FeedForward(config.hidden_size, config.intermediate_size + widest).to(trunk.head)
        for name, matrix in wide.named_children():
            parts = [getattr(layer.mlp, name).weight]
            parts += [] if layer.addition is None else [getattr(layer.addition, name).weight]
            joined = torch.cat(parts, dim=1 if name == "down_proj" else 0)
            matrix.weight.zero_()
            matrix.weight[: joined.shape[0], : joined.shape[1]] = joined
        layer.mlp, layer.addition = wide, None
    trunk.config = dataclasses.replace(config, intermediate_size=config.intermediate_size + widest)
    trunk.model.config = trunk.config
