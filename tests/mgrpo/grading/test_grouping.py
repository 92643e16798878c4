"""Grouping of many answers: few comparisons, the same classes."""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from mgrpo.grading.checker import MAX_DEFAULT_WORKERS, AnswerChecker, _as_compared, default_workers
from mgrpo.grading.extract import make_extractor
from mgrpo.grading.matching import may_be_equal
from mgrpo.grading.memo import Memo
from mgrpo.grading.watch import StoppedError, Watch
from mgrpo.observe.console import GroupingLine

DATA = Path(os.environ.get("MGRPO_DATA", Path(__file__).parents[4] / "shared" / "data"))

# Two spellings of one formula; no two formulas are equal.
PAIRS = [
    ("(x+1)^2", "x^2+2x+1"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
    (r"\sin^2 x+\cos^2 x+x", "x+1"),
    (r"2\sin x\cos x", r"\sin(2x)"),
    (r"\frac{1}{\sqrt{3}}", r"\frac{\sqrt{3}}{3}"),
    (r"\log_{2}{8}+y", "3+y"),
    (r"\cos(2x)", r"1-2\sin^2 x"),
    (r"\frac{x^2-4}{x-2}", "x+2"),
    (r"\sqrt{x^2}", "|x|"),
    (r"\sqrt{3+2\sqrt{2}}", r"1+\sqrt{2}"),
    (r"y=3-\frac{3}{4}x", "3x+4y=12"),
    (r"\left(\frac{1}{2},\sqrt{12}\right)", r"(0.5,2\sqrt{3})"),
    (r"\{\sqrt{18},1\}", r"\{1,3\sqrt{2}\}"),
    (r"-1\le x\le\frac{6}{4}", r"[-1,\frac{3}{2}]"),
    (r"\begin{pmatrix}1&\sqrt{8}\end{pmatrix}", r"\begin{pmatrix}\frac{2}{2}&2\sqrt{2}\end{pmatrix}"),
    (r"e^{x}e^{y}", r"e^{x+y}"),
]
# Different formulas of one kind, by four numbers.
FAMILIES = {
    "roots": r"\frac{{{a}\sqrt{{{b}}}+{c}}}{{{d}}}",
    "multiples of pi": r"{a}\pi+\frac{{{b}}}{{{c}}}",
    "polynomials": "x^{{{a}}}+{b}x-{c}",
    "quotients": r"\frac{{{a}x+{b}}}{{{c}x-{d}}}",
    "powers": "{a}^{{{b}}}-{c}x",
    "large numbers": r"{a}^{{1{b}}}+\sqrt{{2}}",
    "logarithms": r"\log_{{{a}}}{{{b}}}+{c}",
    "angles": r"\sin({a}x)+{b}\cos x",
    "complex numbers": r"{a}+{b}\sqrt{{{c}}}i",
    "several symbols": "{a}ab+{b}c-{c}abc",
    "points": r"({a},\frac{{{b}}}{{{c}}},{d})",
    "pairs of roots": r"(\sqrt{{{a}}},\sqrt{{{b}}})",
    "sets": r"\{{{a},{b},{c}\sqrt{{2}}\}}",
    "lists": r"{a}\sqrt{{3}},{b}",
    "intervals": r"[{a},1{b})",
    "unions": r"({a},1{b})\cup(2{c},3{d})",
    "lines": "y={a}x+{b}",
    "equations": "{a}x+{b}y={c}",
    "circles": "(x-{a})^2+(y+{b})^2={c}",
    "assignments": r"x={a}\sqrt{{{b}}}",
    "functions": "f(x)={a}x^2-{b}",
    "inequalities": r"x>\frac{{{a}}}{{{b}}}+{c}",
    "chains": "{a}<x<1{b}",
    "matrices": r"\begin{{pmatrix}}{a}&{b}\\{c}&{d}\end{{pmatrix}}",
    "sums": r"\sum_{{k=1}}^{{{a}}}k^2+{b}",
    "percentages": r"{a}.{b}\%+x",
    "texts": "{a} and then {b} of {c}",
    "ellipses": r"\frac{{x^2}}{{{a}}}+\frac{{(y-{b})^2}}{{{c}}}=1",
    "disks": r"(x-{a})^2+(y+{b})^2\le{c}",
    "parabolas": "y=x^2+{a}x+{b}",
    "hyperbolas": r"y=\frac{{{a}}}{{x-{b}}}",
    "cubics": "x^3-{a}x+{b}=0",
}
# Each is equal for math-verify to the ones beside it, for a reason of its own.
EQUAL = [
    ("50%", "0.5", r"\frac{x}{2x}"),
    (r"\frac{1}{3}x", "x/3"),
    (r"\sqrt{2}/2", "0.707107"),
    ("3x+4y=12", "12"),
    ("a=b=3", "3"),
    ("x=1,y=2", "(1,2)"),
    (r"\{\frac{10}{5},\sqrt{4}\}", "2"),
    (r"\{2,\sqrt{4}\}", r"\{2\}"),
    (r"(\pi,2)", r"\{2,\pi\}"),
    ("x^2=4", r"\{2,-2\}"),
    ("x^2=-1", "y^2=-4"),
    ("f(x)<3", r"(-\infty,3)"),
    ("x+y-y<2", r"(-\infty,2)"),
    (r"x\in[1,2]", r"1\le x\le 2"),
    (r"x\ne 3", r"\mathbb{R}\setminus\{3\}", r"(-\infty,3)\cup(3,\infty)"),
    (r"\frac{x-1}{x+2}\ge 0", r"(-\infty,-2)\cup[1,\infty)"),
    (r"[1,2]\cup[2,3)", "[1,3)"),
    ("[5,5]", "5"),
    (r"\alpha=0", "alpha=0"),
    (r"\{x=5\}", "5"),
    (r"2\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\4\end{pmatrix}"),
    (r"\sum_{k=1}^{n}k", r"\frac{n(n+1)}{2}"),
    (r"\sum_{n=0}^{\infty}\frac{1}{2^n}", r"\sqrt{4}"),
    (r"\int_0^1 x dx", r"\frac{\sqrt{4}}{4}"),
    (r"\binom{n}{2}", r"\frac{n(n-1)}{2}"),
    ("(-1)^n", "(-1)^{n+2}"),
    ("2^{2023}", r"2\cdot2^{2022}"),
    (r"\frac{10^{400}}{10^{399}}", r"\sqrt{100}"),
    ("0^0", r"\sqrt{1}"),
    ("x^2+y^2=-1", "a^2+b^2=-3"),
    ("(x-18)^2+(y+81)^2=12", "(x-18)^2+y^2+162y=12-6561"),
    ("y=3(x-1)^2-7", "y+7=3(1-x)^2"),
]


@pytest.fixture(scope="module")
def checker():
    with AnswerChecker(timeout_s=60.0, num_workers=1) as shared:
        shared.equivalent("x", "y^2")  # starts the worker
        yield shared


def processor_s(checker):
    """Processor time of this process and the workers."""
    spent = time.process_time()
    for pid in checker.worker_pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        spent += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return spent


def group(checker, answers):
    """Class ids, comparisons and seconds of processor time."""
    asked, compute = [], checker._is_equal._compute
    checker._is_equal._compute = lambda *pair: asked.append(pair) or compute(*pair)
    start = processor_s(checker)
    try:
        ids = checker.classes(answers)
    finally:
        checker._is_equal._compute = compute
    return ids, len(asked), processor_s(checker) - start


def compare_both_ways(checker, first, second):
    """The worker's verdict on two forms, None where it needs no worker; it must not be True on forms told apart."""
    if checker._compare_without_worker(first, second) is not None:
        return None
    pair = _as_compared(first, second)
    equal = checker._is_equal(*pair)
    assert may_be_equal(*map(checker._fingerprint, pair)) or not equal, pair
    return equal


def make_family(form, number, seed=0):
    rng = random.Random(seed)
    answers = {}
    while len(answers) < number:
        answers[form.format(**dict(zip("abcd", rng.sample(range(11, 99), 4), strict=True)))] = None
    return list(answers)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_64_formulas_take_seconds_and_equal_ones_are_found(checker):
    forms = [make_family(form, 2, seed=1)[i] for i, form in itertools.product((0, 1), FAMILIES.values())]
    answers = [*itertools.chain(*PAIRS), *forms[:32]]
    order = random.Random(0).sample(range(64), 64)
    ids, comparisons, seconds = group(checker, [answers[i] for i in order])
    ids = [ids[order.index(i)] for i in range(64)]
    assert ids[0:32:2] == ids[1:32:2]
    assert len(set(ids)) == 16 + 32
    assert comparisons <= 24
    assert seconds < 5.0, seconds  # about 3 on a busy machine, half of it for parsing


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", FAMILIES)
def test_different_answers_of_one_kind_are_not_compared(checker, name):
    answers = make_family(FAMILIES[name], 24)
    ids, comparisons, seconds = group(checker, answers)
    assert ids == list(range(24)) and comparisons <= 2
    assert seconds < 2.0, seconds
    assert (checker.timeouts, checker.failures, checker.skipped) == (0, 0, 0)


@pytest.mark.slow
def test_256_formulas_need_few_comparisons(checker):
    forms = [answer for form in FAMILIES.values() for answer in make_family(form, 10, seed=2)][:256]
    ids, comparisons, _ = group(checker, forms)
    assert ids == list(range(256)) and comparisons < 64


@pytest.mark.parametrize("answers", EQUAL, ids=lambda answers: answers[0])
def test_what_math_verify_calls_equal_is_one_class(checker, answers):
    for first, second in itertools.pairwise(answers):
        assert checker.equivalent(first, second)
        assert compare_both_ways(checker, checker._form(first), checker._form(second)) in (None, True)
        assert checker.classes([first, second]) == checker.classes([second, first]) == [0, 0]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        *[(r"\sqrt{2}", other) for other in (r"\sqrt{3}", "x", r"\{\sqrt{2},1\}", r"(\sqrt{2},1)", "x<2", "[1,2]")],
        *[(r"\{1,\pi\}", other) for other in (r"\{1,2\}", r"\{1,\pi,3\}", "[1,4]", r"(1,\pi,3)")],
        *[("(1,2,3)", other) for other in ("(3,2,1)", "(1,2)", r"\{1,2,4\}", "x=1")],
        *[("[1,2)", other) for other in ("(1,2)", "[1,2]", "[1,3)", "1<x<2", r"[1,2)\cup[3,4]")],
        *[("x^2+y^2=1", other) for other in ("x^2+y^2=2", "x^2=1", "x+y=4", r"x^2+y^2\le 1")],
        *[("x<2", other) for other in (r"x\le 2", "x<3", "y=2")],
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&5\end{pmatrix}"),
        (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}+x"),
        ("ab+1", "ac+1"),
    ],
)
def test_fingerprints_tell_apart(checker, first, second):
    one, other = map(checker._fingerprint, _as_compared(checker._form(first), checker._form(second)))
    assert not may_be_equal(one, other) and not may_be_equal(other, one)
    assert may_be_equal(one, one) and may_be_equal(other, other)
    assert checker.classes([first, second]) == [0, 1]


