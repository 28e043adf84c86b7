"""Accelerate's trackers (W&B, trackio, TensorBoard), run in a background thread that delays a run by at most LIMIT
seconds.

The training thread never calls a tracker. It puts rows into a queue, and waits for the thread once, at the end.
"""

import importlib.util
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files.atomic import read_json
from .provenance import provenance
from .wandb_client import end_wandb, kill_wandb, unreachable, wandb_account, without_password

LIMIT = 10.0  # seconds that a tracker may delay the end of a run, in total
WAIT = 7.0  # of LIMIT, to process the rows in the queue
UPLOAD = 5.0  # of WAIT, for W&B to send the rest; `wandb sync` sends the rest that is on disk
UNWIND = 1.0  # of LIMIT, for the thread of a disabled tracker to return
LEAVING = LIMIT - WAIT - UNWIND  # for hooks at the process's exit
STORE = 600.0  # seconds to store the artifact of --log-artifact, instead of WAIT and UPLOAD
STUCK = 60.0  # seconds after which a call that does not return disables the tracker; training does not wait for it


def choose_tracker(tracker: str) -> tuple[str | None, str]:
    """--tracker -> (accelerate's name of the tracker or None, a line for the plan). W&B is offline without a key."""
    if tracker == "auto":
        if not wandb_account():
            return None, "metrics.jsonl only (no W&B account is configured; --tracker wandb records offline)"
        tracker = "wandb"
    if tracker == "none":
        return None, "metrics.jsonl only"
    if importlib.util.find_spec(tracker) is None:
        raise UserError(
            f"--tracker {tracker}: the package is not installed. Run pip install {tracker}, or pass --tracker none."
        )
    if tracker == "wandb" and not wandb_account() and os.environ.get("WANDB_MODE") is None:
        os.environ["WANDB_MODE"] = "offline"
        return tracker, "metrics.jsonl and W&B offline (no account is configured; `wandb sync` sends it later)"
    return tracker, f"metrics.jsonl and {tracker}"


