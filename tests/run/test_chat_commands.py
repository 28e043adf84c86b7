"""Training on conversations, and talking with what was trained, in real processes: a trunk, a merged module, an assembled model."""

import io
import json
import subprocess
import sys
from types import SimpleNamespace

import chats
import launch
import pytest
import torch
from small_artifacts import CONFIG, assembling, refused
from transformers import AutoModelForCausalLM, AutoTokenizer

from forge_common import assemble, generate, merge
from forge_common.artifacts.assembled import read_assembled
from forge_common.artifacts.trunk_folder import read_trunk
from forge_common.generation.sampling import sample

SHAPE = [value for value in launch.SHAPE if value not in ("--tokenizer", "bytes")]
TURNS = ("What is 3 + 4?", "And the fox?")
SYSTEM = "Be the fox."


@pytest.fixture(scope="module")
def chat_rows(tmp_path_factory):
    return chats.write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", chats.rows(150))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, chat_rows, cache):
    """A run on conversations with all its checkpoints, and a module trained on its trunk: output directories."""
    folder = tmp_path_factory.mktemp("trained")
    tokenizer = chats.tokenizer(folder / "tokenizer")
    flags = ("--data", chat_rows, "--cache-dir", cache, *launch.SIZES, "--batch-size", 16)
    more = ("--tokenizer", tokenizer, *SHAPE, "--steps", 12, "--save-every", 1, "--keep", 100, "--val-every", 5)
    shared = folder / "shared"

    def train(output):
        return launch.run("train_shared.py", *flags, *more, "--output-dir", output)

    printed = train(shared)
    module = ("--trunk", shared / "trunk", "--name", "fox", "--steps", 2, "--general-tokens", 0)
    launch.run("train_module.py", *flags, *module, "--output-dir", folder / "fox")
    return SimpleNamespace(folder=folder, shared=shared, trunk=shared / "trunk", train=train, printed=printed)


def test_a_run_on_conversations_resumes_to_the_same_bits(trained):
    rows = launch.rows(trained.shared, "val/loss")
    tokens = json.loads((trained.trunk / "forge.json").read_text())["tokens_seen"]
    assert 0 < tokens < 12 * 16 * 64 / 2, "the answers are less than half of the text"
    assert rows[-1]["val/loss"] < rows[0]["val/loss"]
    resumed = trained.folder / "resumed"
    launch.copy_until(trained.shared, resumed, 5)
    assert "resumed" in trained.train(resumed)
    launch.same_run(trained.shared, resumed)


@pytest.fixture(scope="module")
def parts(trained):
    """The folders of what a chat is tried with: a trunk, one with a merged module, an assembled model."""
    modules = ("--trunk", trained.trunk, "--output-dir")
    merged, assembled = trained.folder / "merged", trained.folder / "assembled"
    launch.run_python("-m", "forge_common.merge", *modules, merged, "--module", trained.folder / "fox" / "module")
    launch.run_python(
        "-m",
        "forge_common.assemble",
        *modules,
        assembled,
        "--allow-copies",
        "--modules",
        trained.folder / "fox" / "module",
    )
    return {"trunk": trained.trunk, "merged": merged, "assembled": assembled}


def test_the_template_is_kept_and_verified(trained, parts, tmp_path):
    for folder in (parts["trunk"], parts["merged"], parts["assembled"] / "trunk"):
        assert AutoTokenizer.from_pretrained(folder).chat_template == chats.CHATML
        _, tokenizer, metadata = read_trunk(str(folder))
        assert tokenizer.chat is not None and metadata["chat_template_digest"] == tokenizer.chat.digest
        assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [1, 4]
    continued = ("--trunk-from", parts["merged"], "--steps", 2, "--cache-dir", tmp_path / "cache", *launch.SIZES)
    text = chats.write_rows(tmp_path / "rows.jsonl", chats.rows(150))
    launch.run("train_shared.py", *continued, "--data", text, "--batch-size", 16, "--output-dir", tmp_path / "on")
    assert AutoTokenizer.from_pretrained(tmp_path / "on" / "trunk").chat_template == chats.CHATML
    config = tmp_path / "on" / "trunk" / "tokenizer_config.json"
    config.write_text(config.read_text().replace("im_start", "im_end"))
    generate = ("--model", tmp_path / "on" / "trunk", "--chat", "--prompt", "x")
    assert "chat_template_digest" in launch.run_python("-m", "forge_common.generate", *generate, fails=True)


