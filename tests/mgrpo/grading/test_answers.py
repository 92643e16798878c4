from __future__ import annotations

import itertools
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from mgrpo.grading.canonical import canonicalize
from mgrpo.grading.checker import AnswerChecker
from mgrpo.grading.extract import make_extractor
from mgrpo.grading.thoughts import MARKS
from mgrpo.grading.worker import StartError

SPECS = ("boxed", "hash", "last-number", r"regex:#(\d\d)", "regex:[a-z]+")
TEXT = st.text(alphabet=st.characters(exclude_categories=()), max_size=60)
LATEX_PIECES = [
    *r"\{}$,.+-/ 0123xy()%^_~√½²₂",
    *[r"\frac", r"\dfrac", r"\text{", r"\boxed{", r"\left", r"\right.", r"\,", r"\!", r"\ ", r"\(", r"\)", r"\quad"],
    *["1,000", r"\pi", "\n", "\x00", "\ud800", "e\u0301", "ﷺ", "\u2044"],
]
LATEX = st.lists(st.sampled_from(LATEX_PIECES), max_size=25).map("".join)

HANGING = (r"9^{9^{9^{9}}}", r"9^{9^{9^{8}}}")

EQUIVALENT = [
    ("1/2", "0.5"),
    ("1/2", r"\frac12"),
    (r"\frac12", r"\dfrac{1}{2}"),
    ("1/3", "0.333333"),
    ("3 1/2", r"\frac{7}{2}"),
    ("1½", "1.5"),
    ("(1,2)", "1<x<2"),
    (r"[1,2)\cup(3,4]", r"\left[1, 2\right) \cup \left(3, 4\right]"),
    (r"\{1,2\}", r"\{2,1\}"),
    (r"2\sqrt3", r"\sqrt{12}"),
    ("x^2+2x+1", "(x+1)^2"),
    ("x²", "x^2"),
    ("x=5", "5"),
    ("2**10", "1024"),
    ("(2+3)**2", "25"),
    ("2^{10}", "1,024"),
    ("50%", r"\frac12"),
    (r"10\text{ cm}", "10"),
    (r"\text{Yes}", "yes"),
    (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix} 1 & 2 \end{pmatrix}"),
]
DIFFERENT = [
    ("1/2", "0.51"),
    ("1/3", "0.33"),
    ("2", "2.0000001"),
    ("10²", "102"),
    ("1/0", "0"),
    ("[1,2]", "(1,2)"),
    ("(1,2)", "(2,1)"),
    ("12:30", "12:45"),
    ("3 and 4", "4"),
    ("1/3/", "1"),
    ("1__2", "1"),
    ("listen", "silent"),
    ("x+1", "y+1"),
    ("A", "B"),
    (r"\sqrt{2}", r"\sqrt{3}"),
    (r"\infty", r"-\infty"),
    ("\ud800", "x+2"),
    ("", "5"),
]

FAKE_MATH_VERIFY = """
import mmap, os
print("noise on standard output")
kept = []
class LatexExtractionConfig: pass
class ExprExtractionConfig: pass
def parse(text, config, parsing_timeout, raise_on_error=False):
    if "exit" in text: os._exit(3)
    if "keeps" in text: kept.append(mmap.mmap(-1, 1200 << 20))
    if "memory" in text:
        kept.append(text)
        raise MemoryError
    if "deep" in text:
        kept.append(text)
        return parse(text, config, parsing_timeout, raise_on_error)
    return [text]
def verify(gold, target, timeout_seconds, raise_on_error=False):
    return bool(kept) or "same" in gold and "same" in target
"""


@pytest.fixture(scope="module")
def checker():
    with AnswerChecker(timeout_s=60.0) as shared:
        yield shared


