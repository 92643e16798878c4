"""Data one step further: encodings, printed values, splits by file names, roles of models, doubtful labels."""

from __future__ import annotations

import gzip
import json
import logging

import datasets
import numpy
import pandas
import pyarrow
import pyarrow.parquet
import pytest

from mgrpo.config import AnswerConfig, Config
from mgrpo.data.load import answers_of, describe_data
from mgrpo.data.messages import leave_off_answer, read_messages
from mgrpo.data.prompts import Dataset, Prompt
from mgrpo.data.records import load_records
from mgrpo.errors import InputError
from mgrpo.grading.label_text import label_text
from mgrpo.grading.labels import make_label_reader
from mgrpo.inputs import parse_value

CHAT = [{"role": "user", "content": "What's \\frac{1}{2}+1?"}, {"role": "assistant", "content": 'It is "3/2".'}]
ROWS = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "π?", "answer": "3"}]
PAIRS = [("1+1=", "2"), ("π?", "3")]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def pairs(source, **options):
    return [(record.prompt, record.label) for record in load_records(str(source), **options)]


# ---- encodings and separators


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
@pytest.mark.parametrize("name", ["x.csv", "x.json", "x.jsonl", "x.tsv", "x.jsonl.gz"])
def test_utf_16_with_its_mark_is_read(tmp_path, name, encoding):
    text = pandas.DataFrame(ROWS).to_csv(index=False, sep="\t") if "sv" in name else LINES
    raw = text.encode(encoding)
    raw = b"\xfe\xff" + raw if encoding == "utf-16-be" else raw
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    assert pairs(tmp_path / name) == PAIRS


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        ("prompt,answer\n1,2\n".encode("utf-16-le"), r"x\.csv:1: not valid UTF-8: zero bytes, as UTF-16 has\. Save"),
        (b"\xff\xfe" + b"p", r"x\.csv: not valid UTF-16: .*Save the file as UTF-8"),
        (b"prompt^answer\n1^2\n", r"x\.csv:1: fields must be separated by comma, semicolon.*got the header 'prompt\^a"),
        (b"id ~ question\n1 ~ 2\n", r"x\.csv:1: fields must be separated by"),
        (b"prompt answer\n1 2\n", r"x\.csv:1: fields must be separated by"),
        (b"the question\n1\n", r"must have the key 'prompt', got the question"),
        (b"prompt,answer\n1\n", r"x\.csv:2: row must have 2 fields, got 1\. .* Complete the row"),
    ],
)
def test_what_is_wrong_with_a_table_is_named(tmp_path, raw, match):
    (tmp_path / "x.csv").write_bytes(raw)
    with pytest.raises(InputError, match=match):
        load_records(str(tmp_path / "x.csv"))


# ---- lists and objects as text


@pytest.mark.parametrize("print_value", [json.dumps, repr])
@pytest.mark.parametrize("name", ["x.csv", "x.jsonl", "x.parquet"])
def test_printed_messages_and_objects_are_read(tmp_path, name, print_value):
    table = pandas.DataFrame([{"chat": print_value(CHAT), "made": print_value({"by": "rule", "truth": "3/2"})}] * 2)
    write = {"x.csv": table.to_csv, "x.jsonl": lambda p: table.to_json(p, orient="records", lines=True)}
    write.get(name, table.to_parquet)(tmp_path / name)
    assert pairs(tmp_path / name, prompt_key="chat", answer_key="made.truth") == [(CHAT, "3/2")] * 2
    with pytest.raises(InputError, match=r"got 'made\.turth', which no record has"):
        load_records(str(tmp_path / name), prompt_key="chat", answer_key="made.turth", need_answer=True)
    (tmp_path / "y.jsonl").write_text(json.dumps({"row": print_value({"q": "1+1="})}) + "\n")
    assert pairs(tmp_path / "y.jsonl", prompt_key="row.q") == [("1+1=", None)]


