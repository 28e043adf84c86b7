"""The HTTP server of forge_common.chat: the page, and POST /generate, whose response is a line of JSON for each token.

A page of another site must not use the model, nor read what it generates. So a request needs a Host header with a name
of this server (a site's own name may resolve to 127.0.0.1), and a POST an Origin header that is this server.
"""

import ipaddress
import json
import socket
import socketserver
import sys
from collections.abc import Iterable
from contextlib import closing
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import urlsplit

from ..errors import UserError
from .session import Session, read_request

LOCAL = ("127.0.0.1", "localhost")
LARGEST_REQUEST = 4 << 20  # bytes
LARGEST_REST = 64 << 20  # bytes of a refused request that are read and dropped
WAIT_WHILE_BUSY = 1.0  # seconds in which a text that the page has stopped ends
IDLE = 60.0  # seconds without a byte after which a connection ends


class Server(socketserver.ThreadingTCPServer):
    """A thread for each connection, so that a second request gets an answer while a text is generated."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, host: str, port: int, page: str, session: Session):
        """UserError where it cannot listen there. port 0: a free one."""
        self.host = host
        self.page = page
        self.session = session
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as reason:
            raise UserError(
                f"--host {host} --port {port} cannot be used ({reason}). Name another port, or 0 for a free one."
            ) from None
        self.port: int = self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Prints what is no fault of the connection."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def is_own(self, host: str) -> bool:
        """Whether a Host header names this server. One that listens on all addresses has the names of all."""
        try:
            parts = urlsplit(f"//{host}")
            name, port = parts.hostname or "", parts.port or 80
            if port != self.port or parts.username is not None:
                return False
            if name in (*LOCAL, self.host):
                return True
            return ipaddress.ip_address(self.host).is_unspecified and bool(ipaddress.ip_address(name))
        except ValueError:
            return False


class Handler(BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]
    server_version = "forge"
    sys_version = ""
    timeout = IDLE
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        if not self.server.is_own(self.headers.get("Host", "")):
            self._refuse(403, f"this is not the address of the page. Open http://127.0.0.1:{self.server.port}")
        elif self.path != "/":
            self._refuse(404, "there is only the page /")
        else:
            self._begin(200, "text/html; charset=utf-8")
            self.wfile.write(self.server.page.encode())

    def do_POST(self) -> None:
        host = self.headers.get("Host", "")
        if not self.server.is_own(host) or self.headers.get("Origin") != f"http://{host}":
            return self._refuse(403, "only the page of forge_common.chat may ask for a text")
        if self.path != "/generate":
            return self._refuse(404, "there is only /generate")
        if self.headers.get_content_type() != "application/json":
            return self._refuse(415, "the request is not application/json")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit() and int(length) <= LARGEST_REQUEST):
            return self._refuse(413, f"the request has no length, or more than {LARGEST_REQUEST:,} bytes. Begin again.")
        try:
            request = read_request(json.loads(self.rfile.read(int(length))))
        except UserError as error:
            return self._refuse(400, str(error).removeprefix("--"))
        except (ValueError, RecursionError):
            return self._refuse(400, "the request is not JSON. Load the page again.")
        session = self.server.session
        if not session.busy.acquire(timeout=WAIT_WHILE_BUSY):
            return self._refuse(503, "busy: another text is being generated. Stop it, or try again when it has ended.")
        try:
            with closing(session.answer(request)) as lines:
                self._send(lines)
        finally:
            session.busy.release()

    def _send(self, lines: Iterable[dict[str, Any]]) -> None:
        """Writes each line as it comes. A browser that has left, or does not read, ends it."""
        try:
            self._begin(200, "application/x-ndjson")
            for line in lines:
                self.wfile.write(json.dumps(line).encode() + b"\n")
        except OSError:
            self.close_connection = True

    def _refuse(self, status: int, problem: str) -> None:
        self._begin(status, "application/json")
        self.wfile.write(json.dumps({"error": problem}).encode() + b"\n")
        self._read_rest()

    def _read_rest(self) -> None:
        """Reads what the client still sends, until it closes the connection: to close one with bytes that are not read
        resets it, and the client would not see the response.
        """
        self.connection.shutdown(socket.SHUT_WR)
        rest = LARGEST_REST
        while rest > 0 and (block := self.rfile.read1(1 << 16)):
            rest -= len(block)

    def _begin(self, status: int, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Referrer-Policy", "no-referrer")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Prints nothing: the console is the user's."""
