"""Advantages, normaliser, and the loss of micro-batches against a loss written out token by token in fp64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from mgrpo.algorithm.advantage import group_advantage
from mgrpo.algorithm.loss import Batch, has_gradient, kl_cov_tokens, micro_batch_loss, normalizer
from mgrpo.config import ObjectiveConfig
from mgrpo_kernels.testing import assert_within_budget

LENGTHS = [3, 5, 1, 4, 2, 5]
MAX_LENGTH = 8
PLAIN = ObjectiveConfig(kl_coef=0.0, kl_reference="none")
REDUCES = ("token-mean", "sequence-mean-token-mean", "constant")
SPLITS = ([[0, 1, 2, 3, 4, 5]], [[0], [1], [2], [3], [4], [5]], [[5, 2], [0, 3, 1], [4]])


def make_batch(*, reference: bool = True, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Batch]:
    """Log-probs and entropies [R, L] of six trajectories, and a batch whose ratios leave the clip on both sides."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    old = -3 * torch.rand(mask.shape, generator=g)
    logprob = old + 0.4 * torch.randn(mask.shape, generator=g)
    rollout = old + 0.6 * torch.randn(mask.shape, generator=g)
    ref = old + 0.5 * torch.randn(mask.shape, generator=g)
    batch = Batch(
        mask=mask,
        advantage=torch.tensor([1.3, -0.7, 0.4, -1.1, 0.0, 0.8]),
        old_logprob=old * mask,
        rollout_logprob=rollout * mask,
        ref_logprob=ref * mask if reference else None,
    )
    return logprob, torch.rand(mask.shape, generator=g), batch


def loss_and_grads(logprob, entropy, batch, split, config, *, kl_cov=None, normaliser=None, dtype=torch.float32):
    """Summed loss and gradients of a split into micro-batches."""
    x, h = (t.to(dtype).clone().requires_grad_() for t in (logprob, entropy))
    divisor = normalizer(batch.mask, config.reduce, MAX_LENGTH) if normaliser is None else normaliser
    total = torch.zeros((), dtype=dtype)
    for rows in map(torch.tensor, split):
        mask = batch.mask[rows]
        loss = micro_batch_loss(
            x[rows][mask], h[rows][mask], batch, rows, divisor, config, kl_cov=kl_cov, max_length=MAX_LENGTH
        ).loss
        loss.backward()
        total += loss.detach()
    return total, x.grad, torch.zeros_like(x) if h.grad is None else h.grad


def written_out(logprob, entropy, batch, config, *, kl_cov=None, dtype=torch.float64):
    """The same loss and gradients from its formula, one token at a time, and the summed size of the loss's terms."""
    x, h = (t.to(dtype).clone().requires_grad_() for t in (logprob, entropy))
    total, size = torch.zeros((), dtype=dtype), 0.0
    for i, length in enumerate(LENGTHS):
        a = batch.advantage[i].item()
        sequence = torch.zeros((), dtype=dtype)
        mean_log_ratio = (x[i, :length] - batch.old_logprob[i, :length].to(dtype)).mean().detach()
        for t in range(length):
            log_ratio = x[i, t] - batch.old_logprob[i, t].to(dtype)
            weight = min(math.exp(batch.old_logprob[i, t].item() - batch.rollout_logprob[i, t].item()), config.tis_cap)
            if kl_cov is not None and kl_cov[i, t]:
                term = -weight * a * log_ratio.exp() + config.kl_cov_coef * log_ratio.abs()
            else:
                ratio = log_ratio.exp()
                if config.ratio == "sequence":
                    ratio = (mean_log_ratio + x[i, t] - x[i, t].detach()).exp()
                clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
                term = -weight * torch.minimum(ratio * a, clipped * a)
            if batch.ref_logprob is not None:
                d = batch.ref_logprob[i, t].to(dtype) - x[i, t]
                term = term + config.kl_coef * (d.exp() - d - 1)
            share = 1 / length if config.reduce == "sequence-mean-token-mean" else 1.0
            sequence = sequence + share * (term - config.entropy_coef * h[i, t])
            size += share * abs(term.item())
        total = total + sequence
    divisor = {"token-mean": sum(LENGTHS), "sequence-mean-token-mean": len(LENGTHS)}.get(
        config.reduce, len(LENGTHS) * MAX_LENGTH
    )
    total = total / divisor
    total.backward()
    return (total.detach(), x.grad, torch.zeros_like(x) if h.grad is None else h.grad), size / divisor


