"""A run directory as release 0.1.0 wrote it after 2 of 4 steps, `runs/0.1.0/run`: it is read, and resumed.

The policy is a random Qwen3 of width 16. Written there by `python -m mgrpo.train mgrpo_arithmetic --run-dir run
--model.path base --steps 4 --stop-after 2 --data.train arithmetic:24:2-3:0 --data.probe None --rollout.prompts 4
--rollout.policy 4 --rollout.momentum 2 --rollout.max-new-tokens 24 --checkpoint.every 0 --eval.every 0 --log.backends
--log.kl-initial-every 0 --monitor.retention-every 0 --threads 1`; its report is left out.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mgrpo import report
from mgrpo.run.checkpoint import verify_checkpoint
from mgrpo.training.state import Checkpointer

OLD = Path(__file__).parent / "runs" / "0.1.0"


@pytest.fixture
def old_run(tmp_path, monkeypatch):
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)  # config.json names the base by a relative path
    return Path("run")


def test_it_is_resumed_with_its_weights_moments_and_counters(old_run, resume, rows_of, capsys, monkeypatch):
    before, restored, restore = rows_of(old_run), [], Checkpointer.restore
    folder = old_run / "checkpoints" / "step_2"

    def watch(self, folder):
        restore(self, folder)
        restored.append({name: w.clone() for name, w in self.momentum.weights.items()})
        assert (self.learner.step, self.parts["train"].step) == (2, 2)
        for name, parameter in self.loaded.model.named_parameters():
            assert torch.equal(parameter, policy[name])

    policy, momentum = (load_file(folder / source / "model.safetensors") for source in ("policy", "momentum"))
    monkeypatch.setattr(Checkpointer, "restore", watch)
    assert resume("--stop-after", "None", run_dir=old_run) == 0
    assert "resume: step 2 of 4" in capsys.readouterr().out
    assert all(torch.equal(weight, momentum[name]) for name, weight in restored[0].items())
    rows = rows_of(old_run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [{key: row[key] for key in old} for row, old in zip(rows, before, strict=False)] == before
    written = old_run / "checkpoints" / "step_4"
    verify_checkpoint(written)
    moments = load_file(written / "optimizer.safetensors")
    assert {int(value) for name, value in moments.items() if name.endswith("/step")} == {4}
    assert moments.keys() == load_file(folder / "optimizer.safetensors").keys()
    state = json.loads((written / "state.json").read_text())
    assert (state["train"]["step"], state["learner"]["step"], state["sampler"]["num_batches"]) == (4, 4, 4)
    assert "num_prompts" in json.loads((old_run / "config.json").read_text())["rollout"]


def test_its_report_is_written(old_run, capsys):
    assert report.main([str(old_run)]) == 0
    page = (old_run / "report.html").read_text()
    assert "mgrpo_arithmetic" in page and "step 2" in page
    assert Path(capsys.readouterr().out.strip()).resolve() == (old_run / "report.html").resolve()
