"""Checkpoints: safetensors and JSON only, written to a temporary folder, sealed by a SHA-256 manifest, then renamed.

step_N/ has policy/ and momentum/ in the transformers layout, the optimiser state, and state.json. No pickle is read.
`Writer` writes them in a thread during training.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

from safetensors import SafetensorError

from mgrpo.errors import CheckpointError, StorageError
from mgrpo.process.disk import fsync, list_checkpoints, step_of

MANIFEST = "manifest.json"


def save_checkpoint(run_dir: Path, step: int, write: Callable[[Path], None]) -> Path:
    """Calls `write` to fill a folder, seals it with a manifest, and renames it to checkpoints/step_N.

    A crash at any moment leaves the earlier checkpoints unchanged.
    """
    final = run_dir / "checkpoints" / f"step_{step}"
    aside = final.with_name(f".step_{step}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        _write_aside(aside, step, write)
    except Exception as error:
        shutil.rmtree(aside, ignore_errors=True)
        # The tokenizers library reports a full disk only in the text of a plain exception.
        if not isinstance(error, OSError | SafetensorError) and "(os error " not in str(error):
            raise
        raise StorageError(f"checkpoint: {final} could not be written: {error}. Earlier ones are unchanged.") from error
    replaced = final.with_name(f".step_{step}.old")
    if final.exists():
        final.rename(replaced)
    aside.rename(final)
    fsync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def _write_aside(aside: Path, step: int, write: Callable[[Path], None]) -> None:
    """Fills the folder, seals it and flushes everything to the disk."""
    aside.mkdir(parents=True)
    write(aside)
    digests = {str(p.relative_to(aside)): _sha256(p) for p in sorted(aside.rglob("*")) if p.is_file()}
    (aside / MANIFEST).write_text(json.dumps({"step": step, "sha256": digests}, indent=1))
    for path in [*aside.rglob("*"), aside]:
        fsync(path)


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
    """

    def __init__(self, run_dir: Path, *, background: bool = True):
        self.run_dir, self.background = run_dir, background
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
            save_checkpoint(self.run_dir, step, write)
            self.saved = step
            prune_checkpoints(self.run_dir, keep_last=keep_last, best=best)

        self.wait()
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
