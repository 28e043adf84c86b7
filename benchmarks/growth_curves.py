"""The points that benchmarks/growth.py measures, and what theory says about the cost of each."""

import dataclasses
from dataclasses import dataclass
from types import SimpleNamespace

from peers import MODEL, Work

CONTEXT_WINDOWS = 16  # of the shortest context in an update; longer ones have fewer, so that all have the same tokens
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
MIB = 2**20


@dataclass(frozen=True)
class Point(Work):
    """A model and its updates, or with `megabytes` the text of a run, or with `modules` an assembled model."""

    vocabulary: int = 4096
    tokens: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 688
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    sequence_length: int = 256
    batch_size: int = 8
    micro_batch_size: int = 8
    num_experts: int = 0
    checkpoint: bool = False
    """Start from a checkpoint, whose vocabulary can be larger than the tokenizer's."""
    megabytes: int = 0
    modules: int = 0


Curves = dict[str, dict[int, Point]]  # name of the curve -> size -> point


def wide(point: Point, width: int) -> Point:
    heads = max(2, width // 64)
    values = (width, width * 43 // 16, heads, heads // 2)
    return dataclasses.replace(point, **dict(zip(SIZES, values, strict=True)))


def base(small: bool) -> Point:
    """The point from which each curve changes one thing."""
    if not small:
        return Point()
    return dataclasses.replace(
        wide(Point(), 64), vocabulary=512, tokens=512, num_hidden_layers=2, sequence_length=32, steps=3, warm_up=1
    )


def curves(small: bool, megabytes: int) -> Curves:
    """megabytes: of the largest text. small: a tiny model, and the first two points of each curve."""
    start = base(small)
    change = dataclasses.replace
    T, D, L, V = start.sequence_length, start.hidden_size, start.num_hidden_layers, start.vocabulary
    text = change(wide(start, 64), num_hidden_layers=1, steps=1, warm_up=1)
    windows = {f: CONTEXT_WINDOWS // f for f in (1, 2, 4, 8, 16)}
    found: Curves = {
        "context": {
            T * f: change(start, sequence_length=T * f, batch_size=n, micro_batch_size=n) for f, n in windows.items()
        },
        "width": {D * f // 2: wide(start, D * f // 2) for f in (1, 2, 4, 8)},
        "layers": {L * f // 2: change(start, num_hidden_layers=L * f // 2) for f in (1, 2, 4, 8, 16)},
        "vocabulary": {V * f: change(start, vocabulary=V * f, checkpoint=True) for f in (1, 2, 4, 8, 16, 32)},
        "windows an update": {n: change(start, batch_size=n, micro_batch_size=4) for n in (4, 8, 16, 32, 64)},
        "windows a micro-batch": {n: change(start, batch_size=16, micro_batch_size=n) for n in (1, 2, 4, 8, 16)},
        "experts": {1: start} | {n: change(start, num_experts=n) for n in (2, 4, 8, 16, 32, 64)},
        "MB of text": {n: change(text, megabytes=n) for n in (1, 10, 100, 1000) if n <= megabytes},
        "modules": {n: change(start, modules=n) for n in (1, 4, 16, 64)},
    }
    return {name: dict(list(points.items())[: 2 if small else None]) for name, points in found.items()}


def name_of(point: Point, start: Point) -> str:
    """What a point changes; the name of its measurements."""
    new = {name: value for name, value in vars(point).items() if value != getattr(start, name)}
    return ", ".join(f"{name} {value}" for name, value in new.items()) or "base"


def theory(point: Point) -> dict[str, float]:
    """What the cost of a point should be proportional to, or MiB that it should take.

    Training: FLOPs of an update, bytes that the optimizer moves, MiB above the weights by the run's plan. Modules:
    FLOPs of a token, with all candidates and with one, MiB of the parts and of a module.
    """
    import torch

    from forge_common.model.config import ModelConfig
    from forge_common.model.trunk import Trunk
    from forge_common.run.plan import memory

    config = ModelConfig(
        vocab_size=point.vocabulary,
        max_position_embeddings=point.sequence_length,
        num_local_experts=point.num_experts,
        cross_document_attention=point.checkpoint,
        **{name: getattr(point, name) for name in MODEL},
    )
    with torch.device("meta"):
        trunk = Trunk(config)
    parameters = sum(parameter.numel() for parameter in trunk.parameters())
    if point.modules:
        forward = trunk.requires_grad_(False).flops_per_token(point.sequence_length)
        layers = config.num_hidden_layers * 3 * config.hidden_size * config.intermediate_size
        module = layers + trunk.head.numel()  # of kind ffn+head
        return {
            "one": 1,
            "all": forward + 2 * module * point.modules,
            "top-1": forward,
            "parts": 4 * (parameters + module * point.modules) / MIB,
        }
    settings = SimpleNamespace(
        sequence_length=point.sequence_length, micro_batch_size=point.micro_batch_size, activation_checkpointing=False
    )
    return {
        "one": 1,
        "megabytes": point.megabytes,
        "flops": trunk.flops_per_token(point.sequence_length) * point.sequence_length * point.batch_size,
        "moved": 10 * 4 * parameters,  # as in forge_common/plan.py: read for the norm, clipped, and updated
        "plan": (sum(memory(trunk, settings)) - 4 * parameters) / MIB,
    }
