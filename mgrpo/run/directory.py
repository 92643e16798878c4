"""The run directory: checks, lock and free space."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mgrpo.config import Config
from mgrpo.distributed.ending import EXIT_FILE
from mgrpo.distributed.world import World
from mgrpo.errors import CURABLE, ConfigError, StorageError
from mgrpo.inputs import as_bytes
from mgrpo.process.disk import FULL, list_checkpoints

LOCK, TRIAL = ".lock", ".trial-"


def directory_of(config: Config) -> Path:
    """The run directory of a configuration."""
    return Path(config.run_dir or f"runs/{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}")


def content_of(run_dir: Path) -> list[str]:
    """Names in a run directory, without those of the lock, the exit code and trials."""
    if not run_dir.is_dir():
        return []
    names = {path.name for path in run_dir.iterdir()} - {LOCK, EXIT_FILE}
    return sorted(name for name in names if not name.startswith(TRIAL))


def next_start(run_dir: Path, code: int) -> str | None:
    """How to go on after a run that has ended with this exit code; None where a resume cures nothing."""
    return f"continue with --resume --run-dir {run_dir}" if code in CURABLE and list_checkpoints(run_dir) else None


def refuse_directory(run_dir: Path, config: Config) -> None:
    """Raises ConfigError for a run directory that cannot be created, or is not empty in a run that is not resumed."""
    if (config.run_dir or "").startswith("~"):
        raise ConfigError(
            [f"run: --run-dir must begin with the home of a known user, got {run_dir}. Or write ./{run_dir}."]
        )
    with making(run_dir):
        nearest = _nearest(run_dir)
        if not os.access(nearest, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
            raise ConfigError([f"run: --run-dir must be writable, {nearest} is not."])
        content = content_of(run_dir)
    if content and not config.resume:
        raise ConfigError([f"run: --run-dir must be empty, {run_dir} holds {content[0]}. Continue it with --resume."])


def _nearest(run_dir: Path) -> Path:
    """The deepest existing folder of the run directory's path; ConfigError where a part of the path is no folder."""
    nearest = Path(run_dir.anchor or ".")
    for folder in (*reversed(run_dir.parents), run_dir):
        if folder.is_symlink() and not folder.exists():
            raise ConfigError(
                [f"run: --run-dir must be a directory, the link {folder} has no target: {os.readlink(folder)}."]
            )
        if not folder.exists():
            break
        if not folder.is_dir():
            raise ConfigError([f"run: --run-dir must be a directory, {folder} is a file."])
        nearest = folder
    return nearest


@contextmanager
def making(run_dir: Path) -> Iterator[None]:
    """Turns an OSError about a directory into ConfigError, or into StorageError for a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise StorageError(f"run: the disk must accept writes, got: {error}.") from error
        reason = error.strerror or error
        raise ConfigError(
            [f"run: --run-dir must be a directory that can be created, got {run_dir}: {reason}."]
        ) from error


@contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Creates the run directory and locks it; removes it at the end if it is new and the run wrote nothing."""
    is_new = not run_dir.exists()
    with making(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / LOCK).open("a")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError([f"run: --run-dir must be free, another process trains in {run_dir}."]) from error
        for left in run_dir.glob(f"{TRIAL}*"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        try:
            yield
        finally:
            if is_new and not content_of(run_dir) and not (run_dir / EXIT_FILE).exists():
                shutil.rmtree(run_dir)


def require_shared(run_dir: Path, world: World) -> None:
    """Raises ConfigError on every rank if one of them does not see the lock of rank 0. Collective."""
    blind = [rank for rank, sees in enumerate(world.gather_json((run_dir / LOCK).exists())) if not sees]
    if blind:
        ranks = ", ".join(map(str, blind))
        raise ConfigError(
            [f"run: --run-dir must be on a disk that every machine shares, {run_dir} is not seen by rank {ranks}."]
        )


@contextmanager
def trial_folder(run_dir: Path) -> Iterator[Path]:
    """A temporary folder in the run directory, or in its parent as long as that does not exist."""
    with making(run_dir):
        folder = Path(tempfile.mkdtemp(prefix=TRIAL, dir=_nearest(run_dir)))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def require_room(run_dir: Path, config: Config, checkpoint_bytes: int) -> None:
    """Raises ConfigError if the disk has no room for the new checkpoints that exist at once, usually two.

    Args:
        run_dir: a path on the disk.
        config: tells whether the run writes a second checkpoint; a resumed run already has one.
        checkpoint_bytes: size of one checkpoint.
    """
    every, last = config.checkpoint.every, config.stop_after or config.steps
    is_single = config.resume or ((every == 0 or every >= last) and config.monitor.on_collapse != "rollback")
    needed = checkpoint_bytes * (1 if is_single else 2)
    nearest = _nearest(run_dir)
    free = shutil.disk_usage(nearest).free
    if needed > free:
        count = "a checkpoint" if is_single else "two checkpoints"
        raise ConfigError(
            [
                f"run: --run-dir must have room for {count} of {as_bytes(checkpoint_bytes)}, {nearest} has "
                f"{as_bytes(free)} free. Make room, or name another disk."
            ]
        )
