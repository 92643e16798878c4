"""A cache that computes each result once for all threads."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class Memo(Generic[T]):
    """Calls a function once for each key and keeps the latest results; other threads wait for a result under way.

    Args:
        compute: the function; an error is raised to every caller that waits, and not kept.
        size: results kept.
    """

    def __init__(self, compute: Callable[..., T], size: int):
        self._compute, self._size = compute, size
        self._results: OrderedDict[tuple[str, ...], Future[T]] = OrderedDict()
        self._lock = threading.Lock()

    def knows(self, *key: str) -> bool:
        """Whether the result is kept or being computed."""
        with self._lock:
            return key in self._results

    def __call__(self, *key: str) -> T:
        """The result for the key."""
        with self._lock:
            known = self._results.get(key)
            result = self._results.setdefault(key, Future())
            self._results.move_to_end(key)
            if len(self._results) > self._size:
                self._results.popitem(last=False)
        if known is not None:
            return known.result()
        try:
            result.set_result(self._compute(*key))
        except BaseException as error:
            with self._lock:
                self._results.pop(key, None)
            result.set_exception(error)
            raise
        return result.result()
