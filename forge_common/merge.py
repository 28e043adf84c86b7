"""Merges a module into its trunk and writes a Transformers checkpoint.

python -m forge_common.merge --trunk DIR --module DIR --output-dir DIR
"""

from dataclasses import dataclass
from pathlib import Path

from .command_line import read_settings, run_main
from .errors import UserError
from .files.places import check_artifacts, check_outside, published


@dataclass(frozen=True)
class Settings:
    trunk: str
    """Trunk: folder or hub id (org/name or org/name@revision)."""
    module: Path
    """Module of this trunk: folder or hub id."""
    output_dir: Path
    """New folder, which AutoModelForCausalLM loads."""


def main(settings: Settings) -> int:
    check_artifacts([("--trunk", settings.trunk), ("--module", settings.module)])
    if settings.output_dir.exists():
        raise UserError(f"--output-dir {settings.output_dir} exists. Name a new folder.")
    parts = (published(Path(settings.trunk), "trunk"), published(settings.module, "module"))
    check_outside(settings.output_dir, parts)
    from .artifacts.metadata import merged_metadata
    from .artifacts.module_folder import read_model
    from .artifacts.trial import check_trial
    from .artifacts.trunk_folder import write_trunk
    from .files.hub import local_folder, origins
    from .model.modules import fold

    trunk, tokenizer, trunk_metadata, module = read_model(settings.trunk, settings.module)
    assert module is not None
    fold(trunk)
    check_trial(trunk, settings.module)
    places = {"trunk": local_folder(settings.trunk), module["name"]: local_folder(settings.module, "module")}
    metadata = merged_metadata(trunk_metadata, module, origins(places))
    digest = write_trunk(settings.output_dir, trunk.state_dict(), trunk.config, tokenizer, metadata)
    print(f"published   {settings.output_dir} (digest {digest[:12]})")
    return 0


if __name__ == "__main__":
    run_main(main, read_settings(Settings, __doc__))
