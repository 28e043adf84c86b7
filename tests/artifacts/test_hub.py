"""Artifacts on the hub: a server on this machine, and processes with caches of their own."""

import json
import re
import shutil
from pathlib import Path

import hub_server
import launch
import pytest
import yaml

from forge_common.artifacts.upload import verified_files
from forge_common.errors import UserError

TRUNK = {"config.json", "forge.json", "model.safetensors", "statistics.safetensors", "tokenizer.json"}
TRUNK |= {"tokenizer_config.json", "README.md"}
MODULE = {"module.json", "module.safetensors", "statistics.safetensors", "README.md"}
BRIEF = ("--steps", 2, "--statistics-tokens", 1000)
READ = """
import os, sys
from forge_common.artifacts.module_folder import read_module_metadata
from forge_common.artifacts.trunk_folder import read_trunk
from forge_common.files.hub import local_folder
for place in sys.argv[1:]:
    try:
        folder = local_folder(place)
        read_trunk(str(folder)) if "trunk" in place else read_module_metadata(folder)
    except ValueError as reason:
        print(reason, flush=True)
"""
WRITE = """
import os, sys
from pathlib import Path
from forge_common.artifacts.trunk_folder import read_trunk
from forge_common.artifacts.upload import upload
from forge_common.files.hub import upload_problem
folder, module = map(Path, sys.argv[1:])
for token in ("wrong", "reader", "stranger", "writer"):
    os.environ["HF_TOKEN"] = token
    print("problem", [upload_problem(f"org/{name}") for name in ("cpp", "new")])
print("problem", [upload_problem(name) for name in ("no id", "else/new")])
(folder / "special_tokens_map.json").write_text("{}")
upload(folder, "org/two")
(folder / "special_tokens_map.json").unlink()
upload(folder, "org/two")
print("read", read_trunk("org/two@main")[2]["digest"])
(folder / "model.safetensors").write_bytes(b"damaged")
for place, repository in ((folder, "org/two"), (module, "org/trunk"), (module, "org/broken")):
    try:
        upload(place, repository)
    except ValueError as reason:
        print(reason)
"""


@pytest.fixture(scope="module")
def hub():
    server = hub_server.Hub()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def as_user(hub):
    """Runs `python ARGUMENTS` as a user of the hub whose cache is in the folder `home`; returns what it printed."""

    def run(home: Path, *arguments, token="writer", fails=False, **extra) -> str:
        of_hub = {"HF_HOME": str(home), "HF_TOKEN": token, "HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1"}
        of_hub |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "ACCELERATE_USE_CPU": "true"}
        return launch.run_python(*arguments, fails=fails, **of_hub | extra)

    return run


@pytest.fixture(scope="module")
def runs(hub, as_user, text, domain, cache, tmp_path_factory) -> Path:
    """The output directories trunk and cpp of runs that published org/trunk, which is also the revision v1, and org/cpp."""
    folder = tmp_path_factory.mktemp("runs")
    shared = ("--output-dir", folder / "trunk", "--data", text, "--cache-dir", cache, *launch.SHAPE, *launch.SIZES)
    as_user(folder / "one", launch.ROOT / "train_shared.py", *shared, *BRIEF, "--push-to-hub", "org/trunk")
    hub.repositories["org/trunk"].branches["v1"] = hub.commit_of("org/trunk")
    own = (
        "--output-dir",
        folder / "cpp",
        "--data",
        domain,
        "--cache-dir",
        cache,
        "--name",
        "cpp",
        "--general-tokens",
        0,
    )
    more = ("--trunk", "org/trunk@v1", "--licence", "MIT", "--push-to-hub", "org/cpp", *launch.SIZES)
    as_user(folder / "other", launch.ROOT / "train_module.py", *own, *more, *BRIEF)
    return folder


def front_matter(card: bytes) -> dict:
    """As the hub finds it."""
    found = re.match(r"---\n(.*?)\n---\n", card.decode(), re.DOTALL)
    assert found
    return yaml.safe_load(found[1])


def test_what_a_run_published_is_on_the_hub_and_nothing_else(hub, runs):
    for identity, folder, names in (("org/trunk", "trunk/trunk", TRUNK), ("org/cpp", "cpp/module", MODULE)):
        files = hub.files(identity)
        assert files.keys() == names
        for name, data in files.items():
            here = (runs / folder / name).read_bytes()
            assert data == (here if name != "README.md" else here.replace(b"ORG/NAME", identity.encode())), name


