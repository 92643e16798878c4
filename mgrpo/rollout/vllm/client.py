"""Calls to a vLLM server."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from mgrpo.errors import EngineError

CONNECT_S = 60.0


class HttpClient:
    """Calls to one server; every failure is an EngineError that names the call and the server."""

    def __init__(self, url: str, *, last_words: Callable[[], str] = str):
        """`last_words` returns the server's last error, which is added to a message."""
        self.url, self._last_words = url.rstrip("/"), last_words
        self._open: set[http.client.HTTPConnection] = set()
        self._hung_up = False

    def call(self, path: str, body: Any = None, *, what: str, timeout_s: float | None = 60.0) -> Any:
        """The reply to a GET, or with a body to a POST, parsed if it is JSON."""
        where = urlsplit(self.url)
        kind = http.client.HTTPSConnection if where.scheme == "https" else http.client.HTTPConnection
        connection = kind(where.netloc, timeout=CONNECT_S)
        self._open.add(connection)
        try:
            payload = None if body is None else json.dumps(body)
            connection.connect()
            assert connection.sock is not None
            connection.sock.settimeout(timeout_s)
            if self._hung_up:
                raise ConnectionAbortedError("given up")
            connection.request(
                "GET" if body is None else "POST", where.path + path, payload, {"Content-Type": "application/json"}
            )
            reply = connection.getresponse()
            text = reply.read().decode()
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(
                f"{what}: the vLLM server at {self.url} must answer {path.partition('?')[0]}, got "
                f"{type(error).__name__}: {error}.{self._last_words()}"
            ) from error
        finally:
            self._open.discard(connection)
            connection.close()
        if reply.status == 404 and path.startswith(("/collective_rpc", "/pause", "/reset")):
            raise EngineError(f"{what}: {self.url} must be started with VLLM_SERVER_DEV_MODE=1, it has no {path}.")
        if reply.status != 200:
            raise EngineError(f"{what}: the server at {self.url} answered {path} with {reply.status}: {text[:300]}")
        with contextlib.suppress(json.JSONDecodeError):
            return json.loads(text)
        return text

    def hang_up(self) -> None:
        """Ends every waiting and later call, because the state of the server is unknown."""
        self._hung_up = True
        for connection in list(self._open):
            if connection.sock is not None:
                with contextlib.suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)
