"""The tokenizer of text, a backend of the `tokenizers` library, and the two kinds that are made here: bytes and BPE.

The text of a document never yields a special id: '<pad>' in a text is five characters.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from ..errors import UserError
from ..files.untrusted import quoted
from .chat import ChatTemplate

PAD, EOS = "<pad>", "<eos>"  # ids 0 and 1 of the tokenizers made here
SMALLEST_VOCABULARY = 2 + 256
SAMPLE_CHARACTERS = 64 << 20  # of text that a tokenizer is trained on at most
SAMPLE_PER_TOKEN = 8 << 10  # and at most this for each token of its vocabulary


@dataclass(frozen=True)
class Tokenizer:
    """A backend set up for training: no truncation, no padding, special tokens only where this package adds them.

    prefix, suffix: the ids that the backend's own post-processor puts around a document, such as a BOS.
    declared_ends: the ids that the files beside it declare as ends of a text, besides EOS.
    """

    backend: Backend
    eos_token_id: int
    pad_token_id: int | None
    chat: ChatTemplate | None = None
    declared_ends: tuple[int, ...] = ()
    vocab_size: int = field(init=False)  # greatest id + 1
    prefix: tuple[int, ...] = field(init=False)
    suffix: tuple[int, ...] = field(init=False)
    digest: str = field(init=False)  # SHA-256 of the backend's JSON (keys sorted) and the two ids

    def __post_init__(self):
        # Files of sentence encoders truncate to 512 tokens: text would be lost silently.
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True
        inside = self.backend.encode("x", add_special_tokens=False).ids
        whole = self.backend.encode("x").ids  # prefix + inside + suffix
        start = next(i for i in range(len(whole) + 1) if whole[i : i + len(inside)] == inside)
        content = {"tokenizer": json.loads(self.backend.to_str()), "eos": self.eos_token_id, "pad": self.pad_token_id}
        canonical = json.dumps(content, sort_keys=True, ensure_ascii=True)
        computed = {
            "vocab_size": max(self.backend.get_vocab(with_added_tokens=True).values()) + 1,
            "prefix": tuple(whole[:start]),
            "suffix": tuple(whole[start + len(inside) :]),
            "digest": hashlib.sha256(canonical.encode()).hexdigest(),
        }
        for name, value in computed.items():
            object.__setattr__(self, name, value)  # as the __init__ of a frozen dataclass does

    def encode_batch(self, texts: list[str], *, continued: bool = False) -> list[list[int]]:
        """Ids of each text, in parallel. `continued`: without prefix and suffix, for the middle of a document."""
        with refusing("the tokenizer cannot encode a text"):
            encodings = self.backend.encode_batch_fast(texts, add_special_tokens=not continued)
        return [encoding.ids for encoding in encodings]

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text to continue: with the prefix, without an EOS at the end. An empty text is EOS alone."""
        ids = self.encode_batch([text])[0] or [self.eos_token_id]
        return ids[:-1] if len(ids) > 1 and ids[-1] == self.eos_token_id else ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens are left out."""
        with refusing("the tokenizer cannot decode the ids"):
            return self.backend.decode(list(ids), skip_special_tokens=True)

    @property
    def ends(self) -> list[int]:
        """The ids that end what a model writes: EOS, then those that are declared, and what ends a turn of a chat."""
        ends = [self.eos_token_id, *self.declared_ends]
        if self.chat and self.chat.end_of_turn is not None:
            ends.append(self.chat.end_of_turn)
        return list(dict.fromkeys(ends))

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, as transformers' AutoTokenizer reads them, with the chat
        template.

        Where EOS is not all that ends a text, also generation_config.json, as transformers' generate reads it.
        """
        name = self.backend.id_to_token
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it is; others rebuild parts of it
            "eos_token": name(self.eos_token_id),
            "clean_up_tokenization_spaces": False,
            "model_max_length": int(1e30),  # transformers' own mark for 'no limit'
        }
        if self.pad_token_id is not None:
            config["pad_token"] = name(self.pad_token_id)
        if len(self.prefix) == 1:
            config["bos_token"] = name(self.prefix[0])
        if self.chat:
            config = self.chat.tokens | config | {"chat_template": self.chat.source}
        folder.mkdir(parents=True, exist_ok=True)
        if len(self.ends) > 1:
            ends = {"eos_token_id": self.ends, "pad_token_id": self.pad_token_id}
            (folder / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n", encoding="utf-8")
        (folder / "tokenizer.json").write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


@contextmanager
def refusing(problem: str) -> Iterator[None]:
    """Turns errors of the Rust library, and its panics, which are no Exception, into a UserError."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as reason:  # noqa: BLE001 (the library raises plain Exception, and panics)
        raise UserError(f"{problem} ({type(reason).__name__}: {quoted(str(reason))}). Use another tokenizer.") from None


def byte_tokenizer() -> Tokenizer:
    """PAD 0, EOS 1, then the 256 bytes in order: vocabulary 258."""
    vocabulary = {PAD: 0, EOS: 1} | {character: 2 + byte for byte, character in enumerate(_byte_characters())}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.add_special_tokens([PAD, EOS])
    # Without merges the text need not be split into words first.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, eos_token_id=1, pad_token_id=0)


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with PAD 0 and EOS 1, trained on the first `sample_characters` of the texts.

    UserError if vocab_size is below 258, or the text has too few different pairs to reach it.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"--tokenizer train:{vocab_size}: the smallest vocabulary is {SMALLEST_VOCABULARY}. Use "
            f"train:{SMALLEST_VOCABULARY}, or bytes."
        )
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_first(texts, sample_characters(vocab_size)), trainer)
    reached = backend.get_vocab_size()
    if reached < vocab_size:
        raise UserError(
            f"--tokenizer train:{vocab_size}: the text is too little: it gives a vocabulary of at most {reached}. "
            f"Use train:{reached}, bytes, or more text."
        )
    return Tokenizer(backend, eos_token_id=1, pad_token_id=0)


def sample_characters(vocab_size: int) -> int:
    """Characters of text that a tokenizer of this size is trained on: a small one needs fewer, and is ready sooner."""
    return min(SAMPLE_CHARACTERS, SAMPLE_PER_TOKEN * vocab_size)


def _first(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        yield text[:characters]
        characters -= len(text)
        if characters <= 0:
            return
