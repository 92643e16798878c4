"""The directory of a run: whether it can be made, written and filled."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mgrpo.config import Config
from mgrpo.errors import ConfigError, StorageError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
LOCK, TRIAL = ".lock", ".trial-"


def directory_of(config: Config) -> Path:
    """The run directory that a configuration asks for."""
    return Path(config.run_dir or f"runs/{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}")


def content_of(run_dir: Path) -> list[str]:
    """Names of what a run has left in its directory; the lock and what a trial left count as nothing."""
    if not run_dir.is_dir():
        return []
    return [path.name for path in run_dir.iterdir() if path.name != LOCK and not path.name.startswith(TRIAL)]


def refuse_directory(run_dir: Path, config: Config) -> None:
    """Raises ConfigError for a run directory with content, unless the run is resumed, and one that can not be made."""
    if (config.run_dir or "").startswith("~"):
        raise ConfigError(
            [f"run: --run-dir must begin with the home of a known user, got {run_dir}. Or write ./{run_dir}."]
        )
    with making(run_dir):
        nearest = _nearest(run_dir)
        if not os.access(nearest, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
            raise ConfigError([f"run: --run-dir must be where files may be written, {nearest} may not be written."])
        content = content_of(run_dir)
    if content and not config.resume:
        raise ConfigError([f"run: --run-dir must be empty, {run_dir} holds {content[0]}. Continue it with --resume."])


def _nearest(run_dir: Path) -> Path:
    """The run directory, or the last folder of its path that is there; ConfigError where something is in the way."""
    nearest = Path(run_dir.anchor or ".")
    for folder in (*reversed(run_dir.parents), run_dir):
        if folder.is_symlink() and not folder.exists():
            raise ConfigError(
                [f"run: --run-dir must be a directory, the link {folder} leads nowhere: {os.readlink(folder)}."]
            )
        if not folder.exists():
            break
        if not folder.is_dir():
            raise ConfigError([f"run: --run-dir must be a directory, {folder} is a file."])
        nearest = folder
    return nearest


@contextmanager
def making(run_dir: Path) -> Iterator[None]:
    """Turns what the system says against a directory into ConfigError; of a full disk StorageError."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise StorageError(f"run: the disk must take what is written, got: {error}.") from error
        reason = error.strerror or error
        raise ConfigError([f"run: --run-dir must be a directory that can be made, got {run_dir}: {reason}."]) from error


@contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Makes the run directory and holds it against other processes; a run that wrote nothing leaves none behind."""
    is_new = not run_dir.exists()
    with making(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / LOCK).open("a")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError([f"run: --run-dir must be free, another process trains in {run_dir}."]) from error
        for left in run_dir.glob(f"{TRIAL}*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        try:
            yield
        finally:
            if is_new and not content_of(run_dir):
                shutil.rmtree(run_dir)


@contextmanager
def trial_folder(run_dir: Path) -> Iterator[Path]:
    """A folder in the run directory, or where that would be made, for as long as the block lasts."""
    with making(run_dir):
        folder = Path(tempfile.mkdtemp(prefix=TRIAL, dir=_nearest(run_dir)))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def require_room(run_dir: Path, config: Config, checkpoint_bytes: int) -> None:
    """Raises ConfigError where the checkpoints that lie beside one another, two as a rule, find no room on the disk.

    Args:
        run_dir: whose disk it is.
        config: whether the run makes a second one; a resumed run has one already.
        checkpoint_bytes: of one.
    """
    every, last = config.checkpoint.every, config.stop_after or config.steps
    is_single = config.resume or ((every == 0 or every >= last) and config.monitor.on_collapse != "rollback")
    needed = checkpoint_bytes * (1 if is_single else 2)
    nearest = _nearest(run_dir)
    free = shutil.disk_usage(nearest).free
    if needed > free:
        count, gib = "a checkpoint" if is_single else "two checkpoints", 2**30
        raise ConfigError(
            [
                f"run: --run-dir must have room for {count} of {checkpoint_bytes / gib:.2f} GiB, {nearest} has "
                f"{free / gib:.2f} GiB free. Make room, or name another disk."
            ]
        )
