"""Compares two answers, or makes the fingerprint of one, in a process that can be killed.

`EquivalenceWorker` runs in the trainer, `serve` in the worker process, which runs this file as a script. Each message
on the pipe is JSON behind a 4-byte big-endian length. Only the standard library is imported at the top, so that a
worker starts in half a second and holds no torch state.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import itertools
import json
import logging
import os
import resource
import select
import selectors
import signal
import struct
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable
from typing import Any, BinaryIO

MEMORY_LIMIT_BYTES = 2 << 30
# A worker that holds more than this after a pair is replaced, because it would leave too little for the next.
MEMORY_KEPT_BYTES = MEMORY_LIMIT_BYTES // 2
# Wall-clock time, because a stopped process uses no CPU time; loading takes about a second of CPU time.
START_LIMIT_S = 300.0
START_TRIES = 3
# A worker that gets less than this share of a processor counts as hung.
LEAST_CPU_SHARE = 1 / 20
LEAST_HANG_S = 30.0


class WorkerError(RuntimeError):
    """A worker process died on a pair or a form, or could not decide it."""


class StartError(RuntimeError):
    """No worker process can be started, so no pair can be decided."""


class _LostError(Exception):
    """A worker process ended or does not reply."""


class EquivalenceWorker:
    """One worker process, started at the first pair and replaced when it dies or hangs. Not for two threads at once.

    A worker that ran out of memory or stack, or that keeps much memory, is replaced too, so that no result depends on
    earlier pairs. It runs in a separate session, so that Ctrl-C reaches the trainer alone, and ends with the trainer.

    Args:
        timeout_s: limit of one pair in seconds of CPU time, above 0, so that a busy machine changes no result. Starting
            the process does not count.
        hang_s: limit of one pair in seconds of wall-clock time, for a worker that blocks or is stopped.
    """

    def __init__(self, *, timeout_s: float, hang_s: float | None = None) -> None:
        self._timeout_s = timeout_s
        self._hang_s = max(timeout_s / LEAST_CPU_SHARE, LEAST_HANG_S) if hang_s is None else hang_s
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the running worker, None before the first pair and after `close`."""
        return self._process.pid if self._process else None

    def compare(self, first: str, second: str) -> bool:
        """Whether math-verify finds two answers equal, in either order.

        Raises:
            TimeoutError: the pair took more than `timeout_s`; the process has ended.
            WorkerError: the process died or hung on the pair twice, or ran out of memory or stack.
            StartError: the process died or hung three times in a row while it started.
            ImportError: math-verify is not installed, or does not load.
        """
        return self._ask(first, second)

    def fingerprint(self, form: str) -> list[Any]:
        """The fingerprint of one answer, for `matching.read_fingerprint`; raises as `compare` does."""
        return self._ask(form)

    def _ask(self, *forms: str) -> Any:
        """The reply on a pair or on one form; asks a second time where the process ended."""
        try:
            try:
                return self._exchange(forms)
            except _LostError:
                # It may have been killed or stopped from outside, for no fault of these forms.
                self.close()
                return self._exchange(forms)
        except _LostError as error:
            self.close()
            raise WorkerError(f"the worker process {error} on {_join(forms)}") from error
        except BaseException:
            # Else a late reply would be read as that of the next pair, and memory or stack may still be short.
            self.close()
            raise

    def close(self) -> None:
        """Kills the process and waits for its end; the next pair starts a new one."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()

    def _exchange(self, forms: tuple[str, ...]) -> Any:
        """Sends one pair or form and returns the result or fingerprint."""
        process = self._process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(_pack(forms))
            reply = _receive(process, self._hang_s)
        except TimeoutError as error:
            raise _LostError("hung") from error
        except (BrokenPipeError, EOFError) as error:
            if process.wait() == -signal.SIGPROF:
                raise TimeoutError(f"no result within {self._timeout_s} s of CPU time") from error
            raise _LostError("died") from error
        if "error" in reply:
            raise WorkerError(f"math-verify failed on {_join(forms)}: {reply['error']}")
        if reply["spent"]:
            self.close()
        return reply["answer"]

    def _start(self) -> subprocess.Popen[bytes]:
        """Starts the process, with retries."""
        reasons = []
        for tries in range(START_TRIES):
            time.sleep(tries / 2)  # the cause of the failure may pass
            try:
                return self._start_once()
            except _LostError as error:
                self.close()
                reasons.append(str(error))
        raise StartError(
            f"AnswerChecker: a worker process must start, got {START_TRIES} failures in a row: "
            f"{'; '.join(reasons)}. Free memory and processes, and try python -c 'import math_verify'."
        )

    def _start_once(self) -> subprocess.Popen[bytes]:
        """Starts the process and waits until math-verify is loaded."""
        # -P keeps this folder, whose files may have names of standard modules, off the worker's path. A fixed hash
        # seed fixes the order of SymPy's sets, and with it the results.
        try:
            self._process = process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(self._timeout_s), str(self._hang_s)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                env={**os.environ, "PYTHONHASHSEED": "0"},
                start_new_session=True,
            )
        except OSError as error:
            raise _LostError(f"no process could be created ({error})") from error
        try:
            reply = _receive(process, START_LIMIT_S)
        except TimeoutError as error:
            raise _LostError(f"not ready within {START_LIMIT_S:g} s") from error
        except EOFError as error:
            code = process.wait()
            raise _LostError(f"killed by signal {-code}" if code < 0 else f"ended with code {code}") from error
        if "error" in reply:
            raise ImportError(
                f"AnswerChecker: mode 'math' must have a working math-verify, got {reply['error']}. "
                "Install mgrpo[train], or use mode='exact'."
            )
        return process


def _join(forms: tuple[str, ...]) -> str:
    """The forms for a message."""
    return " and ".join(map(repr, forms))


def _pack(message: Any) -> bytes:
    """Encodes one message."""
    body = json.dumps(message).encode()
    return struct.pack(">I", len(body)) + body


def _receive(process: subprocess.Popen[bytes], limit_s: float) -> dict[str, Any]:
    """Reads one message of the worker within the limit."""
    pipe = process.stdout
    assert pipe is not None
    deadline = time.monotonic() + limit_s
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)

        def read(size: int) -> bytes:
            data = b""
            while len(data) < size:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError(f"no reply of the worker within {limit_s} s")
                chunk = pipe.read(size - len(data))
                if not chunk:
                    raise EOFError("the worker closed its pipe")
                data += chunk
            return data

        (size,) = struct.unpack(">I", read(4))
        return json.loads(read(size))


def serve(timeout_s: float, hang_s: float) -> None:
    """Replies to pairs and forms from standard input until it closes, as it does when the parent ends."""
    _end_with_parent()
    # A terminal and some schedulers signal every process of a run; this one ends with its parent.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    for limit in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(limit, signal.SIG_DFL)
    requests = sys.stdin.buffer
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    # Output of the libraries must not mix with the messages.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    with contextlib.suppress(ValueError, OSError):  # macOS refuses the limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        answer = _load_comparison()
    except Exception as error:
        replies.write(_pack({"error": f"{type(error).__name__}: {error}"}))
        return
    replies.write(_pack({"ready": True}))
    while (forms := _read_request(requests)) is not None:
        # By default both signals end the process: at its limit, and where it outlives its parent.
        signal.setitimer(signal.ITIMER_PROF, timeout_s)
        signal.setitimer(signal.ITIMER_REAL, hang_s + 1)
        try:
            reply = {"answer": answer(*forms), "spent": _address_space() > MEMORY_KEPT_BYTES}
        except Exception as error:
            reply = {"error": type(error).__name__}
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(_pack(reply))


def _end_with_parent() -> None:
    """Ends this process as soon as the other end of standard input is closed."""
    closed = select.poll()
    closed.register(0, 0)  # the hang-up alone, which is always reported

    def wait() -> None:
        closed.poll()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _address_space() -> int:
    """Address space of this process in bytes, which the memory limit bounds; 0 where the system does not report it."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 0


