"""The Ray engine on a real cluster of several nodes: its contract, and actors, nodes and drivers that die."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from aligncurate.engines import ray as engine
from aligncurate.engines.contract import Check
from aligncurate.engines.worker import parent
from aligncurate.errors import ShardError, UserError, WorkerError
from tests.aligncurate.engines.test_engines import Unwelcome, Work
from tests.support.ray_cluster import NODE, ROOT, ray_cluster

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with ray_cluster() as made:
        yield made


@dataclass(frozen=True)
class Slow:
    """Tells where it runs, waits until a file is there, and tells the shard."""

    go: str

    def __call__(self, shard: int, check: Check) -> str:
        parent().tell((shard, os.getpid(), ray.get_runtime_context().get_node_id()))
        while not Path(self.go).exists():
            check()
            time.sleep(0.01)
        for number in range(100):
            parent().tell(number)
        return ray.get_runtime_context().get_node_id()


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Any, what: str) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def in_thread(function: Any) -> Thread:
    thread = Thread(target=function, daemon=True)
    thread.start()
    return thread


def test_contract(cluster) -> None:
    outcomes = {outcome.shard: outcome for outcome in engine.run(Work(3), [1, 13, 2, 15, 18, 5, 13], workers=2)}
    assert {shard: outcomes[shard].result[0] for shard in (1, 2, 5)} == {1: 4, 2: 7, 5: 28}
    assert str(outcomes[13].error) == "thirteen cannot be read" and outcomes[13].result is None
    for shard in (15, 18):
        assert isinstance(outcomes[shard].error, ShardError)
        assert str(outcomes[shard].error) == f"{shard}: its Ray worker process ended, in each of 3 tries"


def test_another_error_stops_the_run(cluster) -> None:
    with pytest.raises(UserError, match="fourteen is a mistake"):  # though the other actor sleeps
        list(engine.run(Work(), [16, 14], workers=2))


def test_errors_and_work_that_cannot_travel(cluster) -> None:
    with pytest.raises(RuntimeError, match="Stubborn: I stay here"):
        list(engine.run(Work(), [17], workers=1))
    with pytest.raises(WorkerError, match=r"cannot start: .*not a number"):
        list(engine.run(Unwelcome(), [1], workers=1))


def test_actors_and_nodes_that_die_and_actors_without_a_place(cluster, tmp_path) -> None:
    """Four actors are asked for, and there is room for three: one is killed, one loses its node."""
    node = cluster.add_node(**NODE)
    go, told, outcomes = tmp_path / "go", [], []
    running = in_thread(lambda: outcomes.extend(engine.run(Slow(str(go)), range(5), workers=4, on_message=told.append)))
    wait_until(lambda: len(told) == 3, "no three actors at once")
    killed = [next(m[1] for m in told if (m[2] == node.node_id) == its) for its in (False, True)]
    os.kill(killed[0], signal.SIGKILL)
    cluster.remove_node(node)
    wait_until(lambda: len(told) == 4, "the actor was not replaced")
    assert told[-1][1] not in killed
    go.touch()
    running.join()
    assert sorted(outcome.shard for outcome in outcomes) == list(range(5))
    assert all(outcome.error is None and outcome.result != node.node_id for outcome in outcomes)
    assert sorted(m for m in told if isinstance(m, int)) == sorted(5 * list(range(100)))  # late perhaps, but all


def test_a_node_that_joins_gets_work(cluster, tmp_path) -> None:
    go, told, outcomes = tmp_path / "go", [], []
    running = in_thread(lambda: outcomes.extend(engine.run(Slow(str(go)), range(3), workers=3, on_message=told.append)))
    wait_until(lambda: len(told) == 2, "no two actors")
    node = cluster.add_node(**NODE)
    wait_until(lambda: len(told) == 3, "the new node got no work")
    go.touch()
    running.join()
    cluster.remove_node(node)
    assert node.node_id in {outcome.result for outcome in outcomes}


DRIVER = """
import sys
from tests.aligncurate.engines.test_ray import Slow
from aligncurate.engines import ray
ray_run = ray.run(Slow({go!r}), [1, 2], workers=2, on_message=lambda m: print(m[1], flush=True), address={address!r})
list(ray_run)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_actors_end_with_their_driver(cluster, tmp_path, how) -> None:
    script = tmp_path / "script.py"
    script.write_text(DRIVER.format(go=str(tmp_path / "never"), address=cluster.address))
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as run:
        pids = [int(run.stdout.readline()) for _ in range(2)]
        assert all(alive(pid) for pid in pids)
        run.send_signal(how)
        run.wait(300)
    wait_until(lambda: not any(alive(pid) for pid in pids), "an actor outlived its driver")


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:1", "127.0.0.1:99999"])
def test_a_cluster_that_is_not_there(address) -> None:
    script = f"from aligncurate.engines import ray; list(ray.run(print, [1], workers=1, address={address!r}))"
    env = {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=env)
    assert f"UserError: no Ray cluster at {address}: " in done.stderr.strip().rpartition("\n")[2]


def test_without_ray(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'aligncurate\[ray\]'"):
        list(engine.run(pickle.dumps, [1], workers=1))
