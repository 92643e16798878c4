"""What answers mean: pairs as models write them that are the same, and pairs that are not."""

from __future__ import annotations

import logging
import random

import pytest

from mgrpo.grading.canonical import canonicalize
from mgrpo.grading.checker import AnswerChecker

SAME = {
    "choices": [
        (r"\textbf{(B)}\ 12", "B"),
        ("B. 12", "B"),
        ("B) 12", "(B)"),
        ("B: Paris", "B"),
        ("**B.** Paris", "B"),
        (r"\text{B. } 12", r"\mathrm{(B)}"),
        (r"\textbf{(A)}\ -3", "A"),
        (r"\mathrm{(J)}\ x^2", "J."),
        ("(D) none of these", r"\textbf{(D) }\text{other words}"),
        ("Option B", "B"),
    ],
    "assignments": [
        ("x=1,y=2", "y=2, x=1"),
        ("x=1,y=2", "(1,2)"),
        ("y=2,x=1", "(1,2)"),
        ("(x,y)=(1,2)", "(1,2)"),
        ("(x,y)=(1,2)", r"x=1\text{ and }y=2"),
        ("x=1/2,y=2", "y=2,x=0.5"),
        (r"r=2,\theta=\frac{\pi}{3}", r"(2,\frac{\pi}{3})"),
    ],
    "bases": [
        ("234_5", "234"),
        ("234_{5}", "234_5"),
        ("(234)_5", "234_{5}"),
        (r"234_{\text{five}}", "234_5"),
        ("0101_2", "101_2"),
        ("1a_{16}", "1A_{16}"),
    ],
    "numbers with e": [
        ("1.5e3", "1500"),
        ("1.5E+3", "1500"),
        ("1e-5", "0.00001"),
        ("1e-4", r"\sqrt{10^{-8}}"),
        ("-2.5e-2", "-0.025"),
        ("1.5e3 m", "1500"),
        ("6.02e23", "6.02 x 10^23"),
        ("2e-3", "0.002"),
        ("2e-3", "-3+2e"),
    ],
    "repeating decimals": [
        (r"0.\overline{3}", r"\frac{1}{3}"),
        (r"0.\bar3", "1/3"),
        (r"-1.1\overline{6}", r"-\frac{7}{6}"),
        (r"0.\overline{142857}", r"\frac{1}{7}"),
        (r"0.\dot{1}4285\dot{7}", "1/7"),
        (r"0.\dot1\dot8", "2/11"),
        (r".\overline{9}", "1"),
        ("0.(3)", "1/3"),
        ("0.3\u0305", "1/3"),
        (r"33.\overline{3}\%", r"\frac{100}{3}\%"),
        (r"0.\overline{3}x", r"\frac{x}{3}"),
    ],
    "numbers of any size": [
        (r"1.6\times10^{-19}", r"16\times10^{-20}"),
        ("2^{-60}", r"\frac{1}{2^{60}}"),
        (r"\frac{1}{52!}", r"\frac{1}{52\cdot51!}"),
        (r"e^{-50}", r"\frac{1}{e^{50}}"),
        (r"\sqrt{2}\times10^{-20}", r"10^{-20}\sqrt{2}"),
        (r"\frac{10^9}{7}", "142857142.857"),
        (r"100\sqrt{2}", "141.42136"),
        ("1/30", "0.033333"),
        ("0", r"\sin(\pi)"),
    ],
    "units": [
        ("5 cm", "5 m"),
        ("5 km/h", "5"),
        ("60 mph", "60"),
        ("9.8 m s^{-2}", r"9.8\ \mathrm{m/s^2}"),
        (r"9.8\text{ m}/\text{s}^2", "9.8"),
        (r"12\mathrm{~cm}^2", "12"),
        (r"5\,\frac{\text{km}}{\text{h}}", "5"),
        (r"5\sqrt{3}\text{ widgets}", r"\sqrt{75}"),
        (r"\frac{3}{4}\text{ hour}", "0.75"),
        (r"20^\circ\text{C}", "20"),
        ("20°C", "20"),
        ("5 sq. ft.", "5"),
        ("18 apples", r"18\text{ apples}"),
        (r"5\,\mu\text{m}", "5"),
        (r"\text{5 cm}", "5"),
        (r"5 {\rm cm}", "5"),
        (r"5 \text{cm}^\text{2}", "5"),
        (r"x = 5\text{ cm}", "5"),
        (r"3\text{ cm}, 4\text{ cm}", "3,4"),
        ("€5", "5"),
        ("USD 5", r"5\text{ dollars}"),
        (r"5^{\text{th}}", "5th"),
        ("3 million", "3,000,000"),
        (r"12.5\%", "12.5"),
        (r"35.0\%", "35"),
        ("35.00 cm", "35"),
        (r"\mathbf{12\,\mathrm{m}\cdot\mathrm{s}^{-2}}", "12"),
        (r"12.5\%", "0.125"),
        ("12.5 percent", r"\frac{1}{8}"),
    ],
    "words": [("No", "no"), (r"\text{NE}", "ne"), ("xyz", r"x\cdot y\cdot z"), ("ab", r"b\cdot a"), ("x y", "yx")],
    "looks": [
        (r"\boldsymbol{\frac{1}{2}}", "0.5"),
        (r"\textcolor{red}{\frac{1}{2}}", "0.5"),
        (r"\color[RGB]{1,2,3}5", "5"),
        (r"\underline{\underline{5}}", "5"),
        (r"\mathbf 5", "5"),
        (r"{\Huge 5}", "5"),
        (r"\displaystyle\frac12", "0.5"),
        (r"\bigl(1,2\bigr)", "(1,2)"),
        (r"\approx 3.14", "3.14"),
        ("≈3.14", "= 3.14"),
        ("~3.14", "about 3.14"),
        ("**5**", "`5`"),
        ("__5__", "5"),
        ("5,", "5;"),
        ("5。", "5،"),
        ("5।", r"5\\"),
        ("٤٢", "４２"),  # noqa: RUF001
        ("\u200f42\u200e", "42"),
        ("1’000’000", "1 000 000"),  # noqa: RUF001
        ("x=1,000", "1000"),
        (r"\nicefrac{1}{2}", r"{1 \over 2}"),
    ],
}
DIFFERENT = {
    "choices": [
        ("(A) 5", "(B) 5"),
        ("A: Paris", "B: Paris"),
        ("(A)+1", "A"),
        ("(A)(B)", "A"),
        ("A and B", "A"),
        ("A.M.", "A"),
        ("J.K. Rowling", "J.R.R. Tolkien"),
        ("(1,2)", "A"),
    ],
    "assignments": [
        ("x=1,y=2", "(2,1)"),
        ("y=2,x=1", "(2,1)"),
        ("(x,y)=(1,2)", "(2,1)"),
        ("x=1,y=2", "x=2,y=1"),
        ("x=1,y=2", "a=1,b=2"),
        ("a=1,b=2,c=3", "(3,2,1)"),
    ],
    "bases": [("234_5", "234_7"), ("(234)_5", "234_{7}"), ("A1_{16}", "A1_{12}"), ("10_2", "2"), ("234_5", "243_5")],
    "numbers with e": [("2e3", "3e2"), ("1e6", "6e1"), ("2e", "2"), ("e^3", "3"), ("2e-3", "3e-2"), ("1.5e3", "1.5")],
    "repeating decimals": [
        (r"0.\overline{3}", "0.3"),
        (r"0.\overline{3}", "0.33"),
        (r"0.3\overline{4}", "0.34"),
        (r"0.\dot{1}\dot{2}", "0.12"),
        (r"0.\overline{12}", r"0.1\overline{2}"),
    ],
    "numbers of any size": [
        (r"1.6\times10^{-19}", r"9.1\times10^{-31}"),
        (r"q=1.6\times10^{-19}", r"q=9.1\times10^{-31}"),
        ("1.6e-19", r"1.602\times10^{-19}"),
        (r"\frac{1}{2^{60}}", r"\frac{1}{2^{61}}"),
        (r"\frac{1}{52!}", r"\frac{1}{51!}"),
        (r"\frac{1}{2^{6000}}", r"\frac{1}{2^{6001}}"),
        ("e^{-50}", "e^{-60}"),
        (r"2^{-100}\pi", r"2^{-101}\pi"),
        (r"(10^{-20},1)", r"(10^{-30},1)"),
        (r"\{10^{-20},1\}", r"\{10^{-30},1\}"),
        (r"\frac{\pi}{10^{20}}", r"\frac{\sqrt{2}}{10^{20}}"),
        (r"\frac{1}{3000000}", "0.0000003"),
        ("0", "10^{-20}"),
        ("10^{15}+1", "10^{15}"),
        ("1/3", "0.33"),
    ],
    "units": [
        (r"12\text{ cm}^2", "144"),
        (r"12\text{ cm}^2", r"13\text{ cm}^2"),
        ("5 ft 3 in", "5"),
        ("5 hours 30 minutes", "5 hours 20 minutes"),
        (r"5\text{ hours }30\text{ minutes}", "5"),
        ("5 pm", "5 a.m."),
        ("3 million", "3"),
        ("12 xyz", "12"),
        ("5x", "5"),
        (r"3\mathrm{i}", "3"),
        (r"2\mathrm{e}", "2"),
        ("3 and 4", "3"),
        ("5 or 6", "5"),
        (r"n\text{ is odd}", r"n\text{ is even}"),
        (r"5\text{ mod }7", "5"),
        ("5 choose 2", "5"),
        ("5 remainder 3", "5"),
        (r"50\%", "0.05"),
        (r"\sin 30^\circ", "30"),
    ],
    "words": [("no", "on"), ("No", "on"), ("up", "pu"), ("NE", "EN"), ("ab", "ba"), ("да", "ад"), ("cat", "act")],
    "looks": [(r"\overline{5}", "6"), (r"5^{2}", "5"), ("10^{3}", "10"), ("1.234.567", "1.234"), ("5!", "5")],
}


