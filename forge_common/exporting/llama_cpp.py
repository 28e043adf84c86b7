"""Reads a GGUF file by llama.cpp itself, on the CPU, through the package cyllama."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import torch

from ..data.tokenizer import Tokenizer
from ..errors import UserError
from . import proof

PACKAGE = "cyllama"
FLOAT32 = 0  # GGML_TYPE_F32, for keys and values: the default is float16
NO_FLASH_ATTENTION = 0  # flash attention rounds to float16


def is_installed() -> bool:
    return importlib.util.find_spec(PACKAGE) is not None


def difference(path: Path, expected: list[proof.Expected], tokenizer: Tokenizer) -> float:
    """The largest difference of a logit between `expected` and the file in llama.cpp, each window in pieces with a cache.

    UserError where llama.cpp cannot load the file, or its tokenizer makes other tokens of a text.
    """
    proof.library(PACKAGE, "the comparison with llama.cpp")
    native: Any = importlib.import_module("cyllama.llama.llama_cpp")
    native.disable_logging()
    on_cpu = native.LlamaModelParams()
    on_cpu.n_gpu_layers = 0

    class Model(native.LlamaModel):
        n_vocab = len(next(iter(expected[0].logits.values())))  # get_logits asks for it; no version up to 0.7.0 has it

    try:
        model = Model(str(path), on_cpu, verbose=False)
    except Exception as reason:
        raise UserError(
            f"nothing was written: llama.cpp cannot load what was exported ({type(reason).__name__}: {reason}). "
            f"Check the version of the package {PACKAGE} (requirements-pretrained.txt)."
        ) from reason
    vocabulary = model.get_vocab()
    bos = list(tokenizer.prefix) if len(tokenizer.prefix) == 1 else []
    for text in proof.texts().values():
        ids = bos + tokenizer.encode_batch([text], continued=True)[0]
        if vocabulary.tokenize(text, add_special=True, parse_special=False) != ids:
            raise UserError("nothing was written: llama.cpp makes other tokens of a text with the GGUF file.")
    return proof.largest_of(_difference(native, model, window) for window in expected)


def _difference(native: Any, model: Any, window: proof.Expected) -> float:
    ids = window.tokens[0, :-1].tolist()
    settings = native.LlamaContextParams()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = len(ids)
    settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
    settings.type_k = settings.type_v = FLOAT32
    settings.flash_attn_type = NO_FLASH_ATTENTION
    context = native.LlamaContext(model, settings, verbose=False)
    differences = []
    first = 0
    for last, row in window.logits.items():
        piece = native.LlamaBatch(n_tokens=last + 1 - first, embd=0, n_seq_max=1, verbose=False)
        for position in range(first, last + 1):
            piece.add(ids[position], position, [0], position == last)
        context.decode(piece)
        differences.append(float((torch.tensor(context.get_logits()) - row).abs().max()))
        first = last + 1
    return proof.largest_of(differences)
