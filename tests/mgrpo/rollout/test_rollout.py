"""The embedded engine against model.generate, the forward and the distribution it samples from."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import (
    ARCHITECTURES,
    EOS,
    PAD,
    VOCABULARY,
    loaded,
    one_by_one,
    same_bits,
    snapshot,
    tiny_model,
)

from mgrpo.config import KernelsConfig
from mgrpo.errors import EngineError, StaleWeightsError
from mgrpo.models.forward import Forward
from mgrpo.rollout.transformers import TransformersEngine, sample
from mgrpo.tasks.arithmetic import make_model
from mgrpo.types import Sampling, WeightTag, join
from mgrpo_kernels.testing import assert_within_budget

PROMPTS = [[2, 9, 4], [5], [7, 7, 3, 12, 20, 8, 15, 2, 11], [6, 2, 4], [3, 19, 23, 10, 4, 13]]


def engine_of(model, *, batch_size: int = 100, dtype: torch.dtype = torch.float32, eos_ids=(EOS,)):
    engine = TransformersEngine(model, eos_ids=eos_ids, pad_id=PAD, dtype=dtype, batch_size=batch_size)
    engine.update_weights(model.state_dict(), WeightTag("policy", 1))
    return engine


def generate(engine, prompts=PROMPTS, n: int = 1, **sampling):
    return engine.generate(prompts, n, Sampling(**sampling), WeightTag("policy", 1))


def same_rollouts(one, other) -> bool:
    return all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in ("tokens", "lengths", "logprobs", "truncated")
    )


def reference_responses(model, eos_id: int | None, max_new_tokens: int) -> list[list[int]]:
    """Greedy responses of transformers, each prompt alone."""
    responses = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=eos_id,
            pad_token_id=PAD,
        )
        responses.append(out[0, len(prompt) :].tolist())
    return responses


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_equals_generate(architecture):
    """The EOS is a token that ends some of the responses, at different lengths, and not all of them."""
    model = tiny_model(architecture, seed=2)
    free = reference_responses(model, -1, 12)
    ends = {token: [r.index(token) for r in free if token in r[:-1]] for token in range(VOCABULARY)}
    eos = max(ends, key=lambda token: (len(ends[token]) < len(free), len(set(ends[token])), len(ends[token])))
    expected = reference_responses(model, eos, 12)
    assert len({len(r) for r in expected}) > 1
    for batch_size in (100, 2, 1):
        got = generate(engine_of(model, batch_size=batch_size, eos_ids=(eos,)), temperature=0, max_new_tokens=12)
        assert [got.response(row) for row in range(5)] == expected
        assert got.truncated.tolist() == [eos not in r for r in expected]
        assert got.lengths.tolist() == [len(r) for r in expected]


def test_greedy_copies_are_equal_and_in_prompt_order():
    model = tiny_model("llama")
    one = generate(engine_of(model), temperature=0, max_new_tokens=6)
    three = generate(engine_of(model, batch_size=4), n=3, temperature=0, max_new_tokens=6)
    assert [three.response(row) for row in range(15)] == [one.response(row // 3) for row in range(15)]
    assert three.num_per_prompt == 3


def test_any_of_several_eos_ids_ends_a_response():
    model = tiny_model("llama")
    eos_ids = (5, EOS, 9)
    got = generate(engine_of(model, eos_ids=eos_ids), n=20, max_new_tokens=30, seed=1)
    endings = set()
    for row in range(100):
        response = got.response(row)
        assert not set(response[:-1]) & set(eos_ids)
        assert bool(got.truncated[row]) == (response[-1] not in eos_ids)
        assert got.truncated[row] == (len(response) == 30 and response[-1] not in eos_ids)
        endings.add(response[-1])
    assert set(eos_ids) <= endings


def test_an_eos_at_the_limit_is_no_truncation():
    model = tiny_model("llama")
    got = generate(engine_of(model, eos_ids=range(VOCABULARY // 2)), n=20, max_new_tokens=1)
    assert got.lengths.eq(1).all()
    assert torch.equal(got.truncated, got.tokens[:, 0] >= VOCABULARY // 2)
    assert 0 < got.truncated.sum() < 100


def test_padding_holds_pad_ids_and_zeros():
    got = generate(engine_of(tiny_model("qwen3"), eos_ids=(EOS, 4, 5, 6)), n=10, max_new_tokens=15)
    assert got.tokens.shape[1] == got.lengths.max()
    assert 0 < (~got.mask).sum()
    assert got.tokens[~got.mask].eq(PAD).all()
    assert got.logprobs[~got.mask].eq(0).all()
    assert got.logprobs[got.mask].lt(0).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sampled_log_probs_are_the_scorers(architecture):
    """Of every token, through finished neighbours, compaction and left padding."""
    model, temperature = tiny_model(architecture), 1.3
    engine = engine_of(model, eos_ids=(EOS, 4, 5), batch_size=12)
    got = generate(engine, n=6, temperature=temperature, max_new_tokens=14, seed=5)
    assert len(got.lengths.unique()) > 4
    trajectories = join(PROMPTS, got, None)
    forward = Forward(loaded(model), temperature=temperature, kernels=KernelsConfig(), micro_batch_tokens=10**6)
    with torch.no_grad():
        oracle = one_by_one(copy.deepcopy(model).double(), trajectories, temperature)[0]
    scored = forward.run(model, trajectories).logprob
    assert_within_budget(got.logprobs, oracle, scored, reduction_length=16 * 4)


def test_the_seed_fixes_every_bit():
    engine = engine_of(tiny_model("qwen3"), batch_size=8)
    runs = [generate(engine, n=4, max_new_tokens=10, seed=seed) for seed in (3, 3, 4)]
    assert same_rollouts(runs[0], runs[1])
    assert not torch.equal(runs[0].tokens[:, 0], runs[2].tokens[:, 0])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_part_of_the_prompts_gets_the_tokens_that_it_has_among_all(architecture):
    """Whatever is decoded together: every batch size, half of the prompts by their indices, fewer rollouts."""
    model, sampling = tiny_model(architecture), {"max_new_tokens": 12, "seed": 5, "temperature": 1.2}
    whole = generate(engine_of(model), n=6, **sampling)
    assert len(whole.lengths.unique()) > 3
    for batch_size in (1, 2, 7, 13):
        assert torch.equal(generate(engine_of(model, batch_size=batch_size), n=6, **sampling).tokens, whole.tokens)
    for indices in ((0, 2, 4), (3, 1), (4,)):
        part = generate(engine_of(model), [PROMPTS[b] for b in indices], n=6, indices=indices, **sampling)
        expected = [whole.response(6 * b + i) for b in indices for i in range(6)]
        assert [part.response(row) for row in range(6 * len(indices))] == expected
    fewer = generate(engine_of(model), n=2, **sampling)
    assert [fewer.response(row) for row in range(10)] == [whole.response(6 * (row // 2) + row % 2) for row in range(10)]


def test_two_parts_under_one_seed_share_no_noise():
    engine, prompt = engine_of(tiny_model("llama")), [PROMPTS[0]]
    first, second = (generate(engine, prompt, n=400, max_new_tokens=1, indices=(b,)).tokens[:, 0] for b in (0, 1))
    collisions = torch.softmax(engine.model(torch.tensor(prompt)).logits[0, -1].double(), -1).square().sum()
    assert abs((first == second).double().mean() - collisions) < 0.1


def noise(seed: int, rows: int) -> torch.Tensor:
    return torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_a_token_without_probability_is_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(5, 5)
    edges = torch.tensor([2.0**-49, 0.5 - 2.0**-49, 0.5, 0.5 + 2.0**-49, 1 - 2.0**-49], dtype=torch.float64)
    token, logprob = sample(logits, Sampling(), edges)
    assert token.tolist() == [1, 1, 3, 3, 3] and logprob.exp().tolist() == pytest.approx([0.5] * 5)
    nan = sample(torch.full((2, 3), torch.nan), Sampling(), noise(0, 2))
    assert nan[1].isnan().all() and nan[0].max() < 3


def assert_fits(tokens: torch.Tensor, probabilities: torch.Tensor) -> None:
    """Chi-square test at 1e-4; cells that expect fewer than 5 are pooled."""
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    expected = probabilities.double() * len(tokens)
    common = expected >= 5
    counts = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    statistic = ((counts - expected) ** 2 / expected.clamp_min(1e-12)).sum()
    freedom = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    assert torch.special.gammaincc(freedom, statistic / 2) > 1e-4


@pytest.mark.parametrize("temperature", [0.8, 1.5])
def test_first_tokens_follow_the_softmax(temperature):
    model = tiny_model("llama")
    got = generate(engine_of(model, batch_size=5000), [PROMPTS[2]], 4000, temperature=temperature, max_new_tokens=1)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[2]])).logits[0, -1].double()
    assert_fits(got.tokens[:, 0], torch.softmax(logits / temperature, -1))


def test_second_tokens_follow_the_softmax_given_the_first():
    model = tiny_model("gpt2")
    got = generate(engine_of(model, batch_size=5000, eos_ids=(99,)), [PROMPTS[0]], 4000, max_new_tokens=2)
    first = int(got.tokens[:, 0].bincount().argmax())
    with torch.no_grad():
        logits = model(torch.tensor([[*PROMPTS[0], first]])).logits[0, -1].double()
    assert_fits(got.tokens[got.tokens[:, 0] == first, 1], torch.softmax(logits, -1))


def test_rows_of_one_draw_are_independent():
    logits = torch.zeros(4000, 4)
    token, _ = sample(logits, Sampling(), noise(0, 4000))
    assert_fits(token[:-1] * 4 + token[1:], torch.full((16,), 1 / 16))


@pytest.mark.parametrize(
    ("top_p", "nucleus"),
    [(0.05, [2]), (0.49, [2]), (0.51, [2, 0]), (0.79, [2, 0]), (0.81, [2, 0, 3]), (0.96, [2, 0, 3, 1])],
)
def test_top_p_keeps_exactly_the_nucleus(top_p, nucleus):
    probabilities = torch.tensor([0.3, 0.05, 0.5, 0.15])
    logits = (2.0 * probabilities.log()).expand(3000, 4)
    sampling = Sampling(temperature=2.0, top_p=top_p)
    token, logprob = sample(logits, sampling, noise(1, 3000))
    kept = torch.zeros(4).index_fill_(0, torch.tensor(nucleus), 1.0) * probabilities
    expected = kept / kept.sum()
    assert set(token.tolist()) == set(nucleus)
    assert_fits(token, expected)
    assert logprob.tolist() == pytest.approx(expected[token].log().tolist(), abs=1e-6)


def test_top_p_of_the_engine_renormalises_its_log_probs():
    model = tiny_model("llama")
    got = generate(engine_of(model), n=30, top_p=0.6, max_new_tokens=1)
    for b, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            p = torch.softmax(model(torch.tensor([prompt])).logits[0, -1], -1)
        order = p.argsort(descending=True)
        count = int((p[order].cumsum(0) < 0.6).sum()) + 1
        mass = p[order[:count]].sum()
        tokens = got.tokens[30 * b : 30 * (b + 1), 0]
        assert set(tokens.tolist()) <= set(order[:count].tolist())
        expected = (p[tokens] / mass).log()
        assert got.logprobs[30 * b : 30 * (b + 1), 0].tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_greedy_takes_the_likeliest_token_at_temperature_zero():
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 4.9, 4.8]])
    token, logprob = sample(logits, Sampling(temperature=0), noise(0, 2))
    assert token.tolist() == [1, 0]
    assert torch.equal(logprob, torch.log_softmax(logits, -1)[[0, 1], [1, 0]])


@pytest.mark.parametrize(("source", "version"), [("policy", 2), ("momentum", 1), ("policy", 0)])
def test_stale_weights_are_refused(source, version):
    engine = engine_of(tiny_model("llama"))
    with pytest.raises(StaleWeightsError, match=f"must be {source} version {version}, got .'policy', 1."):
        engine.generate(PROMPTS, 1, Sampling(), WeightTag(source, version))


def test_an_engine_without_weights_refuses():
    engine = TransformersEngine(tiny_model("llama"), eos_ids=[1], pad_id=0, dtype=torch.float32, batch_size=4)
    with pytest.raises(StaleWeightsError, match="got None"):
        generate(engine)


def test_load_names_a_missing_tensor():
    model = tiny_model("llama")
    weights = model.state_dict()
    del weights["model.norm.weight"]
    with pytest.raises(EngineError, match=r"model\.norm\.weight is missing"):
        engine_of(model).update_weights(weights, WeightTag("policy", 2))


def test_load_names_a_wrong_shape():
    model = tiny_model("llama")
    weights = model.state_dict() | {"model.norm.weight": torch.zeros(3)}
    with pytest.raises(EngineError, match=r"model\.norm\.weight must have shape \(16,\), got \(3,\)"):
        engine_of(model).update_weights(weights, WeightTag("policy", 2))


def test_a_failed_load_leaves_no_mixture():
    model = tiny_model("llama")
    engine = engine_of(model)
    before = generate(engine, temperature=0, max_new_tokens=4)
    weights = tiny_model("llama", seed=1).state_dict() | {"lm_head.weight": torch.zeros(3)}
    with pytest.raises(EngineError):
        engine.update_weights(weights, WeightTag("policy", 2))
    try:
        after = generate(engine, temperature=0, max_new_tokens=4)
    except StaleWeightsError:
        return
    assert same_rollouts(before, after)


def test_load_changes_what_is_generated():
    model, other = tiny_model("qwen3"), tiny_model("qwen3", seed=1)
    engine = engine_of(model)
    engine.update_weights(other.state_dict(), WeightTag("momentum", 7))
    got = engine.generate(PROMPTS, 1, Sampling(temperature=0, max_new_tokens=6), WeightTag("momentum", 7))
    assert same_rollouts(got, generate(engine_of(other), temperature=0, max_new_tokens=6))
    assert not torch.equal(got.tokens, generate(engine_of(model), temperature=0, max_new_tokens=6).tokens)
    assert got.tag == ("momentum", 7)


def test_fp32_weights_share_storage_and_bf16_ones_do_not():
    model = tiny_model("llama")
    shared, copied = engine_of(model), engine_of(model, dtype=torch.bfloat16)
    before = snapshot(copied.model.state_dict())
    for name, weight in model.state_dict().items():
        assert shared.model.state_dict()[name].data_ptr() == weight.data_ptr()
        assert copied.model.state_dict()[name].dtype == torch.bfloat16
        assert torch.equal(copied.model.state_dict()[name], weight.bfloat16())
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert same_bits(copied.model.state_dict(), before)


def test_the_engine_leaves_the_model_alone():
    model = make_model()
    model.train()
    before = snapshot(model.state_dict())
    engine = engine_of(model, dtype=torch.bfloat16)
    generate(engine, [[2, 3], [4]], 4, max_new_tokens=5)
    assert same_bits(model.state_dict(), before)
    assert model.training and not engine.model.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


def test_bf16_keeps_rotary_frequencies_exact():
    model = tiny_model("llama")
    exact = dict(model.named_buffers())["model.rotary_emb.inv_freq"]
    cast = dict(engine_of(model, dtype=torch.bfloat16).model.named_buffers())["model.rotary_emb.inv_freq"]
    assert torch.equal(cast, exact)


@pytest.mark.parametrize("n", [2, 9])
def test_batch_size_bounds_what_is_decoded_together(n):
    engine = engine_of(tiny_model("llama"), batch_size=4)
    sizes = []
    engine.model.register_forward_pre_hook(
        lambda _, __, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    generate(engine, n=n, max_new_tokens=3)
    assert max(sizes) <= 4
