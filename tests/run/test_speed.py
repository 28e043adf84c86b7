"""The speed that is reported: MFU, and the time that a dry run estimates."""

import dataclasses
import json
import types

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import TorchDynamoPlugin

from forge_common.loss import Sums
from forge_common.model.config import ModelConfig
from forge_common.model.trunk import Trunk
from forge_common.optimizers import layer_matrices
from forge_common.run import hardware
from forge_common.run.log import Interval, RunLog
from forge_common.run.plan import LATER, PROCESS, free_in_pieces, memory, of_process
from forge_common.run.progress import Progress
from forge_common.settings import HUGE_PAGES

CPU = torch.device("cpu")
CONFIG = ModelConfig(
    vocab_size=258,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    eos_token_id=1,
    pad_token_id=0,
)


def settings(folder, **changes):
    fixed = {"output_dir": folder, "dry_run": False, "patience": 0, "sequence_length": 32, "dtype": "float32"}
    fixed |= {"sample_prompt": (), "log_every": 10, "steps": 6}
    return types.SimpleNamespace(**fixed | changes)


@pytest.mark.parametrize(
    ("updates", "line"),
    [
        ([7, 5, 1, 1, 1, 3], "1.500 s an update (4 timed), 200 tok/s, mfu 0%, about 25m00s for 1,000"),
        ([9, 5, 2], "2.000 s an update (1 timed), 150 tok/s, mfu 0%, about 33m20s for 1,000"),
        ([9, 5], "5.000 s an update (1 timed), 60 tok/s, mfu 0%, about 1h23m for 1,000"),
        ([9], "9.000 s an update (1 timed), 33 tok/s, mfu 0%, about 2h30m for 1,000"),
        ([100, 10, 1, 1], "100.000 s an update (1 timed), 3 tok/s, mfu 0%, about 27h46m for 1,000"),
        ([9, 15, 1, 1], "15.000 s an update (1 timed), 20 tok/s, mfu 0%, about 4h10m for 1,000"),
        ([9, 5, 7, 1], "7.000 s an update (1 timed), 43 tok/s, mfu 0%, about 1h56m for 1,000"),
    ],
)
def test_a_dry_run_leaves_out_its_first_two_updates(updates, line, clock, tmp_path, capsys):
    """They allocate memory and compile. Where there are fewer updates, or 20 seconds are over, the last one is timed."""
    assert line in dry_run(updates, "NO", clock, tmp_path, capsys)


@pytest.mark.parametrize(
    ("updates", "line"),
    [
        ([75, 2, 1, 3], "2.000 s an update (2 timed), 150 tok/s"),
        ([75, 60, 1, 1], "60.000 s an update (1 timed), 5 tok/s"),
        ([9, 5, 1, 3], "2.000 s an update (2 timed), 150 tok/s"),
        ([75], "75.000 s an update (1 timed), 4 tok/s"),
    ],
)
def test_a_dry_run_does_not_time_the_compiler(updates, line, clock, tmp_path, capsys):
    """With torch.compile the first update is timed only where there is no other."""
    assert line in dry_run(updates, "INDUCTOR", clock, tmp_path, capsys)


def dry_run(updates, backend, clock, folder, capsys):
    """What a dry run prints whose updates take these seconds. backend: of torch.compile."""
    state = types.SimpleNamespace(dynamo_plugin=TorchDynamoPlugin(backend=backend))
    main = types.SimpleNamespace(is_main_process=True, device=CPU, num_processes=1, state=state)
    progress = Progress("run", {}, {})
    log = RunLog(main, settings(folder, dry_run=True), progress, len(updates))
    log.restart_clock(0)
    for step, seconds in enumerate(updates, 1):
        clock[0] += seconds
        progress.global_step, progress.tokens = step, 300 * step
        if log.end_warm_up(progress) == step:
            break
    log.dry_run_result(progress, 1000)
    return capsys.readouterr().out


def test_mfu_is_at_most_one_where_the_peak_was_measured_on_a_busy_machine(tmp_path):
    """The peak is measured again, and the training itself is a measurement of what the machine reaches."""
    accelerator, trunk, progress = Accelerator(cpu=True), Trunk(CONFIG), Progress("run", {}, {})
    log = RunLog(accelerator, settings(tmp_path), progress, 2, trunk=trunk)
    interval = Interval(accelerator, [])
    for step, peak in ((1, 1.0), (2, log.peak_flops)):
        log.peak_flops = peak
        log.restart_clock(progress.global_step)
        interval.add([trunk(torch.randint(2, 258, (8, 33)))])
        progress.global_step, progress.tokens = step, 256 * step
        log.training(interval, progress, rate=0.1, grad_norm=1.0)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < row["train/mfu"] <= 1 for row in rows) and log.peak_flops > 1e6
    for row in rows[1:]:
        reached = row["train/tokens_per_second"] * trunk.flops_per_token(32)
        assert row["train/mfu"] == pytest.approx(reached / log.peak_flops)


