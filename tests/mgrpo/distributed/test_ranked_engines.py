"""Rollout engines of two ranks, through the trainer."""

from __future__ import annotations

import json

import pytest
from ranks import run_sizes


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each scenario found, by number of ranks."""
    folders = run_sizes("ranked_engines.py", (1, 2), tmp_path_factory.mktemp("engines"))
    return {size: json.loads((folder / "found.json").read_text()) for size, folder in folders.items()}


@pytest.mark.parametrize("count", ["1", "2"])
def test_servers_of_two_ranks_generate_what_they_do_for_one(found, count):
    (one, of_one), (rows, batches) = found[1]["servers"][count], found[2]["servers"][count]
    assert batches[0] == of_one[0]
    for row, single in zip(rows, one, strict=True):
        assert row["parity_policy"] < 1e-5 and row["parity_momentum"] < 1e-5
        assert row["grad_norm"] == pytest.approx(single["grad_norm"], rel=1e-3)


def test_rollouts_of_an_engine_of_several_ranks_are_taken_once(found):
    assert found[2]["engines_of_several_ranks"]


def test_an_error_of_a_server_is_raised_on_all_ranks(found):
    scenario = found[2]["a_server_that_fails_while_weights_are_sent"]
    for path, errors in scenario.items():
        assert errors[0] == errors[1]
        assert errors[0][0] == "EngineError" and f"answered {path}" in errors[0][1]
    errors = found[2]["a_server_that_fails_while_it_generates"]
    assert errors[0] == errors[1] and "answered /v1/completions with 500" in errors[0][1]
    errors = found[2]["no_server"]
    assert errors[0] == errors[1] and "must answer /v1/models, got ConnectionRefusedError" in errors[0][1]


def test_stale_weights_of_a_server_are_found(found):
    errors = found[2]["a_server_with_stale_weights"]
    assert errors[0] == errors[1] and errors[0][0] == "StaleWeightsError"
    assert "did not use the weights of" in errors[0][1]


@pytest.mark.parametrize("source", ["policy", "momentum"])
def test_stale_weights_on_one_rank_alone_are_found_by_all(found, source):
    errors = found[2]["one_engine_with_stale_weights"][source]
    assert errors[0] == errors[1] and errors[0][0] == "ParityError" and f"of {source} version 1" in errors[0][1]


def test_an_error_of_one_ranks_engine_is_raised_on_all(found):
    assert found[2]["one_engine_that_fails"] == [["EngineError", "update_weights: out of memory."]] * 2
