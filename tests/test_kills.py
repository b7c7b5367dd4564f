"""A few kills of one verb; `python -m tests.kills` runs many of all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_killed_verbs_end_in_the_same_bytes() -> None:
    command = [sys.executable, "-m", "tests.kills", "--kills", "2", "--jobs", "filter"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stdout[-3_000:] + done.stderr[-3_000:]
