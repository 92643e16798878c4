"""Optimiser steps: schedule, gradient, minibatches, non-finite steps, weight decay."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from helpers import loaded as as_loaded
from helpers import make_trajectories, one_by_one, same_bits, snapshot

from mgrpo.algorithm.loss import Batch
from mgrpo.config import Config, ObjectiveConfig, OptimConfig
from mgrpo.models.forward import Forward
from mgrpo.models.momentum import Momentum
from mgrpo.observe.timer import Timer
from mgrpo.presets import mgrpo_arithmetic
from mgrpo.tasks.arithmetic import make_model, make_problems, make_tokenizer
from mgrpo.training.learner import Learner
from mgrpo.training.schedule import learning_rate
from mgrpo_kernels.testing import assert_within_budget

# B = 4 prompts, M = 2 policy and N = 1 momentum rollouts each.
NUM_PROMPTS, GROUP = 4, 3
LENGTHS = [5, 3, 4, 2, 6, 1, 3, 3, 5, 4, 2, 6]
ADVANTAGE = torch.tensor([[1.0, -1.0, 0.0], [0.7, -0.7, 0.0], [0.0, 0.0, 0.0], [-0.5, 0.5, 0.0]])


def configure(**options: object) -> Config:
    """The preset on two steps; options belong to the optimiser or the objective."""
    base = mgrpo_arithmetic()
    optim = {key: options.pop(key) for key in list(options) if key in OptimConfig.__dataclass_fields__}
    return replace(
        base,
        steps=2,
        rollout=replace(base.rollout, num_prompts=NUM_PROMPTS, num_policy=2, num_momentum=1, max_new_tokens=8),
        optim=replace(base.optim, **optim),
        objective=replace(ObjectiveConfig(kl_coef=0.0, kl_reference="none"), **options),
    )


class Setting:
    """A learner on the task's model with random responses; `batch` may be changed before `update`."""

    def __init__(self, config: Config, *, seed: int = 0):
        self.config, self.model = config, make_model()
        torch.manual_seed(1)
        with torch.no_grad():
            self.model.get_input_embeddings().weight.mul_(20)  # tied: logits far from flat
        loaded = as_loaded(self.model)
        self.momentum = Momentum(self.model, config.momentum, seed=0, kernels=config.kernels)
        forward = Forward(
            loaded, temperature=1.1, kernels=config.kernels, micro_batch_tokens=config.optim.micro_batch_tokens
        )
        self.learner = Learner(config, loaded, self.momentum, forward, Timer())
        tokenizer = make_tokenizer()
        prompts = [tokenizer.encode(p.prompt) for p in make_problems(NUM_PROMPTS, operands=(2, 3), seed=seed)]
        responses = [torch.randint(2, 17, (length,)).tolist() for length in LENGTHS]
        self.trajectories = make_trajectories(prompts, responses, num_policy=2)
        old = forward.run(self.model, self.trajectories).logprob
        self.batch = Batch(
            mask=self.trajectories.mask,
            advantage=ADVANTAGE.flatten(),
            old_logprob=old,
            rollout_logprob=old - 0.3 * torch.rand(old.shape) * self.trajectories.mask,
            ref_logprob=None,
        )
        self.trains = ~self.trajectories.is_momentum

    def update(self):
        return self.learner.update(self.trajectories, self.batch, self.trains).metrics

    def state(self) -> dict[str, torch.Tensor]:
        """Copies of everything that an update may change."""
        moments = {
            f"{i}.{key}": value
            for i, state in enumerate(self.learner.optimizer.state.values())
            for key, value in state.items()
        }
        return snapshot(
            dict(self.model.named_parameters())
            | {f"momentum.{name}": weight for name, weight in self.momentum.weights.items()}
            | moments
        )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"schedule": "constant", "warmup_ratio": 0.0}, [1.0] * 10),
        ({"schedule": "constant", "warmup_ratio": 0.4}, [0.25, 0.5, 0.75, 1.0] + [1.0] * 6),
        (
            {"schedule": "cosine", "warmup_ratio": 0.2},
            [0.5, 1.0] + [0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)],
        ),
        ({"schedule": "cosine", "warmup_ratio": 0.0}, [0.5 * (1 + math.cos(math.pi * i / 10)) for i in range(10)]),
    ],
)
def test_learning_rate(options, expected):
    config = Config(steps=5, optim=OptimConfig(lr=3e-4, num_minibatches=2, **options))
    assert [learning_rate(config, step) / 3e-4 for step in range(10)] == pytest.approx(expected, rel=1e-12)
    assert learning_rate(replace(config, optim=replace(config.optim, schedule="cosine")), 10) == pytest.approx(0)


