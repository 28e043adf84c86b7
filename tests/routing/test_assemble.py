"""Assembled models: the order of the modules does not matter, the model is causal, a module can be left out again."""

import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import sys

import launch
import numpy as np
import pytest
import small_artifacts
import torch
from safetensors.torch import load_file, save_file
from small_artifacts import assembling, refused

from forge_common import assemble, merge
from forge_common.artifacts import assembled
from forge_common.artifacts.metadata import module_arguments
from forge_common.artifacts.module_folder import read_model, read_module, write_module
from forge_common.artifacts.trunk_folder import read_trunk, write_trunk
from forge_common.data.tokenizer import byte_tokenizer
from forge_common.errors import UserError
from forge_common.files.tensors import digest
from forge_common.model.config import ModelConfig
from forge_common.model.modules import put_in
from forge_common.model.trunk import Trunk, rotary
from forge_common.routing import statistics

KINDS = {"cpp": "attention+ffn+head", "code": "narrow+head", "low": "lora+head"}
LORA = ("--rank", 4, "--alpha", 6, "--dropout", 0.1, "--targets", "q_proj", "v_proj", "up_proj", "down_proj")


# Of each mapped file of weights, by the folder it is in, and of all anonymous memory: bytes in memory after scoring with top-1.
LOADED = """
import json, re, sys, torch
from pathlib import Path
from forge_common.artifacts.assembled import read_assembled
model, _, _ = read_assembled(sys.argv[1], top_k=1)
p = model.router.unigram_p
model.nats(torch.from_numpy((p[1] / p.mean(0)).argsort())[None, -60:].clone())  # frequent in the first module
used = [name for name, gate in zip(model.names, model.gates.amax((0, 1))) if gate > 0]
maps = re.findall(r"/(\\w+)/\\w+[.]safetensors\\n(?:[A-Z].*\\n)*?Rss: +(\\d+)", Path("/proc/self/smaps").read_text())
anonymous = int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
print(json.dumps({"used": used, "files": {name: int(rss) << 10 for name, rss in maps}, "anonymous": anonymous}))
"""


def run_code(code: str, *arguments: object) -> str:
    """What a new process prints, whose memory is that of this code alone."""
    line = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(
        line, env=launch.environment(), cwd=launch.ROOT, text=True, stdout=subprocess.PIPE, check=True
    ).stdout


def call(command: str, *arguments: object, fails: bool = False) -> str:
    if command == "assemble":
        arguments += ("--allow-copies",)  # two of KINDS are trained on one text
    printed = launch.run_python("-m", f"forge_common.{command}", *arguments, fails=fails)
    assert "Traceback" not in printed, printed
    return printed


@pytest.fixture(scope="module")
def module_dirs(module, text, domain, tmp_path_factory):
    """Folders of modules by name: three kinds, trained on two texts, and two experts."""
    folder = tmp_path_factory.mktemp("modules")
    dirs = {}
    for name, kind in {**KINDS, "expert_cpp": "expert+head", "expert_code": "expert"}.items():
        source = domain if "cpp" in name else text
        sizes = {"lora": LORA, "narrow": ("--width", 12)}.get(kind.removesuffix("+head"), ())
        flags = ("--name", name, "--data", source, "--kind", kind, *sizes, "--steps", 12)
        moments = ("--statistics-moments",) if kind.startswith("expert") else ()
        module(folder / name, *flags, "--lr", 0.02, *moments)
        dirs[name] = folder / name / "module"
    return dirs


@pytest.fixture(scope="module")
def assembled_dir(trunk, module_dirs, tmp_path_factory):
    """The folder of the modules in KINDS, assembled."""
    folder = tmp_path_factory.mktemp("assembled") / "assembled"
    call("assemble", "--trunk", trunk, "--modules", *(module_dirs[name] for name in KINDS), "--output-dir", folder)
    return folder


