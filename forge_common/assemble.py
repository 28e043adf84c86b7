"""Assembles a trunk and modules that were trained separately into one model, which routes every token by itself.

    python -m forge_common.assemble --trunk runs/trunk/trunk --modules runs/law/module runs/code/module --output-dir runs/all
    python -m forge_common.assemble --model runs/all --add runs/perl/module --replace runs/law-2/module --remove code

Nothing is trained. The new folder holds verified copies of all parts. The order of --modules does not matter. With
--model, an assembled model is changed in place: its folder is exchanged for a complete new one.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .command_line import read_settings, run_main
from .errors import UserError
from .files.hub import local_folder
from .files.places import ASSEMBLED_FILES, check_mixture, check_outside, unused_weight
from .files.untrusted import without_links
from .routing.tuning import ROUTERS
from .settings import ReadingSettings

FILES = (*ASSEMBLED_FILES, "trunk", "modules")  # of an assembled model


@dataclass(frozen=True)
class Settings(ReadingSettings):
    trunk: str | None = None
    """Trunk: folder or hub id (org/name or org/name@revision)."""
    modules: tuple[Path, ...] = ()
    """Modules of this trunk: folders or hub ids."""
    output_dir: Path | None = None
    """New folder for the assembled model."""
    without: tuple[str, ...] = ()
    """Names of modules in --modules to leave out."""

    # -- an assembled model that is changed in place --
    model: Path | None = None
    """Assembled model to change, instead of --trunk, --modules and --output-dir."""
    add: tuple[Path, ...] = ()
    """Modules to add: folders or hub ids."""
    replace: tuple[Path, ...] = ()
    """Modules (folders or hub ids) that replace those of the same names."""
    remove: tuple[str, ...] = ()
    """Names of modules to remove."""

    # -- router --
    router: str | None = None
    """Router: a name in ROUTERS of forge_common/routing/tuning.py. None: context, or the router of --model."""
    top_k: int | None = None
    """Candidates (trunk, modules) that serve a token; 0: all, weighted; 1: the cost of one. None: 0, or --model's."""
    trunk_data: tuple[str, ...] = ()
    """Sources of text like the trunk's, for the statistics of a trunk that has none. None: local:docs, a general text."""
    calibrate: tuple[str, ...] = ()
    """Sources of a little text of all domains, without labels, to fit the router's numbers on."""
    calibrate_tokens: int = 16_384
    """Tokens of --calibrate at most, all sources together."""

    # -- checks --
    allow_copies: bool = False
    """Accept modules that have the same statistics as another one or the trunk, or nearly the same: of one text, or copied."""
    allow_worse: bool = False
    """Accept modules whose loss on text that their own counts call likely is far above the trunk's."""
    check_data: tuple[str, ...] = ()
    """NAME=SOURCE: text of the domain of the module NAME, to measure again the loss that it claims."""


def main(settings: Settings) -> int:
    _check(settings)
    # Heavy imports come after the settings were checked, so that a wrong flag is reported at once.
    from .artifacts.assembled import check_top_k
    from .artifacts.assembled_folder import Plan, write_assembled
    from .artifacts.metadata import read_metadata
    from .files.atomic import publish

    before: dict[str, Any] = {}
    if settings.model:
        folder = settings.model.resolve()  # a link would be exchanged itself
        before = read_metadata(folder / "assembled.json")
        trunk = folder / "trunk"
        modules = _modules_after_change(settings, folder, before["modules"])
    else:
        assert settings.trunk and settings.output_dir
        folder = settings.output_dir
        trunk = local_folder(settings.trunk)
        modules = _modules_of_new_model(settings)
        check_outside(folder, (trunk, *modules.values()))
    check_top_k(settings.top_k, len(modules))
    router = settings.router or before.get("router", "context")
    top_k = before.get("top_k", 0) if settings.top_k is None else settings.top_k
    plan = Plan(trunk, modules, router, top_k, before)

    def write(temp_dir: Path) -> None:
        write_assembled(temp_dir, plan, settings)
        if before and read_metadata(folder / "assembled.json") != before:
            raise UserError(f"{folder} was changed by another process meanwhile. Run the same command again.")

    def read_back(temp_dir: Path) -> None:  # write_assembled has read the parts back, one at a time
        read_metadata(temp_dir / "assembled.json")

    publish(folder, write, read_back)
    version = f", version {before.get('version', 1) + 1}" if before else ""
    print(f"assembled   {settings.model or folder}{version}: the trunk and {', '.join(modules)}; router {router}")
    return 0