def test_text_within_an_object_of_parquet(tmp_path):
    rows = [{"info": {"chat": "1+1=", "made": json.dumps({"truth": i})}} for i in (1, 2)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert pairs(tmp_path / "x.parquet", prompt_key="info.chat", answer_key="info.made.truth") == [
        ("1+1=", "1"),
        ("1+1=", "2"),
    ]


@pytest.mark.parametrize("text", [str(numpy.array(CHAT)), repr(CHAT)[:40] + "]", json.dumps(CHAT)[:-5] + "]"])
def test_messages_that_cannot_be_read_back_are_refused(tmp_path, text):
    (tmp_path / "x.jsonl").write_text(json.dumps({"prompt": text}) + "\n")
    with pytest.raises(InputError, match=r"x\.jsonl:1: 'prompt' must be .*printed as text.* Write the data as \.jsonl"):
        load_records(str(tmp_path / "x.jsonl"))


@pytest.mark.parametrize(
    "text", ["[1, 2]", '[{"role": "admin"}]', "[{'role': 'user'}] is a list", '{"role": "user", "content": "x"}', "[{"]
)
def test_other_text_stays_text(tmp_path, text):
    (tmp_path / "x.jsonl").write_text(json.dumps({"prompt": text}) + "\n")
    assert pairs(tmp_path / "x.jsonl") == [(text, None)]


@pytest.mark.parametrize("text", ["", "5", "{", "[" * 50_000 + "]" * 50_000, "{1: " * 9_000 + "1" + "}" * 9_000, "{a}"])
def test_text_without_a_value(text):
    assert parse_value(text) is None


# ---- splits


def test_files_that_are_named_by_splits_are_chosen_by_the_split(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001", "dev"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": name}) + "\n")
    (tmp_path / "dataset_infos.json").write_text('{"default": {"features": ["prompt"]}}')
    read = {split: [prompt for prompt, _ in pairs(tmp_path, split=split)] for split in ("train", "test", "validation")}
    assert read["train"] == ["train-00000-of-00002", "train-00001-of-00002"]
    assert (read["test"], read["validation"]) == (["test-00000-of-00001"], ["dev"])
    with pytest.raises(InputError, match=r"--data\.split must be a split of its files, one of dev, test, train, got"):
        load_records(str(tmp_path), split="all")
    (tmp_path / "more.jsonl").write_text('{"prompt": "more"}\n')  # a name that is no split: all are read
    assert len(pairs(tmp_path)) == 5
    (tmp_path / "x.json").write_text(json.dumps({"train": ROWS, "test": ROWS}))
    with pytest.raises(InputError, match=r"x\.json: --data\.split must be one of its lists, train, test, got 'dev'"):
        load_records(str(tmp_path / "x.json"), split="dev")


def test_files_of_one_split_are_all_read(tmp_path):
    for i in range(2):
        (tmp_path / f"test-{i}.jsonl").write_text(LINES)
    assert pairs(tmp_path) == PAIRS * 2


# ---- names that lead nowhere, and the hub


def test_links_urls_and_empty_saved_folders_are_named(tmp_path):
    (tmp_path / "x.jsonl").symlink_to("gone.jsonl")
    with pytest.raises(InputError, match=r"x\.jsonl: no such file or folder\. It is a link to gone\.jsonl\. Check"):
        load_records(str(tmp_path / "x.jsonl"))
    with pytest.raises(InputError, match=r"A URL is not read: download the file, or name a hub data set by its id"):
        load_records("https://example.org/x.jsonl")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(ROWS).select([]).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match=r"saved: data set must hold at least one record, got none"):
        load_records(str(tmp_path / "saved"))


def test_configurations_of_hub_data_sets(monkeypatch):
    asked = []

    def load_dataset(*names, split):
        asked.append((names, split, logging.getLogger("huggingface_hub").isEnabledFor(logging.WARNING)))
        if len(names) == 1:
            raise ValueError("Config name is missing.\nPick one of the available configs: ['main', 'socratic']")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert pairs("some-one/sums:main", split="test") == PAIRS
    match = r"Config name is missing\. Name one of the configurations 'main', 'socratic' behind a colon, as a/b:NAME"
    with pytest.raises(InputError, match=match):
        load_records("a/b")
    assert asked == [(("some-one/sums", "main"), "test", False), (("a/b",), "train", False)]


# ---- roles


