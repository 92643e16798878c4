from __future__ import annotations

import pytest
import torch

from mgrpo_kernels.testing import (
    MUTANTS,
    assert_gradient_within_budget,
    assert_mutants_rejected,
    assert_within_budget,
    peaked_logits,
    poison_masked,
)

ORACLE = torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64)


def test_budget_allows_twice_the_error_of_the_reference():
    reference = ORACLE + torch.tensor([0.0, 1e-3, 0.0])
    assert_within_budget((ORACLE + 1.9e-3).float(), ORACLE, reference, reduction_length=1)
    with pytest.raises(AssertionError, match=r"error 2\.1"):
        assert_within_budget((ORACLE + 2.1e-3).float(), ORACLE, reference, reduction_length=1)


def test_budget_grows_with_the_reduction():
    off = (ORACLE + 1e-5).float()
    assert_within_budget(off, ORACLE, ORACLE, reduction_length=1000)
    with pytest.raises(AssertionError, match="error"):
        assert_within_budget(off, ORACLE, ORACLE, reduction_length=10)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_budget_refuses_what_is_not_finite(wrong):
    with pytest.raises(AssertionError):
        assert_within_budget(torch.tensor([1.0, -2.0, wrong]), ORACLE, ORACLE, reduction_length=10)
    infinite = torch.tensor([1.0, torch.inf], dtype=torch.float64)
    assert_within_budget(infinite.float(), infinite, infinite, reduction_length=1)
    with pytest.raises(AssertionError, match="infinities differ"):
        assert_within_budget(torch.tensor([1.0, -wrong]), infinite, infinite, reduction_length=1)


def test_gradient_budget_sees_the_small_columns():
    oracle = torch.tensor([[1.0, 1e-6, -1e-6]], dtype=torch.float64)
    zeroed = torch.tensor([[1.0, 0.0, 0.0]])
    assert_within_budget(zeroed, oracle, oracle, reduction_length=1000)
    with pytest.raises(AssertionError, match="other columns"):
        assert_gradient_within_budget(zeroed, oracle, oracle, torch.tensor([0]), reduction_length=1000)


def test_factories():
    logits = peaked_logits(50, 1000)
    assert (logits.softmax(1).amax(1) > 0.05).all()
    assert torch.equal(logits, peaked_logits(50, 1000)) and not torch.equal(logits, peaked_logits(50, 1000, seed=1))
    mask = torch.tensor([True, False])
    assert poison_masked(torch.zeros(2, 3), mask).isnan().tolist() == [[False] * 3, [True] * 3]


def mean_rows(values, *, mask, temperature):
    return torch.where(mask, values.mean(1) / temperature, 0)


def check_mean_rows(op):
    values = torch.arange(40.0).reshape(8, 5)
    mask = torch.arange(8) != 3
    out = op(values, mask=mask, temperature=2.0)
    assert torch.allclose(out, torch.where(mask, values.sum(1) / 10, 0))


def test_good_assertions_reject_every_mutant():
    assert_mutants_rejected(mean_rows, check_mean_rows)


@pytest.mark.parametrize("survivor", MUTANTS)
def test_blind_assertions_are_named(survivor):
    broken = MUTANTS[survivor](mean_rows)
    values = torch.arange(40.0).reshape(8, 5)
    arguments = {"mask": torch.arange(8) != 3, "temperature": 2.0}
    results = [op(values, **arguments) for op in (mean_rows, broken)]

    def blind(op):
        out = op(values, **arguments)
        assert any(torch.equal(out, accepted) for accepted in results)

    with pytest.raises(AssertionError, match=f"accept the mutant '{survivor}'"):
        assert_mutants_rejected(mean_rows, blind)
