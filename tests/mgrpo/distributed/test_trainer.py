"""A run of the trainer on 1, 2 and 4 ranks in tree mode: the same bits, the same files, exact resume at any number."""

from __future__ import annotations

import json
import shutil

import pytest
from ranks import run_sizes


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What was found, and the checkpoint's folder, by number of ranks."""
    base = tmp_path_factory.mktemp("ranks")
    folders = run_sizes("trainer_checks.py", (1,), base)
    shutil.copytree(folders[1] / "checkpoints" / "step_3", base / "saved1")
    folders |= run_sizes("trainer_checks.py", (2, 4), base)
    return {
        size: (json.loads((folder / "found.json").read_text()), folder / "checkpoints" / "step_3")
        for size, folder in folders.items()
    }


@pytest.mark.parametrize("size", [2, 4])
def test_a_run_has_the_bits_of_one_process(ranks, size):
    (one, _), (found, _) = ranks[1], ranks[size]
    assert found["rows"] == one["rows"] and found["state"] == one["state"]
    assert found["rows"][1]["probe_accuracy_policy"] is not None and found["rows"][0]["kl_initial"] is not None
    assert any(row["grad_norm"] > 0 for row in found["rows"])


@pytest.mark.parametrize("size", [2, 4])
def test_a_run_with_lora_has_the_bits_of_one_process(ranks, size):
    (one, _), (found, _) = ranks[1], ranks[size]
    assert found["lora"] == one["lora"]
    rows, _ = one["lora"]
    assert all(row["trained_parameters"] > 0 for row in rows) and any(row["grad_norm"] > 0 for row in rows)


@pytest.mark.parametrize("size", [2, 4])
def test_files_of_a_checkpoint_do_not_depend_on_the_ranks(ranks, size):
    (one, of_one), (found, saved) = ranks[1], ranks[size]
    differ = {name for name in {*one["files"], *found["files"]} if one["files"].get(name) != found["files"].get(name)}
    assert differ <= {"state.json", "manifest.json"}
    states = [json.loads((folder / "state.json").read_text()) for folder in (of_one, saved)]
    for state in states:
        del state["rng"]  # global generators, which nobody seeds or draws from
    assert states[0] == states[1]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_resumed_run_goes_on_as_if_it_had_never_stopped(ranks, size):
    found, one = ranks[size][0], ranks[1][0]
    assert found["resumed own"] == found["next"] == one["next"]
    assert size == 1 or found["resumed of one process"] == one["next"]


def test_no_label_reaches_a_weight(ranks):
    first, second = ranks[2][0]["labels"]
    assert first == second != ranks[2][0]["state"]
