"""forge_common.plan: what it counts without memory is what a real run holds, and what it prints follows from it."""

import dataclasses
import json
import re
from typing import Any

import edits
import launch
import pytest
import torch

from forge_common import plan
from forge_common.data.tokenizer import byte_tokenizer
from forge_common.errors import UserError
from forge_common.optimizers import layer_matrices
from forge_common.run import hardware
from forge_common.run.plan import memory

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
        more += ("--warmup-steps", 0, "--val-fraction", 0)
        printed = shared(tmp_path_factory.mktemp("run") / "run", *more, script=script, shape=(), **how)
        return max(int(peak) for peak in re.findall(r"PEAK 3 (\d+) ", printed))

    return call


LONG = [pytest.param(*case, marks=pytest.mark.engines) for case in (("one", 2), ("ddp", 4), ("fsdp2", 8))]


@pytest.mark.parametrize(("engine", "batch_size"), [*LONG, ("fsdp2", 4)])
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


def settings(**changes) -> plan.Settings:
    fixed = {"devices": "8xH100", "preset": "tiny", "vocab_size": 256, "batch_size": 16, "micro_batch_size": 1}
    return plan.Settings(**fixed | {"sequence_length": 64} | changes)


def counted(chosen: plan.Settings) -> plan.Counted:
    return plan.count(plan.config_of(chosen), chosen, int(chosen.devices.split("x")[0]))


def test_what_fsdp2_sends_follows_from_the_parameters():
    """Gathered in bf16 before the forward and, but for the root's, the backward pass; reduced in float32 after each one."""
    chosen = settings()
    result = counted(chosen)
    with_root = plan.build(plan.config_of(chosen), chosen)
    everything = sum(parameter.numel() for parameter in with_root.parameters())
    layers = sum(parameter.numel() for parameter in with_root.model.layers.parameters())
    assert result.parameters == result.trained == everything and result.own == everything // 8
    first, last = (
        {
            (phase, name): sum(c.size for c in found if c.name == name and c.phase.startswith(phase))
            for phase in ("forward", "backward")
            for name in ("all-gather", "reduce-scatter")
        }
        for found in result.micro_batches
    )
    assert first["forward", "all-gather"] == last["forward", "all-gather"] == 2 * everything
    assert first["backward", "all-gather"] == last["backward", "all-gather"] == 2 * layers
    assert first["backward", "reduce-scatter"] == last["backward", "reduce-scatter"] == 4 * everything


def test_a_module_trains_and_sends_its_own_parameters_only():
    chosen = settings(devices="2xH100", engine="ddp", kind="lora", rank=4, trunk_dtype="bf16", batch_size=2)
    result = counted(chosen)
    [found] = result.micro_batches
    assert result.own == result.trained < 0.1 * result.parameters
    assert sum(c.size for c in found) == 4 * result.trained and {c.name for c in found} == {"all-reduce"}
    norms = 9 * 128
    frozen = result.parameters - result.trained
    assert result.memory["weights"] == 2 * (frozen - norms) + 4 * (norms + result.trained)
    assert result.memory["optimizer"] == pytest.approx(8 * result.trained, rel=0.01)


IN_BF16: dict[str, dict] = {
    "long": {"batch_size": 16, "micro_batch_size": 16},
    "accumulated": {"batch_size": 8, "micro_batch_size": 4},
    "muon": {"optimizer": "muon"},
    "muon, few tokens": {"optimizer": "muon", "sequence_length": 16},
    "a large vocabulary": {"vocab_size": 32_768},
    "checkpointed": {"activation_checkpointing": True},
    "lora": {"kind": "lora"},
    "lora on bf16": {"kind": "lora", "trunk_dtype": "bf16"},
    "ffn": {"kind": "ffn"},
    "narrow": {"kind": "narrow"},
    "expert+head": {"kind": "expert+head"},
}


@pytest.mark.parametrize("on_gpu", [True, False])
@pytest.mark.parametrize("case", IN_BF16)
def test_what_a_run_prints_is_what_is_counted_in_bf16(case, on_gpu):
    """run/plan.py's estimate under autocast, where what matrix products read and return has 16 bits, and the norms 32."""
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8, "num_key_value_heads": 4}
    sizes |= {"vocab_size": 2048, "batch_size": 4, "micro_batch_size": 4, "sequence_length": 128}
    chosen = settings(devices="1xH100", engine="one", **sizes | IN_BF16[case])
    config = plan.config_of(chosen)
    counted = sum(plan.count(config, chosen, 1, on_gpu).memory.values())
    with torch.device("meta"):
        trunk = plan.build(dataclasses.replace(config, cross_document_attention=on_gpu), chosen)
    how: dict[str, Any] = {"compute": torch.bfloat16}
    how |= {"by_muon": layer_matrices(trunk) if chosen.optimizer == "muon" else ()}
    estimated = memory(trunk, chosen, gradients_stay=chosen.batch_size > chosen.micro_batch_size, **how)
    assert sum(estimated) == pytest.approx(counted, rel=0.05)


