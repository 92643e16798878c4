"""Files as people have them: separators, packed text, saved folders, tables in JSON, conversations, keys of objects."""

from __future__ import annotations

import gzip
import json
import re
import zlib

import datasets
import numpy
import pandas
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from mgrpo.data.keys import ABSENT, look_up
from mgrpo.data.records import load_records
from mgrpo.errors import InputError
from mgrpo.grading.label_text import label_text

ROWS = [{"prompt": "What is 1+1?", "answer": "2"}, {"prompt": 'Say "a, b; c"\nand 2+3', "answer": "5"}]
PAIRS = [(row["prompt"], row["answer"]) for row in ROWS]
TABLE = pandas.DataFrame(ROWS)
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def pairs(source, **options):
    return [(record.prompt, record.label) for record in load_records(str(source), **options)]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def save(path, dataset):
    dataset.save_to_disk(path)
    return path


@pytest.fixture(autouse=True)
def _quiet():
    datasets.disable_progress_bars()


# ---- separators


@pytest.mark.parametrize("name", ["x.csv", "x.tsv"])
@pytest.mark.parametrize("separator", list(",;\t|"))
def test_the_header_tells_the_separator(tmp_path, name, separator):
    TABLE.assign(note="1,5; x\ty | z").to_csv(tmp_path / name, sep=separator, index=False)
    assert pairs(tmp_path / name) == PAIRS
    TABLE.to_csv(tmp_path / name, sep=separator, encoding="utf-8-sig")  # with a column of numbers without a name
    assert pairs(tmp_path / name) == PAIRS


SHEETS = {
    "spaces after commas": "prompt, answer\n1+1=, 2\n2+3=, 5\n",
    "spaces around names": " prompt , answer \n1+1=,2\n2+3=,5\n",
    "quotes after spaces": 'prompt, answer\n"1+1=", "2"\n2+3=, 5\n',
    "empty columns": "prompt,answer,,\n1+1=,2,,\n2+3=,5\n",
    "empty cells behind": "prompt,answer\n1+1=,2,,\n2+3=,5,\n",
    "empty rows": "prompt;answer\n;\n1+1=;2\n2+3=;5\n;\n  ; \n;",
    "separator line": 'sep=;\r\nprompt;answer\r\n1+1=;2\r\n"2+3=";5\r\n',
    "byte order mark": "\ufeffprompt;answer\n1+1=;2\n2+3=;5\n",
    "column without a name": ",prompt,answer\n0,1+1=,2\n1,2+3=,5\n",
    "commas in other names": 'prompt;answer;"a, b, c, d"\n1+1=;2;x\n2+3=;5;x\n',
}


