"""Progress: rates are of this run only, also after a resume."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from aligncurate import progress
from aligncurate.progress import Meter, meter


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [1_000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_rate_and_time_left_ignore_rows_of_an_earlier_run(clock) -> None:
    shown = Meter("score", 1_000)
    shown.skip(900)
    clock[0] += 10
    shown.add(20, 19, 1)
    assert (shown.rate, shown.seconds, shown.done) == (2, 10, 20)
    assert shown.text() == "920 of 1,000 pairs, 2/s, 1 failed, 40 s left"


def test_the_bar_shows_the_same(clock, monkeypatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=terminal, force_terminal=True, width=120))
    with meter("score", 1_000) as shown:
        shown.skip(900)
        clock[0] += 10
        shown.add(20, 19, 1)
    assert "920 of 1,000 pairs, 2/s, 1 failed, 40 s left" in terminal.getvalue()