def read(folder, **how):
    model, tokenizer, _ = assembled.read_assembled(str(folder), **how)
    return model.eval(), tokenizer


def ids(tokenizer, size: int = 65) -> torch.Tensor:
    """[3, size]: Python, C++, and both with an EOS between them."""
    python = tokenizer.encode_batch(["def first(items, default=None):\n    return next(iter(items), default)\n" * 3])[0]
    cpp = tokenizer.encode_batch(
        ["#include <vector>\nnamespace c10 {\ntemplate <typename T>\nstruct Box { T x; };\n" * 3]
    )[0]
    both = [*python[:30], tokenizer.eos_token_id, *cpp]
    return torch.tensor([python[:size], cpp[:size], both[:size]])


def test_the_order_of_the_modules_does_not_matter(trunk, module_dirs, assembled_dir, tmp_path):
    names = list(KINDS)[::-1]
    call(
        "assemble",
        "--trunk",
        trunk,
        "--modules",
        *(module_dirs[name] for name in names),
        "--output-dir",
        tmp_path / "other",
    )
    assert (assembled_dir / "assembled.json").read_text() == (tmp_path / "other" / "assembled.json").read_text()
    (one, tokenizer), (other, _) = read(assembled_dir), read(tmp_path / "other")
    assert one.names == other.names == ["trunk", "code", "cpp", "low"]
    assert torch.equal(one.nats(ids(tokenizer)), other.nats(ids(tokenizer)))


@pytest.mark.parametrize("top_k", [0, 1, 2])
def test_a_token_does_not_depend_on_later_ones(assembled_dir, top_k):
    model, tokenizer = read(assembled_dir, top_k=top_k)
    tokens = ids(tokenizer)
    before = model.nats(tokens)
    changed = tokens.clone()
    changed[:, 40:] = tokens[:, 10:35]
    after = model.nats(changed)
    torch.testing.assert_close(after[:, :39], before[:, :39], rtol=0, atol=1e-5)
    assert not torch.allclose(after[:, 40:], before[:, 40:], atol=1e-3)


@pytest.mark.parametrize("top_k", [0, 1, 2])
def test_token_by_token_with_a_cache_equals_one_pass(assembled_dir, top_k):
    model, tokenizer = read(assembled_dir, top_k=top_k)
    tokens = ids(tokenizer)
    expected = model.nats(tokens)
    cache, nats = [], []
    first = model.next_logits(tokens[:, :7], cache)
    assert torch.allclose(first.logsumexp(-1), torch.zeros(3), atol=1e-5)  # probabilities sum to 1
    nats.append(-first.gather(1, tokens[:, 7:8]))
    for t in range(7, 64):
        nats.append(-model.next_logits(tokens[:, t : t + 1], cache).gather(1, tokens[:, t + 1 : t + 2]))
    torch.testing.assert_close(torch.cat(nats, dim=1), expected[:, 6:], rtol=0, atol=2e-5)


def reference_p(router, previous: int, seen: list[int]) -> np.ndarray:
    """[S, V]: each state's probabilities of the token after `previous`, in float64; seen: the document's tokens so far."""
    unigrams = statistics.decode(torch.from_numpy(router.unigram_codes)).double().numpy()
    vocabulary = np.arange(unigrams.shape[1])
    bucket = statistics.bigram_bucket(np.full_like(vocabulary, previous), vocabulary)
    in_bucket = statistics.decode(torch.from_numpy(router.bigram_codes)).double().numpy()[:, bucket]
    pairs = np.minimum(np.minimum(in_bucket, unigrams[:, [previous]]), unigrams)
    totals = unigrams.sum(1, keepdims=True)
    shares = router.prior[:-1].double().numpy() / router.prior[:-1].double().numpy().sum()
    mean = shares @ ((unigrams + 1) / (totals + len(vocabulary)))
    unigram = (unigrams + 1000 * mean) / (totals + 1000)
    counted = pairs.sum(1, keepdims=True)
    back_off = 200 + 0.3 * np.maximum(counted - unigrams[:, [previous]], 0)
    shared = shares @ ((pairs + back_off * unigram) / (counted + back_off))
    p = (pairs + back_off * (shared + unigram) / 2) / (counted + back_off)
    p = np.concatenate((p, shares[None] @ p))
    times = np.bincount(seen, minlength=len(vocabulary)) if seen else np.zeros(len(vocabulary))
    document = (times + 100 * p[-1]) / (len(seen) + 100)
    return (1 - router.tuning.repeats) * p + router.tuning.repeats * document


