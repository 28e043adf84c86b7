"""Memory and speed of the device: peak memory, the peak FLOP/s that MFU refers to, and what data sheets say."""

import math
import resource
import sys
import time
from typing import NamedTuple

import torch


class Device(NamedTuple):
    """What the manufacturer's data sheet says. Links: in one direction."""

    flops: float  # dense peak of the matrix units in 16 bits, FLOP/s
    memory: float  # GB
    memory_rate: float  # GB/s
    within: float  # GB/s from a device to the others of its machine
    between: float  # GB/s from a machine of 8 devices to the other machines; 0: its network is the buyer's choice


# Sources: NVIDIA's data sheets of each name (SXM modules for H200, H100, A100, V100); between machines DGX H200 and
# H100 (8 ConnectX-7 of 400 Gb/s), DGX A100 (8 ConnectX-6 of 200 Gb/s), DGX-1 V100 (4 of 100 Gb/s). Within: half of
# NVLink's or PCIe's total.
DEVICES = {
    "H200": Device(989e12, 141, 4800, 450, 400),
    "H100": Device(989e12, 80, 3350, 450, 400),
    "A100": Device(312e12, 80, 2039, 300, 200),
    "L40S": Device(362e12, 48, 864, 32, 0),
    "L40": Device(181e12, 48, 864, 32, 0),
    "L4": Device(121e12, 24, 300, 32, 0),
    "4090": Device(165e12, 24, 1008, 32, 0),
    "V100": Device(125e12, 32, 900, 150, 50),
}
TIMED_SECONDS = 0.03  # for a product of one size


def seconds_on_links(name: str, size: float, devices: int, machine_size: int, within: float, between: float) -> float:
    """Time of a ring over `devices` for a collective whose whole tensor has `size` bytes, without latency.

    Each device sends all but its own part; each machine sends what is not of its own devices. within, between: GB/s.
    """
    machines = math.ceil(devices / machine_size)
    seconds = size * (1 - 1 / devices) / within
    if machines > 1:
        seconds = max(seconds, size * (1 - 1 / machines) / between)
    return seconds * (2 if name == "all-reduce" else 1) / 1e9


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
    """FLOP/s that MFU refers to: the data sheet's for known GPUs in 16 bits, else of the fastest square matrix product
    in `dtype`.

    On a CPU small products can be the fastest, since they fit into its cache.
    """
    if device.type == "cuda" and dtype.itemsize == 2:
        name = torch.cuda.get_device_name(device)
        for part, known in DEVICES.items():
            if part in name:
                return known.flops
    best = 0.0
    for side in (256, 512, 1024, 2048) if device.type == "cpu" else (2048, 4096, 8192):
        matrix = torch.ones(side, side, device=device, dtype=dtype)
        times: list[float] = []
        while len(times) < 3 or sum(times) < TIMED_SECONDS:  # the first ones start threads and raise the clock rate
            start = time.perf_counter()
            (matrix @ matrix)[0, 0].item()
            times.append(time.perf_counter() - start)
        best = max(best, 2 * side**3 / min(times))
        # Every run waits for this before its first update: what the next size takes may be too much.
        if side > 256 and 8 * min(times) > 0.1:
            break
    return best
