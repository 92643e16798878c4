"""The worker with a momentum model: verl's own engine under FSDP2, in one process on a CPU."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from omegaconf import open_dict
from safetensors import safe_open
from torch.distributed.tensor import DTensor

from mgrpo.config import MomentumConfig
from mgrpo.integrations.shared import momentum_tensors
from mgrpo.integrations.verl.options import read_options
from mgrpo.integrations.verl.worker import EngineMomentum, MGRPOWorker, file_name


@pytest.fixture(scope="module", autouse=True)
def _process_group(tmp_path_factory):
    """What Ray's worker group tells a worker of its place."""
    with socket.socket() as free, pytest.MonkeyPatch.context() as patch:
        free.bind(("127.0.0.1", 0))
        place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        for name, value in (place | {"MASTER_PORT": str(free.getsockname()[1])}).items():
            patch.setenv(name, value)
        dist.init_process_group(
            "gloo", init_method=f"file://{tmp_path_factory.mktemp('store')}/s", rank=0, world_size=1
        )
        yield
        dist.destroy_process_group()


@pytest.fixture
def make_worker(compose):
    """An MGRPOWorker with its models, as the trainer would configure it."""

    def make(**changes) -> MGRPOWorker:
        config = compose(**changes)
        options = read_options(config, total_training_steps=10)
        with open_dict(config):
            config.actor_rollout_ref.actor.optim.total_training_steps = 10
            config.actor_rollout_ref.mgrpo = {
                "momentum": dataclasses.asdict(options.recipe.momentum),
                "kernels": dataclasses.asdict(options.recipe.kernels),
                "patch_kernels": options.patch_kernels,
                "num_optimizer_steps": options.recipe.num_optimizer_steps,
                "seed": 0,
            }
        worker = MGRPOWorker(config=config.actor_rollout_ref, role="actor")
        worker.init_model()
        return worker

    return make


def own(tensors) -> dict[str, torch.Tensor]:
    """Copies of local shards."""
    return {name: (t.to_local() if isinstance(t, DTensor) else t).detach().clone() for name, t in tensors.items()}


def policy(worker) -> dict[str, torch.Tensor]:
    return own(dict(worker.actor.engine.module.named_parameters()))


def momentum(worker) -> dict[str, torch.Tensor]:
    return own(worker.momentum.momentum.weights)


def step(worker, *, scale=1.0) -> None:
    """One optimiser step of verl's engine on made-up gradients."""
    engine = worker.actor.engine
    generator = torch.Generator().manual_seed(0)
    for parameter in filter(lambda p: p.requires_grad, engine.module.parameters()):
        parameter.grad = torch.zeros_like(parameter)
        local = parameter.grad.to_local()
        local.copy_(torch.randn(local.shape, generator=generator) * scale)
    engine.optimizer_step()
    engine.optimizer_zero_grad()


def test_the_average_is_taken_after_each_optimiser_step_on_the_shards(make_worker):
    worker = make_worker(mgrpo__momentum__decay=0.9)
    start = policy(worker)
    weights = worker.momentum.momentum.weights
    assert all(isinstance(w, DTensor) and w.dtype == torch.float32 for w in weights.values())
    assert momentum(worker).keys() == start.keys() and worker.momentum.num_steps == 20
    expected = start
    for count in (1, 2):
        step(worker)
        now = policy(worker)
        expected = {name: 0.9 * expected[name] + 0.1 * now[name] for name in now}
        for name, found in momentum(worker).items():
            torch.testing.assert_close(found, expected[name], rtol=1e-6, atol=1e-7)
        assert worker.momentum.step == count
    moved = max(float((now[name] - start[name]).abs().max()) for name in now)
    assert moved > 1e-4


def test_a_step_that_verl_skips_averages_nothing(make_worker):
    worker = make_worker(mgrpo__momentum__decay=0.5)
    step(worker)
    before, after = momentum(worker), policy(worker)
    step(worker, scale=float("nan"))
    assert worker.momentum.step == 1
    assert all(torch.equal(after[name], value) for name, value in policy(worker).items())
    assert all(torch.equal(before[name], value) for name, value in momentum(worker).items())


