"""Tokenizers: bytes, one trained here, or a pretrained one from disk. Each is a backend of the `tokenizers` library.

The text of a document never yields a special id: '<pad>' in a text is five characters.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from ..errors import UserError
from ..files.atomic import read_json
from ..files.untrusted import quoted, read_bounded
from .chat import ChatTemplate
from .readers.document import nearest
from .tokenizer_limits import FILE_BYTES, LARGEST_VOCABULARY, bounded_parts, check_encoding

PAD, EOS = "<pad>", "<eos>"  # ids 0 and 1 of the tokenizers made here
SMALLEST_VOCABULARY = 2 + 256
SAMPLE_CHARACTERS = 64 << 20  # of text that a tokenizer is trained on at most
SAMPLE_PER_TOKEN = 8 << 10  # and at most this for each token of its vocabulary
EOS_NAMES = ("<eos>", "</s>", "<|endoftext|>", "<|end_of_text|>", "<|eos|>", "[EOS]", "<|im_end|>")
TEMPLATE_BYTES = 1 << 20  # of a chat template; the largest known have 20 kB
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>")
FORMS = "a folder with tokenizer.json, such a file, train:VOCAB (as train:4096) or bytes"


@dataclass(frozen=True)
class Tokenizer:
    """A backend set up for training: no truncation, no padding, special tokens only where this package adds them.

    `prefix` and `suffix` are the ids that the backend's own post-processor puts around a document (a BOS, say).
    `declared_ends` are ids that the files beside it declare as ends of a text, besides EOS.
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
        whole = self.backend.encode("x").ids
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
        with _refusing("the tokenizer cannot encode a text"):
            encodings = self.backend.encode_batch_fast(texts, add_special_tokens=not continued)
        return [encoding.ids for encoding in encodings]

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text to continue: the start of a document without an EOS after it; EOS alone for an empty text."""
        ids = self.encode_batch([text])[0] or [self.eos_token_id]
        return ids[:-1] if len(ids) > 1 and ids[-1] == self.eos_token_id else ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens are left out."""
        with _refusing("the tokenizer cannot decode the ids"):
            return self.backend.decode(list(ids), skip_special_tokens=True)

    @property
    def ends(self) -> list[int]:
        """The ids that end what a model writes, EOS first: also those that are declared, and what ends a turn of a chat."""
        end_of_turn = self.chat.end_of_turn if self.chat else None
        known = [self.eos_token_id, *self.declared_ends, *([] if end_of_turn is None else [end_of_turn])]
        return list(dict.fromkeys(known))

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, as transformers' AutoTokenizer reads them, with the chat template.

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
def _refusing(problem: str) -> Iterator[None]:
    """Turn errors of the Rust library, and its panics, which are no Exception, into a UserError."""
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
    """Byte-level BPE with PAD 0 and EOS 1 from the first `sample_characters` of the texts; the same texts give the same
    tokenizer.

    UserError if vocab_size is below 258, or the text has too few different pairs to reach it.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"--tokenizer train:{vocab_size}: the smallest vocabulary is {SMALLEST_VOCABULARY}. Use train:{SMALLEST_VOCABULARY}, or bytes."
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


def load_tokenizer(path: str | os.PathLike, eos_token: str | None = None) -> Tokenizer:
    """Load a folder with tokenizer.json, or such a file, and look up its EOS and PAD.

    EOS: `eos_token`, else what tokenizer_config.json, special_tokens_map.json, config.json or generation_config.json
    beside it declare, else a common name. PAD: a declared one that is not EOS, else a common name, else None.
    UserError when there is no such tokenizer, it cannot be read, or EOS cannot be found.
    """
    path = Path(path).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        hint = " (AutoTokenizer.from_pretrained(...).save_pretrained(...) writes one)" if path.is_dir() else ""
        raise UserError(f"--tokenizer {path}: there is no file {file}{hint}. Give {FORMS}.")
    with _refusing(f"{file}: not a tokenizer that the tokenizers library reads"):
        content = read_bounded(file, FILE_BYTES)
        parts = bounded_parts(content, file)
        backend = Backend.from_str(content.decode())
        check_encoding(parts, backend, file)
        declared = _declared(file.parent) if file.name == "tokenizer.json" else {}
        ends = [end for end in declared.pop("ends", []) if _known(backend, end) is not None]
        chat = _chat_template(file.parent, backend) if file.name == "tokenizer.json" else None
        eos = _eos_id(backend, file, eos_token, declared)
        candidates = [_id_of(backend, declared.get("pad_token")), _known(backend, declared.get("pad_token_id"))]
        candidates += map(backend.token_to_id, PAD_NAMES)
        pad = next((id for id in candidates if id is not None and id != eos), None)
        made = Tokenizer(backend, eos, pad, chat, tuple(ends))
    if max(made.prefix + made.suffix, default=0) >= made.vocab_size:
        raise UserError(f"{file}: the post-processor adds ids beyond the vocabulary. Use another tokenizer.")
    return made


def _declared(folder: Path) -> dict:
    """What the files beside a tokenizer declare: eos_token and pad_token (names), eos_token_id and pad_token_id, each from
    the first file that declares it; ends: the EOS ids of all files.
    """
    declared: dict = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json", "config.json", "generation_config.json"):
        if not (folder / name).exists():
            continue
        content = read_json(folder / name)
        eos_ids = content.get("eos_token_id")
        eos_ids = eos_ids if isinstance(eos_ids, list) else [eos_ids]
        declared.setdefault("ends", []).extend(id for id in eos_ids if type(id) is int)
        for key in ("eos_token", "pad_token", "eos_token_id", "pad_token_id"):
            value = content.get(key)
            if isinstance(value, list) and value:  # Llama 3 lists several EOS ids: the first is EOS
                value = value[0]
            if isinstance(value, dict):  # an AddedToken
                value = value.get("content")
            if type(value) is (int if key.endswith("id") else str):
                declared.setdefault(key, value)
    return declared


def _chat_template(folder: Path, backend: Backend) -> ChatTemplate | None:
    """The chat template beside a tokenizer: chat_template.jinja, else that of tokenizer_config.json; None where there is none."""
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.exists() else {}
    source = config.get("chat_template")
    if isinstance(source, list):  # several, by name
        named = {part.get("name"): part.get("template") for part in source if isinstance(part, dict)}
        source = named.get("default")
    if (folder / "chat_template.jinja").exists():
        source = read_bounded(folder / "chat_template.jinja", TEMPLATE_BYTES).decode()
    if not isinstance(source, str) or len(source.encode()) > TEMPLATE_BYTES:
        return None
    path = folder / "special_tokens_map.json"
    special = config | (read_json(path) if path.exists() else {})
    tokens = {}
    for name in SPECIAL_TOKENS:
        value = special.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            tokens[name] = value
    return ChatTemplate(source, tokens, backend)


def _id_of(backend: Backend, name: str | None) -> int | None:
    return None if name is None else backend.token_to_id(name)


def _known(backend: Backend, id: int | None) -> int | None:
    """The id, or None if the vocabulary does not have it."""
    if id is None or not 0 <= id < LARGEST_VOCABULARY or backend.id_to_token(id) is None:
        return None
    return id


def _eos_id(backend: Backend, file: Path, wanted: str | None, declared: dict) -> int:
    if wanted is not None:
        found = backend.token_to_id(wanted)
        if found is None:
            near = nearest(wanted, backend.get_vocab())
            raise UserError(f"--eos-token {wanted!r} is not in the vocabulary of {file}{near}. Name one that is.")
        return found
    candidates = [_id_of(backend, declared.get("eos_token")), _known(backend, declared.get("eos_token_id"))]
    candidates += map(backend.token_to_id, EOS_NAMES)
    found = next((id for id in candidates if id is not None), None)
    if found is None:
        raise UserError(f"{file}: no end-of-text token is declared beside it. Name it with --eos-token.")
    return found


def resolve(spec: str, texts: Callable[[int], Iterable[str]], eos_token: str | None = None) -> Tokenizer:
    """The tokenizer that the command line names. UserError for a bad spec.

    texts: from a number of characters to a sample of about as many, which is read only for train:VOCAB.
    """
    if eos_token is not None and (spec == "bytes" or spec.startswith("train:")):
        raise UserError(
            f"--eos-token has no meaning with --tokenizer {spec}, whose end of text is {EOS!r}. Leave it out."
        )
    if spec == "bytes":
        return byte_tokenizer()
    if spec.startswith("train:"):
        size = spec.removeprefix("train:")
        if not (size.isascii() and size.isdigit()):
            raise UserError(f"--tokenizer {spec}: {size!r} is not a number of tokens. Give {FORMS}.")
        return train_tokenizer(texts(sample_characters(int(size))), int(size))
    if not os.path.exists(os.path.expanduser(spec)):
        raise UserError(f"--tokenizer {spec}: no such file or folder. Give {FORMS}.")
    return load_tokenizer(spec, eos_token)
