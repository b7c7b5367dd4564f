"""A few random damages of each kind of input; `python -m tests.fuzz` runs many."""

from __future__ import annotations

import pytest

from tests.fuzz.__main__ import run
from tests.fuzz.targets import TARGETS


@pytest.mark.parametrize("kind", TARGETS)
def test_damaged_inputs_end_with_rows_or_a_sentence(kind: str) -> None:
    assert run([f"{kind}:{seed}" for seed in range(8)], workers=1) == {}