@pytest.mark.parametrize(
    "role",
    [
        "gpt-4",
        "GPT4o",
        "chatgpt-4o",
        "Answer",
        "Claude-3",
        "llama_2",
        "AI assistant",
        "response",
        "LLM",
        "Gemini",
        "o3",
    ],
)
def test_models_by_any_name_answer(role):
    turns = [{"from": "human", "value": "q"}, {"from": role, "value": "a"}]
    messages = read_messages([*turns, turns[0]], "p", "x:1")
    assert [m["role"] for m in messages] == ["user", "assistant", "user"]
    assert leave_off_answer(read_messages(turns, "p", "x:1"), "x:1") == [{"role": "user", "content": "q"}]


@pytest.mark.parametrize("role", ["tool", "developer", "function", "observation", "alice", "gptuser"])
def test_other_roles_stay(role):
    (message,) = read_messages([{"role": role, "content": "x"}], "p", "x:1")
    assert message["role"] == role and leave_off_answer([message], "x:1") == [message]


# ---- labels


@pytest.mark.parametrize(
    ("label", "answer"),
    [
        ("The answer is 12.", "12"),
        ("word " * 60 + "so the final answer is: $\\frac{1}{2}$.", "$\\frac{1}{2}$"),
        ("We add.\n**Answer:** 5,500", "5,500"),
        ("### Answer\n12", "12"),
        ("The answer is odd. The answer is 7 pens!", "7 pens"),
        ("The answer is 7. Check: 3+4=7", "The answer is 7. Check: 3+4=7"),
        ("The answer is not 7", "The answer is not 7"),
        ("The answers are 7 and 8", "The answers are 7 and 8"),
        ("the answer is \\boxed{3}, not 4", "3"),
        ("The answer is 3\n#### 4", "4"),
        ("word " * 60 + "the answer", None),
    ],
)
def test_answers_that_are_announced(label, answer):
    assert make_label_reader("auto")(label) == answer
    assert make_label_reader("plain")(label) == label


def test_labels_of_the_built_in_problems_are_plain():
    config = AnswerConfig(label_extract="boxed")
    assert answers_of("arithmetic:4:3:0", config).label_extract == "plain"
    assert answers_of("x.jsonl", config) == config
    with pytest.raises(InputError, match="spec must be auto, plain"):
        answers_of("arithmetic:4:3:0", AnswerConfig(label_extract="bxed"))
    assert Config().answer.label_extract == "auto"


def test_numbers_of_few_bits_keep_their_digits(tmp_path):
    assert label_text(numpy.float32(0.1), "a", "x") == "0.1"
    assert label_text(numpy.array([0.1, 2.5], numpy.float16), "a", "x") == ("0.1", "2.5")
    columns = {
        "prompt": ["p"] * 3,
        "answer": pyarrow.array([0.1, None, 1e-7], pyarrow.float32()),
        "all": pyarrow.array([[0.1, None], None, [0.3]], pyarrow.list_(pyarrow.float32())),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
    assert [answer for _, answer in pairs(tmp_path / "x.parquet")] == ["0.1", None, "1e-07"]
    assert [answer for _, answer in pairs(tmp_path / "x.parquet", answer_key="all")] == ["0.1", None, "0.3"]


def test_a_list_of_objects_is_no_label():
    with pytest.raises(InputError, match=r"x:1: 'a' must be text, a number or a list of those, got a list of objects"):
        label_text([{"content": "5"}], "a", "x:1")


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["NaN", "5"], "1 labels look like missing ones, such as 'NaN': leave them empty."),
        (["3,14", "5"], "1 labels look like decimal numbers with a comma, such as '3,14': write them with a point"),
        (["1,5", *map(str, range(20))], None),
        (["1,500", "2,000"], None),
        (["{'truth': '5'}"], "1 labels are objects, such as \"{'truth': '5'}\": name the key inside"),
        (["\\{1, 2\\}", "(1, 2)", "None", "none"], None),
    ],
)
def test_the_plan_names_doubtful_labels(labels, said):
    prompts = tuple(Prompt(ids=(1,), text="p", answer=label, index=i) for i, label in enumerate(labels))
    found = describe_data(Dataset(prompts=prompts, num_overlong=0, fingerprint=""))
    assert (not found and said is None) or (said is not None and found[0].startswith(said))
