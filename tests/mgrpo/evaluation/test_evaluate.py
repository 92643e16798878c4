from __future__ import annotations

import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from transformers.utils import logging

from mgrpo.config import ModelConfig
from mgrpo.data.prompts import Dataset, Prompt
from mgrpo.errors import InputError
from mgrpo.evaluate import main, to_dict
from mgrpo.evaluation.evaluate import evaluate, summarize
from mgrpo.grading.checker import AnswerChecker
from mgrpo.grading.extract import make_extractor
from mgrpo.models.load import load_model
from mgrpo.rollout.engine import Engine
from mgrpo.rollout.transformers import TransformersEngine
from mgrpo.tasks.arithmetic import make_model, make_problems, make_tokenizer
from mgrpo.types import Rollouts, Sampling, WeightTag

TOKENIZER = make_tokenizer()
SAMPLING = Sampling(temperature=0.7, top_p=0.9, max_new_tokens=12, seed=5)
EXTRACT = make_extractor(r"regex:#(\d\d)")


class ScriptedEngine(Engine):
    """Answers prompt b with scripted texts; greedy decoding has its own."""

    has_model_logprobs = False

    def __init__(self, sampled: list[list[str]], greedy: list[str]):
        self.sampled, self.greedy, self.calls = sampled, greedy, []

    def generate(self, prompts, n, sampling, tag):
        self.calls.append((list(prompts), n, sampling, *tag))
        texts = [[text] for text in self.greedy] if sampling.temperature == 0 else self.sampled
        rows = [[*TOKENIZER.encode(text), TOKENIZER.eos_token_id] for group in texts for text in group[:n]]
        lengths = torch.tensor([len(row) for row in rows])
        width = int(lengths.max())
        return Rollouts(
            tokens=torch.tensor([row + [0] * (width - len(row)) for row in rows]),
            lengths=lengths,
            logprobs=torch.zeros(len(rows), width),
            truncated=lengths > 6,
            num_per_prompt=n,
            tag=tag,
        )


def make_data(answers: list[str | None]) -> Dataset:
    prompts = tuple(Prompt(ids=(2, 3 + i), text="", answer=answer, index=i) for i, answer in enumerate(answers))
    return Dataset(prompts=prompts, num_overlong=0, fingerprint="")


def run_scripted(sampled, greedy_texts, answers, **options):
    engine = ScriptedEngine(sampled, greedy_texts)
    result = evaluate(
        engine,
        SimpleNamespace(tokenizer=TOKENIZER),
        make_data(answers),
        EXTRACT,
        AnswerChecker(mode="exact"),
        SAMPLING,
        **{"samples": len(sampled[0]), "tag": WeightTag("momentum", 7)} | options,
    )
    return result, engine


def summarize_counts(right: list[list[int]], majority: list[int]):
    correct = torch.tensor(right, dtype=torch.bool)
    nothing = torch.zeros_like(correct)
    return summarize(correct, torch.tensor(majority).bool(), unparseable=nothing, truncated=nothing, lengths=correct)


def test_summary_equals_numbers_worked_out_by_hand():
    result = summarize_counts([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], [1, 0, 1])
    assert (result.num_prompts, result.samples, result.greedy, result.greedy_se) == (3, 4, None, None)
    assert result.avg_at_k == pytest.approx(0.5)
    assert result.avg_at_k_se == pytest.approx(0.5 / math.sqrt(3))  # std of 0.5, 0, 1
    assert result.maj_at_k == pytest.approx(2 / 3)
    assert result.maj_at_k_se == pytest.approx(1 / 3)  # sqrt((2/9 * 3/2) / 3)
    assert result.pass_at_k == pytest.approx(2 / 3)
    assert result.pass_at_k_se == pytest.approx(1 / 3)


@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_pass_at_j_equals_the_share_over_all_subsets(k):
    generator = torch.Generator().manual_seed(k)
    right = (torch.rand(6, k, generator=generator) < 0.35).int().tolist()
    result = summarize_counts(right, [0] * 6)
    assert list(result.pass_at) == [j for j in (1, 2, 4, 8) if j <= k]
    for j, share in result.pass_at.items():
        subsets = [any(subset) for row in right for subset in itertools.combinations(row, j)]
        assert share == pytest.approx(sum(subsets) / len(subsets))
    assert result.pass_at[1] == pytest.approx(result.avg_at_k)


def test_one_prompt_has_no_standard_error():
    result = summarize_counts([[1, 0]], [1])
    assert math.isnan(result.avg_at_k_se)
    assert to_dict(result)["avg_at_k_se"] is None
    json.dumps(to_dict(result), allow_nan=False)


