"""The plan against the memory that a process takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")

# A model of 60 M parameters, half of them in the embedding, takes an optimiser step on three short sequences.
CODE = """
import ctypes, gc, json, os
from dataclasses import replace
import torch
from helpers import loaded, make_trajectories
from transformers import Qwen3Config, Qwen3ForCausalLM
from mgrpo.algorithm.loss import Batch
from mgrpo.models.forward import Forward
from mgrpo.models.momentum import Momentum
from mgrpo.observe.timer import Timer
from mgrpo.presets import make_preset
from mgrpo.run.memory import Job, plan_memory
from mgrpo.run.plan import measure
from mgrpo.training.learner import Learner

def resident():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

preset = make_preset("mgrpo_arithmetic")
config = replace(preset, rollout=replace(preset.rollout, num_prompts=1, num_policy=2, num_momentum=1, max_new_tokens=8))
def shape(num_hidden_layers, vocab_size):
    sizes = dict(hidden_size=512, num_attention_heads=8, num_key_value_heads=8, head_dim=64, intermediate_size=1408)
    sizes |= dict(num_hidden_layers=num_hidden_layers, vocab_size=vocab_size, pad_token_id=0, eos_token_id=1)
    return Qwen3Config(**sizes, tie_word_embeddings=True)

options = dict(temperature=1.0, kernels=config.kernels, micro_batch_tokens=64)
trajectories = make_trajectories([[2, 3]], [[4, 5, 6, 7], [8, 9], [5, 6, 1]], num_policy=2)

def step(model):
    "One optimiser step; returns what stays and how much memory each part took."
    found, before = {}, resident()
    policy = loaded(model())
    found["weights"] = resident() - before
    forward = Forward(policy, **options)
    before = resident()
    momentum = Momentum(policy.model, config.momentum, seed=0, kernels=config.kernels)
    found["momentum model"] = resident() - before
    learner = Learner(config, policy, momentum, forward, Timer())
    old = forward.run(policy.model, trajectories).logprob
    batch = Batch(
        mask=trajectories.mask, advantage=torch.tensor([1.0, -1.0, 0.0]), old_logprob=old, rollout_logprob=old,
        ref_logprob=None,
    )
    before = resident()
    metrics = learner.update(trajectories, batch, ~trajectories.is_momentum).metrics
    assert metrics["grad_norm"] > 0
    both = resident() - before
    policy.model.zero_grad(set_to_none=True)
    found["AdamW moments"] = resident() - before
    found["gradients"] = both - found["AdamW moments"]
    return found, (policy, momentum, learner)

step(lambda: Qwen3ForCausalLM(shape(1, 24)))  # what torch takes once
big = shape(9, 60_000)
found, held = step(lambda: Qwen3ForCausalLM(big))
size = measure(config, big, 1)
parts = plan_memory(config, Job(size=size, longest=10, ranks=1, device_memory=None, on_gpu=False)).parts
print(json.dumps({"size": size.parameters, "found": found, "planned": {part.name: part.num_bytes for part in parts}}))
"""


def test_parts_of_the_state_take_what_the_plan_says():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert 55e6 < result["size"] < 65e6
    for name, measured in result["found"].items():
        (planned,) = (size for part, size in result["planned"].items() if part.startswith(f"{name} ("))
        print(f"{name}: {measured / 2**20:.1f} MiB, planned {planned / 2**20:.1f}")
        assert abs(measured / planned - 1) < 0.1, name