class Tracker:
    """The tracker of a run, started, used and finished by its own thread. On the main process only; no collectives.

    Training never waits for it; the end of the run waits at most LIMIT seconds. A tracker that fails or hangs is
    disabled, with one line on the console; metrics.jsonl has every row.
    """

    def __init__(
        self,
        accelerator: Any,
        name: str,
        settings: Any,
        *,
        run_id: str,
        folder: Path,
        print_line: Callable[[str], None],
    ):
        """`settings` is logged as the run's configuration; `print_line` is called in the caller's thread only."""
        self._accelerator = accelerator
        self._name = name
        self._folder = folder
        self._print_line = print_line
        self._project = settings.project
        self._run_id = run_id
        self._run_name = settings.run_name or f"{folder.resolve().name}-{run_id}"
        self._stores = settings.log_artifact
        self._artifact: Path | None = None  # known once the run has published it
        self._config = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in vars(settings).items()}
        self._rows: queue.SimpleQueue[tuple[dict[str, Any], int] | None] = queue.SimpleQueue()
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._called: float | None = None  # start of the call that is running
        self._disabled = threading.Event()
        self._exit_code: int | None = None  # known once the run closed its log
        self._local_folder = ""  # W&B's local folder of this run
        self._thread = threading.Thread(target=self._serve, name="tracker", daemon=True)
        if name == "wandb":
            # W&B's own error reporting waits for its server when the process exits.
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
            with suppress(Exception):  # reported when it is used
                import wandb  # noqa: F401 (takes about 1 s; here it is not part of a measured interval)
        self._thread.start()
        threading.Thread(target=self._finish_after_error, name="tracker-end").start()
        threading.Thread(target=self._limit_exit, name="tracker-exit", daemon=True).start()

    def log(self, values: dict[str, Any], step: int) -> None:
        """Puts a row into the queue; returns at once."""
        called = self._called
        if called is not None and time.monotonic() - called > STUCK:
            self._disable(f"has not responded for {STUCK:.0f} s")
        if not self._disabled.is_set():
            self._rows.put((values, step))
        self._print_messages()

    def finish(self, exit_code: int, published: Path | None = None) -> None:
        """Waits for the rows in the queue and ends the tracker, with --log-artifact after it has stored the folder
        `published`.

        `exit_code`: that of the process.
        """
        self._artifact = published if self._stores else None
        self._exit_code = exit_code
        self._wait()

    def _wait(self) -> None:
        self._rows.put(None)
        if not self._disabled.is_set():
            limit = STORE if self._artifact else WAIT
            self._thread.join(limit)
            if self._thread.is_alive():
                self._disable(f"was not finished {limit:.0f} s after the run")
        self._thread.join(UNWIND)
        self._print_messages()

    def _finish_after_error(self) -> None:
        """Finishes the tracker of a run that ended by an error, before the tracker's own exit hooks, which have no time
        limit.

        Not a daemon thread, because Python joins those that are not before it calls the exit hooks.
        """
        threading.main_thread().join()
        if self._exit_code is None:
            self._wait()

    def _limit_exit(self) -> None:
        """Ends the process where exit hooks wait for a server.

        A daemon thread, because those still run during the hooks.
        """
        threading.main_thread().join()
        time.sleep(LIMIT if self._exit_code is None else LEAVING)
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(1 if self._exit_code is None else self._exit_code)

    def _report(self, line: str) -> None:
        """Leaves a line for the caller's thread to print."""
        self._lines.put(without_password(line))

    def _print_messages(self) -> None:
        while not self._lines.empty():
            self._print_line(self._lines.get())

    def _disable(self, why: str) -> None:
        """Disables the tracker; may be called by any thread.

        A call that waits for W&B's process returns once it is killed.
        """
        if self._disabled.is_set():
            return
        self._disabled.set()
        self._report(f"tracker {self._name} {why}. It is disabled; metrics.jsonl has every row.")
        if self._name == "wandb":
            kill_wandb()

    def _serve(self) -> None:
        """The thread: starts the tracker, logs the rows, ends it."""
        try:
            self._call(self._start)
            while (row := self._rows.get()) is not None:
                self._call(self._log, *row)
            if self._artifact:
                self._call(self._store, self._artifact)
            self._call(self._end)
        except (Exception, SystemExit) as reason:  # noqa: BLE001 (no error of a tracker may end the run)
            self._disable(f"failed ({reason})")
            if self._name == "wandb":
                end_wandb()

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        self._called = time.monotonic()
        function(*arguments)
        self._called = None

    def _start(self) -> None:
        self._config |= provenance(self._accelerator)
        if self._name == "tensorboard":
            self._accelerator.init_trackers(f"tensorboard/{self._run_name}")
            writer = self._accelerator.get_tracker("tensorboard", unwrap=True)
            writer.add_hparams(self._config, {}, run_name=".")  # otherwise they are a run of their own
            return
        if self._name == "trackio":
            os.environ.setdefault("TRACKIO_DIR", str((self._folder / "trackio").resolve()))
            options = {"name": self._run_name, "resume": "allow"}
            self._accelerator.init_trackers(self._project, config=self._config, init_kwargs={"trackio": options})
            return
        import wandb

        configured = wandb.setup(wandb.Settings(silent=True)).settings  # from the environment and W&B's own files
        if configured.mode not in ("online", "shared"):
            self._start_wandb(mode=configured.mode)
            return
        proxied = configured.http_proxy or configured.https_proxy  # W&B's own proxy, which the probe does not use
        reason = None if proxied else unreachable(f"{configured.base_url}/graphql")
        if reason is None:
            try:
                self._start_wandb(mode=configured.mode)
                return
            except Exception as error:  # noqa: BLE001 (as in _serve)
                reason = str(error)
                self._accelerator.trackers.clear()
                end_wandb()  # otherwise it refuses the run's id as one in use
        self._start_wandb(mode="offline")
        self._report(
            f"tracker wandb: {configured.base_url} cannot be used ({reason}). The run is recorded offline; "
            f"`wandb sync {self._local_folder}` sends it later."
        )

    def _start_wandb(self, mode: str) -> None:
        """Starts W&B under the run's id, so that a resumed run is the same run there.

        Its files are in the output directory.
        """
        import wandb

        if self._disabled.is_set():  # while the server was probed
            raise RuntimeError("disabled")
        # console: prints would wait for W&B.
        wandb_settings = wandb.Settings(
            init_timeout=LIMIT,
            finish_timeout=STORE if self._stores else UPLOAD,
            finish_timeout_raises=True,
            silent=True,
            console="off",
        )
        options = {"id": self._run_id, "resume": "allow", "dir": str(self._folder), "name": self._run_name}
        options |= {"mode": mode, "settings": wandb_settings}
        self._accelerator.init_trackers(self._project, config=self._config, init_kwargs={"wandb": options})
        self._local_folder = self._accelerator.get_tracker("wandb", unwrap=True).settings.sync_dir

    def _log(self, values: dict[str, Any], step: int) -> None:
        """A row of metrics.jsonl: numbers, and the samples of a validation, which are a table in W&B and texts
        elsewhere.
        """
        samples = values.pop("val/samples", [])
        if samples and self._name == "wandb":
            rows = [[step, *sample.values()] for sample in samples]
            wandb_tracker = self._accelerator.get_tracker("wandb")
            wandb_tracker.log_table("val/samples", columns=["step", *samples[0]], data=rows, step=step)
        elif samples:
            values |= {f"val/sample_{i}": "".join(sample.values()) for i, sample in enumerate(samples)}
        self._accelerator.log(values, step)

    def _store(self, folder: Path) -> None:
        """Stores the published folder, trunk or module, as an artifact of its name, with its digest."""
        import importlib

        metadata = read_json(folder / ("forge.json" if folder.name == "trunk" else "module.json"))
        client = importlib.import_module(self._name)  # wandb or trackio: the same functions
        known = {key: value for key, value in metadata.items() if isinstance(value, (str, int, float))}
        artifact = client.Artifact(f"{self._run_name}-{folder.name}", type=folder.name, metadata=known)
        artifact.add_dir(str(folder))
        client.log_artifact(artifact)
        self._report(
            f"artifact    {artifact.name}: {folder} (digest {metadata['digest'][:12]}), stored by {self._name}"
        )

    def _end(self) -> None:
        if self._name == "wandb":
            import wandb

            try:
                wandb.finish(exit_code=1 if self._exit_code is None else self._exit_code)
                wandb.teardown()
            except TimeoutError:
                end_wandb()  # it stores rows in blocks of 32 KiB: the last ones may not be on disk
                self._report(
                    f"tracker wandb: the server did not accept everything within {UPLOAD:.0f} s. "
                    f"`wandb sync --no-skip-online {self._local_folder}` sends what it had stored on disk; its last "
                    "rows may be missing there, metrics.jsonl has every row."
                )
            return
        for tracker in self._accelerator.trackers:
            tracker.finish()