def test_evaluate_grades_samples_majority_and_greedy():
    sampled = [["#10", "#10", "#20", "9"], ["#33", "#44", "#44", "#33"], ["1", "2", "3", "+123456"]]
    result, engine = run_scripted(sampled, ["#10", "#44", "#99"], answers=["10", "44", "99"])
    assert result.greedy == pytest.approx(1.0)
    assert result.avg_at_k == pytest.approx((2 + 2 + 0) / 12)
    assert result.maj_at_k == pytest.approx(1 / 3)  # the tie of 33 and 44 goes to 33, the earlier
    assert result.pass_at_k == pytest.approx(2 / 3)
    assert result.unparseable_share == pytest.approx(5 / 12)
    assert result.truncated_share == pytest.approx(1 / 12)
    lengths = [len(text) + 1 for group in sampled for text in group]
    assert result.mean_length == pytest.approx(sum(lengths) / 12)
    greedy_sampling = Sampling(temperature=0.0, max_new_tokens=12, seed=5)
    ids = [(2, 3), (2, 4), (2, 5)]
    assert engine.calls == [(ids, 4, SAMPLING, "momentum", 7), (ids, 1, greedy_sampling, "momentum", 7)]


def test_equivalent_answers_vote_together():
    extract = make_extractor(r"regex:#(.+)")
    engine = ScriptedEngine([["#8", "#5", "#05", "#8", "#0005"]], [])
    result = evaluate(
        engine,
        SimpleNamespace(tokenizer=TOKENIZER),
        make_data(["5"]),
        extract,
        AnswerChecker(mode="exact"),
        SAMPLING,
        samples=5,
        tag=WeightTag("policy", 0),
        greedy=False,
    )
    assert (result.maj_at_k, result.avg_at_k) == (1.0, pytest.approx(0.6))


def test_responses_without_answer_do_not_vote():
    result, _ = run_scripted([["9", "8", "7", "#10"]], ["9"], ["10"])
    assert (result.maj_at_k, result.greedy) == (1.0, 0.0)


def test_greedy_is_left_out_on_request():
    result, engine = run_scripted([["#10"]], ["#10"], ["10"], greedy=False)
    assert result.greedy is None
    assert len(engine.calls) == 1


