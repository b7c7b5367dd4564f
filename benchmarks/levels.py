"""Thresholds and labels: ours against polars and numpy, on the same Parquet parts.

    python -m benchmarks.levels --save
    python -m benchmarks.levels --scores 1e9 --numpy-up-to 1e9 --rounds 1 --save

Thresholds: N scores, one in a hundred rows without one, in parts of a million rows and row groups of ten thousand, as
`score` writes them. Every measurement runs in a process of its own, which tells its peak memory, and all must agree on
the thresholds. Labels: `bucket` with frozen thresholds on all columns, against polars copying the same files with
`scan_parquet` and `sink_parquet`, in turn in one run. A first run of each is not counted, unless --rounds is 1.
"processor s" is how long the cores worked for it together, which other processes change less than the time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from aligncurate.dataset.manifest import MANIFEST
from aligncurate.dataset.reader import Dataset
from aligncurate.dataset.record import Status, schema
from aligncurate.dataset.writer import DatasetWriter
from aligncurate.levels import Counts, quantile_ranks
from aligncurate.verbs.bucket import bucket, fit_thresholds
from aligncurate.verbs.scores import iter_scores
from benchmarks.common import Spread, peak_mib, publish, undisturbed

LEVELS = 8
PART, GROUP = 1_000_000, 10_000
HEAD = {"verb": "score", "options": {}, "inputs": [], "encoder": None, "thresholds": None, "history": []}
THIN = schema({})
FULL = schema({"url": pa.string(), "extra": pa.string()})
WORDS = np.array(
    [
        "a",
        "an",
        "the",
        "of",
        "on",
        "in",
        "dog",
        "cat",
        "red",
        "blue",
        "man",
        "woman",
        "street",
        "table",
        "photo",
        "with",
        "small",
        "large",
        "green",
        "tree",
    ]
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scores", nargs="*", type=float, default=[1e7, 1e8])
    parser.add_argument("--polars-up-to", type=float, default=1e8, help="it holds all scores, twice while it sorts")
    parser.add_argument("--numpy-up-to", type=float, default=1e8, help="it holds all scores, 4 bytes each")
    parser.add_argument("--label", type=float, default=1e6, help="rows to label; 0 for none")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tries", type=int, default=6, help="of a run that other processes disturb")
    parser.add_argument("--folder", type=Path, help="keeps the scores for the next run; by default temporary")
    parser.add_argument("--name", default="levels", help="of the file of results")
    parser.add_argument("--save", action="store_true", help="write the figures to benchmarks/results")
    parser.add_argument("--task", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        print(json.dumps(_in_this_process(*options.task)))
        return
    rows = []
    with TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        for count in options.scores:
            rows += thresholds(int(count), options, (options.folder or folder) / f"scores-{count:.0f}")
        if options.label:
            for per_part in (10_000, int(options.label)):  # many small parts, and one
                rows += labels(int(options.label), per_part, options, folder)
    settings = {k: v for k, v in vars(options).items() if k not in ("save", "task", "folder", "name")}
    publish(options.name, "million rows per second: median (least..most)", rows, settings, options.save)


def thresholds(count: int, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Rows of one number of scores: ours from two passes and from counts, polars, numpy."""
    if not (folder / MANIFEST).is_file():
        write_scores(folder, count)
    tasks = ["ours, two passes", "ours, counts left by score"]
    tasks += ["polars, sort"] * (count <= options.polars_up_to) + ["numpy.sort"] * (count <= options.numpy_up_to)
    return measure("thresholds", count, {t: lambda t=t: _apart(t, folder) for t in tasks}, options)


