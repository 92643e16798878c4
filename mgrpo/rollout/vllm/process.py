"""A vLLM server on this machine, which ends with this process."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from mgrpo.distributed.environment import without_launcher
from mgrpo.errors import EngineError
from mgrpo.process.signals import WARNINGS, end_with_parent
from mgrpo.rollout.stop import StopTexts
from mgrpo.rollout.vllm.client import HttpClient
from mgrpo.rollout.vllm.local import describe_model, require_vllm

START_S = 600.0
EXTENSION = "mgrpo.rollout.worker.WeightReceiver"


class ServerProcess:
    """A vLLM server on this machine, which ends with this process, even after kill -9."""

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
        environment = without_launcher(os.environ) | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
        environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
        if device:
            environment["CUDA_VISIBLE_DEVICES"] = device
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *_flags(arguments)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C must not reach it: the trainer finishes its step
                preexec_fn=_before_start,
            )

    def wait(self) -> None:
        """Waits until the server answers; raises EngineError if it dies or takes longer than START_S."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if (code := self._process.poll()) is not None:
                raise EngineError(f"start: the vLLM server ended with exit code {code}.{self.last_words()}")
            with contextlib.suppress(EngineError):
                HttpClient(self.url).call("/health", what="start", timeout_s=5)
                return
            time.sleep(0.2)
        raise EngineError(f"start: the vLLM server must answer within {START_S:g} s, it did not.{self.last_words()}")

    def last_words(self) -> str:
        """The last error in its log."""
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if "Error" in line]
        return f" {lines[-1].strip()}" if lines else ""

    def close(self) -> None:
        """Ends the server and its child processes, and waits for them."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
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
    """Ignores the warning signals that a scheduler sends to every process of a job; the trainer handles them."""
    for number in WARNINGS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()
