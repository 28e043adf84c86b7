"""Reads and validates safetensors files, and computes the digests of their tensors. Pickles are not opened."""

import ctypes
import hashlib
import mmap
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import UserError
from .atomic import read_json
from .places import TRUNK_FILES
from .untrusted import quoted

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
OTHERS = {
    "assembled.json": "an assembled model",
    "module.json": "a module",
    "adapter_config.json": "an adapter of PEFT",
}
HEADER_BYTES = 4 << 20  # at most; enough for the names and shapes of about 30,000 tensors
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
Tensors = dict[str, torch.Tensor]


def dtype_name(dtype: torch.dtype) -> str:
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def digest(tensors: Tensors) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, sorted by name; it does not depend on the file's layout."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {dtype_name(tensor.dtype)} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def digests(tensors: Tensors) -> dict[str, str]:
    """The digest of each tensor, which tells which one was damaged."""
    return {name: digest({name: tensor}) for name, tensor in sorted(tensors.items())}


def verify(place: Path, tensors: Tensors, metadata: dict[str, Any], key: str, file_name: str) -> None:
    """Refuses tensors whose digest is not the one in the metadata (of `file_name`, under `key`); names a tensor that differs."""
    actual = digest(tensors)
    expected = metadata.get(key)
    if actual == expected:
        return
    known = metadata.get("tensor_digests", {})
    changed = [name for name, value in digests(tensors).items() if known.get(name, value) != value]
    differing = f" {quoted(changed[0])} differs ({len(changed)} in all)." if changed else ""
    raise UserError(
        f"{place}: the digest is {actual}, but {file_name} says {expected}.{differing} The files were changed or damaged "
        "since they were published. Fetch or export the artifact again."
    )


def read_tensors(path: Path, dtypes: tuple[torch.dtype, ...] = FLOATS) -> Tensors:
    """All tensors of a safetensors file. UserError for a malformed file, another dtype, NaN or Inf."""
    _check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, TypeError, ValueError, RuntimeError) as reason:
        first_line = (str(reason).splitlines() or [""])[0]
        raise UserError(f"{path} cannot be read as safetensors ({first_line}). Fetch or export it again.") from None
    for name, tensor in tensors.items():
        if not name.isprintable() or len(name) > 256:
            raise UserError(f"{path}: a tensor is called {quoted(name)}. Do not use this artifact.")
        if tensor.dtype not in dtypes:
            allowed = ", ".join(map(dtype_name, dtypes))
            raise UserError(
                f"{path}: {name} is of {tensor.dtype}, not of {allowed}. Export the model with one of these."
            )
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise UserError(f"{path}: {name} holds NaN or Inf. Use an artifact of a run that did not diverge.")
    return tensors


def drop_pages(tensors: Tensors) -> None:
    """Takes the files of tensors that were only read out of this process's memory: what is used later is read again,
    from the same map.

    On Linux; elsewhere the pages stay until the system needs the memory.
    """
    if sys.platform != "linux":
        return
    places = [tensor.data_ptr() for tensor in tensors.values()]
    madvise = ctypes.CDLL(None).madvise
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        addresses, _, _, _, inode = line.split()[:5]
        start, end = (int(address, 16) for address in addresses.split("-"))
        if inode != "0" and any(start <= place < end for place in places):  # a map of a file
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are finite as float32, the type of the computation. Makes no second tensor of its size."""
    return not tensor.numel() or all(torch.isfinite(value.to(torch.float32)) for value in tensor.aminmax())


def _check_header(path: Path) -> None:
    """Refuses a file that is not regular, and a header of an impossible size, before the file is opened as safetensors."""
    if not path.is_file():
        raise UserError(f"{path} is missing or not a regular file. Fetch or export it again.")
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
    except OSError as reason:
        raise UserError(f"{path} cannot be read ({reason.strerror}). Fetch or export it again.") from None
    header_bytes = int.from_bytes(start, "little")
    if len(start) < 8 or not 2 <= header_bytes <= min(HEADER_BYTES, size - 8):
        pickled = start.startswith(b"PK\x03\x04") or (start[:1] == b"\x80" and start[1:2] <= b"\x05")
        problem = "it looks like a pickle, which is not opened" if pickled else f"its header is of {header_bytes} bytes"
        raise UserError(f"{path} is not a valid safetensors file: {problem}. Export the model with safetensors.")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a trunk: those that its index names, all in the folder, or model.safetensors."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
            raise UserError(f"{index}: weight_map does not map tensors to files. Fetch it again.")
        names = sorted(set(files.values()))
        outside = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
        if outside:
            raise UserError(
                f"{folder}: the index names {quoted(outside[0])}, which is not a safetensors file of the folder. "
                "Do not use this artifact."
            )
        return [folder / name for name in names]
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    for name, kind in OTHERS.items():
        if (folder / name).exists():
            trunk = f"Its trunk is {folder / 'trunk'}" if name == "assembled.json" else "Name the folder of its trunk"
            raise UserError(f"{folder} is {kind}, not a trunk. {trunk}.")
    if (folder / "settings.json").exists():
        raise UserError(
            f"{folder} is the folder of a run that has published no trunk. Let its training end, or name a trunk."
        )
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if not pickles and not (folder / "config.json").exists():
        raise UserError(
            f"{folder} has no config.json and no model.safetensors, so it is no trunk. Name the folder of a trunk."
        )
    hint = f"; {pickles[0]} is a pickle and is not opened" if pickles else ""
    raise UserError(f"{folder} has no model.safetensors{hint}. Export the model with safetensors.")


def trunk_files(folder: Path) -> tuple[str, ...]:
    """The names of the files that a trunk may consist of; weight files that are there, the others may be."""
    return (*TRUNK_FILES, "model.safetensors.index.json", *(path.name for path in weight_files(folder)))


def give_back_memory() -> None:
    """Returns freed memory to the system. glibc keeps it, and each thread of the tokenizer has a heap of its own, from
    which nothing else is allocated. Nothing is done on other systems, and with another C library.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(ctypes.c_size_t(0))