def test_a_module_names_its_trunk_and_says_how_it_was_made(hub, runs, domain):
    files = hub.files("org/cpp")
    metadata = json.loads(files["module.json"])
    place = f"org/trunk@{hub.commit_of('org/trunk', 'v1')}"
    assert metadata["origins"] == {"trunk": place}
    start = f"accelerate launch train_module.py --trunk org/trunk@v1 --name cpp --data {domain} --general-tokens 0 "
    assert metadata["command"].startswith(start)
    assert " --steps 2" in metadata["command"] and str(runs) not in metadata["command"]
    assert front_matter(files["README.md"]) == {
        "library_name": "forge",
        "pipeline_tag": "text-generation",
        "tags": ["forge"],
        "license": "mit",
        "base_model": ["org/trunk"],
        "base_model_relation": "adapter",
    }
    card = files["README.md"].decode()
    assert f"generate --model {place} --module org/cpp" in card and metadata["command"] in card
    assert '| "own" |' in card.partition("## Losses")[2]


def test_others_assemble_by_name_without_the_files_and_publish_in_turn(hub, runs, as_user, tmp_path):
    commit = hub.commit_of("org/cpp")
    hub.repositories["org/cpp"].commit("main", {})  # withdrawn; its commit is still there
    places = ("--trunk", "org/trunk@v1", "--modules", f"org/cpp@{commit}", "--output-dir", tmp_path / "all")
    as_user(tmp_path / "home", "-m", "forge_common.assemble", *places, token="stranger")
    hub.repositories["org/cpp"].branches["main"] = commit
    metadata = json.loads((tmp_path / "all" / "assembled.json").read_text())
    ours = [json.loads((runs / name).read_text()) for name in ("trunk/trunk/forge.json", "cpp/module/module.json")]
    assert list(metadata["digests"].values()) == [part["digest"] for part in ours]
    assert metadata["origins"] == {"trunk": f"org/trunk@{hub.commit_of('org/trunk')}", "cpp": f"org/cpp@{commit}"}
    push = (
        "-m",
        "forge_common.push",
        "--folder",
        tmp_path / "all",
        "--to",
        "else/all",
        "--private",
        "--revision",
        "next",
    )
    (tmp_path / "all" / "notes.txt").write_text("not a part of it")
    as_user(tmp_path / "home", *push, token="stranger")
    files = hub.files("else/all", "next")
    assert {name.rpartition("/")[0] for name in files} == {"", "trunk", "modules/cpp"} and "notes.txt" not in files
    assert hub.repositories["else/all"].private and not hub.files("else/all")
    assert front_matter(files["README.md"])["base_model"] == ["org/cpp", "org/trunk"]
    generate = ("-m", "forge_common.generate", "--model", "org/trunk@v1", "--module", f"org/cpp@{commit}")
    printed = as_user(tmp_path / "home", *generate, "--prompt", "int", "--max-new-tokens", 2, HF_HUB_OFFLINE="1")
    assert "int" in printed, "from the cache"


def test_a_trunk_of_the_hub_is_planned_for_without_its_weights(hub, runs, as_user, tmp_path):
    """From a cache of its own, in which afterwards there is config.json alone; the sizes are those of the run's own folder."""
    more = (
        "--devices",
        "1xL40S",
        "--engine",
        "one",
        "--sequence-length",
        64,
        "--batch-size",
        1,
        "--micro-batch-size",
        1,
    )
    plans = [
        as_user(tmp_path, "-m", "forge_common.plan", "--trunk", place, *more)
        for place in ("org/trunk@v1", runs / "trunk")
    ]
    sizes = [re.findall(r": ([\d,]+ parameters.*)", printed) for printed in plans]
    assert sizes[0] and sizes[0] == sizes[1]
    assert "org/trunk@v1: " in plans[0]
    fetched = tmp_path / "hub" / "models--org--trunk" / "snapshots" / hub.commit_of("org/trunk", "v1")
    assert [path.name for path in fetched.iterdir()] == ["config.json"]
    printed = as_user(tmp_path, "-m", "forge_common.plan", "--trunk", "org/trnk", *more, fails=True)
    assert "the hub has no repository org/trnk" in printed and "Traceback" not in printed


