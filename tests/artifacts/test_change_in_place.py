"""`assemble --model` changes an assembled model in place: what results equals a new one, and a kill leaves the old or
the new one.
"""

import dataclasses
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from small_artifacts import CONFIG, TOKENS, assembling, counts, edit, load, refused

from forge_common import assemble
from forge_common.artifacts import assembled, assembled_folder
from forge_common.artifacts.module_folder import write_module
from forge_common.files import atomic

PARTS = ("trunk/model.safetensors", "modules/two/module.safetensors", "modules/two/statistics.safetensors")


@pytest.fixture
def root(root):
    """With two more modules: `third`, and another version of `one` in the folder `again`."""
    metadata = json.loads((root / "one" / "module.json").read_text())
    described = {key: metadata[key] for key in ("kind", "layers", "width", "rank", "trunk_digest", "tokenizer_digest")}
    torch.manual_seed(3)
    for folder, name in (("third", "third"), ("again", "one")):
        tensors = {
            key: torch.randn_like(tensor) * 0.1
            for key, tensor in load_file(root / "one" / "module.safetensors").items()
        }
        write_module(root / folder, tensors, described | {"name": name}, counts(ord(folder[0])), CONFIG)
    return root


def change(root, **how):
    """Settings that change root/assembled."""
    return assemble.Settings(model=root / "assembled", **how)


def read(folder) -> dict:
    return json.loads((folder / "assembled.json").read_text())


def equal_to_new(root, folders) -> None:
    """The changed model is the one that is assembled at once of the modules in these folders."""
    new = assemble.Settings(str(root / "trunk"), tuple(root / name for name in folders), root / "fresh")
    assert assemble.main(new) == 0
    differing = {"version", "history"}
    one, other = read(root / "assembled"), read(root / "fresh")
    assert {k: v for k, v in one.items() if k not in differing} == {
        k: v for k, v in other.items() if k not in differing
    }
    models = [assembled.read_assembled(str(folder))[0] for folder in (root / "assembled", root / "fresh")]
    assert torch.equal(models[0].nats(TOKENS), models[1].nats(TOKENS))
    files = [sorted(str(p.relative_to(f)) for p in f.rglob("*")) for f in (root / "assembled", root / "fresh")]
    assert files[0] == files[1]
    assert not list(root.glob(".*"))
    shutil.rmtree(root / "fresh")


def test_a_changed_model_equals_a_new_one(root):
    first = read(root / "assembled")
    digests = {
        name: json.loads((root / name / "module.json").read_text())["digest"] for name in ("one", "third", "again")
    }
    assert first["version"] == 1 and len(first["history"]) == 3  # the trunk and two modules
    assert assemble.main(change(root, add=(root / "third",))) == 0
    equal_to_new(root, ("one", "two", "third"))
    assert assemble.main(change(root, replace=(root / "again",))) == 0
    equal_to_new(root, ("again", "two", "third"))
    assert assemble.main(change(root, remove=("two",))) == 0
    equal_to_new(root, ("again", "third"))
    last = read(root / "assembled")
    assert last["version"] == 4
    assert last["history"] == [
        *first["history"],
        f"version 2: added third {digests['third']}",
        f"version 3: replaced one {digests['one']} by {digests['again']}",
        f"version 4: removed two {first['digests']['two']}",
    ]


def test_several_changes_at_once_equal_a_new_assembly(root):
    assert assemble.main(change(root, add=(root / "third",), replace=(root / "again",), remove=("two",))) == 0
    equal_to_new(root, ("again", "third"))
    assert read(root / "assembled")["version"] == 2 and len(read(root / "assembled")["history"]) == 6


def test_what_stays_is_linked_and_not_copied(root):
    before = {part: (root / "assembled" / part).stat().st_ino for part in PARTS}
    assert assemble.main(change(root, replace=(root / "again",))) == 0
    assert {part: (root / "assembled" / part).stat().st_ino for part in PARTS} == before
    other = (root / "again" / "module.safetensors").stat()
    assert (root / "assembled" / "modules" / "one" / "module.safetensors").stat().st_ino != other.st_ino


