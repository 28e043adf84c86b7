"""Memory and speed of the device: peak memory, and the peak FLOP/s that MFU refers to."""

import resource
import sys
import time

import torch

# Dense peak of the matrix units in 16 bits, FLOP/s, from the manufacturers' data sheets.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "4090": 165e12,
    "V100": 125e12,
}
TIMED_SECONDS = 0.03  # for a product of one size


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory in MiB: of the device's allocator, or on a CPU of the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**20
    return process_peak_mb()


def process_peak_mb() -> float:
    """Peak of the process's resident set in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def compute_dtype(mixed_precision: str, dtype: str) -> torch.dtype:
    """The type in which matrices are multiplied: that of --mixed_precision, else --dtype."""
    low: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return low[mixed_precision] if mixed_precision in low else getattr(torch, dtype)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that MFU refers to: the data sheet's for known GPUs in 16 bits, else of the fastest square matrix product in `dtype`.

    On a CPU small products can be the fastest, since they fit into its cache.
    """
    if device.type == "cuda" and dtype.itemsize == 2:
        name = torch.cuda.get_device_name(device)
        for part, flops in PEAK_FLOPS.items():
            if part in name:
                return flops
    best = 0.0
    for side in (256, 512, 1024, 2048) if device.type == "cpu" else (2048, 4096, 8192):
        matrix = torch.ones(side, side, device=device, dtype=dtype)
        times: list[float] = []
        while len(times) < 3 or sum(times) < TIMED_SECONDS:  # the first ones start threads and raise the clock rate
            start = time.perf_counter()
            (matrix @ matrix)[0, 0].item()
            times.append(time.perf_counter() - start)
        best = max(best, 2 * side**3 / min(times))
        if side > 256 and 8 * min(times) > 0.1:  # what the next size takes: every run waits for this before its first update
            break
    return best
