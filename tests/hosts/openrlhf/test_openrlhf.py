"""OpenRLHF's functions by our kernels: the real package, of whose needs those that want a GPU are empty stand-ins."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

# What OpenRLHF's modules import at their top and the two functions do not use.
CODE = """
import inspect, sys, types
from importlib.machinery import ModuleSpec

class Anything(types.ModuleType):
    __path__ = []
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})

class Stand:
    ABSENT = {"flash_attn.ops"}  # so that OpenRLHF takes its own way on a CPU
    def find_spec(self, name, path=None, target=None):
        absent = {"deepspeed", "flash_attn", "peft", "pylatexenc", "ray", "ring_flash_attn"}
        if name.partition(".")[0] in absent and name not in self.ABSENT:
            return ModuleSpec(name, self, is_package=True)
    def create_module(self, spec):
        return Anything(spec.name)
    def exec_module(self, module):
        pass

import torch, transformers.integrations.deepspeed  # before anyone can find a deepspeed
torch.compile = lambda function: function
sys.meta_path.insert(0, Stand())
import openrlhf
from openrlhf.models import actor, utils
from mgrpo.integrations import patch_kernels

assert [*inspect.signature(utils.log_probs_from_logits).parameters] == ["logits", "labels", "temperature"]
assert [*inspect.signature(utils.compute_entropy).parameters] == ["logits"]
assert actor.log_probs_from_logits is utils.log_probs_from_logits and actor.compute_entropy is utils.compute_entropy

torch.manual_seed(0)
logits, labels = 3 * torch.randn(2, 7, 101), torch.randint(101, (2, 7))
upstream = torch.linspace(-1, 1, 14).view(2, 7)

def run(temperature):
    leaf = logits.clone().requires_grad_()
    scaled = leaf * 1.0  # OpenRLHF divides what it is given in place
    logprob = actor.log_probs_from_logits(scaled, labels, temperature)
    entropy = actor.compute_entropy(leaf)
    ((logprob + 0.5 * entropy) * upstream).sum().backward()
    return logprob.detach(), entropy.detach(), leaf.grad

for temperature in (1.0, 0.7):
    stock = run(temperature)
    with patch_kernels(openrlhf):
        assert actor.compute_entropy is not stock and actor.compute_entropy.__module__.startswith("mgrpo.")
        ours = run(temperature)
    for one, other in zip(ours, stock):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)
assert actor.compute_entropy.__module__ == utils.compute_entropy.__module__ == "openrlhf.models.utils"
print("same")
"""


@pytest.mark.skipif(find_spec("openrlhf") is None, reason="needs OpenRLHF: pip install --no-deps openrlhf==0.11.2")
def test_log_probs_and_entropy_are_openrlhfs():
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, cwd=root, timeout=900)
    assert done.stdout.splitlines()[-1:] == ["same"], done.stderr