def test_each_optimiser_step_has_its_learning_rate():
    setting = Setting(configure(lr=1e-3, schedule="cosine", warmup_ratio=0.5, num_minibatches=2))
    rates = []
    setting.learner.optimizer.register_step_pre_hook(lambda opt, *_: rates.append(opt.param_groups[0]["lr"]))
    setting.update()
    metrics = setting.update()
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3, 5e-4])
    assert metrics["lr"] == pytest.approx(7.5e-4)


def expected_gradient(model, setting: Setting) -> dict[str, torch.Tensor]:
    """Gradient of the token mean of -w min(rho A, clip(rho) A), one sequence at a time."""
    rows = [row for row in range(len(LENGTHS)) if row % GROUP < 2]
    logprob = one_by_one(model, setting.trajectories, 1.1, rows)[0]
    batch, total = setting.batch, 0.0
    for row in rows:
        for t in range(LENGTHS[row]):
            advantage = float(batch.advantage[row])
            ratio = (logprob[row, t] - batch.old_logprob[row, t].to(logprob.dtype)).exp()
            weight = min(math.exp(batch.old_logprob[row, t].item() - batch.rollout_logprob[row, t].item()), 2.0)
            total = total - weight * torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    (total / sum(LENGTHS[row] for row in rows)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("micro_batch_tokens", [1, 40, 10**6])
def test_gradient_is_that_of_the_formula_for_every_micro_batch_size(micro_batch_tokens):
    setting = Setting(configure(lr=0.0, grad_clip=math.inf, micro_batch_tokens=micro_batch_tokens))
    metrics = setting.update()
    oracle = expected_gradient(copy.deepcopy(setting.model).double(), setting)
    actual = {name: p.grad.clone() for name, p in setting.model.named_parameters()}
    setting.model.zero_grad()
    reference = expected_gradient(setting.model, setting)
    for name in actual:
        assert_within_budget(actual[name], oracle[name], reference[name], reduction_length=96 * sum(LENGTHS), what=name)
    norm = torch.stack([g.norm() for g in oracle.values()]).norm()
    assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-5)


def test_gradient_is_clipped():
    free, clipped = (Setting(configure(lr=0.0, grad_clip=clip)) for clip in (math.inf, 1e-3))
    norm = free.update()["grad_norm"]
    assert norm > 2e-3
    assert clipped.update()["grad_norm"] == pytest.approx(norm)
    for one, other in zip(free.model.parameters(), clipped.model.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad * (1e-3 / norm))


