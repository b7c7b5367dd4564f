"""Export to webdataset shards against copying the same bytes with `cp`.

    python -m benchmarks.export --save

The pairs are JPEGs in tars of 5,000, with a caption and some JSON each. `export` reads each image through its pointer,
compares it with its sha256, and syncs every shard to disk, so the yardstick is `cp` and `sync` of the tars; `cp`
alone, which leaves the bytes in memory, is there too. The rate is that of the images' bytes, for all alike.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import statistics
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

import aligncurate
from aligncurate.io.tar import TarWriter
from benchmarks.common import Spread, publish, undisturbed

PER_TAR = 5_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--kib", type=int, nargs="+", default=[50, 200], help="mean size of the images")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where everything goes; by default a temporary folder")
    parser.add_argument("--save", action="store_true", help="write the figures to benchmarks/results")
    options = parser.parse_args()
    rows = []
    for kib in options.kib:
        with TemporaryDirectory(dir=options.folder) as folder:
            # As many bytes for every size of image.
            rows += measure(Path(folder), options.pairs * min(options.kib) // kib, kib, options.rounds)
    settings = {k: v for k, v in vars(options).items() if k not in ("save", "folder")}
    publish("export", "MB of images per second: median (least..most)", rows, settings, options.save)


def measure(folder: Path, pairs: int, kib: int, rounds: int) -> list[dict[str, Any]]:
    source, target = folder / "tars", folder / "out"
    size = write_pairs(source, pairs, kib)
    dataset = aligncurate.ingest(source, folder / "dataset", quiet=True).dataset
    assert dataset is not None

    def export() -> None:
        done = aligncurate.export(dataset, target, quiet=True)
        assert (done.rows, done.bytes) == (pairs, size)

    def copy() -> None:
        subprocess.run(["cp", "-r", source, target], check=True)

    def copy_and_sync() -> None:
        copy()
        subprocess.run(["sync", *target.iterdir()], check=True)

    variants = {"cp and sync": copy_and_sync, "cp": copy, "export": export}
    taken: dict[str, list[float]] = {name: [] for name in variants}
    others = dict.fromkeys(variants, 0.0)
    for turn in range(rounds + 1):
        for name, work in variants.items():
            seconds, share = undisturbed(lambda work=work: timed(work, target))
            if turn:
                taken[name].append(seconds)
                others[name] = max(others[name], share)
    first = statistics.median(taken["cp and sync"])
    return [
        {
            "images": f"{pairs:,} of {size / pairs / 1024:.0f} KiB",
            "variant": name,
            "MB/s": Spread.of([size / s / 1e6 for s in values]),
            "seconds": Spread.of(values),
            "of cp and sync": f"{first / statistics.median(values):.0%}",
            "others": f"{others[name]:.0%}",
        }
        for name, values in taken.items()
    ]


def timed(work: Callable[[], None], target: Path) -> float:
    """Seconds of one run into a new folder, after all pending writes have reached the disk."""
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run(["sync"], check=True)
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def write_pairs(folder: Path, pairs: int, kib: int) -> int:
    """Tars of JPEGs of noise; bytes of the images."""
    rng = np.random.default_rng(0)
    pictures = [noise(rng, int(size)) for size in rng.uniform(0.5, 1.5, 64) * kib * 1024]
    folder.mkdir()
    size = 0
    for number in range(-(-pairs // PER_TAR)):
        with (folder / f"{number:05d}.tar").open("wb") as file:
            tar = TarWriter(file)
            for index in range(number * PER_TAR, min((number + 1) * PER_TAR, pairs)):
                key, picture = f"{index:09d}", pictures[int(rng.integers(len(pictures)))]
                tar.add(f"{key}.jpg", picture)
                tar.add(f"{key}.json", json.dumps({"url": f"https://images.example.org/{key}.jpg"}).encode())
                tar.add(f"{key}.txt", f"picture number {index} of a series".encode())
                size += len(picture)
            tar.end()
    assert tarfile.is_tarfile(folder / "00000.tar")
    return size


def noise(rng: np.random.Generator, size: int) -> bytes:
    """A JPEG of about `size` bytes."""
    side = int((size / 0.62) ** 0.5)  # noise at quality 75 takes about 0.62 bytes a pixel
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(out, "JPEG", quality=75)
    return out.getvalue()


if __name__ == "__main__":
    main()
