"""Compares answers mathematically, in pairs and groups."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from mgrpo.distributed.environment import local_size
from mgrpo.grading.canonical import canonicalize
from mgrpo.grading.label_text import Label
from mgrpo.grading.matching import Fingerprint, may_be_equal, read_fingerprint
from mgrpo.grading.meaning import align, compare_cheaply, rank, reduce_form
from mgrpo.grading.memo import Memo
from mgrpo.grading.watch import Watch
from mgrpo.grading.worker import EquivalenceWorker, WorkerError
from mgrpo.process.threads import available_cpus

T = TypeVar("T")

MAX_UNDECIDED = 3
CACHED_PAIRS = 65536
CACHED_FINGERPRINTS = 16384
# Each takes about 100 MB, and few prompts of a step keep one busy for long.
MAX_DEFAULT_WORKERS = 8


def _form_order(form: str) -> tuple[int, int, str]:
    """The sort key of a form: the first form of a class represents it."""
    return rank(form), len(form), form


def _as_compared(first: str, second: str) -> tuple[str, str]:
    """Two forms as a worker receives them."""
    one, other = sorted(align(first, second) or (first, second), key=_form_order)
    return one, other


def default_workers() -> int:
    """One worker a core that this process may use, shared with the other ranks of the machine; at most 8."""
    return max(1, min(available_cpus() // local_size(), MAX_DEFAULT_WORKERS))


class AnswerChecker:
    """Decides which answers are mathematically the same; thread-safe.

    Equal canonical forms are equivalent. In mode `math`, units and the texts of choices are ignored; two rational
    numbers are compared exactly, words as text, and other forms by math-verify in both directions in a worker process,
    so that the result is symmetric. It is not transitive (rounding), which `classes` allows for.
    Forms of more than 300 characters are equivalent only if equal. A pair that exceeds the time limit or kills its
    worker is not equivalent. If no worker can be started, the call raises StartError. The results of the last 65,536
    pairs are kept.

    The answers of one prompt are first told apart by fingerprints, one a form and made in a worker, so that only pairs
    whose kinds and values at fixed points agree are compared. The classes are the same.

    Args:
        mode: `exact` (equal canonical forms only) or `math`.
        timeout_s: limit of one pair or fingerprint in a worker, in seconds of CPU time, above 0.
        num_workers: worker processes, at least 1; None for `default_workers`. They start when first needed, and
            `group_classes` uses all of them.

    Attributes:
        timeouts: pairs and fingerprints that exceeded the limit.
        failures: pairs and fingerprints that killed their worker or ran out of memory.
        skipped: pairs that `classes` did not compare because a form had no fingerprint, or because the same call
            already had 3 timeouts or failures.
        watch: called by `group_classes` with the numbers of finished and all prompts if it takes more than 5 s.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, *, mode: str = "math", timeout_s: float = 5.0, num_workers: int | None = None) -> None:
        if mode not in ("exact", "math"):
            raise ValueError(f"AnswerChecker: mode must be exact or math, got {mode!r}. Use math for formulas.")
        if not 0 < timeout_s < float("inf"):
            raise ValueError(f"AnswerChecker: timeout_s must be above 0 and finite, got {timeout_s}. Use 5.")
        num_workers = default_workers() if num_workers is None else num_workers
        if num_workers < 1:
            raise ValueError(f"AnswerChecker: num_workers must be at least 1, got {num_workers}. Use 1.")
        self.mode = mode
        self.timeouts = self.failures = self.skipped = 0
        self._workers = [EquivalenceWorker(timeout_s=timeout_s) for _ in range(num_workers)]
        self._idle: queue.LifoQueue[EquivalenceWorker] = queue.LifoQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._counters = threading.Lock()
        self.watch: Callable[[int, int], None] | None = None
        self._is_equal = Memo(self._ask_equal, CACHED_PAIRS)
        self._fingerprint = Memo(self._ask_fingerprint, CACHED_FINGERPRINTS)

    def __enter__(self) -> AnswerChecker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all worker processes, none of which may be in use; a later pair starts one again."""
        for worker in self._workers:
            worker.close()

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the running workers."""
        return [pid for worker in self._workers if (pid := worker.pid) is not None]

    def equivalent(self, first: str, second: str) -> bool:
        """Whether two answers are the same; symmetric."""
        first, second = sorted((self._form(first), self._form(second)), key=_form_order)
        equal = self._compare_without_worker(first, second)
        if equal is None:
            pair = _as_compared(first, second)
            equal = not self._are_told_apart(*pair) and self._is_equal(*pair)
        return bool(equal)

    def is_correct(self, answer: str | None, label: Label | None) -> bool:
        """Whether an answer matches the label, or any of several; False where either is None or blank."""
        labels = (label,) if isinstance(label, str) else label or ()
        return answer is not None and any(canonicalize(one) and self.equivalent(answer, one) for one in labels)

    def classes(self, answers: Sequence[str | None]) -> list[int]:
        """Class ids of one prompt's answers: equal ids for equivalent answers, numbered from 0 by first appearance.

        None and blank answers get -1. The partition does not depend on the order of the answers: the distinct forms
        are sorted by rank (those with a base or a direction first, percentages last), length and alphabet, and each
        joins the first class whose first form it is equivalent to. A form without a fingerprint (time limit, dead
        worker), and every form after 3 undecided pairs, is compared without a worker.
        """
        return self._classify(answers, Watch(1, None))

    def group_classes(self, groups: Sequence[Sequence[str | None]]) -> list[list[int]]:
        """`classes` of each prompt's answers, with the prompts spread over the workers."""
        watch = Watch(len(groups), self.watch)
        if min(len(self._workers), len(groups)) < 2 or self.mode == "exact":
            return [self._classify(group, watch) for group in groups]
        with ThreadPoolExecutor(len(self._workers)) as threads:
            try:
                return list(threads.map(lambda group: self._classify(group, watch), groups))
            except BaseException:
                watch.stop()
                raise

    def _form(self, answer: str) -> str:
        """The form by which an answer is compared."""
        form = canonicalize(answer)
        return reduce_form(form) if self.mode == "math" else form

    def _classify(self, answers: Sequence[str | None], watch: Watch) -> list[int]:
        """Class ids of one prompt's answers."""
        forms = ["" if answer is None else self._form(answer) for answer in answers]
        representative = self._find_representatives(sorted({form for form in forms if form}, key=_form_order), watch)
        ids: dict[str, int] = {}
        watch.finish_one()
        return [ids.setdefault(representative[form], len(ids)) if form else -1 for form in forms]

    def _find_representatives(self, forms: list[str], watch: Watch) -> dict[str, str]:
        """Maps each of the sorted forms to the first form of its class."""
        representative: dict[str, str] = {}
        heads: list[str] = []
        lost: set[str] = set()  # forms without a fingerprint
        undecided = 0
        for form in forms:
            for head in heads:
                equal = self._compare_without_worker(head, form)
                if equal is None and (undecided >= MAX_UNDECIDED or head in lost or form in lost):
                    with self._counters:
                        self.skipped += 1
                elif equal is None:
                    watch.tick()
                    equal = self._compare_with_fingerprints(head, form, lost)
                    undecided += equal is None
                if equal:
                    representative[form] = head
                    break
            else:
                heads.append(form)
                representative[form] = form
        return representative

    def _compare_with_fingerprints(self, head: str, form: str, lost: set[str]) -> bool | None:
        """Whether two sorted forms are equal, decided by their fingerprints where these differ; None as in `_ask`."""
        prints: list[Fingerprint] = []
        pair = _as_compared(head, form)
        for one in pair:
            found = self._fingerprint(one)
            if found is None:
                lost.add(one)
                return None
            prints.append(found)
        return may_be_equal(*prints) and self._is_equal(*pair)

    def _are_told_apart(self, first: str, second: str) -> bool:
        """Whether the fingerprints differ, if one is known; making both would cost more than comparing the pair."""
        if not (self._fingerprint.knows(first) or self._fingerprint.knows(second)):
            return False
        one, other = self._fingerprint(first), self._fingerprint(second)
        return one is not None and other is not None and not may_be_equal(one, other)

    def _compare_without_worker(self, first: str, second: str) -> bool | None:
        """Whether two canonical forms are equal, None where only algebra can tell."""
        if first == second:
            return True
        if self.mode == "exact" or not first or not second:
            return False
        return compare_cheaply(first, second)

    def _ask_equal(self, first: str, second: str) -> bool | None:
        """Compares two forms in a worker."""
        return self._ask(lambda worker: worker.compare(first, second))

    def _ask_fingerprint(self, form: str) -> Fingerprint | None:
        """Makes the fingerprint of a form in a worker."""
        return self._ask(lambda worker: read_fingerprint(worker.fingerprint(form)))

    def _ask(self, question: Callable[[EquivalenceWorker], T]) -> T | None:
        """Asks an idle worker; None where it exceeded the limit, died or could not decide."""
        worker = self._idle.get()
        try:
            return question(worker)
        except TimeoutError:
            with self._counters:
                self.timeouts += 1
        except WorkerError:
            with self._counters:
                self.failures += 1
        finally:
            self._idle.put(worker)
        return None
