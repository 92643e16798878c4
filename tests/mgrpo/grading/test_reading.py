"""Answers read out of responses as models write them: boxes, headings, numbers in prose, thoughts."""

from __future__ import annotations

import time

import pytest
import torch

from mgrpo.evaluation.evaluate import evaluate
from mgrpo.grading.checker import AnswerChecker
from mgrpo.grading.extract import make_extractor
from mgrpo.grading.thoughts import decode_responses, drop_thought, opened_thought
from mgrpo.tasks.arithmetic import make_tokenizer
from mgrpo.types import WeightTag

PLACEHOLDERS = [
    *[
        "",
        " ",
        "...",
        r"\ldots",
        r"\dots",
        "…",
        "___",
        r"\_\_",
        "?",
        "answer",
        "your answer",
        "Final Answer",
        r"\square",
        "solution",
    ],
    *[r"\phantom{0}", r"\hphantom{\frac{1}{2}}", r"\hspace*{2em}", r"\underline{\hspace{1cm}}", r"\rule{1cm}{0.4pt}"],
    *[r"\textcolor{red}{}", "□", "\u200b", "&nbsp;", "答案", "你的答案", "votre réponse", "Antwort", r"\[ \]", r"\%"],
    *[r"\text{answer}", r"\text{your final answer here}", r"\quad", "\\\n", "[answer]", "<your answer>", r"\boxed{}"],
]
BOXED = [
    (r"\boxed{3} and then \boxed{7}", "7"),
    (r"\boxed{5 \boxed{}}", r"5 \boxed{}"),
    (r"Put it in \boxed. It is \boxed 5", "5"),
    (r"It is \boxed{5}, in \boxed.", "5"),
    (r"\boxed{\{\}}", r"\{\}"),
    (r"\boxed{\emptyset}", r"\emptyset"),
    (r"\boxed{<}", "<"),
    (r"\boxed{\text{No}}", r"\text{No}"),
]
HASH = [
    ("#### Final Answer\n8", "8"),
    ("#### **Final Answer:**\n\n$8$", "$8$"),
    ("#### **Final Answer: 8**", "8"),
    ("#### **5**", "5"),
    ("##### 5 #####", "5"),
    ("####\n5", "5"),
    ("so\n#### 1,000", "1,000"),
    ("#### Result\n\n\\[\n\\boxed{7}\n\\]", r"\boxed{7}"),
    ("#### Solution\n---\n### Sum\n**12 cm**", "12 cm"),
    ("#### Step 3: the sum\nwe add", "we add"),
    ("#### 42\n\n#### Explanation", "42"),
    ("#### 42\n\n#### Explanation\nIt is so.", "42"),
    ("#### 3. Final Answer: 5", "5"),
    ("#### (1) Answer\n5", "5"),
    ("#### Step 4: The result\n5", "5"),
    ("#### Conclusion: 5", "5"),
    ("#### Total: 5", "5"),
    ("#### <b>5</b>", "<b>5</b>"),
    ("#### Final Answer", None),
    ("#### Conclusion\n\n", None),
    ("#### yes", "yes"),
    ("#### B\nmore", "B"),
    ("#### Paris", "Paris"),
    ("#### Answer\n- 8", "8"),
    ("#### Answer\n2. 8 cm", "8 cm"),
    ("#### Answer\n-8", "-8"),
    ("#### Calculate the price of 12 eggs\n12 * 2 = 24\n#### Price of 7 cartons:\n168", "168"),
    ("#### Find x for n=3\n24", "24"),
    ("#### Day 2\n24 eggs", "24 eggs"),
    ("#### Day 2", "Day 2"),
    ("#### 24:", "24"),
]
LAST_NUMBER = [
    ("The area is 12 cm^2.", "12"),
    ("The area is 12 cm2, or 12 cm².", "12"),
    ("x_1 + x^2 = 16 so x_{10}", "16"),
    ("About 6.02e23 of them.", "6.02e23"),
    ("it is 1e-5.", "1e-5"),
    (r"$6.02 \times 10^{23}$ atoms", r"6.02 \times 10^{23}"),
    ("1.6 x 10^-19 C", "1.6 x 10^-19"),
    ("6.02×10²³ atoms", "6.02×10²³"),  # noqa: RUF001
    ("2^{10}", "2^{10}"),
    ("2**10 ways", "2**10"),
    (r"So it is $\frac{3}{4}$.", r"\frac{3}{4}"),
    (r"So it is $-\dfrac{\pi}{4}$.", r"-\dfrac{\pi}{4}"),
    (r"\frac34", r"\frac34"),
    ("5 of \\frac{dy}{dx}", "5"),
    ("3 1/2 cups", "3 1/2"),
    ("3½ cups", "3½"),
    (r"2\sqrt{3} cm", r"2\sqrt{3}"),
    (r"3\pi", r"3\pi"),
    (r"0.1\overline{6}", r"0.1\overline{6}"),
    ("12 345 people", "12 345"),
    ("12\u202f345\u202f678 people", "12\u202f345\u202f678"),
    (r"12{,}345", "12{,}345"),
    (r"12\,345", r"12\,345"),
    ("1011_2", "1011_2"),
    ("a - 5", "5"),
    ("(3, -4)", "-4"),
    ("It costs 72 euros.", "72"),
    ("The answer is **72**.", "72"),
    ("2 + 3 = **5**", "5"),
    ("2**3", "2**3"),
    ("3 atoms in CO2 and H2O", "3"),
    ("it is √2", "√2"),
    ("it is √3/2", "√3/2"),
    ("it is 2√3", "2√3"),
    ("it is 0.333...", "0.333..."),
    ("it is 5...", "5"),
    ("it is 0.1(6)", "0.1(6)"),
    ("at 5:30", "5:30"),
    ("a ratio of 3:4.", "3:4"),
    ("it is –5", "–5"),  # noqa: RUF001
    ("x = - 5", "- 5"),
    ("1⁄2 of it", "1⁄2"),  # noqa: RUF001
    ("２３ apples", "23"),  # noqa: RUF001
    ("٢٣", "23"),
    ("The answer is __72__.", "72"),
    ("it is 3 / 4", "3 / 4"),
    (r"it is 2\pi/3", r"2\pi/3"),
    (r"it is \sqrt{3}/2", r"\sqrt{3}/2"),
    ("it is 7 ½", "7 ½"),
    ("it is 1.234,56 or so", "1.234,56"),
    ("24 atoms in C_6H_{12}O_6", "24"),
]


