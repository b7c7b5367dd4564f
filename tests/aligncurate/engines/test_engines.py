"""Engines: an outcome for every shard, errors, cancelling, and processes that end with their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import pytest

from aligncurate.engines import processes, threads
from aligncurate.engines.contract import Cancelled, Check
from aligncurate.engines.worker import parent
from aligncurate.errors import ShardError, UserError, WorkerError

ENGINES = pytest.mark.parametrize("engine", [threads, processes], ids=["threads", "processes"])


class Stubborn(Exception):
    """It can be pickled but not unpickled."""

    def __init__(self, what: str, where: str) -> None:
        super().__init__(f"{what} {where}")


class Unwelcome:
    """Its pickle cannot be loaded in a worker."""

    def __reduce__(self) -> tuple:
        return int, ("not a number",)

    def __call__(self, shard: int, check: Check) -> int:
        return shard


@dataclass(frozen=True)
class Work:
    """What a worker does depends on the shard: it fails in one of several ways, or squares it."""

    offset: int = 0

    def __call__(self, shard: int, check: Check) -> tuple[int, int]:
        print("what a library prints", flush=True)
        check()
        if shard == 13:
            raise ShardError("thirteen cannot be read")
        if shard == 14:
            raise UserError("fourteen is a mistake")
        if shard == 15:
            os._exit(7)
        if shard == 16:
            time.sleep(3_600)  # only a worker that is killed ends sooner
        if shard == 18:
            os.kill(os.getpid(), signal.SIGKILL)
        if shard == 17:
            raise Stubborn("I stay", "here")
        return shard * shard + self.offset, os.getpid()


def test_every_shard_once_in_several_processes(capfd) -> None:
    outcomes = list(processes.run(Work(3), range(12), workers=3))
    assert sorted(outcome.shard for outcome in outcomes) == list(range(12))
    assert all(outcome.result[0] == outcome.shard**2 + 3 for outcome in outcomes)
    pids = {outcome.result[1] for outcome in outcomes}
    assert len(pids) == 3
    assert os.getpid() not in pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert capfd.readouterr().out == ""


@ENGINES
def test_a_shard_that_cannot_be_read_stops_no_other(engine) -> None:
    outcomes = {outcome.shard: outcome for outcome in engine.run(Work(), [1, 13, 2], workers=2)}
    assert str(outcomes[13].error) == "thirteen cannot be read" and outcomes[13].result is None
    assert (outcomes[1].result[0], outcomes[2].result[0]) == (1, 4)


@ENGINES
def test_another_error_stops_the_run(engine) -> None:
    with pytest.raises(UserError, match="fourteen is a mistake"):
        list(engine.run(Work(), [1, 14, 2], workers=1))


def test_a_stopped_run_cancels_its_functions() -> None:
    started, seen = Event(), []

    def function(shard: int, check: Check) -> int:
        if shard == 1:
            return shard
        started.set()
        try:
            while True:
                check()
        except Cancelled as error:
            seen.append(error)
            raise

    run = threads.run(function, [1, 2], workers=2)
    assert next(run).shard == 1
    started.wait()
    run.close()
    assert len(seen) == 1


def test_a_process_goes_on_after_a_shard_that_cannot_be_read() -> None:
    outcomes = list(processes.run(Work(), [13, 13, 13, 13, 2], workers=2))
    assert [outcome.error is not None for outcome in outcomes].count(True) == 4
    assert next(outcome.result for outcome in outcomes if outcome.shard == 2)[0] == 4


def test_an_error_that_cannot_travel_is_told_as_text() -> None:
    with pytest.raises(RuntimeError, match="Stubborn: I stay here"):
        list(processes.run(Work(), [17], workers=1))


def test_work_that_cannot_travel_ends_the_run() -> None:
    with pytest.raises(WorkerError, match="ended with exit code 1"):
        list(processes.run(Unwelcome(), [1], workers=1))


def test_other_errors_stop_the_run() -> None:
    with pytest.raises(UserError, match="fourteen is a mistake"):  # though the other worker sleeps
        list(processes.run(Work(), [16, 14], workers=2))


def test_a_shard_that_kills_every_worker_stops_no_other() -> None:
    outcomes = {outcome.shard: outcome for outcome in processes.run(Work(), [1, 15, 2, 18, 3], workers=2)}
    assert str(outcomes[15].error) == "15: its worker process ended with exit code 7, in each of 3 tries"
    assert "ended with signal 9 (killed, perhaps because memory ran out)" in str(outcomes[18].error)
    assert [outcomes[shard].result[0] for shard in (1, 2, 3)] == [1, 4, 9]


SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
from tests.aligncurate.engines.test_engines import Work
from aligncurate.engines import processes
print(sum(outcome.result[0] for outcome in processes.run(Work(), [1, 2, 3], workers=2)), flush=True)
for outcome in processes.run(Work(), [1, 16], workers=2):
    print(outcome.result[1], flush=True)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_scripts_without_a_main_guard_and_workers_that_do_not_survive_them(tmp_path, how) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(folder=str(Path(__file__).parents[3])))
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as run:
        assert run.stdout.readline() == b"14\n"
        run.stdout.readline()
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
        if not children.is_file():
            pytest.skip("this system does not list child processes")
        workers = [int(pid) for pid in children.read_text().split()]
        assert len(workers) == 2
        run.send_signal(how)
        run.wait(300)
        deadline = time.monotonic() + 300
        while any(Path(f"/proc/{pid}").exists() for pid in workers):
            assert time.monotonic() < deadline, "a worker outlived its parent"
            time.sleep(0.1)


class Asking:
    """Asks its parent something, and gives up waiting for the answer."""

    def __call__(self, shard: int, check: Check) -> tuple[int, bool]:
        question = parent().ask(shard)
        question.cancel()
        wait([parent().ask(-shard)])  # by then, the first has been answered
        return os.getpid(), question.done()


def test_an_answer_that_nobody_waits_for_ends_no_worker() -> None:
    with ThreadPoolExecutor(1) as pool:
        answer = lambda question, memories: pool.submit(int, question)  # noqa: E731
        outcomes = list(processes.run(Asking(), [1, 2, 3], workers=1, answer=answer))
    assert {outcome.error for outcome in outcomes} == {None}
    assert len({outcome.result[0] for outcome in outcomes}) == 1  # one process did them all
