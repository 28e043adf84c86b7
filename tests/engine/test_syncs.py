"""How often an update waits for its device, and how many collectives it adds to those of the gradients."""

import re

import edits
import pytest

# On a CPU nothing waits. Counted are the operations that would wait for another device: those that read a value from it
# or copy one to it, and those whose result has a size that depends on values.
COUNTER = """
import torch
from torch.utils._python_dispatch import TorchDispatchMode

READ = ("_local_scalar_dense", "equal.", "nonzero.", "masked_select.", "_unique", "unique_", "bincount.", "repeat_interleave.Tensor")
counts = {"waits": 0, "collectives": 0}


class Counter(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.")
        by_mask = name.startswith(("index.", "index_put", "_index_put")) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        counts["waits"] += bool(by_mask) or name.startswith(READ)
        return func(*args, **(kwargs or {}))


def counted(name, call):
    def calling(*args, **kwargs):
        counts[name] += 1
        return call(*args, **kwargs)

    return calling


def report(step):
    if step == 1:
        torch.Tensor.tolist = counted("waits", torch.Tensor.tolist)
        torch.tensor = counted("waits", torch.tensor)  # a copy from the host
        torch.distributed.all_reduce = counted("collectives", torch.distributed.all_reduce)
        Counter().__enter__()
    else:
        print(f"update {step}: {counts['waits']} waits, {counts['collectives']} collectives", flush=True)
    counts.update(waits=0, collectives=0)
"""


@pytest.mark.parametrize(("experts", "waits"), [(0, 1), (4, 1 + 2 * 2)], ids=["dense", "experts"])
def test_an_update_waits_once_and_once_a_layer_with_experts(experts, waits, shared, altered, tmp_path):
    """From the end of one update to that of the next, on each of two ranks: two layers, two micro-batches."""
    script = altered(
        "train_shared.py", edits.AFTER_UPDATE, f"{edits.AFTER_UPDATE}        __import__('counter').report(step)\n"
    )
    (script.parent / "counter.py").write_text(COUNTER)
    more = ("--steps", 4, "--val-every", 0, "--save-every", 0, "--log-every", 100, "--num-experts", experts)
    printed = shared(tmp_path / "run", *more, script=script, processes=2)
    found = re.findall(r"update (\d): (\d+) waits, (\d+) collectives", printed)
    assert sorted(found) == [(str(step), str(waits), "1") for step in (2, 3, 4) for _ in range(2)]
