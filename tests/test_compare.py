"""The comparison of recipes: its paired errors, the search of rates, the excerpts; and in `make soak` all of it, in small."""

import dataclasses
import hashlib
import subprocess
import sys

import launch
import pytest
import torch

sys.path.insert(0, str(launch.ROOT / "benchmarks"))

from recipe_baselines import Ensemble, FixedGates, constant_gates, with_router
from recipe_rates import Rates
from recipe_table import Row, difference, report
from recipe_texts import EXCERPT, HOME_PARTS, OTHER_PARTS, excerpt, part_of, without_docstrings
from recipe_trunks import untied, upcycled

from forge_common.model.config import ModelConfig
from forge_common.model.trunk import Trunk
from forge_common.routing.mixture import Mixture, with_module
from forge_common.routing.routers import ContextRouter
from forge_common.routing.statistics import BIGRAM_BUCKETS
from forge_common.routing.tuning import Tuning


def row(model: str, nats: list[float], tokens: list[int], domain: str = "docs", part: str = "test") -> Row:
    return Row("home", model, part, domain, nats, tokens)


def test_a_difference_is_of_ratios_of_sums_and_its_error_is_of_each_documents_difference():
    tokens = [10, 30]
    ours, theirs = row("ours", [30.0, 60.0], tokens), row("theirs", [31.0, 62.0], tokens)
    found = difference([{"docs": (ours, theirs)}])
    assert found.mean == pytest.approx(-3 / 40)
    ratio = -3 / 40
    residuals = [-1 - ratio * 10, -2 - ratio * 30]
    assert found.error == pytest.approx((sum(r * r for r in residuals) * 2) ** 0.5 / 40)
    # What all documents share, however much they differ among themselves, has no error; two equal domains halve its square.
    shifted = dataclasses.replace(ours, nats=[nats + 0.5 * t for nats, t in zip(ours.nats, tokens, strict=True)])
    assert difference([{"docs": (shifted, ours)}]).error == pytest.approx(0, abs=1e-12)
    assert difference([{"a": (ours, theirs), "b": (ours, theirs)}]).error == pytest.approx(found.error / 2**0.5)


def test_the_error_over_seeds_is_added():
    tokens = [10, 10]
    pairs = [(row("a", [10.0 + d, 10.0 + d], tokens), row("b", [10.0, 10.0], tokens)) for d in (1, 3)]
    found = difference([{"docs": pair} for pair in pairs])
    assert found.mean == pytest.approx(0.2)
    assert found.error == pytest.approx(0.1)  # sd 0.1 * sqrt(2), over the root of 2 seeds


def test_rows_of_other_documents_are_refused():
    with pytest.raises(SystemExit, match="same documents"):
        difference([{"docs": (row("a", [1.0], [2]), row("b", [1.0], [3]))}])


def test_the_best_module_is_chosen_on_tune_and_the_table_needs_no_row_but_the_trunks():
    rows = [row("trunk", [40.0], [10], part=part) for part in ("tune", "test")]
    assert "| trunk |" in report({1: rows})[0]
    rows += [row("module docs", [nats], [10], part=part) for part, nats in (("tune", 41.0), ("test", 30.0))]
    rows += [row("module cpp", [nats], [10], part=part) for part, nats in (("tune", 35.0), ("test", 36.0))]
    rows += [row("assembled", [36.0], [10])]
    table, shown = report({1: rows})
    assert "| best module by label | 3.600 |" in table
    assert "way to the best by label at least 103% | 100.0% (each seed: 100.0%) | **missed**" in table
    assert {"model": "assembled", "domain": "docs", "loss": 3.6, "stderr": 0.0} in shown


@pytest.mark.parametrize(
    ("optimum", "best", "inside"), [(2e-3, 1e-3, "yes"), (2e-2, 2.4e-2, "yes"), (1e-9, 3.7e-6, "**no**")]
)
def test_rates_are_tried_until_the_best_one_has_a_worse_one_on_either_side(tmp_path, optimum, best, inside):
    trained: list[tuple[str, float]] = []
    rates = Rates(tmp_path / "rates.json", (3e-4, 1e-3, 3e-3, 6e-3), extensions=4)

    def loss(_, rate):
        return abs(rate / optimum - 1) if optimum > 1e-6 else rate

    rates.search(1, ["module"], trained.extend, loss)
    assert rates.best("module") == pytest.approx(best)
    assert f"| {inside} |" in rates.table()
    again = Rates(tmp_path / "rates.json", (3e-4, 1e-3, 3e-3, 6e-3), extensions=4)
    again.search(2, ["module"], lambda pairs: pytest.fail(f"{pairs} were trained again"), loss)
    assert len(trained) == len(set(trained))