def test_activation_checkpointing_keeps_less_and_computes_the_forward_pass_again():
    chosen = {"devices": "1xH100", "engine": "one", "batch_size": 1, "sequence_length": 1024, "num_hidden_layers": 8}
    plain, again = settings(**chosen), settings(**chosen, activation_checkpointing=True)
    results = [counted(one) for one in (plain, again)]
    assert results[1].memory["forward last"] < 0.5 * results[0].memory["forward last"]
    device = hardware.DEVICES["H100"]
    seconds = [plan.times(result, one, device, 1)[0] for result, one in zip(results, (plain, again), strict=True)]
    assert seconds[0] == pytest.approx(1024 * results[0].flops[1] / (0.4 * 989e12))
    assert seconds[1] == pytest.approx(seconds[0] * (1 + results[0].flops[0] / results[0].flops[1]))


def test_the_slowest_link_of_a_ring_decides_its_time():
    within = hardware.seconds_on_links("all-gather", 8e9, 8, 8, within=400, between=100)
    assert within == pytest.approx(7 / 400)
    across = hardware.seconds_on_links("reduce-scatter", 8e9, 16, 8, within=400, between=100)
    assert across == pytest.approx(4 / 100)
    assert hardware.seconds_on_links("all-reduce", 8e9, 16, 8, within=400, between=100) == pytest.approx(2 * across)


def test_the_report_says_whether_it_fits_and_that_time_is_computed(capsys):
    chosen = {"devices": "1xH100", "engine": "one", "batch_size": 1}
    plan.main(settings(**chosen))
    plan.main(settings(**chosen, memory_share=1e-4))
    roomy, tight = capsys.readouterr().out.split("model       ")[1:]
    assert " fits; tensors may fill 72.0 of the 80 GB" in roomy and "computed, not measured" in roomy
    assert "does not fit: " in tight and "is the largest part" in tight


def test_a_folder_gives_the_sizes_without_its_weights(tmp_path):
    tiny = plan.config_of(settings())
    (tmp_path / "config.json").write_text(json.dumps(tiny.to_hf()))
    read = plan.config_of(settings(trunk=tmp_path))
    assert (read.hidden_size, read.num_hidden_layers, read.vocab_size) == (128, 4, 256)


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"devices": "H100"}, "--devices H100"),
        ({"batch_size": 12}, "--batch-size 12 does not divide"),
        ({"engine": "one"}, "--engine one with 8"),
        ({"preset": "huge"}, "--preset huge"),
        ({"kind": "adapter"}, "--kind adapter"),
        ({"rank": 0}, "--rank is 0"),
        ({"alpha": 0.0}, "--alpha is 0.0"),
        ({"dropout": 1.0}, "--dropout is 1.0"),
        ({"targets": ()}, "--targets"),
        ({"targets": ("q_proj", "norm")}, "--targets q_proj norm"),
        ({"targets": ("q_proj", "q_proj")}, "--targets q_proj q_proj"),
        ({"mfu": 0.0}, "--mfu is 0.0"),
        ({"hidden_size": 0}, "--hidden-size is 0"),
        ({"trunk_dtype": "bf16"}, "--trunk-dtype bf16"),
    ],
)
def test_a_wrong_flag_is_named(changes, flag):
    [fault] = plan.problems(settings(**changes))
    assert fault.startswith(flag)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices": "8xH999"}, "--devices 8xH999: H999 cannot be planned"),
        ({"devices": "16xL40S"}, "--between"),
        ({"optimizer": "muon"}, "--optimizer muon needs each matrix whole"),
        ({"kind": "lora", "layers": "9"}, "--layers 9"),
        ({"kind": "lora", "rank": 129}, "--rank 129 is more than the 128 that the changed matrices can have"),
        ({"hidden_size": 100, "num_attention_heads": 8}, "--hidden-size 100 must be an even multiple"),
        ({"preset": "llama-3-8b", "sequence_length": 16384}, "--sequence-length 16384 exceeds"),
    ],
)
def test_what_cannot_be_planned_names_its_flag(changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        plan.main(settings(**changes))
