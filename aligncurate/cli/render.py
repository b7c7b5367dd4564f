"""What the commands print: summaries, tables, next steps. Nothing is measured here."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from aligncurate.cli.histogram import HistogramDrawing, format_score, level_style
from aligncurate.io.paths import AnyPath
from aligncurate.progress import count, duration, safe_text
from aligncurate.verbs.inspect.result import Inspection

if TYPE_CHECKING:
    from aligncurate.dataset.reader import Dataset
    from aligncurate.scoring.timing import StageTimes
    from aligncurate.verbs.dry_run import DryRun
    from aligncurate.verbs.export.result import Exported
    from aligncurate.verbs.from_sources import ScoreResult
    from aligncurate.verbs.join.join import Joined

_STATUS_STYLES = {"ok": "green", "text_only": "cyan", "url_only": "cyan"}  # all others are failures, in red


def render(inspection: Inspection) -> RenderableType:
    """What `inspect` measured, for a terminal of any width."""
    pieces: list[RenderableType] = [_head(inspection)]
    if len(inspection.statuses) > 1 or inspection.errors:
        pieces.append(_status_table(inspection))
    if inspection.errors:
        pieces[-1] = Group(pieces[-1], _failed_command(inspection))
    if inspection.histogram is not None:
        pieces += [_score_summary(inspection), HistogramDrawing(inspection)]
    if inspection.cuts:
        pieces.append(_cut_table(inspection))
    if inspection.levels:
        pieces.append(_level_table(inspection))
        if any(level.examples for level in inspection.levels):
            pieces.append(_example_table(inspection))
    return Group(*[item for piece in pieces for item in (piece, Text())])


def next_command(inspection: Inspection) -> str | None:
    """The command that usually follows `inspect`; None where there is nothing to go on with."""
    path = _folders(inspection)
    if inspection.levels:
        levels = sum(level.level is not None for level in inspection.levels)
        return f"aligncurate filter {path} --levels {levels // 2 + 1}-{levels} --out BEST"
    if inspection.scored:
        return f"aligncurate bucket {path} --out LEVELLED"
    return f"aligncurate score {path} --out SCORED" if inspection.statuses.get("ok") else None


def _folders(inspection: Inspection) -> str:
    return " ".join(shlex.quote(folder) for folder in inspection.folders)


def _head(inspection: Inspection) -> Text:
    text = Text(safe_text(inspection.path), style="bold")
    made_by = " and ".join(f"`{safe_text(verb)}`" for verb in inspection.made_by.split(", "))
    text.append(
        f"\n{count(inspection.rows, 'row')} in {count(inspection.parts, 'part')}, made by {made_by}", style="not bold"
    )
    if inspection.encoder:
        text.append(f"\nscored with {safe_text(inspection.encoder)}", style="not bold")
    if inspection.levels:
        text.append(f"\n{_origin(inspection)}", style="not bold")
    return text


def _origin(inspection: Inspection) -> str:
    levels = count(sum(level.level is not None for level in inspection.levels), "level")
    if inspection.method is None:
        return f"{levels}, as they came with the source"
    sizes = {"quantile": "of equal size ", "uniform": "of equal width "}.get(inspection.method, "")
    where = "thresholds taken from other scores" if inspection.frozen else "thresholds found on its own scores"
    return safe_text(f"{levels} {sizes}({inspection.method}), {where}")


def _table(*columns: str, left: Sequence[int] = (), title: str) -> Table:
    """A table that wraps where it does not fit: texts first, then numbers; nothing is cut."""
    heading = Text(title, style="bold")
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, title=heading, title_justify="left", header_style="dim")
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number in left else "right", overflow="fold")
    return table


def _status_table(inspection: Inspection) -> Table:
    table = _table("status", "rows", "share", "example", left=(3,), title="Status")
    table.columns[0].justify = "left"
    examples = {error["status"]: safe_text(f"{error['key']}: {error['error']}") for error in inspection.errors}
    for status, rows in inspection.statuses.items():
        name = Text(safe_text(status), style=_STATUS_STYLES.get(status, "red"))
        table.add_row(name, f"{rows:,}", f"{rows / inspection.rows:.1%}", Text(examples.get(status, ""), style="dim"))
    return table


def _failed_command(inspection: Inspection) -> Text:
    path = safe_text(_folders(inspection))
    return Text(f"all failed rows: aligncurate filter {path} --where 'error IS NOT NULL' --out FAILED", style="dim")


def _score_summary(inspection: Inspection) -> Group:
    """Mean and quantiles, as many beside each other as fit."""
    names = {"0": "min", "0.05": "5%", "0.25": "25%", "0.5": "median", "0.75": "75%", "0.95": "95%", "1": "max"}
    column = "" if inspection.score_column == "score" else f" ({safe_text(inspection.score_column)})"
    values = {"mean": inspection.mean} | {name: inspection.quantiles[q] for q, name in names.items()}
    cells = [Text.assemble((f"{name} ", "dim"), format_score(value)) for name, value in values.items()]
    heading = Text(f"Scores{column} of {count(inspection.scored, 'row')}", style="bold")
    return Group(heading, Columns(cells, padding=(0, 3)))


def _cut_table(inspection: Inspection) -> Table:
    """What each threshold keeps, the strictest first."""
    mismatched = ["mismatched kept"] if inspection.mismatched else []
    table = _table("levels", "score from", "rows kept", "share", *mismatched, title="Cuts")
    best = inspection.cuts[-1].level
    for cut in reversed(inspection.cuts):
        levels = f"{cut.level}-{best}" if cut.level < best else f"{best}"
        others = [f"{cut.mismatched:.1%}"] if cut.mismatched is not None else []
        table.add_row(levels, format_score(cut.score), f"{cut.count:,}", f"{cut.share:.1%}", *others)
    return table


def _level_table(inspection: Inspection) -> Table:
    title = f"Levels ({safe_text(inspection.method)})" if inspection.method else "Levels"
    table = _table("level", "rows", "share", "score", "mean", title=title)
    total = sum(level.level is not None for level in inspection.levels)
    for level in reversed([level for level in inspection.levels if level.level is not None]):
        assert level.level is not None
        scores = f"{format_score(level.minimum)} … {format_score(level.maximum)}" if level.minimum is not None else "–"
        name = Text(f"{level.level}", style=level_style(level.level, total))
        table.add_row(name, f"{level.count:,}", f"{level.share:.1%}", scores, format_score(level.mean))
    for level in inspection.levels:
        if level.level is None:
            table.add_row("none", f"{level.count:,}", f"{level.share:.1%}", "not scored", "–", style="dim")
    return table


def _example_table(inspection: Inspection) -> Table:
    table = _table("level", "score", "text", left=(2,), title="Examples")
    for level in reversed(inspection.levels):
        for number, example in enumerate(level.examples):
            name = str(level.level) if number == 0 else ""
            table.add_row(name, format_score(example["score"]), Text(" ".join(example["text"].split())))
    return table


def render_run(done: str, result: ScoreResult, out: AnyPath) -> RenderableType:
    """How a run of `score` or `ingest` ended; `done` is `scored` or `ingested`."""
    folder = safe_text(str(out))
    whole = result.dataset is not None and result.dataset.rows == result.rows
    if result.resumed and not result.rows and not result.failures:
        lines = [Text(f"nothing to do: {count(result.resumed, 'part')} in {folder} from an earlier run")]
    else:
        rate = f" ({result.rows / result.seconds:,.0f}/s)" if result.rows and result.seconds else ""
        ran = f"{done} {count(result.rows, 'row')} in {duration(result.seconds)}{rate} into {folder}"
        lines = [Text(ran if whole else f"this run: {ran}")]
        if result.resumed:
            lines.append(Text(f"{count(result.resumed, 'part')} kept from an earlier run"))
    if result.rows:
        lines.append(_stage_times(result.times))
    if result.dataset is not None:
        lines += _outcome(result.dataset, out, whole=whole)
    elif result.missing:
        lines.append(
            Text(
                f"{count(result.missing, 'part')} of other partitions missing; the run that makes the last"
                " one finishes the dataset"
            )
        )
    return Group(*lines)


def render_dry_run(found: DryRun, out: AnyPath, doing: str) -> Text:
    """What a run would do; `doing` says it in words, such as `score with tiny`."""
    lines = []
    for each in found.inputs:
        size = f", {each.bytes / 1e6:,.1f} MB" if each.bytes is not None else ""
        names = each.files[0] if len(each.files) == 1 else f"{each.files[0]} … {each.files[-1]}"
        lines.append(f"{each.kind}: {count(len(each.files), 'file')}{size}: {names}")
    rows = "an unknown number of rows" if found.rows is None else count(found.rows, "row")
    lines.append(f"would {doing}: {rows} in {count(found.parts, 'part')} into {out}")
    if found.done:
        are = "is" if found.done == 1 else "are"
        lines.append(f"{found.done:,} of {count(found.parts, 'part')} {are} there, {found.parts - found.done:,} to do")
    return Text("\n".join(safe_text(line) for line in lines))


def _stage_times(times: StageTimes) -> Text:
    """Seconds of work per stage, and how busy the slowest stage was."""
    seconds = ", ".join(f"{stage} {taken:.1f} s" for stage, taken in times.seconds.items())
    slowest = times.bottleneck
    threads = f" of its {times.threads[slowest]} threads" if times.threads[slowest] > 1 else ""
    return Text(f"time: {seconds}; bottleneck: {slowest}, {min(times.busy[slowest], 1.0):.0%}{threads} busy")


def _outcome(dataset: Dataset, out: AnyPath, *, whole: bool) -> list[Text]:
    """Rows by status, how far fast decoding strays, and where to see why rows failed."""
    if not dataset.rows:
        return [Text("the source has no pairs", style="yellow")]
    statuses = [(f"{status} {rows:,}", _STATUS_STYLES.get(status, "red")) for status, rows in dataset.statuses.items()]
    label = "" if whole else f"all {count(dataset.rows, 'row')}: "  # the run may have made only some of them
    lines = [Text(label).append_text(Text("  ").join([Text(text, style=style) for text, style in statuses]))]
    if changed := dataset.parts[0].facts.get("fast_against_exact"):
        lines.append(
            Text(
                f"fast decoding changed the scores of {changed['pairs']} pairs by {changed['mean']:.4f} on average and "
                f"{changed['max']:.4f} at most, compared to exact decoding"
            )
        )
    if any(part.failed for part in dataset.parts):
        path = safe_text(shlex.quote(str(out)))
        lines.append(Text(f"why rows failed: aligncurate inspect {path}", style="dim"))
    if all(part.failed == part.rows for part in dataset.parts):
        lines.append(Text("no row can be used", style="red"))
    return lines


def render_kept(kept: int, total: int, out: AnyPath) -> Text:
    """What `filter` kept."""
    share = f" ({kept / total:.1%})" if total else ""
    text = Text(f"kept {kept:,} of {count(total, 'row')}{share} in {safe_text(str(out))}")
    return text if kept else text.append("\nno rows match", style="yellow")


def render_merged(rows: int, parts: int, out: AnyPath) -> Text:
    """What `merge` made."""
    return Text(f"merged {count(rows, 'row')} in {count(parts, 'part')} into {out}")


def render_joined(joined: Joined, out: AnyPath) -> Text:
    """What `join` added."""
    rows = joined.matched + joined.unmatched
    columns, folder = safe_text(", ".join(joined.columns)), safe_text(str(out))
    text = Text(f"added {columns} to {joined.matched:,} of {count(rows, 'row')} in {folder}")
    if joined.unmatched:
        text.append(f"\n{count(joined.unmatched, 'row')} not found in the table; nulls there", "yellow")
    if joined.repeated:
        text.append(f"\n{count(joined.repeated, 'row')} of the table left out as duplicates", "yellow")
    return text


def render_export(exported: Exported, out: AnyPath, failures: str) -> Text:
    """What `export` wrote into `out`; `failures` is the file that lists images that could not be read."""
    names = exported.files if exported.nothing_new else exported.new_files
    files = f"{names[0]} … {names[-1]}" if len(names) > 1 else "".join(names) or "nothing"
    size = f", {exported.bytes / 1e6:,.1f} MB of images" if exported.bytes and not exported.kept else ""
    if exported.nothing_new:
        return Text(f"nothing to do: {count(exported.rows, 'row')} in {safe_text(str(out))}: {files}")
    text = Text(f"exported {count(exported.rows - exported.kept, 'row')}{size} to {safe_text(str(out))}: {files}")
    if exported.kept:
        kept = count(len(exported.kept_files), "file")
        text.append(f"\n{count(exported.kept, 'row')} in {kept} kept from an earlier run")
    if exported.skipped:
        text.append(f"\nskipped {count(exported.skipped, 'row')} that cannot be used; their status says why", "yellow")
    if exported.failed:
        listed = safe_text(str(out / failures))
        text.append(f"\n{count(len(exported.failed), 'image')} could not be read any more; see {listed}", "red")
    return text


def after_ingest(dataset: Dataset, out: AnyPath) -> str:
    """The command that usually follows `ingest`; scores and levels may have come with the source."""
    folder = shlex.quote(str(out))
    if dataset.levels:
        return f"aligncurate inspect {folder}"
    scored = dataset.score_counts("score") is not None  # in all rows
    return f"aligncurate bucket {folder} --out LEVELLED" if scored else f"aligncurate score {folder} --out SCORED"


def after_filter(kept: Dataset, out: AnyPath) -> str:
    """The command that usually follows `filter`; pairs that are not downloaded have no images to export."""
    folder = shlex.quote(str(out))
    if any(status in kept.statuses for status in ("ok", "text_only")):
        return f"aligncurate export {folder} --out SHARDS"
    if "url_only" in kept.statuses:
        return f"aligncurate export {folder} --format datacomp-uids --out UIDS"
    return f"aligncurate inspect {folder}"


def after_export(format: str, dataset: Dataset, out: AnyPath) -> str:
    """The command that usually follows `export`."""
    folder = safe_text(shlex.quote(str(out)))
    if format == "datacomp-uids":
        uids = shlex.quote(str(out / "uids.npy"))
        folders = " ".join(shlex.quote(str(each)) for each in dataset.folders)
        return f"aligncurate filter {folders} --uids {uids} --out SUBSET"
    if dataset.levels:
        return f"aligncurate train pretrain {folder} --llm LLM --vision TOWER --out MODEL"
    return f"aligncurate score {folder} --out SCORED"


def render_models(entries: Sequence[dict[str, object]], default: str) -> Table:
    """The encoders that `--model` accepts."""
    table = Table("model", "pixels", "width", "--pretrained", box=box.SIMPLE_HEAD)
    for entry in entries:
        name = Text(str(entry["model"]))
        if entry["model"] == default:
            name.append(" (default)", style="cyan")
        weights = ", ".join(entry["weights"])  # type: ignore[arg-type]
        table.add_row(name, str(entry["image_size"]), str(entry["width"]), weights)
    return table
