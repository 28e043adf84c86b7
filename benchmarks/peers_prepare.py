"""Writes what all contenders of benchmarks/peers.py start from: a Transformers checkpoint and the windows of each update.

    PYTHONPATH=. python benchmarks/peers_prepare.py ...the flags of train_shared.py... --vocabulary 16384

OUTPUT_DIR/checkpoint holds the initial weights; windows.npy, int64 [steps * batch_size, T + 1], the windows in the order in which
train_shared.py reads them; work.json the shapes of the linear layers, and the FLOPs of a token for what a contender trains.
"""

import dataclasses
from dataclasses import dataclass

import train_shared
from forge_common.command_line import read_settings, run_main


@dataclass(frozen=True, kw_only=True)
class Settings(train_shared.Settings):
    vocabulary: int
    """Rows of the embedding: at least as many as the tokenizer has tokens."""


def main(settings: Settings) -> int:
    import numpy as np
    import torch
    from safetensors.torch import save_file

    from forge_common.data.corpora import open_corpora, tokenizer_for
    from forge_common.files.atomic import write_json
    from forge_common.model.modules import chosen_layers, plug_in
    from forge_common.model.presets import model_config
    from forge_common.model.trunk import Trunk

    tokenizer = tokenizer_for(settings)
    config = dataclasses.replace(model_config(settings, tokenizer), vocab_size=settings.vocabulary)
    torch.manual_seed(settings.seed)
    trunk = Trunk(config)
    folder = settings.output_dir / "checkpoint"
    tokenizer.save(folder)
    write_json(folder / "config.json", config.to_hf())
    save_file(trunk.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})

    training = open_corpora(settings, tokenizer, config, print).training
    windows = training.windows(np.arange(settings.steps * settings.batch_size))
    np.save(settings.output_dir / "windows.npy", windows)

    matrices = [p for name, p in trunk.named_parameters() if p.ndim == 2 and "embed_tokens" not in name]
    shapes = [tuple(matrix.shape) for matrix in [*matrices, trunk.head]]
    flops = {"whole": trunk.flops_per_token(settings.sequence_length)}
    layers = chosen_layers(f"top:{config.num_hidden_layers // 2}", config.num_hidden_layers)
    for kind in ("ffn", "ffn+head", "lora"):
        trunk = Trunk(config)
        plug_in(trunk, kind, layers)
        flops[kind] = trunk.flops_per_token(settings.sequence_length)
    write_json(settings.output_dir / "work.json", {"shapes": shapes, "flops_per_token": flops})
    return 0


if __name__ == "__main__":
    run_main(main, read_settings(Settings, __doc__))
