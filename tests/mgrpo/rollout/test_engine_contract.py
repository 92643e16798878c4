"""Every engine keeps the contract; a new one is a row of ENGINES. tests/hosts/vllm has the real vLLM."""

from __future__ import annotations

import importlib
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from engine_contract import CHECKS
from fake_llm import FakeLLM
from fake_server import FakeServer
from helpers import EOS, PAD, VOCABULARY, tiny_model

from mgrpo.rollout import transformers as embedded
from mgrpo.rollout.decoding import WAYS
from mgrpo.rollout.transformers import TransformersEngine
from mgrpo.rollout.vllm.local import VllmEngine
from mgrpo.rollout.vllm.server import EnginePair, ServerEngine


@contextmanager
def embedded_engine(way, monkeypatch):
    """The embedded engine in one of its ways of decoding."""
    monkeypatch.setattr(embedded, "choose_way", lambda model, pad_id: way)
    model = tiny_model("llama")
    yield model, TransformersEngine(model, eos_ids=(EOS, 4, 5, 6), pad_id=PAD, dtype=torch.float32, batch_size=4)


@contextmanager
def vllm_engine(monkeypatch):
    """vLLM in the process, played by a fake."""
    real, model = importlib.import_module, tiny_model("llama")
    fake = SimpleNamespace(SamplingParams=SimpleNamespace, RequestOutputKind=SimpleNamespace(FINAL_ONLY="final"))
    monkeypatch.setattr(
        importlib, "import_module", lambda name, *a: fake if name == "vllm.sampling_params" else real(name, *a)
    )
    arguments = {"eos_ids": (EOS,), "pad_id": PAD, "dtype": torch.float32, "max_length": 40, "make_llm": FakeLLM}
    engine = VllmEngine(model, **arguments, options={"seed": 0})
    engine._llm.reason = "stop"
    yield model, engine


@contextmanager
def server_engine(number, monkeypatch):
    """One server, or one for each source, played by threads."""
    with ExitStack() as stack:
        servers = [FakeServer() for _ in range(number)]
        for server in servers:
            stack.callback(server.close)
        model, arguments = tiny_model("llama"), {"eos_ids": (EOS,), "pad_id": PAD, "max_length": 40}
        engines = [ServerEngine(model, dtype=torch.float32, url=server.url, **arguments) for server in servers]
        yield model, engines[0] if number == 1 else EnginePair(*engines)


ENGINES = {
    **{f"embedded, {way.__name__}": (embedded_engine, way) for way in WAYS},
    "vllm": (vllm_engine,),
    "server": (server_engine, 1),
    "two servers": (server_engine, 2),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", ENGINES)
def test_engine(name, check, monkeypatch):
    make, *arguments = ENGINES[name]
    with make(*arguments, monkeypatch) as (model, engine):
        check(engine, model.state_dict(), VOCABULARY)
        engine.close()


def mutant(name, change):
    """The embedded engine with one method changed."""
    original = getattr(TransformersEngine, name)
    return type("Mutant", (TransformersEngine,), {name: lambda self, *args: change(original, self, *args)})


def without_checks(original, self, weights, tag):
    own = self.model.state_dict(keep_vars=True)
    for key in own.keys() & weights.keys():
        own[key].data = weights[key]
    self.held = tag


def of_any_version(original, self, prompts, n, sampling, tag):
    self.held = tag
    return original(self, prompts, n, sampling, tag)


def by_local_index(original, self, prompts, n, sampling, tag):
    return original(self, prompts, n, replace(sampling, indices=None), tag)


def in_another_order(original, self, prompts, n, sampling, tag):
    found = original(self, prompts, n, sampling, tag)
    order = torch.arange(len(found.lengths)).view(len(prompts), n).T.flatten()
    return replace(found, tokens=found.tokens[order], lengths=found.lengths[order], logprobs=found.logprobs[order])


def with_positive_logprobs(original, self, *args):
    found = original(self, *args)
    return replace(found, logprobs=-found.logprobs)


def all_truncated(original, self, *args):
    found = original(self, *args)
    return replace(found, truncated=torch.ones_like(found.truncated))


MUTANTS = {
    "weights without checks": ("update_weights", without_checks),
    "rollouts of any version": ("generate", of_any_version),
    "noise by the index within the call": ("generate", by_local_index),
    "rollout by rollout": ("generate", in_another_order),
    "surprisals": ("generate", with_positive_logprobs),
    "all truncated": ("generate", all_truncated),
    "unknown metrics": ("stats", lambda original, self: {"speed": 1.0}),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_contract_rejects(name):
    model = tiny_model("llama")
    engine = mutant(*MUTANTS[name])(model, eos_ids=(EOS, 4, 5, 6), pad_id=PAD, dtype=torch.float32, batch_size=4)
    with pytest.raises((AssertionError, pytest.fail.Exception, RuntimeError)):
        for check in CHECKS:
            check(engine, model.state_dict(), VOCABULARY)
