"""Answers in spellings of models and data sets of many kinds: pairs that are the same, pairs that are not."""

from __future__ import annotations

import itertools
import random

import pytest

from mgrpo.grading.canonical import canonicalize
from mgrpo.grading.checker import AnswerChecker

SAME = {
    "choices": [
        *[(text, "B") for text in ("**B** the dog", "__B__ the dog", r"\textbf{B} the dog", "**B** 12", "(B), Paris")],
        *[
            (text, "B")
            for text in ("B - Paris", "B — 12", "B、Paris", "B：12", "【B】12", "[B] 12", "<B>", "选项B", "故选B")  # noqa: RUF001
        ],
        *[("The correct answer is B. Paris", "B"), ("Answer: (B)", "B"), ("答案：B", "B"), ("(C) +5", "C")],  # noqa: RUF001
        *[("I choose B", "B"), ("B is correct", "B"), ("(B) is the correct answer", "B")],
        *[
            ("(D) E = mc^2", "D"),
            ("C. F = qE", "C"),
            ("answer B", "B"),
            ("B is my answer", "B"),
            (r"\bf{(B)}\ 12", "B"),
        ],
        *[("(D) (A) and (B)", "D"), ("(D) Both (A) and (B)", "D"), ("(C) [1,2]", "C")],
    ],
    "assignments": [
        ("x=1 y=2", "(1,2)"),
        (r"\begin{cases} x=1 \\ y=2 \end{cases}", "(1,2)"),
        (r"\left\{\begin{array}{l}x=1,\\y=2.\end{array}\right.", "(1,2)"),
        (r"\left\{\begin{aligned}x&=1\\y&=2\end{aligned}\right.", "x=1,y=2"),
        (r"\{x=1,y=2\}", "x=1,y=2"),
        (r"x=1\land y=2", "(1,2)"),
        ("(x;y)=(1;2)", "x=1,y=2"),
        ("x_{1}=1, x_{2}=2", "x_1=1,x_2=2"),
        (r"x=1,y=2 \text{ or } x=3,y=4", "(1,2),(3,4)"),
        ("1,2", "2,1"),
        ("2,1", "(2,1)"),
    ],
    "bases": [
        (r"234\text{ base }5", "234_5"),
        (r"234\text{ (base 5)}", "234_5"),
        ("234 in base five", "234_5"),
        (r"234_\text{five}", "234_5"),
        ("0b1011", "1011_2"),
        ("0x1F", r"1F_{\text{hex}}"),
        (r"1011\,0110_2", "10110110_2"),
        (r"\overline{1011}_2", "1011_2"),
        ("x=234_5", "234"),
        ("255_10", "255_{10}"),
    ],
    "numbers with e": [
        (r"\{1e3,2e3\}", r"\{1000,2000\}"),
        ("1e3/2", "500"),
        ("1.5e3 + 1", "1501"),
        (r"1.5\mathrm{E}{-3}", "0.0015"),
        ("1.6e-19 C", r"1.6\times10^{-19}\text{ C}"),
        ("1_000", "1000"),
    ],
    "repeating decimals": [
        *[(text, "1/3") for text in ("0.333...", r"0.333\ldots", r"0.3333\dots", "0.333…", r"0.\overline{3}...")],
        *[(text, "1/3") for text in ("0,(3)", r"0{,}\overline{3}", r"0.3\text{ repeating}", r"0.\overset{.}{3}")],
        *[("0.1666...", "1/6"), ("0.2727...", "3/11"), ("0.999...", "1"), (r"2\times0.\overline{3}", "2/3")],
        *[("3.14159...", r"\pi"), ("2.718281828...", "e"), (r"0.\dot{1}\dot{2}\dot{3}", "41/333")],
        *[(r"33.\overline{3}\%", "1/3"), (r"0.\overline{3}\text{ (repeating)}", "1/3")],
    ],
    "units": [
        *[(text, "12") for text in ("12 cm", "12cm", "12 m", r"12\text{m}", "12km/h", "12 m/s", "12m/s", "12 A")],
        *[
            (text, "12")
            for text in (r"12\,\text{k}\Omega", "12 Ω", "12 μm", r"12\text{ M}", "12 Stück", "12¢", "12 fl oz")
        ],
        *[
            (text, "12")
            for text in (r"\$12/hour", r"\unit[12]{cm}", r"\SI{12}{\meter\per\second\squared}", r"\num{12}")
        ],
        *[(text, "25") for text in ("25 Km", "25 cm squared", "$25 per hour", "25 years old", "25-year-old", "25 ppm")],
        *[(text, "25") for text in ("25^o", r"25\degree", r"25{}^\circ\text{C}", "25º", "25 [m/s^2]", r"25 M_\odot")],
        *[
            (r"25\,{\rm m\,s^{-2}}", "25"),
            ("12 1/2 hours", "12.5"),
            ("25th day", "25"),
            (r"10\text{% more}", "10% more"),
        ],
        (r"\frac{3}{4} of an hour", "0.75"),
        (r"\frac{3}{4} m", "0.75"),
        (r"6.67\times10^{-11} N m^2 / kg^2", "6.67e-11"),
        (r"2+3\mathrm{i}", "2+3i"),
        ("2ab", "2ba"),
        ("5 m/s east", "5"),
    ],
    "words": [
        ("Alice and Bob", "Bob, Alice"),
        ("No!", "no"),
        (r"\text{no solution}", "No solutions"),
        ("m g h", "mgh"),
        ("(no)", "no"),
    ],
    "looks": [
        *[(rf"\{name}{{5}}", "5") for name in ("operatorname", "framebox", "makebox", "smash", "mathop", "underbrace")],
        *[(rf"\{name}{{5}}", "5") for name in ("mathcal", "scalebox{2}", "raisebox{0pt}", "framebox[1cm]", "symbf")],
        *[(rf"\begin{{{name}}}5\end{{{name}}}", "5") for name in ("equation*", "aligned", "gathered", "center")],
        *[
            (f"5{sign}", "5")
            for sign in (r"\checkmark", r"\ \blacksquare", r"\quad\square", r" \qed", " ✓", " ✅", " ∎")
        ],
        *[(text, "5") for text in ("<b>5</b>", "<answer>5</answer>", "5<br>", "5&nbsp;", "• 5", "# 5", "_5_", "==5==")],
        *[(text, "5") for text in ("「5」", "《5》", "‘5’", "→ 5", "∴ 5", ":= 5", "ca. 5", "About 5", "约5")],  # noqa: RUF001
        *[
            (text, "5")
            for text in ("Answer: 5", r"\text{The answer is } 5.", "**Final Answer:** $5$", "It is 5", "ans: 5")
        ],
        *[(text, "5") for text in ("答案是5", "最终答案：5", "Antwort: 5", "La réponse est 5", "Ответ: 5", "정답: 5")],  # noqa: RUF001
        *[(r"\lbrace 1,2\rbrace", r"\{1,2\}"), ("x<sup>2</sup>", "x^2"), ("&pi;", r"\pi"), ("–5", "-5")],  # noqa: RUF001
        *[
            (r"\sqrt 12", r"2\sqrt3"),
            ("√(x+1)", r"\sqrt{x+1}"),
            ("2θ", r"2\theta"),
            ("x≠3", r"x\ne3"),
            ("ℝ", r"\mathbb{R}"),  # noqa: RUF001
        ],
        *[(r"\emptyset", r"\varnothing"), (r"\varnothing", r"\{ \}"), (r"\text{empty set}", r"\emptyset")],
        *[
            (text, "5")
            for text in (r"\begin{equation*}\boxed{5}\end{equation*}", r"\underset{}{5}", r"5\mspace{3mu}", "=> 5")
        ],
        *[
            (text, "5")
            for text in (r"\iff 5", "Thus, 5", "exactly 5", "5.00 (3 s.f.)", r"5\text{ (to 2 d.p.)}", "*5* cm", "5?")
        ],
        *[
            ("2pi", r"2\pi"),
            ("1.234,5", "1234.5"),
            ("1.234.567", "1234567"),
            ("sqrt3", r"\sqrt{3}"),
            ("infinity", r"\infty"),
            ("x**2+1", "x^2+1"),
        ],
        *[(r"\ln 2", r"\log_e 2"), (r"\lg 2", r"\log_{10}2")],
        *[(text, "7.5") for text in (r"\pounds 7.5", r"\textdollar{}7.50", r"\euro{7.5}", r"R\$ 7,500e-3", "A$7.50")],
        *[(r"x\leqslant 4", r"x≤4"), (r"\geq 4", r"\ge4"), (r"\neq 4", "≠4"), (r"\mathbb Z", r"\mathbb{Z}")],
        *[(r"{6 \choose 2}", "15"), (r"0.{\overline{6}}", "2/3"), (r"\mathcal{O}(n^2)", "O(n^2)")],
        *[("(4e-3, 2e-3)", "(0.004, 0.002)"), (r"\{1,3e-2\}", r"\{0.03,1\}"), (r"9\text{ in.}^3", "9")],
        *[("a=1,200, b=300", "(1200,300)"), ("6:15 am", "6:15"), (r"\angle PQR", r"\angle RQP")],
    ],
}
DIFFERENT = {
    "choices": [
        *[("**A** the dog", "**B** the dog"), (r"\mathbf{A}\mathbf{x}", "A"), ("**A** and **C**", "A"), ("A、C", "A")],
        *[
            ("A:B=1:2", "A"),
            ("A.B=12", "A"),
            ("A'", "A"),
            ("[A][B]", "A"),
            ("A B", "A"),
            ("A: 5, B: 7", "A: 6, B: 8"),
            ("A. 5; B. 7", "A"),
            ("(A), (C)", "A"),
            ("A - B", "A"),
        ],
    ],
    "assignments": [
        (r"\begin{cases} x=1 \\ y=2 \end{cases}", "(2,1)"),
        (r"\{x=1,y=2\}", "(2,1)"),
        ("f(x)=1, g(x)=2", "(2,1)"),
        (r"x=1,y=2 \text{ or } x=3,y=4", "(2,1),(4,3)"),
        ("1,2", "(2,1)"),
        ("1 and 2", "(2,1)"),
        ("xy=1", "x=1"),
    ],
    "bases": [
        (r"234\text{ base }5", r"234\text{ base }7"),
        ("(234_5,1)", "(234_7,1)"),
        ("234_5, 12_5", "234_7, 12_7"),
        ("234_5+1_5", "234_7+1_7"),
        ("x=234_5", "x=234_7"),
        ("1011_2", "1011_10"),
        ("0b10", "0x10"),
        (r"2\cdot 12_7", r"2\cdot12_8"),
        ("12_b", "12_c"),
        ("(-1011)_2", "-1011_3"),
    ],
    "repeating decimals": [
        *[("0.333...", "0.333"), (r"0.3\text{ repeating}", "0.3"), ("0.1666...", "0.16"), ("1.4142...", "1.4143")],
        *[("2.718281828...", "2.71828"), (r"1,2,\ldots", "1,2"), ("1, 2, 3, ...", "1,2,3"), ("0.(3)", "0")],
    ],
    "numbers of any size": [
        ("x<10^{-20}", "x<10^{-21}"),
        (r"x\le 2^{-60}", r"x\le 2^{-61}"),
        ("0<x<10^{-20}", "0<x<10^{-21}"),
    ],
    "units": [
        *[
            (f"{value}{letters}", value)
            for value in ("3", "60")
            for letters in ("ab", "t", "m", "s", "g", "h", "mg", "bc", "d")
        ],
        *[(rf"{value} h", value) for value in (r"4\pi", r"\sqrt{2}r")],
        *[(r"\frac{1}{2}t", r"\frac{1}{2}"), (r"\frac{1}{2}ab", r"\frac12"), (r"\sqrt{2}s", r"\sqrt2"), ("2st", "2")],
        *[
            ("(2a,3b)", "(2,3)"),
            ("3m", "3n"),
            ("2mg", "2mh"),
            ("2rs", "2"),
            ("2pt", "2"),
            ("5 t", "5"),
            ("5 n", "5"),
            ("5 m n", "5"),
        ],
        *[
            ("5 m/s east", "5 m/s west"),
            (r"10\% increase", r"10\% decrease"),
            ("300 BC", "300 AD"),
            (r"30^\circ N", r"30^\circ S"),
        ],
        *[("5 January", "5 March"), ("5 hours 30 minutes", "5"), ("(1,000)", "1000"), ("5h30", "5")],
    ],
    "words": [
        *[
            ("No, it is", "On, it is"),
            ("(no)", "(on)"),
            ("no/yes", "on/yes"),
            ("no; yes", "on; yes"),
            ("(no,on)", "(on,no)"),
        ],
        *[("Alice, Bob", "Alice, Carol"), ("The answer is no", "on"), ("no way", "on way")],
    ],
    "looks": [
        *[
            ("Answer: 5", "Answer: 6"),
            ("answer", "5"),
            (">5", "5"),
            (r"\overline{5}", "5"),
            (r"\mathbb{R}", "R"),
            ("5♠", "5♥"),
        ],
        *[
            ("(1, 2e-3)", "(1, 3e-2)"),
            (r"\emptyset", "0"),
            (r"\angle PQR", r"\angle PRQ"),
            ("6:15 am", "6:15 pm"),
            (r"\emptyset", r"\{0\}"),
            (r"\ln 2", r"\log_2 2"),
            ("35", "0.35"),
            ("x<b", "x"),
            ("f'", "f"),
            ("5x-7y+4=0", "0"),
        ],
    ],
}
KINDS = [*SAME, *(kind for kind in DIFFERENT if kind not in SAME)]


