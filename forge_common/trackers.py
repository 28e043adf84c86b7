"""Accelerate's trackers (W&B, trackio, TensorBoard), kept at arm's length: none may cost a run more than seconds.

The training thread never calls a tracker. It hands rows to a thread of their own, and waits for it once, at the end.
"""

import http.client
import importlib.util
import netrc
import os
import queue
import ssl
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import UserError

LIMIT = 10.0  # seconds that a tracker may cost a run, altogether, at its end
WAIT = 7.0  # of them, to take what was handed over
UPLOAD = 5.0  # of these, for W&B to send what it has not sent yet; it keeps the rest for `wandb sync`
UNWIND = 1.0  # of LIMIT, for the thread of a tracker that was given up to come back
LEAVING = LIMIT - WAIT - UNWIND  # what is left for hooks at the process's exit
STUCK = 60.0  # seconds after which a call that does not come back is given up; training does not wait for it
PROBE = 3.0  # seconds for W&B's server to answer at all


def wandb_account() -> bool:
    """Whether W&B would find a key: in the environment or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return "api.wandb.ai" in netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False


def choose(tracker: str) -> tuple[str | None, str]:
    """--tracker -> (what accelerate logs with, or None; a line that says so). Puts W&B offline where nobody has a key."""
    if tracker == "auto":
        if not wandb_account():
            return None, "metrics.jsonl alone (no W&B account is configured; --tracker wandb records offline)"
        tracker = "wandb"
    if tracker == "none":
        return None, "metrics.jsonl alone"
    if importlib.util.find_spec(tracker) is None:
        raise UserError(f"--tracker {tracker}: the package is not installed. pip install {tracker}, or --tracker none.")
    if tracker == "wandb" and not wandb_account() and os.environ.get("WANDB_MODE") is None:
        os.environ["WANDB_MODE"] = "offline"
        return tracker, "metrics.jsonl and W&B offline (no account is configured; `wandb sync` sends it later)"
    return tracker, f"metrics.jsonl and {tracker}"


def unreachable(url: str) -> str | None:
    """Why no server answers at `url` within PROBE seconds, or None where one does.

    A refused key, an unknown page or a certificate that Python does not trust is an answer: W&B's client, which has
    its own certificates, may do better. 5xx is a server, or a proxy before it, that says it cannot serve.
    """
    try:
        urllib.request.urlopen(url, timeout=PROBE).close()
    except urllib.error.HTTPError as answer:
        return f"HTTP {answer.code}" if answer.code >= 500 else None
    except urllib.error.URLError as error:
        return None if isinstance(error.reason, ssl.SSLError) else str(error.reason)
    except (OSError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__
    return None


class Tracker:
    """One run's tracker, started, fed and finished by its own thread. For the main process alone; no collectives.

    What a run loses to it, whatever its server or its processes do: nothing while it trains, and at its end, once, at
    most LIMIT seconds. A tracker that fails or that is stuck is given up, in one line; metrics.jsonl has every row.
    """

    def __init__(
        self, accelerator: Any, name: str, settings: Any, *, run_id: str, folder: Path, say: Callable[[str], None]
    ):
        """`settings` is logged as the run's configuration; `say` prints, and is called by the caller's thread alone."""
        self._accelerator, self._name, self._folder, self._say = accelerator, name, folder, say
        self._project, self._run_id, self._run_name = settings.project, run_id, settings.run_name
        self._config = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in vars(settings).items()}
        self._rows: queue.SimpleQueue[tuple[dict[str, Any], int] | None] = queue.SimpleQueue()
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._called: float | None = None  # when the call that is under way began
        self._given_up = threading.Event()
        self._exit_code: int | None = None  # known where the run closed its log
        self._kept = ""  # W&B's folder of this run
        self._thread = threading.Thread(target=self._serve, name="tracker", daemon=True)
        if name == "wandb":
            # What W&B reports of itself waits for the server when the process exits, and says so on the console.
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
            with suppress(Exception):  # said when it is used
                import wandb  # noqa: F401 (a second of Python's own time: here it disturbs no measurement)
        self._thread.start()
        threading.Thread(target=self._outlive, name="tracker-end").start()
        threading.Thread(target=self._limit_exit, name="tracker-exit", daemon=True).start()

    def log(self, values: dict[str, Any], step: int) -> None:
        """Hands a row over; returns at once."""
        called = self._called
        if called is not None and time.monotonic() - called > STUCK:
            self._give_up(f"has been stuck for {STUCK:.0f} s")
        if not self._given_up.is_set():
            self._rows.put((values, step))
        self._tell()

    def finish(self, exit_code: int) -> None:
        """Waits for what was handed over; leaves nothing running. `exit_code`: what the process will end with."""
        self._exit_code = exit_code
        self._wait()

    def _wait(self) -> None:
        self._rows.put(None)
        if not self._given_up.is_set():
            self._thread.join(WAIT)
            if self._thread.is_alive():
                self._give_up(f"was not done {WAIT:.0f} s after the run")
        self._thread.join(UNWIND)
        self._tell()

    def _outlive(self) -> None:
        """Waits for a run that ended by an error, before what trackers do at exit, for which nobody sets a limit.

        Python joins its threads before it calls atexit's hooks: that is why this one is not a daemon.
        """
        threading.main_thread().join()
        if self._exit_code is None:
            self._wait()

    def _limit_exit(self) -> None:
        """Ends the process where hooks at its exit wait for a server; a daemon runs on while they do."""
        threading.main_thread().join()
        time.sleep(LIMIT if self._exit_code is None else LEAVING)
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(1 if self._exit_code is None else self._exit_code)

    def _tell(self) -> None:
        while not self._lines.empty():
            self._say(self._lines.get())

    def _give_up(self, why: str) -> None:
        """For any thread. What is stuck in a call to W&B's own process comes back when that process is gone."""
        if self._given_up.is_set():
            return
        self._given_up.set()
        self._lines.put(f"tracker {self._name} {why}; it is given up, metrics.jsonl has every row")
        if self._name == "wandb":
            _kill_wandb()

    def _serve(self) -> None:
        """The thread's life: start, rows, end."""
        try:
            self._call(self._start)
            while (row := self._rows.get()) is not None:
                self._call(self._accelerator.log, *row)
            self._call(self._end)
        except (Exception, SystemExit) as reason:  # noqa: BLE001 (whatever a tracker raises, it is not worth the run)
            self._give_up(f"failed ({reason})")
            if self._name == "wandb":
                _end_wandb()

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        self._called = time.monotonic()
        function(*arguments)
        self._called = None

    def _start(self) -> None:
        if self._name != "wandb":
            self._accelerator.init_trackers(self._project, config=self._config)
            return
        import wandb

        found = wandb.setup(wandb.Settings(silent=True)).settings  # the environment and W&B's own files
        if found.mode not in ("online", "shared"):
            self._start_wandb(mode=found.mode)
            return
        proxied = found.http_proxy or found.https_proxy  # W&B's own way out, which the probe does not know
        trouble = None if proxied else unreachable(f"{found.base_url}/graphql")
        if trouble is None:
            try:
                self._start_wandb(mode=found.mode)
                return
            except Exception as reason:  # noqa: BLE001 (as in _serve)
                trouble = str(reason)
                self._accelerator.trackers.clear()
                _end_wandb()  # it would refuse the run's id, as one that is in use
        self._start_wandb(mode="offline")
        self._lines.put(
            f"tracker wandb: {found.base_url} cannot be used ({trouble}); recording offline, "
            f"`wandb sync {self._kept}` sends it later"
        )

    def _start_wandb(self, mode: str) -> None:
        """Under the run's id, so that a resumed run is one run there too. Its files lie in the run's folder."""
        import wandb

        if self._given_up.is_set():  # while the server was asked: nothing more is started
            raise RuntimeError("given up")
        # Prints that went through W&B (its console) would wait for it.
        how = wandb.Settings(
            init_timeout=LIMIT, finish_timeout=UPLOAD, finish_timeout_raises=True, silent=True, console="off"
        )
        options = {"id": self._run_id, "resume": "allow", "dir": str(self._folder), "name": self._run_name}
        options |= {"mode": mode, "settings": how}
        self._accelerator.init_trackers(self._project, config=self._config, init_kwargs={"wandb": options})
        self._kept = wandb.run.settings.sync_dir

    def _end(self) -> None:
        if self._name == "wandb":
            import wandb

            try:
                wandb.finish(exit_code=1 if self._exit_code is None else self._exit_code)
                wandb.teardown()
            except TimeoutError:
                _end_wandb()  # it has written down what it could not send
                self._lines.put(
                    f"tracker wandb: the server did not take everything within {UPLOAD:.0f} s; "
                    f"`wandb sync --no-skip-online {self._kept}` sends the rest"
                )
            return
        for tracker in self._accelerator.trackers:
            tracker.finish()


def _end_wandb() -> None:
    """Ends W&B in this process: its own processes, and its hooks at exit, which would miss them."""
    import wandb

    _kill_wandb()
    with suppress(Exception, SystemExit):  # it misses them too, after it has taken its hooks back
        wandb.teardown()


def _kill_wandb() -> None:
    """Kills W&B's processes, stopped ones too; they would hold this process's output open."""
    import psutil  # accelerate needs it too

    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it ended by itself
            if child.name().startswith("wandb-"):
                child.kill()