@pytest.mark.parametrize(("minibatches", "epochs"), [(1, 1), (2, 3), (4, 1), (3, 2)])
def test_minibatches_times_epochs(minibatches, epochs):
    setting = Setting(configure(lr=1e-3, num_minibatches=minibatches, num_epochs=epochs))
    seen, averaged, steps = [], [], []
    take, average = setting.learner.optimizer_step, setting.momentum.update
    setting.learner.optimizer_step = lambda t, b, rows, *rest, **options: (
        seen.append(rows.tolist()) or take(t, b, rows, *rest, **options)
    )
    setting.momentum.update = lambda step, num: averaged.append((step, num)) or average(step, num)
    setting.learner.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    setting.update()
    count = minibatches * epochs
    assert len(seen) == len(steps) == setting.learner.step == count
    assert averaged == [(step, 2 * count) for step in range(count)]
    trained = [row for row in range(12) if row % GROUP < 2]
    for epoch in range(epochs):
        part = seen[epoch * minibatches : (epoch + 1) * minibatches]
        assert sorted(row for rows in part for row in rows) == trained
        prompts = [{row // GROUP for row in rows} for rows in part]
        assert sum(map(len, prompts)) == NUM_PROMPTS


def test_ema_reads_the_weights_after_the_step():
    setting = Setting(configure(lr=1e-2))
    start = snapshot(setting.momentum.weights)
    setting.update()
    for name, parameter in setting.model.named_parameters():
        assert not torch.equal(parameter, start[name])
        assert torch.equal(setting.momentum.weights[name], start[name].lerp(parameter.detach(), 1 - 0.99))


@pytest.mark.parametrize("field", ["rollout_logprob", "old_logprob", "advantage"])
def test_a_non_finite_loss_touches_nothing(field):
    setting = Setting(configure(lr=1e-2))
    setting.update()
    before, good = setting.state(), setting.batch
    values = getattr(good, field).clone()
    values[0] = math.nan
    setting.batch = replace(good, **{field: values})
    for count in (1, 2):
        metrics = setting.update()
        assert same_bits(setting.state(), before)
        assert metrics["nonfinite_steps"] == setting.learner.nonfinite_in_row == count
    setting.batch = good
    metrics = setting.update()
    assert setting.learner.nonfinite_in_row == 0
    assert metrics["nonfinite_steps"] == 2
    assert setting.learner.step == 4
    assert not same_bits(setting.state(), before)


def test_a_non_finite_gradient_touches_nothing():
    setting = Setting(configure(lr=1e-2))
    setting.update()
    before = setting.state()
    hook = setting.model.model.norm.weight.register_hook(lambda grad: grad * math.inf)
    metrics = setting.update()
    hook.remove()
    assert math.isfinite(metrics["loss"])
    assert same_bits(setting.state(), before)
    assert metrics["nonfinite_steps"] == 1


def test_one_bad_minibatch_spares_the_others():
    setting = Setting(configure(lr=1e-2, num_minibatches=2))
    setting.batch.rollout_logprob[0, 2] = math.nan
    before = setting.state()
    metrics = setting.update()
    assert metrics["nonfinite_steps"] == 1
    assert setting.learner.nonfinite_in_row == 0
    assert not same_bits(setting.state(), before)
    assert all(values.isfinite().all() for values in setting.state().values())


def test_weight_decay_is_for_matrices():
    setting = Setting(configure(lr=0.1, weight_decay=0.5))
    setting.batch = replace(setting.batch, advantage=torch.zeros(12))
    before = setting.state()
    setting.update()
    dimensions = set()
    for name, parameter in setting.model.named_parameters():
        dimensions.add(parameter.ndim)
        expected = before[name] * (1 - 0.1 * 0.5) if parameter.ndim > 1 else before[name]
        assert torch.equal(parameter, expected), name
    assert dimensions == {1, 2}


def test_nothing_to_learn_from_reports_no_ratio():
    setting = Setting(configure())
    setting.batch = replace(setting.batch, advantage=torch.zeros(12))
    before = snapshot(dict(setting.model.named_parameters()))
    metrics = setting.update()
    assert (metrics["loss"], metrics["grad_norm"], metrics["ratio_mean"]) == (0.0, 0.0, None)
    assert same_bits(snapshot(dict(setting.model.named_parameters())), before)


def test_metrics_are_weighted_by_tokens():
    whole, split = (Setting(configure(lr=0.0, micro_batch_tokens=size)) for size in (10**6, 1))
    one, other = whole.update(), split.update()
    for key in ("loss", "ratio_mean", "tis_mean", "tis_clipped_share"):
        assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), key
    rows = whole.batch.advantage != 0
    weight = (whole.batch.old_logprob - whole.batch.rollout_logprob)[rows][whole.batch.mask[rows]].exp()
    assert one["tis_mean"] == pytest.approx(float(weight.clamp_max(2).mean()), rel=1e-5)


@pytest.mark.fault("NaN at padding")
def test_nan_at_padding_changes_nothing():
    clean, dirty = Setting(configure(lr=1e-2)), Setting(configure(lr=1e-2))
    padding = ~dirty.batch.mask
    dirty.batch = replace(
        dirty.batch,
        old_logprob=dirty.batch.old_logprob.masked_fill(padding, torch.nan),
        rollout_logprob=dirty.batch.rollout_logprob.masked_fill(padding, torch.nan),
    )
    dirty.trajectories = replace(dirty.trajectories, tokens=dirty.trajectories.tokens.masked_fill(padding, 9))
    assert clean.update() == dirty.update()
    assert same_bits(clean.state(), dirty.state())


def test_rollouts_that_do_not_train_change_nothing():
    clean, dirty = Setting(configure(lr=1e-2)), Setting(configure(lr=1e-2))
    other = dirty.trajectories.is_momentum.flatten()[:, None]
    dirty.batch = replace(
        dirty.batch,
        advantage=dirty.batch.advantage.masked_fill(other[:, 0], 9.0),
        rollout_logprob=dirty.batch.rollout_logprob.masked_fill(other, torch.nan),
    )
    clean.update()
    dirty.update()
    assert same_bits(clean.state(), dirty.state())


def test_momentum_rollouts_train_with_their_weight_where_asked():
    setting = Setting(configure(lr=0.0, grad_clip=math.inf, momentum_in_loss=True))
    row = 2
    advantage = torch.zeros(12).index_fill(0, torch.tensor([row]), 1.0)
    gradients = []
    for gap in (0.0, math.log(0.5), math.log(50.0)):
        setting.batch = replace(
            setting.batch, advantage=advantage, rollout_logprob=setting.batch.old_logprob - gap * setting.batch.mask
        )
        setting.trains = torch.ones(4, 3, dtype=torch.bool)
        setting.update()
        gradients.append(torch.cat([p.grad.flatten() for p in setting.model.parameters()]))
    plain, half, capped = gradients
    assert plain.norm() > 0
    torch.testing.assert_close(half, 0.5 * plain, rtol=1e-4, atol=float(plain.abs().max()) * 1e-6)
    torch.testing.assert_close(capped, 2.0 * plain, rtol=1e-4, atol=float(plain.abs().max()) * 1e-6)


def test_a_later_epoch_meets_the_clip():
    """logp_old is frozen once a rollout batch: after a large step the ratios leave the band."""
    setting = Setting(configure(lr=5e-2, num_epochs=2))
    ratios = []
    take = setting.learner.optimizer_step

    def note(*args, **options):
        metrics, fault = take(*args, **options)
        ratios.append(metrics)
        return metrics, fault

    setting.learner.optimizer_step = note
    setting.update()
    assert ratios[0]["ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    assert ratios[0]["clip_low_share"] == ratios[0]["clip_high_share"] == 0
    assert ratios[1]["clip_low_share"] + ratios[1]["clip_high_share"] > 0.2


def test_an_infinite_importance_cap_is_no_cap():
    setting = Setting(configure(lr=0.0, tis_cap=math.inf))
    assert setting.update()["tis_clipped_share"] == 0


def test_kl_moves_prompts_without_signal():
    setting = Setting(configure(lr=0.0, kl_coef=0.1, kl_reference="initial"))
    setting.batch = replace(
        setting.batch, advantage=torch.zeros(12), ref_logprob=setting.batch.old_logprob - 0.5 * setting.batch.mask
    )
    metrics = setting.update()
    assert metrics["grad_norm"] > 0
    assert metrics["kl"] == pytest.approx(math.exp(-0.5) - 1 + 0.5, rel=1e-4)
    assert metrics["loss"] == pytest.approx(0.1 * metrics["kl"], rel=1e-4)
