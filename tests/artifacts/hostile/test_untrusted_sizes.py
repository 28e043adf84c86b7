"""Artifacts that claim huge sizes: each is refused, and the memory and the time that it takes are measured."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import launch
import pytest
import small_artifacts
from small_artifacts import ONE, edit, header, tokenizer_with

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
REPLACE = {"type": "Replace", "pattern": {"String": "x"}, "content": "x" * 99}
BYTES = 320 << 20  # more than a valid artifact of the same kind takes at most; 8 MiB of JSON alone become up to 200 MiB
SECONDS = 20  # of processor time, for each of them at most
MEASURE = """
import json, os, resource, sys, time
from pathlib import Path
import small_artifacts
from forge_common.errors import UserError

def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

small_artifacts.load(Path(sys.argv[1]) / "assembled")[1].nats(small_artifacts.TOKENS)
mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + (4 << 30),) * 2)  # a failure must not take all memory
for place in sys.argv[2:]:
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        continue
    resource.setrlimit(resource.RLIMIT_CPU, (40, 40))  # or all the time
    before, start, message = peak_bytes(), time.process_time(), None
    try:
        small_artifacts.load(Path(place))
    except UserError as reason:
        message = str(reason)
    row = {"place": place, "message": message, "bytes": peak_bytes() - before, "seconds": time.process_time() - start}
    print(json.dumps(row), flush=True)
    os._exit(0)
"""


def sparse(path: Path, size: int, start: bytes = b"") -> None:
    with open(path, "wb") as file:
        file.write(start)
        file.truncate(size)


def with_config(folder: Path, **sizes) -> None:
    (folder / "trunk" / "forge.json").unlink()
    edit(folder / "trunk" / "config.json", **sizes)


def many_tensors(path: Path, number: int) -> None:
    one = b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    path.write_bytes(header(b"{" + b",".join(one % index for index in range(number)) + b"}"))


def with_normalizer(folder: Path, **normalizer) -> None:
    (folder / "trunk" / "tokenizer.json").write_text(tokenizer_with("normalizer", value=normalizer))


def with_normalizers(folder: Path, number: int) -> None:
    text = tokenizer_with("normalizer", value={"type": "Sequence", "normalizers": ["@@"]})
    many = ",".join(['{"type":"NFC"}'] * number)
    (folder / "trunk" / "tokenizer.json").write_text(text.replace('"@@"', many))


MIB = 1 << 20
HUGE = {
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
    "10^9 layers": ("trunk", lambda f: with_config(f, num_hidden_layers=10**9)),
    "65,536 layers": ("trunk", lambda f: with_config(f, num_hidden_layers=65_536)),
    "65,536 experts": ("trunk", lambda f: with_config(f, model_type="mixtral", num_local_experts=65_536)),
    "a width of 2^20": (
        "trunk",
        lambda f: with_config(f, hidden_size=2**20, intermediate_size=2**20, vocab_size=2**24),
    ),
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
    "a normalizer of 30 MiB": ("trunk", lambda f: with_normalizer(f, **REPLACE | {"content": "x" * 30 * MIB})),
    "a normalizer of normalizers": ("trunk", lambda f: with_normalizer(f, type="Sequence", normalizers=[REPLACE] * 30)),
    "a prefix of 30 MiB": ("trunk", lambda f: with_normalizer(f, type="Prepend", prepend="x" * 30 * MIB)),
    "3 million normalizers": ("trunk", lambda f: with_normalizers(f, 3_000_000)),
    "an id of four billion": (
        "trunk",
        lambda f: (f / "trunk/tokenizer.json").write_text(tokenizer_with("model", "vocab", "a", value=2**32 - 1)),
    ),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """name -> memory and time of loading it, each in a fork of a process that has loaded a valid one."""
    folder = tmp_path_factory.mktemp("hostile")
    small_artifacts.build(folder / "valid")
    places = {}
    for number, (name, (kind, damage)) in enumerate(HUGE.items()):
        shutil.copytree(folder / "valid", folder / str(number))
        damage(folder / str(number))
        places[str(folder / str(number) / kind)] = name
    paths = {"PYTHONPATH": os.pathsep.join((str(launch.ROOT), str(launch.ROOT / "tests")))}
    line = [sys.executable, "-c", MEASURE, str(folder / "valid"), *places]
    result = subprocess.run(line, env=launch.environment() | paths, text=True, capture_output=True, check=True)
    rows = [json.loads(text) for text in result.stdout.splitlines() if text.startswith('{"place"')]
    yield {places[row["place"]]: row for row in rows}
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", HUGE)
def test_memory_and_time_are_bounded(measured, name):
    """Peak memory is counted from that of a valid load in the same process."""
    assert name in measured, "the process that loaded it ended"
    row = measured[name]
    print(f"{name}: {row['bytes'] >> 20} MiB, {row['seconds']:.2f} s: {row['message'] and row['message'][-120:]}")
    assert row["message"] is not None and row["place"] in row["message"] and len(row["message"]) < 2000
    assert row["bytes"] < BYTES and row["seconds"] < SECONDS