def reference_gates(model, tokens: list[int], log_p_heads: np.ndarray | None = None) -> np.ndarray:
    """The router's filter, one token at a time, in float64. log_p_heads [T, E]: of the labels, if used."""
    router, tuning = model.router, model.router.tuning
    prior = router.prior.double().numpy()
    known = prior[:-1] / prior[:-1].sum()
    states, rows, seen = prior.copy(), [], []
    previous = router.eos
    for t, token in enumerate(tokens):
        evidence = tuning.temperature * np.log(reference_p(router, previous, seen)[:, token])
        if log_p_heads is not None:
            unknown = np.log((known * np.exp(log_p_heads[t])).sum())
            evidence += tuning.own * np.append(log_p_heads[t], unknown)
        states = (states * (1 - tuning.switch) + tuning.switch * prior) * np.exp(evidence)
        states = prior.copy() if token == router.eos else states / states.sum()
        rows.append(states[:-1] + states[-1] * known)
        seen = [] if token == router.eos else [*seen, token]
        previous = token
    return np.array(rows)


def test_the_gates_and_the_mixture_equal_a_reference(assembled_dir):
    """Gates in float64 loops; hidden states as plain sums; log p = log sum_e w_e p_e."""
    model, tokenizer = read(assembled_dir)
    tokens = ids(tokenizer)
    nats = model.nats(tokens)
    for row, inputs in enumerate(tokens[:, :-1].tolist()):
        gates = torch.from_numpy(reference_gates(model, inputs)).float()
        decoder = model.candidates[0].model
        x = decoder.embed_tokens(tokens[row : row + 1, :-1])
        rope = rotary(model.config, len(inputs))
        documents = (torch.tensor([-1, *inputs[:-1]]) == model.config.eos_token_id).cumsum(0)
        mask = torch.ones(len(inputs), len(inputs), dtype=torch.bool).tril() & (documents[:, None] == documents)
        for index, layer in enumerate(decoder.layers):
            normed = layer.input_layernorm(x)
            attentions = [one.model.layers[index].self_attn for one in model.candidates]
            outputs = [attention(normed, rope, mask[None, None], None, index) for attention in attentions]
            x = x + sum(gates[None, :, e, None] * y for e, y in enumerate(outputs))
            normed = layer.post_attention_layernorm(x)
            outputs = [one.model.layers[index].feed(normed, None, None)[0] for one in model.candidates]
            x = x + sum(gates[None, :, e, None] * y for e, y in enumerate(outputs))
        hidden = decoder.norm(x)[0]
        log_p = torch.stack([(hidden @ one.head.T).log_softmax(-1) for one in model.candidates], dim=-1)
        label = log_p.gather(1, tokens[row, 1:, None, None].expand(-1, 1, log_p.shape[-1])).squeeze(1).double()
        before = torch.cat((torch.zeros_like(label[:1]), label[:-1])).detach().numpy()
        weights = torch.from_numpy(reference_gates(model, inputs, before))
        expected = -torch.logsumexp(weights.log() + label, dim=-1)
        torch.testing.assert_close(nats[row].double(), expected, rtol=0, atol=2e-4)
        torch.testing.assert_close(model.weights[row].double(), weights, rtol=0, atol=2e-4)
        torch.testing.assert_close(model.gates[row], gates, rtol=0, atol=2e-4)


