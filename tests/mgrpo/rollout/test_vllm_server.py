"""Rollouts from vLLM servers against one that a thread here plays; tests/hosts/vllm has the real one."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from types import SimpleNamespace
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
import torch
from fake_server import FakeServer

from mgrpo.distributed.exchange import WeightStream
from mgrpo.errors import ConfigError, EngineError, StaleWeightsError
from mgrpo.presets import make_preset
from mgrpo.rollout.stop import StopTexts
from mgrpo.rollout.vllm import server
from mgrpo.rollout.vllm.process import ServerProcess
from mgrpo.rollout.vllm.server import EnginePair, ServerEngine
from mgrpo.rollout.weights.http import offer
from mgrpo.rollout.weights.nccl import NcclSender
from mgrpo.tasks.arithmetic import make_model, make_tokenizer
from mgrpo.types import Sampling, WeightTag

PROMPTS = [[2, 3, 4], [5, 6]]
POLICY_0 = WeightTag("policy", 0)


@pytest.fixture
def fake():
    found = FakeServer()
    yield found
    found.close()


@pytest.fixture
def model():
    return make_model()


def connect(model, url, **options) -> ServerEngine:
    return ServerEngine(model, eos_ids=(1,), pad_id=0, dtype=torch.bfloat16, max_length=40, url=url, **options)


def test_weights_arrive_bit_for_bit_in_the_engines_dtype_and_in_order(model, fake):
    engine = connect(model, fake.url)
    engine.update_weights(model.state_dict(), WeightTag("policy", 3))
    assert fake.calls[-5:] == ["mgrpo_state", "/pause", "mgrpo_load", "/reset_prefix_cache", "/resume"]
    assert fake.weights.keys() == model.state_dict().keys() and fake.mgrpo_version == "policy@3"
    for name, tensor in model.state_dict().items():
        assert torch.equal(fake.weights[name], tensor.bfloat16()), name


def test_rollouts(model, fake):
    engine = connect(model, fake.url)
    engine.update_weights(model.state_dict(), POLICY_0)
    found = engine.generate(PROMPTS, 2, Sampling(temperature=0.7, max_new_tokens=4, seed=5), POLICY_0)
    assert found.tokens.tolist() == [[7, 7, 7], [7, 7, 7], [7, 7, 0], [7, 7, 0]]
    assert found.logprobs.tolist() == [[-0.5] * 3] * 2 + [[-0.5, -0.5, 0]] * 2 and not found.truncated.any()
    assert fake.last["stop_token_ids"] == [1] and fake.last["temperature"] == 0.7 and fake.last["seed"] in (5, 7)
    greedy = engine.generate(PROMPTS, 3, Sampling(temperature=0.0), POLICY_0)
    assert fake.last["n"] == 1 and len(greedy.tokens) == 6


def test_a_server_is_asked_to_stop_and_cut_where_it_does_not(model, fake):
    stop = StopTexts(["12"], make_tokenizer())
    engine = connect(model, fake.url, stop=stop)
    engine.update_weights(model.state_dict(), POLICY_0)
    fake.writes = stop.tokenizer.convert_tokens_to_ids(list("4124"))
    found = engine.generate(PROMPTS, 2, Sampling(max_new_tokens=4), POLICY_0)
    assert found.tokens.tolist() == [fake.writes[:3]] * 4 and not found.truncated.any()
    assert fake.last["stop"] == ["12"] and fake.last["include_stop_str_in_output"]


def test_weights_are_offered_under_a_secret_path_while_they_load(model):
    with offer(WeightStream({"a": torch.arange(3.0)}), {"a": (3,)}, torch.float32, "127.0.0.1") as (url, sha256):
        with urlopen(url) as reply:
            assert hashlib.sha256(reply.read()).hexdigest() == sha256
        with pytest.raises(HTTPError, match="404"):
            urlopen(url[:-1])
    with pytest.raises(OSError):
        urlopen(url, timeout=2)


def test_damaged_weights_are_refused(model, fake, monkeypatch):
    engine = connect(model, fake.url)
    engine.update_weights(model.state_dict(), POLICY_0)
    real = hashlib.sha256
    monkeypatch.setattr(
        "mgrpo.rollout.weights.http.hashlib", SimpleNamespace(sha256=lambda data: real(bytes(data) + b"x"))
    )
    with pytest.raises(EngineError, match="weights must have SHA-256"):
        engine.update_weights(model.state_dict(), WeightTag("policy", 1))
    assert fake.mgrpo_version is None
    with pytest.raises(StaleWeightsError):
        engine.generate(PROMPTS, 1, Sampling(), POLICY_0)


@pytest.mark.parametrize("holds", [None, "momentum@0"])
def test_a_server_that_restarted_or_was_loaded_by_another_run_is_found_out(model, fake, holds):
    engine = connect(model, fake.url)
    engine.update_weights(model.state_dict(), POLICY_0)
    fake.mgrpo_version = holds
    with pytest.raises(StaleWeightsError, match=f"must hold policy@0, it holds {holds}"):
        engine.generate(PROMPTS, 1, Sampling(), POLICY_0)


def test_over_nccl_the_version_is_named_after_the_weights(model, fake, monkeypatch):
    fake.answers["/get_world_size"] = {"world_size": 2}
    made, sent = [], []

    class Sender:
        def __init__(self, *arguments):
            made.append(arguments)

        def send(self, weights):
            sent.append((fake.mgrpo_version, len(weights.names)))

    monkeypatch.setattr(server, "NcclSender", Sender)
    engine = connect(model, fake.url, transfer="nccl")
    for version in (0, 1):
        engine.update_weights(model.state_dict(), WeightTag("policy", version))
        assert fake.mgrpo_version == f"policy@{version}"
    assert made == [(fake.url, "127.0.0.1", 2, torch.bfloat16, engine.shapes)]
    assert sent == [(None, len(model.state_dict()))] * 2
    assert "mgrpo_load" not in fake.calls


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_nccl_without_vllm_says_what_to_take():
    with pytest.raises(EngineError, match=r"got ModuleNotFoundError.*Take --engine\.transfer http"):
        NcclSender("http://a", "127.0.0.1", 1, torch.bfloat16, {})


def test_a_server_that_hangs_is_given_up(model, fake):
    engine = connect(model, fake.url, timeout_s=0.7)
    engine.update_weights(model.state_dict(), POLICY_0)
    fake.hangs = True
    before = time.monotonic()
    with pytest.raises(EngineError, match=r"must finish a prompt every 0\.7 s, it did not"):
        engine.generate(PROMPTS * 50, 1, Sampling(), POLICY_0)
    assert time.monotonic() - before < 10 and engine.kv_cache_usage == 0.5


def test_a_server_that_is_gone(model, fake):
    engine = connect(model, fake.url)
    engine.update_weights(model.state_dict(), POLICY_0)
    fake.http.shutdown()
    fake.http.server_close()
    with pytest.raises(EngineError, match=r"server at http://127.* must answer /v1/completions, got Conn"):
        engine.generate(PROMPTS, 1, Sampling(), POLICY_0)
    fake.http = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    threading.Thread(target=fake.http.serve_forever, daemon=True).start()


@pytest.mark.parametrize(
    ("status", "message"),
    [
        ({"/collective_rpc": 404}, "must be started with VLLM_SERVER_DEV_MODE=1, it has no /collective_rpc"),
        ({"/v1/models": 500}, "answered /v1/models with 500"),
    ],
)
def test_a_server_that_will_not_do_is_refused_at_the_start(model, fake, status, message):
    fake.status = status
    with pytest.raises(EngineError, match=message):
        connect(model, fake.url)


def test_a_server_for_shorter_texts_is_refused(model, fake):
    fake.max_model_len = 39
    with pytest.raises(EngineError, match="must take 40 tokens, it takes 39"):
        connect(model, fake.url)


def test_minus_infinity_is_drawn_again_and_a_full_cache_refused(model, fake):
    engine = connect(model, fake.url)
    engine.update_weights(model.state_dict(), POLICY_0)
    fake.logprob = server.MINUS_INFINITY
    with pytest.raises(EngineError, match="prompt 0 got 3 tokens after 2 more draws"):
        engine.generate(PROMPTS, 1, Sampling(), POLICY_0)
    assert engine.redrawn == 4
    fake.answers["/reset_prefix_cache"] = {"success": False}
    with pytest.raises(EngineError, match="must empty its prefix cache, it refused"):
        engine.update_weights(model.state_dict(), POLICY_0)


def test_tokens_without_log_probs_are_refused(model, fake):
    engine = connect(model, fake.url)
    engine.update_weights(model.state_dict(), POLICY_0)
    fake.lost = 1
    with pytest.raises(EngineError, match=r"every token must have a log-prob, [32] have [21]\."):
        engine.generate(PROMPTS, 1, Sampling(), POLICY_0)


def test_a_pair_keeps_each_source_on_its_own_server(model, fake):
    second = FakeServer()
    try:
        pair = EnginePair(connect(model, fake.url), connect(model, second.url))
        pair.update_weights(model.state_dict(), WeightTag("momentum", 1))
        pair.update_weights(model.state_dict(), WeightTag("policy", 1))
        assert (fake.mgrpo_version, second.mgrpo_version) == ("policy@1", "momentum@1")
        assert pair.generate(PROMPTS, 1, Sampling(), WeightTag("momentum", 1)).tag.source == "momentum"
        assert "/v1/completions" in second.calls and "/v1/completions" not in fake.calls
        pair.close()
    finally:
        second.close()


def test_a_process_that_cannot_start_says_why_and_leaves_none(model, monkeypatch):
    monkeypatch.setattr("mgrpo.rollout.vllm.process.require_vllm", lambda: None)
    monkeypatch.setattr("mgrpo.rollout.vllm.process.sys.executable", "/bin/false")
    process = ServerProcess(model, dtype=torch.float32, max_length=40, options={}, device="")
    with pytest.raises(EngineError, match="the vLLM server ended with exit code 1"):
        process.wait()
    process.close()
    with pytest.raises(ProcessLookupError):
        os.killpg(process._process.pid, 0)


ORPHAN = """
import subprocess, sys
from mgrpo.process.signals import end_with_parent
child = subprocess.Popen(["sleep", "60"], start_new_session=True, preexec_fn=end_with_parent)
print(child.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a Linux call")
def test_a_server_ends_with_its_trainer_even_by_kill_9():
    trainer = subprocess.Popen([sys.executable, "-c", ORPHAN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    child = int(trainer.stdout.readline())
    trainer.send_signal(signal.SIGKILL)
    trainer.communicate()
    deadline = time.monotonic() + 60
    while os.path.exists(f"/proc/{child}") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{child}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"placement": "server"}, "must name 1 or 2 servers"),
        ({"servers": ("http://a",)}, "must name 1 or 2 servers"),
        ({"placement": "server", "servers": ("localhost:1",)}, "must be URLs such as"),
        ({"devices": ("0", "1")}, "must name 2 devices"),
        ({"placement": "two-engines", "devices": ("0",)}, "must name 2 devices"),
        ({"placement": "two-engines", "name": "transformers"}, "needs --engine.name vllm"),
    ],
)
def test_placements_that_make_no_sense(changes, message):
    config = make_preset("arithmetic")
    with pytest.raises(ConfigError, match=message):
        replace(config, engine=replace(config.engine, **({"name": "vllm"} | changes)))


def test_two_engines_need_momentum_rollouts():
    config = make_preset("srt")
    with pytest.raises(ConfigError, match=r"--rollout\.num-momentum 0 needs one engine or one server"):
        replace(config, engine=replace(config.engine, name="vllm", placement="two-engines"))
