"""What routing costs: an assembled model with all gates and with one candidate a token, beside its trunk.

    python benchmarks/routing_cost.py --model runs/growth/assembled --text held-out.txt [--rounds 15] [--modules 1 16 64]
    python benchmarks/routing_cost.py --random 512 8 16384

Each round measures the processor time of all three: of scoring (Mixture.nats, a batch of windows), one after the other,
and of generation (Mixture.next_logits with a cache, on the same text for all), token by token in turn. A ratio is the
median of the ratios in each round, (min-max). --random measures a trunk with random weights (width, layers, vocabulary)
and two modules on text that is drawn from their counts. --modules also measures the memory of that many copies of the
first module, in new processes. Set OMP_NUM_THREADS=1: the processor time of more threads includes their waiting.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from script_process import BIN, ROOT, run, spread

sys.path.insert(0, str(ROOT))

from forge_common.artifacts.assembled import read_assembled
from forge_common.model.config import ModelConfig
from forge_common.model.modules import plug_in
from forge_common.model.trunk import Trunk
from forge_common.routing.mixture import Mixture, with_module
from forge_common.routing.routers import ContextRouter
from forge_common.routing.statistics import count
from forge_common.routing.tuning import Tuning

TOP_K = {"all gates": 0, "top-1": 1}
DOCUMENT = 600  # tokens of a document of random text
MEMORY = """
import json, sys, torch
from forge_common.artifacts.assembled import read_assembled
def resident():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.endswith(" kB")}
    return {"resident": sizes["Rss"], "anonymous": sizes["Anonymous"]}
before = resident()
model, _, _ = read_assembled(sys.argv[1], top_k=1)
opened = resident()
model.eval().nats(torch.randint(2, model.config.vocab_size, (4, 65), generator=torch.Generator().manual_seed(0)))
for state, now in (("opened", opened), ("scored", resident())):
    print(json.dumps({f"{state}, {kind}": now[kind] - before[kind] for kind in now}))
"""


@dataclass(frozen=True)
class Settings:
    model: Path | None = None
    """Assembled model."""
    text: Path | None = None
    """Text that is scored and generated."""
    random: tuple[int, int, int] | None = None
    """Width, layers and vocabulary of a trunk with random weights, instead of --model."""
    modules: tuple[int, ...] = ()
    """Numbers of modules whose memory is measured."""
    rounds: int = 15
    windows: int = 8
    """Windows that are scored at once."""
    window: int = 256
    """Tokens of a window."""
    prompt: int = 64
    """Tokens before the generated ones."""
    generated: int = 32
    """Tokens that are passed one by one after the prompt."""


def read(settings: Settings) -> tuple[Mixture, torch.Tensor]:
    """The assembled model and the ids of the text."""
    assert settings.model and settings.text
    model, tokenizer, _ = read_assembled(str(settings.model))
    return model, torch.tensor(tokenizer.encode_batch([settings.text.read_text(encoding="utf-8")])[0])


def draw(width: int, layers: int, vocabulary: int) -> tuple[Mixture, torch.Tensor]:
    """A trunk with random weights and two modules of kind ffn+head, and text whose documents are of either module."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": width * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
    }
    config = ModelConfig(vocab_size=vocabulary, max_position_embeddings=1024, eos_token_id=1, pad_token_id=0, **sizes)
    trunk = Trunk(config).eval()
    with torch.device("meta"):
        names = plug_in(Trunk(config), "ffn+head", list(range(layers)))
    frequent = 1 / torch.arange(1, vocabulary - 1)  # Zipf's law
    frequencies = [frequent[torch.randperm(len(frequent))] for _ in range(3)]
    modules = {}
    for name in ("one", "two"):
        values = {key: value for key, value in trunk.state_dict().items() if key in names}
        values |= {"lm_head.weight": trunk.head.detach()}
        tensors = {key: value + 0.01 * torch.randn_like(value) for key, value in values.items()}
        modules[name] = with_module(trunk, tensors, "ffn+head", list(range(layers))).eval()

    def documents(frequencies: torch.Tensor, number: int) -> list[torch.Tensor]:
        drawn = 2 + torch.multinomial(frequencies, number * DOCUMENT, replacement=True).view(number, DOCUMENT)
        drawn[:, -1] = 1
        return list(drawn)

    counts = [count([one.numpy() for one in documents(each, 400)], vocabulary, 1, 2)[0] for each in frequencies]
    router = ContextRouter(counts, torch.full((3,), 1 / 3), 1, Tuning())
    pairs = zip(documents(frequencies[1], 8), documents(frequencies[2], 8), strict=True)
    return Mixture(trunk, modules, router), torch.cat([document for pair in pairs for document in pair])


