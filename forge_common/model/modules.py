"""The kinds of module: what is trained on a frozen trunk, and the names of its tensors.

| kind | in the chosen layers | +head |
| --- | --- | --- |
| ffn | a copy of the trunk's feed-forward, in its place | an output head of its own |
| attention+ffn | copies of the trunk's attention and feed-forward, in their place | an output head of its own |
| narrow | a feed-forward of width `width`, added to the trunk's | an output head of its own |
| lora | a change of rank `rank` to each matrix in `targets` | a change of rank `rank` to the head |
| expert | a copy of the feed-forward, mixed with the trunk's per token by a trained router row (as in FlexOlmo) | an output head of its own |

The frozen tensors keep their names, and a new module does not change the model's output. `fold` turns a trunk with a
module into an ordinary checkpoint.

Kind lora, for those who convert it: W + alpha / rank * B A, in float32 or in the type of the module's file. The tensors
of layer i are `model.layers.i.mlp.NAME.lora_A` [R, in] and `.lora_B` [out, R] for gate_proj, up_proj and down_proj,
`model.layers.i.self_attn.NAME.lora_A` and `.lora_B` for q_proj, k_proj, v_proj and o_proj, for the NAMEs in `targets`
and the i in `layers`; with +head also `head_change.lora_A` [R, D] and `head_change.lora_B` [V, R], of the output head
alone where it is tied to the embedding. module.json has `kind`, `layers`, `rank`, `alpha`, `dropout` and `targets`;
metadata.module_arguments fills in what modules of earlier versions lack (alpha = rank, targets = the feed-forward's).

B batch, T time, D width, V vocabulary, R rank
"""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from ..loss import balance_sum, z_sum
from .config import AUTO, KINDS, MATRICES, TARGETS, ModelConfig
from .feed_forward import FeedForward
from .gated import GatedLinear
from .low_rank import LowRankHead, LowRankLinear, trained_dtype
from .module_settings import check_rank
from .trunk import Trunk


class ParallelFeedForward(nn.Module):
    """A feed-forward whose output is added to the trunk's; its last matrix is 0 at the start."""

    def __init__(self, hidden_size: int, width: int, hidden_act: str):
        super().__init__()
        self.hidden_act = hidden_act
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = GatedLinear(width, hidden_size, bias=False)
        nn.init.zeros_(self.down_proj.weight)

    def forward(self, normed, y, scored, router):
        return y + self.down_proj(self.gate_proj(normed), self.up_proj(normed), self.hidden_act), router


