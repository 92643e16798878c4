from __future__ import annotations

import json
import math

import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mgrpo.config import from_dict, to_dict
from mgrpo.process.disk import list_checkpoints, step_of
from mgrpo.tasks.arithmetic import make_tokenizer
from mgrpo.train import main
from mgrpo.training.observers import Evaluator

# Keys of the run directory's contract.
KEYS = """
step loss reward_mean majority_share top_answer_share token_entropy response_length unparseable_share
zero_signal_share pruned_share tie_share vote_agreement truncated_share distinct_answers pruned_length kept_length
nonfinite_steps tis_mean tis_clipped_share logprob_gap kl kl_initial grad_norm lr tokens_per_s step_s time_rollout_s
time_rollout_policy_s time_rollout_momentum_s time_score_s time_vote_s time_update_s time_ema_s time_publish_s
time_checkpoint_s vote_accuracy probe_accuracy_policy probe_accuracy_momentum
""".split()
SHARES = [
    key for key in KEYS if key.endswith("_share") or "accuracy" in key or key in ("reward_mean", "vote_agreement")
]


def steps_saved(run_dir):
    return [step_of(folder) for folder in list_checkpoints(run_dir)]


def test_metrics_have_every_key(launch, tmp_path, rows_of):
    options = {"steps": 4, "checkpoint.every": 2, "eval.every": 3, "log.kl_initial_every": 2, "objective.kl_coef": 0.01}
    options |= {"objective.kl_reference": "momentum", "data.probe": "arithmetic:6:2-3:5", "rollout.temperature": 1.3}
    assert launch(options) == 0
    rows = rows_of(tmp_path / "run", clocks=True)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        missing = [key for key in KEYS if key not in row]
        assert not missing
        assert all(0 <= row[key] <= 1 for key in SHARES if row[key] is not None)
        assert row["step_s"] >= row["time_rollout_s"] >= row["time_rollout_policy_s"] + row["time_rollout_momentum_s"]
        assert row["time_update_s"] >= row["time_ema_s"] > 0 and row["tokens_per_s"] > 0
        assert row["loss"] != 0 and row["kl"] >= 0 and row["grad_norm"] > 0 and row["lr"] == 2e-4
        assert row["response_length"] <= 24 and 1 <= row["distinct_answers"] <= 6
        assert row["logprob_gap"] < 1e-4 and row["tis_mean"] == pytest.approx(1, abs=1e-4)
    assert [row["kl_initial"] is None for row in rows] == [True, False, True, False]
    assert [row["probe_accuracy_policy"] is None for row in rows] == [True, True, False, False]
    assert [row["probe_accuracy_momentum"] is None for row in rows] == [True, True, False, False]
    # A checkpoint is written after the row of its step, so its time is in the next one.
    assert [row["time_checkpoint_s"] is None for row in rows] == [True, True, False, True]
    assert rows[0]["kl"] == 0 < rows[3]["kl"]


def test_what_does_not_apply_is_null(launch, tmp_path, rows_of):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"prompt": f"{i}+{i}="}) + "\n" for i in range(11, 20)))
    nothing = {"data.train": tmp_path / "train.jsonl", "rollout.num_momentum": 0, "filter.applies_to": "none"}
    assert launch(nothing | {"steps": 1}) == 0
    (row,) = rows_of(tmp_path / "run", clocks=True)
    null = ["vote_agreement", "pruned_length", "kl", "kl_initial", "time_rollout_momentum_s", "time_checkpoint_s"]
    null += ["vote_accuracy", "probe_accuracy_policy", "probe_accuracy_momentum"]
    assert not [key for key in KEYS if key not in row]
    assert [key for key in KEYS if row[key] is None] == [key for key in KEYS if key in null]


