"""Ranks that read their rows of a model alone, with an engine that has a model of its own, and LoRA among them."""

from __future__ import annotations

import json

import pytest
from ranks import run_sizes
from rows_checks import VARIANTS


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What was found, by number of ranks."""
    folders = run_sizes("rows_checks.py", (1, 2), tmp_path_factory.mktemp("rows"))
    return {size: json.loads((folder / "found.json").read_text()) for size, folder in folders.items()}


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
