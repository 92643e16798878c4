"""Real vLLM on a CPU: `make test-vllm`. R rollouts of L tokens."""

from __future__ import annotations

import copy
import json
import os
import signal
import time
from contextlib import closing
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from engine_contract import CHECKS

from mgrpo.config import Config, LoraConfig
from mgrpo.distributed.exchange import WeightStream
from mgrpo.errors import EngineError, Exit, StaleWeightsError
from mgrpo.models.load import load_model
from mgrpo.presets import make_preset
from mgrpo.rollout.build import start_engine
from mgrpo.rollout.generator import Generator
from mgrpo.rollout.parity import BOUNDS, check_parity
from mgrpo.rollout.stop import StopTexts
from mgrpo.rollout.vllm.local import VllmEngine
from mgrpo.rollout.vllm.server import EnginePair
from mgrpo.rollout.weights.nccl import NcclSender
from mgrpo.run.loop import run
from mgrpo.tasks.arithmetic import make_model, make_tokenizer
from mgrpo.training.trainer import Trainer
from mgrpo.types import Rollouts, Sampling, WeightTag

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: make test-vllm"),
]
BASE = "builtin:arithmetic32"
OPTIONS = {
    "enforce_eager": True,
    "kv_cache_memory_bytes": 64 * 2**20,
    "block_size": 32,
    "enable_chunked_prefill": False,
    "max_num_batched_tokens": 4096,
}
# Longer than two blocks of the prefix cache.
PROMPTS = [[2 + (i * j + j * j) % 15 for j in range(70 + i)] for i in range(6)]
SAMPLING = Sampling(max_new_tokens=24, seed=3)