def test_the_run_directory(launch, small, tmp_path):
    run_dir = tmp_path / "run"
    backends = ["--log.backends", "tensorboard"]
    assert launch({"steps": 2, "eval.every": 1, "log.samples": 2}, *backends) == 0
    config = from_dict(json.loads((run_dir / "config.json").read_text()))
    expected = to_dict(small({"steps": 2, "eval.every": 1, "log.samples": 2, "log.backends": ("tensorboard",)}))
    assert to_dict(config) == expected | {"run_dir": str(run_dir)}
    assert list((run_dir / "tensorboard").glob("events*"))
    samples = pyarrow.parquet.read_table(run_dir / "samples" / "step_2.parquet").to_pylist()
    assert len(samples) == 2 * 6 and [s["source"] for s in samples[:6]] == ["policy"] * 4 + ["momentum"] * 2
    for sample in samples:
        assert sample["step"] == 2 and sample["response"].removesuffix("<eos>").endswith(f"#{sample['answer']}")
        assert sample["reward"] == (sample["answer"] == sample["pseudo_label"])
        assert not (sample["advantage"] and (sample["source"] == "momentum" or not sample["kept"]))
    for source in ("policy", "momentum"):
        folder = run_dir / "checkpoints" / "step_2" / source
        assert AutoModelForCausalLM.from_pretrained(folder).config.model_type == "qwen3"
        assert AutoTokenizer.from_pretrained(folder).encode("12+34=") == make_tokenizer().encode("12+34=")


def test_a_run_ends_with_its_report(command_line, tmp_path):
    assert main(command_line(tmp_path / "run", {"steps": 2})) == 0
    assert "<html" in (tmp_path / "run" / "report.html").read_text()
    assert list((tmp_path / "run" / "plots").glob("*.png"))


def test_checkpoints_are_pruned_to_the_last_and_the_best(launch, tmp_path, rows_of, monkeypatch):
    accuracy = iter([0.1, 0.9, 0.3, 0.2, 0.1])
    monkeypatch.setattr(Evaluator, "metrics", lambda self, step: {"probe_accuracy_policy": next(accuracy)})
    options = {"steps": 5, "checkpoint.every": 1, "eval.every": 1, "checkpoint.keep_last": 1, "checkpoint.keep_best": 2}
    assert launch(options) == 0
    assert steps_saved(tmp_path / "run") == [2, 3, 5]
    assert launch(options | {"eval.every": 0}, run_dir=tmp_path / "other") == 0
    assert steps_saved(tmp_path / "other") == [5]


def test_stop_after_keeps_the_schedule_of_the_whole_run(launch, tmp_path, rows_of):
    schedule = {"steps": 4, "optim.schedule": "cosine", "optim.warmup_ratio": 0.25, "optim.lr": 1e-3}
    assert launch(schedule, "--stop-after", "3") == 0
    rates = [row["lr"] for row in rows_of(tmp_path / "run")]
    assert rates == pytest.approx([1e-3 * share for share in (1, 1, 0.75)])


def test_one_seed_gives_one_run(launch, tmp_path, rows_of, weights_of, small, trained):
    config = small({"data.probe": "arithmetic:6:2-3:5", "eval.every": 2})
    (first, rows), (second, again) = trained(config, 3), trained(config, 3)
    assert rows == again
    for (name, one), other in zip(weights_of(first).items(), weights_of(second).values(), strict=True):
        assert torch.equal(one, other), name
    third, others = trained(small({"seed": 1}), 3)
    assert rows[0]["reward_mean"] != others[0]["reward_mean"] or rows[0]["loss"] != others[0]["loss"]
    assert not torch.equal(first.model.model.norm.weight, third.model.model.norm.weight)


def test_rollouts_depend_on_seed_and_step(small, trained):
    # One prompt, weights that stay: what differs is drawn.
    still = {"data.train": "arithmetic:1:6:0", "rollout.num_prompts": 1, "rollout.temperature": 2.0, "optim.lr": 0.0}
    drawn = [
        row["token_entropy" + suffix]
        for seed in (0, 1)
        for row in trained(small(still | {"seed": seed}), 2)[1]
        for suffix in ("_policy", "_momentum")
    ]
    assert len(set(drawn)) == len(drawn)


