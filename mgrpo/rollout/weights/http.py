"""Offers weights as a safetensors file over HTTP, under an unguessable path."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import secrets
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from mgrpo.distributed.exchange import WeightStream
from mgrpo.rollout.engine import Shapes

TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # as safetensors names them


@contextlib.contextmanager
def offer(weights: WeightStream, shapes: Shapes, dtype: torch.dtype, host: str) -> Iterator[tuple[str, str]]:
    """Serves a safetensors file of the weights within the block; yields its URL and SHA-256."""
    data = _make_file(weights, shapes, dtype)
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


@torch.no_grad()
def _make_file(weights: WeightStream, shapes: Shapes, dtype: torch.dtype) -> memoryview:
    """The bytes of a safetensors file, all tensors in one dtype; a tied weight is there under each of its names.

    The package's own writer takes all tensors at once, and so needs the memory of the model twice.
    """
    header, size = dict[str, Any](), 0
    for name in weights.names:
        end = size + math.prod(shapes[name]) * dtype.itemsize
        header[name] = {"dtype": TYPES[dtype], "shape": shapes[name], "data_offsets": [size, end]}
        size = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    content = torch.empty(start + size, dtype=torch.uint8)
    content[:start] = torch.frombuffer(bytearray(struct.pack("<Q", len(text)) + text), dtype=torch.uint8)
    for name, tensor in weights:
        begin, end = header[name]["data_offsets"]
        content[start + begin : start + end].view(dtype).copy_(tensor.flatten())
    return content.numpy().data