@pytest.mark.parametrize("case", SHEETS)
def test_spreadsheets_are_read_as_they_are_saved(tmp_path, case):
    path = write(tmp_path / "x.csv", SHEETS[case])
    assert pairs(path, need_answer=True) == [("1+1=", "2"), ("2+3=", "5")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt;answer\n1;2;3\n", r"x\.csv:2: row must have 2 fields, got 3\. Put fields that hold a semicolon"),
        ("prompt,answer,\n1,2,3\n", r"x\.csv:2: row must have 2 fields, got 3\. Put fields that hold a comma"),
        ("prompt\tanswer\n1\n", r"x\.csv:2: row must have 2 fields, got 1\. Put fields that hold a tab"),
        ("prompt, prompt\n1,2\n", r"x\.csv:1: column names must differ, got prompt, prompt"),
        ("question;answer\n1;2\n", r"x\.csv:2: record must have the key 'prompt', got question, answer\. Did you mean"),
        ("sep=;\nprompt;answer\n\n1\n", r"x\.csv:4: row must have 2 fields, got 1"),
    ],
)
def test_errors_of_other_separators_name_them_and_the_line(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        load_records(str(write(tmp_path / "x.csv", text)))


# ---- JSON


JSONS = {
    "lines.json": LINES,
    "marked.json": "\ufeff" + LINES,
    "spaced.json": "\n \n" + LINES.replace("\n", "\n\n"),
    "one.json": LINES.splitlines()[0] + "\n",
    "list.jsonl": json.dumps(ROWS, indent=1),
    "lines.ndjson": LINES,
    "split.json": TABLE.to_json(orient="split"),
    "records.json": TABLE.to_json(orient="records"),
    "columns.json": TABLE.to_json(orient="columns"),
    "index.json": TABLE.to_json(orient="index"),
    "table.json": TABLE.to_json(orient="table"),
    "lists.json": json.dumps(TABLE.to_dict(orient="list")),
    "splits.json": json.dumps({"test": [{"prompt": "no"}], "train": ROWS}),
    "single.json": json.dumps(ROWS[0], indent=1),
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("name", JSONS)
def test_every_form_of_json_is_read(tmp_path, name, packed):
    content = JSONS[name].encode()
    path = write(tmp_path / (name + ".gz" * packed), gzip.compress(content) if packed else content)
    assert pairs(path) == (PAIRS[:1] if name in ("one.json", "single.json") else PAIRS)


def test_lines_in_a_json_file_have_no_limit_of_whole_files(tmp_path, monkeypatch):
    """What Dataset.to_json writes of much data is read line by line."""
    monkeypatch.setattr("mgrpo.data.files.MAX_WHOLE_BYTES", 1000)
    path = write(tmp_path / "x.json", LINES * 100)
    assert len(load_records(str(path))) == 200
    assert load_records(str(path))[199].origin == "x.json:200"
    with pytest.raises(InputError, match=r"\.json file must have at most 0 MiB, got more\. Turn it into \.jsonl"):
        load_records(str(write(path, json.dumps(ROWS * 100))))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"columns": ["prompt"], "data": [["a"], ["b", "c"]]},
            "2: row must be a list of 1 values, got a list of 2",
        ),
        ({"columns": ["prompt"], "data": [["a"], 5]}, "record 2: row must be a list of 1 values, got int 5"),
        (
            {"prompt": ["a", "b"], "answer": ["c"]},
            "as many rows as the prompt's column, 2, got 1 in 'answer'",
        ),
        (
            {"prompt": {"0": "a", "1": "b"}, "answer": {"0": "c", "2": "d"}},
            "column must have the row '1', got none",
        ),
        (
            {"prompt": {"0": "a"}, "answer": {"0": "c", "1": "d"}},
            "as many rows as the prompt's column, 1, got 2 in 'answer'",
        ),
        ([["a", "2"]], "record 1: record must be an object, got a list"),
        ({"a": {"prompt": "x"}, "b": {}}, "must hold one list of records, got an object with keys a, b"),
    ],
)
def test_tables_in_json_that_do_not_fit_are_refused(tmp_path, content, message):
    with pytest.raises(InputError, match=re.escape(message)):
        load_records(str(write(tmp_path / "x.json", json.dumps(content))))


# ---- packed text


@pytest.mark.parametrize("name", ["x.csv.gz", "x.tsv.gz", "x.csv", "X.CSV.GZ"])
def test_packed_tables_are_unpacked_whatever_their_name(tmp_path, name):
    TABLE.to_csv(tmp_path / name, index=False, sep="\t" if "tsv" in name else ",", compression="gzip")
    assert pairs(tmp_path / name) == PAIRS
    assert load_records(str(tmp_path / name))[0].origin == f"{name}:2"


def test_a_folder_may_hold_packed_files(tmp_path):
    write(tmp_path / "a.jsonl.gz", gzip.compress(LINES.encode()))
    write(tmp_path / "b.tsv", "prompt\tanswer\n1\t1\n")
    write(tmp_path / "c.txt.gz", b"")
    assert pairs(tmp_path) == [*PAIRS, ("1", "1")]


BOMB = {"jsonl": "line must have at most 4 MiB", "json": "at most 64 MiB", "csv": "at most 64 MiB", "tsv": "at most 64"}


