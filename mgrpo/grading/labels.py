"""Reads the answer of a label, which may be a worked solution as well as a bare answer."""

from __future__ import annotations

import re
from collections.abc import Callable

from mgrpo.errors import InputError
from mgrpo.grading.extract import make_extractor
from mgrpo.grading.label_text import Label, join_labels
from mgrpo.inputs import MAX_RECORD_BYTES

FORMATS = "auto, plain, boxed, hash, last-number or regex:PATTERN"
# Longer text without a marked answer is a solution, not an answer.
MAX_PLAIN_CHARS = 200
# The end of a solution that marks its answer in words alone.
_ANNOUNCED = re.compile(
    r"(?s:.*)(?:(?<![A-Za-z])(?:answer|ans\.?|(?:correct|right) (?:option|choice))"
    r"(?: +is(?: +equal +to)?(?![A-Za-z]|[ :]+not(?![A-Za-z]))[ :]*|[ *]*[:=]|[ *]*\n)"
    r"|(?:答案|故选|故選)[是为為]?[ :\uff1a]*)[ \t*]*"
    r"(?P<answer>(?:(?![.!?;]\s)[^\n]){1,100}?)[ \t*.!\u3002]*(?:\s*I hope (?:it|this|that) is correct[.!]?)?\s*\Z",
    re.IGNORECASE,
)
_TAGGED = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.IGNORECASE | re.DOTALL)
ANNOUNCED_CHARS = 200
# Extractors that are tried, and the longest text that is itself the answer where none finds one.
_READERS = {"auto": ("boxed", "hash"), "plain": ()}
_PLAIN = {"auto": MAX_PLAIN_CHARS, "plain": MAX_RECORD_BYTES}


def make_label_reader(spec: str) -> Callable[[Label | None], Label | None]:
    r"""Returns the function that extracts the answer of a label; its format may differ from that of responses.

    Args:
        spec: `auto` (the last \boxed{...}, else the line after ####, else the text in <answer> tags, else the text
            behind "answer is" or "Answer:" up to the end, else the whole text of at most 200 characters), `plain` (the
            whole text), or a spec of `make_extractor`.

    Returns:
        A function of a label, or of several, any of which is right. It returns None for None and for a label without
        an answer of the format.

    Raises:
        InputError: unknown spec, or an invalid pattern.

    """
    if spec not in (*_READERS, "boxed", "hash", "last-number") and not spec.startswith("regex:"):
        raise InputError(
            f"make_label_reader: spec must be {FORMATS}, got {spec!r}. Choose how the data give true answers."
        )
    readers = [make_extractor(name) for name in _READERS.get(spec, (spec,))]
    if spec == "auto":
        readers += [_find_tagged, _find_announced]
    longest = _PLAIN.get(spec, 0)

    def read_one(text: str) -> str | None:
        found = next((answer for reader in readers if (answer := reader(text)) is not None), None)
        return text if found is None and 0 < len(text.strip()) <= longest else found

    def read(label: Label | None) -> Label | None:
        if label is None or isinstance(label, str):
            return None if label is None else read_one(label)
        return join_labels(list(dict.fromkeys(text for one in label if (text := read_one(one)) is not None)))

    return read


def _find_tagged(text: str) -> str | None:
    """The text of the last <answer> tag."""
    found = _TAGGED.findall(text)
    return found[-1].strip() or None if found else None


def _find_announced(text: str) -> str | None:
    """The answer that a solution announces at its end."""
    match = _ANNOUNCED.match(text.rstrip()[-ANNOUNCED_CHARS:])
    return match["answer"].strip() or None if match else None
