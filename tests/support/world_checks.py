"""Checks of World on several processes, which are forked after the imports: python world_checks.py SIZE PORT FOLDER.

Each rank writes what became of every check to FOLDER/RANK.json: null, or the traceback.
"""

from __future__ import annotations

import json
import pickle
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import main

from mgrpo.distributed.together import on_first
from mgrpo.distributed.world import World
from mgrpo.errors import ConfigError

TIMEOUT_S = 4.0


def refuse(*args: object, **kwargs: object) -> None:
    raise AssertionError("something was pickled")


def forbid_pickle() -> None:
    """Makes every pickle and every collective of objects an error."""
    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        setattr(pickle, name, refuse)
    for name in ("_pickler", "_unpickler", "_object_to_tensor", "_tensor_to_object"):
        setattr(dist.distributed_c10d, name, refuse)
    for name in [name for name in dir(dist) if "_object" in name and callable(getattr(dist, name))]:
        setattr(dist, name, refuse)


def check_place(world: World) -> None:
    assert (world.rank, world.size) == (dist.get_rank(), dist.get_world_size())
    assert (world.local_rank, world.local_size) == (world.rank, world.size)
    assert world.is_first == (world.rank == 0) and world.replicate == 1


def check_mesh(world: World) -> None:
    assert world.mesh is not None and world.mesh.mesh_dim_names == ("shard",)
    assert world.mesh.mesh.tolist() == list(range(world.size))


def check_control_is_a_group_of_its_own(world: World) -> None:
    assert world.control is not None and world.control is not dist.group.WORLD
    assert dist.get_backend(world.control) == "gloo"


def check_any(world: World) -> None:
    assert not world.any(False)
    assert all(world.any(world.rank == rank) for rank in range(world.size))


def check_broadcast_is_rank_0s(world: World) -> None:
    for value in (None, "é\0", {"a": [1, 2.5, None, "x"]}, [], "long" * 10_000, float("inf")):
        assert world.broadcast(value if world.is_first else {"of": world.rank}) == value


def check_others_need_no_value_to_receive_one(world: World) -> None:
    assert world.broadcast(7 if world.is_first else object()) == 7


def check_gather(world: World) -> None:
    assert world.gather_json("x" * world.rank) == ["x" * rank for rank in range(world.size)]
    assert world.gather_json({"rank": world.rank}) == [{"rank": rank} for rank in range(world.size)]


def check_an_error_of_rank_0_is_raised_on_all(world: World) -> None:
    def ask() -> int:
        raise ConfigError(["one", "two"])

    try:
        on_first(world, ask)
    except ConfigError as error:
        assert error.problems == ["one", "two"]
    else:
        raise AssertionError("no error on this rank")
    assert on_first(world, lambda: world.rank) == 0


def check_tensors(world: World) -> None:
    """Of several dtypes, empty, of no dimension, a parameter, and one whose elements do not lie in a row."""
    wide = torch.full((2, 6), -1.0)
    tensors = [torch.arange(6).view(2, 3), torch.tensor(1.5, dtype=torch.bfloat16), torch.empty(0), torch.tensor(True)]
    tensors += [torch.nn.Parameter(torch.arange(3.0)), wide[:, ::2], torch.arange(4.0).view(2, 2).T]
    expected = [tensor.detach().clone() for tensor in tensors]
    if not world.is_first:
        for tensor in tensors:
            tensor.detach().zero_()
    world.broadcast_tensors(tensors)
    assert all(torch.equal(tensor, other) for tensor, other in zip(tensors, expected, strict=True))
    assert (wide[:, 1::2] == -1).all()


def check_sum(world: World) -> None:
    counts = torch.full((3,), world.rank + 1)
    assert world.sum_(counts) is counts
    assert counts.tolist() == [sum(range(1, world.size + 1))] * 3


def check_barrier(world: World) -> None:
    start = time.monotonic()
    if world.rank == world.size - 1:
        time.sleep(0.5)
    world.barrier()
    assert world.rank == world.size - 1 or time.monotonic() - start > 0.3


def check_nothing_is_left_of_a_call(world: World) -> None:
    """Answers of one call never reach the next, also where ranks come at different times."""
    for i in range(20):
        if (i + world.rank) % world.size == 0:
            time.sleep(0.002)
        assert world.broadcast(i) == i and world.any(i % 2 == 0) == (i % 2 == 0)


def check_z_a_late_rank_is_an_error_for_the_others(world: World) -> None:
    """The last: it leaves the control group broken."""
    start = time.monotonic()
    if world.rank == world.size - 1:
        time.sleep(TIMEOUT_S + 1)
        return
    try:
        world.broadcast(world.any(True))
    except RuntimeError:
        assert time.monotonic() - start < TIMEOUT_S + 5
    else:
        raise AssertionError("a collective ended without a rank")


CHECKS: dict[str, Callable[[World], None]] = {
    name.removeprefix("check_"): check for name, check in sorted(globals().items()) if name.startswith("check_")
}


def outcome(check: Callable[[World], None], world: World) -> str | None:
    """The traceback of a check that fails."""
    try:
        check(world)
    except BaseException:
        return traceback.format_exc()
    return None


def check_all(world: World, folder: Path) -> None:
    """Runs the checks as one of the ranks."""
    found = {name: outcome(check, world) for name, check in CHECKS.items()}
    (folder / f"{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    forbid_pickle()
    main(check_all, timeout_s=TIMEOUT_S)
