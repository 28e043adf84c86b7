"""Tensors in safetensors files: read with every doubt, and known again by their digests. No pickle is opened."""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..errors import UserError
from .atomic import read_json
from .untrusted import shown

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
HEADER_BYTES = 4 << 20  # names and shapes of some 30,000 tensors
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
Tensors = dict[str, torch.Tensor]


def digest(tensors: Tensors) -> str:
    """SHA-256 over names, dtypes, shapes and bytes in the order of the names; a file's layout plays no part."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}\n".encode())
        total.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return total.hexdigest()


def digests(tensors: Tensors) -> dict[str, str]:
    """The digest of each tensor alone: what names the one that was damaged."""
    return {name: digest({name: tensor}) for name, tensor in sorted(tensors.items())}


def verify(place: Path, tensors: Tensors, stated: str, each: dict[str, str], passport: str) -> None:
    """Refuses tensors whose digest is not the one that the passport states, and names those that `each` knows otherwise."""
    own = digest(tensors)
    if own == stated:
        return
    changed = sorted(name for name, found in digests(tensors).items() if each.get(name, found) != found)
    named = f" It is {shown(changed[0])} that differs ({len(changed)} in all)." if changed else ""
    raise UserError(
        f"{place}: the digest is {own}, but {passport} says {stated}.{named} The files were changed or damaged since they "
        "were published: fetch or export the artifact again."
    )


def read_tensors(path: Path, dtypes: tuple[torch.dtype, ...] = FLOATS) -> Tensors:
    """All tensors of a safetensors file; a malformed file, another dtype, NaN or Inf is refused, and the tensor named."""
    _check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, TypeError, ValueError, RuntimeError) as reason:
        first = (str(reason).splitlines() or [""])[0]
        raise UserError(f"{path} cannot be read as safetensors ({first}). Fetch or export it again.") from None
    for name, tensor in tensors.items():
        if not name.isprintable() or len(name) > 256:
            raise UserError(f"{path}: a tensor is called {shown(name)}. Do not use this artifact.")
        if tensor.dtype not in dtypes:
            kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise UserError(f"{path}: {name} is of {tensor.dtype}, not of {kinds}. Export the model with one of these.")
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise UserError(f"{path}: {name} holds NaN or Inf. Use an artifact of a run that did not diverge.")
    return tensors


def _is_finite(tensor: torch.Tensor) -> bool:
    """As float32, in which it will be computed; without a second tensor of its size."""
    return not tensor.numel() or all(torch.isfinite(end.to(torch.float32)) for end in tensor.aminmax())


def _check_header(path: Path) -> None:
    """Refuses what is not a regular file, and a header that no artifact needs, before either is opened as safetensors."""
    if not path.is_file():
        raise UserError(f"{path} is missing or no regular file. Fetch or export it again.")
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
    except OSError as reason:
        raise UserError(f"{path} cannot be read ({reason.strerror}). Fetch or export it again.") from None
    claimed = int.from_bytes(start, "little")
    if len(start) < 8 or not 2 <= claimed <= min(HEADER_BYTES, size - 8):
        pickled = start.startswith(b"PK\x03\x04") or (start[:1] == b"\x80" and start[1:2] <= b"\x05")
        told = "it looks like a pickle, which is not opened" if pickled else f"a header of {claimed} bytes"
        raise UserError(f"{path} is no safetensors file that is read here: {told}. Export the model with safetensors.")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a trunk, those that an index names included; none lies outside of the folder."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        parts = read_json(index).get("weight_map")
        if not isinstance(parts, dict) or not parts or not all(isinstance(name, str) for name in parts.values()):
            raise UserError(f"{index}: weight_map does not say which file holds which tensor. Fetch it again.")
        names = sorted(set(parts.values()))
        outside = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
        if outside:
            raise UserError(
                f"{folder}: the index names {shown(outside[0])}, no safetensors file of the folder. "
                "Do not use this artifact."
            )
        return [folder / name for name in names]
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    hint = f"; {pickles[0]} is a pickle and is not opened" if pickles else ""
    raise UserError(f"{folder} holds no model.safetensors{hint}. Export the model with safetensors.")
