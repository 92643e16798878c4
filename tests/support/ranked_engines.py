"""Engines of several ranks in the trainer: python ranked_engines.py SIZE PORT FOLDER.

Rank 0 writes what each scenario found to FOLDER/found.json.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fake_server import FakeServer
from ranks import main

from mgrpo.config import OptimConfig, RolloutConfig
from mgrpo.distributed.sharding import whole
from mgrpo.distributed.world import World
from mgrpo.errors import EngineError
from mgrpo.models.load import load_model
from mgrpo.presets import make_preset
from mgrpo.rollout.build import make_ranked
from mgrpo.rollout.engine import Engine
from mgrpo.rollout.transformers import TransformersEngine
from mgrpo.training.trainer import Trainer
from mgrpo.types import Sampling, WeightTag

TAG = WeightTag("policy", 0)


class ModelServer(FakeServer):
    """A server that answers with the weights that it was sent."""

    def __init__(self):
        super().__init__()
        loaded = load_model(make_preset("arithmetic").model)
        self.max_model_len, self.skips = 4096, False
        self.model = TransformersEngine(
            loaded.model, eos_ids=loaded.eos_ids, pad_id=loaded.pad_id, dtype=loaded.dtype, batch_size=64
        )
        self.prompts: list[list[int]] = []

    def reload_weights(self, weights_iterator):
        super().reload_weights(weights_iterator)
        if not self.skips:
            self.model.update_weights(self.weights, TAG)

    def answer(self, path, body):
        if path != "/v1/completions":
            return super().answer(path, body)
        if body["temperature"]:  # not a question of the monitor
            self.prompts.append(body["prompt"])
        sampling = Sampling(temperature=body["temperature"], max_new_tokens=body["max_tokens"], seed=body["seed"])
        found = self.model.generate([body["prompt"]], body["n"], sampling, TAG)
        return {
            "choices": [
                {
                    "token_ids": found.response(row),
                    "logprobs": {"token_logprobs": found.logprobs[row, : found.lengths[row]].tolist()},
                    "finish_reason": "length" if found.truncated[row] else "stop",
                }
                for row in range(body["n"])
            ]
        }


@contextmanager
def serving(world: World, count: int):
    """Servers of rank 0, and their URLs on all ranks."""
    servers = [ModelServer() for _ in range(count)] if world.is_first else []
    try:
        yield servers, tuple(world.broadcast([server.url for server in servers]))
    finally:
        for server in servers:
            server.close()


def make_trainer(world: World, **engine: Any) -> Trainer:
    base = make_preset("arithmetic")
    config = replace(
        base,
        steps=3,
        seed=3,
        rollout=RolloutConfig(num_prompts=5, num_policy=3, num_momentum=3, max_new_tokens=24),
        momentum=replace(base.momentum, decay=0.5),
        optim=OptimConfig(lr=1e-3, num_minibatches=1, micro_batch_tokens=512),
        data=replace(base.data, train="arithmetic:12:2-3:5"),
        engine=replace(base.engine, **engine),
    )
    return Trainer(config, world=world)


def through_servers(world: World, urls: tuple[str, ...]) -> Trainer:
    return make_trainer(world, name="vllm", placement="server", servers=urls)


def errors_of(world: World, action: Callable[[], Any]) -> list[list[str]]:
    """Class and message of the engine's error on every rank; all have come within seconds."""
    began, found = time.monotonic(), ["", ""]
    try:
        action()
    except EngineError as error:
        found = [type(error).__name__, str(error)]
    assert time.monotonic() - began < 30
    return world.gather_json(found)


def rows_of(trainer: Trainer, batches: list[str]) -> list[dict[str, Any]]:
    """Metrics of two steps; digests of their rollouts."""
    rows = []
    for _ in range(2):
        result = trainer.train_step()
        t = result.batch.trajectories
        batches.append(hashlib.sha256(t.tokens.numpy().tobytes() + t.rollout_logprob.numpy().tobytes()).hexdigest())
        rows.append({key: result.metrics[key] for key in ("parity_policy", "parity_momentum", "grad_norm")})
    return rows