def test_top_k_of_all_candidates_is_the_soft_mixture_of_the_gates(assembled_dir):
    model, tokenizer = read(assembled_dir, top_k=1)
    tokens = ids(tokenizer)
    model.nats(tokens)
    assert set(model.weights.unique().tolist()) == {0.0, 1.0}
    soft, _ = read(assembled_dir)
    soft.top_k = 4
    all_of_them = soft.nats(tokens)
    soft.top_k = 0
    soft.router.tuning = dataclasses.replace(soft.router.tuning, own=0.0)
    torch.testing.assert_close(all_of_them, soft.nats(tokens), rtol=0, atol=1e-5)


def test_without_all_modules_it_equals_the_trunk(assembled_dir, trunk):
    model, tokenizer = read(assembled_dir, without=tuple(KINDS))
    alone, _, _ = read_trunk(str(trunk))
    torch.testing.assert_close(model.nats(ids(tokenizer)), alone.nats(ids(tokenizer)), rtol=0, atol=1e-6)


def test_without_a_module_it_equals_a_model_assembled_without_it(assembled_dir, trunk, module_dirs, tmp_path):
    """Bit for bit: left out when read, left out by assemble --without, and never given to assemble."""
    names = ["code", "low"]
    call(
        "assemble",
        "--trunk",
        trunk,
        "--modules",
        *(module_dirs[name] for name in names),
        "--output-dir",
        tmp_path / "two",
    )
    flags = (*(module_dirs[name] for name in KINDS), "--without", "cpp")
    call("assemble", "--trunk", trunk, "--modules", *flags, "--output-dir", tmp_path / "left")
    (one, tokenizer), (two, _), (left, _) = (
        read(assembled_dir, without=("cpp",)),
        read(tmp_path / "two"),
        read(tmp_path / "left"),
    )
    expected = one.nats(ids(tokenizer))
    assert torch.equal(expected, two.nats(ids(tokenizer))) and torch.equal(expected, left.nats(ids(tokenizer)))
    assert not (tmp_path / "left" / "modules" / "cpp").exists()
    assert not torch.allclose(expected, read(assembled_dir)[0].nats(ids(tokenizer)), atol=1e-4)


def test_the_trunks_parameters_are_in_memory_once(assembled_dir):
    model, _ = read(assembled_dir)
    trunk = sum(p.numel() for p in model.candidates[0].parameters())
    added = sum(
        load_file(assembled_dir / "modules" / name / "module.safetensors")[key].numel()
        for name in KINDS
        for key in load_file(assembled_dir / "modules" / name / "module.safetensors")
    )
    assert sum(p.numel() for p in model.parameters()) == trunk + added


