"""Starts the jobs in processes, disturbs them, runs them again and compares; see the package.

This process imports what the jobs need once and forks for every run, so that kills hit their work rather than their
imports. It starts no threads: a fork would not have them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import open_clip  # noqa: F401
import polars
import torch
import transformers

import aligncurate
from tests.kills.jobs import Job, jobs, make_inputs, verify
from tests.kills.jobs import main as command

RESULTS = Path(__file__).parent / "results.json"
MOST = 120  # seconds for a run to end
IN_A_ROW = (1, 1, 2, 3)  # kills before a run is left alone


class Finding(Exception):
    """A run did not end as it should have."""


class Run:
    """A function in a process of its own, with a process group of its own."""

    def __init__(self, work: Callable[[], None], log: Path, prepare: Callable[[], None] = lambda: None) -> None:
        self._log = log
        log.touch()
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setpgid(0, 0)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for number in (1, 2):
                os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
            prepare()
            code = 0
            try:
                work()
            except SystemExit as end:
                if isinstance(end.code, str):
                    print(end.code, file=sys.stderr)
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                import traceback

                traceback.print_exc()
                code = 70
            sys.stdout.flush()
            os._exit(code)

    def ended(self) -> bool:
        """Whether it has ended by now; then `code` is its exit code, negative for a signal."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is not None

    def wait(self, seconds: float = MOST) -> int:
        """The exit code. Raises Finding if it does not end, or leaves a process behind."""
        end = time.monotonic() + seconds
        while not self.ended():
            if time.monotonic() > end:
                os.killpg(self.pid, signal.SIGKILL)
                raise Finding(f"did not end within {seconds} s: {self.tail()}")
            time.sleep(0.002)
        while True:  # workers of a killed run end when they notice
            try:
                os.killpg(self.pid, 0)
            except ProcessLookupError:
                break
            if time.monotonic() > end:
                os.killpg(self.pid, signal.SIGKILL)
                raise Finding("left a process behind")
            time.sleep(0.005)
        assert self.code is not None
        return self.code

    def tail(self) -> str:
        return self._log.read_text("utf-8", "replace")[-700:]


class Bench:
    """The jobs with their undisturbed results, and what was found."""

    def __init__(self, folder: Path, names: list[str] | None, seed: int) -> None:
        self.folder, self.rng = folder, random.Random(seed)
        self.counts: dict[str, Counter[str]] = {}
        self.findings: list[str] = []
        self._number = 0
        self.log("inputs", Run(lambda: make_inputs(folder), folder / "log.inputs"))
        every = jobs(folder)
        self.jobs = [job for job in every if names is None or job.name in names]
        self.seconds: dict[str, float] = {}
        self.expected: dict[str, dict[str, str]] = {}
        for job in every:
            started = time.monotonic()
            self.log(job.name, self.start(job, folder / job.name))
            self.seconds[job.name] = time.monotonic() - started
            self.expected[job.name] = job.contents(folder / job.name)

    def log(self, name: str, run: Run) -> None:
        if run.wait() != 0:
            raise SystemExit(f"{name} fails without a disturbance: {run.tail()}")

    def start(self, job: Job, out: Path, prepare: Callable[[], None] = lambda: None) -> Run:
        words = ["aligncurate", *job.words, "--out", str(out)]
        return Run(lambda: command(words), out.with_name(f"log.{out.name}"), prepare)

    def case(self, kind: str, job: Job, disturb: Callable[[Job, Path], int]) -> int:
        """Disturb a run, run it again until it is finished, and compare; returns how often it was disturbed."""
        self._number += 1
        out = self.folder / f"case-{self._number}"
        times = 0
        try:
            times = disturb(job, out)
            if job.is_dataset and out.exists() and kind != "damaged files":
                check = Run(lambda: verify(out), out.with_name(f"log.{out.name}"))
                if check.wait() != 0:
                    raise Finding(f"what was committed is damaged: {check.tail()}")
            again = self.start(job, out)
            if again.wait() != 0:
                raise Finding(f"the rerun failed: {again.tail()}")
            self.compare(job, out)
            self.counts.setdefault(kind, Counter())[job.name] += times
        except Finding as finding:
            self.findings.append(f"{kind}, {job.name}: {finding}")
            print(self.findings[-1], flush=True)
        shutil.rmtree(out, ignore_errors=True)
        return times

    def compare(self, job: Job, out: Path) -> None:
        found, expected = job.contents(out), self.expected[job.name]
        if found != expected:
            names = [name for name in {**found, **expected} if found.get(name) != expected.get(name)]
            raise Finding(f"other bytes than an undisturbed run: {', '.join(names[:5])}")

    # --- disturbances ------------------------------------------------------------------------------------------------

    def interrupt(self, sent: signal.Signals, times: int = 1) -> Callable[[Job, Path], int]:
        """Send a signal at random moments; a run that ended before does not count."""

        def disturb(job: Job, out: Path) -> int:
            hits = 0
            for _ in range(times):
                run = self.start(job, out)
                time.sleep(self.rng.uniform(0, self.seconds[job.name]))
                if not run.ended():
                    os.kill(run.pid, sent)
                    amid = any(out.glob("**/.tmp-*"))
                    code = run.wait()
                    hits += code != 0
                    if code != 0:
                        self.counts.setdefault("moments", Counter())["amid a file" if amid else "between files"] += 1
                    if "Traceback" in run.tail():
                        raise Finding(f"a traceback: {run.tail()}")
                run.wait()
            return hits

        return disturb

    def small_disk(self, job: Job, out: Path) -> int:
        """No file may grow beyond a random size, as if the disk was full there."""
        largest = max(f.stat().st_size for f in (self.folder / job.name).rglob("*") if f.is_file())
        size = self.rng.randrange(1, largest)

        def limit() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

        before = out.with_name(f"log.{out.name}")
        run = self.start(job, out, limit)
        code = run.wait()
        text = before.read_text()
        if code not in (0, 1, 2) or "Traceback" in text:
            raise Finding(f"exit code {code} with files of at most {size:,} bytes: {run.tail()}")
        return int(code != 0)

    def clock_back(self, job: Job, out: Path) -> int:
        """Kill, and let all that was written be from the future, or from 1970."""
        hits = self.interrupt(signal.SIGKILL)(job, out)
        moment = self.rng.choice([0, time.time() + 1e6])
        for file in [out, *out.rglob("*")] if out.exists() else []:
            os.utime(file, (moment, moment))
        return hits

    def two_at_once(self, job: Job, out: Path) -> int:
        """The same command twice: one does the work, the other says so, or finds it done."""
        first = self.start(job, out)
        time.sleep(self.rng.uniform(0, self.seconds[job.name] / 2))
        second = self.start(job, out)
        codes = sorted([first.wait(), second.wait()])
        if codes not in ([0, 0], [0, 2]) or "Traceback" in first.tail():
            raise Finding(f"exit codes {codes}: {first.tail()}")
        return 1

    def damage(self, job: Job, out: Path) -> int:
        """Damage two files of a dataset; `verify --repair` must bring the bytes back."""
        self.log(job.name, self.start(job, out))
        parts = sorted((out / "data").iterdir())
        for file in self.rng.sample(parts, min(2, len(parts))):
            data = bytearray(file.read_bytes())
            kind = self.rng.choice(["flip", "cut", "gone", "swapped"])
            if kind == "gone":
                file.unlink()
            elif kind == "swapped":
                other = self.rng.choice([f for f in parts if f != file and f.exists()] or [file])
                data, theirs = bytearray(other.read_bytes()), data
                file.unlink()
                file.write_bytes(data)
                other.unlink()
                other.write_bytes(theirs)
            else:
                file.unlink()  # a merged dataset's parts are links
                data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
                file.write_bytes(data if kind == "flip" else data[: self.rng.randrange(len(data))])
        words = ["aligncurate", "verify", str(out), "--repair", "--input", str(self.folder / "table.csv")]
        repair = Run(lambda: command(words), out.with_name(f"log.{out.name}"))
        if repair.wait() != 0:
            raise Finding(f"verify --repair: {repair.tail()}")
        self.compare(job, out)
        return 1


