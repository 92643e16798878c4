"""Rollouts from vLLM servers: other processes, on other GPUs or hosts, which fetch their weights from this one.

The trainer offers the weights as a safetensors file over HTTP, under a path that nobody can guess, and asks the
server's worker (mgrpo.rollout.worker) to fetch them. B prompts, n rollouts a prompt.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
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
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal
from urllib.parse import urlsplit

import torch
from safetensors.torch import save

from mgrpo.interrupt import WARNINGS
from mgrpo.rollout.checked import CheckedEngine, Progress, Response, Weights
from mgrpo.rollout.engine import EngineError, Rollouts, Sampling, Source, StaleWeightsError
from mgrpo.rollout.nccl import NcclSender
from mgrpo.rollout.stop import StopTexts
from mgrpo.rollout.vllm import describe_model, require_vllm

MAX_REQUESTS = 64  # of one server at a time; vLLM batches across them
START_S = 600.0
CONNECT_S = 60.0
LOOK_S = 0.5
# What vLLM's OpenAI server writes in place of minus infinity, which JSON has not.
MINUS_INFINITY = -9999.0
EXTENSION = "mgrpo.rollout.worker.WeightReceiver"


class ServerEngine(CheckedEngine):
    """One vLLM server."""

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        eos_ids: Sequence[int],
        pad_id: int,
        dtype: torch.dtype,
        max_length: int,
        url: str,
        weights_host: str = "127.0.0.1",
        transfer: Literal["http", "nccl"] = "http",
        timeout_s: float = 600.0,
        process: ServerProcess | None = None,
        stop: StopTexts | None = None,
    ):
        super().__init__(model, eos_ids=eos_ids, pad_id=pad_id, stop=stop)
        self.dtype, self.timeout_s, self.process = dtype, timeout_s, process
        self._http = _Http(url, process)
        self._host, self._transfer = weights_host, transfer
        self._nccl: NcclSender | None = None
        card = self._http.call("/v1/models", what="start")["data"][0]
        self._name = card["id"]
        if card.get("max_model_len", max_length) < max_length:
            raise EngineError(f"start: {url} must take {max_length} tokens, it takes {card['max_model_len']}.")
        self._state("start")

    def _publish(self, weights: Weights, version: str) -> None:
        call = self._http.call
        call("/pause?mode=abort", {}, what="load", timeout_s=self.timeout_s)
        if self._transfer == "nccl":
            self._broadcast(weights, version)
        else:
            with offer(weights, self.dtype, self._host) as (url, sha256):
                body = {"method": "mgrpo_load", "args": [url, sha256, version]}
                call("/collective_rpc", body, what="load", timeout_s=self.timeout_s)
        emptied = call("/reset_prefix_cache", {}, what="load", timeout_s=self.timeout_s)
        if isinstance(emptied, dict) and emptied.get("success") is False:
            raise EngineError("load: vLLM must empty its prefix cache, it refused. Is another request running?")
        call("/resume", {}, what="load", timeout_s=self.timeout_s)

    def _broadcast(self, weights: Weights, version: str) -> None:
        """From GPU to GPU; the group is made at the first load. In between, the server has no version."""
        name = partial(self._http.call, "/collective_rpc", what="load", timeout_s=self.timeout_s)
        name({"method": "mgrpo_name", "args": [""]})
        if self._nccl is None:
            num_workers = self._http.call("/get_world_size", what="start")["world_size"]
            self._nccl = NcclSender(self._http.url, self._host, num_workers, self.dtype)
        self._nccl.send(weights)
        name({"method": "mgrpo_name", "args": [version]})

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, *, source: Source, version: int
    ) -> Rollouts:
        """See CheckedEngine; a server that was started anew, or loaded by somebody else, is found out."""
        rollouts = super().generate(prompts, n, sampling, source=source, version=version)
        for state in self._state("generate"):
            if state["version"] != self.version:
                raise StaleWeightsError(
                    f"generate: {self._http.url} must hold {self.version}, it holds {state['version']}. "
                    "Does another run use it?"
                )
        return rollouts

    def _sample(self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, seed: int) -> list[Response]:
        # One seed holds for a whole request, so that every prompt needs its own.
        bodies = [
            {
                "model": self._name,
                "prompt": list(prompt),
                "return_token_ids": True,
                "return_tokens_as_token_ids": True,  # a server without a tokenizer has no texts
                **self._parameters(b, n, sampling, seed),
            }
            for b, prompt in enumerate(prompts)
        ]
        found: list[list[Response]] = [[] for _ in bodies]
        # The limit counts from the last prompt that finished, so that requests which queue are not late.
        with ThreadPoolExecutor(MAX_REQUESTS) as pool, Progress(len(prompts), "rollouts") as progress:
            ask = self._http.call
            pending: dict[Future[Any], int] = {
                pool.submit(ask, "/v1/completions", body, what="generate", timeout_s=None): b
                for b, body in enumerate(bodies)
            }
            try:
                last = looked = time.monotonic()
                while pending:
                    done, _ = wait(pending, timeout=LOOK_S, return_when=FIRST_COMPLETED)
                    now = time.monotonic()
                    last = now if done else last
                    if now - last > self.timeout_s:
                        raise EngineError(
                            f"generate: {self._http.url} must finish a prompt every {self.timeout_s:g} s, it did "
                            "not. Raise --rollout.timeout-s if responses are that slow."
                        )
                    if now - looked > LOOK_S:
                        looked = now
                        self._look()
                    for future in done:
                        b = pending.pop(future)
                        found[b] = [_read(choice) for choice in future.result()["choices"]]
                        progress.finished(found[b], self.kv_cache_usage)
            finally:
                for future in pending:
                    future.cancel()
                if pending:
                    self._http.hang_up()
        return self._flatten(found, n, sampling)

    def _look(self) -> None:
        """Notes how full the KV cache is."""
        text = self._http.call("/metrics", what="generate", timeout_s=self.timeout_s)
        for line in str(text).splitlines():
            if line.startswith("vllm:kv_cache_usage_perc"):
                self._observe_kv_cache(float(line.split()[-1]))

    def _state(self, what: str) -> list[dict[str, Any]]:
        """What each worker says of itself."""
        reply = self._http.call("/collective_rpc", {"method": "mgrpo_state"}, what=what, timeout_s=self.timeout_s)
        return [json.loads(state) if isinstance(state, str) else state for state in reply["results"]]

    def close(self) -> None:
        """Ends the server if it was started here."""
        super().close()
        if self.process is not None:
            self.process.close()


class EnginePair:
    """Two servers, one for each source: momentum and policy are written at the same time."""

    def __init__(self, policy: ServerEngine, momentum: ServerEngine):
        self.engines: dict[Source, ServerEngine] = {"policy": policy, "momentum": momentum}

    def load(self, weights: Mapping[str, torch.Tensor], *, source: Source, version: int) -> None:
        """See Engine."""
        self.engines[source].load(weights, source=source, version=version)

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, *, source: Source, version: int
    ) -> Rollouts:
        """See Engine."""
        return self.engines[source].generate(prompts, n, sampling, source=source, version=version)

    @property
    def redrawn(self) -> int:
        """Rollouts drawn again so far."""
        return sum(engine.redrawn for engine in self.engines.values())

    @property
    def kv_cache_usage(self) -> float | None:
        """Of the fuller one."""
        return max((e.kv_cache_usage for e in self.engines.values() if e.kv_cache_usage is not None), default=None)

    def sleep(self) -> None:
        """Nothing: what they hold is not the trainer's memory."""

    def close(self) -> None:
        """Ends both."""
        with contextlib.ExitStack() as stack:
            for engine in self.engines.values():
                stack.callback(engine.close)


