"""Cost of checkpoints and the collapse monitor for a step of the arithmetic task."""

import time
from dataclasses import replace

from mgrpo.presets import make_preset
from mgrpo.run import checkpoint
from mgrpo.run.loop import Session
from mgrpo.training.trainer import Trainer

STEPS = 100
BLOCK = 25  # consecutive steps of each of the two runs
WARM_UP = 25


def test_overhead(benchmark, tmp_path, monkeypatch):
    """Two runs of the same steps in turn, one bare; the other measures retention, monitors every row, logs, and saves
    a checkpoint in the background in the middle of every second block."""
    config = make_preset("arithmetic")
    config = replace(
        config, data=replace(config.data, probe=None), log=replace(config.log, kl_initial_every=0, backends=())
    )
    bare = Trainer(replace(config, monitor=replace(config.monitor, retention_every=0)))
    watched = Session(Trainer(config), tmp_path, [])
    seconds = {"bare": [0.0] * (STEPS // BLOCK), "watched": [0.0] * (STEPS // BLOCK)}
    save, written = checkpoint.save_checkpoint, []

    def clocked_save(*args):
        start = time.thread_time()
        folder = save(*args)
        written.append(time.thread_time() - start)
        return folder

    monkeypatch.setattr(checkpoint, "save_checkpoint", clocked_save)

    def run(name: str, block: int) -> None:
        start = time.perf_counter()
        for step in range(BLOCK):
            if name == "bare":
                bare.train_step()
                continue
            watched.take_step()
            if block % 2 and step == BLOCK // 2:
                watched.save()
        watched.writer.check()
        seconds[name][block] = time.perf_counter() - start

    for _ in range(WARM_UP):
        bare.train_step()
        watched.take_step()

    def interleave() -> None:
        for block in range(STEPS // BLOCK):
            for name in sorted(seconds, reverse=bool(block % 2)):
                run(name, block)

    benchmark.pedantic(interleave, rounds=1)
    watched.__exit__(None, None, None)
    rows = watched.rows[WARM_UP:]
    total = sum(row["step_s"] for row in rows)
    monitor = sum(row["time_monitor_s"] for row in rows) / total
    held_up = sum(row["time_checkpoint_s"] or 0.0 for row in rows) / total
    around = (sum(seconds["watched"]) - total) / total - held_up  # the monitor and the log
    in_thread = sum(written) / total
    overhead = sum(seconds["watched"]) / sum(seconds["bare"]) - 1
    print(
        f"\n{STEPS} steps: {sum(seconds['bare']):.1f} s bare, {sum(seconds['watched']):.1f} s watched with "
        f"{STEPS // BLOCK // 2} checkpoints, {overhead:+.1%}; of the steps, the monitor {monitor:.2%}, "
        f"checkpoints {held_up:.2%}, monitor and log {around:.2%}; the thread that writes takes {in_thread:.2%}"
    )
    parts = {"monitor": monitor, "checkpoints": held_up, "monitor and log": around, "thread": in_thread}
    benchmark.extra_info |= {"overhead": overhead, **parts}
    for trainer in (bare, watched.trainer):
        trainer.close()
