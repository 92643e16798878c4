"""Answers: taken out of responses, brought to one form, and grouped by mathematical equivalence."""

from __future__ import annotations

import functools
import queue
import re
import threading
import unicodedata
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

from mgrpo.equivalence import EquivalenceWorker, WorkerError
from mgrpo.records import InputError

MAX_ANSWER_CHARS = 1000
MAX_MATH_CHARS = 300
MAX_UNDECIDED = 3
CACHED_VERDICTS = 65536

_BOX_OR_BRACE = re.compile(r"\\{1,2}(?:boxed|fbox)(?![A-Za-z])\s*(?:(\{)|([^\s{}$\\]+))?|\\.|([{}])", re.DOTALL)
_LAST_NUMBER = re.compile(
    r"(?:(?<![\w)\]}])[+\-\u2212])?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3}(?![0-9]))+|[0-9]+)(?:\.[0-9]+|/[0-9]+)?|(?<![0-9])\.[0-9]+)"
)


def make_extractor(spec: str) -> Callable[[str], str | None]:
    r"""Returns the function that takes the answer out of a response, or None where the response has none.

    Args:
        spec: `boxed` (the content of the last complete \boxed{...} or \fbox{...}, or the word after a \boxed without
            braces), `hash` (the rest of the line after the last ####), `last-number` (an integer, decimal or
            fraction with its sign, without a percent sign), or `regex:PATTERN` (the last match; its group where
            the pattern has one).

    Returns:
        A function of the response that never raises. Answers are stripped; an empty one, or one longer than
        1,000 characters, is None.

    Raises:
        ValueError: unknown spec, or a pattern that is empty, invalid, or has more than one group.

    Cost: linear in the response, but for `regex:`, whose cost is the pattern's.
    """
    if spec.startswith("regex:"):
        find = functools.partial(_find_pattern, _compile_pattern(spec))
    elif spec in _FINDERS:
        find = _FINDERS[spec]
    else:
        raise InputError(
            f"make_extractor: spec must be boxed, hash, last-number or regex:PATTERN, got {spec!r}. "
            "Choose how the model is told to mark its answer."
        )

    def extract(text: str) -> str | None:
        answer = (find(text) or "").strip()
        return answer if 0 < len(answer) <= MAX_ANSWER_CHARS else None

    return extract


def _compile_pattern(spec: str) -> re.Pattern[str]:
    """Compiles the pattern of a `regex:` spec."""
    try:
        pattern = re.compile(spec.removeprefix("regex:"))
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(
            f"make_extractor: spec must be regex: and a valid pattern, got {spec!r} ({error}). Correct the pattern."
        ) from error
    if not pattern.pattern or pattern.groups > 1:
        raise InputError(
            f"make_extractor: spec must be regex: and a pattern with at most one group, got {spec!r}. "
            "Turn the other groups into (?:...)."
        )
    return pattern


def _find_pattern(pattern: re.Pattern[str], text: str) -> str | None:
    """The last match, or its group."""
    last = None
    for match in pattern.finditer(text):
        last = match
    return last and last[pattern.groups]


def _find_boxed(text: str) -> str | None:
    """The content of the box that starts last among the complete ones."""
    if "boxed" not in text and "fbox" not in text:
        return None
    start, answer = -1, None
    open_boxes: list[int | None] = []  # one entry an open brace: where its content starts, None for no box
    for token in _BOX_OR_BRACE.finditer(text):
        box_brace, bare, brace = token.groups()
        if box_brace:
            open_boxes.append(token.end())
        elif bare:
            start, answer = token.start(2), bare
        elif brace == "{":
            open_boxes.append(None)
        elif brace == "}" and open_boxes:
            opened = open_boxes.pop()
            # Slicing every box of a deep nest would be quadratic; a box around the best one is never wanted.
            if opened is not None and opened > start:
                start, answer = opened, text[opened : token.start()]
    return answer


