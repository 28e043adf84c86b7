"""The check, before update 1, that all processes of a run have the same settings, data, versions and output directory.

Machines that differ would train on without an error, or wait for each other forever.
"""

import hashlib
import importlib.metadata
import json
import socket
import sys
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..flags import flag_of
from ..settings import to_json
from .folder import sees_lock

LOCAL = {"output_dir", "cache_dir"}  # settings that may differ between machines
NAMED = 4  # ranks that a message names for each value


def check_agreement(accelerator: Any, settings: Any, digests: dict[str, str | None]) -> None:
    """UserError on every process, with the entry, the ranks and their hosts, where the processes differ. A collective.

    digests: of what the run reads. Each process sends one hash; only if the hashes differ are all entries sent.
    """
    if accelerator.num_processes == 1:
        return
    flags = {flag_of(name): value for name, value in to_json(settings).items() if name not in LOCAL}
    mine = {
        **flags,
        **{f"digest of {name}": value for name, value in digests.items()},
        "precision": accelerator.mixed_precision,
        "engine": str(accelerator.distributed_type),
        "torch": str(torch.__version__),
        "accelerate": importlib.metadata.version("accelerate"),
        "digest of the code": _code_digest(),
        "output": sees_lock(accelerator, settings),
    }
    hashed = hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).digest()
    everyone = accelerator.gather(torch.tensor([list(hashed)], dtype=torch.uint8, device=accelerator.device))
    if bool((everyone == everyone[0]).all()):
        return
    place = f"{settings.output_dir.absolute()} on host {socket.gethostname()}"
    entries: list[Any] = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(entries, (socket.gethostname(), place, mine))
    raise UserError(_report(entries))


def _code_digest() -> str:
    """Of the script and of the files of this package, also where they have no version number: a checkout may be edited."""
    files = [Path(sys.argv[0]), *sorted(Path(__file__).parents[1].rglob("*.py"))]
    digests = [hashlib.sha256(path.read_bytes()).digest() for path in files if path.is_file()]
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _report(entries: list[tuple[str, str, dict[str, Any]]]) -> str:
    """What differs between the (host, output directory, entries) of the ranks, and how to fix it."""
    places: dict[str, list[str]] = {}
    values: dict[str, dict[str, list[str]]] = {}  # entry -> value -> ranks
    for rank, (host, place, mine) in enumerate(entries):
        named = f"{rank} ({host})"
        if not mine["output"]:
            places.setdefault(place, []).append(named)
        for name in mine.keys() - {"output"}:
            value = str(mine[name])[:12] if name.startswith("digest") else repr(mine[name])
            values.setdefault(name, {}).setdefault(value, []).append(named)
    lines = []
    different = {name: found for name, found in sorted(values.items()) if len(found) > 1}
    if different:
        lines.append("the processes of this run differ, and would not train one model:")
        for name, found in different.items():
            lines.append(f"  {name}: " + "; ".join(f"{value} on {_ranks(ranks)}" for value, ranks in found.items()))
        lines.append("Start all of them with the same flags, data, code and packages.")
    if places:
        lines.append(f"--output-dir is {entries[0][1]} for rank 0, which another process does not see:")
        lines += [f"  {_ranks(ranks)}: {place}" for place, ranks in places.items()]
        lines.append("All machines read the checkpoints: name a folder on a file system that they share.")
    return "\n".join(lines)


def _ranks(ranks: list[str]) -> str:
    more = f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
    return ("ranks " if len(ranks) > 1 else "rank ") + ", ".join(ranks[:NAMED]) + more