@pytest.mark.parametrize("name", KINDS)
def test_a_merged_module_is_a_transformers_checkpoint(name, module_dirs, trunk, tmp_path):
    from transformers import AutoModelForCausalLM

    call("merge", "--trunk", trunk, "--module", module_dirs[name], "--output-dir", tmp_path / "merged")
    model, tokenizer, _, _ = read_model(str(trunk), module_dirs[name])
    tokens = ids(tokenizer)[:2]
    logits = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)(tokens[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    torch.testing.assert_close(model.nats(tokens), expected, rtol=0, atol=2e-5)
    again, _, _ = read_trunk(str(tmp_path / "merged"))
    torch.testing.assert_close(again.nats(tokens), expected, rtol=0, atol=2e-5)


def test_one_learned_row_equals_the_module_as_trained(trunk, module_dirs, tmp_path):
    """With one module the assembled model is the mixture that the module was trained in."""
    folder = tmp_path / "learned"
    line = ("--trunk", trunk, "--modules", module_dirs["expert_code"], "--router", "learned", "--output-dir", folder)
    call("assemble", *line)
    model, tokenizer = read(folder)
    tensors, metadata = read_module(module_dirs["expert_code"], read_trunk(str(trunk))[2])
    alone, _, _ = read_trunk(str(trunk))
    put_in(alone, tensors, **module_arguments(metadata))
    torch.testing.assert_close(model.nats(ids(tokenizer)), alone.nats(ids(tokenizer)), rtol=0, atol=1e-5)


def test_ridge_solves_the_least_squares_problem(trunk, module_dirs, domain, text, tmp_path):
    """Its weights satisfy the normal equations of the modules' moments."""
    folder = tmp_path / "ridge"
    modules = (module_dirs["expert_cpp"], module_dirs["expert_code"])
    call("assemble", "--trunk", trunk, "--modules", *modules, "--router", "ridge", "--output-dir", folder)
    model, tokenizer = read(folder)
    moments = [
        load_file(path / "statistics.safetensors") for path in (module_dirs["expert_code"], module_dirs["expert_cpp"])
    ]
    for layer, weights in enumerate(model.router.weights.double()):
        second = sum(one["second"][layer].double() for one in moments) / 2
        right = torch.stack([one["first"][layer].double() / 2 for one in moments], dim=-1)
        eye = 1e-2 * second.diagonal().mean() * torch.eye(len(second), dtype=second.dtype)
        torch.testing.assert_close((second + eye) @ weights, right, rtol=1e-3, atol=1e-4)
    nats = model.nats(ids(tokenizer))
    assert torch.isfinite(nats).all() and model.weights.sum(-1).allclose(torch.ones(3, 64), atol=1e-5)


def test_evaluate_prints_all_rows_and_the_effect_of_leaving_one_out(
    assembled_dir, trunk, domain, text, cache, tmp_path
):
    data = ("--data", f"cpp={domain}", f"code={text}", "--cache-dir", cache, "--val-fraction", 0.3)
    more = ("--without", "cpp", "--spliced", 16, "--json", tmp_path / "rows.json", "--svg", tmp_path / "rows.svg")
    printed = call("evaluate", "--model", assembled_dir, *data, *more)
    rows_by_key = {
        (row["model"], row["domain"]): row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]
    }
    models = ["trunk", "module:code", "module:cpp", "module:low", "assembled", "without:cpp"]
    assert list(dict.fromkeys(model for model, _ in rows_by_key)) == models
    assert list(dict.fromkeys(domain for _, domain in rows_by_key)) == ["cpp", "code", "spliced"]
    assert f"left out    cpp: cpp {rows_by_key['assembled', 'cpp']['loss']:.3f} -> " in printed
    assert rows_by_key["assembled", "cpp"]["loss"] < rows_by_key["trunk", "cpp"]["loss"]  # it was trained on C++
    for place in ("cpp", "code", "spliced"):
        for credits in ("layer_gates", "head_weights"):
            assert sum(rows_by_key["assembled", place][credits].values()) == pytest.approx(1, abs=1e-5)
    for credits in ("layer_gates", "head_weights"):
        on_cpp, on_code = (rows_by_key["assembled", place][credits]["cpp"] for place in ("cpp", "code"))
        assert on_cpp > on_code
        assert "cpp" not in rows_by_key["without:cpp", "cpp"][credits]
        assert credits not in rows_by_key["trunk", "cpp"]
    row = rows_by_key["assembled", "cpp"]
    assert row["layer_gates"] != row["head_weights"]
    assert f"{row['layer_gates']['cpp']:.0%} / {row['head_weights']['cpp']:.0%}" in printed
    call(
        "evaluate",
        "--model",
        trunk,
        *data,
        "--module",
        module_dir_in(assembled_dir, "cpp"),
        "--json",
        tmp_path / "plain.json",
    )
    plain = {(row["model"], row["domain"]): row for row in json.loads((tmp_path / "plain.json").read_text())["rows"]}
    for key, row in plain.items():  # each candidate has the loss that it has outside of the mixture
        assert row["loss"] == pytest.approx(rows_by_key[key]["loss"], abs=1e-6)
    assert (tmp_path / "rows.svg").read_text().count("<circle") == 3 * 6 + 6


def module_dir_in(assembled_dir, name):
    return assembled_dir / "modules" / name


def test_generate_shows_the_gate_weights(assembled_dir):
    line = ("--model", assembled_dir, "--prompt", "#include <c10", "--max-new-tokens", 20, "--temperature", 0)
    printed = call("generate", *line, "--show-routing")
    assert printed.startswith("#include <c10")
    assert re.search(r"^    1-\d+ +heads \w+ \d+%.*; layers \w+ \d+%.*: '", printed, re.M)
    assert call("generate", *line) == call("generate", *line)
    assert "cpp " not in call("generate", *line, "--show-routing", "--without", "cpp").split("    1-")[1]


def test_calibration_does_not_raise_the_loss(trunk, module_dirs, domain, text, cache, tmp_path):
    line = ("--trunk", trunk, "--modules", *(module_dirs[name] for name in KINDS), "--output-dir", tmp_path / "tuned")
    printed = call("assemble", *line, "--calibrate", domain, text, "--calibrate-tokens", 1000, "--cache-dir", cache)
    before, after = (float(x) for x in printed.split("tokens: ")[1].split(" nats")[0].split(" -> "))
    assert after <= before
    assert json.loads((tmp_path / "tuned" / "assembled.json").read_text())["tuning"].keys()


@pytest.mark.parametrize("calibrate", [False, True])
def test_each_part_is_verified_once(calibrate, text, tmp_path, monkeypatch):
    """The SHA-256 of each trunk, module and statistics is computed once."""
    small_artifacts.build(tmp_path)
    computed = []

    class Recorder:
        def __init__(self, content: bytes = b""):
            self.sha256 = sha256(content)
            self.update, self.digest = self.sha256.update, self.sha256.digest

        def hexdigest(self) -> str:
            computed.append(self.sha256.hexdigest())
            return computed[-1]

    sha256 = hashlib.sha256
    monkeypatch.setattr(hashlib, "sha256", Recorder)
    how = {"calibrate": (str(text),), "calibrate_tokens": 100, "cache_dir": tmp_path / "cache"} if calibrate else {}
    modules = (tmp_path / "one", tmp_path / "two")
    assert assemble.main(assemble.Settings(str(tmp_path / "trunk"), modules, tmp_path / "new", **how)) == 0
    for path in (tmp_path / "trunk" / "forge.json", *(folder / "module.json" for folder in modules)):
        metadata = json.loads(path.read_text())
        assert computed.count(metadata["digest"]) == computed.count(metadata["statistics_digest"]) == 1


@pytest.mark.parametrize(
    ("flag", "sources", "expected"),
    [
        ("check_data", ("one={}@0.5",), "{}@0.5: a weight has no effect here; leave out @0.5"),
        ("calibrate", ("{}s",), "{}s: no such file or folder; did you mean {}?"),
        ("calibrate", ("{}@0.5", "local:docs"), "only some sources have a weight"),
        ("calibrate", ("local:dosc",), "local:dosc: no such corpus"),
        ("trunk_data", ("{}", "local:docs@2"), "only some sources have a weight"),
    ],
)
def test_assemble_refuses_sources_before_anything_is_read(flag, sources, expected, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("text")
    sources = tuple(source.format(text) for source in sources)
    message = refused(assemble.main, assembling(tmp_path, **{flag: sources}))
    assert message.startswith(f"--{flag.replace('_', '-')}") and expected.format(text, text) in message


def test_assemble_and_merge_write_into_no_folder_that_they_read(root, tmp_path):
    (tmp_path / "link").symlink_to(root / "one")
    for place in (root / "one" / "all", root / "trunk" / "a" / "all", tmp_path / "link" / "all"):
        settings = dataclasses.replace(assembling(root), output_dir=place)
        assert f"--output-dir {place} lies in " in refused(assemble.main, settings) and not place.exists()
    settings = merge.Settings(str(root / "trunk"), root / "one", root / "one" / "merged")
    assert f"lies in {root}/one, which is read. Name a folder outside of it" in refused(merge.main, settings)
    (root / "run").mkdir()
    (root / "one").rename(root / "run" / "module")
    assert merge.main(merge.Settings(str(root / "trunk"), root / "run", root / "run" / "merged")) == 0


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"top_k": -1}, "--top-k is -1. Give the number of candidates that serve a token, or 0 for all."),
        ({"calibrate_tokens": 1}, "--calibrate-tokens is 1. Give at least 2."),
    ],
)
def test_only_the_number_that_is_wrong_is_named(how, expected, tmp_path):
    assert refused(assemble.main, assembling(tmp_path, **how)) == expected


