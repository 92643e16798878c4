"""What is printed may be lost; nothing else may be lost with it."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

# Errors that may pass: a full disk, and a pipe whose reader is slow. All others end what the stream shows.
PASSING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EAGAIN, errno.EINTR}


class Display:
    """A text stream that never fails: a reader that is gone, a full disk or a missing letter costs the output alone."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes what can be written."""
        self._attempt(lambda: self._write(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Writes each."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Hands on what is buffered."""
        self._attempt(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _write(self, text: str) -> None:
        """Letters that the encoding has not are spelled out."""
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
        except ValueError:  # closed, or an encoding that takes nothing
            pass

    def _give_up(self) -> None:
        """Lets the descriptor lead nowhere, also for libraries and processes that write to it on their own."""
        try:
            number = self._stream.fileno()
            if number in (1, 2):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, number)
                if nowhere != number:
                    os.close(nowhere)
        except (OSError, ValueError, AttributeError):
            pass


def protect_output() -> None:
    """Puts a Display in place of standard output and error, for the rest of the process; twice is once."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The next file that is opened would take its place, and what libraries print would end up in there.
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, Display):
            # Python has none where the descriptor was closed when it started.
            setattr(sys, name, Display(open(os.devnull, "w", encoding="utf-8") if stream is None else stream))