class Recorder:
    """Stands where verl's rollout adapter does."""

    def __init__(self):
        self.tags, self.weights, self.sleep_level = [], {}, 2

    async def resume(self, tags):
        self.tags += tags

    async def update_weights(self, weights, **kwargs):
        self.weights = {name: tensor.detach().clone() for name, tensor in weights}
        self.kwargs = kwargs


def test_the_rollout_engine_is_filled_with_either_model(make_worker):
    worker = make_worker(mgrpo__momentum__decay=0.9)
    step(worker)
    worker.rollout, worker.layered_summon, worker.peft_merge, worker.base_sync_done = Recorder(), False, False, True
    asyncio.run(worker.update_momentum_weights(global_steps=3))
    found = worker.rollout.weights
    assert worker.rollout.tags == ["weights", "kv_cache"] and worker.rollout.kwargs["global_steps"] == 3
    averaged, trained = momentum(worker), policy(worker)
    for name in averaged:
        assert torch.equal(found[name], averaged[name]), name
        assert not torch.equal(averaged[name], trained[name]), name
    # The tied head has a name of its own in verl's export.
    assert torch.equal(found["lm_head.weight"], averaged["model.embed_tokens.weight"])
    asyncio.run(worker.update_weights(global_steps=3, mode="naive"))
    assert found.keys() == worker.rollout.weights.keys()
    assert all(torch.equal(worker.rollout.weights[name], value) for name, value in trained.items())


def test_the_policy_is_back_when_the_engine_fails(make_worker):
    worker = make_worker(mgrpo__momentum__decay=0.9)
    step(worker)
    trained, averaged = policy(worker), momentum(worker)
    with pytest.raises(ZeroDivisionError), worker.momentum.lent():
        assert all(torch.equal(value, averaged[name]) for name, value in policy(worker).items())
        _ = 1 / 0
    assert all(torch.equal(value, trained[name]) for name, value in policy(worker).items())
    assert all(torch.equal(value, averaged[name]) for name, value in momentum(worker).items())


@pytest.mark.parametrize("merged", [False, True])
def test_of_an_adapter_alone_the_average_is_taken_sent_and_saved(make_worker, tmp_path, merged):
    """verl's LoRA: the engine gets A and B, or with `lora.merge` the weights that they are merged into."""
    worker = make_worker(
        mgrpo__momentum__decay=0.5,
        actor_rollout_ref__actor__optim__lr=0.01,
        actor_rollout_ref__model__lora_rank=4,
        actor_rollout_ref__model__lora__merge=str(merged),
    )
    start, module = policy(worker), worker.actor.engine.module
    adapter = {name for name, p in module.named_parameters() if p.requires_grad}
    assert momentum(worker).keys() == adapter and len(adapter) == 28 and all("lora_" in name for name in adapter)
    step(worker)
    averaged, trained = momentum(worker), policy(worker)
    for name in adapter:
        torch.testing.assert_close(averaged[name], 0.5 * start[name] + 0.5 * trained[name], rtol=1e-6, atol=1e-7)
    worker.rollout, worker.layered_summon, worker.peft_merge, worker.base_sync_done = Recorder(), False, merged, True
    sent = []
    for update in (worker.update_momentum_weights(global_steps=1), worker.update_weights(mode="naive")):
        asyncio.run(update)
        sent.append(worker.rollout.weights)
    for found, source in zip(sent, (averaged, trained), strict=True):
        if merged:
            layer = "base_model.model.model.layers.0.self_attn.q_proj"
            lora_a, lora_b = (source[f"{layer}.{part}.default.weight"] for part in ("lora_A", "lora_B"))
            weight = start[f"{layer}.base_layer.weight"] + 4.0 * lora_b @ lora_a  # lora_alpha 16 of rank 4
            got = found["model.layers.0.self_attn.q_proj.weight"].float()
            change = weight - start[f"{layer}.base_layer.weight"]
            assert (got - weight).norm() < 0.1 * change.norm()  # verl sends bf16
        else:
            assert {name.replace(".weight", ".default.weight") for name in found} == adapter
            assert all(torch.equal(found[name.replace(".default", "")], source[name]) for name in adapter)
    assert all(torch.equal(value, trained[name]) for name, value in policy(worker).items())  # the base too
    assert all(torch.equal(value, averaged[name]) for name, value in momentum(worker).items())
    worker.save_checkpoint(str(tmp_path / "actor"), global_step=1)
    step(worker)
    worker.load_checkpoint(str(tmp_path / "actor"))
    assert all(torch.equal(value, averaged[name]) for name, value in momentum(worker).items())
    assert all(torch.equal(value, trained[name]) for name, value in policy(worker).items())


