"""docs/scale.md has the tables that its command writes, and the cost model does the arithmetic that it says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.scale import PAGE, make_page
from bench.training.cost_model import (
    Hardware,
    Model,
    Setup,
    Work,
    generate_s,
    optimizer_s,
    publish_s,
    score_s,
    update_s,
)

# A model of 1 B parameters whose token takes 2 x 2 x 10 x 2 x 50 = 4,000 bytes of cache.
MODEL = Model(name="round", parameters=1e9, layers=10, heads=4, kv_heads=2, head_dim=50)
WORK = Work(
    prompts=8, policy=24, momentum=8, prompt_tokens=100, mean_response=100, longest_response=400, micro_batch=3200
)
SETUP = Setup(model=MODEL, gpus=8, shards=8, engine_gpus=1, work=WORK)
# Every share is 1 and every peak a round number.
HARDWARE = Hardware(
    **{"flops": 1e12, "hbm": 1e10, "nvlink": 1e9, "network": 4e8, "update_share": 1, "prefill_share": 1},
    **{"decode_share": 1, "sweep_share": 1, "link_share": 1, "decode_overhead_s": 0, "reduction_s": 0, "fixed_s": 0},
)


def test_the_page_is_the_one_that_the_command_writes():
    page = PAGE.read_text()
    assert make_page(page) == page


def test_seconds_of_rollouts():
    # Momentum: 8 sequences an engine, 2 alive on average with 150 tokens each: 1.2 MB beside 2 GB, at 10 GB/s.
    # Policy: 24 and 6. Prefill: one prompt of 100 tokens an engine, 0.2 TFLOP, for each of the two models.
    decode = 400 * ((2e9 + 2 * 150 * 4000) / 1e10 + (2e9 + 6 * 150 * 4000) / 1e10)
    assert generate_s(SETUP, HARDWARE) == pytest.approx(decode + 2 * 0.2)
    # Two GPUs an engine: twice the sequences, half the bytes on each; 20 reductions a decode step.
    pair = replace(SETUP, engine_gpus=2)
    slow = replace(HARDWARE, reduction_s=1e-3, decode_overhead_s=1e-2)
    decode = 400 * ((2e9 + 4 * 150 * 4000) / 2e10 + (2e9 + 12 * 150 * 4000) / 2e10 + 2 * (0.02 + 0.01))
    assert generate_s(pair, slow) == pytest.approx(decode + 2 * 0.2)
    # Bound by FLOPs where memory is fast: 2 x 1e9 x (2 + 6) sequences, 400 times, at 1e12.
    assert generate_s(SETUP, replace(HARDWARE, hbm=1e15)) == pytest.approx(400 * 2e9 * 8 / 1e12 + 2 * 0.2)


def test_seconds_of_sending_weights():
    assert publish_s(SETUP, HARDWARE) == pytest.approx(2 * 2e9 * 7 / 8 / 1e9)
    assert publish_s(replace(SETUP, lora=10_000_000), HARDWARE) == pytest.approx(2 * 2e7 * 7 / 8 / 1e9)
    # Over nodes the ring is bound by what leaves a node.
    assert publish_s(replace(SETUP, gpus=16, shards=16), HARDWARE) == pytest.approx(2 * 2e9 * 15 / 16 / 4e8)


def test_seconds_of_passes():
    # 256 rollouts of 200 tokens: 51,200 tokens, 2 GFLOP each; attention 2 x 10 x 200 x 200^2 a sequence. On 8 GPUs.
    forward = (2e9 * 51_200 + 256 * 2 * 10 * 200 * 200**2) / 8 / 1e12
    # 2 micro-batches a GPU: 2 x (2 + 2) bytes a parameter scored, 2 x 8 in the update, 7/8 of them at 1 GB/s.
    assert score_s(SETUP, HARDWARE) == pytest.approx(max(2 * forward, 2 * 4 * 7 / 8)) == pytest.approx(2 * forward)
    assert update_s(SETUP, HARDWARE) == pytest.approx(max(4 * forward, 2 * 8 * 7 / 8)) == pytest.approx(4 * forward)
    fast = replace(HARDWARE, flops=1e15)
    assert update_s(SETUP, fast) == pytest.approx(2 * 8 * 7 / 8)
    assert update_s(replace(SETUP, lora=1), fast) == pytest.approx(2 * 4 * 7 / 8)
    # Two replicas on two nodes add a ring of the shards: 2 x 1/2 x 4 bytes of 1/8 of the parameters, at 50 MB/s a GPU.
    twice = replace(SETUP, gpus=16)
    assert update_s(twice, HARDWARE) == pytest.approx(max(4 * forward / 2, 8 * 7 / 8) + 4e9 / 8 / 5e7)


def test_seconds_of_the_optimiser():
    assert optimizer_s(SETUP, HARDWARE) == pytest.approx(50 * 1e9 / 8 / 1e10)
    assert optimizer_s(replace(SETUP, shards=64), HARDWARE) == pytest.approx(50 * 1e9 / 64 / 1e10)
