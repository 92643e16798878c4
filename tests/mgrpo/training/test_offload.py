"""AdamW on the host: the bits of torch's, from weights that are elsewhere too, and through a checkpoint."""

from __future__ import annotations

import pytest
import torch

from mgrpo.training.offload import HostAdamW
from mgrpo.training.state import optimizer_tensors

OPTIONS = {"optim.lr": 1e-3, "optim.weight_decay": 0.1, "optim.num_minibatches": 2}


def moments(trainer):
    """AdamW's state by parameter and name."""
    return optimizer_tensors(trainer.learner.optimizer, trainer.learner.names)


def assert_same(first, second):
    assert first.keys() == second.keys() and first
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_a_run_with_offload_has_the_bits_of_one_without(small, trained, weights_of):
    runs = [trained(small(OPTIONS | {"optim.offload": offload}), 2) for offload in (False, True)]
    assert [type(trainer.learner.optimizer) is HostAdamW for trainer, _ in runs] == [False, True]
    assert runs[0][1] == runs[1][1]
    assert_same(*(weights_of(trainer) for trainer, _ in runs))
    assert_same(*(moments(trainer) for trainer, _ in runs))


def test_a_run_with_offload_goes_on_from_a_checkpoint(small, trained, weights_of, tmp_path):
    config = small(OPTIONS | {"optim.offload": True})
    straight, _ = trained(config, 1)
    straight.save(tmp_path)
    resumed, _ = trained(config, 0)
    resumed.restore(tmp_path)
    for trainer in (straight, resumed):
        list(trainer.train(2))
    assert_same(weights_of(straight), weights_of(resumed))
    assert_same(moments(straight), moments(resumed))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_weights_on_another_device_are_written_back(monkeypatch, decay):
    """With a copy to the host that is a copy, as from a GPU."""
    torch.manual_seed(0)
    start = [torch.randn(5, 3), torch.randn(3), torch.randn(4, 4)]
    gradients = [[torch.randn_like(weight) for weight in start] for _ in range(3)]
    results = []
    for kind in (torch.optim.AdamW, HostAdamW):
        parameters = [torch.nn.Parameter(weight.clone()) for weight in start]
        optimizer = kind(parameters, lr=1e-2, betas=(0.8, 0.95), weight_decay=decay)
        with monkeypatch.context() as patch:
            if kind is HostAdamW:
                patch.setattr(torch.Tensor, "cpu", lambda tensor: tensor.clone())
            for step in gradients:
                parameters[0].grad, parameters[1].grad = step[0].clone(), step[1].clone()  # the last has none
                optimizer.step()
        results.append((parameters, [optimizer.state[p] for p in parameters[:2]]))
        assert parameters[2] not in optimizer.state and torch.equal(parameters[2], start[2])
    (plain, plain_state), (host, host_state) = results
    for i in range(2):
        assert torch.equal(plain[i], host[i]) and not torch.equal(host[i], start[i])
        assert_same(plain_state[i], host_state[i])
