"""The context router with the tokenizer of a pretrained trunk, from counts alone: no model is trained or run.

    python benchmarks/pretrained_router.py --tokenizer runs/pretrained/trunk
    pip download --no-deps dashscope==2.0.2 && unzip dashscope*.whl dashscope/resources/qwen.tiktoken
    python benchmarks/pretrained_router.py --tiktoken dashscope/resources/qwen.tiktoken    # Qwen's vocabulary, padded to 151,936

Prints, in Markdown: how many pairs of tokens share a bucket of the statistics with another pair; which domain the router
finds among one, two, four and eight modules, as router_labels.py does; and the gates after short prompts, plain and in the
tokenizer's chat template. Two minutes on one idle core.
"""

import base64
import sys
import sysconfig
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import tyro
from router_labels import CROWD, EOS, HOME, Documents, Measured, files, tokenize_with
from script_process import ROOT
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

sys.path.insert(0, str(ROOT))

from forge_common.data import local
from forge_common.data.readers.document import Message
from forge_common.data.tokenizer import Tokenizer
from forge_common.data.tokenizer_files import load_tokenizer
from forge_common.exporting.gguf_file import SPLITS
from forge_common.routing.statistics import BIGRAM_BUCKETS, bigram_bucket

CHARACTERS = 1_300_000  # of a domain
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN_VOCABULARY = 151_936  # of the embeddings
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROMPTS = (
    "template <typename T> class",
    "use strict; my $x = shift;",
    "How do I include <vector> in C++?",
    "Write a C++ class template for a ring buffer.",
    "Write a Perl script that counts lines.",
    "What is the capital of France?",
)


@dataclass(frozen=True)
class Settings:
    tokenizer: Path | None = None
    """Folder of a trunk."""
    tiktoken: Path | None = None
    """File of ranks with Qwen's rule for splitting text and its special tokens."""
    output_dir: Path = Path("runs/pretrained_router")
    """Folder for the tokenizer that is made of --tiktoken."""


def converted(file: Path, folder: Path) -> Path:
    """Writes a tokenizer of Qwen's ranks into a folder."""
    ranks = {}
    for line in file.read_bytes().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    alphabet = dict(zip(range(256), characters(), strict=True))

    def written(token: bytes) -> str:
        return "".join(alphabet[byte] for byte in token)

    pairs = [halves(ranks, token) for token in ranks if len(token) > 1]
    merges = [(written(one), written(other)) for one, other in pairs]
    backend = Backend(models.BPE({written(token): rank for token, rank in ranks.items()}, merges))
    (pattern,) = (pattern for pattern, name in SPLITS.items() if name == "qwen2")
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    backend.add_special_tokens([AddedToken(name, special=True) for name in QWEN_SPECIAL])
    Tokenizer(backend, eos_token_id=len(ranks), pad_token_id=None).save(folder)  # the first of QWEN_SPECIAL
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


def characters() -> list[str]:
    """The character of each byte in a byte-level vocabulary."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    return [chr(byte if byte in shown else next(hidden)) for byte in range(256)]


def halves(ranks: dict[bytes, int], token: bytes) -> tuple[bytes, bytes]:
    """The two tokens that are merged into `token`: what remains when all earlier merges are applied to its bytes."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(one + other, len(ranks)) for one, other in pairwise(parts)]
        first = min(range(len(pairs)), key=pairs.__getitem__)
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts[0], parts[1]


def texts() -> dict[str, list[str]]:
    """Of each domain the first CHARACTERS."""
    site = sysconfig.get_path("purelib")
    found = {}
    for name in CROWD:
        named = ("".join(document.pieces) for document in local.documents(name)) if name in HOME else None
        chosen: list[str] = []
        for text in named or files([site, "/usr/share", "/usr/lib"], {f".{name}"}):
            chosen.append(text[:40_000])
            if sum(map(len, chosen)) > CHARACTERS:
                break
        found[name] = chosen
    return found


def print_collisions(measured: Measured) -> None:
    """Pairs that share a bucket with another pair of the same domain, by their number and by how often they occur."""
    print(
        "| domain | tokens | different pairs | share a bucket | of all occurrences |\n| --- | --- | --- | --- | --- |"
    )
    for name in HOME:
        documents = measured.some(name, 1_000_000)
        padded = [np.concatenate(([EOS], document)) for document in documents]
        first = np.concatenate([ids[:-1] for ids in padded])
        second = np.concatenate([ids[1:] for ids in padded])
        pairs, times = np.unique(first * measured.vocabulary + second, return_counts=True)
        buckets = bigram_bucket(pairs // measured.vocabulary, pairs % measured.vocabulary)
        shared = np.bincount(buckets, minlength=BIGRAM_BUCKETS)[buckets] > 1
        often = times[shared].sum() / times.sum()
        print(f"| {name} | {len(first):,} | {len(pairs):,} | {shared.mean():.2f} | {often:.2f} |", flush=True)


def print_found(measured: Measured) -> None:
    modules = {name: [measured.module(name)] for name in CROWD}
    print("\n| candidates beside the trunk | has | gate | gate of each |\n| --- | --- | --- | --- |")
    for names in (("cpp",), ("cpp", "perl"), HOME, CROWD):
        measured.row(", ".join(names), {name: modules[name] for name in names}, list(names))


def print_prompts(measured: Measured, tokenizer: Tokenizer) -> None:
    """The gates after the last token of each prompt, beside four modules. The trunk attends across documents."""
    names = ["trunk", *HOME]
    router = measured.router([measured.module(name) for name in HOME], across=True)
    print("\n| prompt | " + " | ".join(names) + " |\n| --- |" + " --- |" * len(names))
    for prompt in PROMPTS:
        cases = {f"`{prompt}`": tokenizer.encode_prompt(prompt)}
        if tokenizer.chat:
            cases[f"`{prompt}` in the chat template"] = tokenizer.chat.prompt([Message("user", prompt)])
        for case, ids in cases.items():
            swapped = [{tokenizer.eos_token_id: EOS, EOS: tokenizer.eos_token_id}.get(id, id) for id in ids]
            gates = measured.gates(router, torch.tensor([swapped]))[0, -1]
            print(f"| {case} ({len(ids)} tokens) | " + " | ".join(f"{gate:.2f}" for gate in gates.tolist()) + " |")


def main(settings: Settings) -> None:
    torch.set_num_threads(1)
    folder = settings.tokenizer
    if settings.tiktoken:
        folder = converted(settings.tiktoken, settings.output_dir / "tokenizer")
    if folder is None:
        raise SystemExit("Give --tokenizer or --tiktoken.")
    domains: dict[str, Documents]
    domains, vocabulary = tokenize_with(folder, texts())
    vocabulary = QWEN_VOCABULARY if settings.tiktoken else vocabulary
    measured = Measured(domains, vocabulary)
    size = sum(codes.numel() for codes in measured.trunk.values())
    print(f"vocabulary {vocabulary:,}; statistics of a candidate: {size:,} bytes\n")
    print_collisions(measured)
    print_found(measured)
    print_prompts(measured, load_tokenizer(folder))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
