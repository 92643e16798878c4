"""Records from real files of every format, from the hub and from the built-in task."""

from __future__ import annotations

import csv
import json
import math
import socket
from decimal import Decimal

import pyarrow
import pyarrow.parquet
import pytest

from mgrpo.data.records import load_records, read_records
from mgrpo.data.tables import unpack
from mgrpo.errors import InputError
from mgrpo.tasks.arithmetic import make_problems

ROWS = [{"prompt": "12+34=", "answer": "46"}, {"prompt": "50-08=", "answer": "42"}]
EXPECTED = [("12+34=", "46"), ("50-08=", "42")]
ORIGINS = {
    "x.jsonl": ["x.jsonl:1", "x.jsonl:2"],
    "x.json": ["x.json record 1", "x.json record 2"],
    "x.csv": ["x.csv:2", "x.csv:3"],
    "x.parquet": ["x.parquet row 1", "x.parquet row 2"],
    "x.JSONL": ["x.JSONL:1", "x.JSONL:2"],
}
MESSAGES = [{"role": "system", "content": "11"}, {"role": "user", "content": "22+33="}]


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def write_jsonl(path, rows):
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(path, columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def pairs(records):
    return [(record.prompt, record.answer) for record in records]


def write_rows(path):
    match path.suffix.lower():
        case ".jsonl":
            return write_jsonl(path, ROWS)
        case ".json":
            return write(path, json.dumps(ROWS, indent=1))
        case ".csv":
            return write(path, "prompt,answer\r\n12+34=,46\r\n50-08=,42\r\n")
        case _:
            return write_parquet(path, {key: [row[key] for row in ROWS] for key in ("prompt", "answer")})


@pytest.mark.parametrize("name", ORIGINS)
def test_each_format_gives_the_same_records_with_its_own_origins(tmp_path, name):
    records = load_records(write_rows(tmp_path / name))
    assert pairs(records) == EXPECTED
    assert [record.origin for record in records] == ORIGINS[name]


@pytest.mark.parametrize("wrap", [{"data": ROWS, "other": [1]}, {"version": 1, "train": ROWS}], ids=["data", "single"])
def test_json_list_under_a_key(tmp_path, wrap):
    assert pairs(load_records(write(tmp_path / "x.json", json.dumps(wrap)))) == EXPECTED


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv"])
def test_byte_order_mark_is_tolerated(tmp_path, name):
    write_rows(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    assert pairs(load_records(write(tmp_path / name, b"\xef\xbb\xbf" + content))) == EXPECTED


def test_folder_mixes_formats_in_order_of_names(tmp_path):
    for name in ("c.csv", "a.parquet", "b.jsonl"):
        write_rows(tmp_path / name)
    write(tmp_path / ".hidden.jsonl", "no json")
    write(tmp_path / "README.md", "no data")
    (tmp_path / "nested.jsonl").mkdir()
    write_jsonl(tmp_path / "nested.jsonl" / "d.jsonl", ROWS)
    origins = [record.origin for record in load_records(str(tmp_path))]
    assert origins == ["a.parquet row 1", "a.parquet row 2", "b.jsonl:1", "b.jsonl:2", "c.csv:2", "c.csv:3"]


def test_jsonl_blank_lines_count_and_unicode_line_separators_do_not(tmp_path):
    text = '{"prompt": "a\u2028b\u0085c"}\n\n  \n{"prompt": "d"}'
    records = load_records(write(tmp_path / "x.jsonl", text))
    assert [(r.prompt, r.origin) for r in records] == [("a\u2028b\u0085c", "x.jsonl:1"), ("d", "x.jsonl:4")]


def test_csv_quoted_newlines_commas_and_blank_lines(tmp_path):
    path = write(tmp_path / "x.csv", 'answer,prompt\n\n1,"a, b\r\nc ""d"""\n\n2,e\n')
    records = load_records(path)
    assert [(r.prompt, r.answer, r.origin) for r in records] == [
        ('a, b\r\nc "d"', "1", "x.csv:3"),
        ("e", "2", "x.csv:6"),
    ]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("7", "7"),
        (7, "7"),
        (7.0, "7.0"),
        (" x ", " x "),
        (True, "True"),
        (None, None),
        (math.nan, None),
        ("", None),
        (" \n", None),
    ],
)
def test_answers_become_text(tmp_path, value, expected):
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "p", "answer": value}])
    assert load_records(path)[0].answer == expected