def make_policy(seed: int) -> torch.nn.Module:
    """Random weights, far enough from uniform that other weights are seen."""
    model = make_model(seed, head_dim=32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    return model


@pytest.fixture(scope="module")
def models() -> dict[str, torch.nn.Module]:
    return {"policy": make_policy(0), "momentum": make_policy(1)}


@pytest.fixture(scope="module")
def engine(models):
    engine = VllmEngine(models["policy"], eos_ids=(1,), pad_id=0, dtype=torch.float32, max_length=128, options=OPTIONS)
    yield engine
    engine.close()


@torch.no_grad()
def trainer_logprobs(model: torch.nn.Module, rollouts: Rollouts) -> torch.Tensor:
    """[R, L] by transformers."""
    found = torch.zeros_like(rollouts.logprobs)
    for row in range(len(rollouts.tokens)):
        prompt, response = PROMPTS[row // rollouts.num_per_prompt], rollouts.response(row)
        logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        found[row, : len(response)] = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
    return found


def compare(models, rollouts: Rollouts) -> float:
    """The guard that a run has."""
    pair = (rollouts.logprobs, trainer_logprobs(models[rollouts.tag.source], rollouts), rollouts.mask)
    return check_parity(*pair, dtype=torch.float32, tag=rollouts.tag)


def roll_out(engine, models, source, version: int) -> Rollouts:
    engine.update_weights(models[source].state_dict(), WeightTag(source, version))
    return engine.generate(PROMPTS, 4, SAMPLING, WeightTag(source, version))


def test_logprobs_agree_after_every_update(engine, models):
    for version in range(3):
        for source in ("momentum", "policy"):
            gap = compare(models, roll_out(engine, models, source, version))
            assert gap < BOUNDS[torch.float32] / 10


def test_the_same_seed_gives_the_same_tokens_in_any_batch(engine, models):
    first, again = (roll_out(engine, models, "policy", version) for version in (0, 1))
    assert torch.equal(first.tokens, again.tokens) and torch.equal(first.lengths, again.lengths)
    for b in (0, 1):
        alone = engine.generate(PROMPTS[b : b + 1], 4, replace(SAMPLING, indices=(b,)), WeightTag("policy", 1))
        assert [alone.response(row) for row in range(4)] == [first.response(4 * b + row) for row in range(4)]
    other = engine.generate(PROMPTS, 4, replace(SAMPLING, seed=4), WeightTag("policy", 1))
    assert not torch.equal(other.tokens[:, :4], first.tokens[:, :4])
    assert len({tuple(first.response(row)) for row in range(4)}) > 1


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(engine, models, check):
    check(engine, models["policy"].state_dict(), engine.vocabulary)


def test_rollouts_end_at_eos_or_at_the_limit(engine, models):
    found = roll_out(engine, models, "policy", 0)
    ended = [found.response(row)[-1] == 1 for row in range(len(found.tokens))]
    assert found.truncated.tolist() == [not end for end in ended] and any(ended) and not all(ended)
    assert not any(1 in found.response(row)[:-1] for row in range(len(found.tokens)))
    assert found.lengths[found.truncated].eq(24).all()


def test_a_stop_text_ends_a_response_with_the_token_that_completes_it(models):
    """The same tokens as without, as far as they go, and vLLM itself stops there: nothing is left to cut."""
    stop = StopTexts(["12", "7", "<eos>"], make_tokenizer())
    arguments = {"eos_ids": (1,), "pad_id": 0, "dtype": torch.float32, "max_length": 128, "options": OPTIONS}
    with closing(VllmEngine(models["policy"], **arguments)) as plain:
        whole = roll_out(plain, models, "policy", 0)
    with closing(VllmEngine(models["policy"], **arguments, stop=stop)) as stopping:
        found = roll_out(stopping, models, "policy", 0)
        stopping._ended = lambda response, stop: response
        uncut = roll_out(stopping, models, "policy", 0)
    ends = [stop.end(whole.response(row)) for row in range(len(whole.tokens))]
    assert None in ends and len(set(ends)) > 3
    for row, end in enumerate(ends):
        assert found.response(row) == uncut.response(row) == whole.response(row)[:end]
        assert bool(found.truncated[row]) == (end is None and bool(whole.truncated[row])) == bool(uncut.truncated[row])
    assert compare(models, found) < BOUNDS[torch.float32] / 10


def test_temperature_is_in_the_logprobs(engine, models):
    engine.update_weights(models["policy"].state_dict(), WeightTag("policy", 0))
    cold = engine.generate(PROMPTS, 4, replace(SAMPLING, temperature=0.5), WeightTag("policy", 0))
    model = copy.deepcopy(models["policy"])
    with torch.no_grad():  # the norm ahead of the head scales the logits as a temperature does
        model.model.norm.weight.mul_(2)
    assert compare({"policy": model}, cold) < 1e-4


def test_greedy_is_the_argmax(engine, models):
    engine.update_weights(models["policy"].state_dict(), WeightTag("policy", 0))
    found = engine.generate(PROMPTS[:2], 2, Sampling(temperature=0.0, max_new_tokens=1), WeightTag("policy", 0))
    with torch.no_grad():
        expected = [int(models["policy"](input_ids=torch.tensor([p])).logits[0, -1].argmax()) for p in PROMPTS[:2]]
    assert found.tokens[:, 0].tolist() == [expected[0]] * 2 + [expected[1]] * 2


@pytest.mark.parametrize("fault", ["skipped load", "swapped models", "missing tied head", "prefix cache not reset"])
def test_parity_catches_every_planted_fault(engine, models, monkeypatch, fault):
    roll_out(engine, models, "policy", 0)
    weights = models["momentum"].state_dict()
    if fault == "skipped load":
        monkeypatch.setattr(engine, "_write", lambda weights, version: None)
    elif fault == "swapped models":
        weights = models["policy"].state_dict()
    elif fault == "missing tied head":
        write = engine._write
        partial = [(name, tensor) for name, tensor in weights.items() if name != "lm_head.weight"]
        monkeypatch.setattr(engine, "_write", lambda weights, version: write(partial, version))
    else:
        monkeypatch.setattr(engine._llm, "reset_prefix_cache", lambda: True)
    engine.update_weights(weights, WeightTag("momentum", 0))
    monkeypatch.setattr(engine, "_check_version", lambda output: None)
    rollouts = engine.generate(PROMPTS, 4, SAMPLING, WeightTag("momentum", 0))
    with pytest.raises(StaleWeightsError, match="did not use the weights of momentum version 0"):
        compare(models, rollouts)
    monkeypatch.undo()
    compare(models, roll_out(engine, models, "momentum", 1))


def test_vllm_itself_contradicts_a_skipped_load(engine, models, monkeypatch):
    roll_out(engine, models, "policy", 0)
    monkeypatch.setattr(engine, "_write", lambda weights, version: None)
    with pytest.raises(StaleWeightsError, match="must use weights momentum@0, it used policy@0"):
        roll_out(engine, models, "momentum", 0)


def test_weights_in_any_order(engine, models, monkeypatch):
    write = engine._write
    monkeypatch.setattr(engine, "_write", lambda weights, version: write(list(weights)[::-1], version))
    assert compare(models, roll_out(engine, models, "momentum", 0)) < BOUNDS[torch.float32] / 10


def test_weights_that_are_not_finite_are_refused(engine, models):
    """vLLM takes them without a word, and what they leave in its KV cache makes sound weights write nan later."""
    broken = {name: tensor.clone() for name, tensor in models["policy"].state_dict().items()}
    broken["model.norm.weight"][5] = torch.nan
    with pytest.raises(EngineError, match=r"weights must be finite, model\.norm\.weight is not"):
        engine.update_weights(broken, WeightTag("policy", 0))
    compare(models, roll_out(engine, models, "policy", 1))


def test_a_refused_shape_does_not_spoil_the_next_load(engine, models):
    """In vLLM itself the load after a wrong shape fails too."""
    wrong = models["policy"].state_dict() | {"model.norm.weight": torch.zeros(3)}
    with pytest.raises(EngineError, match=r"model.norm.weight must have shape \(96,\), got \(3,\)"):
        engine.update_weights(wrong, WeightTag("policy", 0))
    compare(models, roll_out(engine, models, "policy", 1))


def test_a_bad_request_is_an_engine_error_and_the_next_works(engine, models):
    roll_out(engine, models, "policy", 0)
    with pytest.raises(EngineError, match="generate: vLLM failed with"):
        engine.generate([[2] * 200], 1, SAMPLING, WeightTag("policy", 0))
    compare(models, roll_out(engine, models, "policy", 1))


def run_config(tmp_path, steps: int) -> Config:
    config = make_preset("arithmetic")
    rollout = replace(config.rollout, num_prompts=8, num_policy=6, num_momentum=4, parity_every=1)
    engine = replace(config.engine, name="vllm", kv_cache_gib=0.1)
    return replace(
        config, steps=steps, rollout=rollout, engine=engine, model=replace(config.model, path=BASE, device="cpu")
    )


def test_twenty_steps_of_the_arithmetic_preset(tmp_path):
    trainer = Trainer(run_config(tmp_path, 20))
    try:
        rows = list(trainer.train(20))
    finally:
        trainer.close()
    assert len(rows) == 20 and rows[-1]["vote_accuracy"] > 0.3
    for row in rows:
        assert row["parity_policy"] < BOUNDS[torch.float32] and row["parity_momentum"] < BOUNDS[torch.float32]
        assert row["time_publish_s"] > 0 and row["time_rollout_momentum_s"] > 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_adapters_reach_vllm_merged(tmp_path, dtype):
    config = run_config(tmp_path, 3)
    config = replace(config, lora=LoraConfig(rank=4), optim=replace(config.optim, lr=1e-2))
    trainer = Trainer(replace(config, model=replace(config.model, dtype=dtype)))
    try:
        rows = list(trainer.train(3))
    finally:
        trainer.close()
    bound = BOUNDS[trainer.loaded.dtype]
    for row in rows:
        assert row["parity_policy"] < bound and row["parity_momentum"] < bound
    policy, momentum = trainer.loaded.weights(), trainer.momentum.state_dict()
    assert not any(torch.equal(policy[name], momentum[name]) for name in policy)


def test_bf16_agrees_within_its_rounding(tmp_path):
    """The engine takes the copy of the average that the kernel has rounded."""
    config = run_config(tmp_path, 3)
    trainer = Trainer(replace(config, model=replace(config.model, dtype="bf16")))
    try:
        rows = list(trainer.train(3))
    finally:
        trainer.close()
    assert trainer.momentum.engine_weights and trainer.momentum.weights.keys() == trainer.momentum.engine_weights.keys()
    for row in rows:
        assert 1e-5 < row["parity_policy"] < BOUNDS[torch.bfloat16]
        assert 1e-5 < row["parity_momentum"] < BOUNDS[torch.bfloat16]
        assert row["tis_mean"] == pytest.approx(1, abs=0.05) and row["logprob_gap"] > 0


def test_a_cache_too_small_and_heads_of_another_width_are_told_at_the_start(models):
    with pytest.raises(EngineError, match=r"start: vLLM failed with ValueError: .*cache"):
        VllmEngine(
            models["policy"],
            **{"eos_ids": (1,), "pad_id": 0, "dtype": torch.float32, "max_length": 128},
            options=OPTIONS | {"kv_cache_memory_bytes": 2**15},
        )
    config = run_config(Path(), 1)
    narrow = replace(config, model=replace(config.model, path="builtin:arithmetic"))
    with pytest.raises(EngineError, match=r"head size must be one of 32, .* got 24.*builtin:arithmetic32"):
        start_engine(load_model(narrow.model), narrow.engine, stop=None, max_length=64)


def children() -> set[int]:
    """Processes, live or zombie, that this one or one of its own has started."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found: set[int] = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()}


@pytest.mark.long  # starts five engines; test_vllm_ahead.py has two servers, test_engine_faults.py the faults
def test_two_engines_agree_and_a_killed_one_ends_the_run_which_resumes(tmp_path, monkeypatch):
    """Parity at each step; then kill -9 of a server at work: exit code 5, the step before saved, nothing left over."""
    config = run_config(tmp_path, 6)
    # Stop texts that cost no accuracy: the servers need a tokenizer for them.
    rollout = replace(config.rollout, stop=("##", "<eos>"))
    engine = replace(config.engine, placement="two-engines", timeout_s=60)
    config = replace(config, rollout=rollout, engine=engine, run_dir=str(tmp_path / "run"))
    before, real, pids = children(), Generator.roll_out, []

    def roll_out(self, prompts, step):
        assert isinstance(self.engine, EnginePair)
        if step == 1:
            pids.extend(children() - before)
        if step == 4:
            os.kill(self.engine.engines["policy"].process._process.pid, signal.SIGKILL)
        return real(self, prompts, step)

    monkeypatch.setattr(Generator, "roll_out", roll_out)
    with pytest.raises(EngineError, match=r"server at http://.* Step 3 is saved"):
        run(config)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["parity_policy"] < BOUNDS[torch.float32] and row["parity_momentum"] < BOUNDS[torch.float32]
    assert (tmp_path / "run" / "checkpoints" / "step_3").is_dir() and len(pids) >= 2
    deadline = time.monotonic() + 20
    while (left := children() & set(pids)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left
    monkeypatch.undo()
    # Who has lost the machine with the servers goes on with one engine.
    one = replace(config, resume=True, engine=replace(engine, placement="one-engine"))
    assert run(one) == Exit.DONE
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]


def test_the_sender_over_nccl_speaks_vllms_protocol(models, monkeypatch):
    """vLLM's own classes, with all but the GPUs: what is sent to the server, and in which order."""
    from vllm.distributed.weight_transfer import clients, nccl_engine

    calls, sent = [], []
    engine = nccl_engine.NCCLTrainerWeightTransferEngine
    client = clients.HTTPVLLMWeightSyncClient
    monkeypatch.setattr(client, "_post", lambda self, path, json=None: calls.append((f"{self.base_url}/{path}", json)))
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: calls.append(("rank 0", info)))
    monkeypatch.setattr(engine, "_broadcast", lambda self, source, meta: sent.extend(self._checked_iter(source, meta)))
    monkeypatch.setattr(engine, "_post_send_sync", lambda self: None)
    shapes = {name: tuple(tensor.shape) for name, tensor in models["policy"].state_dict().items()}
    sender = NcclSender("http://127.0.0.1:1", "127.0.0.1", 2, torch.bfloat16, shapes)
    assert {calls[0][0], calls[1][0]} == {"http://127.0.0.1:1/init_weight_transfer_engine", "rank 0"}
    (init,) = [body["init_info"] for where, body in calls if where != "rank 0"]
    assert init["world_size"] == 3 and init["rank_offset"] == 1
    for source in ("momentum", "policy"):
        calls.clear(), sent.clear()
        weights = models[source].state_dict()
        sender.send(WeightStream(weights))
        assert [where.rpartition("/")[2] for where, _ in calls] == [
            *("start_weight_update", "update_weights", "finish_weight_update")
        ]
        info = calls[1][1]["update_info"]
        assert info["names"] == list(weights) and set(info["dtype_names"]) == {"bfloat16"}
        assert [name for name, _ in sent] == list(weights)
        assert all(torch.equal(tensor, weights[name].bfloat16()) for name, tensor in sent)
    monkeypatch.setattr(client, "_post", lambda self, path, json=None: 1 / 0)
    with pytest.raises(EngineError, match="update_weights: vLLM's weight transfer failed with ZeroDivisionError"):
        sender.send(WeightStream(weights))