def test_more_candidates_for_a_token_than_there_are_are_refused(root):
    settings = dataclasses.replace(assembling(root), top_k=4)
    expected = "--top-k 4 exceeds the 3 candidates (the trunk and 2 modules). Give 3 or fewer, or 0 for all."
    assert expected in refused(assemble.main, settings)
    place = str(root / "assembled")
    assert "--top-k 4 exceeds the 3 candidates" in refused(assembled.read_assembled, place, top_k=4)
    assert assembled.read_assembled(place, top_k=3, without=("one",))[0].top_k == 3


def test_assemble_refuses_wrong_inputs(trunk, module_dirs, assembled_dir, shared, tmp_path):
    def refused(*modules, of=trunk, **how) -> str:
        with pytest.raises(UserError) as caught:
            assemble.main(assemble.Settings(str(of), modules, tmp_path / "never", **how))
        return str(caught.value)

    shared(tmp_path / "other", "--steps", 2, "--seed", 1)
    assert "another trunk" in refused(module_dirs["cpp"], of=tmp_path / "other" / "trunk")
    assert f"{module_dirs['cpp']} is given twice" in refused(module_dirs["cpp"], module_dirs["cpp"])
    shutil.copytree(module_dirs["cpp"], tmp_path / "again")
    assert "both called cpp" in refused(module_dirs["cpp"], tmp_path / "again")
    assert "needs modules of --kind expert" in refused(module_dirs["cpp"], router="learned")
    for name in ("cpp", "low"):
        assert "changes the attention" in refused(module_dirs[name], router="ridge")
    assert "no such module" in refused(module_dirs["cpp"], without=("law",))
    assert "again with --statistics-moments" in refused(module_dirs["code"], router="ridge")
    assert "Choose one of context, learned, ridge, uniform" in refused(module_dirs["cpp"], router="magic")
    assert "--top-k" in refused(module_dirs["cpp"], top_k=-1)
    assert "--calibrate-tokens" in refused(module_dirs["cpp"], calibrate=("x",), calibrate_tokens=0)
    with pytest.raises(UserError, match="--top-k -1"):
        assembled.read_assembled(str(assembled_dir), top_k=-1)
    assert "no module is left" in refused(module_dirs["cpp"], without=("cpp",))
    for name, key in (("module", "model.layers.0.mlp.up_proj.weight"), ("statistics", "bigrams")):
        copy = tmp_path / name
        shutil.copytree(module_dirs["cpp"], copy)
        tensors = load_file(copy / f"{name}.safetensors")
        tensors[key][0] += 1
        save_file(tensors, copy / f"{name}.safetensors")
        message = refused(copy)
        assert "changed or damaged" in message and str(copy) in message and ".tmp-" not in message
    for name, key, reason in (
        ("module", "model.layers.0.mlp.up_proj.weight", "has the shape"),
        ("statistics", "bigrams", "bigrams are not 131072 codes"),
    ):  # the digests are right, the shapes are not
        copy = tmp_path / f"shapes-{name}"
        shutil.copytree(module_dirs["cpp"], copy)
        tensors = load_file(copy / f"{name}.safetensors")
        tensors[key] = tensors[key][:-1].contiguous()
        save_file(tensors, copy / f"{name}.safetensors")
        metadata = json.loads((copy / "module.json").read_text())
        metadata[{"module": "digest", "statistics": "statistics_digest"}[name]] = digest(tensors)
        (copy / "module.json").write_text(json.dumps(metadata))
        assert reason in refused(copy)
    assert not (tmp_path / "never").exists() and not list(tmp_path.glob(".tmp-*"))
    assert "exists" in call(
        "assemble", "--trunk", trunk, "--modules", module_dirs["cpp"], "--output-dir", assembled_dir, fails=True
    )
    assert "no such module" in call(
        "evaluate", "--model", assembled_dir, "--data", "a=README.md", "--without", "law", fails=True
    )
    metadata = json.loads((assembled_dir / "assembled.json").read_text())
    for change, message in (
        ({"modules": ["../../cpp"]}, "outside"),
        ({"router": "magic"}, "magic"),
        ({"tuning": {}}, ""),
    ):
        copy = tmp_path / f"copy{message}"
        shutil.copytree(assembled_dir, copy)
        (copy / "assembled.json").write_text(
            json.dumps(metadata | change | ({"tuning": {"x": 1}} if not message else {}))
        )
        assert message in call("evaluate", "--model", copy, "--data", f"a={trunk}/config.json", fails=True)


