"""How scoring's time and memory grow with the number of pairs: the built-in encoder on real photos.

    python -m benchmarks.growth --save

The source is tars of 250 pairs (links to the same four files); each size runs in a process of its own. Seconds are
without loading the model; memory is the process's peak resident size. A run in which other processes took more than a
tenth of the processor is repeated, up to three times.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.common import publish, undisturbed
from benchmarks.score import DATA, write_tar

_TAR = 250
_RUN = """
import json, sys
import aligncurate
from benchmarks.common import peak_mib
run = aligncurate.score(sys.argv[1], sys.argv[2], model="tiny", decode=sys.argv[3], quiet=True)
assert run.dataset is not None
print(json.dumps({
    "pairs": run.rows, "seconds": run.seconds, "bottleneck": run.times.bottleneck,
    "memory": peak_mib(),
}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, default=DATA.parent / "flickr8k/dev-00000.tar", help="a webdataset tar")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--decode", choices=["exact", "fast"], default="fast")
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write the figures to benchmarks/results")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        pairs = read(options.photos)
        starts = range(0, len(pairs) - len(pairs) % _TAR, _TAR)
        tars = [write_tar(folder / f"{start}.tar", pairs[start : start + _TAR]) for start in starts]
        for size in options.sizes:
            source = folder / f"source-{size}"
            source.mkdir()
            for number in range(size // _TAR):
                (source / f"{number:05d}.tar").symlink_to(tars[number % len(tars)])
            found: dict[float, dict[str, Any]] = {}

            def run(source: Path = source, found: dict[float, dict[str, Any]] = found) -> float:
                with TemporaryDirectory(dir=folder) as out:
                    command = [sys.executable, "-c", _RUN, str(source), out, options.decode]
                    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                result: dict[str, Any] = json.loads(told)
                found[result["seconds"]] = result
                return float(result["seconds"])

            seconds, others = undisturbed(run, tries=options.tries)
            result = found[seconds]
            rows.append(
                {
                    "pairs": result["pairs"],
                    "seconds": seconds,
                    "pairs/s": result["pairs"] / seconds,
                    "peak memory (MiB)": result["memory"],
                    "bottleneck": result["bottleneck"],
                    "others": f"{others:.0%}",
                }
            )
    settings = {"decode": options.decode, "pairs per tar": _TAR, "encoder": "tiny"}
    publish("growth", "scoring by number of pairs", rows, settings, options.save)


def read(tar: Path) -> list[tuple[bytes, str]]:
    """(image, caption) of a tar's samples."""
    found: dict[str, dict[str, bytes]] = {}
    with tarfile.open(tar) as file:
        for member in file:
            key, _, ending = member.name.partition(".")
            content = file.extractfile(member)
            if content is not None:
                found.setdefault(key, {})[ending] = content.read()
    return [(files["jpg"], files["txt"].decode()) for files in found.values()]


if __name__ == "__main__":
    main()