def test_parquet_numbers_nulls_and_nan_as_answers(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", {"prompt": ["a", "b", "c"], "answer": [7.5, None, math.nan]})
    assert [record.answer for record in load_records(path)] == ["7.5", None, None]


def test_keys_are_chosen_and_other_columns_ignored(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", {"q": ["a"], "gold": [3], "answer": ["no"], "prompt": ["no"]})
    assert pairs(load_records(path, prompt_key="q", answer_key="gold")) == [("a", "3")]
    assert pairs(load_records(path, prompt_key="q", answer_key=None)) == [("a", None)]
    assert pairs(load_records(path, prompt_key="q", answer_key="absent")) == [("a", None)]


def test_chat_messages_are_the_same_from_json_and_from_parquet(tmp_path):
    named = [MESSAGES, [{"role": "user", "content": "1", "name": "ann"}]]
    parquet = write_parquet(tmp_path / "x.parquet", {"prompt": named})
    jsonl = write_jsonl(tmp_path / "x.jsonl", [{"prompt": prompt} for prompt in named])
    assert [r.prompt for r in load_records(parquet)] == named == [r.prompt for r in load_records(jsonl)]


@pytest.mark.parametrize(("spec", "operands"), [("3-5", (3, 4, 5)), ("4", (4,))])
def test_arithmetic_source_makes_the_built_in_problems(spec, operands):
    records = load_records(f"arithmetic:12:{spec}:9")
    problems = make_problems(12, operands=operands, seed=9)
    assert pairs(records) == [(problem.prompt, problem.answer) for problem in problems]
    assert [record.origin for record in records] == [f"arithmetic:{i}" for i in range(1, 13)]


@pytest.mark.parametrize(
    "source", ["arithmetic:0:3-7:0", "arithmetic:8:1-3:0", "arithmetic:8:5-3:0", "arithmetic:8", "arithmetic:x:3:0"]
)
def test_arithmetic_source_out_of_range(source):
    with pytest.raises(InputError, match=f"must be arithmetic:NUM:OPERANDS:SEED.*got '{source}'"):
        load_records(source)


BAD_FILES = {
    "json line": ("x.jsonl", '{"prompt": "a"}\n\n{"prompt": "b"\n', r"x\.jsonl:3: not valid JSON: Expecting ',' del"),
    "deep json": ("x.jsonl", "[" * 100_000, r"x\.jsonl:1: not valid JSON: .*recursion"),
    "long number": ("x.json", "\n[" + "1" * 5000 + "]", r"x\.json:1: not valid JSON: Exceeds the limit"),
    "json file": ("x.json", '[\n{"prompt": "a"},\n{"prompt" "b"}]', r"x\.json:3: not valid JSON: Expecting ':' del"),
    "json objects": (
        "x.json",
        '{\n"prompt": "a"}\n{"prompt": "b"}',
        r"x\.json:3: not valid JSON.*\.jsonl file",
    ),
    "two lists": ("x.json", '{"a": [], "b": []}', r"x\.json: file must hold one list.*keys a, b\. Write"),
    "no list": ("x.json", '"text"', r"x\.json: file must hold a list of records, got text"),
    "no object": ("x.jsonl", '{"prompt": "a"}\n["b"]', r"x\.jsonl:2: record must be an object, got a list"),
    "null record": ("x.json", '[{"prompt": "a"}, null]', r"x\.json record 2: record must be an object, got null"),
    "absent key": ("x.jsonl", '{"promt": "a", "id": 1}', r"x\.jsonl:1: .*got promt, id\. Did you mean 'promt'\?"),
    "no keys": ("x.jsonl", "{}", r"x\.jsonl:1: record must have the key 'prompt', got no keys\. Name"),
    "number": ("x.jsonl", '{"prompt": 5}', r"x\.jsonl:1: 'prompt' must be text or a list of .*, got int 5"),
    "list of text": ("x.jsonl", '{"prompt": ["a"]}', r"x\.jsonl:1: 'prompt' must be text .*, got a list"),
    "null": ("x.jsonl", '{"prompt": null}', r"x\.jsonl:1: 'prompt' must be text .*, got null"),
    "blank": ("x.jsonl", '{"prompt": " \\n"}', r"x\.jsonl:1: 'prompt' must hold text, got a blank"),
    "no message": ("x.jsonl", '{"prompt": []}', r"x\.jsonl:1: 'prompt' must hold text, got a blank"),
    "blank message": ("x.jsonl", '{"prompt": [{"role": "user", "content": ""}]}', r"x\.jsonl:1: .* got a blank"),
    "no content": ("x.jsonl", '{"prompt": [{"role": "user"}]}', r"x\.jsonl:1: each message of 'prompt' must have"),
    "no role": ("x.jsonl", '{"prompt": [{"content": "a"}]}', r"x\.jsonl:1: each message of 'prompt' must have"),
    "surrogate": ("x.jsonl", '\n{"prompt": "a\\ud83d"}', r"x\.jsonl:2: 'prompt' must be .*surrogate U\+D83D"),
    "surrogate content": (
        "x.jsonl",
        '{"prompt": [{"role": "user", "content": "a\\udc00"}]}',
        r"x\.jsonl:1: 'prompt' must be valid Unicode.*U\+DC00",
    ),
    "surrogate role": (
        "x.jsonl",
        '{"prompt": [{"role": "\\udc01", "content": "a"}]}',
        r"x\.jsonl:1: 'prompt' role must be valid Unicode.*U\+DC01",
    ),
    "surrogate answer": ("x.jsonl", '{"prompt": "a", "answer": "\\udc02"}', r"x\.jsonl:1: 'answer' must.*U\+DC02"),
    "answer lists": ("x.jsonl", '{"prompt": "a", "answer": [[1]]}', r"x\.jsonl:1: 'answer' must be text.*got a list"),
    "utf8 jsonl": ("x.jsonl", b'{"prompt": "a"}\n{"prompt": "\xff"}\n', r"x\.jsonl:2: not valid UTF-8"),
    "utf8 json": ("x.json", b'[\n\n{"prompt": "\xff"}]', r"x\.json:3: not valid UTF-8"),
    "utf8 csv": ("x.csv", b"\xef\xbb\xbfprompt\na\nb\n\xe9\n", r"x\.csv:4: not valid UTF-8"),
    "few fields": ("x.csv", 'prompt,answer\n"a\nb",1\nc\n', r"x\.csv:4: row must have 2 fields, got 1\."),
    "many fields": ("x.csv", "prompt,answer\na,1,2\n", r"x\.csv:2: row must have 2 fields, got 3\."),
    "open quote": ("x.csv", 'prompt\na\n"b\nc\n', r"x\.csv:3: not valid CSV: unexpected end of data"),
    "same columns": ("x.csv", "prompt,prompt\na,b\n", r"x\.csv:1: column names must differ, got prompt, prompt"),
    "semicolons": ("x.csv", "promt;answer\na;1\n", r"x\.csv:2: record must have .*got promt, answer\. Did you mean"),
    "csv blank prompt": ("x.csv", "prompt,answer\na,1\n,2\n", r"x\.csv:3: 'prompt' must hold text"),
    "no parquet": ("x.parquet", "PAR1 but no table", r"x\.parquet: not a readable parquet file after row 0"),
    "empty jsonl": ("x.jsonl", "\n\n", r"x\.jsonl: data set must hold at least one record"),
    "empty json": ("x.json", "[]", r"x\.json: data set must hold at least one record"),
    "empty csv": ("x.csv", "prompt,answer\n", r"x\.csv: data set must hold at least one record"),
    "unknown suffix": ("x.txt", "a", r"x\.txt: file name must end in \.jsonl, \.json, .*, got '\.txt'"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_refused_with_its_place(tmp_path, case):
    name, content, match = BAD_FILES[case]
    path = write(tmp_path / name, content)
    with pytest.raises(InputError, match=match) as error:
        load_records(path)
    assert str(error.value).startswith(path)


def test_parquet_without_the_key_lists_its_columns(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", {"question": ["a"], "prompts": ["b"]})
    with pytest.raises(InputError, match=r"x\.parquet row 1: .*got question, prompts\. Did you mean 'prompts'\?"):
        load_records(path)


def test_parquet_row_with_null_prompt(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", {"prompt": ["a"] * 1500 + [None]})
    with pytest.raises(InputError, match=r"x\.parquet row 1501: 'prompt' must be text .*, got null"):
        load_records(path)


def test_parquet_with_damaged_pages(tmp_path):
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": [f"p{i}" for i in range(500)]}), path, compression="zstd")
    content = path.read_bytes()
    write(path, content[:4] + b"\x55" * 200 + content[204:])
    with pytest.raises(InputError, match=r"x\.parquet: not a readable parquet file after row 0"):
        load_records(str(path))


def test_folder_without_data_is_refused(tmp_path):
    write(tmp_path / "README.md", "")
    with pytest.raises(
        InputError, match=r"folder must hold \.jsonl, \.json, \.parquet, \.csv, \.tsv, \.arrow files, got none"
    ):
        load_records(str(tmp_path))


@pytest.mark.parametrize("name", ["trian.jsonl", "./trian.jsonl"])
def test_missing_file_offers_the_nearest_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(InputError, match=rf"{name}: no such file or folder\. Did you mean train\.jsonl\?"):
        load_records(name)


def test_missing_file_in_a_missing_folder(tmp_path):
    with pytest.raises(InputError, match=r"none/x\.jsonl: no such file or folder\. Check the path"):
        load_records(str(tmp_path / "none" / "x.jsonl"))


def test_file_that_cannot_be_read(tmp_path):
    path = tmp_path / "x.jsonl"
    with socket.socket(socket.AF_UNIX) as server:  # opening a socket as a file fails, even for root
        server.bind(str(path))
        with pytest.raises(InputError, match=r"x\.jsonl: cannot be read: .*Check the file and its permissions"):
            load_records(str(path))


@pytest.mark.parametrize("source", ["", "  "])
def test_empty_source(source):
    with pytest.raises(InputError, match=r"source must be .* got an empty name"):
        load_records(source)


def test_overlong_name_is_a_missing_file():
    with pytest.raises(InputError, match="no such file or folder"):
        load_records("/" + "x" * 5000)


def test_hub_data_set(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, *, split):
        asked.append((name, split))
        return datasets.Dataset.from_list([{**row, "noise": 0} for row in ROWS])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    records = load_records("owner/name-v1.5", split="test")
    assert asked == [("owner/name-v1.5", "test")]
    assert pairs(records) == EXPECTED
    assert [record.origin for record in records] == ["owner/name-v1.5 row 1", "owner/name-v1.5 row 2"]
    with pytest.raises(InputError, match=r"name row 1: record must have the key 'text', got prompt, answer, noise"):
        load_records("name", prompt_key="text")


def test_unreachable_hub_data_set(tmp_path, monkeypatch):
    import datasets

    def load_dataset(name, *, split):
        raise ConnectionError("Couldn't reach the Hub.\nSecond line")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train").mkdir()
    match = (
        r"^trian: neither a path nor a reachable hub data set with split 'test': Couldn't reach the Hub\. "
        r"Did you mean train\? Check the name"
    )
    with pytest.raises(InputError, match=match):
        load_records("trian", split="test")


def test_records_come_one_at_a_time(tmp_path):
    path = write(tmp_path / "x.jsonl", '{"prompt": "a"}\n{"prompt": "b"}\nno json\n')
    records = read_records(path)
    assert [next(records).prompt, next(records).prompt] == ["a", "b"]
    with pytest.raises(InputError, match=r"x\.jsonl:3: not valid JSON"):
        next(records)


@pytest.mark.parametrize(
    ("kind", "shown"),
    [
        (pyarrow.binary(), "binary"),
        (pyarrow.timestamp("s"), r"timestamp\[ms\]"),
        (pyarrow.list_(pyarrow.string()), "list<"),
        (pyarrow.struct({"role": pyarrow.string()}), "struct<role"),
        (
            pyarrow.list_(pyarrow.struct({"parts": pyarrow.list_(pyarrow.string())})),
            r"list<element: struct<parts: list",
        ),
        (pyarrow.map_(pyarrow.string(), pyarrow.string()), "map<"),
        (pyarrow.json_(), r"extension<arrow\.json>"),
    ],
)
@pytest.mark.parametrize("key", ["prompt", "answer"])
def test_columns_of_other_types_are_named(tmp_path, key, kind, shown):
    table = {"prompt": ["a"], "answer": ["b"]} | {key: pyarrow.nulls(1, kind)}
    path = write_parquet(tmp_path / "x.parquet", table)
    if (key, kind) == ("answer", pyarrow.list_(pyarrow.string())):  # several answers, of which any is right
        assert load_records(path)[0].answer is None
        return
    with pytest.raises(InputError, match=rf"x\.parquet: column '{key}' must be text, a number or .*, got {shown}"):
        load_records(path)


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.string_view(),
        pyarrow.dictionary(pyarrow.int8(), pyarrow.string()),
    ],
)
def test_every_kind_of_text_is_read(tmp_path, kind):
    prompts = pyarrow.array(["a", "b", "a"]).cast(kind)
    messages = pyarrow.array([[{"role": "user", "content": p}] for p in "aba"])
    large = messages.cast(pyarrow.large_list(pyarrow.struct({"role": pyarrow.string(), "content": pyarrow.string()})))
    path = write_parquet(tmp_path / "x.parquet", {"prompt": prompts, "chat": large})
    assert [record.prompt for record in load_records(path)] == ["a", "b", "a"]
    records = load_records(path, prompt_key="chat", answer_key="prompt")
    assert pairs(records) == [([{"role": "user", "content": p}], p) for p in "aba"]


@pytest.mark.parametrize(
    ("kind", "value", "answer"),
    [
        (pyarrow.decimal128(5, 2), Decimal("1.50"), "1.50"),
        (pyarrow.decimal256(60, 2), Decimal("1.50"), "1.50"),
        (pyarrow.float16(), 1.5, "1.5"),
        (pyarrow.uint64(), 2**64 - 1, str(2**64 - 1)),
        (pyarrow.bool_(), True, "True"),
        (pyarrow.null(), None, None),
    ],
)
def test_every_kind_of_number_is_an_answer(tmp_path, kind, value, answer):
    path = write_parquet(tmp_path / "x.parquet", {"prompt": ["a"], "answer": pyarrow.array([value], kind)})
    assert load_records(path)[0].answer == answer


def test_columns_of_one_name_are_refused(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["prompt", "prompt"])
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"x\.parquet: column names must differ, got 'prompt' twice"):
        load_records(str(tmp_path / "x.parquet"))


def test_parquet_without_rows_or_key(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", {"question": pyarrow.array([], pyarrow.string())})
    with pytest.raises(InputError, match=r"x\.parquet: data set must hold at least one record"):
        load_records(path)


def test_a_message_lists_no_more_than_twenty_keys(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{f"{'key' * 99}{i}": 0 for i in range(1000)}])
    with pytest.raises(InputError, match=r"got keykey.*, \.\.\.\. Name the key") as error:
        load_records(path)
    assert len(str(error.value)) < 2500


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet", "x.json", "x.csv", "hub"])
def test_limits_hold_for_the_whole_source(tmp_path, monkeypatch, name):
    """Two files of a folder may together hold no more than one, and a hub data set no more than a file."""
    import datasets

    rows = [{"prompt": f"{i:03d}" + "x" * 1000, "answer": "1"} for i in range(100)]
    source = str(tmp_path)
    for number in (1, 2):
        path = tmp_path / f"{number}{name}"
        if name == "hub":
            source = "owner/name"
            monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_list(rows + rows))
        elif name == "x.parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        elif name == "x.csv":
            write(path, "prompt,answer\n" + "".join(f"{row['prompt']},1\n" for row in rows))
        else:
            write(path, json.dumps(rows) if name == "x.json" else "".join(json.dumps(row) + "\n" for row in rows))
    assert len(load_records(source)) == 200
    monkeypatch.setattr("mgrpo.inputs.MAX_TEXT_BYTES", 150_000)
    match = r"owner/name row 192: data up to here" if name == "hub" else rf"2{name}.*: data up to "
    with pytest.raises(InputError, match=match + r".* must have at most 0 MiB, got more\. Split or shorten"):
        load_records(source)
    monkeypatch.setattr("mgrpo.inputs.MAX_TEXT_BYTES", 1 << 30)
    monkeypatch.setattr("mgrpo.inputs.MAX_RECORDS", 150)
    with pytest.raises(InputError, match=r"(2x|owner).*: data set must have at most 150 records, got more\. Split"):
        load_records(source)


def test_hub_columns_of_other_types_are_named(monkeypatch):
    import datasets

    rows = [{"prompt": ["a", "b"], "answer": "1"}]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_list(rows))
    with pytest.raises(InputError, match=r"owner/name: column 'prompt' must be text, a number .*, got list<"):
        load_records("owner/name")


def test_hub_messages_and_selected_rows(monkeypatch):
    import datasets

    rows = [{"prompt": [{"role": "user", "content": f"{i}+1="}], "answer": i, "noise": [[i]]} for i in range(200)]
    dataset = datasets.Dataset.from_list(rows).select(range(199, 99, -1))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: dataset)
    records = load_records("owner/name")
    assert pairs(records) == [([{"role": "user", "content": f"{i}+1="}], str(i)) for i in range(199, 99, -1)]
    assert records[-1].origin == "owner/name row 100"


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.parquet"])
def test_a_machine_without_memory_is_an_input_error(tmp_path, monkeypatch, name):
    def fail(*args, **kwargs):
        raise MemoryError

    path = write_rows(tmp_path / name)
    monkeypatch.setattr(csv, "reader", fail)
    monkeypatch.setattr(json, "loads", fail)
    monkeypatch.setattr(pyarrow.parquet, "ParquetFile", fail)
    with pytest.raises(InputError, match=rf"{name}: data must fit into the memory of this machine, got more"):
        load_records(path)


