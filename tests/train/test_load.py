"""A long run on much data: memory, files, processes and threads stay what they were."""

from __future__ import annotations

import gc
import json
import os
import threading
from pathlib import Path

import pytest

from mgrpo.trainer import Trainer

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")


def resident_mib() -> float:
    """Memory of this process that is in use."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def held() -> tuple[int, int, int]:
    """Open files, child processes and threads."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return len(os.listdir("/proc/self/fd")), len(children), threading.active_count()


@pytest.mark.fault("100,000 prompts and 200 steps")
@pytest.mark.slow
def test_nothing_grows_over_two_hundred_steps(launch, tmp_path, monkeypatch):
    """From step 50, when every buffer has been used, to step 200: 2 % of memory, and nothing else."""
    data = tmp_path / "data.jsonl"
    with data.open("w") as file:
        for i in range(100_000):
            file.write(
                json.dumps({"prompt": f"{i % 100:02d}+{i // 100 % 100:02d}=", "id": i, "text": "x" * 200}) + "\n"
            )
    seen: dict[int, tuple[float, tuple[int, int, int]]] = {}
    step = Trainer.train_step

    def watch(trainer):
        row = step(trainer)
        if trainer.step % 10 == 0:
            seen[trainer.step] = resident_mib(), held()
        return row

    monkeypatch.setattr(Trainer, "train_step", watch)
    options = {"steps": 200, "data.train": str(data), "checkpoint.every": 25, "log.backends": ("tensorboard",)}
    options |= {"monitor.retention_every": 10, "rollout.prompts": 8, "rollout.max_new_tokens": 8}
    options |= {"answer.extract": "last-number", "answer.equivalence": "math"}
    before = resident_mib()
    assert launch(options) == 0
    early, late = seen[50], seen[200]
    print(f"{before:.0f} MiB before, {early[0]:.0f} at step 50, {late[0]:.0f} at step 200, {late[1]}")
    assert late[0] < 1.02 * early[0]
    assert late[1] == early[1]
    assert early[0] - before < 400
