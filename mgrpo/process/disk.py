"""Atomic file writes, checkpoint folders, and errors of the disk."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mgrpo.errors import StorageError


def write_aside(path: Path, text: str) -> None:
    """Replaces a text file atomically, even through a power failure."""
    aside = path.with_name(path.name + ".tmp")
    with aside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoint folders, oldest first, without looking inside."""
    found = [p for p in (run_dir / "checkpoints").glob("step_*") if p.name.removeprefix("step_").isdigit()]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """Step in the name of a checkpoint folder."""
    return int(folder.name.removeprefix("step_"))


def fsync(path: Path) -> None:
    """Flushes a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
STORAGE_ERRORS = FULL | {errno.EROFS, errno.EACCES, errno.EPERM}


@contextmanager
def storage_errors() -> Iterator[None]:
    """Turns the OSError of a full or write-protected disk into StorageError."""
    try:
        yield
    except OSError as error:
        if isinstance(error, StorageError) or error.errno not in STORAGE_ERRORS:
            raise
        raise StorageError(f"run: the disk must accept writes, got: {error}. Checkpoints are unchanged.") from error