def test_prompts_without_answer_and_no_samples_are_refused():
    with pytest.raises(InputError, match=r"got 2 of 3 without, the first at index 1\. Add answers"):
        run_scripted([["#10"]] * 3, ["#10"] * 3, ["10", None, None])
    with pytest.raises(InputError, match="samples must be at least 1, got 0"):
        run_scripted([["#10"]], ["#10"], ["10"], samples=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def flags(folder, *more: str) -> list[str]:
    model = ["--model.path", str(folder), "--model.device", "cpu"]
    rest = ["--data.probe", "arithmetic:6:2-3:0", "--answer.extract", r"regex:(\d)", "--answer.equivalence", "exact"]
    return [*model, *rest, "--samples", "3", "--rollout.max-new-tokens", "8", *more]


def test_command_line_writes_what_the_engine_gives(folder, tmp_path, capsys):
    out = tmp_path / "result.json"
    assert main(flags(folder, "--out", str(out), "--limit", "4", "--seed", "3")) == 0
    written = json.loads(out.read_text())
    assert written["settings"]["samples"] == 3 and written["settings"]["seed"] == 3
    loaded = load_model(ModelConfig(path=str(folder), device="cpu"))
    engine = TransformersEngine(
        loaded.model, eos_ids=loaded.eos_ids, pad_id=loaded.pad_id, dtype=torch.float32, batch_size=256
    )
    engine.update_weights(loaded.model.state_dict(), WeightTag("policy", 0))
    problems = make_problems(6, operands=(2, 3), seed=0)[:4]
    prompts = [TOKENIZER.encode(problem.prompt) for problem in problems]
    sampling = Sampling(temperature=0.8, max_new_tokens=8, seed=3)
    rollouts = engine.generate(prompts, 3, sampling, WeightTag("policy", 0))
    texts = TOKENIZER.batch_decode([rollouts.response(i) for i in range(12)], skip_special_tokens=True)
    digits = [next((c for c in reversed(text) if c.isdigit()), None) for text in texts]
    right = [d is not None and int(d) == int(problems[i // 3].answer) for i, d in enumerate(digits)]
    found = written["evaluation"]
    assert found["num_prompts"] == 4
    assert found["avg_at_k"] == pytest.approx(sum(right) / 12)
    assert found["unparseable_share"] == pytest.approx(sum(d is None for d in digits) / 12)
    assert found["mean_length"] == pytest.approx(rollouts.lengths.double().mean().item())
    printed = capsys.readouterr().out
    assert f"{found['mean_length']:.1f}" in printed and "maj@3" in printed


@pytest.mark.parametrize(
    ("extract", "accuracy"),
    # A pattern for responses is none for labels.
    [("hash", 1.0), (r"regex:####(\d)", 1.0), (r"regex:####(\d) --answer.label-extract plain", 0.5)],
)
def test_command_line_reads_true_answers_out_of_worked_solutions(folder, tmp_path, monkeypatch, extract, accuracy):
    class Engine(ScriptedEngine):
        def __init__(self, *_args, **_options):
            super().__init__([["####3"], ["####5"]], ["####3", "####5"])

        def update_weights(self, *_args):
            pass

    monkeypatch.setattr("mgrpo.evaluate.start_engine", Engine)
    data, out = tmp_path / "x.jsonl", tmp_path / "result.json"
    rows = [{"prompt": "1+2=", "answer": "1+2 makes three.\n#### 3"}, {"prompt": "2+3=", "answer": "5"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ["--data.probe", str(data), "--samples", "1", "--answer.extract", *extract.split(), "--out", str(out)]
    assert main(flags(folder, *more)) == 0
    found = json.loads(out.read_text())["evaluation"]
    assert found["greedy"] == found["avg_at_k"] == accuracy


def test_command_line_shows_no_progress_bars(folder, capsys):
    logging.enable_progress_bar()
    try:
        load_model(ModelConfig(path=str(folder), device="cpu"))
        assert "Loading weights" in capsys.readouterr().err
        assert main(flags(folder)) == 0
        assert "Loading weights" not in capsys.readouterr().err
    finally:
        logging.disable_progress_bar()


def test_command_line_shows_a_long_vote(folder, monkeypatch, capsys):
    """Every vote counts as long; the answers are such as need a worker."""
    monkeypatch.setattr("mgrpo.grading.watch.SHOWN_AFTER_S", 0.0)
    turns = itertools.count()
    monkeypatch.setattr("mgrpo.evaluate.make_extractor", lambda spec: lambda text: ("x+1", "1+x")[next(turns) % 2])
    assert main(flags(folder, "--answer.equivalence", "math", "--answer.workers", "1")) == 0
    assert "comparing answers: " in capsys.readouterr().err


def test_command_line_warns_where_nothing_is_read(folder, capsys):
    assert main(flags(folder, "--answer.extract", "hash")) == 0
    assert "Most responses have no answer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--samples", "0", "--rollout.top-p", "0"], "--samples must be in [1, inf), got 0"),
        (["--samples", "0", "--rollout.top-p", "0"], r"--rollout.top-p must be in (0, 1], got 0.0"),
        (["--rollout.temperature", "0"], "--rollout.temperature must be in (0, inf)"),
        (["--rollout.max-new-tokens", "0"], "--rollout.max-new-tokens must be in [1, inf), got 0"),
        (["--limit", "0"], "--limit must be in [1, inf), got 0"),
        (["--seed", "-1"], "--seed must be in"),
        (["--rollout.num-policy", "3"], "--rollout.num-policy must be left out, it belongs to training, got 3."),
        (["--data.train", "x.jsonl"], "--data.train must be left out, it belongs to training, got x.jsonl."),
        (["--engine.placement", "two-engines"], "--engine.placement must be one-engine, or server with one server."),
        (["--data", "x.jsonl"], "evaluate: --data is now --data.probe."),
        (["--max_new_tokens=3", "--workers", "1"], "--workers is now --answer.workers."),
        (["--out", "/nowhere/x.json"], "--out must be a file in an existing folder"),
        (["--answer.extract", "bracket"], "spec must be boxed, hash, last-number or regex:PATTERN"),
        (["--data.probe", "missing.jsonl"], "missing.jsonl: no such file"),
        (["--answer.label-extract", "bracket"], "spec must be auto, plain, boxed, hash, last-number or regex:PATTERN"),
        (["--data.template-args", "thinking=false"], "--data.template-args must come with a chat template"),
        (
            ["--data.probe", "keys.jsonl"],
            "--data.answer-key must be the key of an answer, got 'answer', which",
        ),
        (["--data.probe", "long.jsonl"], "long.jsonl:1: label must mark its answer"),
        (["--data.probe", "long.jsonl"], "Set --answer.label-extract last-number or regex:PATTERN"),
        (
            ["--data.probe", "long.jsonl", "--answer.label-extract", "hash"],
            "No answer was found in 1 labels, the first long.jsonl:1",
        ),
        (["--model.path", "./no-such-folder"], "a model folder or a hub id, ./no-such-folder does not exist."),
        (["--rollout.max-new-tokens", "255"], "prompts must have at most 1 tokens"),
    ],
)
def test_bad_input_exits_with_2(folder, tmp_path, monkeypatch, capsys, more, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "keys.jsonl").write_text('{"prompt": "1+1=", "solution": "2"}\n')
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "1+1=", "answer": "is two " * 40}))
    assert main(flags(folder, *more)) == 2
    assert message in capsys.readouterr().err


def test_overlong_prompts_are_dropped_aloud(folder, capsys):
    assert main(flags(folder, "--rollout.max-new-tokens", "250", "--data.overlong", "drop")) == 0
    assert "3 overlong prompts were left out" in capsys.readouterr().err


def test_an_unwritable_result_exits_with_6(folder, tmp_path, capsys, monkeypatch):
    def fail(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", fail)
    assert main(flags(folder, "--out", str(tmp_path / "x.json"))) == 6
    captured = capsys.readouterr()
    assert "No space left" in captured.err and "avg@3" in captured.out