@pytest.mark.parametrize("key", ["prompt", "answer"])
def test_a_row_beyond_the_limit_of_a_record_is_named(tmp_path, monkeypatch, key):
    import datasets

    rows = [{"prompt": "a", "answer": "b"}, {"prompt": "a", "answer": "b", key: "x" * (5 << 20)}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_list(rows))
    for source in (str(tmp_path / "x.parquet"), "owner/name"):
        with pytest.raises(InputError, match=r" row 2: record must have at most 4 MiB, got more\. Split or shorten"):
            load_records(source)


def test_messages_of_sliced_and_null_lists_are_counted_where_they_are():
    chat = [[{"role": "user", "content": "x" * n}] * k for n, k in ((10, 1), (20, 2), (30, 0), (40, 3))]
    table = pyarrow.table({"prompt": [*chat, None], "answer": ["a", None, "ccc", "d", "e"]})
    batch = table.to_batches()[0].slice(1, 4)
    spent = []

    class Budget:
        def spend(self, num_bytes, where):
            spent.append((num_bytes, where))

        def check_record(self, num_bytes, where):
            spent.append((num_bytes, where))

    rows = list(unpack(batch, "x", 10, Budget()))
    assert [row["prompt"] for row in rows] == [*chat[1:], None]
    each = [(48, "x row 11"), (3, "x row 12"), (133, "x row 13"), (1, "x row 14")]
    assert spent == [(185, "x row 14"), *each]