def assert_all_within_budget(actual, oracle, reference, size):
    """The terms of a loss cancel, so that its rounding goes with their `size` and not with the sum's."""
    loss, expected, baseline = (values[0].double() for values in (actual, oracle, reference))
    slack = torch.finfo(torch.float32).eps * math.sqrt(sum(LENGTHS)) * size
    assert (loss - expected).abs() <= 2 * (baseline - expected).abs() + slack
    for name, *values in zip(("dlogprob", "dentropy"), actual[1:], oracle[1:], reference[1:], strict=True):
        assert_within_budget(*values, reduction_length=sum(LENGTHS), what=name)


def assert_matches_formula(actual, logprob, entropy, batch, config, *, kl_cov=None):
    oracle, size = written_out(logprob, entropy, batch, config, kl_cov=kl_cov)
    reference, _ = written_out(logprob, entropy, batch, config, kl_cov=kl_cov, dtype=torch.float32)
    assert_all_within_budget(actual, oracle, reference, size)


@pytest.mark.parametrize("split", SPLITS, ids=["one", "each", "shuffled"])
@pytest.mark.parametrize("reduce", REDUCES)
@pytest.mark.parametrize(
    "options",
    [
        {"kl_coef": 0.0},
        {"kl_coef": 0.3, "entropy_coef": 0.2, "clip_high": 0.28},
        {"kl_coef": 0.1, "ratio": "sequence", "tis_cap": 1.1},
    ],
    ids=["plain", "kl and entropy", "sequence ratio"],
)
def test_micro_batches_add_up_to_the_formula(split, reduce, options):
    logprob, entropy, batch = make_batch(reference=options["kl_coef"] > 0)
    config = ObjectiveConfig(reduce=reduce, **options)
    actual = loss_and_grads(logprob, entropy, batch, split, config)
    assert_matches_formula(actual, logprob, entropy, batch, config)


@pytest.mark.parametrize("split", SPLITS[1:], ids=["each", "shuffled"])
@pytest.mark.parametrize("reduce", REDUCES)
def test_kl_cov_does_not_depend_on_the_split(split, reduce):
    logprob, entropy, batch = make_batch()
    config = ObjectiveConfig(reduce=reduce, kl_coef=0.1, kl_cov=0.3, kl_cov_coef=0.7)
    chosen = kl_cov_tokens(batch, torch.arange(6), config.kl_cov)
    assert chosen.sum() == 6
    actual = loss_and_grads(logprob, entropy, batch, split, config, kl_cov=chosen)
    one = loss_and_grads(logprob, entropy, batch, SPLITS[0], config, kl_cov=chosen)
    oracle = loss_and_grads(logprob, entropy, batch, SPLITS[0], config, kl_cov=chosen, dtype=torch.float64)
    _, size = written_out(logprob, entropy, batch, config, kl_cov=chosen)
    assert_all_within_budget(actual, oracle, one, size)


@pytest.mark.parametrize("reduce", REDUCES)
def test_kl_cov_replaces_the_clip_of_its_tokens_alone(reduce):
    logprob, entropy, batch = make_batch()
    batch = replace(batch, rollout_logprob=batch.old_logprob)
    config = ObjectiveConfig(reduce=reduce, kl_coef=0.1, kl_cov=0.3, kl_cov_coef=0.7)
    chosen = kl_cov_tokens(batch, torch.arange(6), config.kl_cov)
    actual = loss_and_grads(logprob, entropy, batch, SPLITS[2], config, kl_cov=chosen)
    assert_matches_formula(actual, logprob, entropy, batch, config, kl_cov=chosen)


def test_kl_cov_keeps_the_importance_weight():
    logprob, entropy, batch = make_batch()
    config = ObjectiveConfig(kl_coef=0.1, kl_cov=0.3, kl_cov_coef=0.7)
    chosen = kl_cov_tokens(batch, torch.arange(6), config.kl_cov)
    actual = loss_and_grads(logprob, entropy, batch, SPLITS[0], config, kl_cov=chosen)
    assert_matches_formula(actual, logprob, entropy, batch, config, kl_cov=chosen)


