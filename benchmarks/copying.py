"""Whether a trunk copies from its context: nats per token of random tokens, and of the same tokens repeated after them.

    python benchmarks/copying.py runs/compare/seed-1/trunk/trunk [MORE...]

A model without heads that copy (induction heads; Olsson et al., arXiv 2209.11895) gains nothing from the repetition.
Half of the context is drawn, uniformly, and repeated.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from script_process import ROOT

sys.path.insert(0, str(ROOT))

import torch

from forge_common.artifacts.trunk_folder import read_trunk

SEQUENCES = 256


@dataclass(frozen=True)
class Settings:
    trunks: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of trunks."""


def main(settings: Settings) -> None:
    print(f"{'first':>7} {'again':>7} {'gain':>7}")
    for folder in settings.trunks:
        trunk, _, _ = read_trunk(str(folder))
        draw = torch.Generator().manual_seed(0)
        special = max(trunk.config.ignore_index, trunk.config.eos_token_id or 0) + 1
        half = trunk.config.max_position_embeddings // 2
        once = torch.randint(special, trunk.config.vocab_size, (SEQUENCES, half), generator=draw)
        nats = trunk.eval().nats(torch.cat((once, once), dim=1))
        first, again = nats[:, : half - 1].mean().item(), nats[:, half:].mean().item()
        print(f"{first:7.3f} {again:7.3f} {first - again:7.3f}  {folder}")


if __name__ == "__main__":
    os.chdir(ROOT)
    main(tyro.cli(Settings, description=__doc__))