@pytest.mark.fault("text that is packed a thousand times smaller")
@pytest.mark.parametrize("suffix", BOMB)
def test_packed_bombs_are_refused_as_text_of_their_size(tmp_path, suffix):
    pack = zlib.compressobj(9, wbits=31)
    content = b"".join(pack.compress(b" " * (1 << 20)) for _ in range(80)) + pack.flush()
    path = write(tmp_path / f"x.{suffix}.gz", content)
    assert path.stat().st_size < 200_000
    with pytest.raises(InputError, match=BOMB[suffix]):
        load_records(str(path))


def test_packed_lines_count_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("mgrpo.inputs.MAX_TEXT_BYTES", 5000)
    path = write(tmp_path / "x.jsonl.gz", gzip.compress(LINES.encode() * 100))
    with pytest.raises(InputError, match=r"x\.jsonl\.gz:\d+: data up to here must have at most"):
        load_records(str(path))


@pytest.mark.parametrize("damage", ["cut", "flipped", "no gzip"])
def test_damaged_packed_files_are_refused(tmp_path, damage):
    content = gzip.compress(LINES.encode() * 50)
    content = {"cut": content[:-20], "flipped": content[:40] + b"\xff" * 9 + content[49:], "no gzip": b"PK\3\4" * 9}[
        damage
    ]
    with pytest.raises(InputError, match=r"x\.jsonl\.gz(: cannot be read|:1: not valid)"):
        load_records(str(write(tmp_path / "x.jsonl.gz", content)))


# ---- saved data sets


def test_a_saved_data_set_is_read_in_the_order_of_its_tables(tmp_path):
    rows = [{"prompt": f"{i}+1=", "answer": i + 1, "noise": [[i]]} for i in range(300)]
    dataset = datasets.Dataset.from_list(rows).select(range(299, -1, -1))
    folder = save(tmp_path / "saved", dataset.rename_column("noise", "extra"))
    dataset.save_to_disk(tmp_path / "shards", num_shards=3)
    for source in (folder, tmp_path / "shards"):
        records = load_records(str(source), need_answer=True)
        assert [(r.prompt, r.answer) for r in records] == [(f"{i}+1=", str(i + 1)) for i in range(299, -1, -1)]
    assert records[-1].origin == "data-00002-of-00003.arrow row 100"
    (file,) = folder.glob("*.arrow")
    assert pairs(file) == pairs(folder)


def test_the_split_of_a_saved_dict_is_chosen(tmp_path):
    splits = {name: datasets.Dataset.from_list([{"prompt": name, "answer": "1"}]) for name in ("train", "test")}
    folder = save(tmp_path / "saved", datasets.DatasetDict(splits))
    assert pairs(folder) == [("train", "1")]
    assert pairs(folder, split="test") == [("test", "1")]
    with pytest.raises(InputError, match=r"one of train, test, got 'tset'\. Did you mean 'test'\?"):
        load_records(str(folder), split="tset")


def test_the_cache_of_the_package_datasets_is_read(tmp_path):
    with datasets.arrow_writer.ArrowWriter(path=str(tmp_path / "json-train.arrow")) as writer:
        writer.write_table(pyarrow.table({"prompt": ["1+1="], "answer": ["2"]}))
        writer.finalize()
    write(tmp_path / "dataset_info.json", json.dumps({"features": {}, "splits": {"train": [1]}}))
    assert pairs(tmp_path) == [("1+1=", "2")]


def write_arrow(path, table, *, footer=False, compression=None):
    options = pyarrow.ipc.IpcWriteOptions(compression=compression)
    new = pyarrow.ipc.new_file if footer else pyarrow.ipc.new_stream
    with new(str(path), table.schema, options=options) as writer:
        writer.write_table(table, 2)
    return path


