"""Memory and time of kind lora beside PEFT's LoRA, on a pretrained trunk and the same windows in the same order.

    PYTHONPATH=.pretrained python benchmarks/pretrained_memory.py [--trunk runs/pretrained/trunk] [--rounds 3] [--updates 3]
    PYTHONPATH=.pretrained python benchmarks/pretrained_memory.py --checkpointing         # both compute activations again
    PYTHONPATH=.pretrained python benchmarks/pretrained_memory.py --bf16 --updates 1      # both have the frozen weights in bf16

Each measurement is a new process, and a round measures every contender once. Both train rank 16 on the three matrices
of every feed-forward, from the same initial values, with fused AdamW in float32. Times are those between the first and
the last update, so at least 2 updates are needed. Peak is the largest resident set of the whole process: ours publishes
its module, PEFT's does not.
"""

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import tyro
from script_process import ROOT, spread

FILES = "windows.npy", "held_out.npy"
RANK, LR = 16, 1e-3
MATRICES = ["gate_proj", "up_proj", "down_proj"]
POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Settings:
    trunk: Path = Path("runs/pretrained/trunk")
    """Folder of a Transformers checkpoint of a Llama."""
    data: str = "local:cpp"
    """Source of the text."""
    output_dir: Path = Path("runs/pretrained_memory")
    """Folder for the windows, the modules and results.json, to which each round adds a line."""
    cache_dir: Path = Path("runs/pretrained/cache")
    """Folder for tokens."""
    rounds: int = 3
    """Measurements of each contender."""
    updates: int = 3
    """Updates of a measurement."""
    batch_size: int = 4
    """Windows of an update, in one micro-batch."""
    sequence_length: int = 512
    """Tokens of a window."""
    val_tokens: int = 4096
    """Held-out tokens that are scored after the last update."""
    threads: int = 1
    """Threads of a process."""
    checkpointing: bool = False
    """Compute the activations of each layer again in the backward pass."""
    bf16: bool = False
    """Frozen weights in bf16, computed in bf16: --trunk-dtype bf16; PEFT's model is loaded in bf16, its changes are in
    float32 as by default.
    """
    child: str | None = None
    """Internal: what this process is."""


def flags(settings: Settings, folder: Path) -> list[str]:
    """The command line of train_module.py without the script."""
    values = {"trunk": settings.trunk, "name": "lora", "data": settings.data, "output-dir": folder, "kind": "lora"}
    values |= {"cache-dir": settings.cache_dir, "rank": RANK, "lr": LR, "schedule": "constant", "warmup-steps": 0}
    values |= {"steps": settings.updates, "batch-size": settings.batch_size, "micro-batch-size": settings.batch_size}
    values |= {"sequence-length": settings.sequence_length, "val-every": 0, "val-tokens": settings.val_tokens}
    values |= {"general-tokens": 0, "log-every": 1, "tracker": "none", "resume": "never"}
    line = [str(part) for name, value in values.items() for part in (f"--{name}", value)]
    return line + ["--activation-checkpointing"] * settings.checkpointing + ["--trunk-dtype", "bf16"] * settings.bf16


def prepare(settings: Settings) -> None:
    """Writes the windows of each update, int64 [updates * batch_size, T + 1], and the held-out windows [N, T + 1]."""
    import train_module
    from forge_common.artifacts.trunk_folder import read_trunk
    from forge_common.command_line import read_settings
    from forge_common.data.corpora import open_corpora

    sys.argv[1:] = flags(settings, settings.output_dir / "ours")
    chosen: Any = read_settings(train_module.Settings, None)
    trunk, tokenizer, _ = read_trunk(str(settings.trunk))
    corpora = open_corpora(chosen, tokenizer, trunk.config, print)
    np.save(settings.output_dir / FILES[0], corpora.training.windows(np.arange(settings.updates * settings.batch_size)))
    np.save(
        settings.output_dir / FILES[1], np.stack([store[i] for store in corpora.held_out for i in range(len(store))])
    )


