"""Packed micro-batches: sequences one behind the other that do not see one another."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from helpers import ARCHITECTURES, loaded, one_by_one, random_trajectories, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from transformers import AttentionInterface, AttentionMaskInterface, MambaConfig, MambaForCausalLM

from mgrpo.config import KernelsConfig
from mgrpo.errors import ConfigError
from mgrpo.models import packing
from mgrpo.models.forward import Forward
from mgrpo.models.packing import groups, pack, require_packing
from mgrpo.models.plain import plain_logits
from mgrpo_kernels.testing import assert_within_budget

LENGTHS, TEMPERATURE = [3, 9, 1, 6, 0, 12], 1.3
TRAJECTORIES = random_trajectories(LENGTHS, num_prompts=2, num_policy=2)
TOTALS = [len(TRAJECTORIES.prompt(row)) + length for row, length in enumerate(LENGTHS)]
ATTENTION = ("eager", "sdpa")


def model_of(architecture, attention):
    model = tiny_model(architecture)
    model.set_attn_implementation(attention)
    assert model.config._attn_implementation == attention
    return model


def forward_of(model, *, packed=True, budget=10**6):
    return Forward(
        loaded(model), temperature=TEMPERATURE, kernels=KernelsConfig(), micro_batch_tokens=budget, packed=packed
    )


# Softcapped attention has eager alone.
CASES = [
    (name, attention) for name in ARCHITECTURES for attention in ATTENTION if (name, attention) != ("gemma2", "sdpa")
]


@pytest.mark.parametrize("budget", [1, 24, 10**6])
@pytest.mark.parametrize(("architecture", "attention"), CASES)
def test_packed_log_probs_equal_one_forward_a_sequence(architecture, attention, budget):
    model = model_of(architecture, attention)
    found = forward_of(model, budget=budget).run(model, TRAJECTORIES, self_certainty=True)
    with torch.no_grad():
        oracle = one_by_one(tiny_model(architecture).double(), TRAJECTORIES, TEMPERATURE)
        reference = one_by_one(tiny_model(architecture), TRAJECTORIES, TEMPERATURE)
    for actual, exact, plain in zip(found, oracle, reference, strict=True):
        assert_within_budget(actual, exact, plain, reduction_length=16 * 4)


@pytest.mark.parametrize(("architecture", "attention"), CASES)
def test_packed_gradients_equal_padded_ones(architecture, attention):
    model, rows = model_of(architecture, attention), torch.arange(len(LENGTHS))
    weight = torch.randn(sum(LENGTHS), generator=torch.Generator().manual_seed(1))
    gradients = []
    for packed in (False, True):
        model.zero_grad()
        found = forward_of(model, packed=packed)(model, pack(TRAJECTORIES, rows, pad_id=0, packed=packed))
        (weight * (found.logprob + 0.3 * found.entropy)).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert gradients[0].norm() > 0.1
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[0].norm()


@pytest.mark.parametrize(("architecture", "attention"), CASES)
def test_no_sequence_sees_another(architecture, attention):
    """Other tokens in one sequence move no log-prob of the others."""
    model, rows = model_of(architecture, attention), torch.arange(len(LENGTHS))
    batch, forward = pack(TRAJECTORIES, rows, pad_id=0, packed=True), forward_of(model)
    bounds = [0, *torch.tensor(TOTALS).cumsum(0).tolist()]
    sequence = torch.repeat_interleave(torch.arange(len(TOTALS)), torch.tensor(LENGTHS))
    with torch.no_grad():
        usual = forward(model, batch).logprob
        for row in range(len(TOTALS)):
            ids = batch.ids.clone()
            ids[0, bounds[row] : bounds[row + 1]] = (ids[0, bounds[row] : bounds[row + 1]] + 7) % 24
            changed = forward(model, batch._replace(ids=ids)).logprob
            assert torch.allclose(changed[sequence != row], usual[sequence != row], atol=1e-6)
            if LENGTHS[row] > 1:
                assert not torch.allclose(changed[sequence == row], usual[sequence == row], atol=1e-3)


def test_each_row_lies_in_one_input_within_the_budget_and_none_is_padded():
    for budget in (1, 15, 24, 40, 10**6):
        found = groups(TRAJECTORIES, torch.arange(6), budget=budget, packed=True)
        batches = [pack(TRAJECTORIES, torch.tensor(group), pad_id=0, packed=True) for group in found]
        assert sorted(row for batch in batches for row in batch.rows.tolist()) == list(range(6))
        for batch in batches:
            mask = TRAJECTORIES.mask[batch.rows]
            assert batch.ids.shape == (1, sum(TOTALS[row] for row in batch.rows.tolist()))
            assert batch.lengths.tolist() == [TOTALS[row] for row in batch.rows.tolist()]
            assert len(batch.rows) == 1 or batch.ids.numel() <= budget
            assert batch.targets.tolist() == TRAJECTORIES.tokens[batch.rows][mask].tolist()
            assert batch.targets.tolist() == batch.ids[batch.line, batch.column + 1].tolist()
    assert len(batches) == 1


def varlen_attention(shift):
    """Causal attention that knows the boundaries alone, as flash-attn's varlen kernels; `shift` moves one of them."""

    def attend(module, query, key, value, attention_mask, scaling=None, **options):
        assert attention_mask is None, "a mask joins packed sequences"
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        if "cu_seq_lens_q" not in options:  # one sequence a row
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scaling
            ).transpose(1, 2), None
        bounds = options["cu_seq_lens_q"].tolist()
        assert options["cu_seq_lens_k"].tolist() == bounds and options["cu_seq_lens_q"].dtype == torch.int32
        assert options["max_length_q"] == max(b - a for a, b in pairwise(bounds))
        bounds = [bound + shift * (i == 2) for i, bound in enumerate(bounds)]
        parts = [
            torch.nn.functional.scaled_dot_product_attention(
                query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], is_causal=True, scale=scaling
            )
            for a, b in pairwise(bounds)
        ]
        return torch.cat(parts, 2).transpose(1, 2), None

    return attend


