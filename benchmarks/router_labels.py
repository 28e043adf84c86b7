"""Which domain the context router finds, from counts alone: no model is trained or run.

    python benchmarks/router_labels.py [--vocabulary 2048 | --tokenizer runs/pretrained/trunk]

The text is that of this machine: the four local corpora, Python packages as code bases, and other types of files as
foreign text. Modules are counted on documents that are not tested. A module "has" a token where its domain's modules
together have the largest gate; "gate" is their mean gate. Prints a table in Markdown: about five minutes on one core.
"""

import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from script_process import ROOT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

sys.path.insert(0, str(ROOT))

from forge_common.data import local
from forge_common.data.tokenizer_files import load_tokenizer
from forge_common.routing import statistics
from forge_common.routing.routers import ContextRouter
from forge_common.routing.tuning import Tuning

HOME = ("docs", "python", "cpp", "perl")
MIX = {"docs": 0.76, "python": 0.08, "cpp": 0.08, "perl": 0.08}  # the trunk's text
FOREIGN = ("js", "html", "vim", "tcl", "sql", "css", "c", "cmake")
CROWD = (*HOME, "js", "html", "rst", "json")
EOS = 1
TESTED = 32  # documents of a domain
TOKENS = 256  # of each: the first ones
COUNTED = 1_000_000
CHARACTERS = 4_000_000  # of a domain
Documents = list[np.ndarray]


@dataclass(frozen=True)
class Settings:
    vocabulary: int = 2048
    """Tokens of the tokenizer, which is trained on the trunk's text."""
    tokenizer: Path | None = None
    """Folder of a trunk whose tokenizer is used instead."""


def files(roots: list[str], suffixes: set[str]) -> Iterator[str]:
    """Texts of 400 to 100,000 bytes, in the order of their paths' digests, without copies."""
    paths = [Path(here, name) for root in roots for here, _, names in os.walk(root) for name in names]
    seen = set()
    for path in sorted(paths, key=lambda path: hashlib.sha256(str(path).encode()).digest()):
        try:
            if path.suffix not in suffixes or not 400 <= path.stat().st_size <= 100_000:
                continue
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        start = text[:2000]
        if start not in seen:
            seen.add(start)
            yield text


def texts() -> dict[str, list[str]]:
    """Of each domain at most CHARACTERS; domains of less than 200,000 are left out."""
    site = sysconfig.get_path("purelib")
    sources: dict[str, Iterator[str]] = {name: ("".join(d.pieces) for d in local.documents(name)) for name in HOME}
    for package in sorted(path.name for path in Path(site).iterdir() if (path / "__init__.py").is_file()):
        sources[f"package {package}"] = files([f"{site}/{package}"], {".py"})
    for kind in sorted({*FOREIGN, *CROWD} - set(HOME)):
        sources[kind] = files([site, "/usr/share", "/usr/lib"], {f".{kind}"})
    found = {}
    for name, source in sources.items():
        chosen, size = [], 0
        for text in source:
            chosen.append(text[:40_000])
            size += len(chosen[-1])
            if size > CHARACTERS:
                break
        if size > (1_000_000 if name.startswith("package") else 200_000):
            found[name] = chosen
    return found


def tokenize_with(folder: Path, domains: dict[str, list[str]]) -> tuple[dict[str, Documents], int]:
    """The documents' ids with a trunk's tokenizer, whose EOS becomes EOS, and its vocabulary."""
    tokenizer = load_tokenizer(folder)
    swapped = {tokenizer.eos_token_id: EOS, EOS: tokenizer.eos_token_id}

    def ids(text: list[int]) -> np.ndarray:
        return np.array([*(swapped.get(id, id) for id in text), EOS])

    documents = {name: [ids(text) for text in tokenizer.encode_batch(chosen)] for name, chosen in domains.items()}
    return documents, tokenizer.vocab_size


def tokenize(domains: dict[str, list[str]], vocabulary: int) -> dict[str, Documents]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    mixed = [text for name, share in MIX.items() for text in domains[name][: int(len(domains[name]) * share)]]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(mixed, trainer)
    return {
        name: [np.array([*encoding.ids, EOS]) for encoding in tokenizer.encode_batch(chosen)]
        for name, chosen in domains.items()
    }


def first(documents: Documents, tokens: float) -> Documents:
    """The first documents, of this many tokens in all."""
    chosen, total = [], 0
    for document in documents:
        chosen.append(document[: int(tokens - total)])
        total += len(chosen[-1])
        if total >= tokens:
            break
    return chosen


