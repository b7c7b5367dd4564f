"""The whole job, offline, on drawn scenes: score, level, curate, and train a model that answers questions about them.

The captions of the scenes are known to be right or wrong, and the answers to the questions are known too.
"""

import shutil
import time
from pathlib import Path
from typing import Any

import polars as pl
from rich import box
from rich.console import Console
from rich.table import Table

import aligncurate
from aligncurate.dataset.reader import Dataset
from aligncurate.demo import scenes
from aligncurate.errors import UserError
from aligncurate.progress import duration
from aligncurate.verbs.inspect import render
from aligntrain import StageConfig
from aligntrain.tools.evaluate import Question, answer_accuracy
from aligntrain.tools.generate import load
from pipelines.stage import run_stage

SEED = 20_241_124  # far from the seeds that the built-in encoder was trained on
NAMES = {
    "right": "fully right",
    "one_detail_wrong": "one detail wrong",
    "one_object_wrong": "one object wrong",
    "unrelated": "unrelated",
}
FRESH = "fresh.png"
ASKED = 40  # fresh scenes
# Padded batches: a packed row costs attention over all of it, most of the work for models this small on a CPU.
_SMALL: dict[str, Any] = {
    "dtype": "fp32", "packing": "off", "batch_size": 64, "max_length": 512, "log_every": 30,
}  # fmt: skip
_MARK = "made-by-aligncurate-demo"

console = Console(highlight=False)


def run(out: Path, *, count: int = 4_000, quiet: bool = False) -> None:
    """Draw `count` pairs, score, bucket, inspect, filter and export them below `out`, train on them, ask questions.

    Raises UserError when `out` holds something that no demo made.
    """
    if count < 100:
        raise UserError(f"--count {count}: the demo needs at least 100 pairs to have something in every level.")
    _clear(out)
    console.quiet = quiet
    started = time.monotonic()
    _step(1, f"Draw {count:,} small scenes, each with a caption whose correctness is known")
    scenes.write_tars(out / "scenes", count, SEED)
    _step(2, "Score every pair with the built-in encoder (aligncurate score … --model tiny)")
    summary = aligncurate.score(out / "scenes", out / "scored", model="tiny", quiet=quiet)
    console.print(f"scored {summary.rows:,} pairs in {duration(summary.seconds)}")
    _step(3, "Cut the scores into eight alignment levels (aligncurate bucket)")
    levelled = aligncurate.bucket(out / "scored", out / "levelled", levels=8, quiet=quiet)
    console.print(render(aligncurate.inspect(levelled, examples=1)))
    _step(4, "Do the levels follow what is known of the captions?")
    console.print(correctness_table(levelled))
    _step(5, "Keep the upper half and export it (aligncurate filter, aligncurate export)")
    best = aligncurate.filter(levelled, out / "best", levels="5-8", quiet=quiet)
    exported = aligncurate.export(best, out / "shards", shard_size=1_000, quiet=quiet)
    console.print(f"kept {best.rows:,} of {levelled.rows:,} pairs: {', '.join(exported.files)} in {out / 'shards'}")
    _step(6, "Pretrain AlignGPT on all levels (aligncurate train pretrain … --llm tiny --vision tiny)")
    run_stage(pretraining(out))
    _step(7, f"Draw {count // 2:,} more scenes with questions, and finetune (aligncurate train finetune)")
    scenes.write_conversations(out / "questions", count // 2, SEED + 1)
    run_stage(finetuning(out))
    _step(8, "Ask about scenes that nothing was trained on (aligncurate generate, aligncurate chat)")
    _ask(out, quiet=quiet)
    console.print(f"\nDone in [bold]{duration(time.monotonic() - started)}[/]. Where to look, and what to try next:")
    confused = "correctness = 'one_detail_wrong' and level >= 7"
    for command in (
        f"aligncurate inspect {out / 'levelled'} --examples 3",
        f'aligncurate filter {out / "levelled"} --out {out / "odd"} --where "{confused}"',
        f"aligncurate chat {out / 'finetuned'} --image {out / FRESH} --show-alignment",
        "aligncurate score YOUR_DATA --out scored    # tars, Parquet, JSON, CSV; downloads OpenAI's ViT-L/14",
    ):
        console.print(f"  {command}", style="cyan", markup=False, soft_wrap=True)


def pretraining(out: Path) -> StageConfig:
    """Stage 1 of the demo: the shipped LLM and tower stay as they are, projector and level embeddings learn."""
    return StageConfig.pretrain(
        data=[out / "levelled"],
        out=out / "pretrained",
        llm="tiny",
        vision="tiny",
        epochs=3,
        token_budget=1024,
        learning_rate=3e-3,
        **_SMALL,
    )


def finetuning(out: Path) -> StageConfig:
    """Stage 2 of the demo: the LLM, the projector and the gate learn to answer questions."""
    return StageConfig.finetune(
        data=[out / "questions"],
        out=out / "finetuned",
        init=out / "pretrained",
        template="chat",
        epochs=2,
        token_budget=2048,
        learning_rate=2e-3,
        **_SMALL,
    )


def _ask(out: Path, *, quiet: bool) -> None:
    """One fresh scene's questions with the model's answers and the right ones, and how many of many are right."""
    asked = []
    for number in range(ASKED):
        scene = scenes.make_scene(SEED + 2, number)
        image = scenes.draw(scene)
        short = [pair for pair in scenes.questions(scene) if len(pair[1].split()) <= 4]  # descriptions have many words
        asked += [Question(str(number), image, question, answer) for question, answer in short]
    known = (answer for number in range(500) for _, answer in scenes.questions(scenes.make_scene(SEED + 1, number)))
    found = answer_accuracy(*load(out / "finetuned"), asked, known, quiet=quiet)
    fresh = scenes.make_scene(SEED + 2, 0)
    scenes.draw(fresh, size=384).save(out / FRESH)
    table = Table("question", "answer", "", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    first = sum(question.key == "0" for question in asked)
    for question, told, right in found.examples[:first]:
        table.add_row(question, told, "[green]right[/]" if told == right else f"[red]it is: {right}[/]")
    console.print(f"{out / FRESH} shows: {scenes.describe(fresh)}", soft_wrap=True)
    console.print(table)
    console.print(
        f"Of {found.questions:,} questions about {ASKED} fresh scenes [bold]{found.accuracy:.0%}[/] are answered "
        f"rightly; always saying “{found.usual}” would get {found.baseline:.0%}.",
        soft_wrap=True,
    )


def correctness_table(levelled: Dataset) -> Table:
    """Per kind of caption: its mean score, its mean level, and its share of each level."""
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
        cells = [f"[bold green]{s:.0%}[/]" if s >= 0.5 else f"{s:.0%}" for s in shares]
        score, level = some.select(pl.col("score", "level").mean()).row(0)
        table.add_row(name, f"{score:.3f}", f"{level:.1f}", *cells)
    table.caption = f"score and level: means; L1 to L{numbers[-1]}: what each level is made of"
    return table


def _step(number: int, text: str) -> None:
    console.print(f"\n[bold cyan]{number}[/] [bold]{text}[/]")


def _clear(out: Path) -> None:
    """Begin anew in a folder that an earlier demo made; leave any other alone."""
    if out.is_dir() and any(out.iterdir()) and not (out / _MARK).is_file():
        raise UserError(f"{out}: the folder holds something else; name another with --out.")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: --out must be a folder, but this is a file.")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / _MARK).touch()
