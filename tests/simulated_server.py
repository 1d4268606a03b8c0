"""A simulated engine as a process, for tests that talk to a server."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TIMEOUT_S = 30
COMMAND = (sys.executable, "-m", "raytune_autotuner.engine.simulated")


class Server:
    """A started simulated engine; what it printed is in `lines`."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.port = free_port()
        self.log = folder / f"engine-{self.port}.log"
        command = [*COMMAND, "--port", str(self.port), "--model", "m", "--seed", "1", *flags]
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def lines(self) -> list[str]:
        return self.log.read_text().splitlines()

    def wait_ready(self) -> Server:
        self.wait_until(lambda: self.process.poll() is not None or self.printed("Application startup complete."))
        assert self.process.poll() is None, self.log.read_text()
        return self

    def printed(self, text: str) -> bool:
        return text in self.log.read_text()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        until = time.monotonic() + TIMEOUT_S
        while not condition():
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(0.01)

    def wait_exit(self) -> int:
        return self.process.wait(TIMEOUT_S)

    def request(self, method: str, path: str, body: object = None, timeout_s: float = TIMEOUT_S) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        with contextlib.closing(connection):
            connection.request(method, path, None if body is None else json.dumps(body))
            response = connection.getresponse()
            return response.status, response.read()

    def complete(self, **more: Any) -> tuple[int, bytes]:
        body = {"model": "m", "prompt": [1, 2, 3], "max_tokens": 4, "ignore_eos": True, **more}
        return self.request("POST", "/v1/completions", body)

    def stream(self, **more: Any) -> list[str]:
        status, answer = self.complete(stream=True, stream_options={"include_usage": True}, **more)
        assert status == 200
        return events(answer)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(TIMEOUT_S)


def events(answer: bytes) -> list[str]:
    parts = answer.decode().split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: ") for part in parts)
    return [part.removeprefix("data: ") for part in parts]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
