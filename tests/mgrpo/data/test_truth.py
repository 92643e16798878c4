"""True answers: the format of labels, what a plan says of them, and the labels and keys that are refused."""

from __future__ import annotations

import itertools
import json
import os
import re
from pathlib import Path

import pytest

from mgrpo.config import AnswerConfig, Config
from mgrpo.data.load import read_answers
from mgrpo.data.records import Record
from mgrpo.errors import InputError
from mgrpo.grading.checker import AnswerChecker
from mgrpo.grading.extract import make_extractor
from mgrpo.grading.labels import make_label_reader

# How a worked solution may mark 5,500, and how a response may.
LABELS = {
    "gsm8k": ("auto", "4000+1500=<<4000+1500=5500>>5500\n#### 5,500"),
    "math": ("auto", r"Then $4000+1500=\boxed{5500}$ dollars, because \boxed{\text{a}} is no answer. So \boxed{5500}."),
    "bare": ("auto", "5500"),
    "spaced": ("auto", " 5,500\n"),
    "number": ("auto", "5500.0"),
    "hash": ("hash", "a long way\n#### 5500"),
    "boxed": ("boxed", r"\boxed{5500}"),
    "plain": ("plain", "5500"),
    "prose": ("last-number", "The van costs 1,500 more than 4,000, that is 5,500 dollars."),
    "pattern": (r"regex:Answer: (\S+)", "4000 and 1500.\nAnswer: 5500"),
}
RESPONSES = {
    "boxed": r"4000 + 1500 makes \boxed{5500}.",
    "hash": "4000 + 1500\n#### 5500",
    "last-number": "4000 + 1500 is 5500",
    r"regex:answer is (\S+)": "so the answer is 5500",
}


@pytest.fixture(scope="module")
def checker():
    with AnswerChecker() as made:
        yield made


@pytest.mark.parametrize(("label", "response"), list(itertools.product(LABELS, RESPONSES)))
def test_labels_and_responses_have_formats_of_their_own(checker, label, response):
    (spec, text), config = LABELS[label], AnswerConfig(extract=response, label_extract=LABELS[label][0])
    (record,) = read_answers([Record(prompt="p", answer=text, origin="t:1")], config)
    assert spec == config.label_extract
    assert checker.is_correct(make_extractor(response)(RESPONSES[response]), record.answer)
    assert not checker.is_correct("5501", record.answer)


@pytest.mark.parametrize(
    ("spec", "label", "answer"),
    [
        ("auto", r"\boxed{3} and then" + "\n#### 4", "3"),
        ("auto", "x = 3, y = 4", "x = 3, y = 4"),
        ("auto", "w" * 200, "w" * 200),
        ("auto", "w" * 201, None),
        ("auto", "w " * 101, None),
        ("auto", "w" * 201 + r" \boxed{}" + "\n#### 7", "7"),
        ("auto", ("2", r"\boxed{-2}", "\\fbox{2}"), ("2", "-2")),
        ("auto", ("2", "w" * 300), "2"),
        ("auto", "<think>2, or 3?</think>\n<answer> 4 </answer>", "4"),
        ("auto", r"<answer>\boxed{4}</answer>", "4"),
        ("auto", "w " * 200 + "<answer>4</answer> is it", "4"),
        ("auto", "The final answer is $4$. I hope it is correct.", "$4$"),
        ("auto", "w " * 200 + "\nAns: 4 cm.", "4 cm"),
        ("auto", "w " * 200 + "so the correct option is (C).", "(C)"),
        ("auto", "w " * 200 + "\n答案是\uff1a4。", "4"),
        ("auto", "w " * 200 + "故选\uff1aC", "C"),
        ("plain", "w" * 5000, "w" * 5000),
        ("plain", r"\boxed{3}", r"\boxed{3}"),
        ("boxed", "3", None),
        ("hash", r"\boxed{3}", None),
        ("last-number", "none", None),
        (r"regex:<(\d+)>", "<1> <2>", "2"),
        (r"regex:<(\d+)>", ("<1>", "2"), "1"),
        ("hash", ("1", "2"), None),
        ("auto", None, None),
    ],
)
def test_what_is_read_from_a_label(spec, label, answer):
    assert make_label_reader(spec)(label) == answer


@pytest.mark.parametrize("spec", ["", "box", "Auto", "regex:", "regex:((", "none"])
def test_other_formats_are_refused(spec):
    with pytest.raises(InputError, match=r"spec must be (auto, plain, boxed, hash, last-number or )?regex:"):
        make_label_reader(spec)


