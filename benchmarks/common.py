"""Shared by the benchmarks: repeated timing, facts about the machine, and results as a table and as JSON."""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
_LIBRARIES = ("torch", "torchvision", "open_clip_torch", "transformers", "polars", "pyarrow", "numpy", "pillow")

console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)


@dataclass(frozen=True)
class Spread:
    """A quantity measured several times: median, minimum and maximum of the runs."""

    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values), len(values))

    def __str__(self) -> str:
        return f"{number(self.median)} ({number(self.low)}..{number(self.high)})"


def seconds(work: Callable[[], Any], runs: int, warm_up: int = 1) -> list[float]:
    """Duration of each of `runs` calls, after `warm_up` calls that are not counted."""
    for _ in range(warm_up):
        work()
    taken = []
    for _ in range(runs):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return taken


def undisturbed(work: Callable[[], float], most: float = 0.1, tries: int = 6) -> tuple[float, float]:
    """The result of the first run during which other processes used at most the share `most` of the CPU.

    After `tries` runs, the least disturbed one is taken. Returns its result and the share of all cores that other
    processes used, 0..1; only Linux reports it, elsewhere the first run is taken with a share of 0.
    """
    found = []
    for _ in range(tries):
        before, own = _ticks(), cpu_seconds()
        result = work()
        busy, everything = (now - then for now, then in zip(_ticks(), before, strict=True))
        others = max(0.0, busy - (cpu_seconds() - own)) / everything if everything else 0.0
        found.append((others, result))
        if others <= most:
            break
    others, result = min(found)
    return result, others


def _ticks() -> tuple[float, float]:
    """CPU seconds since boot, over all cores: used by all processes, and available in total."""
    try:
        fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return 0.0, 0.0
    user, nice, system, idle, wait, irq, soft, stolen = (x / os.sysconf("SC_CLK_TCK") for x in fields)
    busy = user + nice + system + irq + soft + stolen
    return busy, busy + idle + wait


def cpu_seconds() -> float:
    """CPU seconds used by this process, and by its child processes that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def peak_mib() -> int:
    """Peak resident memory of this process, MiB."""
    try:  # getrusage would count what the parent held when it forked
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) // 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1 << (20 if sys.platform == "darwin" else 10))


def machine() -> dict[str, Any]:
    """What a measurement depends on: CPU, memory, GPU, driver, system and library versions."""
    found: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {},
    }
    for name in _LIBRARIES:
        try:
            found["versions"][name] = version(name)
        except PackageNotFoundError:
            found["versions"][name] = None
    import torch

    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        told = subprocess.run(query, capture_output=True, text=True, check=False)
        found["driver"] = told.stdout.strip() or None
    return found


def _cpu() -> str:
    try:
        facts = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    except OSError:
        return platform.processor()
    told = {name.strip(): value.strip() for name, _, value in facts}
    special = [flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if flag in told.get("flags", "").split()]
    return f"{told.get('model name', platform.processor())} ({', '.join(special) or 'no avx512'})"


def number(value: float) -> str:
    """Format a number with three significant digits, or with all digits if it is large."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows with the same keys as a table; None, for what this machine cannot measure, is an empty cell."""
    drawn = Table(*rows[0], title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for column in drawn.columns[1:]:
        column.justify = "right"
    for row in rows:
        drawn.add_row(*(_cell(value) for value in row.values()))
    return drawn


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return number(value) if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def publish(name: str, title: str, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], save: bool) -> Path:
    """Print a table, and with `save` write rows, settings, machine and date to `benchmarks/results/`.

    Returns the file that is (or would be) written: `<name>-<cpu or gpu>.json`.
    """
    place = machine()
    record = {
        "benchmark": name,
        "date": date.today().isoformat(),
        "settings": dict(settings),
        "machine": place,
        "rows": [dict(row) for row in rows],
    }
    console.print(table(title, rows))
    file = RESULTS / f"{name}-{'cpu' if place['gpu'] is None else place['gpu'].lower().replace(' ', '-')}.json"
    text = json.dumps(record, indent=1, default=_plain)
    if save:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n", "utf-8")
        console.print(f"saved in {file}", style="dim", soft_wrap=True)
    else:
        print(text)
    return file


def _plain(value: Any) -> Any:
    if isinstance(value, Spread):
        return vars(value)
    raise TypeError(f"{type(value).__name__} has no JSON form here")