def run(kills: int, names: list[str] | None, seed: int, minutes: float) -> dict[str, Any]:
    """All cases: at least `kills` kills, and as many rounds of everything else as there are tens of kills."""
    started = time.monotonic()
    with TemporaryDirectory(prefix="kills-") as folder:
        bench = Bench(Path(folder), names, seed)
        done = 0
        while done < kills and time.monotonic() - started < 60 * minutes:
            job = min(
                bench.jobs, key=lambda job: (bench.counts.get("kill -9", Counter())[job.name], bench.rng.random())
            )
            times = bench.rng.choice(IN_A_ROW)
            done += bench.case("kill -9", job, bench.interrupt(signal.SIGKILL, times))
            if len(bench.findings) > 20:
                break
        others: dict[str, Callable[[Job, Path], int]] = {
            "SIGTERM": bench.interrupt(signal.SIGTERM),
            "SIGINT": bench.interrupt(signal.SIGINT),
            "full disk (RLIMIT_FSIZE)": bench.small_disk,
            "clock set back": bench.clock_back,
            "two runs at once": bench.two_at_once,
            "damaged files": bench.damage,
        }
        for kind, disturb in others.items():
            for job in bench.jobs:
                if (job.is_dataset or kind != "damaged files") and time.monotonic() - started < 60 * minutes:
                    bench.case(kind, job, disturb)
        return {
            "kills": sum(bench.counts.get("kill -9", Counter()).values()),
            "cases": {kind: dict(sorted(counts.items())) for kind, counts in bench.counts.items()},
            "findings": bench.findings,
            "seconds": round(time.monotonic() - started),
        }


def machine() -> dict[str, Any]:
    """What the figures were taken on; no name of a host."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    versions = {module.__name__: module.__version__ for module in (aligncurate, torch, transformers, polars)}
    system = {"processor": name, "cores": os.cpu_count(), "system": f"{platform.system()} {platform.release()}"}
    return {**system, "versions": {"python": platform.python_version(), **versions}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--jobs", nargs="+", help="only these, such as score or 'export llava'")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60, help="begin no further case after this time")
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS.name}")
    options = parser.parse_args()
    found = run(options.kills, options.jobs, options.seed, options.minutes)
    print(json.dumps(found, indent=1))
    if options.save:
        record = {"date": time.strftime("%Y-%m-%d"), "seed": options.seed, **found, "machine": machine()}
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(bool(found["findings"]))


if __name__ == "__main__":
    main()
