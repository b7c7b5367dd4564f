"""The demonstration, offline, on drawn scenes whose captions are known to be right or wrong: score, level, curate.

Training on the result is the second half, in `aligntrain.tools.demo`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import polars as pl
from rich import box
from rich.table import Table
from rich.text import Text

import aligncurate
from aligncurate.cli.render import render
from aligncurate.dataset.reader import Dataset
from aligncurate.demo import scenes
from aligncurate.errors import UserError
from aligncurate.io.files import claim
from aligncurate.progress import duration, make_console

SEED = 20_241_124  # far from the seeds that the built-in encoder was trained on
NAMES = {
    "right": "fully right",
    "one_detail_wrong": "one detail wrong",
    "one_object_wrong": "one object wrong",
    "unrelated": "unrelated",
}
_MARK = "made-by-aligncurate-demo"
# What both halves of the demo write, and what its last lines suggest to write.
_FOLDERS = ("scenes", "scored", "levelled", "best", "shards", "pretrained", "questions", "finetuned", "odd")

console = make_console()


def curate(out: Path, *, count: int = 4_000, quiet: bool = False) -> None:
    """Draw `count` pairs, then score, bucket, inspect, filter and export them below `out`.

    Raises UserError when `out` holds something that is not from a demo.
    """
    if count < 100:
        raise UserError(f"--count {count}: use a number of at least 100, so that every level has some pairs.")
    console.quiet = quiet
    with claim(out, [_MARK]):
        _delete_earlier(out)
        _curate(out, count, quiet)


def _curate(out: Path, count: int, quiet: bool) -> None:
    announce(1, f"Draw {count:,} small scenes with captions known to be right or wrong")
    scenes.write_tars(out / "scenes", count, SEED)
    announce(2, "Score every pair with the built-in encoder (aligncurate score … --model tiny)")
    summary = aligncurate.score(out / "scenes", out / "scored", model="tiny", quiet=quiet)
    console.print(f"scored {summary.rows:,} pairs in {duration(summary.seconds)}")
    announce(3, "Cut the scores into eight alignment levels (aligncurate bucket)")
    levelled = aligncurate.bucket(out / "scored", out / "levelled", levels=8, quiet=quiet)
    console.print(render(aligncurate.inspect(levelled, examples=1)))
    announce(4, "Do the levels agree with what is known about the captions?")
    console.print(correctness_table(levelled))
    announce(5, "Keep the upper half and export it (aligncurate filter, aligncurate export)")
    best = aligncurate.filter(levelled, out / "best", levels="5-8", quiet=quiet)
    exported = aligncurate.export(best, out / "shards", shard_size=1_000, quiet=quiet)
    console.print(f"kept {best.rows:,} of {levelled.rows:,} pairs: {', '.join(exported.files)} in {out / 'shards'}")


def announce(number: int, text: str) -> None:
    """Print the heading of a step."""
    console.print(Text.assemble("\n", (f"{number}", "bold cyan"), (f" {text}", "bold")))


def correctness_table(levelled: Dataset) -> Table:
    """For each kind of caption: mean score, mean level, and its share of each level."""
    rows = levelled.scan().select("correctness", "score", "level").collect()
    numbers = list(range(1, levelled.manifest["thresholds"]["levels"] + 1))
    heads = [f"L{n}" for n in numbers]
    table = Table("caption", "score", "level", *heads, box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for column in table.columns:
        column.no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    totals = {n: max(1, rows.filter(pl.col("level") == n).height) for n in numbers}
    for kind, name in NAMES.items():
        some = rows.filter(pl.col("correctness") == kind)
        shares = [some.filter(pl.col("level") == n).height / totals[n] for n in numbers]
        cells = [Text(f"{s:.0%}", "bold green" if s >= 0.5 else "") for s in shares]
        score, level = some.select(pl.col("score", "level").mean()).row(0)
        table.add_row(name, f"{score:.3f}", f"{level:.1f}", *cells)
    table.caption = f"score and level: means; L1 to L{numbers[-1]}: composition of each level"
    return table


def _delete_earlier(out: Path) -> None:
    """Delete what an earlier demo left in the claimed folder, and nothing else."""
    for name in _FOLDERS:
        shutil.rmtree(out / name, ignore_errors=True)
    (out / _MARK).touch()