def train_peft(settings: Settings) -> None:
    """PEFT's LoRA on Transformers' Llama: sdpa, fused AdamW, no cache; its loss on the held-out windows goes to result.json."""
    import torch
    import torch.nn.functional as F
    from peft import LoraConfig, get_peft_model  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if settings.bf16 else torch.float32
    options = {"attn_implementation": "sdpa", "dtype": dtype, "use_cache": False}
    model: Any = AutoModelForCausalLM.from_pretrained(settings.trunk, **options)
    count = model.config.num_hidden_layers
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=MATRICES))
    torch.manual_seed(42)  # --seed of train_module.py, which draws them in this order
    for layer in range(count):
        for name in MATRICES:
            a = model.get_submodule(f"base_model.model.model.layers.{layer}.mlp.{name}.lora_A.default").weight
            torch.nn.init.uniform_(a, -(a.shape[1] ** -0.5), a.shape[1] ** -0.5)
    if settings.checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    windows = torch.from_numpy(np.load(settings.output_dir / FILES[0])).split(settings.batch_size)
    folder = settings.output_dir / "peft"
    folder.mkdir(exist_ok=True)
    model.train()
    for window in windows:
        labels = window[:, 1:].contiguous()
        loss = model(input_ids=window[:, :-1], labels=labels, shift_labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"train/loss": loss.item()}) + "\n")
    model.eval()
    nats = tokens = 0
    with torch.no_grad():
        for window in torch.from_numpy(np.load(settings.output_dir / FILES[1])):
            logits = model(input_ids=window[None, :-1].clamp(min=0)).logits[0]
            nats += F.cross_entropy(logits.float(), window[1:], reduction="sum", ignore_index=-100).item()
            tokens += int((window[1:] != -100).sum())
    (folder / "result.json").write_text(json.dumps({"loss": nats / tokens}))


def measure(settings: Settings, contender: str) -> dict[str, float]:
    """Peak (MiB), processor and wall seconds of an update, the loss of the last update, and the loss on the held-out windows."""
    folder = settings.output_dir / contender
    subprocess.run(["rm", "-rf", folder], check=True)
    line = [sys.executable, ROOT / "train_module.py", *flags(settings, folder)]
    if contender == "peft":
        line = [sys.executable, __file__, *sys.argv[1:], "--child", "peft"]
    environment = os.environ | {"OMP_NUM_THREADS": str(settings.threads)}
    environment |= {"ACCELERATE_MIXED_PRECISION": "bf16"} if settings.bf16 else {}
    with open(settings.output_dir / f"{contender}.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(line, stdout=log, stderr=subprocess.STDOUT, env=environment)
        moments: list[tuple[float, float]] = []
        ended = 0
        while not ended:
            rows = folder / "metrics.jsonl"
            if rows.exists() and rows.read_text(encoding="utf-8").count("train/loss") > len(moments):
                fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
                ticks = int(fields[11]) + int(fields[12])
                moments.append((ticks / os.sysconf("SC_CLK_TCK"), time.perf_counter()))
            time.sleep(POLL_SECONDS)
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
    if status or len(moments) != settings.updates:
        raise SystemExit(f"{contender} ended with {status} after {len(moments)} updates. See {log.name}.")
    processor, wall = (
        (moments[-1][i] - moments[0][i]) / (len(moments) - 1) if len(moments) > 1 else math.nan for i in (0, 1)
    )
    training = [json.loads(row) for row in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    if contender == "peft":
        after = json.loads((folder / "result.json").read_text())["loss"]
    else:
        after = json.loads((folder / "module" / "module.json").read_text())["losses"]["own"]["after"]
    last = [row["train/loss"] for row in training if "train/loss" in row][-1]
    peak = usage.ru_maxrss / 1024
    return {"peak": peak, "processor": processor, "wall": wall, "last loss": last, "held-out loss": after}


def main(settings: Settings) -> None:
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    if settings.child == "prepare":
        return prepare(settings)
    if settings.child == "peft":
        return train_peft(settings)
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    os.environ["PYTHONPATH"] = path
    subprocess.run([sys.executable, __file__, *sys.argv[1:], "--child", "prepare"], check=True)
    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(settings.rounds):
        order = ("ours", "peft") if number % 2 == 0 else ("peft", "ours")
        rounds.append({contender: measure(settings, contender) for contender in order})
        with open(settings.output_dir / "results.json", "a", encoding="utf-8") as file:
            file.write(
                json.dumps({"checkpointing": settings.checkpointing, "bf16": settings.bf16, **rounds[-1]}) + "\n"
            )
    print("| | peak, MiB | processor s an update | wall s an update | loss of the last update | held-out loss |")
    print("| --- | --- | --- | --- | --- | --- |")
    for contender, name in (("ours", "train_module.py --kind lora"), ("peft", "PEFT LoRA")):
        runs = [each[contender] for each in rounds]
        cells = [
            spread([run[key] for run in runs], digits) for key, digits in (("peak", 0), ("processor", 1), ("wall", 1))
        ]
        cells += [f"{median(run[key] for run in runs):.5f}" for key in ("last loss", "held-out loss")]
        print(f"| {name} | {' | '.join(cells)} |")
    memory = [each["ours"]["peak"] / each["peft"]["peak"] for each in rounds]
    speed = [each["peft"]["processor"] / each["ours"]["processor"] for each in rounds]
    print(f"\nPeak, ours / PEFT: {spread(memory)}. Tokens per processor second, ours / PEFT: {spread(speed)}.")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