def test_weights_lent_have_the_policys_dtype():
    class Engine:
        module = torch.nn.Linear(3, 2).to(torch.bfloat16)

        def optimizer_step(self):
            return 1.0

    engine = Engine()
    averaged = EngineMomentum(engine, MomentumConfig(), num_steps=1)
    assert averaged.momentum.weights["weight"].dtype == torch.float32
    with averaged.lent():
        assert engine.module.state_dict()["weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["fp32", "bf16-kahan"])
def test_a_checkpoint_of_verl_has_the_momentum_model_bit_for_bit(make_worker, tmp_path, dtype):
    worker = make_worker(mgrpo__momentum__decay=0.9, mgrpo__momentum__dtype=dtype)
    step(worker)
    folder = tmp_path / "global_step_1" / "actor"
    worker.save_checkpoint(str(folder), global_step=1)
    saved, trained = own(momentum_tensors(worker.momentum.momentum)), policy(worker)
    assert (folder / file_name()).name == "momentum_world_size_1_rank_0.safetensors"
    assert not list(folder.glob(".*tmp"))
    with safe_open(folder / file_name(), framework="pt") as file:
        assert file.metadata()["step"] == "1"
    for _ in range(2):
        step(worker)
    assert worker.momentum.step == 3
    worker.load_checkpoint(str(folder))
    assert worker.momentum.step == 1
    found = own(momentum_tensors(worker.momentum.momentum))
    assert found.keys() == saved.keys() and all(torch.equal(found[name], saved[name]) for name in saved)
    assert all(torch.equal(value, trained[name]) for name, value in policy(worker).items())


def test_a_checkpoint_without_or_with_another_momentum_model_is_refused(make_worker, tmp_path):
    worker = make_worker()
    worker.actor.save_checkpoint(str(tmp_path / "plain"), None, 1, None)
    with pytest.raises(FileNotFoundError, match=r"momentum_world_size_1_rank_0.safetensors must exist to resume"):
        worker.load_checkpoint(str(tmp_path / "plain"))
    worker.momentum.save(tmp_path / "one")
    other = copy.copy(worker.momentum)
    other.momentum = copy.copy(other.momentum)
    other.momentum.weights = {"another.weight": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"must hold the 1 shards of this model and momentum.dtype, got 24"):
        other.load(tmp_path / "one")


def test_a_save_that_fails_leaves_the_last_one(make_worker, tmp_path, monkeypatch):
    worker = make_worker()
    worker.momentum.save(tmp_path)
    before = (tmp_path / file_name()).read_bytes()
    step(worker)

    def fail(tensors, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("mgrpo.integrations.shared.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        worker.momentum.save(tmp_path)
    assert (tmp_path / file_name()).read_bytes() == before


def test_the_worker_tells_of_its_plug_in(make_worker):
    found = make_worker().describe_plugin()
    assert found["failure"] is None and set(found["registered"]) == {"TRAINER_REGISTRY", "ADV_ESTIMATOR_REGISTRY"}
