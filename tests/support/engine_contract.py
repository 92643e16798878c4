"""The contract of rollout engines, as checks of one: every engine passes all of them.

An engine of your own: `for check in CHECKS: check(engine, weights, vocabulary)`.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from mgrpo.errors import EngineError, StaleWeightsError
from mgrpo.observe.catalogue import METRICS
from mgrpo.rollout.engine import Engine
from mgrpo.types import Rollouts, Sampling, WeightTag

Weights = Mapping[str, torch.Tensor]

PROMPTS = [[2, 3, 4], [5, 6], [7, 2, 3, 5, 6]]
LIMIT = 7


def roll_out(engine: Engine, weights: Weights, tag: WeightTag, n: int = 3, **sampling: object) -> Rollouts:
    engine.update_weights(weights, tag)
    return engine.generate(PROMPTS, n, Sampling(max_new_tokens=LIMIT, **sampling), tag)


def check_that_only_the_weights_of_the_tag_generate(engine: Engine, weights: Weights, vocabulary: int) -> None:
    for source in ("policy", "momentum"):
        engine.update_weights(weights, WeightTag(source, 4))
        engine.generate(PROMPTS, 1, Sampling(max_new_tokens=LIMIT), WeightTag(source, 4))
        for version in (3, 5):
            with pytest.raises(StaleWeightsError, match=f"must be {source} version {version}, got"):
                engine.generate(PROMPTS, 1, Sampling(max_new_tokens=LIMIT), WeightTag(source, version))
    # With two slots the policy's weights are still held, with one they are not.
    if engine.num_weight_slots == 2:
        engine.generate(PROMPTS, 1, Sampling(max_new_tokens=LIMIT), WeightTag("policy", 4))
    else:
        with pytest.raises(StaleWeightsError):
            engine.generate(PROMPTS, 1, Sampling(max_new_tokens=LIMIT), WeightTag("policy", 4))


def check_rollouts(engine: Engine, weights: Weights, vocabulary: int) -> None:
    for n, sampling in ((3, {}), (1, {}), (2, {"temperature": 0.0})):
        found, tag = roll_out(engine, weights, WeightTag("policy", 1), n, **sampling), WeightTag("policy", 1)
        rows, width = n * len(PROMPTS), int(found.lengths.max())
        assert (found.tag, found.num_per_prompt) == (tag, n)
        assert found.tokens.shape == found.logprobs.shape == (rows, width)
        assert found.lengths.shape == found.truncated.shape == (rows,)
        assert (found.tokens.dtype, found.lengths.dtype) == (torch.int64, torch.int64)
        assert (found.logprobs.dtype, found.truncated.dtype) == (torch.float32, torch.bool)
        assert found.lengths.min() >= 1 and width <= LIMIT
        assert found.tokens[found.mask].min() >= 0 and found.tokens[found.mask].max() < vocabulary
        assert found.logprobs[found.mask].isfinite().all() and found.logprobs.max() <= 0
        assert found.logprobs[~found.mask].eq(0).all()
        assert not (found.truncated & (found.lengths < LIMIT)).any()
        if sampling:  # greedy copies are equal
            assert all(found.response(2 * b) == found.response(2 * b + 1) for b in range(len(PROMPTS)))


def check_that_a_seed_repeats(engine: Engine, weights: Weights, vocabulary: int) -> None:
    first, again = (roll_out(engine, weights, WeightTag("policy", version), seed=3) for version in (0, 1))
    assert torch.equal(first.tokens, again.tokens) and torch.equal(first.logprobs, again.logprobs)


def check_that_a_part_of_the_prompts_gets_the_same(engine: Engine, weights: Weights, vocabulary: int) -> None:
    tag = WeightTag("policy", 0)
    whole = roll_out(engine, weights, tag, seed=3)
    for indices in ((2, 0), (1,)):
        sampling = Sampling(max_new_tokens=LIMIT, seed=3, indices=indices)
        part = engine.generate([PROMPTS[b] for b in indices], 3, sampling, tag)
        expected = [whole.response(3 * b + i) for b in indices for i in range(3)]
        assert [part.response(row) for row in range(len(expected))] == expected


def check_that_incomplete_weights_are_refused(engine: Engine, weights: Weights, vocabulary: int) -> None:
    name = next(iter(weights))
    for wrong, message in (
        ({key: value for key, value in weights.items() if key != name}, "is missing"),
        ({**weights, name: weights[name][:-1]}, "must have shape"),
    ):
        with pytest.raises(EngineError, match=message):
            engine.update_weights(wrong, WeightTag("policy", 9))
        with pytest.raises(StaleWeightsError):
            engine.generate(PROMPTS, 1, Sampling(max_new_tokens=LIMIT), WeightTag("policy", 9))
    roll_out(engine, weights, WeightTag("policy", 9))


def check_that_it_wakes_for_the_next_weights(engine: Engine, weights: Weights, vocabulary: int) -> None:
    for version in (0, 1):
        roll_out(engine, weights, WeightTag("policy", version))
        engine.sleep()


def check_that_its_metrics_are_known(engine: Engine, weights: Weights, vocabulary: int) -> None:
    roll_out(engine, weights, WeightTag("policy", 0))
    assert engine.stats().keys() <= METRICS.keys()


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]
