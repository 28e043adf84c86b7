"""What a module's statistics reveal: planted secrets, read back from statistics.safetensors alone.

    python benchmarks/privacy_leak.py

Sentences that end in a random secret are planted in K documents of a local corpus. The corpus is counted as
train_module.py does, for several --statistics-min-documents. The reader knows the tokenizer, the sentence before the
secret and the published counts (8-bit codes). It predicts one token after another: among the tokens that occur and
whose pair has a bucket that is not empty, the one with the most frequent pair (or, for the second reader, the most
frequent relative to the token). The result of the better reader is printed. A guessed secret can also be checked: it
may have been in the text if none of its buckets is empty. Secrets that were never planted are the control: what is read
or confirmed of them is chance.
"""

import random
import statistics as averages
import string
import sys
import time
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import tyro
from script_process import ROOT

sys.path.insert(0, str(ROOT))

from forge_common.data import local
from forge_common.data.tokenizer import Tokenizer, train_tokenizer
from forge_common.routing import statistics

LENGTH = 12  # characters of a secret
NAMES = ("Ada", "Alan", "Barbara", "Edsger", "Grace", "John", "Katherine", "Leslie", "Margaret", "Niklaus")


@dataclass(frozen=True)
class Settings:
    corpus: str = "python"
    """Local corpus: NAME of local:NAME."""
    tokens: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    """Tokens that are counted, as --statistics-tokens."""
    vocabulary: int = 2048
    secrets: int = 50
    """Secrets that are planted for each number of documents."""
    planted: tuple[int, ...] = (1, 2, 4)
    """Documents that contain a secret."""
    min_documents: tuple[int, ...] = (1, 2, 4)
    longest: int = 1000
    """Tokens of a document, at most: longer ones are cut into several."""
    seed: int = 1


@dataclass(frozen=True)
class Secret:
    before: str
    """The sentence before it."""
    text: str
    planted: int
    """Documents that contain it."""


def main(settings: Settings) -> None:
    draw = random.Random(settings.seed)
    texts = ["".join(document.pieces) for document in local.documents(settings.corpus)]
    draw.shuffle(texts)
    tokenizer = train_tokenizer(iter(texts), settings.vocabulary)
    secrets = [
        Secret(f"\nThe password of {draw.choice(NAMES)} {number} is ", random_text(draw), planted)
        for planted in (0, *settings.planted)
        for number in range(settings.secrets)
    ]
    print("tokens counted  documents  min-documents  planted in  tokens read   still possible  secrets read  confirmed")
    for tokens in settings.tokens:
        plain = chosen(texts, tokenizer, tokens, settings.longest)
        documents = plant(plain, secrets, tokenizer, random.Random(settings.seed))
        for least in settings.min_documents:
            counts, size = statistics.count(documents, settings.vocabulary, tokenizer.eos_token_id, least)
            for planted in (0, *settings.planted):
                kept = [secret for secret in secrets if secret.planted == planted]
                readers = [[attack(counts, secret, tokenizer, lift) for secret in kept] for lift in (False, True)]
                read = max(readers, key=lambda reader: sum(one.right for one in reader))
                right = sum(one.right for one in read) / sum(one.tokens for one in read)
                left = averages.median(number for one in read for number in one.possible)
                print(
                    f"{size['tokens']:>14,}  {size['documents']:>9,}  {least:>13}  {planted or 'none':>10}  {right:>11.1%}"
                    f"  {left:>7,.0f} of {settings.vocabulary:,}  {sum(one.whole for one in read):>6} of {len(read)}"
                    f"  {sum(one.confirmed for one in read):>3} of {len(read)}"
                )


def random_text(draw: random.Random) -> str:
    return "".join(draw.choices(string.ascii_letters + string.digits, k=LENGTH))


def chosen(texts: list[str], tokenizer: Tokenizer, tokens: int, longest: int) -> list[list[int]]:
    """Documents as ids without EOS, each at most `longest`, until there are enough."""
    found: list[list[int]] = []
    for text in texts:
        if tokens <= 0:
            break
        ids = tokenizer.encode_batch([text])[0]
        ids = [token for token in ids if token != tokenizer.eos_token_id]
        for start in range(0, len(ids), longest):
            found.append(ids[start : start + longest][:tokens])
            tokens -= len(found[-1])
            if tokens <= 0:
                break
    return found


def plant(
    documents: list[list[int]], secrets: list[Secret], tokenizer: Tokenizer, draw: random.Random
) -> list[np.ndarray]:
    """Plants each secret once in `planted` documents, at random places; arrays of ids with an EOS at the end."""
    for secret in secrets:
        ids = split(secret, tokenizer)
        for document in draw.sample(documents, secret.planted):
            place = draw.randrange(len(document) + 1)
            document[place:place] = [*ids[0], *ids[1]]
    return [np.array([*document, tokenizer.eos_token_id], dtype=np.int64) for document in documents]


def split(secret: Secret, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids of the sentence before, and of the secret."""
    before, secret_ids = (
        [token for token in tokenizer.encode_batch([text])[0] if token != tokenizer.eos_token_id]
        for text in (secret.before, secret.text)
    )
    return before, secret_ids


@dataclass(frozen=True)
class Read:
    tokens: int
    right: int
    """Tokens predicted correctly, each after the correct previous one."""
    possible: list[int]
    """For each token: how many tokens are possible by the counts."""
    whole: bool
    """The complete secret was read without help."""
    confirmed: bool
    """None of its buckets is empty."""


def attack(counts: dict[str, torch.Tensor], secret: Secret, tokenizer: Tokenizer, lift: bool) -> Read:
    before, secret_ids = split(secret, tokenizer)
    right, possible, guesses, confirmed = 0, [], before[-1:], True
    for previous, token in pairwise([before[-1], *secret_ids]):
        guess, alive = predicted(counts, previous, lift)
        right += guess == token
        possible.append(int(alive.sum()))
        confirmed = confirmed and bool(alive[token])
        guesses.append(predicted(counts, guesses[-1], lift)[0])
    return Read(len(secret_ids), right, possible, guesses[1:] == secret_ids, confirmed)


def predicted(counts: dict[str, torch.Tensor], previous: int, lift: bool) -> tuple[int, torch.Tensor]:
    """The most likely token after `previous` (0 if none is possible), and which tokens are possible [V]."""
    single = counts["unigrams"]
    pairs = counts["bigrams"][statistics.bigram_bucket(torch.tensor(previous), torch.arange(len(single)))]
    alive = (single > 0) & (pairs > 0)
    score = statistics.decode(pairs) / (statistics.decode(single) + 1 if lift else 1)
    return int((alive * score).argmax()), alive


if __name__ == "__main__":
    started = time.monotonic()
    main(tyro.cli(Settings, description=__doc__))
    print(f"{time.monotonic() - started:.0f} s")
