"""Which checkpoints stay, however slow the disk is: the last, the best, and the sound one to go back to."""

from __future__ import annotations

import errno
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from mgrpo.distributed.world import ALONE
from mgrpo.errors import CheckpointError, StorageError
from mgrpo.run import checkpoint
from mgrpo.run.loop import Session


@pytest.fixture
def slow_disk(monkeypatch):
    """A disk that finishes a checkpoint only once somebody waits for it: the slowest that a run can meet."""
    waited, save, wait = threading.Event(), checkpoint.save_checkpoint, checkpoint.Writer.wait

    def late(*arguments, **options):
        assert waited.wait(60)
        return save(*arguments, **options)

    def waiting(self):
        waited.set()
        wait(self)
        waited.clear()

    monkeypatch.setattr(checkpoint, "save_checkpoint", late)
    monkeypatch.setattr(checkpoint.Writer, "wait", waiting)


def kept(small, run_dir: Path, rows: list[dict], changes: dict) -> list[int]:
    """Steps whose checkpoints are left of a run with such rows, one saved at every step."""
    coming = iter(rows)
    trainer = SimpleNamespace(config=small(changes), world=ALONE, step=0, save=write)
    trainer.snapshot = lambda: write

    def train_step() -> SimpleNamespace:
        trainer.step += 1
        return SimpleNamespace(metrics=next(coming), fault=None, engine_error=None)

    trainer.train_step = train_step
    run_dir.mkdir(exist_ok=True)
    with Session(trainer, run_dir, []) as session:
        for _ in rows:
            session.take_step()
            session.save()
    return [checkpoint.step_of(folder) for folder in checkpoint.list_checkpoints(run_dir)]


def write(folder: Path) -> None:
    (folder / "weights").write_text("some")


def row(step: int, **measures: float) -> dict:
    """A step whose window gives no alarm unless asked to."""
    return {"step": step, "top_answer_share": 0.1, "unparseable_share": 0.0, "response_length": 9.0} | measures


@pytest.mark.parametrize("background", [True, False], ids=["background", "foreground"])
@pytest.mark.parametrize(
    ("accuracies", "keep_best", "keep_last", "left"),
    [
        ([0.1, 0.9, 0.3, 0.2, 0.1], 2, 1, [2, 3, 5]),
        ([0.1, 0.9, 0.3, 0.2, 0.1], 1, 2, [2, 4, 5]),
        ([0.9, 0.8, 0.7, 0.6, 0.5, 0.4], 3, 1, [1, 2, 3, 6]),
        ([0.2, 0.5, 0.5, 0.1, 0.1, 0.1], 1, 1, [3, 6]),  # of two alike the later
        ([0.1, 0.2, 0.3, 0.4], 1, 2, [3, 4]),
        ([0.4, 0.1, 0.3, 0.2], 0, 3, [2, 3, 4]),
    ],
)
def test_best_and_last(small, tmp_path, slow_disk, background, accuracies, keep_best, keep_last, left):
    rows = [row(step, probe_accuracy_policy=accuracy) for step, accuracy in enumerate(accuracies, 1)]
    options = {"keep_best": keep_best, "keep_last": keep_last, "background": background}
    changes = {f"checkpoint.{name}": value for name, value in options.items()} | {"monitor.probe_drop": 1.0}
    assert kept(small, tmp_path / "run", rows, changes) == left


@pytest.mark.parametrize("background", [True, False], ids=["background", "foreground"])
def test_the_sound_one(small, tmp_path, slow_disk, background):
    """The newest that is sound, and each that may become so: two windows of two steps before the last."""
    rows = [row(step) for step in range(1, 10)]
    changes = {"checkpoint.background": background, "checkpoint.keep_last": 1, "checkpoint.keep_best": 0}
    changes |= {"monitor.on_collapse": "rollback", "monitor.window": 2}
    assert kept(small, tmp_path / "run", rows, changes) == [5, 6, 7, 8, 9]
    assert kept(small, tmp_path / "warned", rows, changes | {"monitor.on_collapse": "warn"}) == [9]


@pytest.fixture
def parts(tmp_path):
    """Saves step 1 whole, then step 2 in two parts at once; returns what became of each."""
    checkpoint.save_checkpoint(tmp_path, 1, write)

    def save(first, second, *, timeout_s=20.0):
        checkpoint.make_room(tmp_path, 2)
        with ThreadPoolExecutor(2) as pool:
            whole = pool.submit(checkpoint.save_checkpoint, tmp_path, 2, first, size=2, timeout_s=timeout_s)
            part = pool.submit(checkpoint.save_part, tmp_path, 2, second, rank=1) if second else None
            return whole.exception(), part and part.exception()

    return save


def write_momentum(folder: Path) -> None:
    (folder / "momentum").mkdir()
    (folder / "momentum" / "weights").write_text("averaged")


def test_parts_of_two_ranks_are_one_checkpoint(parts, tmp_path):
    assert parts(write, write_momentum) == (None, None)
    folder = tmp_path / "checkpoints" / "step_2"
    assert checkpoint.verify_checkpoint(folder) == 2
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "momentum", "weights"]
    (folder / "momentum" / "weights").write_text("averagee")
    with pytest.raises(CheckpointError, match="momentum/weights must be as it was written"):
        checkpoint.verify_checkpoint(folder)


def full_disk(folder: Path) -> None:
    (folder / "some").write_text("a part of it")
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("second", [full_disk, None], ids=["full", "silent"])
def test_without_the_part_of_another_rank_there_is_no_checkpoint(parts, tmp_path, second):
    whole, part = parts(write, second, timeout_s=20.0 if second else 0.2)
    assert isinstance(whole, StorageError) and "Earlier ones are unchanged" in str(whole)
    assert ("No space left on device" if second else "rank 1 did not write its part") in str(whole)
    assert part is None if second is None else isinstance(part, StorageError)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_1"]
    assert checkpoint.newest_valid(tmp_path)[0] == tmp_path / "checkpoints" / "step_1"