class RoutedExpert(nn.Module):
    """A copy of the frozen feed-forward and the row of a router: y = (1 - p) F_0(x) + p F(x), p = sigmoid(row(x)).

    FlexOlmo's softmax over two rows (arXiv 2507.07024), of which the frozen one is 0; both experts are active.
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
        logits = torch.cat((torch.zeros_like(logit), logit), dim=-1).flatten(0, 1).float()
        scored = scored.flatten()
        even = logits.new_full((2,), 0.5)  # both experts are always active: a constant, so only z has a gradient
        counts = scored.sum().expand(2)
        router = (balance_sum(logits.softmax(-1), even, scored), z_sum(logits, scored), counts)
        return y + p * (self.expert(normed) - y), router


def kind_and_layers(
    settings: Any, config: ModelConfig, trunk_metadata: dict[str, Any], print_line: Callable[[str], None]
) -> tuple[Any, list[int]]:
    """The settings with a kind in place of auto, and the layers of --layers.

    On a pretrained trunk ffn+head would be about as large as the trunk, a low-rank change is a fortieth of it
    (docs/PRETRAINED.md). A trunk of train_shared.py is known by the metadata that this writes.
    """
    if settings.kind == AUTO:
        made_here = "format_version" in trunk_metadata
        settings = dataclasses.replace(settings, kind="ffn+head" if made_here or config.num_local_experts else "lora")
        if settings.kind == "lora":
            print_line(
                "kind        lora, which suits a trunk trained on much text (docs/PRETRAINED.md). --kind changes it"
            )
    check_rank(settings.kind, settings, config)
    return settings, chosen_layers(settings.layers, config.num_hidden_layers)


def chosen_layers(spec: str, num_hidden_layers: int) -> list[int]:
    """Layers from `all`, `top:N` (the last N) or numbers from 0 such as `2,5`, sorted."""
    try:
        if spec == "all":
            layers = range(num_hidden_layers)
        elif spec.startswith("top:"):
            count = int(spec.removeprefix("top:"))
            layers = range(num_hidden_layers - count, num_hidden_layers) if count > 0 else ()
        else:
            layers = {int(number) for number in spec.split(",")}
    except ValueError:
        raise UserError(f"--layers {spec} is not valid. Use all, top:N, or numbers such as 2,5.") from None
    chosen = sorted(layers)
    if not chosen or chosen[0] < 0 or chosen[-1] >= num_hidden_layers:
        raise UserError(
            f"--layers {spec} selects no layer, or unknown ones. Choose among the trunk's layers, 0 to "
            f"{num_hidden_layers - 1}."
        )
    return chosen


def plug_in(
    trunk: Trunk,
    kind: str,
    layers: list[int],
    *,
    width: int = 0,
    rank: int = 0,
    alpha: float = 0,
    dropout: float = 0,
    targets: Sequence[str] = MATRICES,
) -> list[str]:
    """Adds a new module of `kind` to `layers`, in place, and freezes the rest. Returns its tensors' names.

    width: of the feed-forward of kind narrow (0: a quarter of the trunk's). rank, alpha, dropout, targets: of kind lora
    (rank 0: 16, alpha 0: the rank). Copied tensors start as the trunk's, added ones so that the output does not change.
    A head of its own is untied from the embedding.
    """
    if kind not in KINDS:
        raise UserError(f"--kind {kind} does not exist. The kinds of module are {', '.join(KINDS)}.")
    unknown = [layer for layer in layers if layer not in range(len(trunk.model.layers))]
    if unknown:
        raise UserError(
            f"layers {unknown[:9]} do not exist. The trunk's layers are 0 to {len(trunk.model.layers) - 1}."
        )
    config = trunk.config
    body = kind.removesuffix("+head")
    head = kind != body
    if config.num_local_experts and (body == "expert" or (body == "lora" and not set(targets).isdisjoint(MATRICES))):
        raise UserError(
            f"--kind {kind} needs a dense trunk, this one is a mixture of experts. Use ffn or narrow, or lora with "
            "--targets of the attention alone."
        )
    rank = rank or 16
    trunk.requires_grad_(False)
    device = trunk.head.device
    dtype = trained_dtype(trunk.head)
    for layer in (trunk.model.layers[index] for index in layers):
        if body == "attention+ffn":
            layer.self_attn.to(device, dtype).requires_grad_(True)
        if body in ("ffn", "attention+ffn"):
            layer.feed_forward.to(device, dtype).requires_grad_(True)
        elif body == "narrow":
            width = width or config.intermediate_size // 4
            layer.addition = ParallelFeedForward(config.hidden_size, width, config.hidden_act)
            layer.addition.to(device, dtype)
        elif body == "lora":
            for name in (name for name in TARGETS if name in targets):
                part = layer.mlp if name in MATRICES else layer.self_attn
                setattr(part, name, LowRankLinear(getattr(part, name), rank, alpha or rank, dropout))
        else:
            layer.addition = RoutedExpert(layer.mlp, config.hidden_size).to(device, dtype).requires_grad_(True)
    if head and body == "lora":
        trunk.head_change = LowRankHead(trunk.head, rank, alpha or rank)
    elif head:
        untie(trunk).to(device, dtype).requires_grad_(True)
    return [name for name, parameter in trunk.named_parameters() if parameter.requires_grad]


def untie(trunk: Trunk) -> nn.Linear:
    """The trunk's own output head; where it is tied, it becomes a copy of the embedding first."""
    if trunk.lm_head is None:
        weight = trunk.model.embed_tokens.weight
        dtype = trained_dtype(weight)
        head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=dtype)
        with torch.no_grad():
            head.weight.copy_(weight)
        trunk.lm_head = head
        trunk.config = dataclasses.replace(trunk.config, tie_word_embeddings=False)
    return trunk.lm_head