@pytest.mark.parametrize("footer", [False, True], ids=["stream", "file"])
def test_arrow_files_are_read_and_packed_ones_refused(tmp_path, footer):
    texts = pyarrow.array([row["prompt"] for row in ROWS] * 2).dictionary_encode()
    table = pyarrow.table({"prompt": texts, "answer": [2, 5] * 2, "other": [[{"a": 1}]] * 4})
    assert pairs(write_arrow(tmp_path / "x.arrow", table, footer=footer)) == PAIRS * 2
    for compression in ("zstd", "lz4"):
        write_arrow(tmp_path / "x.arrow", table, footer=footer, compression=compression)
        with pytest.raises(InputError, match=r"x\.arrow: values must be uncompressed, got compressed ones"):
            load_records(str(tmp_path / "x.arrow"))


def test_limits_hold_for_arrow_files(tmp_path, monkeypatch):
    path = write_arrow(tmp_path / "x.arrow", pyarrow.table({"prompt": ["a" * 3000] * 40, "answer": ["1"] * 40}))
    monkeypatch.setattr("mgrpo.inputs.MAX_TEXT_BYTES", 100_000)
    with pytest.raises(InputError, match=r"x\.arrow row 34: data up to here must have at most"):
        load_records(str(path))
    monkeypatch.setattr("mgrpo.inputs.MAX_RECORDS", 7)
    with pytest.raises(InputError, match=r"x\.arrow: data set must have at most 7 records, got more"):
        load_records(str(path))
    write_arrow(path, pyarrow.table({"prompt": [pyarrow.scalar("x" * (5 << 20)).as_py()]}))
    with pytest.raises(InputError, match=r"x\.arrow row 1: record must have at most 4 MiB"):
        monkeypatch.undo()
        load_records(str(path))


@pytest.mark.parametrize("entry", ["../secret.arrow", "/etc/passwd", "", ".", 5, None])
def test_a_saved_folder_names_nothing_outside_itself(tmp_path, entry):
    folder = save(tmp_path / "saved", datasets.Dataset.from_list(ROWS))
    write(folder / "state.json", json.dumps({"_data_files": [{"filename": entry}]}))
    with pytest.raises(InputError, match=r"state\.json: file must name tables of its folder, got others"):
        load_records(str(folder))


def test_folders_that_hold_data_further_down_are_named(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.jsonl", LINES)
    with pytest.raises(InputError, match=r"files, got none\. There are some in data\. Name the folder"):
        load_records(str(tmp_path))


# ---- conversations


ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
CONVERSATIONS = {
    "ShareGPT": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "1+1?"}],
    "other roles": [{"role": "System", "content": "Be brief."}, {"role": "prompter", "content": "1+1?"}],
    "parts": [
        {"role": "system", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        {"role": "user", "content": [{"text": "1+1?", "type": "input_text"}]},
    ],
    "texts": [{"role": "system", "content": ["Be brief."]}, {"role": "user", "content": "1+1?"}],
    "nulls": [
        {"role": "system", "content": "Be brief.", "from": None},
        {"role": "user", "content": "1+1?", "value": None},
    ],
}


@pytest.mark.parametrize("form", ["jsonl", "parquet", "arrow"])
@pytest.mark.parametrize("case", CONVERSATIONS)
def test_conversations_come_to_one_form(tmp_path, case, form):
    rows = [{"conversations": CONVERSATIONS[case], "reward_model": {"style": "rule", "ground_truth": "2"}}]
    path = tmp_path / f"x.{form}"
    if form == "jsonl":
        write(path, json.dumps(rows[0]))
    elif case == "texts":
        return  # no column may hold text beside lists
    elif form == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        write_arrow(path, pyarrow.Table.from_pylist(rows))
    options = {"prompt_key": "conversations", "answer_key": "reward_model.ground_truth"}
    assert pairs(path, **options) == [(ASKED, "2")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"type": "image_url", "image_url": {"url": "x"}}], "must be text, got a part of type 'image_url'"),
        ([{"type": "text", "text": "a"}, {"type": "image"}], "must be text, got a part of type 'image'"),
        ([{"type": "text"}], "must be text, got a part with null"),
        ([["a"]], "must be text, got a part with a list"),
        ({"type": "audio"}, "must be text, got a part of type 'audio'"),
        (5, "must have a 'role' and a 'content' of text"),
    ],
)
def test_parts_that_are_no_text_are_refused_by_name(tmp_path, content, message):
    path = write(tmp_path / "x.jsonl", json.dumps({"prompt": [{"role": "user", "content": content}]}))
    with pytest.raises(InputError, match=rf"x\.jsonl:1: each .*{message}"):
        load_records(str(path))


