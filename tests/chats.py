"""A tokenizer with a chat template, made from local text, and conversations for it."""

import json
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

# Chat templates in the manner of published models.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}" + CHATML
)
TRIMMED = (  # strips white space, begins with a BOS, has an if on lines of its own
    "{{ bos_token }}\n{% for message in messages %}\n    {% set text = message.content | trim %}\n"
    "    {% if message.role == 'user' %}\n{{ '[INST] ' + text + ' [/INST]' }}\n    {% else %}\n"
    "{{ ' ' + text + ' ' + eos_token }}\n    {% endif %}\n{% endfor %}"
)
GENERATION = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}{% else %}{{ message.content }}<|im_end|>"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITHOUT_THOUGHT = CHATML.replace("message['content']", "message['content'].split('</think>')[-1].lstrip('\n')")
TEMPLATES = {"chatml": CHATML, "system": DEFAULT_SYSTEM, "trimmed": TRIMMED, "generation": GENERATION}

FOX = "The quick brown fox jumps over the lazy dog. What is the answer to it? user assistant system [INST] "
SPECIALS = ["<pad>", "<eos>", "<s>", "<|im_start|>", "<|im_end|>"]


def tokenizer(folder: Path, template: str | None = CHATML, *, eos: str = "<eos>", jinja: bool = False) -> Path:
    """A folder with a byte-level tokenizer of 340 tokens, whose template is in tokenizer_config.json or in a file of its own."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)  # as GPT-2's
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([f"{FOX}\n{number}" for number in range(100)], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "pad_token": "<pad>", "bos_token": "<s>"}
    if jinja and template:
        (folder / "chat_template.jinja").write_text(template)
    elif template:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """A conversation: the user begins, and the assistant answers."""
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def rows(number: int) -> list[dict]:
    """Different conversations of one to three answers."""
    return [
        {
            "messages": turns(
                *(
                    f"What is {i} + {j}? {FOX[: 7 * j]}" if j % 2 == 0 else f"{i + j - 1}, the fox"
                    for j in range(2 * (1 + i % 3))
                )
            )
        }
        for i in range(number)
    ]


def write_rows(path: Path, content: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path
