"""The vLLM engine against a fake that records its calls; tests/hosts/vllm has the real one."""

from __future__ import annotations

import importlib
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_llm import FakeLLM

from mgrpo.errors import EngineError, StaleWeightsError
from mgrpo.rollout.parity import BOUNDS, check_parity
from mgrpo.rollout.stop import StopTexts
from mgrpo.rollout.vllm.local import VllmEngine, start
from mgrpo.rollout.weights.in_process import make_writer
from mgrpo.tasks.arithmetic import make_model, make_tokenizer
from mgrpo.types import Sampling, WeightTag

PROMPTS = [[2, 3, 4], [5, 6]]


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def engine(model, monkeypatch) -> VllmEngine:
    real = importlib.import_module
    fake = SimpleNamespace(SamplingParams=SimpleNamespace, RequestOutputKind=SimpleNamespace(FINAL_ONLY="final"))
    monkeypatch.setattr(
        importlib, "import_module", lambda name, *a: fake if name == "vllm.sampling_params" else real(name, *a)
    )
    return make_engine(model)


def make_engine(model, stop=None, **options) -> VllmEngine:
    arguments = {"eos_ids": (1,), "pad_id": 0, "dtype": torch.float32, "max_length": 40, "make_llm": FakeLLM}
    return VllmEngine(model, **arguments, stop=stop, options={"seed": 0} | options)


def test_a_step_loads_resets_and_generates_in_this_order(engine, model):
    for source in ("momentum", "policy"):
        engine.update_weights(model.state_dict(), WeightTag(source, 3))
        engine.generate(PROMPTS, 2, Sampling(max_new_tokens=4), WeightTag(source, 3))
    names = [call[0] if call[0] != "version" else call[1] for call in engine._llm.calls]
    once = ["reload_weights", "momentum@3", "reset", "generate"]
    assert names == once + [name.replace("momentum", "policy") for name in once]


def test_every_name_is_published_tied_ones_twice(engine, model):
    engine.update_weights(model.state_dict(), WeightTag("policy", 0))
    _, published = engine._llm.calls[0]
    assert published.keys() == model.state_dict().keys()
    assert "lm_head.weight" in published and "model.embed_tokens.weight" in published
    assert all(torch.equal(published[name], tensor) for name, tensor in model.state_dict().items())


def test_starts_from_the_configuration_without_weights_or_tokenizer(engine):
    arguments = engine._llm.arguments
    assert arguments["load_format"] == "dummy" and arguments["skip_tokenizer_init"]
    assert arguments["logprobs_mode"] == "processed_logprobs"
    assert arguments["max_model_len"] == 40 and arguments["dtype"] == "float32" and arguments["seed"] == 0


def test_sampling_parameters(engine, model):
    engine.update_weights(model.state_dict(), WeightTag("policy", 0))
    sampling = Sampling(temperature=0.7, top_p=0.9, max_new_tokens=4, seed=2**31 - 3)
    engine.generate(PROMPTS, 2, sampling, WeightTag("policy", 0))
    first, second = engine._llm.params
    assert (first.n, first.temperature, first.top_p, first.max_tokens) == (2, 0.7, 0.9, 4)
    assert first.stop_token_ids == [1] and first.logprobs == 0
    # vLLM gives rollout i seed + i: no two rollouts of a call may meet.
    assert second.seed == (first.seed + 2) % 2**31
    engine.generate(PROMPTS[1:], 2, replace(sampling, indices=(1,)), WeightTag("policy", 0))
    assert [params.seed for params in engine._llm.params] == [second.seed]


