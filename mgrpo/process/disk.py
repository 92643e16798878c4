"""Files that are written whole or not at all, and the errors of a disk."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mgrpo.errors import StorageError


def write_aside(path: Path, text: str) -> None:
    """Replaces a text file at once or not at all, power cut or not."""
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


STORAGE_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
    *(errno.EROFS, errno.EACCES, errno.EPERM),
}


@contextmanager
def storage_errors() -> Iterator[None]:
    """Turns a full disk, or one that may not be written, into StorageError."""
    try:
        yield
    except OSError as error:
        if isinstance(error, StorageError) or error.errno not in STORAGE_ERRORS:
            raise
        raise StorageError(
            f"run: the disk must take what is written, got: {error}. Checkpoints are untouched."
        ) from error