def test_a_solution_without_a_mark_is_refused_by_its_place():
    records = [Record(prompt="p", answer=a, origin=f"x.jsonl:{i}") for i, a in enumerate(["1", "word " * 60 + "5"], 1)]
    match = (
        r"^x\.jsonl:2: label must mark its answer by a box or a #### line, or have at most 200 characters, got 301: "
        r"'word .*' \.\.\. '.*5'\. Set --answer\.label-extract last-number"
    )
    with pytest.raises(InputError, match=match):
        list(read_answers(records, AnswerConfig()))
    assert [r.answer for r in read_answers(records, AnswerConfig(label_extract="last-number"))] == ["1", "5"]
    read = list(read_answers(records, AnswerConfig(label_extract="hash")))
    assert [(r.answer, r.unread) for r in read] == [(None, "1"), (None, records[1].answer)]


def test_any_of_several_answers_is_right(checker):
    assert [checker.is_correct(a, ("1/2", "7")) for a in ("0.5", "7.0", "8", None)] == [True, True, False, False]
    assert not checker.is_correct("5", ()) and not checker.is_correct(" ", (" ", ""))


@pytest.mark.parametrize("name", ["gsm8k_test", "math500_test"])
def test_labels_of_published_data(name):
    """Every worked solution of GSM8K and MATH500 has a label, and that of MATH is the published answer."""
    folder = os.environ.get("MGRPO_DATA") or Path(__file__).parents[4] / "shared" / "data"
    path = Path(folder) / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    read = make_label_reader("auto")
    if name == "gsm8k_test":
        assert all(re.fullmatch(r"-?[\d,.]+", str(read(row["answer"]))) for row in rows)
    else:
        assert sum(read(row["solution"]) == row["answer"] for row in rows) >= 0.9 * len(rows)


# ---- the command line


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def said(capsys):
    found = capsys.readouterr()
    return " ".join((found.out + found.err).replace("│", " ").split())


WORKED = [{"prompt": f"1+{i}=", "answer": f"1+{i}={i + 1}\n#### {i + 1:,}"} for i in range(1000, 1004)]


def test_the_plan_counts_labels_and_shows_them_as_they_are_compared(launch, tmp_path, capsys):
    rows = [*WORKED, {"prompt": "2+2="}, {"prompt": "2+3=", "answer": [r"\boxed{\dfrac{1}{2}}", "[b]0.50"]}]
    options = {"data.train": write(tmp_path / "x.jsonl", rows), "data.probe": write(tmp_path / "y.jsonl", rows[5:])}
    assert launch(options, "--dry-run") == 0
    text = said(capsys)
    assert "labels 5 of 6 prompts, the first compared as 1001 | 1002 | 1003" in text
    assert r"labels of the eval set 1 of 1 prompts, the first compared as \frac{1}{2} or [b]0.50" in text
    rows = [{"prompt": "1+1=", "answer": "it is two, and no more than two"}, *WORKED]
    assert launch({"data.train": write(tmp_path / "x.jsonl", rows), "answer.label_extract": "plain"}, "--dry-run") == 0
    text = said(capsys)
    assert "1 labels have 6 words or more, such as 'it is two, and no more than two': if the answer is inside" in text
    assert launch({"data.train": write(tmp_path / "x.jsonl", rows), "answer.label_extract": "hash"}, "--dry-run") == 0
    assert "No answer was found in 1 labels, the first x.jsonl:1: 'it is two, and no more than two'." in said(capsys)
    assert launch({"data.train": write(tmp_path / "x.jsonl", [{"prompt": "1+1="}] * 4)}, "--dry-run") == 0
    assert "labels 0 of 4 prompts" in said(capsys)