@pytest.mark.parametrize("bad", [[3], [0, 3], [1, 2, 3]])
def test_the_seed_of_a_redraw_is_the_rollouts_own(engine, model, bad):
    engine.update_weights(model.state_dict(), WeightTag("policy", 0))
    lengths, ids = [len(PROMPTS[row // 2]) for row in range(4)], (5, 9)
    logprobs = [-torch.inf if row in bad else -1.0 for row in range(4) for _ in range(lengths[row])]
    engine._llm.logprobs = iter(logprobs)
    found = engine.generate(PROMPTS, 2, Sampling(seed=11, indices=ids), WeightTag("policy", 0))
    seeds = [params.seed for params in engine._llm.params]
    assert seeds == [11 + 7919 + 2 * ids[row // 2] + row % 2 for row in bad] and found.logprobs.isfinite().all()


STOP = StopTexts(["12", "<eos>"], make_tokenizer())


@pytest.mark.parametrize("past", [[], [9], [1], [3, 4, 3, 4]])
@pytest.mark.parametrize("reason", ["length", "stop"])
def test_a_response_ends_with_the_token_that_completes_a_stop_text(engine, model, past, reason):
    """Whether vLLM stops there, later or not at all; what it wrote afterwards is not looked at."""
    stopping = make_engine(model, stop=STOP)
    stopping.update_weights(model.state_dict(), WeightTag("policy", 0))
    first = STOP.tokenizer.convert_tokens_to_ids(["4", "1", "2"])
    stopping._llm.writes, stopping._llm.reason = first + past, reason
    stopping._llm.logprobs = iter([-1.0, -2.0, -3.0, *[-float("inf")] * len(past)] * 2)
    found = stopping.generate(PROMPTS, 1, Sampling(max_new_tokens=9), WeightTag("policy", 0))
    assert found.tokens.tolist() == [first] * 2 and found.logprobs.tolist() == [[-1, -2, -3]] * 2
    assert found.lengths.tolist() == [3, 3] and not found.truncated.any() and stopping.redrawn == 0


def test_a_response_without_a_stop_text_stays_as_it_is(engine, model):
    stopping = make_engine(model, stop=STOP)
    stopping.update_weights(model.state_dict(), WeightTag("policy", 0))
    stopping._llm.writes = STOP.tokenizer.convert_tokens_to_ids(["1", "1", "="])
    found = stopping.generate(PROMPTS, 1, Sampling(max_new_tokens=3), WeightTag("policy", 0))
    assert found.tokens.tolist() == [stopping._llm.writes] * 2 and found.truncated.all()


def test_vllm_is_asked_to_stop_and_given_what_it_needs_for_that(engine, model):
    stopping = make_engine(model, stop=STOP)
    for one, expected in ((stopping, ["12", "<eos>"]), (engine, None)):
        one.update_weights(model.state_dict(), WeightTag("policy", 0))
        one.generate(PROMPTS, 1, Sampling(), WeightTag("policy", 0))
        params = vars(one._llm.params[0])
        assert params.get("stop") == expected and params.get("include_stop_str_in_output", False) == bool(expected)
        assert params["detokenize"] == bool(expected)
        assert one._llm.arguments["skip_tokenizer_init"] == (expected is None)
    assert stopping._llm.params[0].stop_token_ids == [1]
    files = sorted(path.name for path in Path(stopping._llm.arguments["model"]).iterdir())
    assert "tokenizer.json" in files
    other = make_engine(model, stop=StopTexts(["<pad>"], STOP.tokenizer))
    assert other.eos_ids == [0, 1]


def test_rollouts_are_padded_and_tell_their_source(engine, model):
    engine.update_weights(model.state_dict(), WeightTag("momentum", 5))
    found = engine.generate(PROMPTS, 2, Sampling(max_new_tokens=4), WeightTag("momentum", 5))
    assert found.tokens.tolist() == [[7, 7, 7], [7, 7, 7], [7, 7, 0], [7, 7, 0]]
    assert found.logprobs.tolist() == [[-0.5] * 3] * 2 + [[-0.5, -0.5, 0]] * 2
    assert found.lengths.tolist() == [3, 3, 2, 2] and found.truncated.all()
    assert (found.tag, found.num_per_prompt) == (("momentum", 5), 2)


def test_greedy_decodes_once_and_repeats(engine, model):
    engine.update_weights(model.state_dict(), WeightTag("policy", 0))
    found = engine.generate(PROMPTS, 3, Sampling(temperature=0.0), WeightTag("policy", 0))
    assert [p.n for p in engine._llm.params] == [1, 1] and found.tokens.shape[0] == 6


@pytest.mark.parametrize(("source", "version"), [("momentum", 1), ("policy", 2)])
def test_other_weights_than_the_loaded_are_refused(engine, model, source, version):
    with pytest.raises(StaleWeightsError, match=r"got None\. Call update_weights first"):
        engine.generate(PROMPTS, 1, Sampling(), WeightTag("policy", 1))
    engine.update_weights(model.state_dict(), WeightTag("policy", 1))
    with pytest.raises(StaleWeightsError, match=rf"weights must be {source} version {version}, got \('policy', 1\)"):
        engine.generate(PROMPTS, 1, Sampling(), WeightTag(source, version))


def test_a_version_that_vllm_contradicts_is_refused(engine, model):
    engine.update_weights(model.state_dict(), WeightTag("policy", 1))
    engine._llm.weight_version = "policy@0"
    with pytest.raises(StaleWeightsError, match="must use weights policy@1, it used policy@0"):
        engine.generate(PROMPTS, 1, Sampling(), WeightTag("policy", 1))


@pytest.mark.parametrize("fault", ["missing", "shape", "infinite", "cache", "raise"])
def test_a_load_that_fails_leaves_nothing_loaded(engine, model, fault):
    weights = dict(model.state_dict())
    engine.update_weights(weights, WeightTag("policy", 0))
    if fault == "missing":
        del weights["lm_head.weight"]
    elif fault == "shape":
        weights["model.norm.weight"] = torch.zeros(3)
    elif fault == "infinite":
        weights["model.norm.weight"] = torch.full((96,), torch.inf)
    elif fault == "cache":
        engine._llm.emptied = False
    else:
        engine._llm.collective_rpc = lambda *a, **k: 1 / 0
    message = {
        "missing": "lm_head.weight is missing",
        "shape": r"model.norm.weight must have shape \(96,\), got \(3,\)",
        "infinite": "weights must be finite, model.norm.weight is not",
        "cache": "must empty its prefix cache, it refused",
        "raise": "update_weights: vLLM failed with ZeroDivisionError: division by zero",
    }[fault]
    with pytest.raises(EngineError, match=message):
        engine.update_weights(weights, WeightTag("policy", 1))
    with pytest.raises(StaleWeightsError):
        engine.generate(PROMPTS, 1, Sampling(), WeightTag("policy", 0))


def test_an_impossible_rollout_is_drawn_again_then_refused(engine, model):
    engine.update_weights(model.state_dict(), WeightTag("policy", 0))
    engine._llm.logprobs = iter([-float("inf")])
    found = engine.generate(PROMPTS, 2, Sampling(), WeightTag("policy", 0))
    assert engine.redrawn == 1 and torch.isfinite(found.logprobs).all()
    assert [call for call in engine._llm.calls if call[0] == "generate"] == [("generate", 2), ("generate", 1)]
    engine._llm.logprobs = iter([float("nan")] * 1000)
    with pytest.raises(EngineError, match="prompt 0 got 3 tokens after 2 more draws"):
        engine.generate(PROMPTS, 2, Sampling(), WeightTag("policy", 0))


def test_what_vllm_raises_is_an_engine_error(engine, model):
    engine.update_weights(model.state_dict(), WeightTag("policy", 0))
    engine._llm.llm_engine.step = lambda: {}["dead"]
    with pytest.raises(EngineError, match="generate: vLLM failed with KeyError: 'dead'"):
        engine.generate(PROMPTS, 1, Sampling(), WeightTag("policy", 0))
    assert engine._llm.calls[-1] == ("abort", 2) and not engine._llm.llm_engine.queue
    engine._llm.llm_engine.has_unfinished_requests = lambda: False
    with pytest.raises(EngineError, match="must return 2 rollouts, got 0"):
        engine.generate(PROMPTS, 1, Sampling(), WeightTag("policy", 0))


def test_an_engine_that_hangs_is_given_up_and_its_requests_withdrawn(engine, model):
    engine.update_weights(model.state_dict(), WeightTag("policy", 0))
    engine._llm.llm_engine.hangs, engine.timeout_s = True, 0.3
    with pytest.raises(EngineError, match=r"a prompt must finish every 0\.3 s, none did"):
        engine.generate(PROMPTS, 1, Sampling(), WeightTag("policy", 0))
    assert engine._llm.calls[-1] == ("abort", 2) and engine.kv_cache_usage == 0.25


def test_sleeps_between_rollouts_where_asked_and_wakes_for_the_load(engine, model, monkeypatch):
    engine.sleep()
    assert engine._llm.calls == []
    sleeper = make_engine(model, enable_sleep_mode=True)
    sleeper.update_weights(model.state_dict(), WeightTag("policy", 0))
    sleeper.sleep()
    sleeper.sleep()
    with pytest.raises(StaleWeightsError):
        sleeper.generate(PROMPTS, 1, Sampling(), WeightTag("policy", 0))
    sleeper.update_weights(model.state_dict(), WeightTag("momentum", 1))
    names = [call[0] for call in sleeper._llm.calls]
    once = ["reload_weights", "version", "reset"]
    assert names == [*once, "sleep", "wake", *once] and ("sleep", 1) in sleeper._llm.calls


@pytest.mark.parametrize("prompt", [[], [2, 17], [-1]])
def test_a_token_that_the_model_has_not_is_refused(engine, model, prompt):
    engine.update_weights(model.state_dict(), WeightTag("policy", 0))
    with pytest.raises(EngineError, match=r"prompt 1 must have token ids in \[0, 17\), got"):
        engine.generate([[2], prompt], 1, Sampling(), WeightTag("policy", 0))


def test_older_ways_to_write_weights_are_found():
    for options, names in (
        ({}, ["reload_weights", "version"]),
        ({"versions": False}, ["reload_weights"]),
        ({"reloads": False, "versions": False}, ["load"]),
    ):
        llm = FakeLLM(**options)
        make_writer(llm)([("a", torch.ones(1))], "policy@1")
        assert [call[0] for call in llm.calls] == names
        assert llm.calls[0][1] == {"a": torch.ones(1)}
    with pytest.raises(EngineError, match="it offers neither"):
        make_writer(SimpleNamespace())


def test_the_process_keeps_its_seeds_and_threads(model):
    def seeding(**arguments):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        torch.set_num_threads(torch.get_num_threads() + 1)
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads = print
        return FakeLLM()

    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state(), torch.get_num_threads())
    set_num_threads = torch.set_num_threads
    options = {"eos_ids": (1,), "pad_id": 0, "dtype": torch.float32, "max_length": 40, "options": {}}
    VllmEngine(model, **options, make_llm=seeding)
    assert random.getstate() == before[0] and np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2]) and torch.get_num_threads() == before[3]
    assert torch.set_num_threads is set_num_threads and torch.get_default_dtype() == torch.float32


def test_without_vllm_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"vllm must be installed for --engine\.name vllm\. pip install vllm"):
        start(model="x")


@pytest.mark.parametrize("dtype", BOUNDS)
def test_parity_stops_at_the_bound_and_names_the_weights(dtype):
    mask = torch.tensor([[True, True], [True, False]])
    trainer = torch.full((2, 2), -1.0)
    engine = trainer.clone()
    engine[1, 1] = torch.nan  # padding
    engine[0, 0] += 2 * BOUNDS[dtype]
    gap = check_parity(engine, trainer, mask, dtype=dtype, tag=WeightTag("momentum", 7))
    assert gap == pytest.approx(2 / 3 * BOUNDS[dtype], rel=1e-2)
    for broken in (2 * BOUNDS[dtype], torch.nan):
        engine[0, 1] = -1 - broken
        with pytest.raises(StaleWeightsError, match="weights of momentum version 7"):
            check_parity(engine, trainer, mask, dtype=dtype, tag=WeightTag("momentum", 7))


def test_dry_run_misses_vllm(monkeypatch):
    from mgrpo.presets import PRESETS
    from mgrpo.run.preflight import find_problems

    config = PRESETS["arithmetic"]()
    config = replace(config, engine=replace(config.engine, name="vllm"))
    monkeypatch.setattr("mgrpo.run.preflight.find_spec", lambda name: None)
    assert any("needs the package vllm, it is not installed" in problem for problem in find_problems(config))
    monkeypatch.setattr("mgrpo.run.preflight.find_spec", lambda name: object())
    assert not find_problems(config)