def answers_of_transformers(folder):
    """The greedy answers of Transformers' generate to TURNS."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    conversation = [{"role": "system", "content": SYSTEM}]
    answers = []
    for turn in TURNS:
        conversation.append({"role": "user", "content": turn})
        ids = tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, return_dict=False, return_tensors="pt"
        )
        found = model.generate(ids, do_sample=False, max_new_tokens=9, attention_mask=torch.ones_like(ids))
        answers.append(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))
        conversation.append({"role": "assistant", "content": answers[-1]})
    return answers


def test_a_chat_gives_the_answers_of_transformers(parts):
    """Two turns through a pipe; the second one uses the keys and values of the first."""
    line = [sys.executable, "-m", "forge_common.generate", "--model", str(parts["trunk"]), "--chat", "--system", SYSTEM]
    line += ["--temperature", "0", "--max-new-tokens", "9"]
    how = {"cwd": launch.ROOT, "env": launch.environment(), "text": True, "timeout": launch.PATIENCE}
    done = subprocess.run(line, input="\n".join(TURNS) + "\n", capture_output=True, check=True, **how)
    answers = answers_of_transformers(parts["trunk"])
    assert done.stdout == "".join(f"> {turn}\n{answer}\n" for turn, answer in zip(TURNS, answers, strict=True))


def test_an_assembled_model_chats(parts, tmp_path):
    path = tmp_path / "turns.txt"
    path.write_text("\n".join(TURNS) + "\n")
    line = ("-m", "forge_common.generate", "--model", parts["assembled"], "--chat", "--temperature", 0)
    printed = launch.run_python(*line, "--prompt-file", path, "--max-new-tokens", 9, "--show-routing")
    assert [text for text in printed.splitlines() if text.startswith("> ")] == [f"> {turn}" for turn in TURNS]
    assert printed.count("heads ") >= 2
    model, tokenizer, _ = read_assembled(str(parts["assembled"]))
    settings = SimpleNamespace(temperature=0, max_new_tokens=9)
    generator = torch.Generator()
    ids = tokenizer.encode_batch([chats.FOX])[0]
    cache = []
    first = list(sample(model, ids, settings, generator, cache))
    longer = [*ids, *first, *ids]
    assert cache[0][0].shape[1] == len(ids) + len(first) - 1
    reused = list(sample(model, longer, settings, generator, cache))
    assert cache[0][0].shape[1] == len(longer) + len(reused) - 1
    assert reused == list(sample(model, longer, settings, generator, []))
    other = list(sample(model, ids[3:], settings, generator, cache))
    assert other == list(sample(model, ids[3:], settings, generator))


def test_prompts_from_a_file_and_the_flag_at_fault(parts, tmp_path, capsys):
    def printed(**settings):
        generate.main(generate.Settings(model=str(parts["trunk"]), **settings))
        return capsys.readouterr().out

    lines, strings = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_text("The fox\n\nThe dog\n")
    strings.write_text('"The fox"\n"The dog"\n')
    alone = [printed(prompt=(text,), max_new_tokens=3) for text in ("The fox", "The dog")]
    assert printed(prompt=("The fox", "The dog"), max_new_tokens=3) == "\n".join(alone)
    for file in (lines, strings):
        assert printed(prompt_file=file, max_new_tokens=3) == "\n".join(alone)
    strings.write_text('"The fox"\nThe dog\n')
    assert "prompts.jsonl:2: the line is not a JSON string" in refused(printed, prompt_file=strings)
    assert "missing.txt cannot be read" in refused(printed, prompt_file=tmp_path / "missing.txt")
    for name, value in {"temperature": -1.0, "top_p": 0.0, "max_new_tokens": 0}.items():
        message = refused(printed, prompt=("x",), **{name: value})
        assert message.startswith(f"--{name.replace('_', '-')} is {value}. ") and message.count("--") == 1
    assert "at least 1e-06" in refused(printed, prompt=("x",), temperature=1e-42)
    assert "nothing to continue" in refused(printed)
    assert "--system" in refused(printed, prompt=("x",), system="y")


def test_a_prompt_longer_than_the_context_leaves_room_for_the_text(root, capsys):
    """Of a longer prompt the end is used, at least half of the context; one that fits is used as it is."""
    context = CONFIG.max_position_embeddings

    def printed(prompt, max_new_tokens):
        how = {"temperature": 0.0, "max_new_tokens": max_new_tokens}
        generate.main(generate.Settings(model=str(root / "trunk"), prompt=(prompt,), **how))
        return capsys.readouterr()

    def greedy(prompt, max_new_tokens):
        model, tokenizer, _ = read_trunk(str(root / "trunk"))
        settings = SimpleNamespace(temperature=0, max_new_tokens=max_new_tokens)
        return list(sample(model, tokenizer.encode_prompt(prompt), settings, torch.Generator()))

    for length, max_new_tokens, used in ((context, 9, context - 9), (500, 1000, context // 2), (context - 4, 9, None)):
        prompt = ("abcdefghij" * 99)[-length:]
        end = prompt if used is None else prompt[-used:]
        assert greedy(prompt, max_new_tokens) == greedy(end, max_new_tokens)
        assert len(greedy(prompt, max_new_tokens)) == min(max_new_tokens, context - len(end))
        found = printed(prompt, max_new_tokens)
        assert (f"only the last {used} tokens" in found.err) == (used is not None)
        assert ("context of 64 tokens is full" in found.err) == (len(end) + max_new_tokens > context)


def test_text_that_is_not_utf8_is_one_message(valid_artifacts, tmp_path, monkeypatch, parts):
    def message(model=valid_artifacts / "trunk", **settings):
        return refused(generate.main, generate.Settings(model=str(model), **settings))

    strings = tmp_path / "prompts.jsonl"
    strings.write_text('"x"\n"\\ud800"\n')
    assert "--prompt is not UTF-8" in message(prompt=("h\udce9llo",))
    assert "--system is not UTF-8" in message(prompt=("x",), chat=True, system="\udce9")
    assert "prompts.jsonl:2 is not UTF-8" in message(prompt_file=strings)
    for errors in ("strict", "surrogateescape"):  # as in a UTF-8 locale, and as in C or POSIX
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"h\xe9llo\n"), encoding="utf-8", errors=errors))
        assert "standard input is not UTF-8" in message(parts["trunk"], chat=True)
    strings.with_suffix(".txt").write_bytes("\ufeffThe fox\n".encode())
    settings = generate.Settings(model="x", prompt_file=strings.with_suffix(".txt"))
    assert generate.read_prompts(settings) == ["The fox"]


def test_assemble_and_merge_keep_a_template_in_a_file_of_its_own(root):
    (root / "trunk" / "chat_template.jinja").write_text(chats.CHATML)
    assemble.main(assembling(root))
    merge.main(merge.Settings(str(root / "trunk"), root / "one", root / "merged"))
    for folder in (root / "new" / "assembled" / "trunk", root / "merged"):
        chat = read_trunk(str(folder))[1].chat
        assert chat is not None and chat.source == chats.CHATML


def test_a_model_without_a_template_cannot_chat(valid_artifacts):
    settings = generate.Settings(model=str(valid_artifacts / "assembled"), chat=True, prompt=("x",))
    assert "assembled has no chat template" in refused(generate.main, settings)


@pytest.mark.parametrize("place", ["missing", "tests/missing", "/missing/too"])
def test_a_model_that_is_not_there_is_one_message(place, monkeypatch):
    monkeypatch.chdir(launch.ROOT)
    settings = generate.Settings(model=place, prompt=("x",), without=("cpp",))
    assert refused(generate.main, settings).startswith(f"--model {place} is not there")


def test_what_is_not_a_trunk_is_named(root):
    """A module or an assembled model in the place of a trunk, and a checkpoint without its tokenizer."""
    for name, problem in (("one", "is a module, not a trunk"), ("new/assembled", "is an assembled model, not a trunk")):
        if name == "new/assembled":
            assemble.main(assembling(root))
        settings = merge.Settings(str(root / name), root / "one", root / "merged")
        assert f"{root / name} {problem}" in refused(merge.main, settings)
    (root / "trunk" / "tokenizer.json").unlink()
    message = refused(generate.main, generate.Settings(model=str(root / "trunk"), prompt=("x",)))
    assert message.startswith(f"{root}/trunk has no tokenizer.json. ") and "--" not in message
