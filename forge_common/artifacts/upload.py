"""Uploads an artifact to the Hugging Face hub: the files that it consists of and no others, in one commit."""

from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files.atomic import read_json
from ..files.hub import PATTERNS, in_a_line
from ..files.places import ASSEMBLED_FILES, EXPORT_FILES, MODULE_FILES, TRUNK_FILES, hub_id, published
from ..files.tensors import read_tensors, trunk_files, verify
from ..files.untrusted import read_bounded, without_links
from .assembled import read_assembled
from .card import HERE
from .module_folder import read_module, read_module_metadata
from .statistics_file import STATISTICS, read_statistics
from .trunk_folder import read_trunk

# The file of each kind of artifact that no other kind has; a repository holds one kind.
MARKERS = ("assembled.json", "module.json", "config.json", "adapter_config.json", "model.gguf")
# An export that has no forge.json has one of these.
EXPORTS = ("model.gguf", "adapter_config.json", "modeling_forge.py")


def upload(
    folder: Path,
    repository: str,
    print_line: Callable[[str], None] = print,
    *,
    private: bool = False,
    revision: str | None = None,
) -> None:
    """Verifies the artifact in a folder and uploads it as one commit.

    The repository and the branch `revision` are created if needed. Files in the repository that an earlier artifact had
    and this one has not are removed in the same commit. UserError, with nothing changed there, where the folder holds
    no valid artifact, the repository holds another kind of artifact, or the hub cannot be reached or refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    folder = published(published(folder, "trunk"), "module")
    files = verified_files(folder)
    api = HfApi()
    try:
        address = api.create_repo(repository, private=private or None, exist_ok=True)
        if revision:
            api.create_branch(repository, branch=revision, exist_ok=True)
        uploaded = api.list_repo_files(repository, revision=revision)
        marker = next((name for name in MARKERS if name in uploaded), None)
        if marker and marker not in files:
            raise UserError(f"it has {marker}, so it holds another kind of artifact. Name another repository.")
        ours = (*PATTERNS, *EXPORT_FILES)
        stale = [name for name in uploaded if name not in files and any(fnmatch(name, pattern) for pattern in ours)]
        card = read_bounded(folder / "README.md").decode("utf-8").replace(HERE, repository).encode()
        additions = [CommitOperationAdd(name, card if name == "README.md" else folder / name) for name in files]
        commit = api.create_commit(
            repository,
            [*additions, *(CommitOperationDelete(name) for name in stale)],
            commit_message=f"Upload {folder.name}",
            revision=revision,
        )
    except UserError as reason:
        raise UserError(f"{folder} was not uploaded to {repository}: {reason}") from None
    except Exception as reason:
        at = f" --revision {revision}" if revision else ""
        raise UserError(
            f"{folder} was not uploaded to {repository} ({in_a_line(reason)}). The folder is as it was. Upload it "
            f"again: python -m forge_common.push --folder {folder} --to {repository}{' --private' if private else ''}{at}"
        ) from reason
    print_line(f"uploaded    {len(files)} files to {address}; others name it {repository}@{commit.oid}")


def verified_files(folder: Path) -> list[str]:
    """The files, relative to the folder, of the artifact in it, which is read and verified.

    UserError where there is none.
    """
    without_links(folder)
    if (folder / "assembled.json").exists():
        _, _, metadata = read_assembled(str(folder))
        trunk = [f"trunk/{name}" for name in trunk_files(folder / "trunk")]
        modules = [f"modules/{name}/{file}" for name in metadata["modules"] for file in MODULE_FILES]
        names = [*ASSEMBLED_FILES, *trunk, *modules]
    elif (folder / "module.json").exists():
        metadata = read_module_metadata(folder)
        read_module(folder, {"digest": metadata["trunk_digest"], "tokenizer_digest": metadata["tokenizer_digest"]})
        if "statistics_digest" in metadata:
            path = folder / "statistics.safetensors"
            verify(path, read_tensors(path, STATISTICS), metadata, "statistics_digest", "module.json")
        names = list(MODULE_FILES)
    elif (folder / "forge.json").exists():
        trunk, _, metadata = read_trunk(str(folder))
        read_statistics(folder, metadata, trunk.config)
        names = trunk_files(folder)
    elif (folder / "README.md").is_file() and any((folder / name).exists() for name in EXPORTS):
        if (folder / "adapter_config.json").exists():
            _check_base(read_json(folder / "adapter_config.json"), folder)
        names = [*EXPORT_FILES, *TRUNK_FILES]
    else:
        raise UserError(
            f"{folder} is not what train_shared.py, train_module.py, assemble, merge or export publish. Name such a "
            "folder."
        )
    return [name for name in dict.fromkeys(names) if (folder / name).is_file()]


def _check_base(adapter: dict[str, Any], folder: Path) -> None:
    """Refuses an adapter whose model is a folder of this machine: nobody else has it, and its path may be private."""
    base = adapter.get("base_model_name_or_path")
    if not isinstance(base, str) or not hub_id(base):
        raise UserError(
            f"{folder}/adapter_config.json names {base!r} as the trunk, which is not on the hub. Upload the trunk, and "
            "export the adapter again with --model org/name."
        )