def test_memory_does_not_grow_with_the_number_of_modules(tmp_path):
    """Of two and eight modules of 24 MiB: the peak of assembling, which reads one at a time, and the memory of the
    assembled model.
    """
    tokenizer, draw = byte_tokenizer(), torch.Generator().manual_seed(0)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=512,
        intermediate_size=1365 * 3,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=64,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    trunk = Trunk(config)
    sizes = {"unigrams": config.vocab_size, "bigrams": statistics.BIGRAM_BUCKETS}

    def counts():
        return {key: torch.randint(0, 90, (n,), generator=draw, dtype=torch.uint8) for key, n in sizes.items()}

    write_trunk(tmp_path / "trunk", trunk.state_dict(), config, tokenizer, {}, counts())
    _, _, trunk_metadata = read_trunk(str(tmp_path / "trunk"))
    folders = []
    for number in range(8):
        tensors = {
            name: torch.randn(tensor.shape, generator=draw) * 0.02
            for name, tensor in trunk.state_dict().items()
            if ".mlp." in name
        }
        metadata = {"kind": "ffn", "name": f"m{number}", "layers": [0], "trunk_digest": trunk_metadata["digest"]}
        metadata["tokenizer_digest"] = trunk_metadata["tokenizer_digest"]
        folders.append(tmp_path / f"m{number}")
        write_module(folders[-1], tensors, metadata, counts(), config)
    size = (folders[0] / "module.safetensors").stat().st_size
    assert size > 20 << 20
    code = (
        "import resource, sys\nfrom forge_common import assemble, command_line\nsys.argv[0] = 'assemble'\n"
        "assemble.main(command_line.read_settings(assemble.Settings, ''))\n"
        "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    )
    peaks = []
    for number in (2, 8):
        flags = (
            "--trunk",
            tmp_path / "trunk",
            "--modules",
            *folders[:number],
            "--output-dir",
            tmp_path / f"of-{number}",
        )
        peaks.append(int(run_code(code, *flags).split("peak ")[1]))
    assert peaks[1] - peaks[0] < size / 2, (peaks, size)
    loaded = [json.loads(run_code(LOADED, tmp_path / f"of-{number}")) for number in (2, 8)]
    for memory in loaded:
        assert memory["used"] == ["trunk", "m0"]
        assert memory["files"]["m0"] > size / 2
        assert all(memory["files"][name] == 0 for name in memory["files"].keys() - {"trunk", "m0"}), memory
    assert len(loaded[1]["files"]) == 9
    assert loaded[1]["anonymous"] - loaded[0]["anonymous"] < size / 2, loaded
