"""The kind and the sizes of a module, as train_module.py and forge_common.plan read them from the command line.

Imports nothing heavy: `--help` and the check of the settings read it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from .config import KINDS, MATRICES, TARGETS, ModelConfig


@dataclass(frozen=True, kw_only=True)
class ModuleSettings:
    # -- module --
    layers: str = "all"
    """Layers that the module changes: all, top:N, or numbers from 0 such as 2,5."""
    width: int = 0
    """Width of the feed-forward of kind narrow; 0: a quarter of the trunk's."""
    rank: int = 16
    """Rank of kind lora."""
    alpha: float | None = None
    """Kind lora multiplies its changes by alpha / rank. None: the rank, so by 1."""
    dropout: float = 0.0
    """Share of the inputs of the layers' changes of kind lora that are 0 in an update, drawn at random."""
    targets: tuple[str, ...] = MATRICES
    """Matrices of a layer that kind lora changes: gate_proj, up_proj, down_proj, q_proj, k_proj, v_proj, o_proj."""

    @property
    def sizes(self) -> dict[str, Any]:
        """The arguments of modules.plug_in after kind and layers; they are in a module's metadata too."""
        return {
            "width": self.width,
            "rank": self.rank,
            "alpha": self.rank if self.alpha is None else self.alpha,
            "dropout": self.dropout,
            "targets": list(self.targets),
        }


def module_problems(value: Callable[..., Any], kinds: tuple[str, ...] = KINDS) -> list[str]:
    """Problems with these settings, each with how to fix it. value: of a setting by its name; None where there is none."""
    faults = []
    if value("kind") not in (None, *kinds):
        faults.append(f"--kind {value('kind')} is not one of {', '.join(kinds)}")
    if value("width", 0) < 0:
        faults.append(f"--width is {value('width')}; it cannot be negative (0: a quarter of the trunk's)")
    if value("rank", 1) < 1:
        faults.append(f"--rank is {value('rank')}; it must be at least 1")
    if value("alpha") is not None and not 0 < value("alpha") <= 1e6:
        faults.append(f"--alpha is {value('alpha')}; it must be a positive number, at most 1e6")
    if not 0 <= value("dropout", 0) < 1:
        faults.append(f"--dropout is {value('dropout')}; it must lie in [0, 1)")
    targets = value("targets", MATRICES)
    if not targets or len(set(targets)) < len(targets) or not set(targets) <= set(TARGETS):
        faults.append(
            f"--targets {' '.join(targets)} is not valid; name one or more of {', '.join(TARGETS)}, each of them once"
        )
    return faults


def check_rank(kind: str, settings: ModuleSettings, config: ModelConfig) -> None:
    """UserError for a --rank of kind lora above the smaller side of every matrix that it changes, and above the default."""
    if kind.removesuffix("+head") != "lora":
        return
    queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    outer = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": queries}
    sides = [outer.get(name, config.intermediate_size) for name in settings.targets]
    sides += [config.vocab_size] * kind.endswith("+head")
    largest = min(config.hidden_size, max(sides))
    if settings.rank > max(largest, ModuleSettings.rank):
        raise UserError(
            f"--rank {settings.rank} is more than the {largest} that the changed matrices can have. Lower --rank."
        )
