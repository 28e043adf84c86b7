"""The plan of a run, made and printed before it starts: data, sizes, updates, epochs, memory."""

import os
from collections.abc import Sequence
from typing import Any

import torch

from ..files.atomic import write_text
from ..settings import HUGE_PAGES
from .hardware import compute_dtype
from .length import MANY_PASSES

FEW_TOKENS = 1  # for each parameter; about 20 are best for a given time. Source: Hoffmann et al., arXiv 2203.15556
# Of a process on a CPU, in bytes; measured (docs/PERFORMANCE.md, "The plan's memory").
PROCESS = 260 << 20  # Python, torch and the other libraries, a small tokenizer
LATER = 10 << 20  # what of these comes after the text was opened
COMPILER = 80 << 20  # torch._dynamo, which --optimizer muon and --activation-checkpointing import
PER_TOKEN_OF_VOCABULARY = 600  # of the tokenizer
MAPPED_AT_ONCE = 64 << 10  # of a mapped file, where Linux finds a page of it missing
PAGE = 2 << 20  # a large one
OF_THE_HEAP = 32 << 20  # a larger tensor is memory of its own, which glibc gives back when it is freed


def plan(
    model: Any, optimizer: Any, settings: Any, corpora: Any, accumulation: int, accelerator: Any, tracking: str
) -> str:
    """The lines that a run prints first: data, parameters, updates, epochs, estimated MiB of a device, tracking, report."""
    training = corpora.training
    positions = settings.steps * settings.batch_size
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    config, T, B = model.config, settings.sequence_length, settings.micro_batch_size
    windows, labels = training.size, sum(source.labels for source in training.sources)
    processes, device = accelerator.num_processes, accelerator.device
    compute = compute_dtype(accelerator.mixed_precision, settings.dtype)
    by_muon = [p for group in optimizer.param_groups if "ns_steps" in group for p in group["params"]]
    together = accumulation > 1 or processes > 1
    states, activations, temporary = memory(model, settings, gradients_stay=together, compute=compute, by_muon=by_muon)
    read_before = vars(settings).get("trunk") or vars(settings).get("trunk_from")  # so its weights are resident
    left = corpora.resident - (_bytes(*model.parameters()) if read_before else 0)
    resident = of_process(model, settings, corpora, compute, by_muon, left) if device.type == "cpu" else {}
    seen = positions * T / total  # tokens for each parameter
    hint = (
        f"hint        {seen:.2g} tokens for each parameter: a smaller model would take less time and hardly learn less"
    )
    report = f"report      {settings.output_dir}/report.html, refreshed while it trains"
    return "\n".join(
        (
            *corpora.report,
            f"model       {total:,} parameters, {trained:,} trained; vocabulary {config.vocab_size:,}, context {T}",
            f"update      {settings.batch_size} windows = up to {settings.batch_size * T:,} tokens: {processes} process(es) x "
            f"{accumulation} micro-batch(es) x {B}",
            f"run         {settings.steps:,} updates = {positions:,} windows = "
            f"{positions / windows:.2f} epochs of {windows:,} windows ({labels:,} tokens)",
            *_repetition(training, positions),
            *([hint] if trained == total and seen < FEW_TOKENS else []),
            f"memory      about {(states + activations + temporary + sum(resident.values())) / 2**20:,.0f} MiB a device: "
            f"{states / 2**20:,.0f} weights, gradients and optimizer, {activations / 2**20:,.0f} activations, "
            f"{temporary / 2**20:,.0f} temporary"
            + "".join(f", {size / 2**20:,.0f} {name}" for name, size in resident.items() if size >= 1 << 20),
            f"tracking    {tracking}",
            *([] if settings.dry_run else [report]),
        )
    )


def show(accelerator: Any, settings: Any, text: str) -> None:
    """Prints a plan on the main process, and keeps it in plan.txt for the report, unless the run is a dry one."""
    accelerator.print(text)
    if accelerator.is_main_process and not settings.dry_run:
        write_text(settings.output_dir / "plan.txt", text + "\n")


