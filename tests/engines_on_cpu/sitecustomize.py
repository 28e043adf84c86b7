"""FSDP2 and DeepSpeed on CPU processes, in a world of gloo. For processes with this folder on PYTHONPATH and
ENGINES_ON_CPU=1.

accelerate makes both engines only of a distributed type of accelerators (MULTI_GPU), and asks CUDA for its backend. With
ACCELERATE_TORCH_DEVICE=cpu, and without ACCELERATE_USE_CPU, this one answer is all that has to be replaced: the rest is
accelerate's, torch's and DeepSpeed's own code. launch.ENGINES_ON_CPU has these variables; a fork of tests/fork_server.py runs
this file itself.
"""

import os
import runpy

if os.environ.get("ENGINES_ON_CPU") and "LOCAL_RANK" in os.environ:  # a rank, not its launcher
    from accelerate import state

    state.PartialState._prepare_backend = lambda self, *_, **__: ("gloo", state.DistributedType.MULTI_GPU)

    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = (
            False  # its own collectives on CPUs: minutes of compilation
        )

if "SLOW_DISK_SECONDS" in os.environ:  # Python imports the first sitecustomize only
    runpy.run_path(os.path.join(os.path.dirname(__file__), "..", "slow_disk", "sitecustomize.py"))
