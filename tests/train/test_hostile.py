"""Hostile answers, data and models: no exception but InputError, no hang, no code run, memory within what is stated."""

from __future__ import annotations

import json
import math
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mgrpo.answers import AnswerChecker, canonicalize, make_extractor
from mgrpo.config import ModelConfig
from mgrpo.data import make_dataset
from mgrpo.policy import load_model, load_tokenizer, resolve_path
from mgrpo.records import InputError, load_records
from mgrpo.tasks.arithmetic import make_tokenizer

EXTRACTORS = [make_extractor(spec) for spec in ("boxed", "hash", "last-number", r"regex:#(\d\d)")]

# fmt: off
HAND_MADE = [
    "9**9**9**9", "9^{9^{9^{9}}}", "2^{2^{2^{2^{2^{2}}}}}", "10**10**10", "(10^9)!", "((9!)!)!", r"\sqrt[10^{9}]{2}",
    "9" * 4301, "1e999999999", "1e-999999999", "0." + "3" * 5000, "1/" + "9" * 300, "-" * 3000 + "1", "5!" * 100,
    r"\frac{" * 2000 + "1", r"\frac{1}{" * 500 + "2" + "}" * 500, "(" * 5000, "{" * 5000 + "}" * 5000, "[" * 999,
    r"\sqrt{" * 120 + "x" + "}" * 120, r"\left(" * 200, r"\boxed{" * 999, "$" * 999, "\\" * 999, "^" * 299, "_" * 299,
    r"\int_0^{\infty} e^{-x^{x^{x}}} dx", r"\sum_{n=1}^{10^{9}} n^{n}", r"\lim_{x\to0}\frac{\sin x}{x}",
    "x^x^x^x^x=y", r"\prod_{k=1}^{10^7} k", r"\binom{10^9}{5\cdot 10^8}", r"\zeta(1)", r"\Gamma(10^{12})",
    "factorial(10**8)", "gamma(1e300)", "\0", "1\0", "\0" * 500, "\u202e21\u202c", "\u200f7\u200e", "\ufeff7",
    "7\u0307" * 99, "\ud800", "1\udfff2", "\U0010ffff", "٤٢", "¹²³", "½", "Ⅻ", "一百", "\x1b[31m7\x1b[0m", "7\r\n7",
    "7\u2028", "NaN", "inf", "-inf", "nan + inf i", "0/0", "1/0", "__import__('os').system('touch SPRUNG')",
    'exec(\'open("SPRUNG","w")\')', "open('SPRUNG','w').write('x')", "lambda: 0",
    r"\text{__import__('os').system('touch SPRUNG')}", "eval(compile('1','','eval'))", "().__class__.__base__",
    "x.__class__", "{x:x}", "{1,2,3}", "[1,2),(3,4]", "x=1,y=2", "1,000,000", "1 000", "50%", "\\%", "$5", "5 cm",
    "12:30", "a or b", "A" * 300, "<script>alert(1)</script>", "'; DROP TABLE answers; --", "%s%n%x", "${7*7}",
    "{{7*7}}", "../../etc/passwd", "\\input{/etc/passwd}",
]
# fmt: on
PIECES = [
    *HAND_MADE,
    "1",
    "2",
    "x",
    "y",
    "+",
    "-",
    "*",
    "/",
    "^",
    "**",
    "=",
    "!",
    r"\frac",
    "{",
    "}",
    "(",
    ")",
    r"\sqrt",
    ",",
    ".",
    " ",
]

texts = st.one_of(
    st.sampled_from(HAND_MADE),
    st.lists(st.sampled_from(PIECES), max_size=8).map("".join),
    st.text(max_size=80),
    st.text(alphabet=st.characters(), max_size=40).map(lambda text: r"\boxed{" + text + "}"),
    st.text(alphabet=r"0123456789+-*/^(){}\frac sqrt=x.,!", max_size=60),
    st.integers(-(10**400), 10**400).map(str),
    st.floats().map(str),
)
GROUP = 20


@pytest.fixture(scope="module")
def checker():
    """Workers with the smallest limits that are of use."""
    with AnswerChecker(timeout_s=0.5, num_workers=2) as made:
        yield made


def read_all(text: str) -> list[str]:
    """What the extractors make of a text, which is also taken as an answer itself."""
    return [text, *(found for extract in EXTRACTORS if (found := extract(text)) is not None)]


