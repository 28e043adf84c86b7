"""Every family in every format: the difference of a logit that stands on the card. `pytest -s` prints docs/EXPORT.md's table.

Small trunks with random weights; each has a module of kind lora, and is assembled with it. The packages of
requirements-pretrained.txt are needed.
"""

import dataclasses
import re
from pathlib import Path

import pytest
import small_artifacts
import torch

from forge_common import assemble, export
from forge_common.artifacts import module_folder, trunk_folder
from forge_common.data.tokenizer import Tokenizer, train_tokenizer
from forge_common.errors import UserError
from forge_common.exporting import proof
from forge_common.model.modules import plug_in
from forge_common.model.trunk import Trunk

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA = dataclasses.replace(
    small_artifacts.CONFIG,
    vocab_size=300,
    hidden_size=32,
    intermediate_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
    initializer_range=0.1,
    rope_scaling=None,
)
LLAMA_3 = dataclasses.replace(LLAMA, rope_scaling=small_artifacts.CONFIG.rope_scaling, tie_word_embeddings=False)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
CONFIGS = {
    "Llama": LLAMA,
    "Llama, rope type llama3, untied": LLAMA_3,
    "Llama, rope type linear": dataclasses.replace(LLAMA, rope_scaling={"rope_type": "linear", "factor": 2.0}),
    "Llama, rope type dynamic": dataclasses.replace(LLAMA, rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
    "Llama, rope type yarn": dataclasses.replace(LLAMA, rope_scaling=YARN),
    "Mistral, a sliding window": dataclasses.replace(LLAMA, family="mistral", sliding_window=256),
    "Mistral, heads narrower than D / H": dataclasses.replace(LLAMA, family="mistral", head_dim=4),  # as Nemo has
    "Qwen2": dataclasses.replace(LLAMA, qkv_bias=True, tie_word_embeddings=False),
    "Qwen3, heads wider than D / H": dataclasses.replace(LLAMA, qk_norm=True, head_dim=16),
    "OLMo2": dataclasses.replace(LLAMA, family="olmo2", qk_norm=True),
    "Gemma": dataclasses.replace(LLAMA, family="gemma"),
}
FORMATS = ("transformers", "merged", "gguf", "gguf, merged", "peft", "assembled")
REFUSED = {("Gemma", "gguf"), ("OLMo2", "gguf"), ("Llama, rope type dynamic", "assembled")}
REFUSED |= {(f"Llama, rope type {name}", "gguf") for name in ("linear", "dynamic", "yarn")}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(proof.texts().values(), 300)


def build(folder: Path, config, tokenizer: Tokenizer) -> None:
    """folder/trunk, folder/module, and folder/assembled of both."""
    torch.manual_seed(0)
    trunk = Trunk(config)
    for parameter in trunk.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, float(parameter.mean()), 0.2)
    trunk_folder.write_trunk(folder / "trunk", trunk.state_dict(), config, tokenizer, {}, counts(0))
    _, _, trunk_metadata = trunk_folder.read_trunk(str(folder / "trunk"))
    names = plug_in(trunk, "lora", [0, 1], rank=3)
    tensors = {name: torch.randn_like(trunk.state_dict()[name]) * 0.1 for name in names}
    metadata = {"name": "one", "kind": "lora", "layers": [0, 1], "rank": 3, "trunk_digest": trunk_metadata["digest"]}
    metadata["tokenizer_digest"] = trunk_metadata["tokenizer_digest"]
    module_folder.write_module(folder / "module", tensors, metadata, counts(1), config)
    assemble.main(assemble.Settings(str(folder / "trunk"), (folder / "module",), folder / "assembled"))


def counts(seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    unigrams = torch.randint(0, 90, (300,), dtype=torch.uint8, generator=draw)
    return small_artifacts.counts(seed, moments=False) | {"unigrams": unigrams}


def difference_on_card(folder: Path) -> float:
    found = re.search(r"\| largest_logit_difference \| (\S+) \|", (folder / "README.md").read_text())
    assert found
    return float(found[1])


@pytest.mark.parametrize("family", CONFIGS)
def test_each_format_has_the_same_logits_or_is_refused(tmp_path, tokenizer, family):
    for package in ("gguf", "peft"):
        pytest.importorskip(package)
    build(tmp_path, CONFIGS[family], tokenizer)
    trunk, module = str(tmp_path / "trunk"), tmp_path / "module"
    cells = []
    for name in FORMATS:
        settings = export.Settings(trunk, "transformers", tmp_path / name)
        if name in ("merged", "gguf, merged", "peft"):
            settings = dataclasses.replace(settings, module=module)
        if name == "assembled":
            settings = dataclasses.replace(settings, model=str(tmp_path / "assembled"), output_dir=tmp_path / "all")
        elif name not in ("transformers", "merged"):
            settings = dataclasses.replace(settings, format=name.partition(",")[0])
        if (family, name.partition(",")[0]) in REFUSED:
            with pytest.raises(UserError):
                export.main(settings)
            cells.append("refused")
            continue
        export.main(settings)
        largest = difference_on_card(settings.output_dir)
        assert largest < 1e-5, name
        cells.append(f"{largest:.1e}")
    print(f"\n| {family} | {' | '.join(cells)} |")