def layout(config: ModelConfig, tensors: dict[str, torch.Tensor], kind: str, layers: list[int], **sizes: Any) -> Trunk:
    """A trunk with a module whose tensors have these names and shapes, all on the meta device.

    UserError where they are not those of the kind.
    """
    with torch.device("meta"):  # nothing is allocated that an untrusted width or rank asks for
        bare = Trunk(config)
        names = plug_in(bare, kind, layers, **sizes)
    parameters = dict(bare.named_parameters())
    expected = {name: tuple(parameters[name].shape) for name in names}
    missing = sorted(expected.keys() - tensors.keys())
    surplus = sorted(tensors.keys() - expected.keys())
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
    return bare


class WidenedHead(nn.Module):
    """The head's weight in `dtype`, in place, from its first use on."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, weight):
        weight.data = weight.data.to(self.dtype)
        return weight


def widen_on_use(model: Trunk, names: list[str], dtype: torch.dtype) -> None:
    """The parameters `names` get the type of the computation where they are first used: a module in bf16 that serves no
    token is not read.

    A part widens its own before its forward pass; the head, which has none, in Trunk.head.
    """

    def widen(part: nn.Module, name: str) -> None:
        def before_forward(*_):
            parameter = part.get_parameter(name)
            parameter.data = parameter.data.to(dtype)
            handle.remove()

        handle = part.register_forward_pre_hook(before_forward)

    for path in (path for path in names if model.get_parameter(path).dtype != dtype):
        if path == "lm_head.weight":
            model.head_change = WidenedHead(dtype)
        else:
            owner, _, name = path.rpartition(".")
            widen(model.get_submodule(owner), name)


@torch.no_grad()
def put_in(trunk: Trunk, tensors: dict[str, torch.Tensor], kind: str, layers: list[int], **sizes: Any) -> None:
    """Loads a module's tensors into `trunk`, in place. UserError where a name or shape is not that of the kind."""
    layout(trunk.config, tensors, kind, layers, **sizes)
    plug_in(trunk, kind, layers, **sizes)
    parameters = dict(trunk.named_parameters())
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)


@torch.no_grad()
def fold(trunk: Trunk) -> None:
    """Turns the module in `trunk` into tensors of an ordinary checkpoint, in place.

    Low-rank changes are added to their matrices. A parallel feed-forward is joined to the trunk's as one wider
    feed-forward; the other layers are padded with zeros, since a Transformers checkpoint has one intermediate size.
    UserError for a module that a Transformers checkpoint cannot express.
    """
    if trunk.head_change is not None:
        weight = trunk.head.detach().clone()
        trunk.head_change = None
        untie(trunk).weight = nn.Parameter(weight)
    widest = 0
    for layer in trunk.model.layers:
        for part in (layer.self_attn, layer.feed_forward):
            for name, matrix in list(part.named_children()):
                if isinstance(matrix, LowRankLinear):
                    setattr(part, name, matrix.folded())
        if isinstance(layer.addition, ParallelFeedForward) and not layer.sparse:
            widest = max(widest, layer.addition.gate_proj.out_features)
        elif layer.addition is not None:
            raise UserError(
                "a Transformers checkpoint cannot express this module. Use the trunk and the module side by side."
            )
    if not widest:
        return
    config = trunk.config
    for layer in trunk.model.layers:
        wide = FeedForward(config.hidden_size, config.intermediate_size + widest, config.hidden_act).to(trunk.head)
        parts = [layer.mlp] if layer.addition is None else [layer.mlp, layer.addition]
        for name in MATRICES:
            joined = torch.cat([getattr(part, name).weight for part in parts], dim=1 if name == "down_proj" else 0)
            weight = getattr(wide, name).weight.zero_()
            weight[: joined.shape[0], : joined.shape[1]] = joined
        layer.mlp = wide
        layer.addition = None
    trunk.config = dataclasses.replace(config, intermediate_size=config.intermediate_size + widest)
    trunk.model.config = trunk.config