@pytest.mark.fault("hostile answers: 500, and 10,000 in chaos-full")
@pytest.mark.parametrize("rounds", [25, pytest.param(500, marks=pytest.mark.long)])
def test_hostile_answers_are_classed_in_bounded_time_and_memory(checker, tmp_path, monkeypatch, rounds):
    """Groups of 20, read by every extractor and compared by algebra: classes for all, and every worker within 2 GiB."""
    monkeypatch.chdir(tmp_path)
    slowest, seen = 0.0, 0

    @settings(max_examples=rounds, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(texts, min_size=GROUP, max_size=GROUP))
    def judge(group):
        nonlocal slowest, seen
        answers = [answer for text in group for answer in read_all(text)]
        start = time.perf_counter()
        classes = checker.classes(answers)
        slowest, seen = max(slowest, time.perf_counter() - start), seen + len(group)
        assert len(classes) == len(answers)
        same: dict[str, int] = {}
        for answer, number in zip(answers, classes, strict=True):
            assert same.setdefault(canonicalize(answer), number) == number

    judge()
    assert seen >= rounds * GROUP
    assert slowest < 60, slowest
    assert list(tmp_path.iterdir()) == []
    for pid in checker.worker_pids:
        assert resource.prlimit(pid, resource.RLIMIT_AS) == (2 << 30, 2 << 30)


@pytest.mark.fault("hand-made hostile answers against each other")
def test_every_hand_made_answer_is_compared_with_its_neighbours(checker, tmp_path, monkeypatch):
    """Two at a time, so that no limit on undecided pairs hides one; what is not decided is different."""
    monkeypatch.chdir(tmp_path)
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for first, second in zip(HAND_MADE, [*HAND_MADE[1:], "1"], strict=True):
        assert checker.equivalent(first, second) in (True, False)
        assert checker.is_correct(first, first) == bool(canonicalize(first))
    assert list(tmp_path.iterdir()) == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - own < 200 << 10
    assert checker.equivalent(r"\frac{1}{2}x", "x/2")


@pytest.mark.fault("answers of a megabyte")
@pytest.mark.parametrize("piece", ["9", "(", r"\frac{", r"\boxed{", "#", "-", "$", "}", "\0", "x+"])
def test_a_megabyte_is_read_and_classed_quickly(piece):
    text = piece * ((1 << 20) // len(piece))
    with AnswerChecker() as fresh:
        start = time.perf_counter()
        answers = read_all(text)
        assert fresh.classes([*answers, "7"])[-1] >= 0
        assert time.perf_counter() - start < 10


# ---- data

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(HAND_MADE),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "x", 1]), "content": VALUES}), max_size=3
)
RECORDS = st.fixed_dictionaries(
    {}, optional={"prompt": st.one_of(VALUES, MESSAGES), "answer": VALUES, "question": VALUES}
)


@pytest.mark.fault("10,000 hostile data records")
def test_hostile_records_are_read_or_refused(tmp_path):
    """Files of four lines, as JSON or as bytes: records with prompts, or an InputError that names the file."""
    tokenizer, path, outcomes = make_tokenizer(), tmp_path / "data.jsonl", {"read": 0, "refused": 0}

    @settings(max_examples=2500, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.one_of(RECORDS, VALUES, st.binary(max_size=40)), min_size=4, max_size=4))
    @example([{"prompt": "1+1=", "answer": math.nan}] * 4)
    @example([{"prompt": "1+1=", "answer": 10**400}] * 4)
    def read(lines):
        encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        path.write_bytes(b"\n".join(encoded))
        try:
            records = load_records(str(path))
            data = make_dataset(records, tokenizer, template=None, max_prompt_tokens=200, overlong="drop")
        except InputError as error:
            outcomes["refused"] += 1
            assert len(str(error)) < 2000
        else:
            outcomes["read"] += 1
            assert all(prompt.ids for prompt in data.prompts)
            assert all(isinstance(record.answer, str | None) for record in records)

    read()
    assert min(outcomes.values()) > 0, outcomes


@pytest.mark.parametrize("answer", ["NaN", "Infinity", "null", '""', '"  "', '"\\u0000"', "-0", "1e400", "9" * 4000])
def test_odd_labels_are_labels_or_none(tmp_path, answer):
    path = tmp_path / "data.jsonl"
    path.write_text(f'{{"prompt": "1+1=", "answer": {answer}}}\n')
    (record,) = load_records(str(path))
    assert record.answer is None or record.answer.strip()
    assert (record.answer is None) == (answer in ("NaN", "null", '""', '"  "'))