def test_the_order_of_prompts_depends_on_the_seed(small, trained):
    orders = [[trained(small({"seed": seed}), 0)[0].sampler.next() for _ in range(2)] for seed in (0, 1)]
    assert orders[0][0] == orders[0][1] != orders[1][0] == orders[1][1]


@pytest.mark.parametrize("reduce", ["token-mean", "sequence-mean-token-mean", "constant"])
def test_micro_batches_do_not_change_the_gradient(small, trained, reduce):
    options = {"objective.reduce": reduce, "objective.kl_coef": 0.1, "objective.kl_reference": "momentum"}
    gradients, calls = [], []
    for tokens in (64, 16384):
        trainer, _ = trained(small(options | {"optim.micro_batch_tokens": tokens, "optim.grad_clip": math.inf}), 0)
        score = trainer.learner.forward.__call__
        trainer.learner.forward = Counted(trainer.forward, score)
        trainer.train_step()
        calls.append(trainer.learner.forward.calls)
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
    assert calls[0] > 5 > calls[1] == 1
    error, size = (gradients[0] - gradients[1]).norm(), gradients[1].norm()
    assert size > 1e-3 and error < 1e-5 * size


class Counted:
    """Counts the forward passes of a forward."""

    def __init__(self, forward, score):
        self.plan, self.own, self.score, self.calls = forward.plan, forward.own, score, 0

    def __call__(self, *args, **options):
        self.calls += 1
        return self.score(*args, **options)


def test_momentum_is_the_average_of_the_policies_on_its_way(small, trained):
    trainer, _ = trained(small({"momentum.decay": 0.75, "optim.lr": 1e-3}), 0)
    expected = {name: p.detach().double() for name, p in trainer.model.named_parameters()}
    start = {name: value.clone() for name, value in expected.items()}
    for _ in trainer.train(4):
        for name, p in trainer.model.named_parameters():
            expected[name] = 0.75 * expected[name] + 0.25 * p.detach().double()
    for name, weight in trainer.momentum.weights.items():
        assert (weight - expected[name]).abs().max() < 1e-6, name
        assert (expected[name] - start[name]).abs().max() > 1e-4, name


@pytest.mark.parametrize(("decay", "follows"), [(0.0, "policy"), (1.0, "start")])
def test_ends_of_the_decay(small, trained, decay, follows):
    trainer, _ = trained(small({"momentum.decay": decay}), 0)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    list(trainer.train(2))
    policy = dict(trainer.model.named_parameters())
    for name, weight in trainer.momentum.weights.items():
        assert torch.equal(weight, policy[name] if follows == "policy" else start[name]), name
        assert not torch.equal(policy[name], start[name]), name


def test_rollouts_come_from_the_weights_they_are_named_for(small, trained):
    """After training, log-probs of the engine agree with a forward pass under the same weights, and only those."""
    trainer, _ = trained(small({"optim.lr": 3e-3, "momentum.decay": 1.0}), 3)
    trainer.train_step()
    trajectories = trainer.generator.roll_out([prompt.ids for prompt in trainer.data.prompts[:4]], 5)
    under_policy = trainer.passes.logprobs(trajectories).logprob
    with trainer.momentum.swapped():
        under_momentum = trainer.passes.logprobs(trajectories).logprob
    of_momentum = trajectories.is_momentum.flatten()
    for rows, own, other in (
        (~of_momentum, under_policy, under_momentum),
        (of_momentum, under_momentum, under_policy),
    ):
        mask = trajectories.mask[rows]
        reported = trajectories.rollout_logprob[rows][mask]
        assert (reported - own[rows][mask]).abs().max() < 1e-4
        assert (reported - other[rows][mask]).abs().max() > 1e-2