OPERATIONS = [
    *[r"\frac{%s}{%s}", "(%s)+(%s)", "(%s)-(%s)", r"(%s)\cdot(%s)", "(%s)^{%s}", r"\sqrt{(%s)+(%s)}", "%s=%s", "%s<%s"],
    *[r"\{%s,%s\}", "(%s,%s)", "[%s,%s]", r"\max(%s,%s)", r"|%s|+\ln(%s)", r"%s\%%+(%s)", r"\sin(%s)+\cos(%s)"],
]


def make_formula(rng, depth):
    """A formula of a few operations on small numbers and two symbols, made of few values, so that some are equal."""
    if depth == 0:
        return rng.choice(["x", "y", "1", "2", "-1"])
    return rng.choice(OPERATIONS) % (make_formula(rng, depth - 1), make_formula(rng, depth - 1))


def test_random_equal_formulas_are_never_told_apart(checker):
    rng = random.Random(3)
    forms = sorted({checker._form(make_formula(rng, 1)) for _ in range(30)})
    num_equal = 0
    for first, second in itertools.combinations(forms, 2):
        num_equal += bool(compare_both_ways(checker, first, second))
    assert num_equal >= 5


def read_groups():
    """Forms of the graded samples, and pairs of true answers, which all are different questions'."""
    boxed = make_extractor("boxed")
    with (DATA / "qwen25_math_graded_samples.jsonl").open() as file:
        for row in map(json.loads, file):
            texts = [boxed(sample["text"]) for sample in row["samples"]]
            yield [row["answer"], *(sample["published_answer"] for sample in row["samples"]), *texts]
    with (DATA / "gsm8k_graded_solutions.jsonl").open() as file:
        for row in itertools.islice(map(json.loads, file), 200):
            yield [value for value in row.values() if isinstance(value, str) and len(value) < 100]
    with (DATA / "math500_test.jsonl").open() as file:
        true = [json.loads(line)["answer"] for line in file]
    rewrites = [(r"\frac", r"\dfrac"), ("+", "+0+"), (r"\sqrt{", r"1\cdot\sqrt{"), ("(", r"\left( "), (",", " , ")]
    for answer in true:
        yield [answer, *(answer.replace(*rewrite) for rewrite in rewrites), f"x={answer}", rf"{answer}\text{{ cm}}"]
    rng = random.Random(0)
    yield from (rng.sample(true, 2) for _ in range(300))


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="no graded data")
def test_no_equal_answers_of_the_graded_sets_are_told_apart(checker):
    num_pairs = num_equal = 0
    for answers in read_groups():
        forms = sorted({checker._form(answer) for answer in answers if answer} - {""})
        for first, second in itertools.combinations(forms, 2):
            equal = compare_both_ways(checker, first, second)
            num_pairs, num_equal = num_pairs + (equal is not None), num_equal + bool(equal)
    assert num_pairs > 500 and num_equal > 200, (num_pairs, num_equal)