@pytest.fixture(scope="module")
def checker():
    with AnswerChecker(timeout_s=60.0, num_workers=1) as shared:
        yield shared


@pytest.mark.parametrize("kind", KINDS)
def test_spellings_of_one_answer_are_equal_and_others_are_not(checker, kind):
    for equal, pairs in ((True, SAME.get(kind, [])), (False, DIFFERENT.get(kind, []))):
        for first, second in pairs:
            assert checker.equivalent(first, second) is equal, (first, second)
            assert checker.equivalent(second, first) is equal, (second, first)
            for answer in (first, second):
                form = canonicalize(answer)
                assert canonicalize(form) == form, answer
    assert (checker.timeouts, checker.failures) == (0, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_answers_changes_no_class(checker, kind):
    pairs = SAME.get(kind, []) + DIFFERENT.get(kind, [])
    answers = list(dict.fromkeys(itertools.chain.from_iterable(pairs)))[:40]
    partitions = set()
    for seed in range(3):
        order = random.Random(seed).sample(range(len(answers)), len(answers))
        classes = dict(zip(order, checker.classes([answers[i] for i in order]), strict=True))
        first = {classes[i]: i for i in reversed(range(len(answers)))}
        partitions.add(tuple(first[classes[i]] for i in range(len(answers))))
    assert len(partitions) == 1


@pytest.mark.parametrize(
    ("answers", "classes"),
    [
        (["35%", "0.35", "35"], [0, 1, 0]),
        (["35%", r"\frac{7}{20}", r"\frac{70}{2}"], [0, 1, 0]),
        (["35%", "0.35"], [0, 0]),
        (["234", "234_5", "234_7"], [0, 0, 1]),
        (["5", "5 east", "5 west"], [0, 0, 1]),
        (["6:15", "6:15 am", "6:15 pm"], [0, 0, 1]),
        (["1,2", "(1,2)", "(2,1)", "2,1"], [0, 0, 1, 0]),
    ],
)
def test_no_answer_joins_two_that_differ(checker, answers, classes):
    for order in itertools.permutations(range(len(answers))):
        found = checker.classes([answers[i] for i in order])
        pairs = itertools.combinations(range(len(answers)), 2)
        for i, j in pairs:
            assert (found[i] == found[j]) == (classes[order[i]] == classes[order[j]]), order