def test_what_cannot_be_fetched_or_is_damaged_is_one_message(hub, runs, as_user, tmp_path):
    for name in ("org/empty", "org/private", "org/damaged-trunk"):
        hub.repositories[name] = hub_server.Repository(private=name == "org/private")
    weights = hub.files("org/trunk")["model.safetensors"]
    other = weights[:-3] + bytes([weights[-3] ^ 1]) + weights[-2:]
    hub.large[hub_server.sha256(other)] = other
    foreign = {"pytorch_model.bin": b"", "modeling.py": b"", "original/consolidated.safetensors": b""}
    files = hub.files("org/trunk") | foreign | {"model.safetensors": other}
    commit = hub.repositories["org/damaged-trunk"].commit("main", files)
    hub.damaged.add(hub_server.sha256(weights))  # right size and name: only the digest in forge.json shows it
    script = tmp_path / "read.py"
    script.write_text(READ)
    zeros = "0" * 40
    expected = {
        "org/trunk@v9": "org/trunk@v9 is no folder here, and org/trunk on the hub has no revision v9. ",
        f"org/trunk@{zeros}": f"org/trunk@{zeros} is no folder here, and org/trunk on the hub has no revision {zeros}. ",
        "org/trnk": "org/trnk is no folder here, and the hub has no repository org/trnk, or it is private. ",
        "org/private": "org/private is no folder here, and the hub has no repository org/private, or it is private. ",
        "org/empty": "org/empty on the hub has no file of a trunk, a module or an assembled model. ",
        "tests/trnk": "tests/trnk is not there. Name the folder of a trunk, or a hub id",
        "org/../x": "org/../x is not there. ",
        "org/damaged-trunk": f"{tmp_path}/home/hub/models--org--damaged-trunk/",
        "org/trunk": f"{tmp_path}/home/hub/models--org--trunk/",
    }
    printed = as_user(tmp_path / "home", script, *expected, token="")
    hub.damaged.clear()
    lines = [line for line in printed.splitlines() if line and not line.startswith(("fetched", "No files matched"))]
    assert len(lines) == len(expected), printed
    assert [line[: len(start)] for line, start in zip(lines, expected.values(), strict=True)] == list(expected.values())
    assert all("the digest is" in line for line in lines[-2:])
    fetched = tmp_path / "home" / "hub" / "models--org--damaged-trunk" / "snapshots" / commit
    assert {path.name for path in fetched.iterdir()} == TRUNK
    nowhere = f"http://127.0.0.1:{launch.free_port()}"
    generate = ("-m", "forge_common.generate", "--model", "org/trunk", "--prompt", "int")
    printed = as_user(tmp_path / "new", *generate, fails=True, HF_ENDPOINT=nowhere)
    assert "org/trunk is no folder here, and cannot be fetched from the hub" in printed and "Traceback" not in printed


def test_a_run_that_cannot_publish_does_not_start(runs, as_user, tmp_path):
    own = ("--trunk", runs / "trunk", "--name", "x", "--data", runs, "--output-dir", tmp_path / "run")
    command = (launch.ROOT / "train_module.py", *own, "--push-to-hub", "org/x")
    printed = as_user(tmp_path / "home", *command, token="", fails=True)
    assert "--push-to-hub org/x: there is no token of the hub" in printed and "loading" not in printed
    assert not (tmp_path / "run").exists()


def test_uploads_replace_each_other_and_nothing_invalid_is_uploaded(hub, runs, as_user, tmp_path):
    script = tmp_path / "write.py"
    script.write_text(WRITE)
    hub.refused.add("/api/models/org/broken/commit/main")
    shutil.copytree(runs / "trunk" / "trunk", tmp_path / "two")
    printed = as_user(tmp_path / "home", script, tmp_path / "two", runs / "cpp").splitlines()
    problems = [line for line in printed if line.startswith("problem")]
    for line, parts in zip(
        problems,
        [
            ("whose token this is", "whose token this is"),
            ("org/cpp: the token of org cannot write", "org/new does not exist, and the token of org cannot create it"),
            (
                "org/cpp: the token of else cannot write",
                "org/new does not exist, and the token of else cannot create it",
            ),
            ("problem [None, None]",),
            ("no id is not a hub id", "else/new does not exist"),
        ],
        strict=True,
    ):
        assert all(part in line for part in parts), line
    commits = [re.findall(r"org/two@(\w+)", line)[0] for line in printed if line.startswith("uploaded")]
    files = [hub.repositories["org/two"].commits[commit] for commit in commits]
    assert [names.keys() - hub_server.INITIAL for names in files] == [TRUNK | {"special_tokens_map.json"}, TRUNK]
    digest = json.loads((tmp_path / "two" / "forge.json").read_text())["digest"]
    assert f"read {digest}" in printed and hub.commit_of("org/two") == commits[1]
    assert "two/model.safetensors is not a valid safetensors file" in printed[-3]
    assert "config.json, so it holds another kind of artifact" in printed[-2]
    again = f"python -m forge_common.push --folder {runs}/cpp/module --to org/broken"
    assert printed[-1].endswith(f"Upload it again: {again}") and not hub.files("org/broken")


def test_of_a_folder_that_is_no_artifact_nothing_is_uploaded_and_of_an_export_its_files(tmp_path):
    (tmp_path / "secrets.json").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is not what train_shared"):
        verified_files(tmp_path)
    (tmp_path / "README.md").write_text("card")
    (tmp_path / "modeling_forge.py").write_text("pass")
    assert set(verified_files(tmp_path)) == {"README.md", "config.json", "modeling_forge.py"}
    base = {"base_model_name_or_path": str(tmp_path)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(base))
    with pytest.raises(UserError, match="as the trunk, which is not on the hub"):
        verified_files(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(base | {"base_model_name_or_path": "org/trunk"}))
    assert "adapter_config.json" in verified_files(tmp_path)
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="is a link"):
        verified_files(tmp_path)