def test_the_classes_depend_neither_on_order_nor_on_workers(checker):
    answers = [*itertools.chain(*PAIRS[:6], *EQUAL[:8]), "50", None, *make_family(FAMILIES["sets"], 5)]
    rng = random.Random(0)
    orders = [rng.sample(range(len(answers)), len(answers)) for _ in range(6)]
    with AnswerChecker(timeout_s=60.0, num_workers=3) as several:
        groups = several.group_classes([[answers[i] for i in order] for order in orders])
    alone = [checker.classes([answers[i] for i in order]) for order in orders]
    assert groups == alone
    partitions = [
        {frozenset(i for i, c in zip(order, ids, strict=True) if c == k) for k in set(ids)}
        for order, ids in zip(orders, groups, strict=True)
    ]
    assert all(partition == partitions[0] for partition in partitions)


FAKE_MATH_VERIFY = """
import os
class LatexExtractionConfig: pass
class ExprExtractionConfig: pass
def parse(text, config, parsing_timeout, raise_on_error=False):
    if "exit" in text: os._exit(3)
    while "hang" in text: pass
    return [text]
def verify(gold, target, timeout_seconds, raise_on_error=False):
    return gold == target
"""


@pytest.mark.fault("answer of which no fingerprint can be made")
@pytest.mark.parametrize(("answer", "timeouts", "failures"), [("hang+1", 1, 0), ("exit+1", 0, 1)])
def test_a_form_without_fingerprint_is_undecided_and_compared_as_text(
    tmp_path, monkeypatch, answer, timeouts, failures
):
    (tmp_path / "math_verify.py").write_text(FAKE_MATH_VERIFY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    answers = ["x+1", answer, "x+2", "y+1", answer]
    with AnswerChecker(timeout_s=1.0, num_workers=1) as fresh:
        for _ in range(2):
            assert fresh.classes(answers) == [0, 1, 2, 3, 1]
        assert (fresh.timeouts, fresh.failures) == (timeouts, failures)
        assert fresh.skipped == 2 * 2  # two calls, in which one pair is undecided and two are left out


def test_grading_after_grouping_needs_no_comparison(checker):
    answers = make_family(FAMILIES["roots"], 8, seed=5)
    checker.classes(answers)
    asked, compute = [], checker._is_equal._compute
    checker._is_equal._compute = lambda *pair: asked.append(pair) or compute(*pair)
    try:
        assert not any(checker.is_correct(answer, r"\sqrt{7}+\sqrt{5}") for answer in answers)
    finally:
        checker._is_equal._compute = compute
    assert asked == []


def test_a_memo_computes_once_and_forgets_the_oldest_and_errors():
    calls, begun = [], threading.Event()

    def compute(key):
        calls.append(key)
        begun.wait(5)
        if key == "bad":
            raise ValueError(key)
        return key.upper()

    memo, results = Memo(compute, 2), []
    threads = [threading.Thread(target=lambda: results.append(memo("a"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    begun.set()
    for thread in threads:
        thread.join()
    assert results == ["A"] * 4 and calls == ["a"]
    for _ in range(2):
        with pytest.raises(ValueError, match="bad"):
            memo("bad")
    assert calls == ["a", "bad", "bad"] and not memo.knows("bad")
    memo("b"), memo("a"), memo("c")
    assert (memo.knows("a"), memo.knows("b"), memo.knows("c")) == (True, False, True)


def test_a_long_grouping_is_shown_and_a_short_one_is_not(monkeypatch):
    groups = [["x+1", "1+x", "x+2"] for _ in range(4)]
    shown = []
    monkeypatch.setattr("mgrpo.grading.watch.SHOWN_AFTER_S", 600.0)  # on a busy machine the workers start slowly
    with AnswerChecker(timeout_s=60.0, num_workers=2) as fresh:
        fresh.watch = lambda *progress: shown.append(progress)
        fresh.group_classes(groups)
        assert shown == []
        monkeypatch.setattr("mgrpo.grading.watch.SHOWN_AFTER_S", 0.0)
        monkeypatch.setattr("mgrpo.grading.watch.SHOWN_EVERY_S", 0.0)
        assert fresh.group_classes(groups) == [[0, 0, 1]] * 4
    assert shown == sorted(shown) and shown[-1] == (4, 4)


def test_a_watch_speaks_after_a_while_then_now_and_then(monkeypatch):
    clock, shown = [100.0], []
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    watch = Watch(2, lambda *progress: shown.append((clock[0], *progress)))
    for clock[0] in (101.0, 104.9, 105.0, 105.5, 106.1):
        watch.tick()
    watch.finish_one()
    watch.tick()
    watch.finish_one()
    assert shown == [(105.0, 0, 2), (106.1, 0, 2), (106.1, 2, 2)]
    watch.stop()
    with pytest.raises(StoppedError):
        watch.tick()


@pytest.mark.fault("Ctrl-C while several workers of the answer checker group")
def test_an_interrupt_ends_every_thread_of_a_grouping():
    def interrupt(signum, frame):
        raise KeyboardInterrupt

    groups = [[f"{i}x+1", f"1+{i}*x", rf"\sin({i}x)", rf"\cos({i}x)+1"] for i in range(2, 300)]
    with AnswerChecker(timeout_s=60.0, num_workers=2) as fresh:
        fresh.equivalent("x+1", "1+x")
        previous = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        try:
            with pytest.raises(KeyboardInterrupt):
                fresh.group_classes(groups)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPool")]
        assert fresh.classes(["x+1", "1+x", "x+2"]) == [0, 0, 1]


@pytest.mark.parametrize(
    ("cores", "ranks", "workers"),
    [(1, None, 1), (4, None, 4), (192, None, MAX_DEFAULT_WORKERS), (16, "4", 4), (2, "8", 1), (3, "many", 3)],
)
def test_workers_are_as_many_as_cores_shared_by_the_ranks(monkeypatch, cores, ranks, workers):
    monkeypatch.setattr("mgrpo.grading.checker.available_cpus", lambda: cores)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert default_workers() == workers
    with AnswerChecker() as fresh:
        assert len(fresh._workers) == workers and fresh.worker_pids == []


def test_few_answers_start_one_worker_of_many():
    with AnswerChecker(timeout_s=60.0, num_workers=8) as fresh:
        fresh.group_classes([["x+1", "1+x", "x+2"]])
        assert len(fresh.worker_pids) == 1


@pytest.mark.parametrize("terminal", [True, False])
def test_the_line_of_a_long_vote_is_on_the_screen(monkeypatch, terminal):
    clock, screen = [100.0], io.StringIO()
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    line = GroupingLine(Console(file=screen, force_terminal=terminal, width=80))
    for clock[0], done in ((100.0, 0), (101.0, 3), (111.0, 4), (112.0, 16)):
        line(done, 16)
    shown = [f"comparing answers: {done} of 16 prompts" for done in ((0, 3, 4, 16) if terminal else (0, 4, 16))]
    assert screen.getvalue().replace("\r", "\n").splitlines() == shown


def test_a_run_shows_a_long_vote(launch, monkeypatch, capsys):
    """Every vote counts as long; the answers need a worker."""
    monkeypatch.setattr("mgrpo.grading.watch.SHOWN_AFTER_S", 0.0)
    turns = itertools.count()
    monkeypatch.setattr(
        "mgrpo.training.grader.make_extractor", lambda spec: lambda text: ("x+1", "1+x")[next(turns) % 2]
    )
    assert launch({"steps": 1, "answer.equivalence": "math", "answer.workers": 1, "rollout.num_prompts": 4}) == 0
    assert "comparing answers: 4 of 4 prompts" in capsys.readouterr().out
