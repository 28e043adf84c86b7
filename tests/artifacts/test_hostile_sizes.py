"""Artifacts that ask for memory or time without bound: refused within a bound that is stated and measured."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import launch
import pytest
import specimens
from specimens import ONE, edit, header, spoiled

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
AMPLIFIED = {"type": "Replace", "pattern": {"String": "x"}, "content": "x" * 99}
BOUND = 320 << 20  # bytes more than a sound artifact of the same kind takes; a JSON of 8 MiB alone may become 200
SECONDS = 20  # for any one of them
MEASURE = """
import json, os, resource, sys, time
from pathlib import Path
import specimens
from forge_common.errors import UserError

def held():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

specimens.load(Path(sys.argv[1]) / "assembled")[1].nats(specimens.TOKENS)
mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + (4 << 30),) * 2)  # a failure does not bring the machine down
for place in sys.argv[2:]:
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        continue
    resource.setrlimit(resource.RLIMIT_CPU, (40, 40))  # nor does it take all night
    before, start, said = held(), time.monotonic(), None
    try:
        specimens.load(Path(place))
    except UserError as reason:
        said = str(reason)
    row = {"place": place, "said": said, "bytes": held() - before, "seconds": time.monotonic() - start}
    print(json.dumps(row), flush=True)
    os._exit(0)
"""


def sparse(path: Path, size: int, start: bytes = b"") -> None:
    with open(path, "wb") as file:
        file.write(start)
        file.truncate(size)


def of_layers(folder: Path, **sizes) -> None:
    (folder / "trunk" / "forge.json").unlink()
    edit(folder / "trunk" / "config.json", **sizes)


def many_tensors(path: Path, number: int) -> None:
    one = b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    path.write_bytes(header(b"{" + b",".join(one % index for index in range(number)) + b"}"))


def rewriting(folder: Path, **normalizer) -> None:
    (folder / "trunk" / "tokenizer.json").write_text(spoiled("normalizer", value=normalizer))


MIB = 1 << 20
HOSTILE = {
    "a header of 90 MiB": (
        "one",
        lambda f: sparse(f / "one/module.safetensors", 99 * MIB, struct.pack("<Q", 90 * MIB)),
    ),
    "a header of 2^63 bytes": ("trunk", lambda f: sparse(f / "trunk/model.safetensors", 99, struct.pack("<Q", 2**63))),
    "65,000 tensors": ("trunk", lambda f: many_tensors(f / "trunk/model.safetensors", 65_000)),
    "400,000 tensors": ("trunk", lambda f: many_tensors(f / "trunk/model.safetensors", 400_000)),
    "a tensor of 10 GiB of one byte each": (
        "one",
        lambda f: (f / "one/module.safetensors").write_bytes(
            header(ONE.join((b'{"a":', b"}")).replace(b"[1]", b"[9999999999]"))
        ),
    ),
    "a JSON of 2 GiB": ("trunk", lambda f: sparse(f / "trunk/config.json", 2 << 30)),
    "a tokenizer of 2 GiB": ("trunk", lambda f: sparse(f / "trunk/tokenizer.json", 2 << 30)),
    "8 MiB of empty lists": (
        "one",
        lambda f: (f / "one/module.json").write_text('{"a":[' + "[]," * 2_750_000 + "[]]}"),
    ),
    "8 MiB of brackets": ("assembled", lambda f: (f / "assembled/assembled.json").write_text("[" * (8 * MIB - 1))),
    "8 MiB of objects": ("one", lambda f: (f / "one/module.json").write_text('{"a":' * (3 * MIB // 2))),
    "10^9 layers": ("trunk", lambda f: of_layers(f, num_hidden_layers=10**9)),
    "65,536 layers": ("trunk", lambda f: of_layers(f, num_hidden_layers=65_536)),
    "65,536 experts": ("trunk", lambda f: of_layers(f, model_type="mixtral", num_local_experts=65_536)),
    "a width of 2^20": ("trunk", lambda f: of_layers(f, hidden_size=2**20, intermediate_size=2**20, vocab_size=2**24)),
    "a rank of 2^20": ("two", lambda f: edit(f / "two/module.json", rank=2**20, kind="lora+head")),
    "a module's width of 2^20": ("one", lambda f: edit(f / "one/module.json", width=2**20)),
    "900,000 layers of a module": ("two", lambda f: edit(f / "two/module.json", layers=list(range(900_000)))),
    "300,000 modules": (
        "assembled",
        lambda f: edit(f / "assembled/assembled.json", modules=[f"m{number}" for number in range(300_000)]),
    ),
    "200,000 files": (
        "trunk",
        lambda f: (f / "trunk/model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {f"t{n}": f"{n}.safetensors" for n in range(300_000)}})
        ),
    ),
    "a normalizer of 30 MiB": ("trunk", lambda f: rewriting(f, **AMPLIFIED | {"content": "x" * 30 * MIB})),
    "a normalizer of normalizers": ("trunk", lambda f: rewriting(f, type="Sequence", normalizers=[AMPLIFIED] * 30)),
    "a prefix of 30 MiB": ("trunk", lambda f: rewriting(f, type="Prepend", prepend="x" * 30 * MIB)),
    "an id of four billion": (
        "trunk",
        lambda f: (f / "trunk/tokenizer.json").write_text(spoiled("model", "vocab", "a", value=2**32 - 1)),
    ),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """name -> what loading it took; each in a fork of one process that has loaded the sound one."""
    folder = tmp_path_factory.mktemp("hostile")
    specimens.build(folder / "sound")
    places = {}
    for number, (name, (kind, spoil)) in enumerate(HOSTILE.items()):
        shutil.copytree(folder / "sound", folder / str(number))
        spoil(folder / str(number))
        places[str(folder / str(number) / kind)] = name
    paths = {"PYTHONPATH": os.pathsep.join((str(launch.ROOT), str(launch.ROOT / "tests")))}
    line = [sys.executable, "-c", MEASURE, str(folder / "sound"), *places]
    done = subprocess.run(line, env=launch.environment() | paths, text=True, capture_output=True, check=True)
    rows = [json.loads(text) for text in done.stdout.splitlines() if text.startswith('{"place"')]
    yield {places[row["place"]]: row for row in rows}
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", HOSTILE)
def test_memory_and_time_are_bounded(measured, name):
    """Peak memory over that of a sound load in the same process, and seconds; each of them is refused."""
    assert name in measured, "its process died"
    row = measured[name]
    print(f"{name}: {row['bytes'] >> 20} MiB, {row['seconds']:.2f} s: {row['said'] and row['said'][-120:]}")
    assert row["said"] is not None and row["place"] in row["said"] and len(row["said"]) < 2000
    assert row["bytes"] < BOUND and row["seconds"] < SECONDS
