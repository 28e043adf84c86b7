"""Statistics of a module's text for the router: counts of tokens and of pairs of tokens, moments of hidden states.

Pairs are counted in the buckets of a hash, and counts are stored on a logarithmic scale of 8 bits. A token or pair that
fewer than `min_documents` documents have counts as 0; each PIECE tokens of a long document are a document for this.
docs/PRIVACY.md says what can be recovered from the counts.

V vocabulary, D width, L layers, d width of the projection
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.func import functional_call

from ..labels import CONTEXT
from ..model.config import ModelConfig
from ..model.trunk import Decoder, even_load

BIGRAM_BUCKETS = 1 << 17  # in a million tokens, about 50,000 pairs are in two documents or more
PIECE = 1024  # tokens; without it a text of a few long documents would count as 0
MOMENT_TOKENS = 16_384  # of the sample, for the moments: enough for matrices of 128 x 128
MOMENT_WIDTH = 128  # wider hidden states are projected to it
STEPS_PER_DOUBLING = 12  # of the 8-bit scale: counts up to 2.5 million, in steps of 6%
_PRIMES = (2654435761, 40503)

Tensors = dict[str, torch.Tensor]


def bigram_bucket(previous, token):
    """The bucket of a pair of ids (NumPy arrays or tensors of int64)."""
    return ((previous * _PRIMES[0] + token * _PRIMES[1]) & 0x7FFFFFFF) >> 9 & (BIGRAM_BUCKETS - 1)


def encode(counts: np.ndarray) -> np.ndarray:
    """8-bit codes of counts; the code of 0 is 0."""
    return np.clip(np.rint(STEPS_PER_DOUBLING * np.log2(1.0 + counts)), 0, 255).astype(np.uint8)


def decode(codes: torch.Tensor) -> torch.Tensor:
    """float32 counts of 8-bit codes, each within 3% of the encoded count (small ones within 0.5)."""
    return torch.exp2(codes.to(torch.float32) / STEPS_PER_DOUBLING) - 1


def sample(sources: Sequence[tuple[Any, float]], tokens: int) -> Iterable[np.ndarray]:
    """Documents [n] (ids with an EOS at the end), evenly spaced over each source, of `tokens` tokens in total.

    sources: (store.Tokens, share of the tokens) pairs. In a conversation, a token t that is not scored is CONTEXT - t.
    """
    for store, share in sources:
        wanted = min(int(tokens * share), len(store.tokens))
        number = max(1, round(store.documents * wanted / max(len(store.tokens), 1)))
        for index in np.linspace(0, store.documents - 1, min(number, store.documents)).astype(np.int64):
            start = int(store.offsets[index])
            end = int(store.offsets[index + 1])
            document = store.read(start, min(end, start + wanted))
            wanted -= len(document)
            if len(document):
                yield document
            if wanted <= 0:
                break


def count(
    documents: Iterable[np.ndarray], vocab_size: int, eos_token_id: int, min_documents: int
) -> tuple[Tensors, dict[str, int]]:
    """Counts of tokens [V] and of hashed pairs [BIGRAM_BUCKETS] as 8-bit codes, and the sample's size.

    The first token of a document forms a pair with an EOS. Tokens that are not scored are not counted, except as the
    first of a pair.
    """
    sizes = {"unigrams": vocab_size, "bigrams": BIGRAM_BUCKETS}
    totals = {name: np.zeros(size, np.int64) for name, size in sizes.items()}
    documents_with = {name: np.zeros(size, np.int32) for name, size in sizes.items()}
    sample_size = {"tokens": 0, "documents": 0, "min_documents": min_documents}
    for document in documents:
        scored = document >= 0
        ids = plain(document)
        padded = np.concatenate(([eos_token_id], ids))
        places = {"unigrams": ids, "bigrams": bigram_bucket(padded[:-1], padded[1:])}
        for name, indices in places.items():
            for start in range(0, len(document), PIECE):
                piece = slice(start, start + PIECE)
                distinct, times = np.unique(indices[piece][scored[piece]], return_counts=True)
                totals[name][distinct] += times
                documents_with[name][distinct] += 1
        sample_size["tokens"] += int(scored.sum())
        sample_size["documents"] += 1
    for name, number in documents_with.items():
        totals[name][number < min_documents] = 0
    return {name: torch.from_numpy(encode(total)) for name, total in totals.items()}, sample_size


def _record_input(inputs: list[torch.Tensor], module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    """A hook of a module, which runs before its `forward`."""
    inputs.append(args[0])


@torch.no_grad()
def moments(
    config: ModelConfig,
    tensors: Tensors,
    documents: Iterable[np.ndarray],
    sequence_length: int,
    device: torch.device,
) -> Tensors:
    """For each layer the means of x x' and x over the normed inputs x of the feed-forward, for a ridge regression.

    second [L, d, d] and first [L, d], float16, where d is the width of a fixed projection. Source: DUME, arXiv
    2603.29765. tensors: of the trunk without a module, on any device. All windows go through one layer before the next,
    so that `device` holds the weights of one layer at a time, in float32.
    """
    with torch.device("meta"):
        decoder = Decoder(config)
    project = projection(config.hidden_size).to(device)
    windows = _windows(documents, sequence_length)
    embedding = tensors["model.embed_tokens.weight"]
    embedded = (F.embedding(ids.to(embedding.device), embedding).to(device, torch.float32) for ids in windows)
    hidden = [x * config.embed_scale for x in embedded]
    load = even_load(config, device)
    second, first = [], []
    for index, layer in enumerate(decoder.layers):
        names = [name for name, _ in layer.named_parameters()]
        weights = {name: tensors[f"model.layers.{index}.{name}"].to(device, torch.float32) for name in names}
        normed: list[torch.Tensor] = []
        layer.feed_forward.register_forward_pre_hook(partial(_record_input, normed))
        second.append(project.new_zeros(project.shape[1], project.shape[1]))
        first.append(project.new_zeros(project.shape[1]))
        for place, ids in enumerate(windows):
            rope, mask = decoder.rope_and_mask(ids.to(device))
            scored = torch.ones_like(ids, dtype=torch.bool, device=device)
            layer_load = None if load is None else load[index]
            arguments = (hidden[place], rope, mask, scored, layer_load, None, index)
            hidden[place], _ = functional_call(layer, weights, arguments)
            x = normed.pop().flatten(0, 1) @ project
            second[index] += x.T @ x
            first[index] += x.sum(0)
    seen = max(sum(ids.numel() for ids in windows), 1)
    return {"second": (torch.stack(second) / seen).half().cpu(), "first": (torch.stack(first) / seen).half().cpu()}


def plain(document: np.ndarray) -> np.ndarray:
    """The ids of a document of `sample`, with those that are not scored."""
    return np.where(document <= CONTEXT, CONTEXT - document, document)


def _windows(documents: Iterable[np.ndarray], sequence_length: int) -> list[torch.Tensor]:
    """Windows [1, up to T] of about MOMENT_TOKENS tokens: the first ones, at most four of each document."""
    windows: list[torch.Tensor] = []
    seen = 0
    for document in documents:
        for start in range(0, min(len(document), 4 * sequence_length), sequence_length):
            windows.append(torch.from_numpy(plain(document[start : start + sequence_length]))[None])
            seen += windows[-1].numel()
        if seen >= MOMENT_TOKENS:
            break
    return windows


def moment_shapes(layers: int, width: int) -> dict[str, tuple[int, ...]]:
    """The shapes of `moments` for a trunk of `layers` layers and `width`."""
    projected = min(width, MOMENT_WIDTH)
    return {"second": (layers, projected, projected), "first": (layers, projected)}


def projection(width: int) -> torch.Tensor:
    """[D, d]: the identity for D <= MOMENT_WIDTH, else MOMENT_WIDTH orthonormal columns that depend on D alone."""
    if width <= MOMENT_WIDTH:
        return torch.eye(width)
    generator = torch.Generator().manual_seed(width)
    return torch.linalg.qr(torch.randn(width, MOMENT_WIDTH, generator=generator))[0]
