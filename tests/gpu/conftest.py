"""GPU memory is shared by as many processes as there are workers: none keeps much that it does not use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.gpu.oracle import give_memory_back


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    yield
    give_memory_back()