@pytest.fixture
def fake_math_verify(tmp_path, monkeypatch):
    module = tmp_path / "math_verify.py"
    module.write_text(FAKE_MATH_VERIFY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return module


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def spent_by_children() -> float:
    """Seconds of processor time of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def wait_until_gone(pid: int, limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_running(pid)


@pytest.mark.parametrize(
    ("spec", "text", "answer"),
    [
        ("boxed", r"\boxed{1} so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("boxed", r"\boxed{7} then cut at \boxed{12", "7"),
        ("boxed", r"\boxed{a \boxed{b} c}", "b"),
        ("boxed", r"{ \fbox {x\}y} }", r"x\}y"),
        ("boxed", r"$\boxed 5$", "5"),
        ("boxed", r"\\boxed{3}", "3"),
        ("boxed", r"}} \boxed{4}", "4"),
        ("boxed", r"\boxed{}", None),
        ("boxed", r"\boxedness{5}", None),
        ("boxed", "no box {5}", None),
        ("boxed", rf"\boxed{{{'1' * 1000}}}", "1" * 1000),
        ("boxed", rf"\boxed{{{'1' * 1001}}}", None),
        ("hash", "#### 4\nand #### 18 apples \r\nrest", "18 apples"),
        ("hash", "#### 4\n####\n5", "5"),
        ("hash", "### 4", None),
        ("last-number", "from 3 to -1,234,567.50%", "-1,234,567.50"),
        ("last-number", "5-3", "3"),
        ("last-number", "so x = \u22123/4.", "\u22123/4"),
        ("last-number", "about .5", ".5"),
        ("last-number", "1,2345", "2345"),
        ("last-number", "none", None),
        (r"regex:#(\d\d)", "51-38=13#13 #74", "74"),
        (r"regex:[a-z]+", "one two 3", "two"),
        (r"regex:a|(b)", "b a", None),
    ],
)
def test_extractors(spec, text, answer):
    assert make_extractor(spec)(text) == answer


@pytest.mark.parametrize("spec", ["box", "", "regex:", "regex:(", "regex:a{99999999999}", "regex:(a)(b)", "regex"])
def test_bad_extractor_spec_is_named(spec):
    with pytest.raises(ValueError, match="make_extractor: spec must be") as error:
        make_extractor(spec)
    assert repr(spec) in str(error.value)


@given(text=TEXT | LATEX, spec=st.sampled_from(SPECS))
def test_extractors_accept_any_text(text, spec):
    answer = make_extractor(spec)(text)
    assert answer is None or (answer == answer.strip() and 0 < len(answer) <= 1000 and answer in text)


# Hypothesis also tries strings of the code under test: an answer in a thought that is left open is none.
NO_THOUGHT = TEXT.filter(lambda text: not any(mark in text for mark in (*MARKS, *MARKS.values())))


@given(before=NO_THOUGHT, inside=st.text(alphabet="ab{} 1", max_size=20), after=st.text(alphabet="ab }", max_size=10))
def test_boxed_returns_balanced_content(before, inside, after):
    depths = list(itertools.accumulate((c == "{") - (c == "}") for c in inside))
    assume(min(depths, default=0) >= 0 and (not depths or depths[-1] == 0))
    assume(not before.endswith("\\"))
    assert make_extractor("boxed")(f"{before}\\boxed{{{inside}}}{after}") == (inside.strip() or None)


@given(value=st.integers() | st.decimals(allow_nan=False, allow_infinity=False, places=3), before=NO_THOUGHT)
def test_last_number_returns_the_number(value, before):
    assert make_extractor("last-number")(f"{before} is {value:,}% done") == f"{value:,}"


@pytest.mark.parametrize("spec", ["boxed", "hash", "last-number"])
@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 100_000,
        r"\boxed{" * 100_000 + "}" * 100_000,
        r"\boxed{a" * 50_000 + r"}\boxed" * 50_000,
        r"\boxed" + " " * 1_000_000,
        "111," * 250_000 + "11",
        "1" * 1_000_000 + "x",
        "1/" * 500_000,
        "####" * 250_000,
        "-" * 1_000_000,
    ],
    ids=lambda text: text[:10],
)
def test_extraction_is_linear(spec, text):
    start = time.process_time()
    make_extractor(spec)(text)
    assert time.process_time() - start < 5.0


@pytest.mark.parametrize(
    ("answer", "canonical"),
    [
        ("$ 5 $", "5"),
        ("07", "7"),
        ("+5.0", "5"),
        ("-0.00", "0"),
        (".50", "0.5"),
        ("5.", "5"),
        ("1,234.50", "1234.5"),
        (r"10{,}000", "10000"),
        (r"10\,000", "10000"),
        ("1 234 567", "1234567"),
        ("12,34", "12,34"),
        ("007x", "007x"),
        ("１２", "12"),  # noqa: RUF001
        ("−5", "-5"),  # noqa: RUF001
        (r"\dfrac12", r"\frac{1}{2}"),
        (r"\tfrac 1{2}", r"\frac{1}{2}"),
        (r"\left( 1 ,\; 2 \right)", "(1,2)"),
        (r"\leftarrow", r"\leftarrow"),
        (r"5\text{ cm}", "5 cm"),
        (r"\boxed{\text{yes}}.", "yes"),
        (r"\pi\,r", r"\pi r"),
        (r"1\\ 2", r"1\\2"),
        (r"\( x + 1 \)", "x+1"),
        (r"50\%", "50%"),
        ("x²", "x^{2}"),
        ("10⁻³", "10^{-3}"),
        ("log₂8", "log_{2}8"),
        ("1½", r"1\frac{1}{2}"),
        ("3 1/2", r"3\frac{1}{2}"),
        ("√2", r"\sqrt{2}"),
        ("2 3", "2 3"),
    ],
)
def test_canonical_forms(answer, canonical):
    assert canonicalize(answer) == canonical


@settings(max_examples=300)
@given(answer=TEXT | LATEX)
@example(answer=r"\text{" * 150 + "x" + "}" * 150)
@example(answer="ﷺ" * 900)
@example(answer=" " + "9" * 2000 + ".0 ")
def test_canonicalize_is_idempotent(answer):
    assert canonicalize(canonicalize(answer)) == canonicalize(answer)


@given(value=st.integers(), zeros=st.integers(0, 5), decimals=st.text(alphabet="0", max_size=4))
def test_notations_of_an_integer_are_one_form(value, zeros, decimals):
    sign = "-" if value < 0 else "+"
    assert canonicalize(f"${sign}{'0' * zeros}{abs(value)}.{decimals}$") == str(value)
    assert canonicalize(f"{value:,}") == str(value)


@pytest.mark.parametrize(("first", "second"), EQUIVALENT)
def test_equivalent_pairs(checker, first, second):
    assert checker.equivalent(first, second) is True
    assert checker.equivalent(second, first) is True


@pytest.mark.parametrize(("first", "second"), DIFFERENT)
def test_different_pairs(checker, first, second):
    assert checker.equivalent(first, second) is False
    assert checker.equivalent(second, first) is False


def test_no_pair_of_the_tables_was_cut(checker):
    for first, second in EQUIVALENT + DIFFERENT:
        checker.equivalent(first, second)
    assert (checker.timeouts, checker.failures) == (0, 0)


def test_is_correct_needs_an_answer_and_a_label(checker):
    assert checker.is_correct("07", "7")
    assert not checker.is_correct("8", "7")
    for answer, label in [(None, "7"), ("7", None), (None, None), ("$", "$"), ("", "")]:
        assert not checker.is_correct(answer, label)


def test_exact_mode_compares_canonical_forms_only():
    with AnswerChecker(mode="exact") as exact:
        assert exact.equivalent("07", "7.0")
        assert not exact.equivalent("x+1", "1+x")
        assert not exact.equivalent("1/2", "0.5")
        assert exact.worker_pids == []


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("9" * 290, "9" * 289 + "8", False),
        ("1" * 10**6, "1" * 10**6 + ".0", False),
        (f"{10**100}/{2 * 10**100}", "0.5", True),
        ("3/4", r"\frac{6}{8}", True),
        ("-3/4", "-0.75", True),
        ("1/2", "2/3", False),
        ("x+" * 150 + "1", "1" + "+x" * 150, False),
        ("Monday", "5", False),
    ],
)
def test_fast_paths_start_no_worker(first, second, same):
    with AnswerChecker() as fresh:
        assert fresh.equivalent(first, second) is same
        assert fresh.worker_pids == []


def test_classes_merge_notations_and_number_by_first_appearance(checker):
    answers = ["7", "1/2", None, "0.5", "(1,2)", "07", r"\frac12", "", r"\left(1, 2\right)", "1<x<2", "[1,2]"]
    assert checker.classes(answers) == [0, 1, -1, 1, 2, 0, 1, -1, 2, 2, 3]
    assert checker.group_classes([answers, ["3"], []]) == [checker.classes(answers), [0], []]


def test_partition_does_not_depend_on_order(checker):
    # 50% equals both 50 and 1/2 for math-verify, so that a class found in list order would vary.
    answers = ["50%", "50", "1/2", "0.5", "x+1", "1+x", None, "0.333333", "1/3", "0.3333333", r"\frac12"]

    def partition(order):
        ids = checker.classes([answers[i] for i in order])
        return {frozenset(i for i, c in zip(order, ids, strict=True) if c == k) for k in set(ids)}

    expected = partition(range(len(answers)))
    assert frozenset({1, 0}) in expected and frozenset({2, 3, 10}) in expected
    rng = random.Random(0)
    for _ in range(50):
        order = rng.sample(range(len(answers)), len(answers))
        assert partition(order) == expected


def test_arithmetic_groups_are_fast():
    rng = random.Random(0)
    with AnswerChecker() as fresh:
        best_ms = float("inf")
        for _ in range(5):
            groups = [[f"{rng.randrange(100):02d}" for _ in range(16)] for _ in range(16)]
            start = time.process_time()
            ids = fresh.group_classes(groups)
            best_ms = min(best_ms, 1e3 * (time.process_time() - start))
            assert [len(set(row)) for row in ids] == [len(set(group)) for group in groups]
        assert fresh.worker_pids == []
    assert best_ms < 20.0


def test_workers_share_the_groups_with_the_same_result(checker):
    groups = [["x+1", "1+x", f"{i}x", f"x{i}", f"x*{i}"] for i in range(2, 8)]
    with AnswerChecker(timeout_s=60.0, num_workers=2) as pair:
        assert pair.group_classes(groups) == checker.group_classes(groups) == [[0, 0, 1, 1, 1]] * 6
        assert len(set(pair.worker_pids)) == 2


def test_works_outside_the_main_thread():
    verdicts = []
    with AnswerChecker(timeout_s=60.0) as fresh:
        thread = threading.Thread(target=lambda: verdicts.append(fresh.equivalent("x+1", "1+x")))
        thread.start()
        thread.join()
    assert verdicts == [True]


@pytest.mark.fault("answer that never ends")
def test_hanging_pair_is_cut_and_the_next_one_works():
    with AnswerChecker(timeout_s=2.0) as fresh:
        fresh.equivalent("a+b", "b+a")
        (hung,) = fresh.worker_pids
        start = spent_by_children()
        assert not fresh.equivalent(*HANGING)
        assert spent_by_children() - start < 8.0
        assert not is_running(hung)
        assert (fresh.timeouts, fresh.failures) == (1, 0)
        assert fresh.equivalent("x+1", "1+x")
        assert not fresh.equivalent(*HANGING)
        assert fresh.timeouts == 1


@pytest.mark.fault("worker of the answer checker killed while idle")
def test_killed_worker_is_replaced():
    with AnswerChecker(timeout_s=60.0) as fresh:
        assert fresh.equivalent("a+b", "b+a")
        (killed,) = fresh.worker_pids
        os.kill(killed, signal.SIGKILL)
        assert fresh.equivalent("x+1", "1+x")
        assert fresh.worker_pids != [killed]
        assert fresh.failures == 0


def test_close_leaves_no_child():
    fresh = AnswerChecker(timeout_s=60.0, num_workers=2)
    fresh.group_classes([["x+1", "1+x"], ["y+1", "1+y"], ["z+1", "1+z"]])
    pids = fresh.worker_pids
    assert pids
    fresh.close()
    assert fresh.worker_pids == []
    for pid in pids:
        with pytest.raises(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_worker_is_limited_and_free_of_torch():
    with AnswerChecker(timeout_s=60.0) as fresh:
        fresh.equivalent("a+b", "b+a")
        (pid,) = fresh.worker_pids
        assert resource.prlimit(pid, resource.RLIMIT_AS) == (2 << 30, 2 << 30)
        with open(f"/proc/{pid}/maps") as maps:
            assert "torch" not in maps.read()
        os.kill(pid, signal.SIGINT)
        assert fresh.equivalent("x+1", "1+x")
        assert fresh.worker_pids == [pid]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("hang", [False, True])
def test_worker_ends_with_its_parent(hang):
    code = "\n".join(
        [
            "import time",
            "from mgrpo.grading.checker import AnswerChecker",
            "checker = AnswerChecker(timeout_s=2.0)",
            "checker.equivalent('a+b', 'b+a')",
            "print(checker.worker_pids[0], flush=True)",
            f"checker.equivalent(*{HANGING!r})" if hang else "time.sleep(60)",
        ]
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        time.sleep(0.3)
        assert is_running(pid)
        parent.kill()
    assert wait_until_gone(pid, 8.0)


def test_interrupt_leaves_no_stale_reply():
    def interrupt(signum, frame):
        raise KeyboardInterrupt

    with AnswerChecker(timeout_s=30.0) as fresh:
        fresh.equivalent("a+b", "b+a")
        (pid,) = fresh.worker_pids
        previous = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        try:
            with pytest.raises(KeyboardInterrupt):
                fresh.equivalent(*HANGING)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
        assert not is_running(pid)
        assert fresh.equivalent("x+1", "1+x")


@pytest.mark.fault("answer that kills its worker")
def test_pair_that_kills_its_worker_counts_as_failure(fake_math_verify):
    with AnswerChecker(timeout_s=30.0) as fresh:
        assert not fresh.equivalent("exit+1", "2+x")
        assert (fresh.timeouts, fresh.failures) == (0, 1)
        assert fresh.equivalent("same+1", "same+2")


@pytest.mark.fault("answer that runs its worker out of memory or stack, or leaves it without memory")
@pytest.mark.parametrize(("answer", "failures"), [("memory+1", 1), ("deep+1", 1), ("keeps+1", 0)])
def test_no_verdict_depends_on_the_pairs_before(fake_math_verify, answer, failures):
    """The stand-in finds everything equal once it has run out; a real one would have less left for the next pair."""
    with AnswerChecker(timeout_s=30.0) as fresh:
        assert not fresh.equivalent("1+x", "2+x")
        (pid,) = fresh.worker_pids
        fresh.equivalent(answer, "2+x")
        assert fresh.worker_pids == [] and not is_running(pid)
        assert not fresh.equivalent("3+x", "2+x")
        assert (fresh.timeouts, fresh.failures) == (0, failures)


def test_undecided_pairs_of_one_call_are_limited(fake_math_verify):
    answers = [f"memory+{i}" for i in range(6)]
    with AnswerChecker(timeout_s=30.0) as fresh:
        assert fresh.classes([*answers, *answers]) == [*range(6), *range(6)]
        assert (fresh.failures, fresh.skipped) == (3, 12)


@pytest.mark.parametrize("source", ["raise ImportError('No module')", "import nowhere_to_be_found", "1/0"])
def test_math_verify_that_does_not_load_is_an_error(fake_math_verify, source):
    fake_math_verify.write_text(source)
    with AnswerChecker() as fresh:
        with pytest.raises(ImportError, match=r"Install mgrpo\[train\]"):
            fresh.equivalent("x+1", "1+x")
        assert fresh.worker_pids == []


SLOW_IMPORT = """
import os, time
with open(os.path.join(os.path.dirname(__file__), "starts"), "a") as file: file.write(f"{os.getpid()}\\n")
while not os.path.exists(os.path.join(os.path.dirname(__file__), "go")): time.sleep(0.01)
"""


@pytest.fixture
def slow_start(fake_math_verify):
    """A math-verify that takes as long to import as the test wants; returns the folder of `starts` and `go`."""
    fake_math_verify.write_text(SLOW_IMPORT + FAKE_MATH_VERIFY)
    return fake_math_verify.parent


def wait_for_start(folder, number):
    """Process id of the worker that began to start as the given one, counted from 1."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        starts = (folder / "starts").read_text().split() if (folder / "starts").exists() else []
        if len(starts) >= number:
            return int(starts[number - 1])
        time.sleep(0.01)
    raise AssertionError(f"start {number} never came")


@pytest.mark.fault("worker of the answer checker killed while it starts")
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_killed_while_it_starts_is_replaced(slow_start, kill):
    verdicts = []
    with AnswerChecker(timeout_s=30.0) as fresh:
        thread = threading.Thread(target=lambda: verdicts.append(fresh.equivalent("same+1", "same+2")))
        thread.start()
        for number in (1, 2):
            os.kill(wait_for_start(slow_start, number), kill)
        third = wait_for_start(slow_start, 3)
        (slow_start / "go").touch()
        thread.join()
        assert verdicts == [True] and (fresh.timeouts, fresh.failures) == (0, 0)
        assert fresh.worker_pids == [third]


@pytest.mark.fault("worker of the answer checker killed or stopped at every start")
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import os; os._exit(7)", "ended with code 7; ended with code 7; ended with code 7"),
        ("import os; os.kill(os.getpid(), 9)", "killed by signal 9; killed by signal 9; killed by signal 9"),
        ("import os; os.kill(os.getpid(), 19)", "not ready within 1 s; not ready within 1 s; not ready within 1 s"),
    ],
    ids=["ended", "killed", "stopped"],
)
def test_workers_that_never_start_are_an_error_after_three(fake_math_verify, monkeypatch, source, reason):
    """No verdict is made up: without a worker every pair would count as different."""
    fake_math_verify.write_text(source)
    with AnswerChecker() as fresh:
        with monkeypatch.context() as patch:
            # Only the one that is silent is to meet the limit, and not the sound one after it, however slow its start.
            if "not ready" in reason:
                patch.setattr("mgrpo.grading.worker.START_LIMIT_S", 1.0)
            with pytest.raises(StartError, match=f"must start, got 3 failures in a row: {reason}"):
                fresh.equivalent("x+1", "1+x")
        assert fresh.worker_pids == [] and fresh.failures == 0
        fake_math_verify.write_text(FAKE_MATH_VERIFY)
        assert fresh.equivalent("same+1", "same+2")


