"""Which answers are mathematically the same, pairs and groups."""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from mgrpo.grading.canonical import canonicalize
from mgrpo.grading.meaning import align, compare_cheaply, reduce_form
from mgrpo.grading.worker import EquivalenceWorker, WorkerError
from mgrpo.labels import Label

MAX_UNDECIDED = 3
CACHED_VERDICTS = 65536


def _form_order(form: str) -> tuple[int, str]:
    """Short forms come first, and so represent their classes."""
    return len(form), form


class AnswerChecker:
    """Decides which answers are mathematically the same; safe to share between threads.

    Equal canonical forms are equivalent. In mode `math` units and the texts of choices do not count; two other forms
    are compared exactly where both are rational numbers, as text where both are words, and otherwise by math-verify in
    both directions in a worker process, so that the verdict is symmetric. It is not transitive (rounding), which
    `classes` allows for.
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
        return bool(self._compare(self._form(first), self._form(second)))

    def is_correct(self, answer: str | None, label: Label | None) -> bool:
        """Whether an answer matches the label, or any of several; False where either is None or blank."""
        labels = (label,) if isinstance(label, str) else label or ()
        return answer is not None and any(canonicalize(one) and self.equivalent(answer, one) for one in labels)

    def classes(self, answers: Sequence[str | None]) -> list[int]:
        """Class ids of one prompt's answers: equal ids for equivalent answers, numbered from 0 by first appearance.

        None and blank answers get -1. The partition does not depend on the order of the answers: the distinct forms
        are taken by length, then alphabetically, and each joins the first class whose first form it is equivalent
        to. After 3 undecided pairs (time limit, dead worker) the remaining pairs are compared without a worker.
        """
        forms = ["" if answer is None else self._form(answer) for answer in answers]
        representative = self._find_representatives(sorted({form for form in forms if form}, key=_form_order))
        ids: dict[str, int] = {}
        return [ids.setdefault(representative[form], len(ids)) if form else -1 for form in forms]

    def group_classes(self, groups: Sequence[Sequence[str | None]]) -> list[list[int]]:
        """`classes` of each prompt's answers; the prompts are spread over the workers."""
        if len(self._workers) == 1:
            return [self.classes(group) for group in groups]
        with ThreadPoolExecutor(len(self._workers)) as threads:
            return list(threads.map(self.classes, groups))

    def _form(self, answer: str) -> str:
        """What an answer is compared by."""
        form = canonicalize(answer)
        return reduce_form(form) if self.mode == "math" else form

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
        verdict = compare_cheaply(first, second)
        if verdict is not None:
            return verdict
        if not use_worker:
            with self._counters:
                self.skipped += 1
            return False
        first, second = sorted(align(first, second) or (first, second), key=_form_order)
        return self._verdict(first, second)

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
