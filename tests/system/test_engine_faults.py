"""What a run does when its engine dies or writes with other weights than it was asked to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mgrpo.errors import EngineError, Exit, StaleWeightsError
from mgrpo.grading.checker import AnswerChecker
from mgrpo.grading.worker import StartError
from mgrpo.rollout.transformers import TransformersEngine
from mgrpo.training.observers import Evaluator


@pytest.mark.parametrize("error", [EngineError, StaleWeightsError])
@pytest.mark.fault("rollout engine that dies")
def test_an_engine_that_dies_costs_one_step(launch, resume, tmp_path, monkeypatch, capsys, error):
    """A resumed run ends with the bits of one that nothing happened to. Under stale weights nothing is saved."""
    assert launch(run_dir=tmp_path / "whole") == Exit.DONE
    generate, calls = TransformersEngine.generate, []

    def die(engine, *args):
        calls.append(args)
        if len(calls) == 6:  # the policy's turn in step 3
            raise error("generate: it is gone.")
        return generate(engine, *args)

    monkeypatch.setattr(TransformersEngine, "generate", die)
    assert launch(run_dir=tmp_path / "cut") == Exit.ENGINE
    saved = (tmp_path / "cut" / "checkpoints" / "step_2").is_dir()
    message = capsys.readouterr().err
    assert saved == (error is EngineError) == ("Step 2 is saved." in message)
    if saved:
        assert resume(run_dir=tmp_path / "cut") == Exit.DONE
        for name in ("policy/model.safetensors", "momentum/model.safetensors", "optimizer.safetensors"):
            whole, cut = (tmp_path / run / "checkpoints" / "step_3" / name for run in ("whole", "cut"))
            assert whole.read_bytes() == cut.read_bytes(), name


@pytest.mark.fault("answer checker that can not be started any more")
def test_a_checker_that_is_gone_costs_one_step(launch, resume, tmp_path, monkeypatch, capsys, rows_of):
    assert launch(run_dir=tmp_path / "whole") == Exit.DONE
    group_classes, calls = AnswerChecker.group_classes, []

    def die(checker, groups):
        calls.append(groups)
        if len(calls) == 3:
            raise StartError("no worker.")
        return group_classes(checker, groups)

    monkeypatch.setattr(AnswerChecker, "group_classes", die)
    assert launch(run_dir=tmp_path / "cut") == Exit.ENGINE
    assert "no worker. Step 2 is saved." in " ".join(capsys.readouterr().err.split())
    assert resume(run_dir=tmp_path / "cut") == Exit.DONE
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")


@pytest.mark.fault("rollout engine that dies while it is evaluated")
def test_an_engine_that_dies_in_an_evaluation_costs_its_numbers(launch, resume, tmp_path, monkeypatch, capsys, rows_of):
    """By then the step is taken: it is logged and saved, without the probe."""
    options = {"steps": 4, "data.probe": "arithmetic:4:2:9", "eval.every": 3}
    assert launch(options, run_dir=tmp_path / "whole") == Exit.DONE
    evaluate = Evaluator.evaluate

    def die(self, source, step):
        if step == 3:
            raise EngineError("generate: it is gone.")
        return evaluate(self, source, step)

    monkeypatch.setattr(Evaluator, "evaluate", die)
    assert launch(options, run_dir=tmp_path / "cut") == Exit.ENGINE
    assert "it is gone. Step 3 is saved." in " ".join(capsys.readouterr().err.split())
    assert resume(run_dir=tmp_path / "cut") == Exit.DONE
    whole, cut = rows_of(tmp_path / "whole"), rows_of(tmp_path / "cut")
    assert [row["step"] for row in cut] == [1, 2, 3, 4]
    assert cut[2]["probe_accuracy_policy"] is None and whole[2]["probe_accuracy_policy"] is not None
    assert [row for i, row in enumerate(cut) if i != 2] == [row for i, row in enumerate(whole) if i != 2]


@pytest.mark.parametrize("liar", ["policy", "momentum"])
def test_an_engine_that_writes_with_other_weights_stops_the_run(small, trained, liar):
    class Apart(TransformersEngine):
        weights_are_shared = False

    class Lying(Apart):
        def generate(self, prompts, n, sampling, tag):
            rollouts = super().generate(prompts, n, sampling, tag)
            return replace(rollouts, logprobs=rollouts.logprobs - 0.01) if tag.source == liar else rollouts

    config = small({"engine.name": "vllm"})
    options = {"batch_size": 64, "eos_ids": (1,), "pad_id": 0, "dtype": torch.float32}
    _, (row,) = trained(config, 1, make_engine=lambda loaded, _: Apart(loaded.model, **options))
    assert row["parity_policy"] < 1e-6 and row["parity_momentum"] < 1e-6
    with pytest.raises(StaleWeightsError, match=f"did not use the weights of {liar} version 0"):
        trained(config, 1, make_engine=lambda loaded, _: Lying(loaded.model, **options))
