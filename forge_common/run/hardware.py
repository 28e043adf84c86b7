"""Memory and speed of the device: peak memory, and the peak FLOP/s that MFU refers to."""

import math
import resource
import sys
import time

import torch

# Dense peak of the matrix units in bfloat16, FLOP/s, from the manufacturers' data sheets.
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


def peak_flops(device: torch.device) -> float:
    """FLOP/s that MFU refers to: the data sheet's for known GPUs, else the speed of a large float32 matrix product."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, flops in PEAK_FLOPS.items():
            if part in name:
                return flops
    side = 1024 if device.type == "cpu" else 4096
    matrix = torch.ones(side, side, device=device)
    best = math.inf
    for _ in range(12):  # the fastest of 12: the first ones start threads and raise the clock rate
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best
