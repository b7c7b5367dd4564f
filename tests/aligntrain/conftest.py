"""Fixtures for the tests of aligntrain: one thread, a batch, and the official code's expected numbers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.support.small_models import ALIGN, BOS, IMAGE, PATCHES, SIDE, Sample

PARITY = Path(os.environ.get("ALIGN_PARITY", Path(__file__).parents[2].parent / "shared" / "parity"))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def parity() -> Path:
    if not PARITY.is_dir():
        pytest.skip(f"the official code's numbers are not at {PARITY}; set ALIGN_PARITY to their folder")
    return PARITY


@pytest.fixture
def samples() -> list[Sample]:
    """Three samples of different lengths, the second without an image, the first with two answers."""
    image = [IMAGE] * PATCHES
    parts = [
        ([BOS, ALIGN, 5, 6, *image, 7, 8, 9, 10, 11, 12, 13], [-4, -3, -1]),
        ([BOS, 20, 21, 22, 23, 24], [-3, -2, -1]),
        ([BOS, ALIGN, *image, 30, 31, 32, 33], [-1]),
    ]
    result = []
    for ids, learned in parts:
        labels = [-100] * len(ids)
        for i in learned:
            labels[i] = ids[i]
        result.append(Sample(ids, labels, ALIGN in ids))
    return result


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
