"""Uploads a trunk, a module, an assembled model or an export to the Hugging Face hub, where others use it by name.

    python -m forge_common.push --folder runs/law/module --to org/law

The token is that of `hf auth login` or HF_TOKEN. Only the artifact's own files are uploaded, after they were verified.
docs/guides/SHARING.md.
"""

from dataclasses import dataclass
from pathlib import Path

from .command_line import read_settings, run_main
from .errors import UserError


@dataclass(frozen=True)
class Settings:
    folder: Path
    """Artifact: the folder of a trunk, a module, an assembled model or an export, or the output directory of a training run."""
    to: str
    """Repository of the hub, such as org/name. It is created if it does not exist."""
    private: bool = False
    """Create it as a private one. An existing repository stays as it is."""
    revision: str | None = None
    """Branch to upload to, which is created if it does not exist; None: main."""


def main(settings: Settings) -> int:
    from .files.hub import upload_problem

    if not settings.folder.is_dir():
        raise UserError(f"--folder {settings.folder} is not a folder. Name that of an artifact.")
    if problem := upload_problem(settings.to):
        raise UserError(f"--to {problem}.")
    from .artifacts.upload import upload

    upload(settings.folder, settings.to, private=settings.private, revision=settings.revision)
    return 0


if __name__ == "__main__":
    run_main(main, read_settings(Settings, __doc__))
