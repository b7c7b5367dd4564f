"""The commands of curation, from `score` to `export`: each parses its options, calls one function and prints."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.text import Text

from aligncurate.cli.options import (
    DatasetFolder,
    DatasetFolders,
    DryRun,
    Out,
    Quiet,
    ScoreColumn,
    Sources,
    with_settings,
)
from aligncurate.encoders.model_choice import DEFAULT_MODEL
from aligncurate.errors import ShardError
from aligncurate.io.paths import AnyPath
from aligncurate.progress import count, make_console, notice, safe_text
from aligncurate.scoring.options import IngestOptions, ScoreOptions
from aligncurate.settings import field_types, make
from aligncurate.sources.options import SourceOptions
from aligncurate.verbs.filter.options import FilterOptions
from aligncurate.verbs.join.options import JoinOptions

app = typer.Typer()


@app.command()
@with_settings(ScoreOptions, SourceOptions)
def score(sources: Sources, out: Out, dry_run: DryRun = False, quiet: Quiet = False, **options: Any) -> None:
    """Score every image-text pair of the sources; writes a new dataset.

    Rerun the same command to resume an interrupted run.
    """
    from aligncurate.verbs.score import score as run

    source = _source_options(options)
    if dry_run:
        made = make(ScoreOptions, options)
        configured = ", ".join(Path(config).stem for config in made.model_config or ())
        _show_dry_run(sources, out, source, made, f"score with {made.model or configured or DEFAULT_MODEL}")
        return
    result = run(sources, out, source=source, quiet=quiet, **options)
    _end_of_run("scored", result, out, f"aligncurate bucket {shlex.quote(str(out))} --out LEVELLED", quiet)


@app.command()
@with_settings(IngestOptions, SourceOptions)
def ingest(sources: Sources, out: Out, dry_run: DryRun = False, quiet: Quiet = False, **options: Any) -> None:
    """Make a dataset without scoring; loads no model. Scores and levels of the source are kept."""
    from aligncurate.verbs.ingest import ingest as run

    source = _source_options(options)
    if dry_run:
        _show_dry_run(sources, out, source, make(IngestOptions, options), "ingest")
        return
    result = run(sources, out, source=source, quiet=quiet, **options)
    from aligncurate.cli.render import after_ingest

    following = after_ingest(result.dataset, out) if result.dataset is not None else ""
    _end_of_run("ingested", result, out, following, quiet)


@app.command()
def bucket(
    datasets: DatasetFolders,
    out: Out,
    levels: Annotated[int | None, typer.Option(help="Number of levels N.", show_default="8")] = None,
    method: Annotated[
        Literal["quantile", "uniform"] | None,
        typer.Option(help="quantile: levels of equal size; uniform: of equal width.", show_default="quantile"),
    ] = None,
    thresholds: Annotated[
        Path | None, typer.Option(help="Apply this thresholds.json instead of computing thresholds.")
    ] = None,
    score_column: ScoreColumn = "score",
    quiet: Quiet = False,
) -> None:
    """Give every scored pair its alignment level, 1 to N, N best. Several datasets become one."""
    from aligncurate.verbs.bucket import bucket as run

    run(datasets, out, levels=levels, method=method, thresholds=thresholds, score_column=score_column, quiet=quiet)
    if not quiet:
        from aligncurate.cli.render import next_command, render
        from aligncurate.verbs.inspect.inspect import inspect as measure

        inspection = measure(out, score_column=score_column)
        make_console().print(render(inspection))
        following = f"{next_command(inspection)}, or aligncurate export {shlex.quote(str(out))} --out SHARDS"
        _print_next(following)


@app.command()
def inspect(
    datasets: DatasetFolders,
    examples: Annotated[int, typer.Option(metavar="K", help="Show K captions of each level.")] = 0,
    mismatched: Annotated[
        bool,
        typer.Option(
            "--mismatched",
            help="Also score 2,000 images with other rows' captions, with the dataset's encoder. Datasets scored with "
            "--embeddings show this anyway.",
        ),
    ] = False,
    pretrained: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Weights for --mismatched, if the encoder's were a file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the same facts as JSON.")] = False,
    score_column: ScoreColumn = "score",
) -> None:
    """Show one or more datasets: rows by status, histogram of scores, what each threshold keeps, and the levels."""
    from aligncurate.cli.render import next_command, render
    from aligncurate.verbs.inspect.inspect import inspect as measure

    inspection = measure(
        datasets, examples=examples, mismatched=mismatched, pretrained=pretrained, score_column=score_column
    )
    if as_json:
        print(json.dumps(inspection.to_json(), indent=1))
        return
    make_console().print(render(inspection))
    if command := next_command(inspection):
        _print_next(command)


@app.command()
@with_settings(FilterOptions)
def filter(datasets: DatasetFolders, out: Out, quiet: Quiet = False, **options: Any) -> None:
    """Keep some rows: by SQL, level, score, image and top fraction, then at random, in this order."""
    from aligncurate.cli.render import after_filter, render_kept
    from aligncurate.dataset.joined import open_datasets
    from aligncurate.verbs.filter.filter import filter as run

    before = open_datasets(datasets)
    kept = run(before, out, quiet=quiet, **options)
    if not quiet:
        make_console().print(render_kept(kept.rows, before.rows, out), soft_wrap=True)
        if kept.rows:
            _print_next(after_filter(kept, out))


@app.command()
def merge(datasets: DatasetFolders, out: Out, quiet: Quiet = False) -> None:
    """Make one dataset of several, with their scores and levels; reads no images."""
    from aligncurate.cli.render import render_merged
    from aligncurate.verbs.merge import merge as run

    merged = run(datasets, out, quiet=quiet)
    if not quiet:
        make_console().print(render_merged(merged.rows, len(merged.parts), out), soft_wrap=True)


@app.command()
@with_settings(JoinOptions)
def join(
    dataset: DatasetFolder,
    table: Annotated[Path, typer.Argument(metavar="TABLE", help="Parquet, CSV or TSV file.", show_default=False)],
    out: Out,
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Add columns of another table to a dataset. Rows without a match stay, with nulls."""
    from aligncurate.cli.render import render_joined
    from aligncurate.verbs.join.join import join as run

    joined = run(dataset, table, out, quiet=quiet, **options)
    if not quiet:
        make_console().print(render_joined(joined, out), soft_wrap=True)
        _print_next(f"aligncurate filter {shlex.quote(str(out))} --where CONDITION --out SOME")