class ServerProcess:
    """A vLLM server on this machine, which ends with this process however that ends."""

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        dtype: torch.dtype,
        max_length: int,
        options: Mapping[str, Any],
        device: str,
        stop: StopTexts | None = None,
    ):
        require_vllm()
        self._folder = TemporaryDirectory(prefix="mgrpo-vllm-")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self._log = f"http://127.0.0.1:{port}", Path(self._folder.name) / "log"
        arguments = {
            **describe_model(model, self._folder.name, dtype, max_length, stop),
            "host": "127.0.0.1",
            "port": port,
            "worker_extension_cls": EXTENSION,
            **options,
        }
        environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
        environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
        if device:
            environment["CUDA_VISIBLE_DEVICES"] = device
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *_flags(arguments)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # a Ctrl-C is the trainer's, which has a step to end
                preexec_fn=_before_start,
            )

    def wait(self) -> None:
        """Returns when it answers; EngineError where it dies or takes longer than START_S."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if (code := self._process.poll()) is not None:
                raise EngineError(f"start: the vLLM server ended with exit code {code}.{self.last_words()}")
            with contextlib.suppress(EngineError):
                _Http(self.url, None).call("/health", what="start", timeout_s=5)
                return
            time.sleep(0.2)
        raise EngineError(f"start: the vLLM server must answer within {START_S:g} s, it did not.{self.last_words()}")

    def last_words(self) -> str:
        """The last error in its log."""
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if "Error" in line]
        return f" {lines[-1].strip()}" if lines else ""

    def close(self) -> None:
        """Ends it and all that it has started, and waits for that."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            pass
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._folder.cleanup()


def _flags(arguments: Mapping[str, Any]) -> Iterator[str]:
    """Command-line flags of vLLM."""
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{flag}" if value else f"--no-{flag}"
        else:
            yield from (f"--{flag}", str(value))


def _before_start() -> None:
    """What a scheduler sends to every process of a job as a warning is the trainer's too."""
    for number in WARNINGS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        _die_with_parent()


def _die_with_parent() -> None:
    """Linux ends this process with SIGTERM once its parent is gone, even by kill -9."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _read(choice: Mapping[str, Any]) -> Response:
    """One rollout of a reply."""
    logprobs = [-float("inf") if x is None or x <= MINUS_INFINITY else x for x in choice["logprobs"]["token_logprobs"]]
    tokens = choice["token_ids"]
    if len(tokens) != len(logprobs):
        raise EngineError(f"generate: every token must have a log-prob, {len(tokens)} have {len(logprobs)}.")
    return Response(tokens, logprobs, choice["finish_reason"] == "length")


@contextlib.contextmanager
def offer(weights: Weights, dtype: torch.dtype, host: str) -> Iterator[tuple[str, str]]:
    """Address and SHA-256 of a safetensors file of the weights, while the block lasts."""
    # Copies, for safetensors takes no two names of one storage.
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


class _Http:
    """Calls to one server; whatever goes wrong is an EngineError that says what and where."""

    def __init__(self, url: str, process: ServerProcess | None):
        self.url, self._process = url.rstrip("/"), process
        self._open: set[http.client.HTTPConnection] = set()
        self._hung_up = False

    def call(self, path: str, body: Any = None, *, what: str, timeout_s: float | None = 60.0) -> Any:
        """The reply to a GET, or with a body to a POST: JSON where it is, else text."""
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
            words = self._process.last_words() if self._process else ""
            raise EngineError(
                f"{what}: the vLLM server at {self.url} must answer {path.partition('?')[0]}, got "
                f"{type(error).__name__}: {error}.{words}"
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
        """Ends every call that still waits, and every later one: what such a server holds is not known."""
        self._hung_up = True
        for connection in list(self._open):
            if connection.sock is not None:
                with contextlib.suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)
