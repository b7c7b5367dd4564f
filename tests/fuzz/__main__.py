"""Runs cases in worker processes, which are killed when they hang; see the package."""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import platform
import random
import resource
import shutil
import subprocess
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from select import select
from tempfile import TemporaryDirectory
from typing import Any

from tests.fuzz.targets import TARGETS, Finding

SHARES = {"images": 4, "tar": 4, "parquet": 4, "csv": 3, "jsonl": 3, "json": 3, "dataset": 2, "training": 1}
SECONDS = 30  # for one case, as a user would wait
MEMORY = 3 << 30  # bytes that a worker may have used at most
RESULTS = Path(__file__).parent / "results.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--only", nargs="+", help="cases again, such as tar:17")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS.name}")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        serve(options.serve)
        return
    total = sum(SHARES[kind] for kind in options.kinds)
    counts = {kind: -(-options.cases * SHARES[kind] // total) for kind in options.kinds}
    cases = options.only or [f"{kind}:{options.seed + n}" for kind in options.kinds for n in range(counts[kind])]
    started = time.monotonic()
    findings = run(cases, options.workers)
    print(f"{len(cases):,} cases in {time.monotonic() - started:.0f} s: {len(findings)} findings")
    for case, what in findings.items():
        print(f"  {case}: {what}")
    if options.save:
        kinds = Counter(case.partition(":")[0] for case in cases)
        record = {"cases": len(cases), "kinds": kinds, "seed": options.seed, "findings": findings}
        record |= {"seconds": round(time.monotonic() - started), "python": platform.python_version()}
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(bool(findings))


def run(cases: list[str], workers: int) -> dict[str, str]:
    """Run cases such as `tar:17`; what went wrong, by case."""
    findings: dict[str, str] = {}
    with TemporaryDirectory() as folder:
        free: Queue[_Worker] = Queue()
        for number in range(workers):
            free.put(_Worker(Path(folder) / str(number)))

        def one(case: str) -> None:
            worker = free.get()
            try:
                error = worker.run(case)
                if error:
                    findings[case] = error
            finally:
                free.put(worker)

        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(one, cases))
        while not free.empty():
            free.get().stop()
    return dict(sorted(findings.items()))


class _Worker:
    """A process that runs cases, one after the other."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, case: str) -> str | None:
        if self._process is None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir()
            command = [sys.executable, "-m", "tests.fuzz", "--serve", str(self._folder)]
            # Without a buffer: `select` does not see a second line that was read with the first.
            with (self._folder / "log").open("w") as log:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, bufsize=0
                )
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"{case}\n".encode())
        for wait, reason in ((600, "its files were not made"), (SECONDS, f"took more than {SECONDS} s")):
            ready, _, _ = select([process.stdout], [], [], wait)
            if not ready:
                where = (self._folder / "log").read_text()[-1_500:]  # what `faulthandler` wrote
                self.stop()
                return f"{reason}: {where}"
            line = process.stdout.readline()
            if not line:
                code = process.wait()
                tail = (self._folder / "log").read_text()[-500:]
                self.stop()
                return f"the process died with code {code}: {tail}"
            if line != b"prepared\n":
                answer: dict[str, Any] = json.loads(line)
                if answer["memory"] > MEMORY:
                    self.stop()
                    return f"used {answer['memory'] / 1e9:.1f} GB"
                error: str | None = answer["error"]
                return error
        raise AssertionError

    def stop(self) -> None:
        if self._process is not None:
            with self._process as process:  # closes its pipes
                process.kill()
            self._process = None


def peak() -> int:
    """Bytes that this process has used at most. On Linux `ru_maxrss` would begin with what the parent used."""
    status = Path("/proc/self/status")
    if status.is_file():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def serve(folder: Path) -> None:
    """A worker's side: reads cases, answers `prepared` and then a line of JSON."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    targets: dict[str, Any] = {}
    for line in sys.stdin:
        kind, _, seed = line.strip().partition(":")
        if kind not in targets:
            (folder / kind).mkdir()
            targets[kind] = TARGETS[kind](folder / kind)
        answers.write("prepared\n")
        work = folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        error = None
        faulthandler.dump_traceback_later(SECONDS - 5)
        try:
            targets[kind].run(random.Random(f"{kind}:{seed}"), work)
        except Finding as finding:
            error = str(finding)
        except Exception:
            error = "".join(traceback.format_exc()[-700:])
        finally:
            faulthandler.cancel_dump_traceback_later()
        used = peak()
        answers.write(json.dumps({"error": error, "memory": used}) + "\n")


if __name__ == "__main__":
    main()