def memory(
    model: Any,
    settings: Any,
    *,
    gradients_stay: bool = True,
    compute: torch.dtype | None = None,
    by_muon: Sequence[torch.Tensor] = (),
) -> tuple[int, int, int]:
    """Estimated bytes on a device at the peak of an update: weights, gradients and optimizer; what is kept for the
    backward pass; temporary tensors.

    The peak is at the loss, in the first step of the backward pass, at its end, or in the optimizer. gradients_stay:
    whether all gradients are there in the forward pass, as with accumulation or DDP; else the backward pass puts them
    in the place of what was kept. compute: the type of matrix products under autocast; None: that of the model.
    by_muon: the matrices that Muon updates.
    """
    config, T, B = model.config, settings.sequence_length, settings.micro_batch_size
    stored = (
        _bytes(*model.parameters()) + 2 * _bytes(*_trained(model)) - _bytes(*by_muon)
    )  # AdamW has two moments, Muon one
    gradients = _bytes(*_trained(model))
    size, low = _sizes(model, compute)
    kept = kept_by_layers(model, compute)
    layers = sum(kept)
    if settings.activation_checkpointing:  # each layer's input
        layers = size * config.hidden_size * config.num_hidden_layers
    activations = B * T * (layers + (4 * size if low == size else 3 * size + 2 * low) * config.hidden_size)
    if not config.cross_document_attention and not model.model.fused_document_mask:
        activations += low * B * T * T  # the mask of documents, as numbers
    copied = _copies(model, low) if low < size else 0

    head = 4 * config.vocab_size * config.hidden_size  # bytes of a matrix as large as the output head
    embedding, tied = model.model.embed_tokens.weight, model.lm_head is None
    weight = embedding if tied else model.lm_head.weight
    head_is_trained = model.head_change is None and weight.requires_grad
    logits = min(model.chunk_rows, B * T) * config.vocab_size
    at_loss = 4 * logits
    if low < size:  # also in that type, with the head and its gradient
        low_head = low * config.vocab_size * config.hidden_size
        at_loss += low * logits + low_head * head_is_trained
        at_loss += low_head * (weight.element_size() > low or model.head_change is not None)
    if model.head_change is not None:
        at_loss += 2 * head  # the changed head and its gradient
    if head_is_trained and gradients_stay:
        at_loss += head  # the gradient of this micro-batch, beside that of those before
    in_layer = low * B * T * _made_by_first_step(model)
    at_end = 0
    if tied and embedding.requires_grad:  # the gradient of the embedding, beside that of the head
        at_end = (1 + gradients_stay) * head
    # The gradients that are there with the activations: all, or the head's alone.
    before = gradients if gradients_stay else head * head_is_trained
    moments = [(stored + before, activations + copied, at_loss), (stored + gradients, 0, at_end)]
    if settings.activation_checkpointing:
        # A layer that is computed again: the last, and the first, when all gradients are there.
        again = B * T * max(kept) + copied // config.num_hidden_layers
        moments.append((stored + before, activations + again, in_layer))
        moments.append((stored + gradients, again, in_layer))
    else:
        moments.append((stored + before, activations + copied, in_layer))
    if by_muon:  # the step of the largest matrix: its direction in float32, and three of its size in bf16
        moments.append((stored + gradients, 0, 10 * max(p.numel() for p in by_muon)))
    return max(moments, key=sum)


def of_process(
    model: Any,
    settings: Any,
    corpora: Any,
    compute: torch.dtype | None = None,
    by_muon: Sequence[torch.Tensor] = (),
    resident: int = 0,
) -> dict[str, int]:
    """Estimated bytes of a process on a CPU at the peak of its resident set, beside those of `memory`, by their use.

    resident: its resident set when the text was there, without weights: it is larger where text was tokenized.
    """
    text = sum(source.tokens.tokens.nbytes for source in corpora.training.sources)
    text = min(text, settings.steps * settings.batch_size * MAPPED_AT_ONCE)
    text += sum(min(part.tokens.tokens.nbytes, len(part) * MAPPED_AT_ONCE) for part in corpora.held_out)
    before_the_end = settings.save_every, settings.val_every if corpora.held_out else 0
    saved = settings.on_full_disk == "continue" and any(0 < every < settings.steps for every in before_the_end)
    copy = 3 * _bytes(*_trained(model)) - _bytes(*by_muon)
    libraries = PROCESS + (COMPILER if by_muon or settings.activation_checkpointing else 0)
    libraries += PER_TOKEN_OF_VOCABULARY * model.config.vocab_size
    return {
        "Python and libraries": max(libraries, resident + LATER),
        "text": text,
        "copy for a checkpoint": copy * saved,
        "free in pieces": 0 if gives_back(model) else free_in_pieces(model, settings, compute),
    }


def gives_back(model: Any) -> bool:
    """Whether a run on a CPU gives back what glibc keeps free, before it makes the gradients of a large embedding and head."""
    embedding = model.model.embed_tokens.weight
    return embedding.requires_grad and embedding.nbytes > OF_THE_HEAP


