"""What a dataset of very many parts costs, whatever they hold: seconds and memory per step, by the number of parts.

    python -m benchmarks.parts --parts 10000 100000 --save

The parts are small and made up (hard links to a few real ones), with a true receipt each. Every step runs in a process
of its own: `resume` opens the dataset and reads all receipts, as a rerun does; `finish` reads them, syncs them and
writes the manifest; `open` reads the finished manifest; `thresholds` finds those of 8 levels, from the summed counts
and one pass over the scores; `label` is `bucket` with them. Rows are few, so this is the cost of a part alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from aligncurate.dataset.manifest import options_digest
from aligncurate.dataset.part import write_receipt
from aligncurate.dataset.reader import Dataset
from aligncurate.dataset.receipt import Receipt, part_name, read_receipt
from aligncurate.dataset.writer import DatasetWriter
from aligncurate.verbs.bucket import bucket, fit_thresholds
from benchmarks.common import number, peak_mib, publish
from benchmarks.levels import HEAD, THIN, write_scores

_ROWS = 100  # in a part
_LINKS = 30_000  # to one file: file systems allow some 65,000
STEPS = ("resume", "finish", "open", "thresholds", "label")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--folder", type=Path, help="where everything goes; by default temporary")
    parser.add_argument("--save", action="store_true", help="write the figures to benchmarks/results")
    parser.add_argument("--step", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        name, folder, parts = options.step
        print(json.dumps(run_step(name, Path(folder), int(parts))))
        return
    rows: list[dict[str, Any]] = []
    for parts in options.parts:
        with TemporaryDirectory(dir=options.folder) as temporary:
            folder = Path(temporary)
            make(folder, parts)
            for step in STEPS:
                found = _apart(step, folder, parts)
                each = {"µs per part": number(1e6 * found["seconds"] / parts), "peak MiB": found["memory"]}
                rows.append({"parts": parts, "step": step, "seconds": round(found["seconds"], 2), **each})
    publish("parts", "the cost of parts", rows, {"parts": options.parts, "rows in a part": _ROWS}, options.save)


def make(folder: Path, parts: int) -> None:
    """Make a dataset whose parts are all committed, but whose manifest is not finished."""
    few = write_scores(folder / "few", _ROWS)
    receipt = read_receipt(few.path, 0)
    assert receipt is not None
    writer = _writer(folder / "many", parts)
    with writer.open():
        pass
    digest = options_digest(writer.head)
    source = few.files[0]
    for index in range(parts):
        target = writer.path / part_name(index)
        os.link(source, target)
        if index % _LINKS == _LINKS - 1:  # a new file for the next links
            source = folder / f"few-{index}.parquet"
            source.write_bytes(target.read_bytes())
        part = replace(receipt.part, name=part_name(index))
        write_receipt(writer.path, index, Receipt(part, {"uri": f"{index}.tar"}, digest))


def run_step(name: str, folder: Path, parts: int) -> dict[str, float]:
    """Seconds and peak memory of a step."""
    many = folder / "many"
    started = time.perf_counter()
    if name in ("resume", "finish"):
        writer = _writer(many, parts)
        with writer.open():
            if name == "resume":
                assert len(writer.committed(parts)) == parts
            else:
                writer.finish(parts)
    else:
        dataset = Dataset(many)
        assert len(dataset.parts) == parts
        if name == "thresholds":
            thresholds = fit_thresholds(dataset, 8, "quantile")
            (folder / "thresholds.json").write_text(json.dumps(thresholds.to_json()))
        if name == "label":
            bucket(dataset, folder / "levelled", thresholds=folder / "thresholds.json", quiet=True)
    return {"seconds": time.perf_counter() - started, "memory": peak_mib()}


def _writer(folder: Path, parts: int) -> DatasetWriter:
    return DatasetWriter(folder, HEAD, THIN, [{"uri": f"{index}.tar"} for index in range(parts)])


def _apart(step: str, folder: Path, parts: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.parts", "--step", step, str(folder), str(parts)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


if __name__ == "__main__":
    main()
