"""train_module.py with FlexOlmo's initial router (arXiv 2507.07024), which it has no flag for; recipes.py runs it.

The router's row starts as the difference of two embeddings: of the module's text and of the trunk's. ROWS names a file
with one row for each layer.

L layers, D width
"""

import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

ROWS = "FLEXOLMO_ROWS"  # environment: .npy with float32 [L, D]


def initial_rows(domain: np.ndarray, trunk: np.ndarray) -> np.ndarray:
    """[L, D] from the mean normed hidden states [L, D] of two texts: the difference of their directions."""
    unit = [means / np.linalg.norm(means, axis=-1, keepdims=True) for means in (domain, trunk)]
    return (unit[0] - unit[1]).astype(np.float32)


def main() -> None:
    import torch

    import train_module
    from forge_common.command_line import read_settings, run_main
    from forge_common.model import modules
    from forge_common.settings_checks import problems

    plain = modules.plug_in
    rows = torch.from_numpy(np.load(os.environ[ROWS]))

    def plug_in(trunk, kind, layers, **sizes):
        names = plain(trunk, kind, layers, **sizes)
        with torch.no_grad():
            for index in layers:
                addition = trunk.model.layers[index].addition
                assert isinstance(addition, modules.RoutedExpert)
                addition.row.weight.copy_(rows[index][None])
        return names

    modules.plug_in = plug_in
    run_main(train_module.main, read_settings(train_module.Settings, train_module.__doc__, problems))


if __name__ == "__main__":
    main()
