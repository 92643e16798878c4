"""The built-in task: problems, demonstrations, tokenizer, and the grading of the shipped base model."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mgrpo.config import ModelConfig
from mgrpo.models.load import load_model
from mgrpo.models.tokenizer import resolve_path
from mgrpo.rollout.transformers import TransformersEngine
from mgrpo.tasks.arithmetic import (
    BaseArgs,
    ExportArgs,
    Problem,
    demonstrate,
    export,
    make_base,
    make_model,
    make_problem,
    make_problems,
    make_tokenizer,
)
from mgrpo.types import Sampling, WeightTag

BASE = Path(resolve_path("builtin:arithmetic"))


def test_a_problem_and_its_faultless_demonstration():
    problem = Problem(prompt="51-38+61=", answer="74", operands=3)
    assert demonstrate(problem, random.Random(0), error_rate=0.0) == "51-38=13;13+61=74#74"
    assert demonstrate(problem, random.Random(0), error_rate=0.0, copy_operands=False) == "13;74#74"


@pytest.mark.parametrize("operands", [2, 3, 7])
def test_answers_are_the_sums_modulo_100(operands):
    for seed in range(50):
        problem = make_problem(random.Random(seed), operands)
        terms = problem.prompt.removesuffix("=").replace("-", " -").replace("+", " ").split()
        assert len(terms) == operands
        assert int(problem.answer) == sum(map(int, terms)) % 100
        assert demonstrate(problem, random.Random(0), error_rate=0.0).endswith("#" + problem.answer)


def test_wrong_partial_results_are_as_frequent_as_asked_and_carried_on():
    rng = random.Random(0)
    wrong = steps = 0
    for _ in range(3000):
        text = demonstrate(make_problem(rng, 4), rng, error_rate=0.1)
        lines, answer = text.split("#")
        carried = None
        for line in lines.split(";"):
            left, result = line.split("=")
            assert carried in (None, left[:2])
            sign = 1 if left[2] == "+" else -1
            wrong += (int(left[:2]) + sign * int(left[3:])) % 100 != int(result)
            steps += 1
            carried = result
        assert carried == answer
    assert 0.08 < wrong / steps < 0.12


def test_levels_have_equal_shares_and_a_seed_repeats():
    problems = make_problems(500, operands=(3, 4, 5, 6, 7), seed=1)
    assert Counter(p.operands for p in problems) == dict.fromkeys((3, 4, 5, 6, 7), 100)
    assert problems == make_problems(500, operands=(3, 4, 5, 6, 7), seed=1)
    assert problems != make_problems(500, operands=(3, 4, 5, 6, 7), seed=2)


def test_the_tokenizer_round_trips_through_auto_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    text = "51-38+61=51-38=13;13+61=74#74"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text) and tokenizer.decode(ids) == text
    assert ids == make_tokenizer().encode(text)
    assert tokenizer.eos_token_id == 1 and tokenizer.pad_token_id == 0


def test_the_base_is_small_and_a_plain_qwen3():
    assert sum(path.stat().st_size for path in BASE.iterdir()) < 4 * 2**20
    model = AutoModelForCausalLM.from_pretrained(BASE)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in make_model().named_parameters()}


@pytest.mark.slow
def test_the_base_is_graded():
    """It samples 3 operands right, elects 5 right though half its samples are wrong, and elects 6 and 7 wrong."""
    loaded = load_model(ModelConfig(path="builtin:arithmetic", device="cpu"))
    engine = TransformersEngine(
        loaded.model, eos_ids=loaded.eos_ids, pad_id=loaded.pad_id, dtype=torch.float32, batch_size=512
    )
    engine.update_weights(loaded.model.state_dict(), WeightTag("policy", 0))
    sampled, elected = {}, {}
    for operands in (3, 4, 5, 6, 7):
        problems = make_problems(80, operands=(operands,), seed=11)
        prompts = [loaded.tokenizer.encode(p.prompt) for p in problems]
        rollouts = engine.generate(prompts, 16, Sampling(max_new_tokens=64), WeightTag("policy", 0))
        texts = loaded.tokenizer.batch_decode([rollouts.response(row) for row in range(80 * 16)])
        answers = [text.removesuffix("<eos>")[-2:] for text in texts]
        groups = [answers[i : i + 16] for i in range(0, len(answers), 16)]
        sampled[operands] = sum(a == p.answer for p, g in zip(problems, groups, strict=True) for a in g) / len(answers)
        majority = [Counter(group).most_common(1)[0][0] for group in groups]
        elected[operands] = sum(a == p.answer for p, a in zip(problems, majority, strict=True)) / len(problems)
    assert sampled[3] > 0.7 and elected[3] > 0.95
    assert 0.4 < sampled[5] < 0.6 and elected[5] > 0.9
    assert elected[6] < 0.1 and elected[7] < 0.1
    assert 0.35 < sum(sampled.values()) / 5 < 0.6


def test_the_base_command_learns_and_saves(tmp_path, capsys):
    make_base(BaseArgs(out=tmp_path, steps=30, batch=16, operands=(2,)))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    first, last = (float(lines[i].split("loss")[1].split()[0]) for i in (0, -1))
    assert last < 0.95 * first
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    untrained = make_model(0)
    assert not torch.equal(saved.model.embed_tokens.weight, untrained.model.embed_tokens.weight)


def test_export_writes_records(tmp_path):
    export(ExportArgs(out=tmp_path / "x.jsonl", num=10, operands=(2, 3), seed=4))
    records = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [r["prompt"] for r in records] == [p.prompt for p in make_problems(10, operands=(2, 3), seed=4)]