def test_the_routers_numbers_and_counts_stay(root, text, cache):
    """The router, top-k, fitted numbers and --trunk-data of a model are kept, unless the change names others."""
    shutil.rmtree(root / "assembled")
    how = {"trunk_data": (str(text),), "cache_dir": cache, "top_k": 2}
    settings = dataclasses.replace(assembling(root, **how), output_dir=root / "assembled")
    assert assemble.main(settings) == 0
    tuning = read(root / "assembled")["tuning"] | {"temperature": 0.125}
    edit(root / "assembled" / "assembled.json", tuning=tuning)
    before = read(root / "assembled")
    assert assemble.main(change(root, add=(root / "third",))) == 0
    after = read(root / "assembled")
    for key in ("router", "top_k", "tuning", "statistics_digest"):
        assert after[key] == before[key]
    load(root / "assembled")
    assert assemble.main(change(root, remove=("third",), router="uniform", top_k=0)) == 0
    assert (read(root / "assembled")["router"], read(root / "assembled")["top_k"]) == ("uniform", 0)


def test_a_model_of_an_earlier_version_can_be_changed(root):
    metadata = read(root / "assembled")
    for key in ("version", "history", "licences"):
        del metadata[key]
    (root / "assembled" / "assembled.json").write_text(json.dumps(metadata))
    assert assemble.main(change(root, remove=("two",))) == 0
    assert read(root / "assembled")["version"] == 2 and len(read(root / "assembled")["history"]) == 1


def test_wrong_changes_are_refused_and_change_nothing(root):
    before = contents(root)

    def message(**how) -> str:
        return refused(assemble.main, change(root, **how))

    assert "has a module called one. Use --replace" in message(add=(root / "again",))
    assert "has no module called third. Use --add" in message(replace=(root / "third",))
    assert "--remove law: no such module" in message(remove=("law",))
    assert "--remove one is given twice. Name it once" in message(remove=("one", "one"))
    assert "--top-k 5 exceeds the 4 candidates" in message(add=(root / "third",), top_k=5)
    assert "no module would be left" in message(remove=("one", "two"))
    assert "both called one" in message(replace=(root / "one", root / "again"))
    assert "--trunk" in message(trunk="x", add=(root / "third",))
    assert "give --add, --replace or --remove" in message()
    assert "--add changes the model of --model" in refused(
        assemble.main, dataclasses.replace(assembling(root), add=(root / "third",))
    )
    assert "--trunk, --modules, --output-dir is missing" in refused(assemble.main, assemble.Settings())
    assert "is not an assembled model" in refused(
        assemble.main, assemble.Settings(model=root / "trunk", remove=("one",))
    )
    assert contents(root) == before
    (root / "assembled" / "notes.txt").write_text("mine")
    assert "also holds notes.txt" in message(remove=("one",))


def contents(folder) -> dict:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_part_that_is_not_what_was_assembled_is_refused(root):
    """It is valid by itself, and would be published with its own digest."""
    shutil.rmtree(root / "assembled" / "modules" / "one")
    shutil.copytree(root / "again", root / "assembled" / "modules" / "one")
    assert "is not what was assembled" in refused(assemble.main, change(root, add=(root / "third",)))


def test_a_change_by_another_process_is_not_lost(root, monkeypatch):
    write = assembled_folder.write_assembled

    def meanwhile(*arguments):
        write(*arguments)
        edit(root / "assembled" / "assembled.json", version=9)

    monkeypatch.setattr(assembled_folder, "write_assembled", meanwhile)
    assert "was changed by another process" in refused(assemble.main, change(root, add=(root / "third",)))
    assert read(root / "assembled")["version"] == 9


def die_at(number: int) -> None:
    """Ends this process before the call `number` of those that change what a folder holds."""
    calls = iter(range(10_000))

    def counted(call):
        def counting(*arguments, **named):
            if next(calls) == number:
                os._exit(9)
            return call(*arguments, **named)

        return counting

    for name in ("link", "mkdir", "rename", "replace", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    atomic._exchange = counted(atomic._exchange)


def test_a_kill_before_every_call_leaves_the_old_or_the_new_model(root, tmp_path):
    old = read(root / "assembled")
    seen = []
    for number in range(1000):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(root / "assembled", copy / "assembled")
        child = os.fork()
        if not child:
            torch.set_num_threads(1)
            die_at(number)
            assemble.main(assemble.Settings(model=copy / "assembled", replace=(root / "again",), remove=("two",)))
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        load(copy / "assembled")  # every digest is verified
        version = read(copy / "assembled")["version"]
        assert read(copy / "assembled") == old if version == 1 else version == 2
        seen.append(version)
        if not code:
            break
    assert code == 0 and number > 10 and seen == sorted(seen) and set(seen) == {1, 2}


def test_a_link_to_a_model_stays_a_link(root):
    (root / "link").symlink_to(root / "assembled")
    assert assemble.main(assemble.Settings(model=root / "link", remove=("two",))) == 0
    assert (root / "link").is_symlink() and read(root / "assembled")["modules"] == ["one"]
    assert not list(root.glob(".*"))