def _find_hash(text: str) -> str | None:
    """The rest of the line after the last ####."""
    _, marker, rest = text.rpartition("####")
    return re.split(r"[\r\n]", rest, maxsplit=1)[0] if marker else None


_FINDERS: dict[str, Callable[[str], str | None]] = {
    "boxed": _find_boxed,
    "hash": _find_hash,
    "last-number": functools.partial(_find_pattern, _LAST_NUMBER),
}

_SUPERSCRIPTS = re.compile("[⁰¹²³⁴-⁹⁺⁻⁽⁾ⁱⁿ]+")
_SUBSCRIPTS = re.compile("[₀-₉₊₋₍₎]+")
_VULGAR_FRACTION = re.compile("[¼-¾⅐-⅞↉]")
_SYMBOLS = str.maketrans(
    {
        "\u2044": "/",
        "−": "-",  # noqa: RUF001
        "∞": r"\infty ",
        "π": r"\pi ",
        "×": r"\times ",  # noqa: RUF001
        "÷": "/",
        "·": r"\cdot ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "°": r"^\circ ",
        "~": " ",
    }
)
_NUMBER = re.compile(r"([+-]?)([0-9]{1,3}(?:[ ,][0-9]{3})+|[0-9]*)(?:\.([0-9]*))?")
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"√\s*([0-9]+|[A-Za-z])", r"\\sqrt{\1}"),
        (r"\\?\$", ""),
        (r"\\%", "%"),
        (r"\\(?:left|right)(?![A-Za-z])\.?", ""),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"(?<=[0-9])(?:\\[,!]|\{,\})(?=[0-9]{3})", ","),
        (r"\\!", ""),
        (r"\\q?quad(?![A-Za-z])|(?<!\\)\\[,;:>\s]", " "),
        (r"\\(?:text(?:bf|it|rm)?|math(?:bf|it|rm)|mbox|fbox|boxed)\s*\{([^{}]*)\}", r" \1 "),
        (r"\\frac\s*([0-9])(?=\s*[0-9{])", r"\\frac{\1}"),
        (r"(\\frac\s*\{[^{}]*\})\s*([0-9])", r"\1{\2}"),
        (r"^\s*\\\((.*)\\\)\s*$|^\s*\\\[(.*)\\\]\s*$", r"\1\2"),
        (r"\s+", " "),
        (r" ?([^A-Za-z0-9 ]) ?", r"\1"),
        (r"^(-?[0-9]+) ([0-9]+)/([0-9]+)$", r"\1\\frac{\2}{\3}"),
        (r"^\+|[. ]+$", ""),
    )
]


def canonicalize(answer: str) -> str:
    r"""Rewrites an answer to the form in which equal strings are the same answer; deterministic and idempotent.

    Unicode is composed (NFKC; superscripts become powers), LaTeX spacing, `$`, \left, \right and text wrappers go,
    \dfrac becomes \frac with braces, and a plain number loses thousands separators, a plus sign, leading zeros and
    trailing decimal zeros. An answer of more than 1,000 characters is only stripped.
    """
    if len(answer) > MAX_ANSWER_CHARS:
        return answer.strip()
    return _normalize_number(answer) or _canonicalize(answer)


@functools.lru_cache(maxsize=16384)
def _canonicalize(answer: str) -> str:
    """Repeats the rewrites until nothing changes, which makes them idempotent."""
    while (rewritten := _rewrite(answer)) != answer:
        answer = rewritten
    return answer


def _rewrite(text: str) -> str:
    """One pass over all rewrites."""
    # NFKC alone would turn x² into x2, log₂8 into log28 and 1½ into 11/2.
    text = _SUPERSCRIPTS.sub(r"^{\g<0>}", text)
    text = _SUBSCRIPTS.sub(r"_{\g<0>}", text)
    text = _VULGAR_FRACTION.sub(_spell_fraction, text)
    text = unicodedata.normalize("NFKC", text).translate(_SYMBOLS).strip()
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return _normalize_number(text) or text


