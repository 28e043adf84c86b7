"""The assembled model in Transformers: the same logits as here, alone, padded, with a cache, and in generation."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import small_artifacts
import torch
from safetensors.torch import load_file, save_file

from forge_common import export
from forge_common.data.tokenizer import byte_tokenizer
from forge_common.errors import UserError
from forge_common.exporting import assembled_model, proof
from forge_common.model.modules import plug_in
from forge_common.model.trunk import Trunk
from forge_common.routing.mixture import Mixture, with_module
from forge_common.routing.routers import ContextRouter, UniformRouter
from forge_common.routing.tuning import Tuning

LLAMA = dataclasses.replace(small_artifacts.CONFIG, initializer_range=0.3, cross_document_attention=False)
QWEN2 = dataclasses.replace(LLAMA, rope_scaling=None, qkv_bias=True, tie_word_embeddings=False)
QWEN3 = dataclasses.replace(
    LLAMA, rope_scaling=None, qk_norm=True, cross_document_attention=True, num_key_value_heads=2
)
MISTRAL = dataclasses.replace(LLAMA, rope_scaling=None, family="mistral", sliding_window=9)
YARN = dataclasses.replace(
    LLAMA, rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
)
OLMO2 = dataclasses.replace(LLAMA, rope_scaling=None, family="olmo2", qk_norm=True, num_key_value_heads=2)
GEMMA = dataclasses.replace(LLAMA, rope_scaling=None, family="gemma", initializer_range=0.1)
CASES = {"llama": (LLAMA, 0), "qwen2": (QWEN2, 1), "qwen3": (QWEN3, 2), "mistral": (MISTRAL, 0), "yarn": (YARN, 0)}
CASES |= {"olmo2": (OLMO2, 0), "gemma": (GEMMA, 0)}
MODULES = {
    "copy": {"kind": "ffn+head", "layers": [0, 1]},
    "narrow": {"kind": "narrow", "layers": [1], "width": 5},
    "rank": {"kind": "lora+head", "layers": [1], "rank": 3},
}


ATTENDING = {  # modules that change the attention too, in different layers, one of them nothing else
    "copy": {"kind": "attention+ffn+head", "layers": [0, 1]},
    "rank": {"kind": "lora+head", "layers": [1], "rank": 3, "alpha": 6, "targets": ["q_proj", "o_proj", "up_proj"]},
    "keys": {"kind": "lora", "layers": [0], "rank": 2, "targets": ["k_proj", "v_proj"]},
}


def mixture(config: Any, top_k: int = 0, described: dict[str, Any] = MODULES) -> Mixture:
    """A trunk and three modules whose weights are large enough that a wrong gate shows."""
    torch.manual_seed(1)
    trunk = Trunk(config)
    modules = {}
    for name, how in described.items():
        plain = Trunk(config)
        tensors = {key: torch.randn_like(plain.state_dict()[key]) * 0.3 for key in plug_in(plain, **how)}
        modules[name] = with_module(trunk, tensors, **how)
    counts = [small_artifacts.counts(seed, moments=False) for seed in range(1 + len(modules))]
    across = config.cross_document_attention
    router = ContextRouter(counts, torch.full((4,), 0.25), 1, Tuning(), across=across)
    return Mixture(trunk, modules, router, top_k=top_k).eval()


def exported(folder: Path, model: Mixture, described: dict[str, Any] = MODULES) -> Any:
    folder.mkdir()
    assembled_model.write(folder, model, byte_tokenizer(), described)
    return folder


@pytest.mark.parametrize("described", [MODULES, ATTENDING], ids=["feed-forward", "attention"])
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_mixture(tmp_path, case, described):
    model = mixture(*CASES[case], described)
    with torch.no_grad():
        for parameter in model.candidates[0].parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0))
    folder = exported(tmp_path / "exported", model, described)
    assert assembled_model.prove(folder, model, byte_tokenizer()) < 2e-5


CHANGED = {"model.layers.1.candidates.3.up_proj.lora_B": MODULES, "router.bigram_codes": MODULES}
CHANGED |= {
    f"model.layers.{name}": ATTENDING for name in ("1.attentions.1.k_proj.weight", "1.attentions.2.o_proj.lora_B")
}
CHANGED |= {"model.layers.0.attentions.3.v_proj.lora_A": ATTENDING}


@pytest.mark.parametrize("name", CHANGED)
def test_the_proof_sees_a_changed_tensor(tmp_path, name):
    model = mixture(LLAMA, 0, CHANGED[name])
    folder = exported(tmp_path / "exported", model, CHANGED[name])
    tensors = load_file(folder / "model.safetensors")
    changed = {name: tensors[name].flip(0).contiguous()}
    save_file(tensors | changed, folder / "model.safetensors", metadata={"format": "pt"})
    assert assembled_model.prove(folder, model, byte_tokenizer()) > proof.LIMIT


@pytest.mark.parametrize(
    ("config", "top_k", "described"),
    [
        (LLAMA, 0, MODULES),
        (MISTRAL, 0, MODULES),
        (LLAMA, 0, ATTENDING),
        (MISTRAL, 0, ATTENDING),
        (LLAMA, 1, ATTENDING),
    ],
    ids=["llama", "mistral", "attention", "mistral, attention", "attention, one candidate"],
)
def test_generation_is_the_same_with_a_cache_in_a_batch_and_in_beams(tmp_path, config, top_k, described):
    model = mixture(config, top_k, described)
    generated = proof.load(exported(tmp_path / "exported", model, described), trust_remote_code=True)
    short, long = (byte_tokenizer().encode_batch([text])[0] for text in ("a b", "def f(x):\n    return x"))
    alone = []
    for prompt in (short, long):
        ids, cache, new = list(prompt), [], torch.tensor([prompt])
        for _ in range(12):
            new = model.next_logits(new, cache).argmax(-1, keepdim=True)
            ids.append(int(new))
            if ids[-1] == 1:
                break
        alone.append(ids)
        whole = generated.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, use_cache=False)
        assert whole[0].tolist() == ids
    padding = len(long) - len(short)
    batch = torch.tensor([[1] * padding + short, long])
    mask = torch.ones_like(batch)
    mask[0, :padding] = 0
    rows = generated.generate(batch, attention_mask=mask, max_new_tokens=12, do_sample=False).tolist()
    for ids, row, start in zip(alone, rows, (padding, 0), strict=True):
        assert row[start : start + len(ids)] == ids
    beams = [
        generated.generate(batch, attention_mask=mask, max_new_tokens=8, num_beams=3, do_sample=False, use_cache=cache)
        for cache in (True, False)
    ]
    assert torch.equal(*beams)


def test_the_loss_of_labels_is_the_mean_of_nats(tmp_path):
    model = mixture(LLAMA)
    loaded = proof.load(exported(tmp_path / "exported", model), trust_remote_code=True)
    tokens = small_artifacts.TOKENS
    with torch.no_grad():
        loss = loaded(tokens, labels=tokens).loss
    assert float(loss) == pytest.approx(float(model.nats(tokens).mean()), abs=1e-5)


def test_what_the_code_does_not_compute_is_refused(tmp_path):
    model = mixture(LLAMA)
    model.router = UniformRouter(torch.full((4,), 0.25))
    with pytest.raises(UserError, match="--router context"):
        exported(tmp_path / "uniform", model)
    model = mixture(LLAMA)
    trunk = model.candidates[0]
    routed = Trunk(LLAMA)
    names = plug_in(routed, "expert", [1])
    state = {name: routed.state_dict()[name] for name in names}
    expert = Mixture(trunk, {"copy": with_module(trunk, state, "expert", [1])}, model.router)
    with pytest.raises(UserError, match="--without copy"):
        exported(tmp_path / "expert", expert)
    sparse = mixture(dataclasses.replace(LLAMA, num_local_experts=0))
    sparse.config = dataclasses.replace(LLAMA, num_local_experts=2)
    with pytest.raises(UserError, match="mixture of experts"):
        exported(tmp_path / "sparse", sparse)
    dynamic = mixture(dataclasses.replace(LLAMA, rope_scaling={"rope_type": "dynamic", "factor": 2.0}))
    with pytest.raises(UserError, match="rope_type dynamic"):
        exported(tmp_path / "dynamic", dynamic)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory) -> Path:
    return small_artifacts.build(tmp_path_factory.mktemp("artifacts"))


def test_the_command_writes_a_folder_with_the_difference_on_its_card(artifacts, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "out"
    export.main(export.Settings(str(artifacts / "assembled"), "transformers", folder, without=("two",)))
    assert "largest difference of a logit" in capsys.readouterr().out
    assert "largest_logit_difference" in (folder / "README.md").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert [module["name"] for module in loaded.config.modules] == ["one"]
    assert (
        AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("ab")["input_ids"]
        == byte_tokenizer().encode_batch(["ab"])[0]
    )
    assert "forge_common" not in "".join(path.read_text() for path in folder.glob("*.py")).replace(
        "forge_common.export", ""
    )


@pytest.mark.parametrize("module", [None, "one", "two"])
def test_a_trunk_and_a_merged_module_are_ordinary_checkpoints(artifacts, tmp_path, module):
    folder = tmp_path / "out"
    path = artifacts / module if module else None
    export.main(export.Settings(str(artifacts / "trunk"), "transformers", folder, path))
    assert small_artifacts.load(folder)[1].config.model_type == "llama"
    assert not list(folder.glob("*.py"))
    assert "largest_logit_difference" in (folder / "README.md").read_text()


@pytest.mark.parametrize("model", ["assembled", "trunk"])
def test_a_damaged_export_is_refused_and_leaves_nothing(artifacts, tmp_path, monkeypatch, model):
    """The library writes one value wrong: the first matrix's first one."""

    def wrong(tensors, path, **how):
        save_file(tensors, path, **how)
        if Path(path).name == "model.safetensors":
            stored = load_file(path)
            name = next(name for name in sorted(stored) if name.endswith("q_proj.weight"))
            stored[name][0, 0] += 0.5
            save_file(stored, path, **how)

    monkeypatch.setattr("forge_common.exporting.assembled_model.save_file", wrong)
    monkeypatch.setattr("forge_common.artifacts.trunk_folder.save_file", wrong)
    with pytest.raises(UserError, match=r"(?:was not|nothing was) written"):
        export.main(export.Settings(str(artifacts / model), "transformers", tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"model": "assembled", "format": "gguf"}, "--model and one module with --module"),
        ({"model": "assembled", "format": "transformers", "module": Path("x")}, "no use for --module"),
        ({"model": "trunk", "format": "peft"}, "needs --module"),
        (
            {"model": "trunk", "format": "module", "module": Path("x")},
            "needs --peft, --name and has no use for --module",
        ),
        ({"model": "trunk", "format": "gguf", "top_k": 0}, "no use for --top-k"),
        ({"model": "assembled", "format": "transformers", "top_k": 4}, "--top-k 4 exceeds the 3 candidates"),
        (
            {"model": "assembled", "format": "transformers", "without": ("one", "two")},
            "--without leaves out every module of",
        ),
        ({"model": "assembled", "format": "transformers", "output_dir": "assembled/x"}, "/assembled, which is read"),
        ({"model": "trunk", "format": "transformers", "output_dir": "trunk/x/y"}, "/trunk, which is read"),
        ({"model": "trunk", "format": "gguf", "module": "one", "output_dir": "one/x"}, "/one, which is read"),
        ({"model": "trunk", "format": "module", "peft": Path("x"), "name": "a/b"}, "plain name"),
    ],
)
def test_flags_that_do_not_fit_are_refused(artifacts, tmp_path, how, message):
    places = {name: artifacts / how[name] for name in ("module", "output_dir") if isinstance(how.get(name), str)}
    settings = {"output_dir": tmp_path / "out", **how, "model": str(artifacts / how["model"]), **places}
    assert message in small_artifacts.refused(export.main, export.Settings(**settings))


@pytest.mark.parametrize("place", [(-1, "logits"), (0, "logits"), (-1, "nats"), (0, "nats")])
def test_a_logit_that_is_not_a_number_is_refused(place):
    """Of the first window or the last: Python's max(0.0, nan) is 0.0."""
    torch.manual_seed(0)
    model = Trunk(LLAMA).eval()
    expected = proof.expect(model, byte_tokenizer(), spliced=True)
    window = expected[place[0]]
    position = max(window.logits) if place[1] == "logits" else 1

    def exported(ids):
        logits = torch.stack([model.next_logits(ids[:, : end + 1]) for end in range(ids.shape[1])], dim=1)
        if torch.equal(ids, window.tokens[:, :-1]):
            logits[0, position, 7] = torch.nan
        return logits

    assert "other logits" in small_artifacts.refused(proof.check, "this", proof.difference(expected, exported))


def test_a_missing_package_is_named_with_the_command_that_installs_it():
    assert "pip install no_such_package" in small_artifacts.refused(proof.library, "no_such_package", "a proof")
