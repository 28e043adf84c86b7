"""Pages to look at, made again from what runs wrote: python -m forge_common.report runs/trunk

Of a run: its report.html. Of several (runs/*), a page with all of them beside each other. Of a file of evaluate --json:
its page.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import tyro

from .command_line import read_settings, run_main
from .errors import UserError
from .files.atomic import read_json, write_text
from .files.places import check_output


@dataclass(frozen=True)
class Settings:
    paths: tyro.conf.Positional[tuple[Path, ...]]
    """Output directories of runs, or one file of evaluate --json. Of several paths those that are no runs are skipped."""
    output: Path | None = None
    """File to write. None: report.html in the run, beside several runs, or beside the JSON file under its name."""


def main(settings: Settings) -> int:
    from .reporting.model_page import model_page
    from .reporting.runs import is_run, read_run, run_page, runs_page

    check_output("--output", settings.output)
    paths = settings.paths
    if not paths:
        raise UserError("no path is given. Name an output directory, such as runs/trunk, or several.")
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist. Name an output directory of a run, or a file of evaluate --json.")
    if len(paths) == 1 and paths[0].is_file():
        content = read_json(paths[0])
        if not isinstance(content.get("rows"), list):
            raise UserError(f"{paths[0]} has no `rows`: it is no file of evaluate --json.")
        output = settings.output or paths[0].with_suffix(".html")
        text = model_page(str(paths[0]), content["rows"], content.get("tokens") or {})
    elif len(paths) == 1:
        output = settings.output or paths[0] / "report.html"
        text = run_page(read_run(paths[0]))
    else:
        folders = [path for path in paths if is_run(path)]
        for path in paths:
            if path not in folders:
                print(f"skipped     {path}: no metrics.jsonl")
        if not folders:
            raise UserError("none of the paths has a metrics.jsonl. Name output directories of runs.")
        output = settings.output or Path(os.path.commonpath([path.parent for path in folders])) / "report.html"
        text = runs_page([read_run(folder) for folder in folders])
    write_text(output, text)
    print(f"written     {output}")
    return 0


if __name__ == "__main__":
    run_main(main, read_settings(Settings, __doc__))