@pytest.fixture(scope="module")
def checker():
    with AnswerChecker(timeout_s=60.0) as shared:
        yield shared


@pytest.mark.parametrize("kind", SAME)
def test_same_answers_are_equal(checker, kind):
    for first, second in SAME[kind]:
        assert checker.equivalent(first, second), (first, second)
        assert checker.equivalent(second, first), (second, first)


@pytest.mark.parametrize("kind", DIFFERENT)
def test_different_answers_stay_apart(checker, kind):
    for first, second in DIFFERENT[kind]:
        assert not checker.equivalent(first, second), (first, second)
        assert not checker.equivalent(second, first), (second, first)
    assert (checker.timeouts, checker.failures) == (0, 0)


@pytest.mark.parametrize("kind", [*SAME])
def test_forms_of_decorated_answers_are_their_own(kind):
    for answer in {answer for pair in [*SAME[kind], *DIFFERENT[kind]] for answer in pair}:
        assert canonicalize(canonicalize(answer)) == canonicalize(answer), answer


def test_small_numbers_that_differ_are_classes_of_their_own(checker):
    answers = [
        "1.6e-19",
        r"9.1\times10^{-31}",
        r"16\times10^{-20}",
        r"\frac{1}{52!}",
        r"2^{-60}",
        r"\frac{1}{2^{60}}",
        "e^{-70}",
    ]
    assert checker.classes(answers) == [0, 1, 0, 2, 3, 3, 4]


