"""The verb `inspect`: what a dataset holds, as data and on the terminal."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from aligncurate.dataset.reader import Dataset
from aligncurate.errors import UserError
from aligncurate.levels import Counts, order_statistics
from aligncurate.verbs.bucket import check_score_column, iter_scores

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
_BINS = 20
_BAR = 22  # characters
_EXAMPLE_PARTS = 16  # examples come from so many parts, spread over the dataset


@dataclass(frozen=True)
class Level:
    """One alignment level; `level` None stands for the pairs that have no level."""

    level: int | None
    count: int
    share: float
    minimum: float | None
    maximum: float | None
    mean: float | None
    examples: list[dict[str, Any]]


@dataclass(frozen=True)
class Report:
    """What `inspect` finds; `to_json` gives the same that `aligncurate inspect --json` prints.

    Attributes:
        statuses: rows by status.
        quantiles: exact scores at QUANTILES (rank floor(q * (n - 1))), empty without scores.
        histogram: counts in equal bins from the smallest to the largest score.
        errors: the most frequent errors with their number of rows.
        levels: worst first; empty when the dataset is not bucketed.
    """

    path: str
    rows: int
    parts: int
    made_by: str
    encoder: str | None
    score_column: str
    scored: int
    mean: float | None
    statuses: dict[str, int]
    errors: list[dict[str, Any]]
    quantiles: dict[str, float]
    histogram: list[int]
    method: str | None
    levels: list[Level]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def inspect(dataset: str | Path | Dataset, *, examples: int = 0, score_column: str = "score") -> Report:
    """Count and measure a dataset.

    Args:
        dataset: what to look at.
        examples: captions to show for each level.
        score_column: scores to measure.

    Raises UserError when there is no such dataset or column.
    """
    opened = dataset if isinstance(dataset, Dataset) else Dataset(dataset)
    if examples < 0:
        raise UserError(f"--examples {examples}: use a number of at least 0.")
    check_score_column(opened, score_column)
    counts = Counts.of(iter_scores(opened, score_column))
    quantiles, histogram, mean = _distribution(opened, score_column, counts)
    thresholds = opened.manifest.get("thresholds")
    encoder = opened.manifest.get("encoder")
    return Report(
        path=str(opened.path),
        rows=opened.rows,
        parts=len(opened.parts),
        made_by=opened.manifest["verb"],
        encoder=f"{encoder['model']} ({encoder['pretrained']}), {encoder['precision']}" if encoder else None,
        score_column=score_column,
        scored=counts.total,
        mean=mean,
        statuses=opened.statuses,
        errors=_errors(opened),
        quantiles=quantiles,
        histogram=histogram,
        method=thresholds["method"] if thresholds else None,
        levels=_levels(opened, score_column, opened.levels, examples) if opened.levels else [],
    )


def _distribution(dataset: Dataset, column: str, counts: Counts) -> tuple[dict[str, float], list[int], float | None]:
    total = counts.total
    if not total:
        return {}, [], None
    ranks = [int(q * (total - 1)) for q in QUANTILES]
    values = order_statistics(lambda: iter_scores(dataset, column), ranks, counts)
    low, high = float(values[0]), float(values[-1])
    bins = np.zeros(_BINS, np.int64)
    sum_ = 0.0
    for scores in iter_scores(dataset, column):
        bins += np.histogram(scores, _BINS, (low, high if high > low else low + 1))[0]
        sum_ += float(scores.sum(dtype=np.float64))
    return {f"{q:g}": float(v) for q, v in zip(QUANTILES, values, strict=True)}, bins.tolist(), sum_ / total


def _errors(dataset: Dataset) -> list[dict[str, Any]]:
    """An example of each kind of failure, most frequent first."""
    if not any(part.failed for part in dataset.parts):
        return []
    found = (
        dataset.scan()
        .filter(pl.col("error").is_not_null())
        .group_by("status")
        .agg(pl.len().alias("rows"), pl.col("key").first(), pl.col("source").first(), pl.col("error").first())
        .sort("rows", "status", descending=[True, False])
        .collect(engine="streaming")
    )
    return found.to_dicts()


def _levels(dataset: Dataset, column: str, levels: int, examples: int) -> list[Level]:
    score = pl.col(column)
    grouped = (
        dataset.scan()
        .group_by("level")
        .agg(pl.len().alias("n"), score.min().alias("low"), score.max().alias("high"), score.mean().alias("mean"))
        .collect(engine="streaming")
    )
    by_level = {row["level"]: row for row in grouped.to_dicts()}
    shown = _examples(dataset, column, examples) if examples else {}
    found = []
    for level in [*range(1, levels + 1), *([None] if None in by_level else [])]:
        row = by_level.get(level, {"n": 0, "low": None, "high": None, "mean": None})
        share = row["n"] / dataset.rows if dataset.rows else 0.0
        texts = shown.get(level, []) if level is not None else []
        found.append(Level(level, row["n"], share, row["low"], row["high"], row["mean"], texts))
    return found


def _examples(dataset: Dataset, column: str, count: int) -> dict[int, list[dict[str, Any]]]:
    """A few pairs of each level, the same ones every time, from parts spread over the dataset."""
    step = max(1, len(dataset.parts) // _EXAMPLE_PARTS)
    found: dict[int, list[dict[str, Any]]] = {}
    columns = ["key", "level", column, "caption", "conversations"]
    for index in range(0, len(dataset.parts), step):
        for row in dataset.read(index, columns).to_pylist():
            if row["level"] is not None:
                found.setdefault(row["level"], []).append(row)
        for level, rows in found.items():
            rows.sort(key=lambda row: hashlib.blake2b(row["key"].encode(), digest_size=8).digest())
            found[level] = rows[:count]
    return {
        level: [{"key": r["key"], "score": r[column], "text": _text(r)} for r in sorted(rows, key=lambda r: -r[column])]
        for level, rows in found.items()
    }


def _text(row: dict[str, Any]) -> str:
    if row["caption"] is not None:
        return str(row["caption"])
    return " ".join(f"{turn['role']}: {turn['text']}" for turn in row["conversations"] or [])


def render(report: Report) -> RenderableType:
    """The report for a terminal."""
    pieces: list[RenderableType] = [_head(report)]
    if len(report.statuses) > 1 or report.errors:
        pieces.append(_status_table(report))
    if report.scored:
        pieces.append(_score_table(report))
        if not report.levels:
            pieces.append(_histogram(report))
    if report.levels:
        pieces.append(_level_table(report))
        if any(level.examples for level in report.levels):
            pieces.append(_example_table(report))
    elif report.scored:
        pieces.append(Text("No levels yet: `aligncurate bucket` gives them.", style="dim"))
    return Group(*[Padding(piece, (0, 0, 1, 0)) for piece in pieces])


def _head(report: Report) -> Text:
    text = Text()
    text.append(report.path, style="bold")
    parts = "1 part" if report.parts == 1 else f"{report.parts:,} parts"
    text.append(f"\n{report.rows:,} rows in {parts}, made by `{report.made_by}`")
    if report.encoder:
        text.append(f"\nscored with {report.encoder}")
    return text


def _table(*columns: str, left: Sequence[int] = (), title: str | None = None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", padding=(0, 1))
    for number, name in enumerate(columns):
        text = number in left
        # Numbers keep their width when a long text beside them does not fit.
        table.add_column(name, justify="left" if text else "right", no_wrap=not text, min_width=None if text else 6)
    return table


def _status_table(report: Report) -> Table:
    table = _table("status", "rows", "share", "an example", left=(0, 3), title="Status")
    examples = {error["status"]: f"{error['key']}: {error['error']}" for error in report.errors}
    for status, rows in report.statuses.items():
        style = "green" if status == "ok" else ("cyan" if status == "text_only" else "red")
        share = f"{rows / report.rows:.1%}"
        table.add_row(Text(status, style=style), f"{rows:,}", share, Text(examples.get(status, ""), style="dim"))
    return table


def _score_table(report: Report) -> Table:
    shown = {"0": "min", "0.05": "5%", "0.25": "25%", "0.5": "median", "0.75": "75%", "0.95": "95%", "1": "max"}
    title = "Score" if report.score_column == "score" else f"Score ({report.score_column})"
    table = _table("pairs", "mean", *shown.values(), title=title)
    table.add_row(f"{report.scored:,}", f"{report.mean:.3f}", *[f"{report.quantiles[q]:.3f}" for q in shown])
    return table


def _bar(count: int, largest: int) -> Text:
    eighths = round(8 * _BAR * count / largest) if largest else 0
    full, part = divmod(eighths, 8)
    return Text("█" * full + " ▏▎▍▌▋▊▉"[part].strip(), style="cyan")


def _histogram(report: Report) -> Table:
    table = _table("score", "pairs", "", left=(2,))
    values = list(report.quantiles.values())
    edges = np.linspace(values[0], values[-1], _BINS + 1)
    for low, count in zip(edges, report.histogram, strict=False):
        table.add_row(f"{low:.3f}", f"{count:,}", _bar(count, max(report.histogram)))
    return table


def _level_table(report: Report) -> Table:
    table = _table(
        "level",
        "pairs",
        "share",
        "score",
        "mean",
        "",
        left=(5,),
        title=f"Levels ({report.method})" if report.method else "Levels",
    )
    largest = max(level.count for level in report.levels)
    for level in reversed([lv for lv in report.levels if lv.level is not None]):
        scores = f"{level.minimum:.3f} … {level.maximum:.3f}" if level.minimum is not None else "–"
        mean = f"{level.mean:.3f}" if level.mean is not None else "–"
        table.add_row(
            str(level.level), f"{level.count:,}", f"{level.share:.1%}", scores, mean, _bar(level.count, largest)
        )
    missing = next((lv for lv in report.levels if lv.level is None), None)
    if missing is not None:
        table.add_row("none", f"{missing.count:,}", f"{missing.share:.1%}", "–", "–", Text("not scored", style="dim"))
    return table


def _example_table(report: Report) -> Table:
    table = _table("level", "score", "text", left=(2,), title="Examples")
    table.columns[2].no_wrap = True
    for level in reversed(report.levels):
        for number, example in enumerate(level.examples):
            name = str(level.level) if number == 0 else ""
            table.add_row(name, f"{example['score']:.3f}", Text(" ".join(example["text"].split())))
    return table


def show(report: Report) -> None:
    """Print the report to standard output."""
    Console(highlight=False).print(render(report))
