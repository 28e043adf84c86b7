"""W&B's account, server and processes."""

import http.client
import netrc
import os
import re
import ssl
import urllib.error
import urllib.request
from contextlib import suppress

PROBE = 3.0  # seconds for W&B's server to answer


def wandb_account() -> bool:
    """Whether a W&B key is configured, in the environment or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return "api.wandb.ai" in netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False


def without_password(text: str) -> str:
    """A text without the users and passwords of the URLs in it, also of one that an error message shortened by "..."."""
    return re.sub(r"//[^\s'\"]*(@|(?=\.\.\.))", "//", text)


def unreachable(url: str) -> str | None:
    """The reason why no server answers at `url` within PROBE seconds, or None where one does.

    A refused key, an unknown page or a certificate that Python does not trust counts as an answer, since W&B's client
    has its own key and certificates. 5xx counts as none.
    """
    try:
        urllib.request.urlopen(without_password(url), timeout=PROBE).close()
    except urllib.error.HTTPError as answer:
        return f"HTTP {answer.code}" if answer.code >= 500 else None
    except urllib.error.URLError as error:
        return None if isinstance(error.reason, ssl.SSLError) else str(error.reason)
    except (OSError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__
    return None


def end_wandb() -> None:
    """Ends W&B's processes, and removes its exit hooks, which would wait for them."""
    import wandb

    kill_wandb()
    with suppress(Exception, SystemExit):  # it fails for lack of its processes, after it has removed its hooks
        wandb.teardown()


def kill_wandb() -> None:
    """Kills W&B's processes, also suspended ones; they would keep this process's output open."""
    import psutil  # a dependency of accelerate

    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended
            if child.name().startswith("wandb-"):
                child.kill()
