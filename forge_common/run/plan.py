"""The plan of a run, made and printed before it starts: data, sizes, updates, epochs, memory."""

from typing import Any

from ..files.atomic import write_text
from .length import MANY_PASSES

FEW_TOKENS = 1  # for each parameter; about 20 are best for a given time. Source: Hoffmann et al., arXiv 2203.15556
PROCESS = 340 << 20  # bytes of a process on a CPU: Python, torch and the other libraries, the tokenizer; measured


def plan(model: Any, settings: Any, corpora: Any, accumulation: int, processes: int, device: Any, tracking: str) -> str:
    """The lines that a run prints first: data, parameters, updates, epochs, estimated MiB of a device, tracking, report."""
    training = corpora.training
    positions = settings.steps * settings.batch_size
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    config, T, B = model.config, settings.sequence_length, settings.micro_batch_size
    windows, labels = training.size, sum(source.labels for source in training.sources)
    states, activations, temporary = memory(model, settings, gradients_stay=accumulation > 1 or processes > 1)
    process = PROCESS if device.type == "cpu" else 0
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
            f"memory      about {(states + activations + temporary + process) / 2**20:,.0f} MiB a device: {states / 2**20:,.0f} weights, "
            f"gradients and optimizer, {activations / 2**20:,.0f} activations, {temporary / 2**20:,.0f} temporary"
            + (f", {process / 2**20:,.0f} Python and libraries" if process else ""),
            f"tracking    {tracking}",
            *([] if settings.dry_run else [report]),
        )
    )


def show(accelerator: Any, settings: Any, text: str) -> None:
    """Prints a plan on the main process, and keeps it in plan.txt for the report, unless the run is a dry one."""
    accelerator.print(text)
    if accelerator.is_main_process and not settings.dry_run:
        write_text(settings.output_dir / "plan.txt", text + "\n")


def memory(model: Any, settings: Any, *, gradients_stay: bool = True) -> tuple[int, int, int]:
    """Estimated bytes on a device at the peak of an update: weights, gradients and optimizer; what is kept for the
    backward pass; temporary tensors.

    The peak is at the loss, in the first step of the backward pass, or at its end. gradients_stay: whether all gradients
    are there in the forward pass, as with accumulation or DDP; else the backward pass puts them in the place of what
    was kept.
    """
    config, T, B = model.config, settings.sequence_length, settings.micro_batch_size
    parameters = list(model.parameters())
    stored = sum(p.numel() * p.element_size() * (3 if p.requires_grad else 1) for p in parameters)
    gradients = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    kept = kept_by_layers(model)
    layers = sum(kept)
    if settings.activation_checkpointing:  # each layer's input, and one layer at a time
        layers = max(kept) + config.hidden_size * config.num_hidden_layers
    size = model.model.norm.weight.element_size()  # as in the residual stream; a frozen trunk's matrices may be in bf16
    activations = size * B * T * (layers + 4 * config.hidden_size)
    if not config.cross_document_attention and not model.model.fused_document_mask:
        activations += size * B * T * T  # the mask of documents, as numbers

    head = 4 * config.vocab_size * config.hidden_size  # bytes of a matrix as large as the output head
    embedding, tied = model.model.embed_tokens.weight, model.lm_head is None
    head_is_trained = model.head_change is None and (embedding if tied else model.lm_head.weight).requires_grad
    at_loss = min(model.chunk_rows, B * T) * config.vocab_size * 4  # logits
    if model.head_change is not None:
        at_loss += 2 * head  # the changed head and its gradient
    if head_is_trained and gradients_stay:
        at_loss += head  # the gradient of this micro-batch, beside that of those before
    in_layer = size * B * T * _made_by_first_step(model)
    at_end = 0
    if tied and embedding.requires_grad:  # the gradient of the embedding, beside that of the head
        at_end = (1 + gradients_stay) * head
    # The gradients that are there with the activations: all, or the head's alone.
    before = gradients if gradients_stay else head * head_is_trained
    moments = (stored + before, activations, max(at_loss, in_layer)), (stored + gradients, 0, at_end)
    return max(moments, key=sum)


def _made_by_first_step(model: Any) -> int:
    """Numbers a token that the backward pass of the last feed-forward makes, less those that only the loss needed."""
    config, layer = model.config, model.model.layers[-1]
    experts = config.num_experts_per_tok if layer.sparse else 1
    last = layer.block_sparse_moe.experts[0].w2 if layer.sparse else layer.mlp.down_proj
    # The gradients of the product, of gate and of up; a trained matrix then no longer needs the product itself.
    gradients = config.intermediate_size * experts * (3 - last.weight.requires_grad)
    return max(0, gradients - 3 * config.hidden_size)


def kept_by_layers(model: Any) -> list[int]:
    """Numbers that each layer keeps for the backward pass, for each token.

    Frozen matrices keep no input, and nothing is kept before the first part that is trained. A low-rank change of
    down_proj keeps its factors gate and up alone. Not counted: what has the rank, or one number a token.
    """
    config, kept = model.config, []
    width, experts = config.hidden_size, config.num_experts_per_tok if config.num_local_experts else 1
    heads = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    reached = model.model.embed_tokens.weight.requires_grad  # whether the backward pass reaches the input of this part
    for layer in model.model.layers:
        trained = [name.split(".") for name, parameter in layer.named_parameters() if parameter.requires_grad]
        names = {part for name in trained for part in name}
        # The inputs of the norms (trained ones keep the normalized input too), of the first matrices, and of q_norm and k_norm.
        size = width * sum(name.endswith("layernorm") for name in names)
        size += width * bool(names & {"q_proj", "k_proj", "v_proj"}) + width * reached
        if reached or "self_attn" in names:
            size += heads * (2 + config.qk_norm * (1 + ("q_norm" in names)))  # q, k, v and the result
        reached = reached or bool(names & {"self_attn", "input_layernorm"})
        size += width * reached + width * experts * bool(names & {"gate_proj", "up_proj", "experts"})
        feed_forward = layer.block_sparse_moe.experts[0].w2 if layer.sparse else layer.mlp.down_proj
        if reached or names & {"mlp", "block_sparse_moe"}:
            size += config.intermediate_size * experts * (2 + feed_forward.weight.requires_grad)  # gate, up, product
            size += width * experts * layer.sparse  # what each expert returns
        if layer.addition is not None:
            size += sum(3 * len(p) for name, p in layer.addition.named_parameters() if name.endswith("up_proj.weight"))
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
