"""Steps of training on 1, 2, 3 and 4 ranks: the same bits in tree mode, the same to rounding without."""

from __future__ import annotations

import json

import pytest
from ranks import run_sizes
from step_checks import CHECKS

EXACT = [name for name in CHECKS if name.startswith(("tree", "momentum", "scoring", "uneven", "a_step", "answers"))]
ROUNDED = ["default", "default_replicated", "default_untied", "one_micro_batch_is_split"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each scenario found, by number of ranks."""
    folders = run_sizes("step_checks.py", (1, 2, 4), tmp_path_factory.mktemp("ranks"))
    return {size: json.loads((folder / "found.json").read_text()) for size, folder in folders.items()}


@pytest.mark.parametrize("name", EXACT)
def test_tree_mode_has_the_bits_of_one_process(found, name):
    assert found[2][name] == found[1][name]
    assert found[4][name] == found[1][name]


@pytest.mark.parametrize("name", ROUNDED)
def test_the_step_is_that_of_one_process(found, name):
    one = found[1][name]
    for size in (2, 4):
        other = found[size][name]
        assert other["gradients"] == pytest.approx(one["gradients"], rel=1e-4, abs=1e-6)
        assert other["metrics"][0] == pytest.approx(one["metrics"][0], rel=1e-4, abs=1e-6)
        assert other.get("under_momentum", []) == pytest.approx(one.get("under_momentum", []), rel=1e-3, abs=1e-3)


def test_bf16_is_as_near_to_fp32_as_in_one_process(found):
    one = found[1]["bf16_error"]
    assert 0.01 < one < 0.05
    assert all(found[size]["bf16_error"] < 1.2 * one for size in (2, 4))


def test_a_model_that_cannot_be_sharded_is_refused_by_name(found):
    name = "zz_a_model_with_a_scalar_weight_is_refused"
    assert [found[size][name] for size in (1, 2, 4)] == [False, True, True]


def test_settings_on_the_root_alone_are_found(found):
    name = "mutant_factor_on_the_root_alone"
    norms = {size: found[size][name]["metrics"][0]["grad_norm"] for size in (1, 2)}
    assert abs(norms[2] - norms[1]) > 0.05 * norms[1]


def test_state_is_divided_among_the_ranks(found):
    for size in (2, 4):
        shares = found[size]["memory_is_shared"]
        assert all(abs(share - 1 / size) < 0.05 for rank in shares for share in rank)
