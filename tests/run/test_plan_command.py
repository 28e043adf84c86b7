"""forge_common.plan: what it counts without memory is what a real run holds, and what it prints follows from it."""

import re

import edits
import launch
import pytest

from forge_common import plan
from forge_common.data.tokenizer import byte_tokenizer

SIZES = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 8}
SIZES |= {"num_key_value_heads": 4, "sequence_length": 128, "micro_batch_size": 2}
COUNT = "    ledger = __import__('forge_common.run.ledger').run.ledger.Ledger().__enter__()\n"
COUNT += "    any(map(ledger.add, trunk.parameters()))\n"
PRINT = "        print(f'PEAK {step} {ledger.peak} ', flush=True)\n"


def flags(values: dict) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def counted_run(shared, altered, tmp_path_factory):
    """counted_run(engine, batch_size) -> peak bytes of the live tensors of rank 0 in the third update of a real run."""
    script = altered("train_shared.py", edits.BEGIN_TRAINING, COUNT + edits.BEGIN_TRAINING)
    script = altered(script, edits.AFTER_UPDATE, edits.AFTER_UPDATE + PRINT)

    def call(engine: str, batch_size: int) -> int:
        how = {"processes": 1 if engine == "one" else 2, "ACCELERATE_MIXED_PRECISION": "bf16"}
        if engine == "fsdp2":
            how |= launch.fsdp2()
        more = ("--preset", "tiny", "--tokenizer", "bytes", *flags(SIZES | {"batch_size": batch_size}), "--steps", 3)
        more += ("--warmup-steps", 0, "--val-fraction", 0, "--dry-run")
        printed = shared(tmp_path_factory.mktemp("run") / "run", *more, script=script, shape=(), **how)
        return max(int(peak) for peak in re.findall(r"PEAK 3 (\d+) ", printed))

    return call


@pytest.mark.parametrize(("engine", "batch_size"), [("one", 2), ("ddp", 4), ("fsdp2", 4), ("fsdp2", 8)])
def test_the_peak_of_live_tensors_is_that_of_a_real_run(engine, batch_size, counted_run):
    devices = 1 if engine == "one" else 2
    tokens = byte_tokenizer().vocab_size
    settings = plan.Settings(
        devices=f"{devices}xH100", engine=engine, preset="tiny", vocab_size=tokens, batch_size=batch_size, **SIZES
    )
    counted = plan.count(plan.config_of(settings), settings, devices, on_gpu=False)
    found, expected = counted_run(engine, batch_size), sum(counted.memory.values())
    print(
        f"{engine} {batch_size}: {found / 2**20:.1f} MiB in the run, {expected / 2**20:.1f} MiB counted without memory"
    )
    assert found == pytest.approx(expected, rel=0.1)