def free_in_pieces(model: Any, settings: Any, compute: torch.dtype | None = None) -> int:
    """Bytes that glibc keeps free: what a layer's forward pass makes and frees between the tensors that it keeps.

    A request for aligned memory asks for more than its size, so that a tensor that was freed alone leaves no room for
    one of its own size. One that begins at a large page leaves at most a page: beside it is the rest of another one.
    Measured with glibc 2.36 (docs/PERFORMANCE.md).
    """
    config = model.config
    rows, (size, low) = settings.micro_batch_size * settings.sequence_length, _sizes(model, compute)
    queries, keys = (
        low * heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)
    )
    wide = size * config.hidden_size
    in_large_pages = os.environ.get(HUGE_PAGES[0]) == HUGE_PAGES[1]
    total = 0
    for layer in model.model.layers:
        # The results of o_proj and down_proj, the product of gate and up, queries and keys before their rotation and
        # the two halves of its products.
        parts = [low * config.hidden_size, low * config.hidden_size, low * config.intermediate_size]
        parts += [queries, queries // 2, queries // 2, keys, keys // 2, keys // 2]
        if layer.addition is not None:
            parts += [wide, wide]  # the module's result, and its sum with the trunk's
        if settings.activation_checkpointing and not in_large_pages:  # the feed-forward's, freed too, and two results
            parts = [low * config.intermediate_size] * 3 + [wide, wide]
        sizes = [rows * part for part in parts if rows * part <= OF_THE_HEAP]
        at_most_a_page = in_large_pages and not settings.activation_checkpointing  # with that, all of them, as measured
        total += sum(min(size, PAGE) for size in sizes) if at_most_a_page else sum(sizes)
    return total


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _trained(model: Any) -> list[torch.Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _sizes(model: Any, compute: torch.dtype | None) -> tuple[int, int]:
    """Bytes of a number in the residual stream, and in what autocast's matrix products read and return."""
    size = model.model.norm.weight.element_size()  # a frozen trunk's matrices may be in bf16
    return size, min(size, compute.itemsize) if compute else size


def _copies(model: Any, low: int) -> int:
    """Bytes of autocast's copies of the layers' wider matrices, which stay until the backward pass."""
    matrices = [p for name, p in model.model.layers.named_parameters() if p.ndim == 2]
    first = next((i for i, p in enumerate(matrices) if p.requires_grad), len(matrices))
    if model.model.embed_tokens.weight.requires_grad:
        first = 0
    return sum(low * p.numel() for p in matrices[first:] if p.element_size() > low)


def _made_by_first_step(model: Any) -> int:
    """Numbers a token that the backward pass of the last feed-forward makes, less those that only the loss needed."""
    config, layer = model.config, model.model.layers[-1]
    experts = config.num_experts_per_tok if layer.sparse else 1
    gradients = 3 * config.intermediate_size * experts  # of the product, of gate and of up
    return max(0, gradients - 3 * config.hidden_size)


def kept_by_layers(model: Any, compute: torch.dtype | None = None) -> list[int]:
    """Bytes that each layer keeps for the backward pass, for each token.

    Frozen matrices keep no input, and nothing is kept before the first part that is trained. Norms keep their input,
    down_proj its factors gate and up. Not counted: what has the rank, or one number a token.
    """
    config, kept = model.config, []
    wide, low = _sizes(model, compute)
    width, experts = config.hidden_size, config.num_experts_per_tok if config.num_local_experts else 1
    heads = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    reached = model.model.embed_tokens.weight.requires_grad  # whether the backward pass reaches the input of this part
    readers = len if low < wide else bool  # autocast makes a copy of an input for each matrix that reads it
    for layer in model.model.layers:
        trained = [name.split(".") for name, parameter in layer.named_parameters() if parameter.requires_grad]
        names = {part for name in trained for part in name}
        # The inputs of the norms, of the first matrices, and of q_norm and k_norm.
        size = low * width * readers(names & {"q_proj", "k_proj", "v_proj"}) + wide * width * reached
        if reached or "self_attn" in names:
            size += low * heads * (2 + config.qk_norm)  # q, k, v and the result
        reached = reached or bool(names & {"self_attn", "input_layernorm"})
        size += wide * width * reached + low * width * experts * readers(names & {"gate_proj", "up_proj", "w1", "w3"})
        if reached or names & {"mlp", "block_sparse_moe"}:
            size += low * config.intermediate_size * experts * 2  # gate and up
            size += low * width * experts * layer.sparse  # what each expert returns
        if layer.addition is not None:
            rows = [len(p) for name, p in layer.addition.named_parameters() if name.endswith("up_proj.weight")]
            size += low * 2 * sum(rows)
        reached = reached or bool(names)
        kept.append(size)
    return kept


def _repetition(training: Any, positions: int) -> list[str]:
    """How often the run sees the windows of each source of a weighted mixture, and a warning for what it sees too often."""
    lines = []
    passes = training.passes(positions)
    if passes:
        each = ", ".join(f"{source} {times:.2f}" for source, times in passes.items())
        lines.append(f"passes      {each} (times that the windows of each source are seen)")
    passes = passes or {"all windows": training.epoch(positions)}
    often = ", ".join(f"{source} {times:.1f} times" for source, times in passes.items() if times > MANY_PASSES)
    if often:
        lines.append(
            f"warning     the run sees {often}: more than {MANY_PASSES} times teaches little. Add text, lower its weight, or "
            "lower --steps"
        )
    return lines
