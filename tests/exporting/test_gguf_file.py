"""GGUF files, read back by Transformers, by the gguf package and by llama.cpp. They need the packages of requirements-pretrained.txt."""

import dataclasses
from pathlib import Path

import pytest
import small_artifacts
import torch
from tokenizers import Regex, pre_tokenizers, processors

from forge_common import export
from forge_common.artifacts.module_folder import write_module
from forge_common.artifacts.trunk_folder import read_trunk, write_trunk
from forge_common.data.tokenizer import Tokenizer, byte_tokenizer, train_tokenizer
from forge_common.exporting import gguf_file, llama_cpp, proof
from forge_common.model.modules import plug_in
from forge_common.model.trunk import Trunk

SMALL = dataclasses.replace(
    small_artifacts.CONFIG, vocab_size=300, hidden_size=16, num_attention_heads=4, num_key_value_heads=2, head_dim=4
)
PLAIN = dataclasses.replace(SMALL, rope_scaling=None, initializer_range=0.3)
LINEAR = {"rope_type": "linear", "factor": 2.0}
CONFIGS = {
    "llama": PLAIN,
    "llama3": dataclasses.replace(SMALL, initializer_range=0.3, tie_word_embeddings=False),
    "qwen2": dataclasses.replace(PLAIN, qkv_bias=True, tie_word_embeddings=False),
    "qwen3": dataclasses.replace(PLAIN, qk_norm=True, head_dim=8),
    "mistral": dataclasses.replace(PLAIN, family="mistral", sliding_window=400, max_position_embeddings=500),
}
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
SPLITTERS = {
    name: [pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES] for pattern, name in gguf_file.SPLITS.items()
}
SPLITTERS["smollm"] = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
SPLITTERS["gpt-2"] = [pre_tokenizers.ByteLevel(add_prefix_space=False)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(proof.texts().values(), 300)


def trunk(folder: Path, config, tokenizer: Tokenizer) -> Path:
    torch.manual_seed(0)
    write_trunk(folder, Trunk(config).state_dict(), config, tokenizer, {})
    return folder


@pytest.mark.parametrize("family", CONFIGS)
def test_a_trunk_as_gguf_gives_the_same_logits_and_tokens(tmp_path, tokenizer, family):
    gguf = pytest.importorskip("gguf")
    folder = trunk(tmp_path / "trunk", CONFIGS[family], tokenizer)
    export.main(export.Settings(str(folder), "gguf", tmp_path / "out"))
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields[f"{fields['general.architecture']}.context_length"] == (400 if family == "mistral" else 64)
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert fields["tokenizer.ggml.tokens"][2:6] == [tokenizer.backend.id_to_token(number) for number in range(2, 6)]
    assert ("rope_freqs.weight" in [tensor.name for tensor in reader.tensors]) == (family == "llama3")


@pytest.mark.parametrize("family", CONFIGS)
def test_llama_cpp_gives_the_same_logits(tmp_path, tokenizer, family):
    pytest.importorskip("gguf")
    pytest.importorskip(llama_cpp.PACKAGE)
    folder = trunk(tmp_path / "trunk", CONFIGS[family], tokenizer)
    export.main(export.Settings(str(folder), "gguf", tmp_path / "out"))
    expected = proof.expect(read_trunk(str(folder))[0], tokenizer, spliced=False)
    largest = llama_cpp.difference(tmp_path / "out" / gguf_file.FILE, expected, tokenizer)
    print(f"{family}: {largest:.1e} in llama.cpp")
    assert largest < 1e-5


@pytest.mark.parametrize("rule", SPLITTERS)
def test_llama_cpp_splits_text_by_each_rule_as_the_tokenizer_does(tmp_path, rule):
    """Among its merges are those of numbers, which the rules split in different ways."""
    pytest.importorskip("gguf")
    pytest.importorskip(llama_cpp.PACKAGE)
    tokenizer = train_tokenizer([*proof.texts().values(), " 1999 2001-2002 " * 2000], 400)
    tokenizer.backend.pre_tokenizer = pre_tokenizers.Sequence(SPLITTERS[rule])
    tokenizer = dataclasses.replace(tokenizer)  # with the digest of the changed one
    folder = trunk(tmp_path / "trunk", dataclasses.replace(PLAIN, vocab_size=400), tokenizer)
    assert gguf_file._split(tokenizer) == rule
    export.main(export.Settings(str(folder), "gguf", tmp_path / "out"))


def test_llama_cpp_begins_a_text_with_the_bos_of_the_tokenizer(tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    pytest.importorskip(llama_cpp.PACKAGE)
    tokenizer = train_tokenizer(proof.texts().values(), 300)
    eos = tokenizer.backend.id_to_token(tokenizer.eos_token_id)
    tokenizer.backend.post_processor = processors.TemplateProcessing(
        single=f"{eos} $A", special_tokens=[(eos, tokenizer.eos_token_id)]
    )
    tokenizer = dataclasses.replace(tokenizer)
    assert tokenizer.prefix == (tokenizer.eos_token_id,)
    folder = trunk(tmp_path / "trunk", PLAIN, tokenizer)
    export.main(export.Settings(str(folder), "gguf", tmp_path / "out"))
    add = gguf.GGUFWriter.add_add_bos_token
    monkeypatch.setattr(gguf.GGUFWriter, "add_add_bos_token", lambda writer, value: add(writer, not value))
    message = small_artifacts.refused(export.main, export.Settings(str(folder), "gguf", tmp_path / "wrong"))
    assert "llama.cpp makes other tokens" in message


def test_a_wrong_name_of_the_rule_is_refused_by_llama_cpp(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    pytest.importorskip(llama_cpp.PACKAGE)
    tokenizer = train_tokenizer([*proof.texts().values(), " 1999 2001-2002 " * 2000], 400)
    folder = trunk(tmp_path / "trunk", dataclasses.replace(PLAIN, vocab_size=400), tokenizer)
    monkeypatch.setattr(gguf_file, "_split", lambda tokenizer: "smollm")
    message = small_artifacts.refused(export.main, export.Settings(str(folder), "gguf", tmp_path / "out"))
    assert "llama.cpp makes other tokens" in message
    assert [path.name for path in tmp_path.iterdir()] == ["trunk"]


def test_what_only_llama_cpp_reads_is_refused_where_it_is_wrong(tmp_path, tokenizer, monkeypatch):
    gguf = pytest.importorskip("gguf")
    pytest.importorskip(llama_cpp.PACKAGE)
    folder = trunk(tmp_path / "trunk", CONFIGS["llama3"], tokenizer)
    add = gguf.GGUFWriter.add_tensor

    def wrong(writer, name, tensor):
        add(writer, name, tensor[::-1].copy() if name == "rope_freqs.weight" else tensor)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", wrong)
    message = small_artifacts.refused(export.main, export.Settings(str(folder), "gguf", tmp_path / "out"))
    assert "other logits" in message
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    export.main(export.Settings(str(folder), "gguf", tmp_path / "out"))


def test_without_llama_cpp_the_command_says_that_it_was_not_compared_with(tmp_path, tokenizer, monkeypatch, capsys):
    pytest.importorskip("gguf")
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    folder = trunk(tmp_path / "trunk", PLAIN, tokenizer)
    export.main(export.Settings(str(folder), "gguf", tmp_path / "out"))
    assert "llama.cpp   not compared with: pip install cyllama" in capsys.readouterr().out


def test_a_merged_module_as_gguf(tmp_path, tokenizer):
    pytest.importorskip("gguf")
    folder = trunk(tmp_path / "trunk", PLAIN, tokenizer)
    _, _, metadata = read_trunk(str(folder))
    plain = Trunk(PLAIN)
    names = plug_in(plain, "narrow+head", [1], width=5)
    tensors = {name: torch.randn_like(plain.state_dict()[name]) * 0.3 for name in names}
    described = {"name": "one", "kind": "narrow+head", "layers": [1], "width": 5, "trunk_digest": metadata["digest"]}
    described["tokenizer_digest"] = metadata["tokenizer_digest"]
    counts = {name: codes for name, codes in small_artifacts.counts(1, moments=False).items() if name == "bigrams"}
    counts["unigrams"] = torch.zeros(300, dtype=torch.uint8)
    write_module(tmp_path / "one", tensors, described, counts, PLAIN)
    export.main(export.Settings(str(folder), "gguf", tmp_path / "out", tmp_path / "one"))
    assert (tmp_path / "out" / "model.gguf").stat().st_size > 4 * 300 * 16


def test_a_matrix_that_is_written_wrong_is_refused_and_leaves_nothing(tmp_path, tokenizer, monkeypatch):
    gguf = pytest.importorskip("gguf")
    folder = trunk(tmp_path / "trunk", PLAIN, tokenizer)
    add = gguf.GGUFWriter.add_tensor

    def wrong(writer, name, tensor):
        add(writer, name, tensor[::-1].copy() if name == "blk.0.attn_q.weight" else tensor)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", wrong)
    message = small_artifacts.refused(export.main, export.Settings(str(folder), "gguf", tmp_path / "out"))
    assert "nothing was written" in message
    assert [path.name for path in tmp_path.iterdir()] == ["trunk"]


def test_a_family_that_is_not_written_is_refused_by_name(tmp_path, tokenizer):
    pytest.importorskip("gguf")
    changes = {"olmo2": {"family": "olmo2", "qk_norm": True}, "linear": {"rope_scaling": LINEAR}}
    for name, change in (changes | {"gemma": {"family": "gemma"}}).items():
        folder = trunk(tmp_path / name, dataclasses.replace(PLAIN, **change), tokenizer)
        message = small_artifacts.refused(export.main, export.Settings(str(folder), "gguf", tmp_path / "out"))
        assert f"a {name}" in message or f"the rope_type {name}" in message
        assert ("table in float16" in message) == (name == "gemma")


def test_llama_cpp_rounds_the_gelu_of_a_gemma(tmp_path, tokenizer, monkeypatch):
    """Why a Gemma is refused: the file that llama.cpp's converter would write gives other logits. If not, it can be written."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip(llama_cpp.PACKAGE)
    add = gguf.GGUFWriter.add_tensor

    def with_norms_of_llama_cpp(writer, name, tensor):
        add(writer, name, tensor + 1 if "norm" in name else tensor)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", with_norms_of_llama_cpp)
    monkeypatch.setitem(gguf_file.ARCHITECTURES, "gemma", "gemma")
    torch.manual_seed(0)
    gemma = Trunk(dataclasses.replace(PLAIN, family="gemma"))
    differences = []
    for feed_forward in (1, 0):  # without it there is no GELU
        for layer in gemma.model.layers:
            layer.mlp.down_proj.weight.data *= feed_forward
        gguf_file.write(tmp_path, "gemma", gemma, tokenizer, None)
        expected = proof.expect(gemma, tokenizer, spliced=False)
        differences.append(llama_cpp.difference(tmp_path / gguf_file.FILE, expected, tokenizer))
    print("gemma: {:.1e} in llama.cpp, {:.1e} without feed-forwards".format(*differences))
    assert differences[0] > proof.LIMIT and differences[1] < 1e-5


def test_a_tokenizer_that_the_format_cannot_name_is_refused(tokenizer):
    assert "no merges" in small_artifacts.refused(gguf_file._split, byte_tokenizer())
    assert gguf_file._split(tokenizer) == "gpt-2"
