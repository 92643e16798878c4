"""Log-probs and entropies of responses against one forward pass a sequence."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from helpers import ARCHITECTURES, loaded, make_trajectories, one_by_one, random_trajectories, tiny_model
from transformers import LlamaForCausalLM

from mgrpo.config import KernelsConfig
from mgrpo.models import forward as scoring
from mgrpo.models.forward import Forward, has_plain_head
from mgrpo.models.packing import pack
from mgrpo_kernels.testing import assert_within_budget

TEMPERATURE = 0.7
LENGTHS = [3, 1, 7, 5, 2, 9]
TRAJECTORIES = random_trajectories(LENGTHS, num_prompts=2, num_policy=2)
# Longest sum behind a score: the hidden size of the tiny models, once a layer in attention and once in the MLP.
REDUCTION = 16 * 4


def forward_of(
    model, *, micro_batch_tokens: int = 10**6, dtype: torch.dtype = torch.float32, pad_id: int = 0
) -> Forward:
    return Forward(
        loaded(model, dtype=dtype, pad_id=pad_id),
        temperature=TEMPERATURE,
        kernels=KernelsConfig(),
        micro_batch_tokens=micro_batch_tokens,
    )


@torch.no_grad()
def assert_scores(model, scores, trajectories, rows=None):
    oracle = one_by_one(copy.deepcopy(model).double(), trajectories, TEMPERATURE, rows)
    reference = one_by_one(model, trajectories, TEMPERATURE, rows)
    for name, actual, *values in zip(("logprob", "entropy", "certainty"), scores, oracle, reference, strict=True):
        if actual is not None:
            assert_within_budget(actual, *values, reduction_length=REDUCTION, what=name)


@pytest.fixture(params=["logits", "fused"])
def head(request, monkeypatch):
    """Both ways from hidden states to scores."""
    if request.param == "fused":
        monkeypatch.setattr(scoring, "MAX_LOGITS_BYTES", 0)
    return request.param


@pytest.mark.parametrize("micro_batch_tokens", [1, 24, 10**6])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_equal_one_forward_a_sequence(architecture, micro_batch_tokens, head):
    model = tiny_model(architecture)
    scores = forward_of(model, micro_batch_tokens=micro_batch_tokens).run(model, TRAJECTORIES, self_certainty=True)
    assert_scores(model, scores, TRAJECTORIES)


def test_the_fused_head_is_really_taken(monkeypatch):
    monkeypatch.setattr(scoring, "MAX_LOGITS_BYTES", 0)
    calls = []
    fused = scoring.K.linear_token_logprob
    monkeypatch.setattr(scoring.K, "linear_token_logprob", lambda *a, **k: calls.append(1) or fused(*a, **k))
    for architecture in ARCHITECTURES:
        model = tiny_model(architecture)
        forward_of(model).run(model, TRAJECTORIES)
    assert len(calls) == len(ARCHITECTURES) - 1  # a softcap needs the model's own logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_plain_heads_are_told_from_softcapped_ones(architecture):
    model = tiny_model(architecture)
    assert has_plain_head(model) == (architecture != "gemma2")


class Doubled(LlamaForCausalLM):
    """Whose decoder is not called with token ids alone."""

    def forward(self, input_ids=None, **options):
        return super().forward(inputs_embeds=2 * self.get_input_embeddings()(input_ids), **options)


def test_a_head_or_a_decoder_that_is_used_otherwise_is_not_plain():
    model = tiny_model("llama")
    assert has_plain_head(model)
    hook = model.lm_head.register_forward_pre_hook(lambda _module, inputs: (0.5 * inputs[0],))
    assert not has_plain_head(model)
    hook.remove()
    assert has_plain_head(model)
    model.__class__ = Doubled
    assert not has_plain_head(model)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_pad_ids_reach_no_score(architecture):
    model = tiny_model(architecture)
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = 1e4  # a prompt or response never holds it here
    tokens = TRAJECTORIES.tokens.masked_fill(TRAJECTORIES.tokens == 5, 6)
    clean = replace(
        TRAJECTORIES, tokens=tokens, prompts=[[6 if t == 5 else t for t in p] for p in TRAJECTORIES.prompts]
    )
    dirty = replace(clean, tokens=tokens.masked_fill(~TRAJECTORIES.mask, 5))
    usual = forward_of(model).run(model, clean)
    poisoned = forward_of(model, pad_id=5).run(model, dirty)
    assert torch.equal(usual.logprob, poisoned.logprob)
    assert torch.equal(usual.entropy, poisoned.entropy)


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2"])
def test_empty_responses(architecture, head):
    model = tiny_model(architecture)
    trajectories = make_trajectories([[2, 3, 4], [5, 6]], [[], [7, 8], [9], []], num_policy=1)
    for micro_batch_tokens in (1, 10**6):
        scores = forward_of(model, micro_batch_tokens=micro_batch_tokens).run(model, trajectories)
        assert_scores(model, scores, trajectories)
        assert scores.logprob[[0, 3]].eq(0).all()
        assert scores.entropy[[0, 3]].eq(0).all()


def test_chosen_rows_alone_are_scored():
    model = tiny_model("llama")
    rows = torch.tensor([4, 1])
    scores = forward_of(model).run(model, TRAJECTORIES, rows=rows)
    assert_scores(model, (scores.logprob, scores.entropy, None), TRAJECTORIES, rows.tolist())
    assert scores.self_certainty is None


def gradients(model):
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_equal_one_forward_a_sequence(architecture, head):
    model = tiny_model(architecture)
    weight = torch.randn(TRAJECTORIES.mask.shape, generator=torch.Generator().manual_seed(1))
    rows = torch.tensor([5, 0, 3])
    packed = forward_of(model)(model, pack(TRAJECTORIES, rows, pad_id=0))
    coefficient = weight[rows][TRAJECTORIES.mask[rows]]
    (coefficient * (packed.logprob + 0.3 * packed.entropy)).sum().backward()
    actual = gradients(model)
    double = copy.deepcopy(model).double()
    expected = []
    for one in (double, model):
        logprob, entropy, _ = one_by_one(one, TRAJECTORIES, TEMPERATURE, rows.tolist())
        (weight.to(one.dtype) * (logprob + 0.3 * entropy)).sum().backward()
        expected.append(gradients(one))
    oracle, reference = expected
    assert actual.keys() == oracle.keys()
    for name in oracle:
        assert_within_budget(
            actual[name], oracle[name], reference[name], reduction_length=REDUCTION * sum(LENGTHS), what=name
        )


def test_bf16_stays_within_the_error_of_plain_bf16():
    model = tiny_model("qwen3")
    scores = forward_of(model, dtype=torch.bfloat16).run(model, TRAJECTORIES)
    with torch.no_grad():
        oracle = one_by_one(copy.deepcopy(model).double(), TRAJECTORIES, TEMPERATURE)
        reference = one_by_one(copy.deepcopy(model).bfloat16(), TRAJECTORIES, TEMPERATURE)
        exact = one_by_one(model, TRAJECTORIES, TEMPERATURE)
    assert_within_budget(scores.logprob, oracle[0], reference[0].float(), reduction_length=REDUCTION)
    assert (scores.logprob - exact[0]).abs().max() > 2**-10 * exact[0].abs().max()


def test_bf16_scores_do_not_depend_on_the_size_of_the_micro_batch(monkeypatch):
    model = tiny_model("qwen3")
    small = forward_of(model, dtype=torch.bfloat16).run(model, TRAJECTORIES).logprob
    monkeypatch.setattr(scoring, "MAX_LOGITS_BYTES", 0)
    large = forward_of(model, dtype=torch.bfloat16).run(model, TRAJECTORIES).logprob
    assert_within_budget(small, large.double(), large, reduction_length=REDUCTION)


def test_micro_batches_cover_each_row_once_within_the_budget():
    model = tiny_model("llama")
    total = [len(TRAJECTORIES.prompt(row)) + LENGTHS[row] for row in range(6)]
    for budget in (1, 15, 24, 40, 10**6):
        forward = forward_of(model, micro_batch_tokens=budget)
        batches = [batch for _, batch in forward.own(TRAJECTORIES, forward.plan(TRAJECTORIES, torch.arange(6)))]
        groups = [batch.rows.tolist() for batch in batches]
        for batch in batches:
            mask = TRAJECTORIES.mask[batch.rows]
            assert batch.targets.tolist() == TRAJECTORIES.tokens[batch.rows][mask].tolist()
            assert batch.targets.tolist() == batch.ids[batch.line, batch.column + 1].tolist()
        assert sorted(row for group in groups for row in group) == list(range(6))
        for group in groups:
            assert len(group) == 1 or len(group) * max(total[row] for row in group) <= budget
        # No group would have taken the first row of the next one.
        for group, following in pairwise(groups):
            assert (len(group) + 1) * total[following[0]] > budget
    assert len(groups) == 1


def test_another_model_of_the_architecture_may_be_scored():
    one, other = tiny_model("llama"), tiny_model("llama", seed=1)
    scores = forward_of(one).run(other, TRAJECTORIES)
    assert_scores(other, (scores.logprob, scores.entropy, None), TRAJECTORIES)
