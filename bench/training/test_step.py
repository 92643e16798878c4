"""One whole training step on the arithmetic task, by phase."""

from dataclasses import replace
from statistics import median

import pytest

from mgrpo.presets import make_preset
from mgrpo.training.trainer import Trainer

PHASES = ("rollout", "score", "vote", "update", "ema", "publish")


@pytest.mark.parametrize("preset", ["arithmetic", "srt"])
def test_step(benchmark, preset):
    """Seconds of a step of 16 prompts x 16 rollouts."""
    config = make_preset(preset)
    config = replace(
        config, data=replace(config.data, probe=None), log=replace(config.log, kl_initial_every=0, backends=())
    )
    trainer = Trainer(config)
    rows = []
    benchmark.pedantic(lambda: rows.append(trainer.train_step().metrics), rounds=15, warmup_rounds=3)
    trainer.close()
    timed = rows[3:]
    seconds = median(row["step_s"] for row in timed)
    shares = {phase: median(row[f"time_{phase}_s"] for row in timed) / seconds for phase in PHASES}
    print(
        f"\n{preset}: {seconds:.3f} s a step, " + ", ".join(f"{phase} {share:.0%}" for phase, share in shares.items())
    )
    benchmark.extra_info |= {phase: round(share, 3) for phase, share in shares.items()}