def test_excerpts_are_whole_lines_from_anywhere_and_the_same_each_time():
    text = "".join(f"line {number} of a long document\n" for number in range(2_000))
    digests = [hashlib.sha256(bytes([number])).digest() for number in range(64)]
    found = [excerpt(digest, text) for digest in digests]
    assert found == [excerpt(digest, text) for digest in digests]
    assert all(len(part) <= EXCERPT and part.startswith("line") and part.endswith("\n") for part in found)
    starts = sorted(text.index(part) / len(text) for part in found)
    assert starts[0] < 0.1 and starts[-1] > 0.85 and len(set(starts)) > 60
    assert excerpt(digests[0], "short") == "short"
    assert len(excerpt(digests[1], "x" * 10_000)) == EXCERPT


def test_code_loses_the_docstring_of_its_file_of_its_classes_and_functions():
    code = '# a licence\n"""Of the file."""\nclass One:\n    """Of the class."""\n    def two(self):\n        r"""Of it."""\n'
    text = "x = 1\n"
    found = without_docstrings(code + text)
    assert "Of " not in found and found.startswith("# a licence\n") and found.endswith(text)
    assert "class One:" in found and "def two(self):" in found


def test_parts_have_their_shares_of_the_documents():
    digests = [hashlib.sha256(number.to_bytes(4, "big")).digest() for number in range(4_000)]
    for parts in (HOME_PARTS, OTHER_PARTS):
        found = [part_of(digest, parts) for digest in digests]
        start = 0.0
        for part, end in parts.items():
            assert found.count(part) / len(found) == pytest.approx(end - start, abs=0.03)
            start = end


def trunk_and_text() -> tuple[Trunk, torch.Tensor]:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16}
    trunk = Trunk(ModelConfig(vocab_size=40, hidden_size=16, intermediate_size=24, **sizes)).eval()
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return trunk, torch.randint(2, 40, (3, 17))


def mixture_of_heads(trunk: Trunk) -> Mixture:
    """Two modules whose feed-forwards are the trunk's, with heads of their own."""
    own = {name: tensor.clone() for name, tensor in trunk.state_dict().items() if ".mlp." in name}
    modules = {
        name: with_module(trunk, own | {"lm_head.weight": torch.randn(40, 16)}, "ffn+head", [0, 1]) for name in "ab"
    }
    statistics = [
        {
            "unigrams": torch.randint(0, 90, (40,), dtype=torch.uint8),
            "bigrams": torch.randint(0, 60, (BIGRAM_BUCKETS,), dtype=torch.uint8),
        }
        for _ in range(3)
    ]
    return Mixture(trunk, modules, ContextRouter(statistics, torch.full((3,), 1 / 3), 1, Tuning())).eval()


def test_untied_and_upcycled_trunks_are_the_trunk_at_first():
    trunk, tokens = trunk_and_text()
    expected = trunk.nats(tokens)
    mixture = upcycled(trunk, 5).eval()
    assert mixture.config.num_local_experts == 5 and mixture.lm_head is not None
    torch.testing.assert_close(mixture.nats(tokens), expected)
    torch.testing.assert_close(untied(trunk).nats(tokens), expected)


def test_an_ensemble_with_equal_hearing_is_the_assembled_model_where_only_the_heads_differ():
    trunk, tokens = trunk_and_text()
    mixture = mixture_of_heads(trunk)
    before = torch.randint(2, 40, (3, 5))
    models = list(mixture.candidates)
    ensemble = Ensemble(models, mixture.router, counts=True)
    torch.testing.assert_close(ensemble.nats(tokens, before), mixture.nats(tokens, before))
    torch.testing.assert_close(ensemble.nats(tokens), mixture.nats(tokens))
    assert (Ensemble(models, mixture.router).nats(tokens) - mixture.nats(tokens)).abs().max() > 0.01


def test_constant_gates_are_at_least_as_good_as_the_best_candidate():
    trunk, tokens = trunk_and_text()
    mixture = mixture_of_heads(trunk)
    alone = [model.nats(tokens) for model in mixture.candidates]
    for place, nats in enumerate(alone):
        corner = with_router(mixture, FixedGates(torch.eye(3)[place]))
        torch.testing.assert_close(corner.nats(tokens), nats)
    gates = constant_gates(mixture, lambda model: model.nats(tokens).sum().item())
    assert gates.sum().item() == pytest.approx(1)
    fitted = with_router(mixture, FixedGates(gates)).nats(tokens).sum()
    assert fitted < min(nats.sum() for nats in alone) - 0.1


@pytest.mark.soak
def test_the_whole_comparison_in_small(tmp_path):
    command = [sys.executable, "benchmarks/recipes.py", "--smoke", "--output-dir", str(tmp_path / "compare")]
    first = subprocess.run(command, cwd=launch.ROOT, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-2000:]
    table = (tmp_path / "compare-smoke" / "table.md").read_text(encoding="utf-8")
    rows = (
        "upcycled mixture",
        "union with a head",
        "FlexOlmo's recipe with heads",
        "equal hearing",
        "oracle",
        "random splits",
    )
    assert all(f"| {name}" in table or name in table for name in rows)
    again = subprocess.run(command, cwd=launch.ROOT, capture_output=True, text=True)
    assert (
        again.returncode == 0 and "head-docs" not in again.stdout.split("## home")[0]
    )  # nothing is trained or scored twice
