"""Checkpoints: safetensors and JSON only, written to a temporary folder, sealed by a SHA-256 manifest, then renamed.

step_N/ has policy/ and momentum/ in the transformers layout, the optimiser state, and state.json. No pickle is read.
`Writer` writes them in a thread during training. Of several ranks each writes its part into a folder of its own in the
temporary one; rank 0 puts the parts together. Threads meet in the file system, because no collective may run in them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError

from mgrpo.distributed.together import on_first
from mgrpo.distributed.world import ALONE, World
from mgrpo.errors import CheckpointError, StorageError
from mgrpo.process.disk import fsync, list_checkpoints, step_of, write_aside

MANIFEST = "manifest.json"
OUTCOME = "outcome.json"
"""Written by a rank beside its part: the digests of its files, or its error."""
POLL_S = 0.05


def save_checkpoint(
    run_dir: Path, step: int, write: Callable[[Path], None], *, size: int = 1, timeout_s: float = 1800.0
) -> Path:
    """Calls `write` to fill a folder, seals it with a manifest, and renames it to checkpoints/step_N.

    A crash at any moment leaves the earlier checkpoints unchanged.

    Args:
        run_dir: directory of the run.
        step: number of the checkpoint.
        write: fills a folder; of several ranks with the part of rank 0.
        size: ranks that write; the others call `save_part`.
        timeout_s: longest wait for their parts.
    """
    final = run_dir / "checkpoints" / f"step_{step}"
    aside = final.with_name(f".step_{step}.tmp")
    if size == 1:
        make_room(run_dir, step)
    with _failing(final), _removing(aside):
        write(aside)
        digests = digests_of(aside)
        for rank in range(1, size):
            digests |= _take_part(aside, rank, timeout_s)
        (aside / MANIFEST).write_text(json.dumps({"step": step, "sha256": dict(sorted(digests.items()))}, indent=1))
        for path in [*aside.rglob("*"), aside]:
            fsync(path)
    replaced = final.with_name(f".step_{step}.old")
    if final.exists():
        final.rename(replaced)
    aside.rename(final)
    fsync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def make_room(run_dir: Path, step: int) -> None:
    """Makes the empty folder in which a checkpoint is written."""
    final = run_dir / "checkpoints" / f"step_{step}"
    aside = final.with_name(f".step_{step}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    with _failing(final):
        aside.mkdir(parents=True)


def save_part(run_dir: Path, step: int, write: Callable[[Path], None], *, rank: int) -> None:
    """Writes the part of a rank other than 0, which then waits for nothing; `make_room` comes before, on rank 0."""
    final = run_dir / "checkpoints" / f"step_{step}"
    part = _part(final.with_name(f".step_{step}.tmp"), rank)
    outcome: dict[str, Any] = {}
    try:
        with _failing(final):
            part.mkdir()
            write(part)
            outcome["sha256"] = digests_of(part)
            for path in part.rglob("*"):
                fsync(path)
    except Exception as error:
        outcome["error"] = str(error.__cause__ or error)
        raise
    finally:
        with suppress(OSError):
            write_aside(part / OUTCOME, json.dumps(outcome))


def _take_part(aside: Path, rank: int, timeout_s: float) -> dict[str, str]:
    """Moves the part of another rank into the checkpoint as soon as it is written; returns the digests of its files."""
    part, end = _part(aside, rank), time.monotonic() + timeout_s
    while not (part / OUTCOME).is_file():
        if time.monotonic() > end:
            raise OSError(f"rank {rank} did not write its part within {timeout_s:.0f} s")
        time.sleep(POLL_S)
    outcome = json.loads((part / OUTCOME).read_text())
    if "sha256" not in outcome:
        raise OSError(f"rank {rank} failed: {outcome.get('error', 'interrupted')}")
    (part / OUTCOME).unlink()
    for entry in part.iterdir():
        entry.rename(aside / entry.name)
    part.rmdir()
    return outcome["sha256"]


def _part(aside: Path, rank: int) -> Path:
    """Folder of the part of a rank."""
    return aside / f".rank_{rank}"


def digests_of(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder, without the parts of other ranks."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    names = {str(path.relative_to(folder)): path for path in files}
    return {name: _sha256(path) for name, path in names.items() if not name.startswith(".rank_")}


@contextmanager
def _failing(final: Path) -> Iterator[None]:
    """Turns every error of the disk into StorageError."""
    try:
        yield
    except Exception as error:
        # The tokenizers library reports a full disk only in the text of a plain exception.
        if not isinstance(error, OSError | SafetensorError) and "(os error " not in str(error):
            raise
        raise StorageError(f"checkpoint: {final} could not be written: {error}. Earlier ones are unchanged.") from error


@contextmanager
def _removing(aside: Path) -> Iterator[None]:
    """Removes the folder if the block fails."""
    try:
        yield
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def verify_checkpoint(folder: Path) -> int:
    """Returns the step of a complete checkpoint; raises CheckpointError that names a damaged file."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        step, digests = int(manifest["step"]), dict(manifest["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint: {folder / MANIFEST} must be as it was written, got {error!r}.") from error
    if step != step_of(folder):
        raise CheckpointError(f"checkpoint: {folder / MANIFEST} must be of step {step_of(folder)}, got {step}.")
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file() or _sha256(path) != digest:
            raise CheckpointError(f"checkpoint: {path} must be as it was written, got other bytes or no file.")
    return step


