"""Writes what all contenders of benchmarks/peers.py start from: a Transformers checkpoint and the windows of each update.

    PYTHONPATH=. python benchmarks/peers_prepare.py ...the flags of train_shared.py... --vocabulary 16384

OUTPUT_DIR/checkpoint   config.json, model.safetensors, tokenizer.json: the initial weights
OUTPUT_DIR/windows.npy  int64 [steps * batch_size, T + 1], in the order in which train_shared.py reads them
OUTPUT_DIR/work.json    the sizes of the linear layers, and the FLOPs of a token for what each contender trains
"""

import dataclasses
from dataclasses import dataclass

import train_shared
from forge_common.settings import read_settings, run_main


@dataclass(frozen=True, kw_only=True)
class Settings(train_shared.Settings):
    vocabulary: int
    """Rows of the embedding: at least as many as the tokenizer has tokens."""


def main(settings: Settings) -> int:
    import numpy as np
    import torch
    from safetensors.torch import save_file

    from forge_common.data.corpora import open_corpora, tokenizer_for
    from forge_common.data.order import updates
    from forge_common.files.atomic import write_json
    from forge_common.model.config import model_config
    from forge_common.model.modules import chosen_layers, plug_in
    from forge_common.model.trunk import Trunk

    tokenizer = tokenizer_for(settings)
    if tokenizer.vocab_size > settings.vocabulary:
        raise SystemExit(
            f"--vocabulary {settings.vocabulary} is less than the tokenizer's {tokenizer.vocab_size}. Raise it."
        )
    config = dataclasses.replace(model_config(settings, tokenizer), vocab_size=settings.vocabulary)
    torch.manual_seed(settings.seed)
    trunk = Trunk(config)
    folder = settings.output_dir / "checkpoint"
    tokenizer.save(folder)
    write_json(folder / "config.json", config.to_hf())
    save_file(trunk.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})

    corpora = open_corpora(settings, tokenizer, config.ignore_index, print)
    stream = updates(corpora.training, 0, settings.batch_size, settings.micro_batch_size, 0, 1, torch.device("cpu"))
    windows = torch.cat([next(stream).flatten(0, 1) for _ in range(settings.steps)])
    stream.close()
    np.save(settings.output_dir / "windows.npy", windows.numpy())

    matrices = [p for name, p in trunk.named_parameters() if p.ndim == 2 and "embed_tokens" not in name]
    flops = {"whole": trunk.flops_per_token(settings.sequence_length)}
    for kind in ("ffn", "ffn+head", "lora"):
        module = Trunk(config)
        plug_in(module, kind, chosen_layers(f"top:{config.num_hidden_layers // 2}", config.num_hidden_layers))
        flops[kind] = module.flops_per_token(settings.sequence_length)
    shapes = [tuple(matrix.shape) for matrix in [*matrices, trunk.head]]
    write_json(settings.output_dir / "work.json", {"shapes": shapes, "flops_per_token": flops})
    return 0


if __name__ == "__main__":
    run_main(main, read_settings(Settings, __doc__))
