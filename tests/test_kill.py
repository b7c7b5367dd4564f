"""`kill -9` at random moments, then a rerun: the same bytes as an uninterrupted run."""

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

    def attempt(limit):
        child = os.fork()
        if child == 0:
            work()
            os._exit(0)
        if limit is not None:
            time.sleep(limit)
            os.kill(child, signal.SIGKILL)
        return os.waitpid(child, 0)[1]

    killed = sum(os.WIFSIGNALED(attempt(rng.uniform(0, seconds))) for _ in range(10))
    print("killed", killed)
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
    from pipelines.scenes import write_tars

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


def kill_and_rerun(verb: str, source: Path, out: Path, seconds: float) -> int:
    seed = random.randrange(10**6)
    print("seed", seed)
    command = [sys.executable, "-c", PROGRAM, verb, str(source), str(out), str(seconds), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


@pytest.mark.skipif(not hasattr(os, "fork") or not hasattr(signal, "SIGKILL"), reason="needs fork and kill")
def test_killed_scoring_ends_in_the_same_bytes(tars, scored, tmp_path) -> None:
    killed = kill_and_rerun("score", tars, tmp_path / "out", 1.5)
    assert killed >= 1
    assert contents(tmp_path / "out") == contents(scored)


def test_killed_bucketing_ends_in_the_same_bytes(scored, tmp_path) -> None:
    import aligncurate

    whole = aligncurate.bucket(scored, tmp_path / "whole", quiet=True)
    killed = kill_and_rerun("bucket", scored, tmp_path / "out", 0.15)
    assert killed >= 1
    assert contents(tmp_path / "out") == contents(whole.path)