def _spell_fraction(match: re.Match[str]) -> str:
    """The LaTeX of a one-character fraction."""
    numerator, denominator = unicodedata.normalize("NFKC", match[0]).split("\u2044")
    return rf"\frac{{{numerator}}}{{{denominator}}}"


def _normalize_number(text: str) -> str | None:
    """The shortest decimal notation of a plain number, None for any other text."""
    match = _NUMBER.fullmatch(text)
    if match is None or not (match[2] or match[3]):
        return None
    whole = match[2].replace(",", "").replace(" ", "").lstrip("0") or "0"
    decimals = (match[3] or "").rstrip("0")
    number = f"{whole}.{decimals}" if decimals else whole
    return f"-{number}" if match[1] == "-" and number != "0" else number


_RATIONAL = re.compile(
    r"(?P<decimal>-?[0-9]+(?:\.[0-9]+)?)"
    r"|(?P<sign>-?)(?:(?P<whole>[0-9]+)?\\frac\{(?P<num>[0-9]+)\}\{(?P<den>[0-9]+)\}|(?P<num2>[0-9]+)/(?P<den2>[0-9]+))"
)
_WORDS = re.compile(r"(?=.*[A-Za-z]{3})[A-Za-z][A-Za-z '\-]*")


@functools.lru_cache(maxsize=16384)
def _rational(form: str) -> Fraction | None:
    """The exact value of a canonical integer, decimal or simple fraction of bounded length."""
    match = _RATIONAL.fullmatch(form)
    if match is None:
        return None
    if match["decimal"]:
        return Fraction(match["decimal"])
    numerator, denominator = int(match["num"] or match["num2"]), int(match["den"] or match["den2"])
    if denominator == 0:
        return None
    value = int(match["whole"] or 0) + Fraction(numerator, denominator)
    return -value if match["sign"] else value


def _compare_cheaply(first: str, second: str) -> bool | None:
    """The verdict on two different canonical forms where it needs no algebra, else None."""
    if max(len(first), len(second)) > MAX_MATH_CHARS:
        return False
    if _WORDS.fullmatch(first) or _WORDS.fullmatch(second):
        # To an algebra system words are products of letters, and anagrams equal.
        return first.casefold() == second.casefold()
    one, other = _rational(first), _rational(second)
    if one is None or other is None:
        return None
    if one == other:
        return True
    # 1/3 and 0.333333 are left to math-verify, which rounds.
    return None if ("." in first) != ("." in second) and ("/" in first + second or "\\" in first + second) else False


def _form_order(form: str) -> tuple[int, str]:
    """Short forms come first, and so represent their classes."""
    return len(form), form


