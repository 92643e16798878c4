"""Output streams whose failures never stop the process."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

# Temporary errors: a full disk, and a pipe whose reader is slow. After any other the stream writes to /dev/null.
PASSING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EAGAIN, errno.EINTR}


class Display:
    """A text stream that never fails; a closed pipe, a full disk or an unknown character loses only the output."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes the text if possible; returns its length."""
        self._attempt(lambda: self._write(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Writes each line."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flushes the buffer if possible."""
        self._attempt(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _write(self, text: str) -> None:
        """Writes the text, with escapes for characters that the encoding lacks."""
        try:
            self._stream.write(text)
        except UnicodeEncodeError as error:
            self._stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))

    def _attempt(self, step: Callable[[], Any]) -> None:
        try:
            step()
        except OSError as error:
            if error.errno not in PASSING:
                self._give_up()
        except ValueError:  # a closed stream, or an encoding without any characters
            pass

    def _give_up(self) -> None:
        """Points the descriptor to /dev/null, also for libraries and child processes that write to it."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            number = self._stream.fileno()
            if number in (1, 2):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, number)
                if null != number:
                    os.close(null)


def silence_output() -> None:
    """Discards standard output from here on, also that of libraries and child processes."""
    sys.stdout.flush()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


def protect_output() -> None:
    """Replaces standard output and error by a Display for the rest of the process; idempotent."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Else the next opened file would get this number, and libraries would print into it.
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, Display):
            # Python has no stream if the descriptor was closed at its start.
            setattr(sys, name, Display(open(os.devnull, "w", encoding="utf-8") if stream is None else stream))
