"""Chromium through the pipe of its DevTools protocol: a page is opened, typed in and read as a user would."""

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

from launch import PATIENCE
from reading_html import CHROMIUM

WAIT = 60  # seconds, on a busy machine too


class Browser:
    """One page at `address`. console: what the browser printed of it, errors of scripts and of the security policy included."""

    def __init__(self, address: str, folder: Path, *, size: tuple[int, int] = (1100, 900)):
        assert CHROMIUM
        commands, self._write = os.pipe()
        self._read, replies = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={folder}"]
        flags += ["--no-first-run", "--disable-extensions", "--disable-background-networking"]
        flags += [f"--window-size={size[0]},{size[1]}", "about:blank"]
        line = ["bash", "-c", f'exec "$@" 3<&{commands} 4>&{replies}', "bash", CHROMIUM, *flags]
        with open(folder / "chromium.log", "w") as log:
            self._process = subprocess.Popen(line, pass_fds=(commands, replies), stdout=log, stderr=log)
        os.close(commands)
        os.close(replies)
        self._waiting = b""
        self._number = 0
        self._session: str | None = None
        self.console: list[str] = []
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=address)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            reply = self._next()
            if reply.get("id") == self._number:
                assert "error" not in reply, reply
                return reply["result"]
            if reply.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
                self.console.append(json.dumps(reply["params"]))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._waiting:
            part = os.read(self._read, 1 << 16)
            assert part, "Chromium has ended"
            self._waiting += part
        message, _, self._waiting = self._waiting.partition(b"\0")
        return json.loads(message)

    def value(self, expression: str) -> Any:
        """What a JavaScript expression is, as JSON."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, expression: str) -> None:
        """Waits until it is true."""
        deadline = time.monotonic() + WAIT
        while not self.value(expression):
            assert time.monotonic() < deadline, f"{expression} is not true; {self.value('document.body.innerText')}"
            time.sleep(0.02)

    def click(self, selector: str) -> None:
        self.value(f"document.querySelector({json.dumps(selector)}).click()")

    def type(self, selector: str, text: str) -> None:
        """Replaces the text of a field, as if it was pasted."""
        self.value(f"{{const field = document.querySelector({json.dumps(selector)}); field.focus(); field.select()}}")
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, text="\r" if key == "Enter" and kind == "keyDown" else ""
            )

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(PATIENCE)
        os.close(self._read)
        os.close(self._write)
