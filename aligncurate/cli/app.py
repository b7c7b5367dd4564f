"""The command line: one Typer command per verb; each parses, calls one function and prints."""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from aligncurate import __version__
from aligncurate.cli.options import with_settings
from aligncurate.errors import RunError, UserError
from aligncurate.scoring.options import IngestOptions, ScoreOptions
from aligncurate.settings import field_types
from aligncurate.sources.options import SourceOptions

if TYPE_CHECKING:
    from aligncurate.dataset.reader import Dataset
    from aligncurate.scoring.timing import StageTimes
    from aligncurate.verbs.from_sources import ScoreResult

_MISTAKES = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)


@contextmanager
def _one_sentence() -> Iterator[None]:
    """Every error meant for the user ends as one sentence and an exit code: 2 usage error, 1 runtime error."""
    try:
        yield
    except UserError as error:
        _complain(str(error))
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        _complain("Interrupted. Finished parts are kept; rerun to resume.")
        raise typer.Exit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `| head` has read all it wants
        raise typer.Exit(0) from None
    except RunError as error:  # no other RuntimeError: those are bugs, whose traceback helps
        _complain(f"{str(error).rstrip('.')}. Finished parts are kept; rerun to resume.")
        raise typer.Exit(1) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _complain(f"{where}{error.strerror or error}.")
        raise typer.Exit(2 if isinstance(error, _MISTAKES) else 1) from None


class _Verbs(TyperGroup):
    """All verbs. Those of `aligntrain` are added when one of them, or the list, is asked for."""

    def invoke(self, ctx: Any) -> Any:
        with _one_sentence():
            return super().invoke(ctx)

    def list_commands(self, ctx: Any) -> list[str]:
        self._add_training()
        return super().list_commands(ctx)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands:
            self._add_training()
        return super().resolve_command(ctx, args)

    def _add_training(self) -> None:
        from aligntrain.cli import app as training

        self.commands.update(typer.main.get_command(training).commands)  # type: ignore[attr-defined]


app = typer.Typer(
    cls=_Verbs,
    help="Score image-text pairs with CLIP, give them alignment levels, curate and export them.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_stdout = Console(highlight=False)


class Method(StrEnum):
    quantile = "quantile"
    uniform = "uniform"


class ExportFormat(StrEnum):
    webdataset = "webdataset"
    llava_json = "llava-json"
    datacomp_uids = "datacomp-uids"


Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="SOURCE",
        help="Tars, Parquet, JSON, JSONL, CSV or TSV files, folders of these, or a dataset; braces and * expand.",
        show_default=False,
    ),
]
DatasetFolder = Annotated[Path, typer.Argument(metavar="DATASET", help="Folder of a dataset.", show_default=False)]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write; made if needed.", show_default=False)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors.")]
ScoreColumn = Annotated[str, typer.Option(help="Column with the scores.")]


def _complain(sentence: str) -> None:
    Console(stderr=True, highlight=False).print(f"[bold red]error:[/] {escape(sentence)}", soft_wrap=True)


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", is_eager=True, callback=lambda on: _version(on)),
    ] = False,
) -> None:
    """Score image-text pairs with CLIP, give them alignment levels, curate and export them."""


def _version(on: bool) -> None:
    if on:
        print(f"aligncurate {__version__}")
        raise typer.Exit


@app.command()
@with_settings(ScoreOptions, SourceOptions)
def score(sources: Sources, out: Out, quiet: Quiet = False, **options: Any) -> None:
    """Score every image-text pair of the sources into a new dataset.

    Run the same command again to resume an interrupted run.
    """
    from aligncurate.verbs.score import score as run

    result = run(sources, out, source=_source_options(options), quiet=quiet, **options)
    _summarize("scored", result, out, f"aligncurate bucket {out} --out LEVELLED", quiet)


@app.command()
@with_settings(IngestOptions, SourceOptions)
def ingest(sources: Sources, out: Out, quiet: Quiet = False, **options: Any) -> None:
    """Make a dataset without scores; no model is loaded. Scores and levels of the source are kept."""
    from aligncurate.verbs.ingest import ingest as run

    result = run(sources, out, source=_source_options(options), quiet=quiet, **options)
    _summarize("ingested", result, out, f"aligncurate score {out} --out SCORED", quiet)


@app.command()
def bucket(
    dataset: DatasetFolder,
    out: Out,
    levels: Annotated[int | None, typer.Option(help="Number of levels, N.", show_default="8")] = None,
    method: Annotated[
        Method | None,
        typer.Option(help="quantile: levels of equal size; uniform: of equal width.", show_default="quantile"),
    ] = None,
    thresholds: Annotated[
        Path | None, typer.Option(help="Apply this thresholds.json instead of finding thresholds.", show_default=False)
    ] = None,
    score_column: ScoreColumn = "score",
    quiet: Quiet = False,
) -> None:
    """Give every scored pair its alignment level, 1 to N, N best."""
    from aligncurate.verbs.bucket import bucket as run

    labelled = run(
        dataset,
        out,
        levels=levels,
        method=method.value if method else None,
        thresholds=thresholds,
        score_column=score_column,
        quiet=quiet,
    )
    if not quiet:
        from aligncurate.cli.render import console, render
        from aligncurate.verbs.inspect import inspect as measure

        console().print(render(measure(labelled, score_column=score_column)))
        count = labelled.manifest["thresholds"]["levels"]
        best = f"{count // 2 + 1}-{count}"
        _next(f"aligncurate filter {out} --levels {best} --out BEST, or aligncurate export {out} --out SHARDS")