def check_engines_of_several_ranks(world: World) -> Any:
    """Each rank of an engine gets the same prompts; the engine's rollouts are taken once."""
    loaded = load_model(make_preset("arithmetic").model)
    prompts, sampling = [[2, 3, 12, 4, 14], [2, 5, 14], [2, 7, 12, 3, 14]], Sampling(max_new_tokens=8, seed=5)

    def make() -> TransformersEngine:
        ends = {"eos_ids": loaded.eos_ids, "pad_id": loaded.pad_id}
        return TransformersEngine(loaded.model, **ends, dtype=loaded.dtype, batch_size=64)

    def generated(engine: Engine) -> list[Any]:
        engine.update_weights(loaded.model.state_dict(), TAG)
        found = engine.generate(prompts, 2, sampling, TAG)
        return [found.tokens.tolist(), found.lengths.tolist()]

    together = make_ranked(make, world, tree=False, parallel=world.size)
    (part,) = together.parts(prompts)
    assert sorted(part) == [0, 1, 2] and generated(together) == generated(make())
    return world.gather_json(generated(make_ranked(make, world, tree=False))) == [generated(make())] * world.size


def check_servers(world: World) -> Any:
    """Two servers, and one: every prompt is answered once for each source, with the weights that are sharded here."""
    found = {}
    for count in (2, 1):
        batches: list[str] = []
        with serving(world, count) as (servers, urls), closing(through_servers(world, urls)) as trainer:
            rows = rows_of(trainer, batches)
            for source in ("momentum", "policy"):
                trainer.generator.update_weights(source)
            weights = {name: whole(tensor) for name, tensor in trainer.weights("policy")[0].items()}
            if servers:
                assert servers[0].weights.keys() == weights.keys()
                assert all(torch.equal(servers[0].weights[name], value) for name, value in weights.items())
                assert [len(server.prompts) for server in servers] == [10 * 2 // count] * count
        assert world.gather_json([rows, batches]) == [[rows, batches]] * world.size
        found[count] = [rows, batches]
    return found


def check_a_server_that_fails_while_weights_are_sent(world: World) -> Any:
    found = {}
    for path in ("/pause", "/collective_rpc", "/reset_prefix_cache"):
        with serving(world, 2) as (servers, urls), closing(through_servers(world, urls)) as trainer:
            trainer.train_step()
            for server in servers:
                server.status = {path: 500}
            found[path] = errors_of(world, trainer.train_step)
            assert trainer.step == 1
            for server in servers:
                server.status = {}
            trainer.train_step()
    return found


def check_a_server_that_fails_while_it_generates(world: World) -> Any:
    with serving(world, 2) as (servers, urls), closing(through_servers(world, urls)) as trainer:
        for server in servers[1:]:
            server.status = {"/v1/completions": 500}
        return errors_of(world, trainer.train_step)


def check_a_server_with_stale_weights(world: World) -> Any:
    with serving(world, 1) as (servers, urls), closing(through_servers(world, urls)) as trainer:
        trainer.train_step()
        for server in servers:
            server.skips = True
        return errors_of(world, trainer.train_step)


def check_no_server(world: World) -> Any:
    return errors_of(world, lambda: through_servers(world, ("http://127.0.0.1:9",)))


def check_one_engine_with_stale_weights(world: World) -> Any:
    """That of the last rank keeps the weights of the first step, or the policy's for momentum rollouts."""
    found = {}
    for kept in ("policy", "momentum"):
        with closing(make_trainer(world)) as trainer:
            trainer.train_step()
            engine = trainer.engine.engine  # pyright: ignore
            if world.rank == world.size - 1:
                update = engine.update_weights

                def stale(weights: Mapping[str, torch.Tensor], tag: WeightTag, kept=kept, update=update, engine=engine):
                    model = {name: p.data for name, p in engine.model.named_parameters()}
                    update(weights, tag)
                    for name, p in engine.model.named_parameters():
                        p.data = model[name] if tag.source == kept else p.data

                engine.update_weights = stale
            found[kept] = errors_of(world, trainer.train_step)
    return found


def check_one_engine_that_fails(world: World) -> Any:
    with closing(make_trainer(world)) as trainer:
        engine = trainer.engine.engine  # pyright: ignore
        if world.rank == world.size - 1:
            real = engine.model.state_dict

            def fail(**options: Any) -> Any:
                raise EngineError("update_weights: out of memory.")

            engine.model.state_dict = fail
            found = errors_of(world, trainer.train_step)
            engine.model.state_dict = real
        else:
            found = errors_of(world, trainer.train_step)
        trainer.train_step()
        return found


CHECKS = {name.removeprefix("check_"): value for name, value in sorted(globals().items()) if name.startswith("check_")}


def run(world: World, folder: Path) -> None:
    checks = CHECKS if world.size > 1 else {"servers": check_servers}
    found = {name: check(world) for name, check in checks.items()}
    if world.is_first:
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(run)