@pytest.fixture
def varlen(request):
    """Attention under a name that transformers does not know, which is handed boundaries like flash-attn."""
    AttentionInterface.register("varlen", varlen_attention(request.param))
    AttentionMaskInterface.register("varlen", lambda *args, **options: None)
    return request.param


@pytest.mark.parametrize("varlen", [0], indirect=True)
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_a_varlen_kernel_gets_the_boundaries(varlen, architecture):
    model, usual = model_of(architecture, "varlen"), tiny_model(architecture)
    found = forward_of(model, budget=40).run(model, TRAJECTORIES).logprob
    expected = forward_of(usual, packed=False).run(usual, TRAJECTORIES).logprob
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("varlen", [1, -1], indirect=True)
def test_a_boundary_that_is_off_by_one_is_refused(varlen):
    with pytest.raises(ConfigError, match="LlamaForCausalLM with attention varlen mixes them"):
        require_packing(model_of("llama", "varlen"))


def test_a_mask_beside_the_positions_is_seen(monkeypatch):
    """transformers then joins the sequences without a word."""

    def masked(model, ids, **options):
        return plain_logits(model, ids, attention_mask=torch.ones_like(ids), **options)

    monkeypatch.setattr(packing, "plain_logits", masked)
    for attention in ATTENTION:
        with pytest.raises(ConfigError, match=f"with attention {attention} mixes them"):
            require_packing(model_of("llama", attention))


def test_a_model_whose_state_runs_on_is_refused():
    model = MambaForCausalLM(MambaConfig(vocab_size=24, hidden_size=16, state_size=4, num_hidden_layers=2))
    with pytest.raises(ConfigError, match="needs a model that keeps packed sequences apart, MambaForCausalLM"):
        require_packing(model.eval())


def test_packed_and_padded_runs_take_the_same_steps(small, trained, weights_of):
    changes = {"optim.micro_batch_tokens": 300, "optim.lr": 1e-3}
    runs = [trained(small(changes | {"optim.packing": way}), 3) for way in ("padded", "packed")]
    start, padded, packed = (
        torch.cat([weight.flatten() for weight in weights_of(trainer).values()])
        for trainer in (trained(small(changes), 0)[0], *(trainer for trainer, _ in runs))
    )
    assert 0 < (padded - packed).norm() < 1e-2 * (padded - start).norm()


@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=24),
    lanes=st.sampled_from([1, 2, 3, 4, 8]),
    budget=st.integers(1, 200),
    packed=st.booleans(),
)
def test_a_plan_for_several_ranks(lengths, lanes, budget, packed):
    """Every row once, within the budget, as many groups for each rank; empty ones only where no group can be split."""
    trajectories = random_trajectories(lengths, num_prompts=1, num_policy=len(lengths))
    total = [2 + length for length in lengths]
    rows = torch.arange(len(lengths))
    plan = groups(trajectories, rows, budget=budget, packed=packed, lanes=lanes)
    assert sorted(row for group in plan for row in group) == rows.tolist()
    assert len(plan) % lanes == 0
    cost = [
        sum(total[row] for row in g) if packed else len(g) * max((total[row] for row in g), default=0) for g in plan
    ]
    assert all(len(group) <= 1 or most <= budget for group, most in zip(plan, cost, strict=True))
    if lanes > 1:
        assert cost == sorted(cost, reverse=True)
        assert all(plan) or max(map(len, plan)) == 1
    one = groups(trajectories, rows, budget=budget, packed=packed)
    assert len(plan) < len(one) + lanes


def test_a_plan_of_no_rows_is_empty():
    assert groups(TRAJECTORIES, torch.arange(0), budget=8, lanes=4) == []