@pytest.mark.parametrize("placeholder", PLACEHOLDERS)
def test_a_box_without_content_hides_no_answer(placeholder):
    extract = make_extractor("boxed")
    assert extract(rf"So \boxed{{5}}. (Put the answer in \boxed{{{placeholder}}}.)") == "5"
    assert extract(rf"Put the answer in \boxed{{{placeholder}}}.") is None


@pytest.mark.parametrize(
    ("spec", "text", "answer"),
    [
        (spec, *pair)
        for spec, pairs in (("boxed", BOXED), ("hash", HASH), ("last-number", LAST_NUMBER))
        for pair in pairs
    ],
)
def test_what_is_read(spec, text, answer):
    assert make_extractor(spec)(text) == answer


THOUGHTS = [
    ("<think>or 4</think> so 5", " so 5"),
    ("or 4</think>\n\n5", "\n\n5"),
    ("<thinking>4</thinking>5", "5"),
    ("◁think▷4◁/think▷5", "5"),
    ("<thought>4</thought>5", "5"),
    ("<reasoning>4</reasoning>5", "5"),
    ("<|channel|>analysis<|message|>4<|end|><|start|>assistant<|channel|>final<|message|>5", "5"),
    ("<|channel|>analysis<|message|>4", None),
    ("<|START_THINKING|>4<|END_THINKING|><|START_RESPONSE|>5", "<|START_RESPONSE|>5"),
    ("<|START_THINKING|>4", None),
    ("<longcat_think>4</longcat_think>5", "5"),
    ("<|inner_prefix|>4<|inner_suffix|>5", "5"),
    ("<|channel>thought\n4<channel|>5", "5"),
    ("<|channel>thought\n4", None),
    ("<think>4</think> 5 <think>6</think> 7", " 7"),
    ("<think>or 4", None),
    ("<think>4</think> 5 <think>6", None),
    ("I think 5", "I think 5"),
    ("5", "5"),
]


