from __future__ import annotations

import json
import os
import threading
import time

import pytest
import torch.distributed as dist

from mgrpo.distributed import ending as module
from mgrpo.distributed.ending import EXIT_FILE, claim, ending, is_lost, read_exit
from mgrpo.distributed.world import ALONE, World
from mgrpo.errors import ConfigError, Ended, Interrupted

FIRST, SECOND = World(rank=0, size=2), World(rank=1, size=2)
CLOSED = RuntimeError(
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:42123"
)


def end(world, run_dir, error):
    """What `ending` raises for an error."""
    with pytest.raises(Ended) as caught, ending(world, run_dir):
        raise error
    return caught.value


def test_the_first_to_claim_is_the_only_one(tmp_path):
    assert claim(tmp_path, 75, rank=1, error="é")
    assert not claim(tmp_path, 3, rank=0)
    assert json.loads((tmp_path / EXIT_FILE).read_text()) == {
        "code": 75,
        "name": "interrupted",
        "rank": 1,
        "error": "é",
    }
    assert read_exit(tmp_path) == 75


def test_a_file_of_an_earlier_start_does_not_count(tmp_path):
    claim(tmp_path, 75, rank=0)
    os.utime(tmp_path / EXIT_FILE, (1000, 1000))
    assert read_exit(tmp_path, since=1001) is None and read_exit(tmp_path, since=999) == 75
    assert claim(tmp_path, 4, rank=0, since=1001) and read_exit(tmp_path) == 4


def test_where_nothing_can_be_written_everybody_shows_its_error(tmp_path):
    assert claim(tmp_path / "none", 2, rank=0) and claim(tmp_path / "none", 2, rank=1)
    assert read_exit(tmp_path / "none") is None
    (tmp_path / EXIT_FILE).write_text('{"code"')
    assert read_exit(tmp_path) is None


def test_the_first_error_is_the_cause_and_later_ones_end_with_its_code(tmp_path):
    error = ConfigError(["config: x"])
    first, second = end(SECOND, tmp_path, error), end(FIRST, tmp_path, ValueError("later"))
    assert first.__cause__ is error and second.__cause__ is None
    assert first.exit_code == second.exit_code == 2


@pytest.mark.parametrize(("error", "code"), [(ValueError("x"), 1), (Interrupted(), 75), (CLOSED, 1)])
def test_an_error_has_its_own_code(tmp_path, error, code, monkeypatch):
    monkeypatch.setattr(module, "LOST_S", 0.1)
    ended = end(FIRST, tmp_path, error)
    assert ended.exit_code == read_exit(tmp_path) == code and ended.__cause__ is error


def test_a_lost_process_waits_for_the_cause(tmp_path):
    """The other one's error is older, but its file may come later."""
    threading.Timer(0.3, lambda: claim(tmp_path, 5, rank=0)).start()
    ended = end(SECOND, tmp_path, CLOSED)
    assert ended.exit_code == 5 and ended.__cause__ is None


def test_a_lost_process_speaks_up_if_nobody_else_does(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LOST_S", 0.2)
    start = time.monotonic()
    assert end(SECOND, tmp_path, CLOSED).__cause__ is CLOSED
    assert time.monotonic() - start >= 0.2


def test_ended_passes_through_and_one_process_keeps_its_error(tmp_path):
    ended = Ended(6)
    assert end(FIRST, tmp_path, ended) is ended
    with pytest.raises(ValueError, match="mine"), ending(ALONE, tmp_path):
        raise ValueError("mine")
    assert not (tmp_path / EXIT_FILE).exists()


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (CLOSED, True),
        (RuntimeError("[../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 4000ms for recv"), True),
        (RuntimeError("[Rank 0]: Rank 1 failed to pass monitoredBarrier in 1800000 ms"), True),
        (dist.DistBackendError("NCCL communicator was aborted on rank 1."), True),
        (RuntimeError("ProcessGroupGloo::allgather: invalid tensor size at index 0 (expected (3), got (1, 3))"), False),
        (ValueError("the answer must be a number"), False),
        (MemoryError(), False),
    ],
)
def test_errors_that_follow_from_another_process_are_known(error, lost):
    assert is_lost(error) is lost
