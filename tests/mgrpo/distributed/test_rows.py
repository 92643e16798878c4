"""Ranks that read their rows of a model alone, with an engine that has a model of its own, and LoRA among them."""

from __future__ import annotations

import json

import pytest
from ranks import run_script
from rows_checks import VARIANTS


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What was found, by number of ranks."""
    results = {}
    for size in (1, 2):
        folder = tmp_path_factory.mktemp(f"rows{size}")
        run_script("rows_checks.py", size, folder)
        results[size] = json.loads((folder / "found.json").read_text())
    return results


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_has_the_bits_of_one_process_that_reads_the_whole(found, variant):
    one, two = found[1][variant], found[2][variant]
    assert two == one
    assert any(row["grad_norm"] > 0 for row in two["rows"])
    adapters = "policy/adapter_model.safetensors" in two["files"]
    assert adapters == ("lora" in variant)


def test_no_rank_holds_the_whole_model_beside_its_shard(found):
    for by_rows, from_the_whole in found[2]["memory"]:
        assert by_rows < 0.75 and from_the_whole > 1.0
