"""Checks of the stream of weights on several ranks: python exchange_checks.py SIZE PORT FOLDER.

Each rank writes what became of every check to FOLDER/RANK.json: null, or the traceback.
"""

from __future__ import annotations

import itertools
import json
import math
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from ranks import main
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen3Config, Qwen3ForCausalLM

from mgrpo.distributed import exchange
from mgrpo.distributed.exchange import ALIGNMENT, WeightStream
from mgrpo.distributed.sharding import local, shard_model, whole
from mgrpo.distributed.together import failing_together
from mgrpo.distributed.world import World
from mgrpo.errors import EngineError, PeerError
from mgrpo.rollout.weights.sending import sending

VOCABULARY, HIDDEN = 101, 32  # 101 rows: the shards of no number of ranks are even
BUCKET = 4096  # bytes, a third of the embedding


def make_model(world: World, *, tied: bool = True) -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=48, **shape, tie_word_embeddings=tied
    )
    model = Qwen3ForCausalLM(config)
    shard_model(model, world, dtype=torch.float32, tree=False)
    return model


def shard(values: Mapping[str, torch.Tensor], mesh: DeviceMesh | None) -> dict[str, torch.Tensor]:
    """Shards all but those whose name says that they are whole."""
    assert mesh is not None
    placements = [*[Replicate()] * (mesh.ndim - 1), Shard(0)]
    return {
        name: value if "whole" in name else distribute_tensor(value, mesh, placements) for name, value in values.items()
    }


def make_values() -> dict[str, torch.Tensor]:
    """Uneven and single rows, several dtypes, and tensors that are not sharded."""
    draws = torch.Generator().manual_seed(1)
    return {
        "five": torch.randn(5, 3, generator=draws),
        "one": torch.randn(1, 7, generator=draws),
        "whole": torch.randn(4, 2, generator=draws),
        "two": torch.randn(2, generator=draws),
        "bf16": torch.randn(7, 5, 3, generator=draws).bfloat16(),
        "integers": torch.arange(10).view(10, 1),
        "whole scalar": torch.tensor(3),
        "last": torch.randn(31, 2, generator=draws),
    }


def same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
        assert not isinstance(found[name], DTensor)