@app.command()
def export(
    datasets: DatasetFolders,
    out: Out,
    format: Annotated[
        Literal["webdataset", "llava-json", "datacomp-uids"], typer.Option(help="Output format.")
    ] = "webdataset",
    shard_size: Annotated[int, typer.Option(help="Pairs per tar.")] = 10_000,
    per_level: Annotated[bool, typer.Option("--per-level", help="Write a folder of tars for each level.")] = False,
    workers: Annotated[int | None, typer.Option(help="Processes that write tars.", show_default="one per core")] = None,
    quiet: Quiet = False,
) -> None:
    """Export the usable rows as webdataset tars, LLaVA JSON or a DataComp uid list."""
    from aligncurate.cli.render import after_export, render_export
    from aligncurate.dataset.joined import open_datasets
    from aligncurate.verbs.export.export import FAILURES
    from aligncurate.verbs.export.export import export as run

    opened = open_datasets(datasets)
    done = run(opened, out, format=format, shard_size=shard_size, per_level=per_level, workers=workers, quiet=quiet)
    if not quiet:
        make_console().print(render_export(done, out, FAILURES), soft_wrap=True)
        if done.rows:
            _print_next(after_export(format, opened, out))


@app.command()
def verify(
    datasets: DatasetFolders,
    deep: Annotated[bool, typer.Option("--deep", help="Also read every image and compare it with its sha256.")] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Make damaged parts again, with the command that made the dataset.")
    ] = False,
    inputs: Annotated[
        list[Path] | None,
        typer.Option(
            "--input",
            metavar="FILE",
            help="For --repair: weights, a joined table or a list of uids that the dataset was made with; its manifest "
            "knows only their name and sha256. May be repeated.",
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Parts that are checked at once.", show_default="one per core")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Quiet = False,
) -> None:
    """Check that datasets are what was written: every part against its receipt, the manifest and the thresholds.

    Exit code 0: whole; 1: damaged, each damaged file on a line.
    """
    from aligncurate.cli.verified import render_verified
    from aligncurate.verbs.verify.verify import verify as run

    result = run(datasets, deep=deep, repair=repair, inputs=inputs or (), workers=workers, quiet=quiet or as_json)
    if as_json:
        print(json.dumps(result.to_json(), indent=1))
    elif not (quiet and result.whole):
        make_console().print(render_verified(result, repaired=repair), soft_wrap=True)
    if not result.whole:
        raise typer.Exit(1)


@app.command()
def finish(dataset: Annotated[str, typer.Argument(help="Folder of the dataset.", show_default=False)]) -> None:
    """Finish a dataset that several runs made with --partition: writes its manifest once all parts are there."""
    from aligncurate.verbs.finish import finish as run

    finished = run(dataset)
    console = make_console()
    console.print(f"{safe_text(dataset)}: {count(len(finished.parts), 'part')}, {count(finished.rows, 'row')}")
    _print_next(f"aligncurate inspect {shlex.quote(dataset)}")


@app.command()
def models() -> None:
    """List the encoders that --model accepts, with input size, embedding width and weights."""
    from aligncurate.cli.render import render_models
    from aligncurate.encoders.catalogue import known_models

    console = make_console()
    console.print(render_models(known_models(), DEFAULT_MODEL))
    console.print("Also hf-hub:organization/name, or --model-config FILE --pretrained FILE for your own weights.")


def _source_options(options: dict[str, Any]) -> SourceOptions:
    """Take the source's options out of those of a command."""
    return SourceOptions(**{name: options.pop(name) for name in field_types(SourceOptions) if name in options})


def _show_dry_run(sources: list[str], out: AnyPath, source: SourceOptions, options: IngestOptions, doing: str) -> None:
    from aligncurate.cli.render import render_dry_run
    from aligncurate.verbs.dry_run import dry_run

    found = dry_run(sources, out, options, source)
    for text in found.notices:
        notice(text)
    make_console().print(render_dry_run(found, out, doing), soft_wrap=True)


def _print_next(command: str) -> None:
    """Print the command that usually follows."""
    make_console().print(Text(f"next: {safe_text(command)}", style="dim"), soft_wrap=True)


def _end_of_run(done: str, result: Any, out: AnyPath, following: str, quiet: bool) -> None:
    """Print how a run of `score` or `ingest` ended. Raises ShardError if shards could not be read."""
    from aligncurate.cli.render import render_run

    console = make_console()
    if not quiet:
        console.print(render_run(done, result, out), soft_wrap=True)
        if result.dataset is not None and any(part.ok for part in result.dataset.parts):
            _print_next(following)
    if result.failures:
        errors = [safe_text(failure.error) for failure in result.failures]
        several = f"{len(errors):,} shards could not be read:\n  " if len(errors) > 1 else ""
        raise ShardError(several + "\n  ".join(errors))
