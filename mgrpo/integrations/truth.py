"""True answers in a library's rows, read as the trainer reads those of its data."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from mgrpo.grading.labels import make_label_reader
from mgrpo.inputs import InputError
from mgrpo.labels import Label, label_text

logger = logging.getLogger(__name__)


@functools.lru_cache
def make_truth_reader(spec: str) -> Callable[[Any], Label | None]:
    """Returns the function that makes a label of a value: text, a number, a list of those, or numpy's.

    A value in which no answer is found is None, as if there were no label, and the first of these is warned of: a run
    does not end for a metric.

    Args:
        spec: `answer.label_extract`, as for `make_label_reader`.

    Raises:
        InputError: unknown spec, or an invalid pattern.
    """
    read = make_label_reader(spec)
    warned = False

    def read_value(value: Any) -> Label | None:
        nonlocal warned
        try:
            text = label_text(value, "label", "mgrpo")
            label = read(text)
            problem = f"mgrpo: no answer was found in the label {text!r:.200}" if text and not label else None
        except InputError as error:
            label, problem = None, str(error)
        if problem and not warned:
            warned = True
            logger.warning("%s; it counts as none. Set answer.label_extract (%s now), or plain.", problem, spec)
        return label

    return read_value