@pytest.mark.fault("data lines beyond the limit")
def test_a_line_of_a_megabyte_is_read_and_one_of_eight_refused(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "1" * (1 << 20)}) + "\n")
    assert len(load_records(str(path))[0].prompt) == 1 << 20
    path.write_text(json.dumps({"prompt": "1+1="}) + "\n" + json.dumps({"prompt": "1" * (8 << 20)}) + "\n")
    with pytest.raises(InputError, match=r"data.jsonl:2: line must have at most 4 MiB, got more"):
        load_records(str(path))
    with path.open("wb") as file:
        file.truncate(40 << 30)  # 40 GiB without a newline, and without a block on the disk
    with pytest.raises(InputError, match=r":1: line must have at most 4 MiB"):
        load_records(str(path))
    other = path.with_suffix(".json")
    path.rename(other)
    with pytest.raises(InputError, match=r"must have at most 1024 MiB"):
        load_records(str(other))


def bomb(path: Path, kind: str) -> None:
    """A parquet file of a few hundred bytes that stands for many gigabytes, or for one."""
    one = "x" * (1 << 20)
    if kind == "dictionary":
        codes = pyarrow.array([0] * 100_000, pyarrow.int32())
        column = pyarrow.DictionaryArray.from_arrays(codes, pyarrow.array([one]))
    elif kind == "messages":
        column = pyarrow.array([[{"role": "user", "content": one}]] * 1200)
    else:
        column = pyarrow.array(["x" * (5 << 28)])
    pyarrow.parquet.write_table(pyarrow.table({"prompt": column}), path, compression="zstd", store_schema=False)


@pytest.mark.fault("parquet files that unpack to gigabytes")
@pytest.mark.parametrize("kind", ["dictionary", "messages", "one-value"])
def test_a_zip_bomb_is_refused_within_the_stated_memory(tmp_path, kind):
    """At most 1 GiB of text is read of a file, and the reader takes no more than twice that."""
    bomb(tmp_path / "bomb.parquet", kind)
    assert (tmp_path / "bomb.parquet").stat().st_size < 200_000
    code = (
        "import resource, sys, pyarrow.parquet\n"
        "from mgrpo.records import InputError, load_records\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: load_records(sys.argv[1])\n"
        "except InputError as error: print(error)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "bomb.parquet")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    *message, mebibytes = done.stdout.splitlines()
    assert "must have at most 1024 MiB, got more" in message[0], done.stderr
    assert int(mebibytes) < 2048


# ---- models


@pytest.mark.fault("model folders that bring code of their own")
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_in_a_model_folder_is_refused(tmp_path, file, known):
    """Whether or not transformers would know the model without that code."""
    folder = tmp_path / "model"
    shutil.copytree(resolve_path("builtin:arithmetic"), folder)
    (folder / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\n" + "class A: pass\n")
    content = json.loads((folder / file).read_text())
    if file == "config.json":
        content |= {"auto_map": {"AutoConfig": "trap.A", "AutoModelForCausalLM": "trap.A"}}
        content |= {} if known else {"model_type": "trap"}
    else:
        content |= {"auto_map": {"AutoTokenizer": ["trap.A", "trap.A"]}} | ({} if known else {"tokenizer_class": "A"})
    (folder / file).write_text(json.dumps(content))
    for load in (load_tokenizer, load_model):
        with pytest.raises(InputError, match=r"model: .*(names? no code|custom code)|must name no code"):
            load(ModelConfig(path=str(folder), device="cpu"))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.fault("pickled weights in a model folder")
def test_pickled_weights_are_not_read(tmp_path):
    """A folder whose only weights are a pickle that would run something."""
    import pickle

    folder = tmp_path / "model"
    shutil.copytree(resolve_path("builtin:arithmetic"), folder)
    (folder / "model.safetensors").unlink()

    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(InputError):
        load_model(ModelConfig(path=str(folder), device="cpu"))
    assert not (tmp_path / "sprung").exists()


# ---- secrets


@pytest.mark.fault("secrets in the environment and in URLs")
def test_secrets_reach_no_file_and_no_output(launch, tmp_path, monkeypatch, capfd):
    """Nothing of the environment is written down, and a URL with a password is refused without repeating it."""
    secret = "hf_SeCrEtSeCrEt"
    for name in ("HF_TOKEN", "WANDB_API_KEY", "VLLM_API_KEY", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, secret)
    assert launch({"steps": 2, "log.backends": ("tensorboard",), "log.samples": 1, "eval.every": 1}) == 0
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 15
    assert not [path for path in files if secret.encode() in path.read_bytes()]
    for url in (f"http://user:{secret}@127.0.0.1:8000", f"http://127.0.0.1:8000/?key={secret}"):
        flags = ("--rollout.engine", "vllm", "--rollout.placement", "server", "--rollout.servers", url)
        assert launch({}, *flags, run_dir=tmp_path / "other") == 2
    said = capfd.readouterr()
    assert secret not in said.out + said.err
    assert "--rollout.servers must be URLs without user" in " ".join(said.err.replace("│", "").split())
    assert not (tmp_path / "other").exists()