REFUSED = {
    "misspelt key": (
        {"data.answer_key": "slution"},
        "--data.answer-key must be the key of an answer, got 'slution', which no record has. "
        "Keys are prompt, solution, reward_model.ground_truth. Did you mean 'solution'?",
    ),
    "default key that was given": ({"data.answer_key": "answer"}, "got 'answer', which no record has."),
    "labels without their key": ({"objective.reward": "labels"}, "got 'answer', which no record has."),
    "key of a built-in probe": (
        {"data.answer_key": "ground_truth", "data.probe": "arithmetic:8:2:0"},
        "Did you mean 'reward_model.ground_truth'?",
    ),
    "probe without the key": (
        {"data.answer_key": "gold", "data.probe": "{dir}/x.jsonl"},
        "{dir}/x.jsonl: --data.answer-key must be the key of an answer, got 'gold', which no record has.",
    ),
    "long label": (
        {"data.answer_key": "solution"},
        "x.jsonl:4: label must mark its answer by a box or a #### line, or have at most 200 characters, got 300",
    ),
    "probe that no reader reads": (
        {"data.answer_key": "reward_model.ground_truth", "data.probe": "{dir}/x.jsonl", "answer.label_extract": "hash"},
        "--data.probe needs the true answer of every prompt, 4 of 4 have none. No answer was found in 4 labels, the "
        "first x.jsonl:1: '1001'. Set another --answer.label-extract.",
    ),
    "unknown format": ({"answer.label_extract": "box"}, "spec must be auto, plain, boxed, hash, last-number or regex:"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_labels_that_would_count_for_nothing_are_refused_by_the_plan_and_by_the_run(launch, tmp_path, capsys, case):
    solutions = [*(row["answer"] for row in WORKED[:3]), "x" * 300]
    rows = [
        {"prompt": row["prompt"], "solution": solution, "reward_model": {"ground_truth": str(1001 + i)}}
        for i, (row, solution) in enumerate(zip(WORKED, solutions, strict=True))
    ]
    options, message = REFUSED[case]
    options = {k: str(v).format(dir=tmp_path) for k, v in options.items()}
    options["data.train"] = write(tmp_path / "x.jsonl", rows)
    for more in (["--dry-run"], []):
        assert launch(options, *more) == 2
        text = said(capsys)
        assert message.format(dir=tmp_path) in text
        assert text.count(message.format(dir=tmp_path)) == 1


def test_a_key_of_the_probe_alone_and_a_default_that_is_absent_are_fine(launch, tmp_path, capsys):
    bare = write(tmp_path / "bare.jsonl", [{"prompt": f"1+{i}="} for i in range(4)])
    probe = write(tmp_path / "probe.jsonl", [{"prompt": "1+1=", "gold": 2}])
    assert launch({"data.train": bare, "data.probe": probe, "data.answer_key": "gold"}, "--dry-run") == 0
    assert "labels 0 of 4 prompts labels of the eval set 1 of 1 prompts, the first compared as 2" in said(capsys)
    assert Config().data.answer_key is None
    assert launch({"data.train": bare}, "--dry-run") == 0


def test_a_run_says_that_answers_were_left_off(launch, tmp_path, capsys, llama_chat):
    turns = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
    rows = [{"messages": turns}, {"messages": turns[:1]}, {"messages": turns * 2}, {"messages": turns[:1]}]
    options = {"model.path": str(llama_chat), "data.train": write(tmp_path / "x.jsonl", rows)}
    options |= {"data.prompt_key": "messages", "steps": 1}
    sentence = "The assistant's turn at the end of 2 prompts was left off; it is no label."
    assert launch(options, "--dry-run") == 0
    text = said(capsys)
    assert sentence in text and "labels 0 of 4 prompts" in text
    assert launch(options) == 0
    assert said(capsys).count(sentence) == 1


@pytest.fixture(scope="module")
def llama_chat(tmp_path_factory, make_llama):
    """A random model whose tokenizer has a chat template."""
    from mgrpo.tasks.arithmetic import make_tokenizer

    folder, tokenizer = tmp_path_factory.mktemp("models") / "chat", make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ mark or ';' }}{% endfor %}"
    make_llama(folder, tokenizer, seed=0)
    return folder


def test_arguments_of_the_template_reach_the_prompts_and_the_fingerprint(launch, resume, tmp_path, capsys, llama_chat):
    data = write(tmp_path / "x.jsonl", [{"prompt": f"1+{i}="} for i in range(4)])
    options = {"model.path": str(llama_chat), "data.train": data, "data.template": "chat", "checkpoint.every": 1}
    assert launch(options | {"steps": 2}, "--stop-after", "1", "--data.template-args", "mark=#") == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"]["template_args"] == ["mark=#"]
    assert resume("--data.template-args", "mark=-") == 2
    assert "--data.template-args" in said(capsys)
    assert resume() == 0
    capsys.readouterr()
    assert launch(options, "--dry-run", "--data.template-args", "makr=#", run_dir=tmp_path / "other") == 2
    assert "must name variables that the tokenizer's chat template reads, got 'makr'. Did you mean mark?" in said(
        capsys
    )