def test_the_speed_after_a_resume_is_of_what_was_trained_since(clock, tmp_path):
    """The loss of the first row is the mean over its whole interval, which began before the resume."""
    accelerator, progress = Accelerator(cpu=True), Progress("run", {}, {}, global_step=8, tokens=800)
    log = RunLog(accelerator, settings(tmp_path), progress, 10)
    interval = Interval(accelerator, [800 * 5.0, 800.0, 0.0, 0.0])
    log.restart_clock(8)
    clock[0] += 4
    interval.add([Sums(*map(torch.tensor, (0.0, 200 * 4.0, 200.0, 0.0, 0.0, 0.0)))])
    progress.global_step, progress.tokens = 10, 1000
    log.training(interval, progress, rate=0.1, grad_norm=1.0)
    (row,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert row["train/loss"] == pytest.approx(4.8) and row["train/tokens_per_second"] == pytest.approx(50)


def test_the_peak_is_that_of_the_type_that_is_multiplied():
    assert hardware.compute_dtype("no", "float32") is torch.float32
    assert hardware.compute_dtype("no", "float64") is torch.float64
    assert hardware.compute_dtype("bf16", "float32") is torch.bfloat16
    assert hardware.compute_dtype("fp16", "float32") is torch.float16
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert 1e6 < hardware.peak_flops(CPU, dtype) < 1e16


def test_the_plan_counts_what_is_stored_and_what_is_kept(tmp_path):
    """A frozen trunk in bf16, activations that are computed again, and the mask of documents."""
    at_once = {"micro_batch_size": 2, "sequence_length": 32, "activation_checkpointing": False}
    trunk = Trunk(CONFIG)
    parameters = sum(parameter.numel() for parameter in trunk.parameters())
    states, activations, _ = memory(trunk, settings(tmp_path, **at_once))
    assert states == 16 * parameters
    within = Trunk(dataclasses.replace(CONFIG, cross_document_attention=False))
    assert memory(within, settings(tmp_path, **at_once))[1] - activations == 4 * 2 * 32 * 32  # one for all layers
    again = memory(trunk, settings(tmp_path, **at_once | {"activation_checkpointing": True}))[1]
    inputs = 4 * 2 * 32 * CONFIG.hidden_size * CONFIG.num_hidden_layers
    assert inputs < again < activations
    frozen = trunk.to(torch.bfloat16).requires_grad_(False)
    assert memory(frozen, settings(tmp_path, **at_once))[0] == 2 * parameters


def test_the_plan_counts_one_moment_of_a_matrix_that_muon_updates(tmp_path):
    trunk = Trunk(CONFIG)
    at_once = {"micro_batch_size": 1, "sequence_length": 32, "activation_checkpointing": False}
    matrices = layer_matrices(trunk)
    adamw, muon = (sum(memory(trunk, settings(tmp_path, **at_once), by_muon=p)[:2]) for p in ((), matrices))
    assert adamw - muon == 4 * sum(
        p.numel() for name, p in trunk.named_parameters() if ".layers." in name and p.ndim == 2
    )


def test_the_plan_counts_what_a_process_holds_beside_the_update(tmp_path):
    """The text that is mapped, a copy of what is trained while a checkpoint is written, and gaps, not of large tensors."""
    trunk, tokens = Trunk(CONFIG), types.SimpleNamespace(tokens=types.SimpleNamespace(nbytes=10 << 20))
    source = types.SimpleNamespace(tokens=tokens)
    corpora = types.SimpleNamespace(training=types.SimpleNamespace(sources=[source]), held_out=[])
    fixed = {"micro_batch_size": 2, "sequence_length": 32, "activation_checkpointing": False}
    fixed |= {"batch_size": 2, "save_every": 0, "val_every": 5, "on_full_disk": "continue"}

    def parts(**changes) -> dict[str, int]:
        return of_process(trunk, settings(tmp_path, **fixed | changes), corpora)

    few = parts()
    assert few["Python and libraries"] >= PROCESS and few["text"] == 6 * 2 * (64 << 10)
    assert parts(steps=10**6)["text"] == 10 << 20
    copy = 3 * 4 * sum(parameter.numel() for parameter in trunk.parameters())
    assert few["copy for a checkpoint"] == 0  # the last one needs none
    assert parts(save_every=2)["copy for a checkpoint"] == copy
    assert parts(save_every=2, on_full_disk="stop")["copy for a checkpoint"] == 0
    # Two layers: four tensors of the width, queries and keys twice.
    assert few["free in pieces"] == 4 * 64 * 2 * (4 * 32 + 2 * (32 + 16))
    assert parts(micro_batch_size=1 << 18)["free in pieces"] == 0


def test_the_plan_counts_what_tokenizing_has_left(tmp_path):
    """In a first run more is resident before training than Python and the libraries."""
    trunk = Trunk(CONFIG)
    corpora = types.SimpleNamespace(training=types.SimpleNamespace(sources=[]), held_out=[])
    chosen = {
        "micro_batch_size": 2,
        "activation_checkpointing": False,
        "batch_size": 2,
        "save_every": 0,
        "val_every": 0,
    }
    chosen |= {"on_full_disk": "continue"}
    plain, after_a_start, after_tokenizing = (
        of_process(trunk, settings(tmp_path, **chosen), corpora, resident=resident)["Python and libraries"]
        for resident in (0, PROCESS // 2, 2 * PROCESS)
    )
    assert after_a_start == plain and after_tokenizing == 2 * PROCESS + LATER


def test_a_gap_is_at_most_a_large_page(tmp_path, monkeypatch):
    """A freed tensor that begins at a page leaves room for one of its size, if there is a page beside it."""
    trunk = Trunk(CONFIG)
    chosen = settings(tmp_path, micro_batch_size=1 << 10, sequence_length=32, activation_checkpointing=False)
    page, wide = 2 << 20, 4 << 20  # bytes
    assert free_in_pieces(trunk, chosen) == 2 * (2 * wide + 2 * wide + 2 * (wide + wide // 2))
    monkeypatch.setenv(*HUGE_PAGES)
    assert free_in_pieces(trunk, chosen) == 2 * (3 * page + (page + 2 * page) + (page + 2 * (page // 2)))
    chosen.activation_checkpointing = True
    assert free_in_pieces(trunk, chosen) == 2 * (4 * wide + 2 * (wide + wide // 2))