def test_a_machine_without_room_for_a_process_is_an_error_after_three(monkeypatch):
    def refuse(*args, **kwargs):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    with AnswerChecker() as fresh:
        monkeypatch.setattr(subprocess, "Popen", refuse)
        with pytest.raises(StartError, match=r"no process could be created \(\[Errno 11\] Resource temporarily unav"):
            fresh.equivalent("x+1", "1+x")


def run_parent(folder):
    """A process in a group of its own that ignores SIGINT, as a trainer with a step to end does, and asks one pair."""
    code = "\n".join(
        [
            "import signal",
            "from mgrpo.grading.checker import AnswerChecker",
            "signal.signal(signal.SIGINT, lambda *_: None)",
            "with AnswerChecker(timeout_s=30.0) as checker:",
            "    print(checker.equivalent('same+1', 'same+2'), checker.failures, checker.worker_pids[0])",
        ]
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.fault("Ctrl-C while a worker of the answer checker starts")
def test_a_ctrl_c_does_not_reach_a_worker_that_starts(slow_start):
    with run_parent(slow_start) as parent:
        worker = wait_for_start(slow_start, 1)
        os.killpg(parent.pid, signal.SIGINT)
        time.sleep(0.2)
        (slow_start / "go").touch()
        assert parent.communicate(timeout=30)[0].split() == ["True", "0", str(worker)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_that_starts_ends_with_its_parent(slow_start):
    with run_parent(slow_start) as parent:
        worker = wait_for_start(slow_start, 1)
        parent.kill()
    assert wait_until_gone(worker, 5.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "sympy"}, "mode must be exact or math, got 'sympy'"),
        ({"timeout_s": 0.0}, "timeout_s must be above 0"),
        ({"timeout_s": float("nan")}, "timeout_s must be above 0"),
        ({"num_workers": 0}, "num_workers must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"AnswerChecker: {message}"):
        AnswerChecker(**arguments)
