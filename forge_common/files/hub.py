"""The Hugging Face hub: fetches the artifacts that a command line names as ORG/NAME or ORG/NAME@REVISION, and checks
who may upload.

Only the files that an artifact has are fetched: no pickles and no code. They are verified when they are read.
"""

import os
import sys
from functools import cache
from pathlib import Path

from ..errors import UserError
from .places import ASSEMBLED_FILES, MODULE_FILES, TRUNK_FILES, WEIGHT_FILES, hub_id, nearest, published

PATTERNS = (  # of the files of a trunk, a module or an assembled model
    *dict.fromkeys((*TRUNK_FILES, *WEIGHT_FILES, *MODULE_FILES, *ASSEMBLED_FILES)),
    *(f"trunk/{name}" for name in (*TRUNK_FILES, *WEIGHT_FILES)),
    *(f"modules/*/{name}" for name in MODULE_FILES),
)


def local_folder(place: str | Path, kind: str | None = "trunk", files: tuple[str, ...] = PATTERNS) -> Path:
    """The folder of an artifact: `place`, or that of the output directory of a run (`published`), or of a hub id, which
    is fetched.

    kind: trunk or module; None: an assembled model too. files: names or patterns of what is fetched of a hub id.
    UserError where there is no such folder and no such repository.
    """
    folder = published(Path(place), kind) if kind else Path(place)
    if folder.is_dir():
        return folder
    what = f"Name the folder of a {kind or 'model'}, or a hub id such as org/name or org/name@revision."
    if folder.exists():
        raise UserError(f"{place} is not a folder. {what}")
    repository = hub_id(str(place))
    if not repository:
        raise UserError(f"{place} is not there{nearest(str(place)) or '.'} {what}")
    return _fetched(*repository, files)


@cache
def _fetched(repository: str, revision: str | None, files: tuple[str, ...]) -> Path:
    """The hub is asked once: all that a process reads of a repository is of one commit."""
    from huggingface_hub import errors, snapshot_download

    place = f"{repository}@{revision}" if revision else repository
    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=list(files)))
    except errors.RevisionNotFoundError:
        raise UserError(
            f"{place} is no folder here, and {repository} on the hub has no revision {revision or 'main'}. Name a "
            "branch, a tag or a commit of it."
        ) from None
    except errors.GatedRepoError:
        raise UserError(
            f"{place} is no folder here, and {repository} on the hub is gated. Ask for access on its page, then log in "
            "with `hf auth login`."
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{place} is no folder here, and the hub has no repository {repository}, or it is private. Check the path "
            "or the hub id, or log in with `hf auth login`."
        ) from None
    except Exception as reason:  # noqa: BLE001 (the client and the network raise dozens of types without a common base)
        raise UserError(
            f"{place} is no folder here, and cannot be fetched from the hub ({in_a_line(reason)}). Check the path or "
            "the hub id, the network and HF_HUB_OFFLINE."
        ) from None
    if not folder.is_dir():
        raise UserError(f"{place} on the hub has no file of a trunk, a module or an assembled model. Name another one.")
    if os.environ.get("RANK", "0") == "0":
        print(f"fetched     {origin(folder)}", file=sys.stderr, flush=True)
    return folder


def origin(folder: Path) -> str | None:
    """ORG/NAME@COMMIT of a folder of the hub's cache, models--ORG--NAME/snapshots/COMMIT; None of another folder."""
    repository = folder.parent.parent.name
    if folder.parent.name != "snapshots" or not repository.startswith("models--"):
        return None
    return f"{repository.removeprefix('models--').replace('--', '/', 1)}@{folder.name}"


def origins(folders: dict[str, Path]) -> dict[str, str]:
    """The origin of each of these folders that the hub's cache has."""
    found = {name: origin(folder) for name, folder in folders.items()}
    return {name: place for name, place in found.items() if place}


def upload_problem(repository: str) -> str | None:
    """Why this machine cannot upload to a repository that exists, or that would be created; None where it can.

    Changes nothing.
    """
    from huggingface_hub import HfApi, errors, get_token

    identity = hub_id(repository)
    if not identity or identity[1]:
        return f"{repository} is not a hub id such as org/name, or a folder of the first part is here"
    if get_token() is None:
        return f"{repository}: there is no token of the hub; run `hf auth login`, or set HF_TOKEN"
    api = HfApi()
    try:
        account = api.whoami()
    except Exception as reason:  # noqa: BLE001 (as above)
        problem = f"the hub does not say whose token this is ({in_a_line(reason)})"
        return f"{repository}: {problem}; check HF_TOKEN and the network"
    try:
        api.auth_check(repository, write=True)
        return None
    except errors.RepositoryNotFoundError:  # then it must be possible to create it
        roles = {account["name"]: "admin"} | {org["name"]: org.get("roleInOrg") for org in account.get("orgs", ())}
        role = roles.get(repository.partition("/")[0])
        token = account.get("auth", {}).get("accessToken", {}).get("role")
        if role in (None, "read") or token == "read":
            return (
                f"{repository} does not exist, and the token of {account['name']} cannot create it; name a repository "
                f"of {', '.join(roles)}, with a token that may write"
            )
        return None
    except Exception as reason:  # noqa: BLE001 (as above)
        return f"{repository}: the token of {account['name']} cannot write to it ({in_a_line(reason)})"


def in_a_line(reason: Exception) -> str:
    """The beginning of an exception's text, for a message."""
    return " ".join(str(reason).split())[:300] or type(reason).__name__
