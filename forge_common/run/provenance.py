"""What a run was made with: versions, device, processes, commit. For the tracker."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


def provenance(accelerator: Any) -> dict[str, str | int | bool]:
    """Facts by name. git_commit is "unknown" where the code is in no repository, or git is missing or does not answer
    in 5 s.
    """
    device = accelerator.device
    facts: dict[str, str | int | bool] = {
        "version_python": platform.python_version(),
        **{f"version_{package}": version(package) for package in ("torch", "accelerate", "tokenizers", "datasets")},
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} {platform.machine()}",
        "processes": accelerator.num_processes,
        "engine": accelerator.distributed_type.value,
        "mixed_precision": accelerator.mixed_precision,
        "git_commit": "unknown",
    }
    try:
        facts["git_commit"] = _git("rev-parse", "HEAD")
        facts["git_dirty"] = bool(_git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        pass
    return facts


def _git(*arguments: str) -> str:
    line = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(line, check=True, capture_output=True, text=True, timeout=5).stdout.strip()
