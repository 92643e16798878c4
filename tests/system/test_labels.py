from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from mgrpo.presets import PRESETS, make_preset
from mgrpo.tasks.arithmetic import make_problems

ARITHMETIC = [name for name in PRESETS if make_preset(name).model.path == "builtin:arithmetic"]
TINY = {
    "rollout.num_prompts": 2,
    "rollout.max_new_tokens": 14,
    "optim.lr": 1e-3,
    "eval.every": 10,
    "eval.samples": 1,
}


def write(path, problems, answers):
    records = [json.dumps({"prompt": p.prompt, "answer": a}) + "\n" for p, a in zip(problems, answers, strict=True)]
    path.write_text("".join(records))
    return str(path)


@pytest.fixture
def both_labellings(tmp_path):
    """Two training files with the same prompts: true answers, and the same answers dealt to other prompts."""
    problems = make_problems(10, operands=(2,), seed=3)
    true = [p.answer for p in problems]
    dealt = random.Random(0).sample(true, len(true))
    while any(a == b for a, b in zip(true, dealt, strict=True)):
        dealt = dealt[1:] + dealt[:1]
    return [write(tmp_path / f"{i}.jsonl", problems, answers) for i, answers in enumerate((true, dealt))]


@pytest.mark.parametrize("preset", ARITHMETIC)
def test_labels_reach_no_weight_but_in_the_preset_of_the_ceiling(small, trained, weights_of, both_labellings, preset):
    runs = []
    for path in both_labellings:
        config = small(TINY | {"data.train": path, "data.probe": path}, preset=preset)
        trainer, rows = trained(config, 20)
        runs.append((weights_of(trainer), rows))
    (true, true_rows), (dealt, dealt_rows) = runs
    same = [torch.equal(true[name], dealt[name]) for name in true]
    if preset == "grpo_labels":
        assert not any(same)
        return
    assert all(same)
    assert max(row["grad_norm"] for row in true_rows) > 1e-3
    # The labels were there to be read: what measures against them saw two different truths.
    for key in ("vote_accuracy", "probe_accuracy_policy"):
        assert [row[key] for row in true_rows] != [row[key] for row in dealt_rows]
    about_labels = ("vote_accuracy", "probe_")
    for one, other in zip(true_rows, dealt_rows, strict=True):
        assert {k: v for k, v in one.items() if not k.startswith(about_labels)} == {
            k: v for k, v in other.items() if not k.startswith(about_labels)
        }


def test_missing_labels_change_no_weight(small, trained, weights_of, both_labellings, tmp_path):
    bare = tmp_path / "bare.jsonl"
    records = [json.loads(line) for line in Path(both_labellings[0]).read_text().splitlines()]
    bare.write_text("".join(json.dumps({"prompt": r["prompt"]}) + "\n" for r in records))
    with_labels, without = (
        weights_of(trained(small(TINY | {"data.train": str(path)}), 5)[0]) for path in (both_labellings[0], bare)
    )
    assert all(torch.equal(with_labels[name], without[name]) for name in with_labels)
