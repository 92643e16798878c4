"""Offers weights as a safetensors file over HTTP, under an unguessable path."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from safetensors.torch import save

from mgrpo.rollout.engine import Weights


@contextlib.contextmanager
def offer(weights: Weights, dtype: torch.dtype, host: str) -> Iterator[tuple[str, str]]:
    """Serves a safetensors file of the weights within the block; yields its URL and SHA-256."""
    # Copies, because safetensors refuses tied weights, two names of one storage.
    data = save({name: tensor.to("cpu", dtype, copy=True).contiguous() for name, tensor in weights})
    path = f"/{secrets.token_urlsafe(32)}"

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not secrets.compare_digest(self.path, path):
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:  # pyright: ignore
            pass

    with ThreadingHTTPServer((host, 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield f"http://{host}:{server.server_address[1]}{path}", hashlib.sha256(data).hexdigest()
        finally:
            server.shutdown()
            thread.join()