def test_kl_cov_picks_the_highest_covariances():
    batch = Batch(
        mask=torch.tensor([[True, True, False], [True, True, True], [True, True, True]]),
        advantage=torch.tensor([1.0, -1.0, 50.0]),
        old_logprob=torch.tensor([[-1.0, -3.0, 9.0], [-1.0, -2.0, -3.0], [0.0, -9.0, -9.0]]),
        rollout_logprob=torch.zeros(3, 3),
        ref_logprob=None,
    )
    # Without row 2: mean log-prob -2, mean advantage -0.2; covariances 1.2, -1.2 and -0.8, 0, 0.8.
    for share, expected in (
        (0.0, [[False] * 3, [False] * 3]),
        (0.2, [[True, False, False], [False] * 3]),
        (0.4, [[True, False, False], [False, False, True]]),
        (0.6, [[True, False, False], [False, True, True]]),
    ):
        chosen = kl_cov_tokens(batch, torch.tensor([0, 1]), share)
        assert chosen.tolist() == [*expected, [False] * 3], share


def test_kl_cov_needs_no_tokens():
    _, _, batch = make_batch()
    assert not kl_cov_tokens(batch, torch.tensor([], dtype=torch.int64), 0.5).any()


@pytest.mark.parametrize("reduce", REDUCES)
def test_normaliser_counts_every_rollout_of_the_step(reduce):
    mask = make_batch()[2].mask
    expected = {"token-mean": 20, "sequence-mean-token-mean": 6, "constant": 48}[reduce]
    assert normalizer(mask, reduce, MAX_LENGTH).item() == expected
    assert normalizer(mask[:0], reduce, MAX_LENGTH).item() == {"constant": MAX_LENGTH}.get(reduce, 1)


@pytest.mark.parametrize("reduce", REDUCES)
def test_skipping_rows_without_gradient_changes_no_gradient(reduce):
    logprob, entropy, batch = make_batch(reference=False)
    config = replace(PLAIN, reduce=reduce)
    rows = has_gradient(batch.advantage, config).nonzero().flatten().tolist()
    assert rows == [0, 1, 2, 3, 5]
    everything = loss_and_grads(logprob, entropy, batch, SPLITS[1], config)
    skipped = loss_and_grads(logprob, entropy, batch, [[row] for row in rows], config)
    assert torch.equal(skipped[1], everything[1])
    assert everything[1][4].eq(0).all()
    assert everything[1][rows].abs().amax(1).gt(0).all()


@pytest.mark.parametrize("option", [{"kl_coef": 0.1}, {"entropy_coef": 0.1}, {"entropy_coef": -0.1}])
def test_a_row_of_advantage_zero_is_kept_where_other_terms_move_it(option):
    logprob, entropy, batch = make_batch()
    config = ObjectiveConfig(**{"kl_coef": 0.0} | option)
    assert has_gradient(batch.advantage, config).all()
    _, dlogprob, dentropy = loss_and_grads(logprob, entropy, batch, SPLITS[0], config)
    assert max(dlogprob[4].abs().max(), dentropy[4].abs().max()) > 0


@pytest.mark.parametrize("cap", [0.5, 2.0])
def test_importance_weight_of_a_momentum_rollout(cap):
    """At logprob = old the gradient of a token is -A min(pi_old / pi_momentum, C) / tokens."""
    log_gap = torch.tensor([[math.log(0.25), 0.0, math.log(1.5), math.log(40.0)]])
    old = torch.tensor([[-4.0, -2.0, -3.0, -5.0]])
    batch = Batch(
        mask=torch.ones(1, 4, dtype=torch.bool),
        advantage=torch.tensor([1.5]),
        old_logprob=old,
        rollout_logprob=old - log_gap,
        ref_logprob=None,
    )
    _, grad, _ = loss_and_grads(old, torch.zeros(1, 4), batch, [[0]], replace(PLAIN, tis_cap=cap))
    expected = [-1.5 * min(w, cap) / 4 for w in (0.25, 1.0, 1.5, 40.0)]
    assert grad[0].tolist() == pytest.approx(expected, rel=8 * torch.finfo(torch.float32).eps)


