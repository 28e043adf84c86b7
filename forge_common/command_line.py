"""Reads the command line of a script or a command into its settings, and runs it with them.

Imports nothing heavy: a wrong flag is reported before torch is loaded.
"""

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from .config_file import BadConfig, expanded
from .errors import UserError
from .files.places import published
from .flags import flag_of, given_settings, unknown_flags
from .help import completion, grouped_help, program_name
from .settings import HUGE_PAGES, RunSettings, is_first_process, to_json

Settings = TypeVar("Settings")


def read_settings(
    kind: type[Settings], description: str | None, check: Callable[[Any], list[str]] = lambda settings: []
) -> Settings:
    """The command line as `kind`, a frozen dataclass. Flags override the settings of --config FILE, which override
    defaults.

    Ends the process (code 2) with every problem that `check` returns.
    """
    import tyro

    given_words = sys.argv[1:]
    program = program_name(Path(sys.argv[0]))
    if "--print-completion" in given_words:
        print(completion(program, kind), end="")
        raise SystemExit(0)
    try:
        words, file, notes = expanded([word for word in given_words if word != "--print-config"], kind)
    except BadConfig as error:
        _refuse([str(error)])
    unknown = unknown_flags(words, kind)
    if unknown:
        _refuse(unknown)
    with grouped_help(words, kind):
        settings = tyro.cli(
            kind,
            prog=program if program.endswith(".py") else f"python -m {program}",
            args=words,
            description=description,
            config=(tyro.conf.AvoidSubcommands,),
        )
    try:
        faults = check(settings)
    except PermissionError as error:
        faults = [f"{error.filename}: permission denied; check who may read it, or name another path"]
    if faults:
        _refuse(faults)
    if "--print-config" in given_words:
        import yaml

        print(yaml.safe_dump(to_json(settings), sort_keys=False, allow_unicode=True), end="")
        raise SystemExit(0)
    if is_first_process() and file:
        given = given_settings([word for word in given_words if not word.startswith("--config")])
        flags = f", but the flags {', '.join(map(flag_of, sorted(given)))}" if given else ""
        noted = "".join(f"; {note}" for note in notes)
        print(f"settings    of {file}{flags}{noted}; the rest are defaults", file=sys.stderr, flush=True)
    if is_first_process() and issubclass(kind, RunSettings):
        print(
            "loading     PyTorch and Accelerate, which takes some seconds; then the data, the plan, training",
            flush=True,
        )
    return settings


def _refuse(faults: list[str]) -> NoReturn:
    """Ends the process with a list of what is wrong."""
    lines = "\n".join(f"  - {fault}" for fault in faults)
    print(f"{Path(sys.argv[0]).name}: these settings are not valid:\n{lines}", file=sys.stderr)
    raise SystemExit(2)


def run_main(main: Callable[[Settings], int], settings: Settings) -> NoReturn:
    """Ends the process with main's code. A UserError or a denied permission is printed without a traceback (code 1)."""
    if _trains_lora(settings) and Path("/sys/kernel/mm/transparent_hugepage").exists():
        os.environ.setdefault(*HUGE_PAGES)  # torch reads it when it is imported, which `main` does
    gc.set_threshold(10_000, 100, 10)  # what is imported stays: to look through it each 700 objects took 0.3 of 1.6 s
    try:
        exit_code = main(settings)
        _leave_process_group()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr, flush=True)
        exit_code = 1
    except PermissionError as error:
        print(
            f"{Path(sys.argv[0]).name}: error: {error.filename or error}: permission denied. Check who may read and "
            "write it, or name another path.",
            file=sys.stderr,
            flush=True,
        )
        exit_code = 1
    except KeyboardInterrupt:  # Python still ends by the signal, so that a script around it ends too
        sys.excepthook = lambda *_: print(f"{Path(sys.argv[0]).name}: ended by Ctrl-C", file=sys.stderr, flush=True)
        raise
    raise SystemExit(exit_code)


def _trains_lora(settings: Any) -> bool:
    """Whether a module of kind lora is trained.

    --kind auto is lora on a trunk that train_shared.py did not make, so without forge.json, and not on a mixture of
    experts. Neither a mixture of experts nor a trunk on the hub is recognized before the trunk is read: a wrong answer
    changes only how much memory is needed.
    """
    kind = str(vars(settings).get("kind"))
    if kind == "auto":
        return not (published(Path(settings.trunk), "trunk") / "forge.json").exists()
    return "lora" in kind


def _leave_process_group() -> None:
    """Destroys the process group, after main's model is freed.

    Otherwise DDP's reducer may be the last owner of gloo's group. It destroys the group while it holds the GIL, for
    which gloo's thread may wait to free the tensors of the last collective: the process would never end.

    FSDP2's meshes, which DTensor's caches keep, and its model are owners too. Python would end while gloo's threads run,
    and abort the process where one of them frees such a tensor.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return
    distributed.destroy_process_group()
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        for owner in gc.get_objects():
            if type(owner) is distributed.device_mesh.DeviceMesh:  # isinstance would ask a dead weak proxy
                vars(owner).get("_pg_registry", {}).clear()  # torch has no function that does it
        gc.collect()  # the model, which refers to itself and to the group