@app.command()
def inspect(
    dataset: DatasetFolder,
    examples: Annotated[int, typer.Option(metavar="K", help="Show K captions of each level.")] = 0,
    mismatched: Annotated[
        bool,
        typer.Option(
            "--mismatched",
            help="Also score 2,000 images with other rows' captions, with the dataset's encoder. Datasets scored with "
            "--embeddings show this anyway.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the same facts as JSON.")] = False,
    score_column: ScoreColumn = "score",
) -> None:
    """Show a dataset: rows by status, the histogram of scores, what each threshold keeps, and the levels."""
    from aligncurate.cli.render import console, next_command, render
    from aligncurate.verbs.inspect import inspect as measure

    inspection = measure(dataset, examples=examples, mismatched=mismatched, score_column=score_column)
    if as_json:
        print(json.dumps(inspection.to_json(), indent=1, ensure_ascii=False))
        return
    console().print(render(inspection))
    if command := next_command(inspection):
        _next(command)


@app.command()
def filter(
    dataset: DatasetFolder,
    out: Out,
    where: Annotated[
        str | None,
        typer.Option(metavar="SQL", help="Keep rows for which this SQL expression is true.", show_default=False),
    ] = None,
    levels: Annotated[str | None, typer.Option(help="Levels to keep: 5-8 or 1,3,7-8.", show_default=False)] = None,
    top_fraction: Annotated[
        float | None, typer.Option(help="Keep exactly this share of the scored rows, the best.", show_default=False)
    ] = None,
    sample: Annotated[int | None, typer.Option(metavar="N", help="Keep N rows at random.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sample.")] = 0,
    score_column: ScoreColumn = "score",
    quiet: Quiet = False,
) -> None:
    """Keep some rows: by SQL, then level, then top fraction, then at random."""
    from aligncurate.dataset.reader import Dataset
    from aligncurate.verbs.filter import filter as run

    before = Dataset(dataset)
    kept = run(
        before,
        out,
        where=where,
        levels=levels,
        top_fraction=top_fraction,
        sample=sample,
        seed=seed,
        score_column=score_column,
        quiet=quiet,
    )
    if not quiet:
        share = f" ({kept.rows / before.rows:.1%})" if before.rows else ""
        _stdout.print(f"kept [bold]{kept.rows:,}[/] of {before.rows:,} rows{share} in {escape(str(out))}")
        if not kept.rows:
            _stdout.print("[yellow]no row fits all the conditions[/]")


@app.command()
def export(
    dataset: DatasetFolder,
    out: Out,
    format: Annotated[ExportFormat, typer.Option(help="What to write.")] = ExportFormat.webdataset,
    shard_size: Annotated[int, typer.Option(help="Pairs per tar.")] = 10_000,
    per_level: Annotated[bool, typer.Option("--per-level", help="A folder of tars for each level.")] = False,
    workers: Annotated[int | None, typer.Option(help="Processes that write tars (default: one per core).")] = None,
    quiet: Quiet = False,
) -> None:
    """Write a dataset's good rows as webdataset tars, LLaVA JSON or a DataComp uid list."""
    from aligncurate.verbs.export.export import FAILURES
    from aligncurate.verbs.export.export import export as run

    done = run(
        dataset,
        out,
        format=format.value,
        shard_size=shard_size,
        per_level=per_level,
        workers=workers,
        quiet=quiet,
    )
    if not quiet:
        files = f"{done.files[0]} … {done.files[-1]}" if len(done.files) > 1 else "".join(done.files) or "nothing"
        size = f", {done.bytes / 1e6:,.1f} MB of images" if done.bytes else ""
        _stdout.print(f"exported {_rows(done.rows)}{size} to {escape(str(out))}: {files}", soft_wrap=True)
        if done.skipped:
            _stdout.print(f"[yellow]{done.skipped:,}[/] rows were left out: their status is neither ok nor text_only")
        if done.failed:
            _stdout.print(f"[red]{len(done.failed):,}[/] images could not be read any more; see {out / FAILURES}")