def labels(count: int, per_part: int, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Rows of one size of parts: ours, and polars copying the same columns."""
    source, target = folder / "full", folder / "out"
    dataset = write_full(source, count, per_part)
    frozen = folder / "thresholds.json"
    frozen.write_text(json.dumps(fit_thresholds(dataset, LEVELS, "quantile").to_json()))

    def timed(work: Callable[[], Any]) -> dict[str, Any]:
        started, worked = time.perf_counter(), time.process_time()
        work()
        found = {"seconds": time.perf_counter() - started, "worked": time.process_time() - worked}
        shutil.rmtree(target, ignore_errors=True)
        return found

    def polars(**settings: Any) -> Callable[[], dict[str, Any]]:
        return lambda: timed(
            lambda: pl.scan_parquet(dataset.files).sink_parquet(target / "copy.parquet", mkdir=True, **settings)
        )

    variants = {
        "ours": lambda: timed(lambda: bucket(dataset, target, thresholds=frozen, quiet=True)),
        "polars, copy only": polars(),
        "polars, copy only, zstd level 1": polars(compression_level=1),  # as `bucket` compresses
    }
    rows = measure(f"labels, parts of {per_part:,}", count, variants, options)
    shutil.rmtree(source)
    return rows


def measure(
    what: str, count: int, variants: dict[str, Callable[[], dict[str, Any]]], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row per variant; in every round all run one after the other."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    others = dict.fromkeys(variants, 0.0)
    for turn in range(options.rounds + 1):
        for name, work in variants.items():
            if not turn:
                if options.rounds > 1:
                    work()  # warm-up
                continue
            (_, found), share = undisturbed(lambda work=work: _keyed(work()), tries=options.tries)
            runs[name].append(found)
            others[name] = max(others[name], share)
    answers = {json.dumps(run["values"]) for found in runs.values() for run in found if "values" in run}
    if len(answers) > 1:
        raise SystemExit(f"{what}, {count:,}: the variants do not agree: {answers}")
    seconds = {name: [run["seconds"] for run in found] for name, found in runs.items()}
    first = statistics.median(next(iter(seconds.values())))
    return [
        {
            "what": what,
            "rows": count,
            "variant": name,
            "million rows/s": Spread.of([count / s / 1e6 for s in seconds[name]]),
            "seconds": Spread.of(seconds[name]),
            "processor s": Spread.of([run["worked"] for run in runs[name]]),
            "ours is": f"{statistics.median(seconds[name]) / first:.2f}x",
            "peak MiB": max((run["peak"] for run in runs[name] if "peak" in run), default=None),
            "others": f"{others[name]:.0%}",
        }
        for name in variants
    ]


def _keyed(found: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """So that runs can be compared: `undisturbed` takes the least of equally disturbed ones."""
    return found["seconds"], found


def _apart(task: str, folder: Path) -> dict[str, Any]:
    """What a task gives in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.levels", "--task", task, str(folder)]
    told = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(told.stdout)
    return found


def _in_this_process(task: str, folder: str) -> dict[str, Any]:
    """Seconds, thresholds and peak memory of one way to find them."""
    dataset = Dataset(folder)
    work = {
        "ours, two passes": lambda: _ours(dataset, counted=False),
        "ours, counts left by score": lambda: _ours(dataset, counted=True),
        "polars, sort": lambda: _polars(dataset),
        "numpy.sort": lambda: _numpy(dataset),
    }[task]
    started, worked = time.perf_counter(), time.process_time()
    values = [float(v) for v in work()]
    found = {"seconds": time.perf_counter() - started, "worked": time.process_time() - worked}
    return {**found, "values": values, "peak": peak_mib()}


def _ours(dataset: Dataset, *, counted: bool) -> tuple[float, ...]:
    if not counted:
        del dataset.manifest["score_counts"]
    return fit_thresholds(dataset, LEVELS, "quantile").values


def _polars(dataset: Dataset) -> Any:
    usable = (pl.col("status") == Status.OK.value) & pl.col("score").is_not_null()
    scores = dataset.scan().filter(usable).select(pl.col("score").sort()).collect(engine="streaming")["score"]
    return scores[quantile_ranks(len(scores), LEVELS)]


def _numpy(dataset: Dataset) -> Any:
    scores = np.empty(sum(part.ok for part in dataset.parts), np.float32)
    start = 0
    for found in iter_scores(dataset, "score"):
        scores[start : start + len(found)] = found
        start += len(found)
    scores.sort()
    return scores[quantile_ranks(len(scores), LEVELS)]


def write_scores(folder: Path, count: int) -> Dataset:
    """A dataset of scores alone, the same for the same count."""
    writer = DatasetWriter(folder, HEAD, THIN)
    sizes = [min(PART, count - start) for start in range(0, count, PART)]
    # Spawned, since polars does not survive a fork.
    with writer.open(), ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        list(pool.map(_write_part, [writer] * len(sizes), range(len(sizes)), sizes))
        return writer.finish(len(sizes))


def _write_part(writer: DatasetWriter, index: int, rows: int) -> None:
    rng = np.random.default_rng([0, index])
    scores = rng.standard_normal(rows, np.float32) * np.float32(0.07) + np.float32(0.25)
    missing = rng.integers(0, 100, rows, np.uint8) == 0
    status = pa.DictionaryArray.from_arrays(missing.astype(np.int8), ["ok", "decode_error"]).cast(pa.string())
    filled = {"score": pa.array(scores, mask=missing), "status": status}  # the other columns are empty
    table = pa.table([filled.get(field.name, pa.nulls(rows, field.type)) for field in THIN], THIN)
    with writer.part(index) as part:
        part.facts["score_counts"] = {"score": Counts.of([scores[~missing]]).to_json()}
        for start in range(0, rows, GROUP):
            part.write(table.slice(start, GROUP))


def write_full(folder: Path, count: int, per_part: int) -> Dataset:
    """A dataset with all columns, as scoring tars with a few columns of their own makes it."""
    writer = DatasetWriter(folder, HEAD, FULL)
    with writer.open():
        for index in range(count // per_part):
            table = _full_table(index, per_part)
            with writer.part(index) as part:
                for start in range(0, per_part, GROUP):
                    part.write(table.slice(start, GROUP))
        return writer.finish(count // per_part)


def _full_table(index: int, rows: int) -> pa.Table:
    rng = np.random.default_rng([1, index])
    missing = rng.integers(0, 100, rows) == 0
    keys = [f"{index:05d}{row:06d}" for row in range(rows)]
    sizes = rng.integers(20_000, 150_000, rows)
    columns: dict[str, Any] = {
        "key": keys,
        "source": [f"/data/pairs/{index:05d}.tar"] * rows,
        "image_path": [f"{key}.jpg" for key in keys],
        "image_offset": np.cumsum(sizes + 2048),
        "image_length": sizes,
        "width": rng.integers(200, 1200, rows),
        "height": rng.integers(200, 1200, rows),
        "sha256": [rng.bytes(32) for _ in range(rows)],
        "caption": [" ".join(words) for words in WORDS[rng.integers(0, len(WORDS), (rows, 11))]],
        "score": np.where(missing, np.nan, rng.normal(0.25, 0.07, rows)),
        "status": np.where(missing, "decode_error", "ok"),
        "error": np.where(missing, "the image is damaged", None),
        "url": [f"https://images.example.org/{key[::-1]}/{key}.jpg" for key in keys],
    }
    arrays = [
        pa.array(columns[f.name], from_pandas=True).cast(f.type) if f.name in columns else pa.nulls(rows, f.type)
        for f in FULL
    ]
    return pa.Table.from_arrays(arrays, schema=FULL)


if __name__ == "__main__":
    main()
