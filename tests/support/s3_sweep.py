"""A fault at every single request of a run on an S3 server, one run each: the same bytes, or a sentence and a rerun.

`python -m tests.support.s3_sweep` does it for all faults and prints a line for each; with `--every N` at every N-th
request.
"""

from __future__ import annotations

import argparse
from collections import Counter

from aligncurate.io import retries
from tests.support.inputs import cli, pairs, tar_bytes
from tests.support.s3 import S3, serving

FAULTS = (503, 500, 429, "reset", "lost", "short", "wrong", "hang")

_TIMEOUT = 2.0  # seconds until a request that hangs is given up


def command(step: str, out: str) -> list[str]:
    """A small run whose input and output are on the server."""
    inputs = {"ingest": "in/{0,1}.tar", "filter": "right-ingest", "export": "right-filter"}
    options = {"ingest": ["--timeout", f"{_TIMEOUT:g}"], "filter": ["--sample", "3"], "export": []}
    return [step, f"s3://bucket/{inputs[step]}", *options[step], "--out", f"s3://bucket/{out}-{step}"]


def fill(s3: S3) -> None:
    """Put the input there: two tars."""
    for number in range(2):
        members = [(f"{k}.{e}", d) for k, files in pairs(3, 3 * number).items() for e, d in files.items()]
        s3.put(f"in/{number}.tar", tar_bytes(members))


def sweep(s3: S3, fault: int | str, *, every: int = 1, steady: bool = False) -> Counter[str]:
    """Run with a fault at each request, one run each; how the runs ended.

    Args:
        s3: the server, with the input.
        fault: see `S3.faults`.
        every: take every n-th request only.
        steady: the fault stays from that request on, until the rerun.

    Raises AssertionError unless each run gave the undisturbed result, or a sentence and a rerun did.
    """
    ended: Counter[str] = Counter()
    for step in ("ingest", "filter", "export"):
        right, count = _undisturbed(s3, step)
        for number in range(0, count, every):
            s3.begin(dict.fromkeys(range(number, 100_000), fault) if steady else {number: fault})
            result = cli(*command(step, "run"))
            where = f"{fault} at request {number} of {step}: {result.output}"
            s3.begin()
            if result.exit_code:
                assert "error: " in result.stderr and "Traceback" not in result.output, where
                again = cli(*command(step, "run"))
                assert again.exit_code == 0, f"{where}\n{again.output}"
            ended["by a rerun" if result.exit_code else "at once"] += 1
            assert s3.files(f"run-{step}/") == right, where
            s3.clear(f"run-{step}/")
    return ended


def _undisturbed(s3: S3, step: str) -> tuple[dict[str, bytes], int]:
    """The files that a command makes, and how many requests it takes."""
    s3.clear(f"right-{step}/")
    s3.begin()
    assert cli(*command(step, "right")).exit_code == 0
    return s3.files(f"right-{step}/"), len(s3.requests)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--every", type=int, default=1)
    every = arguments.parse_args().every
    retries.WAITS = (0.0, 0.0, 0.0)
    with serving() as s3:
        fill(s3)
        for steady in (False, True):
            for fault in FAULTS:
                ended = sweep(s3, fault, every=every, steady=steady)
                how = "from a request on" if steady else "at one request"
                print(f"{fault} {how}: {', '.join(f'{runs} right {when}' for when, runs in ended.items())}", flush=True)


if __name__ == "__main__":
    main()