@contextmanager
def gathers() -> Iterator[list[tuple[float, int]]]:
    """Time and bytes of every gather within the block."""
    real, calls = exchange.gather_flat, list[tuple[float, int]]()

    def gather(output: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        calls.append((time.monotonic(), output.nbytes))
        return real(output, *arguments, **options)

    exchange.gather_flat = gather
    try:
        yield calls
    finally:
        exchange.gather_flat = real


def padded(tensors: Iterable[torch.Tensor], itemsize: int, size: int) -> int:
    """Bytes of sharded tensors in the buckets of `size` ranks."""
    rows = [(-(-len(t) // size), math.prod(t.shape[1:])) for t in tensors]
    return sum(size * ALIGNMENT * -(-count * width * itemsize // ALIGNMENT) for count, width in rows)


def check_names_and_values_of_a_model(world: World) -> None:
    for tied in (True, False):
        model = make_model(world, tied=tied)
        weights = model.state_dict()
        expected = {name: whole(tensor) for name, tensor in weights.items()}
        for bucket_bytes in (1, BUCKET, 2**30):
            with gathers() as calls, WeightStream(weights, world, bucket_bytes=bucket_bytes) as stream:
                names = list(stream.names)
                found = dict(stream)
            assert list(found) == names and found.keys() == expected.keys()
            same({name: found[name] for name in expected}, expected)
            # The order of the state dict, but that a tied head comes with the embedding.
            rest = [name for name in expected if not (tied and name == "lm_head.weight")]
            assert [name for name in names if name in rest] == rest
            if tied:
                assert names[:2] == ["model.embed_tokens.weight", "lm_head.weight"]
                assert found[names[0]] is found[names[1]]
            assert len(calls) == {1: len(rest), 2**30: 1}.get(bucket_bytes, len(calls))


def check_bytes_on_the_wire(world: World) -> None:
    model = make_model(world)
    parameters = list(model.parameters())
    embedding = padded(parameters[:1], 4, world.size)
    for dtype, itemsize in ((None, 4), (torch.bfloat16, 2)):
        with gathers() as calls, WeightStream(model.state_dict(), world, dtype=dtype, bucket_bytes=BUCKET):
            pass
        sizes = [size for _, size in calls]
        assert sum(sizes) == padded(parameters, itemsize, world.size)
        assert sizes[0] == embedding * itemsize // 4 and max(sizes[1:]) <= max(BUCKET, 48 * HIDDEN * itemsize + 256)
    assert embedding > BUCKET


def check_uneven_rows(world: World) -> None:
    values = make_values()
    weights = shard(values, world.mesh)
    for bucket_bytes in (1, 200, 2**30):
        with WeightStream(weights, world, bucket_bytes=bucket_bytes) as stream:
            same(dict(stream), values)


def check_a_cast_before_sending_has_the_bits_of_one_after(world: World) -> None:
    values = make_values()
    with WeightStream(shard(values, world.mesh), world, dtype=torch.bfloat16, bucket_bytes=300) as stream:
        found = dict(stream)
    for name, value in values.items():
        if value.is_floating_point() and "whole" not in name:
            values[name] = value.bfloat16()
    same(found, values)


def check_that_a_consumer_may_keep_what_it_got(world: World) -> None:
    """The bucket is overwritten with NaN once it has been walked."""
    values = make_values()
    with WeightStream(shard(values, world.mesh), world, bucket_bytes=200) as stream:
        agree, poisoned = stream._agree, []

        def poison(**options: Any) -> None:
            poisoned.append(stream._buffer.numel())
            stream._buffer.fill_(255)  # NaN in every dtype
            agree(**options)

        stream._agree = poison
        found = dict(stream)
    assert len(poisoned) > 2 and poisoned[-1] > 0
    same(found, values)


def check_that_no_rank_runs_ahead_of_a_slow_consumer(world: World) -> None:
    weights = shard(make_values(), world.mesh)
    walked = []
    with gathers() as calls, WeightStream(weights, world, bucket_bytes=200) as stream:
        if world.is_first:
            for name, _ in stream:
                if name in ("five", "bf16"):
                    time.sleep(0.3)
                walked.append((len(calls), time.monotonic()))
    times = world.gather_json([moment for moment, _ in calls])
    ends = world.broadcast({str(bucket): moment for bucket, moment in walked})  # of the last tensor of each bucket
    assert len(times[0]) > 2
    for other in times[1:]:
        assert all(moment >= ends[str(bucket)] for bucket, moment in enumerate(other) if bucket)


def check_live_bytes(world: World) -> None:
    """At most two buckets beside the shards, of which a bucket is at least the largest tensor."""
    model = make_model(world)
    weights = model.state_dict()
    shards = {local(t).untyped_storage().data_ptr(): local(t).nbytes for t in weights.values()}
    del model
    for dtype, itemsize in ((None, 4), (torch.bfloat16, 2)):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
            with WeightStream(weights, world, dtype=dtype, bucket_bytes=BUCKET) as stream:
                for _, tensor in stream:
                    del tensor
        assert measured.profiler is not None and measured.profiler.kineto_results is not None
        events: list[Any] = sorted(measured.profiler.kineto_results.events(), key=lambda event: event.start_ns())
        most = max(itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]"))
        bucket = padded([weights["model.embed_tokens.weight"]], itemsize, world.size)
        assert bucket < most <= 2 * bucket + 1024, (most, bucket)  # 1 KiB: flags of the agreement
        assert sum(shards.values()) + most < sum(whole(t).nbytes for t in weights.values())


def check_that_a_failure_ends_all(world: World) -> None:
    weights = shard(make_values(), world.mesh)
    last = world.size - 1
    for place in ("before", "one", "last", "after"):
        began = time.monotonic()
        message = ""
        try:
            with failing_together(world):
                with WeightStream(weights, world, bucket_bytes=200) as stream:
                    fails = world.rank == last
                    if fails and place == "before":
                        raise EngineError("broken before")
                    for name, _ in stream:
                        if fails and name == place:
                            raise EngineError(f"broken {place}")
                if fails and place == "after":
                    raise EngineError("broken after")
        except EngineError as error:
            message = str(error)
            assert not isinstance(error, PeerError)
        assert message == f"broken {place}" and time.monotonic() - began < 10
    with WeightStream(weights, world) as stream:  # and the next update finds all of them in step
        same(dict(stream), make_values())


def check_that_a_part_that_is_not_finite_is_found_by_all(world: World) -> None:
    values = make_values()
    values["last"][-1] = math.nan
    try:
        with failing_together(world), sending(shard(values, world.mesh), {}, world, torch.float32) as stream:
            list(stream)
        raise AssertionError("nothing was found")
    except EngineError as error:
        assert str(error) == "update_weights: weights must be finite, last is not."


def check_that_one_rank_may_be_the_only_consumer(world: World) -> None:
    """Others leave at once; a consumer that stops early does not leave them waiting."""
    values = make_values()
    weights = shard(values, world.mesh)
    with WeightStream(weights, world, bucket_bytes=200) as stream:
        found = dict(stream) if world.is_first else values
    same(found, values)
    with WeightStream(weights, world, bucket_bytes=200) as stream:
        if world.is_first:
            next(iter(stream))
    assert world.gather_json(world.rank) == list(range(world.size))


def replicas_of_shards(world: World) -> None:
    """Two replicas of two shards: each gathers its own."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    values = make_values()
    split = World(world.rank, 4, world.local_rank, 4, 2, mesh, world.control)
    with gathers() as calls, WeightStream(shard(values, mesh), split) as stream:
        same(dict(stream), values)
    sharded = [value for name, value in values.items() if "whole" not in name and name not in ("bf16", "integers")]
    expected = padded(sharded, 4, 2) + padded([values["bf16"]], 2, 2) + padded([values["integers"]], 8, 2)
    assert [size for _, size in calls] == [expected]


CHECKS: dict[str, Callable[[World], None]] = {
    name.removeprefix("check_"): check for name, check in sorted(globals().items()) if name.startswith("check_")
}


def run(world: World, folder: Path) -> None:
    found: dict[str, str | None] = {}
    for name, check in ({"replicas": replicas_of_shards} if world.size == 4 else CHECKS).items():
        try:
            check(world)
            found[name] = None
        except Exception:
            found[name] = traceback.format_exc()
    (folder / f"{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    assert exchange.BUCKET_BYTES == 512 * 2**20
    main(run, timeout_s=30)