def _read_request(requests: BinaryIO) -> list[str] | None:
    """Reads one pair or form, None at the end of the stream."""
    header = requests.read(4)
    if len(header) < 4:
        return None
    return json.loads(requests.read(struct.unpack(">I", header)[0]))


def _import_sibling(name: str) -> Any:
    """Imports a module of this folder, never an installed one of the same name."""
    here = os.path.dirname(os.path.abspath(__file__))
    for package, folder in (("mgrpo", os.path.dirname(here)), ("mgrpo.grading", here)):
        # The packages themselves would import more than a worker needs.
        module = sys.modules.setdefault(package, types.ModuleType(package))
        module.__path__ = [folder]
    return importlib.import_module(f"mgrpo.grading.{name}")


def _keep_letters(config: Any) -> Any:
    """The configuration without math-verify's units, which match products too (3ab, 60t); units are dropped before."""
    normalization = getattr(config, "normalization_config", None)
    if normalization is None:
        return config
    return dataclasses.replace(config, normalization_config=dataclasses.replace(normalization, units=False))


def _load_comparison() -> Callable[..., Any]:
    """Imports math-verify; returns a function that compares two canonical answers, or makes the fingerprint of one."""
    import sympy
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
    from sympy.core.cache import clear_cache
    from sympy.core.random import seed

    logging.disable(logging.CRITICAL)
    precision, fingerprint = _import_sibling("precision"), _import_sibling("fingerprint").fingerprint
    precision.tell_apart_tiny_numbers()

    def attempt(step: Callable[[], Any], failed: Any) -> Any:
        """The result of a step, `failed` for errors that math-verify too takes for a failure."""
        try:
            return step()
        except (MemoryError, RecursionError):
            raise
        except Exception:
            return failed

    latex = _keep_letters(LatexExtractionConfig())

    # math-verify's own time limits are off, because they use the alarm that guards the whole pair.
    def parse_as(text: str, config: Any) -> list[Any]:
        return attempt(lambda: parse(text, [config], parsing_timeout=None, raise_on_error=True), [])  # pyright: ignore[reportArgumentType]

    @functools.lru_cache(maxsize=512)
    def parse_answer(answer: str) -> list[Any]:
        parsed = parse_as(f"${answer}$", latex)
        # On other text the plain parser would pick one of several numbers.
        if not any(isinstance(item, sympy.Basic) for item in parsed) and precision.is_arithmetic(answer):
            return parse_as(answer, ExprExtractionConfig()) or parsed
        return parsed

    def equal(gold: Any, target: Any) -> bool:
        return attempt(lambda: verify(gold, target, timeout_seconds=None, raise_on_error=True), False)

    def compare(first: str, second: str) -> bool:
        one, other = parse_answer(first), parse_answer(second)
        if attempt(lambda: precision.approximates(first, other) or precision.approximates(second, one), False):
            return True
        pairs = list(itertools.product(one, other))
        return any(equal(a, b) for a, b in pairs) or any(equal(b, a) for a, b in pairs)

    def answer(*forms: str) -> Any:
        # SymPy tests some identities at random points, and its cache would make results depend on earlier pairs.
        seed(0)
        clear_cache()
        return fingerprint(parse_answer(*forms)) if len(forms) == 1 else compare(*forms)

    for forms in ((r"\frac{x}{2}+\sqrt{3}", r"0.5x+3^{1/2}"), (r"x^{2}=4",)):
        answer(*forms)  # late imports happen here, outside the limit of any pair
    return answer


if __name__ == "__main__":
    serve(float(sys.argv[1]), float(sys.argv[2]))
