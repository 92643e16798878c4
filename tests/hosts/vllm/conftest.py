from __future__ import annotations

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the shared engine come first, in any order: vLLM ends all engines of a process with one of them."""

    def has_its_own(item: pytest.Item) -> bool:
        return item.path.parent.name == "vllm" and "engine" not in getattr(item, "fixturenames", ())

    items.sort(key=has_its_own)