def test_parts_of_messages_are_counted(tmp_path):
    """A row of a few bytes may not stand for any number of them."""
    parts = pyarrow.array([[{"role": "user", "content": [{"text": ""}] * 20_000}]])
    pyarrow.parquet.write_table(pyarrow.table({"prompt": parts}), tmp_path / "x.parquet")
    write_arrow(tmp_path / "x.arrow", pyarrow.table({"prompt": parts}))
    for name in ("x.parquet", "x.arrow"):
        with pytest.raises(InputError, match=r"row 1: 'prompt' must have at most 16384 messages, got 20000"):
            load_records(str(tmp_path / name))


# ---- keys


@pytest.mark.parametrize(
    ("row", "key", "value"),
    [
        ({"a": {"b": 1}}, "a.b", 1),
        ({"a": {"b": 1}, "a.b": 2}, "a.b", 2),
        ({"a": {"b.c": 1}}, "a.b.c", 1),
        ({"a.b": {"c": 1}, "a": {"b": {"c": 2}}}, "a.b.c", 1),
        ({"a": {"b": {"c": {"d": None}}}}, "a.b.c.d", None),
        ({"a": [1]}, "a.0", ABSENT),
        ({"a": {"b": 1}}, "a.c", ABSENT),
        ({"a": "b"}, "a.b", ABSENT),
        ({"": {"": 1}}, ".", ABSENT),
    ],
)
def test_dots_reach_into_objects(row, key, value):
    assert look_up(row, key) == value or look_up(row, key) is value


NESTED = [
    {
        "data_source": "sums",
        "prompt": ASKED,
        "reward_model": {"style": "rule", "ground_truth": "2"},
        "extra_info": {"i": 0},
    },
    {
        "data_source": "sums",
        "prompt": ASKED,
        "reward_model": {"style": "rule", "ground_truth": None},
        "extra_info": {"i": 1},
    },
]
DOTTED = [{"q": {"text": f"{i}?"}, "a.b": f"{i}", "a": {"b": "no"}} for i in range(3)]
WRITERS = {
    "jsonl": lambda path, rows: write(path, "".join(json.dumps(row) + "\n" for row in rows)),
    "json": lambda path, rows: write(path, json.dumps(rows)),
    "parquet": lambda path, rows: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path),
    "arrow": lambda path, rows: write_arrow(path, pyarrow.Table.from_pylist(rows)),
    "saved": lambda path, rows: datasets.Dataset.from_list(rows).save_to_disk(path),
}


@pytest.mark.parametrize("form", WRITERS)
def test_keys_of_objects_in_every_form(tmp_path, monkeypatch, form):
    path = tmp_path / f"x.{form}"
    WRITERS[form](path, NESTED)
    assert pairs(path, answer_key="reward_model.ground_truth", need_answer=True) == [(ASKED, "2"), (ASKED, None)]
    assert pairs(path, answer_key="extra_info.i", need_answer=True) == [(ASKED, "0"), (ASKED, "1")]
    match = (
        r"must be the key of an answer, got 'ground_truht', which no record has\. Keys are data_source, prompt, "
        r"reward_model\.style, reward_model\.ground_truth, extra_info\.i\. Did you mean 'reward_model\.ground_truth'\?"
    )
    with pytest.raises(InputError, match=match):
        load_records(str(path), answer_key="ground_truht", need_answer=True)
    assert pairs(path, answer_key="ground_truht") == [(ASKED, None)] * 2
    with pytest.raises(InputError, match=r"such as reward_model\.style.*reward_model\.ground_truth"):
        load_records(str(path), answer_key="reward_model")