def test_empty_responses_move_no_advantage():
    mask = torch.tensor([[False] * 3, [True] * 3, [True, False, False], [False] * 3])
    zeros = torch.zeros(4, 3)
    batch = Batch(
        mask=mask,
        advantage=torch.tensor([0.0, 1.0, -1.0, 0.0]),
        old_logprob=zeros,
        rollout_logprob=zeros,
        ref_logprob=None,
    )
    _, grad, _ = loss_and_grads(zeros, zeros, batch, [[0, 1, 2, 3]], PLAIN)
    assert grad[mask].tolist() == [-0.25, -0.25, -0.25, 0.25]


def test_padding_may_hold_anything():
    logprob, entropy, batch = make_batch()

    def poison(t):
        return t.masked_fill(~batch.mask, torch.nan)

    poisoned = replace(
        batch,
        old_logprob=poison(batch.old_logprob),
        rollout_logprob=poison(batch.rollout_logprob),
        ref_logprob=poison(batch.ref_logprob),
    )
    config = ObjectiveConfig(kl_cov=0.3)
    chosen = kl_cov_tokens(batch, torch.arange(6), 0.3)
    assert torch.equal(kl_cov_tokens(poisoned, torch.arange(6), 0.3), chosen)
    clean = loss_and_grads(logprob, entropy, batch, SPLITS[2], config, kl_cov=chosen)
    dirty = loss_and_grads(poison(logprob), entropy, poisoned, SPLITS[2], config, kl_cov=chosen)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


REWARDS = torch.tensor([[1.0, 0.0, 1.0, 0.0, 1.0, 1.0]])
KEEP = torch.tensor([[True, True, True, True, True, False]])
BY_POLICY = torch.tensor([[True, True, True, True, False, False]])


def std_advantages(rewards: list[float], over: list[float]) -> list[float]:
    mean = sum(over) / len(over)
    std = math.sqrt(sum((r - mean) ** 2 for r in over) / (len(over) - 1))
    return [(r - mean) / (std + 1e-6) for r in rewards]


WINNER_OF_FIVE = std_advantages([1], [1, 0, 1, 0, 1])[0]


@pytest.mark.parametrize(
    ("trained", "over", "expected"),
    [
        ([0, 1, 2], "trained", [*std_advantages([1, 0, 1], [1, 0, 1]), 0, 0, 0]),
        ([0, 1, 2], "all", [*std_advantages([1, 0, 1], [1, 0, 1, 0, 1]), 0, 0, 0]),
        ([0, 1, 2, 3, 4], "trained", [*std_advantages([1, 0, 1, 0, 1], [1, 0, 1, 0, 1]), 0]),
        ([0, 2], "trained", [0, 0, 0, 0, 0, 0]),
        ([0, 2], "all", [WINNER_OF_FIVE, 0, WINNER_OF_FIVE, 0, 0, 0]),
        ([0], "trained", [0, 0, 0, 0, 0, 0]),
    ],
    ids=["trained", "all", "momentum trains", "equal rewards", "equal trained, not all", "one"],
)
def test_advantage_statistics(trained, over, expected):
    """Only a rollout that trains has an advantage; a momentum one (4 and 5 here) does where it trains."""
    trains = torch.zeros(1, 6, dtype=torch.bool)
    trains[0, trained] = True
    got = group_advantage(REWARDS, KEEP, trains & KEEP, ObjectiveConfig(advantage_over=over))
    assert got[0].tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("mean", [0.5, -0.5, 0.5, -0.5, 0, 0]),
        ("leave-one-out", [1 - 1 / 3, -2 / 3, 1 - 1 / 3, -2 / 3, 0, 0]),
        ("sign", [1, -1, 1, -1, 0, 0]),
    ],
)
def test_advantage_modes(mode, expected):
    got = group_advantage(REWARDS, KEEP, BY_POLICY, ObjectiveConfig(advantage=mode))
    assert got[0].tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("mode", ["std", "mean", "leave-one-out", "sign"])
def test_equal_rewards_give_no_advantage(mode):
    rewards = torch.tensor([[1.0, 1, 1, 1, 0, 0], [0.0, 0, 0, 0, 1, 1]])
    trains = BY_POLICY.expand(2, 6)
    assert group_advantage(rewards, trains, trains, ObjectiveConfig(advantage=mode)).eq(0).all()