def _check(settings: Settings) -> None:
    """Refuses flags that contradict each other, before anything is loaded."""
    new = {"--trunk": settings.trunk, "--modules": settings.modules, "--output-dir": settings.output_dir}
    changes = {"--add": settings.add, "--replace": settings.replace, "--remove": settings.remove}
    if settings.model:
        wrong = [flag for flag, value in (new | {"--without": settings.without}).items() if value]
        if wrong or not any(changes.values()):
            hint = f"leave out {', '.join(wrong)}, and " if wrong else ""
            raise UserError(f"--model changes an assembled model: {hint}give --add, --replace or --remove.")
        if not (settings.model / "assembled.json").is_file():
            raise UserError(f"--model {settings.model} is not an assembled model. Name a folder with assembled.json.")
        others = sorted(path.name for path in settings.model.iterdir() if path.name not in FILES)
        if others:
            raise UserError(f"{settings.model} also holds {', '.join(others)}, which would be lost. Move it elsewhere.")
    else:
        wrong = [flag for flag, value in changes.items() if value]
        missing = [flag for flag, value in new.items() if not value]
        if wrong or missing:
            reason = f"{', '.join(wrong)} changes the model of --model" if wrong else f"{', '.join(missing)} is missing"
            raise UserError(f"{reason}. Give --trunk, --modules and --output-dir, or --model and what to change in it.")
    if settings.router is not None and settings.router not in ROUTERS:
        raise UserError(f"--router {settings.router} is not a router. Choose one of {', '.join(ROUTERS)}.")
    if settings.output_dir and settings.output_dir.exists():
        raise UserError(f"--output-dir {settings.output_dir} exists. Name a new folder.")
    if (settings.top_k or 0) < 0:
        raise UserError(f"--top-k is {settings.top_k}. Give the number of candidates that serve a token, or 0 for all.")
    if settings.calibrate_tokens < 2:
        raise UserError(f"--calibrate-tokens is {settings.calibrate_tokens}. Give at least 2.")
    check_mixture("--trunk-data", settings.trunk_data)
    check_mixture("--calibrate", settings.calibrate)
    for text in settings.check_data:
        problem = unused_weight(text.partition("=")[2])
        if problem:
            raise UserError(f"--check-data {problem}")


def _folders_by_name(folders: Iterable[Path]) -> dict[str, Path]:
    """The folders of modules by the modules' names. UserError where two have the same name."""
    from .artifacts.module_folder import read_module_metadata

    modules: dict[str, Path] = {}
    for folder in (local_folder(place, "module") for place in folders):
        if folder in modules.values():
            raise UserError(f"{folder} is given twice. Name it once.")
        name = read_module_metadata(folder)["name"]
        for other, other_dir in modules.items():
            if other.lower() == name.lower():  # one folder on a file system that ignores case
                raise UserError(
                    f"{folder} and {other_dir} are both called {name}. Train one of them under another name."
                )
        modules[name] = folder
    return modules


def _modules_of_new_model(settings: Settings) -> dict[str, Path]:
    """The folders of --modules by name, sorted, without those of --without."""
    from .artifacts.metadata import leave_out

    modules = _folders_by_name(settings.modules)
    names = leave_out(sorted(modules), settings.without, "--modules")
    if not names:
        raise UserError("no module is left to assemble. Name one in --modules that is not in --without.")
    return {name: modules[name] for name in names}


def _modules_after_change(settings: Settings, model: Path, names: list[str]) -> dict[str, Path]:
    """The modules' folders by name, sorted, after --remove, --replace and --add. names: of the modules before them."""
    modules = {name: without_links(model / "modules") / name for name in names}
    for name in settings.remove:
        if settings.remove.count(name) > 1:
            raise UserError(f"--remove {name} is given twice. Name it once.")
        if modules.pop(name, None) is None:
            raise UserError(f"--remove {name}: no such module. Choose among those of {model}: {', '.join(names)}.")
    new = _folders_by_name((*settings.add, *settings.replace))
    replacing = _folders_by_name(settings.replace)
    for name, folder in new.items():
        same = [other for other in modules if other.lower() == name.lower()]
        if name in replacing and name not in same:
            raise UserError(f"--replace {folder}: {model} has no module called {name}. Use --add.")
        if name not in replacing and same:
            raise UserError(f"--add {folder}: {model} has a module called {same[0]}. Use --replace.")
    modules |= new
    if not modules:
        raise UserError(f"no module would be left in {model}. Leave one out of --remove.")
    return {name: modules[name] for name in sorted(modules)}


if __name__ == "__main__":
    run_main(main, read_settings(Settings, __doc__))