class Measured:
    """The router on the documents that are not counted."""

    def __init__(self, domains: dict[str, Documents], vocabulary: int):
        self.vocabulary = vocabulary
        self.tested, self.counted = {}, {}
        for name, documents in domains.items():
            order = np.random.default_rng(0).permutation(len(documents))
            few = max(4, min(TESTED, len(documents) // 5))
            self.tested[name] = [documents[i] for i in order[:few]]
            self.counted[name] = [documents[i] for i in order[few:]]
        mix = [piece for name, share in MIX.items() for piece in self.some(name, share * COUNTED, last=True)]
        self.trunk = statistics.count(mix, vocabulary, EOS, 2)[0]

    def some(self, name: str, tokens: float, *, last: bool = False) -> Documents:
        """The first (last) documents of a domain, about this many tokens."""
        return first(self.counted[name][:: -1 if last else 1], tokens)

    def module(self, name: str, tokens: float = COUNTED) -> dict[str, torch.Tensor]:
        return statistics.count(self.some(name, tokens), self.vocabulary, EOS, 2)[0]

    def router(self, modules: list[dict[str, torch.Tensor]], *, across: bool = False) -> ContextRouter:
        """across: of a trunk that attends across documents."""
        prior = torch.full((len(modules) + 1,), 1 / (len(modules) + 1))
        return ContextRouter([self.trunk, *modules], prior, EOS, Tuning(), across=across)

    def gates(self, router: ContextRouter, tokens: torch.Tensor, *, mixed: bool = True) -> torch.Tensor:
        states, _ = router.route(tokens, router.start(len(tokens), at_document=True))
        return router.gates(states, mixed=mixed)

    def found(self, router: ContextRouter, names: list[str], name: str, *, mixed: bool = True) -> tuple[float, float]:
        """Share of the tokens that `name` has, and its mean gate. names: of the candidates; docs is also the trunk's domain."""
        right = [e for e, other in enumerate(names) if other == name or (name == "docs" and other == "trunk")]
        distinct = list(dict.fromkeys(names))
        has, gate, total = 0.0, 0.0, 0
        for document in self.tested[name if name in self.tested else "docs"]:
            gates = self.gates(router, torch.from_numpy(document[:-1][:TOKENS])[None], mixed=mixed)[0]
            sums = torch.stack([gates[:, [e for e, n in enumerate(names) if n == d]].sum(1) for d in distinct], dim=1)
            best = [distinct[i] for i in sums.argmax(1).tolist()]
            has += sum(b == name or (name == "docs" and b == "trunk") for b in best)
            gate += float(gates[:, right].sum())
            total += len(gates)
        return has / total, gate / total

    def row(self, case: str, modules: dict[str, list], tested: list[str]) -> None:
        names = ["trunk", *(name for name, group in modules.items() for _ in group)]
        router = self.router([module for group in modules.values() for module in group])
        each = {name: self.found(router, names, name) for name in tested}
        has, gate = (sum(pair[i] for pair in each.values()) / len(each) for i in range(2))
        shown = ", ".join(f"{name} {pair[1]:.2f}" for name, pair in each.items()) if len(each) < 9 else ""
        print(f"| {case} | {has:.3f} | {gate:.3f} | {shown} |", flush=True)

    def switches(self, router: ContextRouter, names: list[str]) -> float:
        """Share of the changes of domain after TOKENS / 2 tokens after which the new one has more than half within 64 tokens.

        Prints it for each pair of domains.
        """
        half, noticed = TOKENS // 2, []
        for one in HOME:
            for other in HOME:
                long = [[d[:half] for d in self.tested[name] if len(d) > half] for name in (one, other)]
                number = min(map(len, long))
                if one == other or not number:
                    continue
                rows = [np.concatenate((long[0][i], long[1][i])) for i in range(number)]
                gates = self.gates(router, torch.from_numpy(np.stack(rows)))[:, half : half + 64]
                own = gates[..., names.index(other)] + (gates[..., 0] if other == "docs" else 0)
                found = (own > 0.5).any(1)
                noticed.append(found)
                print(f"{one} to {other}: {float(found.float().mean()):.2f}", flush=True)
        return float(torch.cat(noticed).float().mean())


def main(settings: Settings) -> None:
    torch.set_num_threads(1)
    if settings.tokenizer:
        measured = Measured(*tokenize_with(settings.tokenizer, texts()))
    else:
        measured = Measured(tokenize(texts(), settings.vocabulary), settings.vocabulary)
    home = {name: [measured.module(name)] for name in HOME}
    print(
        f"vocabulary {measured.vocabulary:,}\n\n| candidates | has | gate | gate of each |\n| --- | --- | --- | --- |"
    )
    measured.row("the four", home, list(HOME))
    for tokens in (20_000, 60_000, 200_000):
        measured.row(
            f"python counted on {tokens:,} tokens", home | {"python": [measured.module("python", tokens)]}, list(HOME)
        )
    measured.row("all counted on 20,000 tokens", {name: [measured.module(name, 20_000)] for name in HOME}, list(HOME))
    for number in (1, 2):  # of modules; the trunk alone serves the other domains
        measured.row(
            f"{number} of the four", {name: home[name] for name in ("cpp", "perl")[:number]}, ["cpp", "perl"][:number]
        )
    for lie, code in (("nothing counted", 0), ("all counts the largest", 255)):
        false = {name: torch.full_like(codes, code) for name, codes in measured.trunk.items()}
        measured.row(f"and one more: {lie}", home | {"lie": [false]}, list(HOME))
    measured.row("and one more: python's counts", home | {"lie": home["python"]}, list(HOME))
    packages = [name for name in measured.counted if name.startswith("package")]
    measured.row(f"{len(packages)} code bases", {name: [measured.module(name)] for name in packages}, packages)
    for parts in (1, 4, 8):
        crowd = {}
        for name in CROWD:
            size = min(COUNTED, sum(map(len, measured.counted[name])))
            pieces = [measured.counted[name][part::parts] for part in range(parts)]
            cut = [statistics.count(first(piece, size / parts), measured.vocabulary, EOS, 2)[0] for piece in pieces]
            crowd[name] = cut
        measured.row(f"8 domains as {8 * parts} modules", crowd, list(CROWD))
    names = ["trunk", *HOME]
    router = measured.router([home[name][0] for name in HOME])
    print(f"\nchanges of domain noticed within 64 tokens: {measured.switches(router, names):.3f}")
    foreign = [name for name in FOREIGN if name in measured.tested]
    for mixed in (True, False):
        gates = {}
        for name in foreign:
            rows = [
                measured.gates(router, torch.from_numpy(d[:-1][:TOKENS])[None], mixed=mixed)[0]
                for d in measured.tested[name]
            ]
            gates[name] = float(torch.cat(rows)[:, 0].mean())
        shown = ", ".join(f"{name} {gate:.2f}" for name, gate in gates.items())
        print(f"the trunk's gate on foreign text, {'all gates' if mixed else 'top-k'}: {shown}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
