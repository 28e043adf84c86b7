"""The tokenizer that --tokenizer names: made here, or read from a tokenizer.json and the files beside it."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from ..errors import UserError
from ..files.atomic import read_json
from ..files.untrusted import read_bounded
from .chat import ChatTemplate
from .readers.document import nearest
from .tokenizer import EOS, Tokenizer, byte_tokenizer, refusing, sample_characters, train_tokenizer
from .tokenizer_limits import FILE_BYTES, LARGEST_VOCABULARY, bounded_parts, check_encoding

FORMS = "a folder with tokenizer.json, such a file, train:VOCAB (as train:4096) or bytes"
EOS_NAMES = ("<eos>", "</s>", "<|endoftext|>", "<|end_of_text|>", "<|eos|>", "[EOS]", "<|im_end|>")
PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>")
DECLARED = {"eos_token": str, "pad_token": str, "eos_token_id": int, "pad_token_id": int}  # in files beside a tokenizer
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TEMPLATE_BYTES = 1 << 20  # of a chat template; the largest known have 20 kB


def resolve(spec: str, texts: Callable[[int], Iterable[str]], eos_token: str | None = None) -> Tokenizer:
    """The tokenizer that `spec`, the value of --tokenizer, names. UserError for a bad one.

    texts: returns a sample of text of about a number of characters; called only for train:VOCAB.
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


def load_tokenizer(path: str | os.PathLike, eos_token: str | None = None) -> Tokenizer:
    """Loads a folder with tokenizer.json, or such a file, and looks up its EOS and PAD.

    EOS: `eos_token`, else what tokenizer_config.json, special_tokens_map.json, config.json or generation_config.json
    beside it declare, else a common name. PAD: a declared one that is not EOS, else a common name, else None.
    UserError when there is no such tokenizer, it cannot be read, or EOS cannot be found.
    """
    path = Path(path).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        hint = " (AutoTokenizer.from_pretrained(...).save_pretrained(...) writes one)" if path.is_dir() else ""
        raise UserError(f"--tokenizer {path}: there is no file {file}{hint}. Give {FORMS}.")
    with refusing(f"{file}: not a tokenizer that the tokenizers library reads"):
        content = read_bounded(file, FILE_BYTES)
        parts = bounded_parts(content, file)
        backend = Backend.from_str(content.decode())
        check_encoding(parts, backend, file)
        declared: dict[str, Any] = {}
        ends: list[int] = []
        chat = None
        if file.name == "tokenizer.json":  # the files beside one of another name need not belong to it
            declared, ends = _declared(file.parent)
            chat = _chat_template(file.parent, backend)
        eos = _eos_id(backend, file, eos_token, declared)
        pad = next((id for id in _candidates(backend, "pad", declared, PAD_NAMES) if id != eos), None)
        known_ends = tuple(end for end in ends if _is_in_vocabulary(backend, end))
        tokenizer = Tokenizer(backend, eos, pad, chat, known_ends)
    if max(tokenizer.prefix + tokenizer.suffix, default=0) >= tokenizer.vocab_size:
        raise UserError(f"{file}: the post-processor adds ids beyond the vocabulary. Use another tokenizer.")
    return tokenizer


def _declared(folder: Path) -> tuple[dict[str, Any], list[int]]:
    """What the files beside a tokenizer.json declare: eos_token and pad_token (names), eos_token_id and pad_token_id,
    each as the first file that declares it has it; and the EOS ids of all files.
    """
    declared: dict[str, Any] = {}
    ends: list[int] = []
    for file in ("tokenizer_config.json", "special_tokens_map.json", "config.json", "generation_config.json"):
        if not (folder / file).exists():
            continue
        content = read_json(folder / file)
        eos_ids = content.get("eos_token_id")
        ends += [id for id in (eos_ids if isinstance(eos_ids, list) else [eos_ids]) if type(id) is int]
        for key, kind in DECLARED.items():
            value = content.get(key)
            if isinstance(value, list) and value:  # Llama 3 lists several EOS ids: the first is EOS
                value = value[0]
            if isinstance(value, dict):  # an AddedToken
                value = value.get("content")
            if type(value) is kind:
                declared.setdefault(key, value)
    return declared, ends


def _chat_template(folder: Path, backend: Backend) -> ChatTemplate | None:
    """The chat template beside a tokenizer: chat_template.jinja, else that of tokenizer_config.json; None where there
    is none.
    """
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


def _eos_id(backend: Backend, file: Path, eos_token: str | None, declared: dict[str, Any]) -> int:
    if eos_token is not None:
        id = backend.token_to_id(eos_token)
        if id is None:
            near = nearest(eos_token, backend.get_vocab())
            raise UserError(f"--eos-token {eos_token!r} is not in the vocabulary of {file}{near}. Name one that is.")
        return id
    candidates = _candidates(backend, "eos", declared, EOS_NAMES)
    if not candidates:
        raise UserError(f"{file}: no end-of-text token is declared beside it. Name it with --eos-token.")
    return candidates[0]


def _candidates(backend: Backend, token: str, declared: dict[str, Any], common: tuple[str, ...]) -> list[int]:
    """The ids that may be EOS or PAD (token: eos or pad): first that of the declared name, then the declared id, then
    those of the `common` names.
    """
    names = [declared.get(f"{token}_token"), *common]
    ids = [None if name is None else backend.token_to_id(name) for name in names]
    declared_id = declared.get(f"{token}_token_id")
    if declared_id is not None and _is_in_vocabulary(backend, declared_id):
        ids.insert(1, declared_id)
    return [id for id in ids if id is not None]


def _is_in_vocabulary(backend: Backend, id: int) -> bool:
    return 0 <= id < LARGEST_VOCABULARY and backend.id_to_token(id) is not None
