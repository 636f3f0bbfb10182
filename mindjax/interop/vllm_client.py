"""One vLLM worker as its user sees it: a process that is started, watched and ended, or a server elsewhere."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from mindjax.interop.vllm_worker import TOKEN

_HEALTH_SECONDS = 30.0


class Lost(Exception):
    """A worker died, hung, or cannot be reached."""


@dataclass
class Worker:
    """A worker.

    Attributes:
      name: what errors call it.
      token: the secret of its requests.
      home: where its log and port go; None for a server elsewhere.
      host, port: where it listens; port 0 while that is unknown.
      environment: more of its environment.
      losses: how often it was lost since it last did what it was asked.
    """

    name: str
    token: str
    home: Path | None = None
    host: str = "127.0.0.1"
    port: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)
    losses: int = 0
    _process: subprocess.Popen[bytes] | None = None
    _port_file: Path | None = None
    _connection: http.client.HTTPConnection | None = None

    @classmethod
    def at(cls, url: str, token: str) -> Worker:
        """A server elsewhere.

        Raises:
          ValueError: where the url is not of the form http://host:port.
        """
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname or not parts.port or parts.path not in ("", "/"):
            raise ValueError(f"the url of a vLLM worker is http://host:port, not {url!r}")
        return cls(url, token, host=parts.hostname, port=parts.port)

    @property
    def remote(self) -> bool:
        return self.home is None

    @property
    def pid(self) -> int | None:
        """Of a process of ours that was started and not ended."""
        return self._process.pid if self._process else None

    def spawn(self, folder: Path, arguments: Sequence[str], remove: Sequence[Path]) -> None:
        """Starts the process.

        Args:
          folder: of the model.
          arguments: more of `vllm_worker`'s.
          remove: folders that it removes when this process has died.
        """
        assert self.home is not None
        self.port, self._port_file = 0, self.home / f"port-{secrets.token_hex(4)}"
        command = [sys.executable, "-m", "mindjax.interop.vllm_worker", str(folder), *arguments]
        command += ["--port-file", str(self._port_file), "--parent", str(os.getpid()), "--remove", *map(str, remove)]
        # It computes in torch: JAX must not take an accelerator's memory there.
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", **self.environment, TOKEN: self.token}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def ready(self, seconds: float, stop: threading.Event) -> str:
        """Waits until it is ready; the version of its weights.

        Raises:
          Lost: where it ended, cannot be reached, is not ready after so many seconds, or `stop` is set.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end and not stop.is_set():
            if self._process is not None and self._process.poll() is not None:
                raise Lost(f"{self.name} ended with status {self._process.returncode}")
            if not self.port and self._port_file is not None and self._port_file.exists():
                self.port = int(self._port_file.read_text())
            if self.port:
                state = self.request("GET", "/health", None, min(seconds, _HEALTH_SECONDS))
                if state["state"] == "ready":
                    return state["version"]
            time.sleep(0.1)
        raise Lost(f"{self.name} was not ready within {seconds:.0f} s")

    def lines(self, path: str, body: bytes, timeout: float) -> Iterator[dict[str, Any]]:
        """What it answers to a POST, line by line.

        Raises:
          Lost: where it ends before it is done, or is silent for `timeout` seconds.
          ValueError: where it refuses what it was asked.
        """
        with self._response("POST", path, body, timeout) as response:
            while line := response.readline():
                if not line.strip():
                    continue
                value = json.loads(line)
                if "done" in value:
                    return
                if "error" in value:
                    raise ValueError(f"vLLM refuses a request: {value['error']}")
                if "stale" in value:
                    raise Lost(f"{self.name}: {value['stale']}")
                yield value
        raise Lost(f"{self.name} ended in the middle of its answer")

    def request(self, method: str, path: str, body: bytes | IO[bytes] | None, timeout: float) -> dict[str, Any]:
        """Its answer to a small request, or to a file.

        Raises:
          Lost, ValueError: see `lines`.
        """
        with self._response(method, path, body, timeout) as response:
            return json.loads(response.read())

    @contextlib.contextmanager
    def _response(
        self, method: str, path: str, body: bytes | IO[bytes] | None, timeout: float
    ) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        headers = {"Authorization": f"Bearer {self.token}"}
        if body is not None and not isinstance(body, bytes):
            headers["Content-Length"] = str(os.fstat(body.fileno()).st_size)
        self._connection = connection
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            if response.status == 401:
                raise ValueError(f"{self.name} has another secret; set {TOKEN} to it")
            if response.status != 200:
                raise Lost(f"{self.name} answered {method} {path} with {response.status} {response.reason}")
            yield response
        except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
            raise Lost(f"{self.name}: {type(error).__name__}: {error}") from error
        finally:
            self._connection = None
            connection.close()

    def hang_up(self) -> None:
        """Ends the request that another thread waits for, with `Lost` there."""
        connection = self._connection
        if connection is not None and connection.sock is not None:
            with contextlib.suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)

    def end(self) -> None:
        """Ends the process with its children, if there is one; may be called again."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def last_output(self) -> str:
        """The end of what the process printed."""
        if self.home is None or not self._log.exists():
            return "What it printed stands where it was started."
        return self._log.read_bytes()[-4000:].decode(errors="replace")

    @property
    def _log(self) -> Path:
        assert self.home is not None
        return self.home / f"{self.name.replace(' ', '-')}.log"