@app.command()
def models() -> None:
    """List what --model accepts, with input sizes, embedding widths and weights."""
    from rich import box
    from rich.table import Table

    from aligncurate.encoders.catalogue import known_models
    from aligncurate.encoders.names import DEFAULT_MODEL

    table = Table("model", "pixels", "width", "--pretrained", box=box.SIMPLE_HEAD)
    for entry in known_models():
        star = " [cyan](default)[/]" if entry["model"] == DEFAULT_MODEL else ""
        table.add_row(
            f"{entry['model']}{star}", str(entry["image_size"]), str(entry["width"]), ", ".join(entry["weights"])
        )
    _stdout.print(table)
    _stdout.print("Also hf-hub:organisation/name, or --model-config FILE --pretrained FILE for weights of your own.")


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Output folder.")] = Path("demo"),
    count: Annotated[int, typer.Option(help="Number of pairs to draw.")] = 4_000,
    train: Annotated[bool, typer.Option("--train/--no-train", help="Also train a small AlignGPT on them.")] = True,
    quiet: Quiet = False,
) -> None:
    """Run the whole workflow offline on drawn scenes with known captions, and show that it works."""
    from aligncurate.demo.curation import console, curate
    from aligncurate.progress import duration

    started = time.monotonic()
    curate(out, count=count, quiet=quiet)
    if train:
        from aligntrain.tools.demo import train_and_ask

        train_and_ask(out, count=count, quiet=quiet)
    console.print(f"\nDone in [bold]{duration(time.monotonic() - started)}[/]. What to look at and try next:")
    suggestions = [
        f"aligncurate inspect {out / 'levelled'} --examples 3",
        f"aligncurate filter {out / 'levelled'} --out {out / 'odd'} "
        "--where \"correctness = 'one_detail_wrong' and level >= 7\"",
        f"aligncurate chat {out / 'finetuned'} --image {out / 'fresh.png'} --show-alignment" if train else "",
        "aligncurate score YOUR_DATA --out scored    # tars, Parquet, JSON, CSV; downloads OpenAI's ViT-L/14",
    ]
    for command in [line for line in suggestions if line]:
        console.print(f"  {command}", style="cyan", markup=False, soft_wrap=True)


def _source_options(options: dict[str, Any]) -> SourceOptions:
    """Take the source's options out of those of a command."""
    return SourceOptions(**{name: options.pop(name) for name in field_types(SourceOptions) if name in options})


def _summarize(done: str, summary: "ScoreResult", out: Path, following: str, quiet: bool) -> None:
    """Print how a run ended. Shards that could not be read make it a fault: exit code 1."""
    from aligncurate.progress import duration

    for failure in summary.failures:
        _complain(failure.error)
    if not quiet:
        rate = f" ({summary.rows / summary.seconds:,.0f}/s)" if summary.rows and summary.seconds else ""
        took = duration(summary.seconds)
        _stdout.print(f"{done} {_rows(summary.rows)} in {took}{rate} into {escape(str(out))}", soft_wrap=True)
        if summary.resumed:
            _stdout.print(f"{summary.resumed:,} of its parts were there from an earlier run")
        if summary.rows:
            _print_times(summary.times)
        if summary.dataset is not None:
            _print_statuses(summary.dataset)
            if any(part.failed < part.rows for part in summary.dataset.parts):
                _next(following)
            elif summary.dataset.rows:
                _stdout.print("[red]no row can be used[/]")
    if summary.failures:
        _complain(f"{len(summary.failures)} of the shards could not be read; the same command tries them again.")
        raise typer.Exit(1)


def _print_times(times: "StageTimes") -> None:
    """Where the time went: seconds of work in each stage, and how busy the busiest was."""
    seconds = ", ".join(f"{stage} {taken:.1f} s" for stage, taken in times.seconds.items())
    worst = times.bottleneck
    threads = f" of its {times.threads[worst]} threads" if times.threads[worst] > 1 else ""
    busy = min(times.busy[worst], 1.0)
    _stdout.print(f"time: {seconds}; bottleneck: {worst}, {busy:.0%}{threads} busy", soft_wrap=True)


def _print_statuses(dataset: "Dataset") -> None:
    colours = {"ok": "green", "text_only": "cyan"}
    counts = [f"[{colours.get(s, 'red')}]{s} {n:,}[/]" for s, n in dataset.statuses.items()]
    _stdout.print("  ".join(counts) if counts else "[yellow]the source has no pairs[/]")
    strayed = dataset.parts[0].facts.get("fast_against_exact") if dataset.parts else None
    if strayed:
        _stdout.print(
            f"fast decoding moved the scores of {strayed['pairs']} pairs by {strayed['mean']:.4f} on average, "
            f"{strayed['max']:.4f} at most, against exact"
        )
    if any(part.failed for part in dataset.parts):
        _stdout.print(f"why rows failed: aligncurate inspect {dataset.path}", style="dim", soft_wrap=True)


def _next(command: str) -> None:
    _stdout.print(f"next: {command}", style="dim", soft_wrap=True, markup=False)


def _rows(count: int) -> str:
    return f"[bold]{count:,}[/] row{'s' if count != 1 else ''}"


def main() -> None:
    """Entry point of the `aligncurate` command."""
    app()
