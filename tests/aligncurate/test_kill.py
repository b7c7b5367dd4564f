"""`kill -9` at random moments, then a rerun: the same bytes as an uninterrupted run."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

# Importing torch takes seconds, so one process imports once and forks for every attempt, before torch starts
# threads of its own (a fork must not inherit those).
PROGRAM = textwrap.dedent(
    """
    import os, random, signal, sys, time
    import open_clip, torch, polars  # what the verbs import
    import aligncurate

    verb, source, out, seconds = sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4])
    rng = random.Random(int(sys.argv[5]))

    def work():
        if verb == "score":
            aligncurate.score(source, out, model="tiny", batch_size=8, quiet=True)
        else:
            aligncurate.bucket(source, out, quiet=True)

    def parts():
        data = os.path.join(out, "data")
        return len(os.listdir(data)) if os.path.isdir(data) else 0

    def attempt(kill_after):
        # Kills the run a random moment after it has `kill_after` parts, or lets it finish.
        child = os.fork()
        if child == 0:
            work()
            os._exit(0)
        if kill_after is not None:
            while parts() < kill_after:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    return status
                time.sleep(0.001)
            time.sleep(rng.uniform(0, seconds))
            os.kill(child, signal.SIGKILL)
        return os.waitpid(child, 0)[1]

    killed = halves = 0
    for number in range(10):
        killed += os.WIFSIGNALED(attempt(number))
        halves += any(name.startswith(".tmp-") for name in os.listdir(out)) if os.path.isdir(out) else 0
    print(killed, halves, parts())
    sys.exit(os.waitstatus_to_exitcode(attempt(None)))
    """
)


def contents(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="module")
def tars(tmp_path_factory) -> Path:
    from aligncurate.demo.scenes import write_tars

    folder = tmp_path_factory.mktemp("kill") / "tars"
    write_tars(folder, 240, seed=5, shard_size=20)
    return folder


@pytest.fixture(scope="module")
def scored(tars) -> Path:
    out = tars.parent / "scored"
    run = [sys.executable, "-c", "import sys, aligncurate; aligncurate.score(*sys.argv[1:], model='tiny', "]
    run[2] += "batch_size=8, quiet=True)"
    subprocess.run([*run, str(tars), str(out)], check=True)
    return out


def kill_and_rerun(verb: str, source: Path, out: Path, seconds: float) -> tuple[int, int, int]:
    """Kill a run ten times, then let it finish. Returns kills, kills amid a part, and parts before the last run."""
    seed = random.randrange(10**6)
    command = [sys.executable, "-c", PROGRAM, verb, str(source), str(out), str(seconds), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, (seed, done.stderr)
    killed, halves, parts = map(int, done.stdout.split())
    return killed, halves, parts


@pytest.mark.skipif(not hasattr(os, "fork") or not hasattr(signal, "SIGKILL"), reason="needs fork and kill")
def test_killed_scoring_ends_in_the_same_bytes(tars, scored, tmp_path) -> None:
    killed, halves, parts = kill_and_rerun("score", tars, tmp_path / "out", 0.05)
    assert killed == 10 and halves >= 1
    assert parts >= 9
    assert contents(tmp_path / "out") == contents(scored)


def test_killed_bucketing_ends_in_the_same_bytes(scored, tmp_path) -> None:
    import aligncurate

    whole = aligncurate.bucket(scored, tmp_path / "whole", quiet=True)
    killed, _, _ = kill_and_rerun("bucket", scored, tmp_path / "out", 0.002)
    assert killed >= 5  # the last parts come so quickly that a run may end before it is killed
    assert contents(tmp_path / "out") == contents(whole.path)