VALUES = [
    *["5", "12", "-3", "0.5", "3.14", "1,000", r"\frac{3}{4}", r"\frac12", r"2\sqrt{3}", r"3\pi", "2^{10}", "x^2+1"],
    *["(1,2)", r"\{1,2\}", "1,2,3", "x=5", "10^{-3}", "7!", r"3\frac{1}{2}", "x+y=3", r"x\le 3", r"1.2\times 10^{4}"],
    *[r"\frac{\pi}{4}", r"\sqrt[3]{2}", "3x-2", "e^2", "[1,2)"],
]
# Of each form, what math-verify takes for no more than looks.
DECORATIONS = [
    *["{}", r"\approx {}", "={}", r"\sim {}", "{},", "{}.", "{};", r"\large {}", r"\displaystyle {}", r"\mathbf{{{}}}"],
    *[
        r"\boxed{{{}}}",
        "{{{}}}",
        r"\mathrm{{{}}}",
        r"\textbf{{{}}}",
        r"\,{}\,",
        r"\quad {}",
        r"\$ {}",
        r"{}\!",
        "{}\\\\ ",
    ],
    *[
        r"{}\ldots",
        "'{}'",
        '"{}"',
        r"\mathit{{{}}}",
        r"{}\text{{ (approx)}}",
        r"\rm {}",
        r"\simeq {}",
        r"\therefore {}",
    ],
    *[r"\Rightarrow {}", r"y={}", r"f(x)={}", r"\left({}\right)"],
]
UNITS = [
    *["", r"\text{ cm}^2", r"\,\text{cm}^{2}", r"\text{ m/s}", r"\mathrm{~cm}^2", r"\text{ km}/\text{h}", " cm", " km"],
    *[
        r"\text{ km}\cdot\text{h}^{-1}",
        r"\frac{\text{m}}{\text{s}}",
        r"\;\mathrm{kg}\,\mathrm{m}^2",
        r"\text{ widgets}",
    ],
    *[r"\text{ square units}", r"\ \text{inches}", " feet", " students", r"^\circ", r"^\circ\text{C}", r"\mbox{ cm}^3"],
    *[
        r"\text{ units}^2",
        r"\text{ miles per hour}",
        r"\text{ J/(kg K)}",
        r"\text{th}",
        r"\text{ N}",
        r"\text{ kg m/s}^2",
    ],
    *[r"\mathrm{ cm^2}", r"\text{ cm$^2$}", r"\text{ sq. ft.}", r"\textit{ m}", r"\text{cents}", r"\:\text{V}", " mph"],
    *[
        r"\text{ xyz}",
        r"\ \mathrm{m}\cdot\mathrm{s}^{-2}",
        r"\text{ bottles of water}",
        r"\text{ 立方米}",
        r"\text{ in}^2",
    ],
]


@pytest.mark.parametrize("seed", [0, 1])
def test_what_math_verify_accepts_as_written_is_accepted(checker, seed):
    """Decorated values with units against each other; none of our own rules tells these apart."""
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    rng = random.Random(seed)

    def write(value):
        return rng.choice(DECORATIONS if rng.random() < 0.5 else ["{}"]).format(value + rng.choice(UNITS))

    accepted = 0
    for _ in range(150):
        value = rng.choice(VALUES)
        first, second = write(value), write(value) if rng.random() < 0.5 else value
        one, other = (parse(f"${text}$", parsing_timeout=0) for text in (first, second))
        if verify(one, other, timeout_seconds=0):
            accepted += 1
            assert checker.equivalent(first, second), (first, second)
    assert accepted > 60
