"""Continuations of --sample-prompt, printed and logged with each validation.

V vocabulary
"""

from collections.abc import Sequence
from typing import Any

import torch

NEW_TOKENS = 48  # of a continuation


def continuations(accelerator: Any, trunk: Any, tokenizer: Any, prompts: Sequence[str]) -> list[dict[str, str]]:
    """The likeliest next tokens of each prompt, one after the other: {"prompt", "continuation"}, which ends before an
    EOS.

    A collective: under FSDP2 each pass is one. So every rank makes the same number of passes, and no EOS ends them.
    Draws no random number, keeps no gradient, and leaves the model in the mode that it was in.
    """
    training = trunk.training
    trunk.eval()
    samples = []
    with accelerator.autocast():
        for prompt in prompts:
            ids = _greedy(trunk, tokenizer.encode_prompt(prompt), accelerator.device)
            end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
            samples.append({"prompt": prompt, "continuation": tokenizer.decode(ids[:end])})
    trunk.train(training)
    return samples


def _greedy(trunk: Any, prompt: list[int], device: torch.device) -> list[int]:
    """NEW_TOKENS ids after the prompt, or those that the context has room for; of a long prompt its end fills half of
    it.
    """
    context = trunk.config.max_position_embeddings
    prompt = prompt[-(context // 2) :]
    new = torch.tensor([prompt], device=device)
    cache: list = []
    ids = []
    for _ in range(min(NEW_TOKENS, context - len(prompt))):
        new = trunk.next_logits(new, cache).argmax(-1, keepdim=True)  # [1, V] -> [1, 1]
        ids.append(int(new))
    return ids