def scoring(model_of: Callable[[str], Any], names: list[str], windows: torch.Tensor) -> dict[str, float]:
    """Seconds of processor time of each model."""
    seconds = {}
    for name in names:
        model, started = model_of(name), time.process_time()
        model.nats(windows)
        seconds[name] = time.process_time() - started
    return seconds


def generation(model_of: Callable[[str], Any], names: list[str], ids: torch.Tensor, prompt: int) -> dict[str, float]:
    """Seconds of processor time of each model to pass ids [1, T] one by one after the first `prompt`, which are not timed.

    The models take turns with every token, so that what else the machine does is the same for all.
    """
    caches: dict[str, list[Any]] = {name: [] for name in names}
    for name in names:
        model_of(name).next_logits(ids[:, :prompt], caches[name])
    seconds = dict.fromkeys(names, 0.0)
    for t in range(prompt, ids.shape[1]):
        for name in names if t % 2 else names[::-1]:
            model, started = model_of(name), time.process_time()
            model.next_logits(ids[:, t : t + 1], caches[name])
            seconds[name] += time.process_time() - started
    return seconds


def measure(settings: Settings, mixture: Mixture, ids: torch.Tensor) -> None:
    """Prints ms a token and the ratios to the trunk."""
    mixture.eval()

    def model_of(name: str) -> Any:
        mixture.top_k = TOP_K.get(name, 0)
        return mixture.candidates[0] if name == "trunk" else mixture

    names = ["trunk", *TOP_K]
    length = settings.window + 1
    windows = ids[: len(ids) // length * length].view(-1, length)
    windows = windows[:: max(1, len(windows) // settings.windows)][: settings.windows]
    one = ids[None, : settings.prompt + settings.generated]
    works = {
        "scoring": (windows[:, 1:].numel(), lambda: scoring(model_of, names, windows)),
        "generation": (settings.generated, lambda: generation(model_of, names, one, settings.prompt)),
    }
    for work, (tokens, call) in works.items():
        call()  # a warm-up
        rounds = [call() for _ in range(settings.rounds)]
        for name in names:
            values = [1000 * seconds[name] / tokens for seconds in rounds]
            ratios = [seconds[name] / seconds["trunk"] for seconds in rounds]
            print(f"{work:<11} {name:<10} {spread(values)} ms a token, {spread(ratios)} of the trunk's")


def memory(settings: Settings, number: int, folder: Path) -> None:
    """Prints the memory that a model of so many copies of the first module takes in a new process, MiB, and its files' size."""
    assert settings.model
    python = [str(BIN / "python")]
    script = str(ROOT / "benchmarks" / "growth_modules.py")
    trunk = settings.model / "trunk"
    module = sorted((settings.model / "modules").iterdir())[0]
    log = folder / "log.txt"
    copies = ("--trunk", trunk, "--module", module, "--number", number, "--output-dir", folder / "copies")
    run(python, script, "copy", *copies, log=log, threads=1)
    modules = [folder / "copies" / f"m{index}" for index in range(number)]
    parts = ("--trunk", trunk, "--modules", *modules, "--output-dir", folder / "model", "--result", folder / "result")
    run(python, script, "assemble", *parts, log=log, threads=1)
    run(python, "-c", MEMORY, folder / "model", log=log, threads=1)
    sizes: dict[str, float] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        sizes |= json.loads(line)
    files = {
        kind: sum(path.stat().st_size for path in modules_of(folder, kind)) / 2**20 for kind in ("module", "statistics")
    }
    shown = "; ".join(f"{name} {size:.1f}" for name, size in (sizes | files).items())
    print(f"{number} modules, MiB: {shown}")


def modules_of(folder: Path, kind: str) -> list[Path]:
    return list(folder.glob(f"model/modules/*/{kind}.safetensors"))


def main(settings: Settings) -> None:
    if settings.random:
        measure(settings, *draw(*settings.random))
        return
    measure(settings, *read(settings))
    for number in settings.modules:
        with tempfile.TemporaryDirectory() as folder:
            memory(settings, number, Path(folder))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
