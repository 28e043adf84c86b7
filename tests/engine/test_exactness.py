"""An update is the same however it is divided over micro-batches and processes."""

import math

import edits
import launch
import pytest

STEPS = 5
RAGGED = ("--no-pack", "--document-separator", "\n\n")  # paragraphs: of one line to several windows
DIVISIONS = {  # micro-batch size, processes
    "1 x 64": (64, 1),
    "4 x 16": (16, 1),
    "2 processes x 2 x 16": (16, 2),
}
# AdamW divides by the size of the gradient: where that is rounding noise, float32 parameters differ by noise x rate. So
# parameters are compared in float32 with SGD (an edited script) and in float64 with AdamW.
VARIANTS = {"float32 AdamW": (1e-6, 0.001), "float32 SGD": (1e-6, 0.1), "float64 AdamW": (1e-12, 0.001)}  # bound, rate
SGD = "torch.optim.SGD(optimizers.parameter_groups(trunk, settings.weight_decay), lr=settings.lr, momentum=0.9)"


@pytest.fixture(scope="module", params=VARIANTS)
def divided(request, shared, altered, tmp_path_factory):
    """Five updates on ragged documents (no packing) for each division: (variant, its script, {division: folder})."""
    dtype, optimizer = request.param.split()
    script = altered("train_shared.py", edits.OPTIMIZER, SGD) if optimizer == "SGD" else "train_shared.py"
    folders = {}
    for name, (micro, processes) in DIVISIONS.items():
        folders[name] = tmp_path_factory.mktemp("division")
        more = (*RAGGED, "--steps", STEPS, "--micro-batch-size", micro, "--dtype", dtype)
        shared(folders[name], *more, "--lr", VARIANTS[request.param][1], script=script, processes=processes)
    return request.param, script, folders


def test_parameters_do_not_depend_on_the_division(divided):
    variant, _, folders = divided
    if variant == "float32 AdamW":
        return  # see VARIANTS
    whole = launch.weights(folders["1 x 64"], STEPS)
    for name, folder in folders.items():
        assert launch.difference(whole, launch.weights(folder, STEPS)) <= VARIANTS[variant][0], name


def test_gradients_do_not_depend_on_the_division(divided):
    variant, _, folders = divided
    bound, moment = VARIANTS[variant][0], "momentum_buffer" if "SGD" in variant else "exp_avg"
    whole = launch.optimizer_state(folders["1 x 64"], STEPS)["state"]
    for name, folder in folders.items():
        other = launch.optimizer_state(folder, STEPS)["state"]
        for index, state in whole.items():  # the first moment: a linear sum of all five gradients, after clipping
            assert (state[moment] - other[index][moment]).abs().max().item() <= bound, (name, index)
        for row, reference in zip(launch.rows(folder), launch.rows(folders["1 x 64"]), strict=True):
            assert row["train/grad_norm"] == pytest.approx(reference["train/grad_norm"], rel=10 * bound)
            assert row["train/loss"] == pytest.approx(reference["train/loss"], rel=10 * bound)
            assert row["train/tokens"] == reference["train/tokens"]


def test_updates_have_different_numbers_of_scored_tokens(divided):
    """Otherwise the tests above could not fail."""
    _, _, folders = divided
    tokens = [row["train/tokens"] for row in launch.rows(folders["1 x 64"])]
    taken = [later - earlier for earlier, later in zip([0, *tokens], tokens, strict=False)]
    assert len(set(taken)) == STEPS and max(taken) < 0.95 * 64 * 64


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (edits.BACKWARD, edits.scaled_by("(1 / sums[-1].tokens.clamp(min=1))")),  # the mean of means
        (edits.SCALE, edits.SCALE.replace("processes * ", "")),  # as if DDP did not average
    ],
    ids=["mean of means", "no P"],
)
def test_common_wrong_scales_fail(old, new, divided, shared, altered, tmp_path):
    """The scales of many training scripts do not pass the tests above."""
    variant, script, folders = divided
    if variant != "float32 SGD":
        return
    wrong = altered(script, old, new)
    more = (*RAGGED, "--steps", STEPS, "--micro-batch-size", 16, "--lr", VARIANTS[variant][1])
    shared(tmp_path / "out", *more, script=wrong, processes=2)
    gap = launch.difference(launch.weights(folders["1 x 64"], STEPS), launch.weights(tmp_path / "out", STEPS))
    assert gap > 100 * VARIANTS[variant][0]


def test_mixture_of_experts_does_not_depend_on_the_division(shared, tmp_path):
    """Nor do balance and z loss: f is that of the update before, over all of its tokens."""
    more = (
        *RAGGED,
        "--steps",
        STEPS,
        "--num-experts",
        4,
        "--router-aux-loss-coef",
        1.0,
        "--lr",
        0.001,
        "--dtype",
        "float64",
    )
    for name, (micro, processes) in DIVISIONS.items():
        shared(tmp_path / name, *more, "--micro-batch-size", micro, processes=processes)
    whole = launch.weights(tmp_path / "1 x 64", STEPS)
    for name in DIVISIONS:
        assert launch.difference(whole, launch.weights(tmp_path / name, STEPS)) <= 1e-12, name
        for row, reference in zip(launch.rows(tmp_path / name), launch.rows(tmp_path / "1 x 64"), strict=True):
            for key in ("train/balance_loss", "train/z_loss"):
                assert row[key] == pytest.approx(reference[key], rel=1e-11)
                assert row[key] > 0


def test_first_loss_is_that_of_a_uniform_guess(divided):
    _, _, folders = divided
    first = launch.rows(folders["1 x 64"])[0]["train/loss"]
    assert first == pytest.approx(math.log(258), rel=0.02)


def test_rate_is_the_closed_form(divided):
    """At every update, for 1 and 2 processes and any accumulation: 5 updates, 2 of them warm-up, the end at 6."""
    variant, _, folders = divided
    expected = [
        VARIANTS[variant][1] * f for f in (0.5, 1.0, *(0.5 * (1 + math.cos(math.pi * (n - 2) / 4)) for n in (3, 4, 5)))
    ]
    for folder in folders.values():
        assert [row["train/lr"] for row in launch.rows(folder)] == pytest.approx(expected, rel=1e-12)
        for group in launch.optimizer_state(folder, STEPS)["param_groups"]:
            assert group["lr"] == pytest.approx(expected[-1], rel=1e-12)


def test_optimizer_steps_are_the_updates_asked_for(divided):
    variant, _, folders = divided
    if "SGD" in variant:
        return  # keeps no count
    for folder in folders.values():
        state = launch.optimizer_state(folder, STEPS)["state"]
        assert {int(entry["step"]) for entry in state.values()} == {STEPS}
