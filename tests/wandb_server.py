"""A W&B server on this machine: the requests that the real client needs to start a run online, and ways to fail them."""

import gzip
import itertools
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

KEY = "0123456789" * 4  # has the form of a key, and is not one
VIEWER = {"id": "user", "entity": "someone", "username": "someone", "flags": "{}", "teams": {"edges": []}}
PROJECT = {"id": "project", "name": "forge", "entity": {"id": "entity", "name": "someone"}}
TEXTS = {"description": "", "config": "{}", "sweepName": None}


class Server(ThreadingHTTPServer):
    """`mode`: well, silent (accepts requests without an answer), half (answers only GET), error (500), garbage, or
    denied (401).

    `then`, where it is set, is the mode from the first file stream on, when the client has started its run.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, mode: str = "well", then: str | None = None):
        super().__init__(("127.0.0.1", 0), _Request)
        self.mode, self.then = mode, then
        self.requests: list[str] = []
        self.steps: set[int] = set()  # of the rows that arrived
        self.exit_code: int | None = None  # of the run, once the client reports its end
        self.sweep: dict = {}  # the sweep file, once `wandb sweep` has sent it
        self.points: Iterator[dict] = iter(())  # of its grid, one for each run
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_) -> None:
        """Prints nothing when a killed client closes its connections."""

    def fail(self) -> None:
        """Changes to the mode `then`. gone: the server stops to listen and closes its connections."""
        self.mode, self.then = self.then, None
        if self.mode == "gone":
            self.socket.close()


class _Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        server = self.server
        server.requests.append(self.path)
        mode = server.mode
        if mode == "half" and self.command == "GET":
            mode = "well"
        if mode in ("silent", "half"):
            server.over.wait()
        if mode in ("silent", "half", "gone"):
            self.close_connection = True
            return
        status = {"error": 500, "denied": 401}.get(mode, 200)
        content = json.dumps(self.answer(body)).encode() if mode == "well" else b"<html>\x00 not what was asked for"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_PUT = do_GET

    def answer(self, body: bytes) -> dict:
        if self.path.endswith("/file_stream"):
            self.take(json.loads(body))
            return {}
        if self.path != "/graphql" or not body:
            return {}
        request = json.loads(body)
        variables = request.get("variables", {})
        if "weep" in request["query"] or "gent" in request["query"]:
            answer = self.of_sweep(request["query"], variables)
            if answer:
                return {"data": answer}
        if "upsertBucket" in request["query"]:
            run = {"id": "bucket", "name": variables["name"], "displayName": variables["name"], "historyLineCount": 0}
            return {"data": {"upsertBucket": {"bucket": run | TEXTS | {"project": PROJECT}, "inserted": True}}}
        if "createRunFiles" in request["query"]:
            files = [{"name": name, "uploadUrl": f"{self.server.url}/upload"} for name in variables["files"]]
            return {"data": {"createRunFiles": {"runID": "bucket", "uploadHeaders": [], "files": files}}}
        return {"data": {"viewer": VIEWER}}

    def of_sweep(self, query: str, variables: dict) -> dict:
        """Answers `wandb sweep` and `wandb agent`: a run for each point of the grid, one after the other; {} for other requests."""
        server = self.server
        if "mutation UpsertSweep" in query:
            server.sweep = yaml.safe_load(variables["config"])
            names = server.sweep["parameters"]
            values = itertools.product(*(parameter["values"] for parameter in names.values()))
            server.points = ({name: {"value": v} for name, v in zip(names, point, strict=True)} for point in values)
            return {"upsertSweep": {"sweep": {"name": "sweep", "project": PROJECT}, "configValidationWarnings": []}}
        if "query SweepWithRuns" in query:
            return {"project": {"sweep": {"config": yaml.dump(server.sweep), "runs": {"edges": []}}}}
        if "mutation CreateAgent" in query:
            return {"createAgent": {"agent": {"id": "agent"}}}
        if "mutation Heartbeat" not in query:
            return {}
        commands = []
        if not json.loads(variables["runState"]):
            arguments = next(server.points, None)
            run = {"type": "run", "run_id": f"run{len(server.requests)}", "program": server.sweep["program"]}
            commands = [run | {"args": arguments} if arguments else {"type": "exit"}]
        return {"agentHeartbeat": {"agent": {"id": "agent"}, "commands": json.dumps(commands)}}

    def take(self, sent: dict) -> None:
        """Records the rows of a file stream's request; the first request may change the mode."""
        rows = sent.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
        self.server.steps |= {json.loads(row)["_step"] for row in rows}
        if sent.get("complete"):
            self.server.exit_code = sent["exitcode"]
        if self.server.then:
            self.server.fail()


@contextmanager
def serve(mode: str = "well", then: str | None = None) -> Iterator[Server]:
    server = Server(mode, then)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()


@contextmanager
def nobody() -> Iterator[str]:
    """The address of a port without a listener: connections are refused."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@contextmanager
def dropped() -> Iterator[str]:
    """An address without any answer: a listener with a full backlog, for which the kernel drops packets."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        backlog = []
        for _ in range(4):
            client = socket.socket()
            client.setblocking(False)
            client.connect_ex(address)
            backlog.append(client)
        try:
            yield f"http://127.0.0.1:{address[1]}"
        finally:
            for client in backlog:
                client.close()