class AnswerChecker:
    """Decides which answers are mathematically the same; safe to share between threads.

    Equal canonical forms are equivalent. In mode `math` two other forms are compared exactly where both are plain
    numbers or fractions, as text where one is made of words, and otherwise by math-verify in both directions in a
    worker process, so that the verdict is symmetric. It is not transitive (rounding), which `classes` allows for.
    Forms of more than 300 characters are equivalent only where equal. A pair that hits the limit, or kills its
    worker, is not equivalent. Where no worker can be started at all, the call raises StartError. Verdicts are kept
    (the last 65,536 pairs).

    Args:
        mode: `exact` (equal canonical forms only) or `math`.
        timeout_s: limit of one pair in a worker, in seconds of processor time, above 0.
        num_workers: worker processes, at least 1; they start when first needed. `group_classes` uses all of them.

    Attributes:
        timeouts: pairs that hit the limit.
        failures: pairs that killed their worker or ran out of memory.
        skipped: pairs that `classes` left uncompared because the same call already had 3 of the above.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, *, mode: str = "math", timeout_s: float = 5.0, num_workers: int = 1) -> None:
        if mode not in ("exact", "math"):
            raise ValueError(f"AnswerChecker: mode must be exact or math, got {mode!r}. Use math for formulas.")
        if not 0 < timeout_s < float("inf"):
            raise ValueError(f"AnswerChecker: timeout_s must be above 0 and finite, got {timeout_s}. Use 5.")
        if num_workers < 1:
            raise ValueError(f"AnswerChecker: num_workers must be at least 1, got {num_workers}. Use 1.")
        self.mode = mode
        self.timeouts = self.failures = self.skipped = 0
        self._workers = [EquivalenceWorker(timeout_s=timeout_s) for _ in range(num_workers)]
        self._idle: queue.LifoQueue[EquivalenceWorker] = queue.LifoQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._counters = threading.Lock()
        self._verdict = functools.lru_cache(maxsize=CACHED_VERDICTS)(self._ask_worker)

    def __enter__(self) -> AnswerChecker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all worker processes, none of which may be in use; a later pair that needs one starts it again."""
        for worker in self._workers:
            worker.close()

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the running workers."""
        return [pid for worker in self._workers if (pid := worker.pid) is not None]

    def equivalent(self, first: str, second: str) -> bool:
        """Whether two answers are the same; symmetric."""
        return bool(self._compare(canonicalize(first), canonicalize(second)))

    def is_correct(self, answer: str | None, label: str | None) -> bool:
        """Whether an answer matches the label; False where either is None or blank."""
        if answer is None or label is None or not canonicalize(label):
            return False
        return self.equivalent(answer, label)

    def classes(self, answers: Sequence[str | None]) -> list[int]:
        """Class ids of one prompt's answers: equal ids for equivalent answers, numbered from 0 by first appearance.

        None and blank answers get -1. The partition does not depend on the order of the answers: the distinct forms
        are taken by length, then alphabetically, and each joins the first class whose first form it is equivalent
        to. After 3 undecided pairs (time limit, dead worker) the remaining pairs are compared without a worker.
        """
        forms = ["" if answer is None else canonicalize(answer) for answer in answers]
        representative = self._find_representatives(sorted({form for form in forms if form}, key=_form_order))
        ids: dict[str, int] = {}
        return [ids.setdefault(representative[form], len(ids)) if form else -1 for form in forms]

    def group_classes(self, groups: Sequence[Sequence[str | None]]) -> list[list[int]]:
        """`classes` of each prompt's answers; the prompts are spread over the workers."""
        if len(self._workers) == 1:
            return [self.classes(group) for group in groups]
        with ThreadPoolExecutor(len(self._workers)) as threads:
            return list(threads.map(self.classes, groups))

    def _find_representatives(self, forms: list[str]) -> dict[str, str]:
        """Maps each of the sorted forms to the first form of its class."""
        representative: dict[str, str] = {}
        heads: list[str] = []
        undecided = 0
        for form in forms:
            for head in heads:
                verdict = self._compare(head, form, use_worker=undecided < MAX_UNDECIDED)
                undecided += verdict is None
                if verdict:
                    representative[form] = head
                    break
            else:
                heads.append(form)
                representative[form] = form
        return representative

    def _compare(self, first: str, second: str, *, use_worker: bool = True) -> bool | None:
        """The verdict on two canonical forms, None where no worker could reach one."""
        if first == second:
            return True
        if self.mode == "exact" or not first or not second:
            return False
        verdict = _compare_cheaply(first, second)
        if verdict is not None:
            return verdict
        if not use_worker:
            with self._counters:
                self.skipped += 1
            return False
        return self._verdict(*sorted((first, second), key=_form_order))

    def _ask_worker(self, first: str, second: str) -> bool | None:
        """Has an idle worker compare two forms."""
        worker = self._idle.get()
        try:
            return worker.compare(first, second)
        except TimeoutError:
            with self._counters:
                self.timeouts += 1
        except WorkerError:
            with self._counters:
                self.failures += 1
        finally:
            self._idle.put(worker)
        return None