@pytest.mark.parametrize("form", WRITERS)
def test_a_key_with_a_dot_in_its_name_wins(tmp_path, form):
    path = tmp_path / f"x.{form}"
    WRITERS[form](path, DOTTED)
    assert pairs(path, prompt_key="q.text", answer_key="a.b") == [(f"{i}?", f"{i}") for i in range(3)]


def test_only_the_wanted_field_of_an_object_is_unpacked(tmp_path):
    """Beside it may lie what no record may hold."""
    rows = [{"prompt": "1+1=", "reward_model": {"ground_truth": "2", "log": "x" * (5 << 20), "maps": [["y"]]}}]
    for form in ("parquet", "arrow", "saved"):
        WRITERS[form](tmp_path / f"x.{form}", rows)
        assert pairs(tmp_path / f"x.{form}", answer_key="reward_model.ground_truth") == [("1+1=", "2")]


def test_an_absent_key_is_looked_for_in_all_records_and_files(tmp_path):
    write(tmp_path / "a.jsonl", '{"prompt": "a"}\n' * 3)
    write(tmp_path / "b.jsonl", '{"prompt": "b"}\n{"prompt": "c", "gold": null}\n')
    assert len(load_records(str(tmp_path), answer_key="gold", need_answer=True)) == 5
    with pytest.raises(InputError, match=r"got 'glod', .*\. Keys are prompt, gold\. Did you mean 'gold'"):
        load_records(str(tmp_path), answer_key="glod", need_answer=True)
    with pytest.raises(InputError, match=r"Keys are prompt, answer\."):
        load_records(str(write(tmp_path / "x.csv", "prompt, answer\n1,2\n")), answer_key="solution", need_answer=True)


# ---- answers


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (["42"], "42"),
        ([42], "42"),
        ([], None),
        ([None, "", float("nan")], None),
        (["1/2", "0.5", "1/2"], ("1/2", "0.5")),
        ([1, None, 2], ("1", "2")),
    ],
)
def test_lists_of_answers_are_alternatives(tmp_path, value, label):
    write(tmp_path / "x.jsonl", json.dumps({"prompt": "p", "answer": value}))
    assert load_records(str(tmp_path / "x.jsonl"))[0].label == label
    texts = [None if item is None or item != item else str(item) for item in value]
    for form in ("parquet", "arrow"):
        column = pyarrow.array([texts], pyarrow.list_(pyarrow.string()))
        table = pyarrow.table({"prompt": ["p"], "answer": column})
        pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
        write_arrow(tmp_path / "x.arrow", table)
        assert load_records(str(tmp_path / f"x.{form}"))[0].label == label


def test_answers_of_one_record_are_limited(tmp_path):
    write(tmp_path / "x.jsonl", json.dumps({"prompt": "p", "answer": list(range(65))}))
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["p"], "answer": [list(range(65))]}), tmp_path / "x.parquet")
    for name in ("x.jsonl", "x.parquet"):
        with pytest.raises(InputError, match=r"1: 'answer' must have at most 64 answers, got 65"):
            load_records(str(tmp_path / name))


def test_numbers_of_numpy_are_answers():
    values = [
        numpy.float32(3.5),
        numpy.int64(42),
        numpy.array(["7"]),
        numpy.array(5),
        numpy.str_("x"),
        numpy.bool_(True),
    ]
    assert [label_text(value, "answer", "t:1") for value in values] == ["3.5", "42", "7", "5", "x", "True"]
    assert label_text(numpy.array([1, 2]), "answer", "t:1") == ("1", "2")
    assert label_text(numpy.float64("nan"), "answer", "t:1") is None
