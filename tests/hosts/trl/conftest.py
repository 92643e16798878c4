"""Shared by the tests of the TRL plug-in: a small run on the shipped base."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from datasets import Dataset
from small_run import BASE, problems, small_args
from threads import one_thread  # noqa: F401


@pytest.fixture
def make_args(tmp_path) -> Callable[..., Any]:
    return lambda **changes: small_args(tmp_path, **changes)


@pytest.fixture
def make_trainer(make_args) -> Iterator[Callable[..., Any]]:
    """A trainer of the small run: `make_trainer(learning_rate=0.1)`; `rows` are its records."""
    from mgrpo.integrations.trl import MGRPOTrainer

    made = []

    def make(rows: list[dict[str, Any]] | None = None, reward_funcs: Any = None, **changes: Any) -> Any:
        data = Dataset.from_list(problems() if rows is None else rows)
        made.append(MGRPOTrainer(BASE, reward_funcs, make_args(**changes), train_dataset=data))
        return made[-1]

    yield make
    for trainer in made:
        trainer.checker.close()