def newest_valid(run_dir: Path, *, up_to: int | None = None) -> tuple[Path | None, dict[Path, str]]:
    """The newest valid checkpoint (of step `up_to` at most), and the errors of newer ones."""
    complaints: dict[Path, str] = {}
    for folder in reversed(list_checkpoints(run_dir)):
        if up_to is not None and step_of(folder) > up_to:
            continue
        try:
            verify_checkpoint(folder)
        except CheckpointError as error:
            complaints[folder] = str(error)
        else:
            return folder, complaints
    return None, complaints


def sweep(run_dir: Path) -> None:
    """Cleans up after a crash: deletes a partial checkpoint, restores one that was being replaced."""
    folder = run_dir / "checkpoints"
    for aside in folder.glob(".step_*.tmp"):
        shutil.rmtree(aside)
    for replaced in folder.glob(".step_*.old"):
        final = folder / replaced.name.removeprefix(".").removesuffix(".old")
        shutil.rmtree(replaced) if final.exists() else replaced.rename(final)


class Writer:
    """Saves checkpoints in a thread, one at a time and in order; the next call raises its errors.

    As a context manager, it waits at its end for the checkpoint in progress.

    Args:
        run_dir: directory of the run.
        background: False writes before `save` returns.
        world: of the run; every rank calls `save`.
        timeout_s: longest wait of rank 0 for the parts of others.
    """

    def __init__(self, run_dir: Path, *, background: bool = True, world: World = ALONE, timeout_s: float = 1800.0):
        self.run_dir, self.background = run_dir, background
        self.world, self.timeout_s = world, timeout_s
        self.saved: int | None = None  # newest step that is safe on the disk
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, write: Callable[[Path], None], *, keep_last: int, best: list[int]) -> None:
        """Waits for an earlier checkpoint, then starts to save this one and to delete all but the last and the best.

        Args:
            step: number of the checkpoint.
            write: fills a folder. It runs in the thread and must not read state that training changes.
            keep_last, best: as in `prune_checkpoints`.

        Raises:
            StorageError: this checkpoint, or in the background the previous one, could not be written.
        """

        def work() -> None:
            if self.world.is_first:
                save_checkpoint(self.run_dir, step, write, size=self.world.size, timeout_s=self.timeout_s)
                prune_checkpoints(self.run_dir, keep_last=keep_last, best=best)
            else:
                save_part(self.run_dir, step, write, rank=self.world.rank)
            self.saved = step

        self.wait()
        if self.world.size > 1:
            on_first(self.world, lambda: make_room(self.run_dir, step))
        self._pending = self._pool.submit(work)
        if not self.background:
            self.wait()

    def check(self) -> None:
        """Raises the error of the checkpoint in progress if it has failed; does not wait."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Waits for the checkpoint in progress and raises its error."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.wait()
        except OSError as failure:
            if error is None:
                raise
            error.add_note(str(failure))
        finally:
            self._pool.shutdown()


def prune_checkpoints(run_dir: Path, *, keep_last: int, best: list[int]) -> None:
    """Deletes all but the newest `keep_last` checkpoints and those of the steps in `best`."""
    folders = list_checkpoints(run_dir)
    for folder in folders[:-keep_last]:
        if step_of(folder) not in best:
            shutil.rmtree(folder)


def _sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