@pytest.mark.parametrize(("text", "rest"), THOUGHTS)
def test_answers_are_read_behind_the_thought(text, rest):
    assert drop_thought(text) == rest
    for spec in ("last-number", r"regex:\d+"):
        assert make_extractor(spec)(text) == (None if rest is None else rest[-1])


@pytest.mark.parametrize(
    ("prompt", "mark"),
    [
        ("<|user|>2+2?<|assistant|><think>\n", "<think>"),
        ("<|user|>2+2?<|assistant|><think>\n\n</think>\n\n", ""),
        ("Put your thoughts in <think> </think>. 2+2?", ""),
        ("Begin with <think>. 2+2?", ""),
        ("2+2?", ""),
    ],
)
def test_a_thought_may_begin_in_the_prompt(prompt, mark):
    assert opened_thought(prompt) == mark


def thinking_tokenizer(*, special):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=special)
    return tokenizer


@pytest.mark.parametrize("special", [False, True])
def test_marks_of_a_thought_survive_decoding(special):
    tokenizer = thinking_tokenizer(special=special)

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False)

    prompts = [encode("1+1=<think>"), encode("1+1="), encode("1+1=<think>")]
    responses = [[*encode("3</think>2"), tokenizer.eos_token_id], encode("2"), encode("3")]
    texts = decode_responses(tokenizer, prompts, responses)
    assert texts == ["<think>3</think>2", "2", "<think>3"]
    assert [make_extractor(r"regex:\d")(text) for text in texts] == ["2", "2", None]


def test_an_evaluation_knows_which_prompts_open_a_thought():
    tokenizer = thinking_tokenizer(special=True)

    class Prompt:
        def __init__(self, text):
            self.ids, self.answer, self.index = tuple(tokenizer.encode(text, add_special_tokens=False)), "2", 0

    class Data:
        prompts = (Prompt("1+1=<think>"), Prompt("1+1="))

        def __len__(self):
            return 2

    class Rollouts:
        num_per_prompt, truncated, lengths = 1, torch.zeros(2, dtype=torch.bool), torch.ones(2)

        def response(self, row):
            return tokenizer.encode("2", add_special_tokens=False)

    class Engine:
        def generate(self, *args, **kwargs):
            return Rollouts()

    class Loaded:
        pass

    Loaded.tokenizer = tokenizer
    with AnswerChecker(mode="exact") as checker:
        found = evaluate(
            Engine(), Loaded(), Data(), make_extractor("last-number"), checker, None,
            samples=1, tag=WeightTag("policy", 0), greedy=False,
        )  # fmt: skip
    assert (found.avg_at_k, found.unparseable_share) == (0.5, 0.5)


@pytest.mark.parametrize("spec", ["boxed", "hash", "last-number"])
@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{}" * 100_000,
        r"\boxed{_" * 100_000 + "}" * 100_000,
        (r"\boxed{" + "answer " * 12 + "}") * 8_000,
        r"\frac{a" * 100_000,
        r"\sqrt{1" * 100_000,
        "^{" * 300_000,
        "1 " * 300_000,
        "1^{" * 200_000,
        "#### a\n" * 100_000,
        "####" + "\n" * 1_000_000,
        "#### " + "step " * 150_000,
        "*" * 1_000_000,
        "<think>" * 100_000,
        "</think>" * 100_000,
    ],
    ids=lambda text: text[:10],
)
def test_reading_is_linear(spec, text):
    start = time.process_time()
    make_extractor(spec)(text)
    assert time.process_time() - start < 5.0
