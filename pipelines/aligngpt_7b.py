"""The recipe of AlignGPT-7B (arXiv 2405.14129): score and level 558K captions, pretrain, finetune on 665K instructions.

    python -m pipelines.aligngpt_7b --help
    python -m pipelines.aligngpt_7b --captions blip_laion_cc_sbu_558k.json --caption-images images \\
        --instructions llava_v1_5_mix665k.json --instruction-images data --out aligngpt-7b --gpus 8 --dry-run

The data is that of LLaVA-1.5: LLaVA-Pretrain (captions with images) and LLaVA-Instruct's 665K mix (with images from
COCO, GQA, OCR-VQA, TextVQA and Visual Genome). `--dry-run` checks the data, plans both stages, estimates time and
memory and prints the commands. Without it everything is run; rerun the same command to resume an interrupted run.
Curation runs in one process; each stage may run under torchrun (`--only pretrain`, `--only finetune`).
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

import aligncurate
from aligncurate.dataset.record import Pair, Status
from aligncurate.errors import UserError
from aligncurate.progress import duration
from aligncurate.sources.detect import open_source
from aligncurate.sources.options import SourceOptions
from aligncurate.verbs.bucket import Method
from aligntrain import StageConfig, train
from aligntrain.tools.preview import ASSUMED_UTILISATION, Preview, preview

PAIRS, INSTRUCTIONS = 558_128, 665_298  # rows in LLaVA's two files
CHECKED_ROWS = 200  # rows of each file whose images a dry run opens
STEPS = ("curate", "pretrain", "finetune")

console = Console(highlight=False)


@dataclass(frozen=True)
class Recipe:
    """Inputs and settings of the run. Everything else is a default of StageConfig, which follows the paper.

    Attributes:
        captions, instructions: LLaVA's JSON files.
        caption_images, instruction_images: folders that the image paths in these files are relative to.
        out: folder of the whole run.
        llm, vision: folders, or names on the Hugging Face hub.
        levels, method: number of alignment levels and how they are cut; the paper says "equally spaced intervals"
            (section 3.2).
        encoder: options of `score`; by default OpenAI's ViT-L/14, as the paper does not name its encoder.
        settings: StageConfig fields for both stages.
    """

    captions: Path
    caption_images: Path
    instructions: Path
    instruction_images: Path
    out: Path
    llm: str = "lmsys/vicuna-7b-v1.5"
    vision: str = "openai/clip-vit-large-patch14-336"
    levels: int = 8
    method: Method = "uniform"
    encoder: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def levelled(self) -> Path:
        return self.out / "levelled"

    def pretrain(self) -> StageConfig:
        """Stage 1: train the projector and the level embeddings on the levelled captions."""
        return StageConfig.pretrain(
            data=[self.levelled], out=self.out / "pretrained", llm=self.llm, vision=self.vision,
            num_levels=self.levels, **self.settings,
        )  # fmt: skip

    def finetune(self) -> StageConfig:
        """Stage 2: train the projector, the gate and the LLM on the instructions."""
        return StageConfig.finetune(
            data=[self.instructions], image_root=self.instruction_images, out=self.out / "finetuned",
            init=self.out / "pretrained", **{"checkpointing": True, **self.settings},
        )  # fmt: skip


def run(recipe: Recipe, only: str | None = None) -> None:
    """Run all STEPS, or only one of them; steps that are already done are skipped."""
    if only in (None, "curate"):
        curate(recipe)
    if only in (None, "pretrain"):
        train(recipe.pretrain()).raise_if_stopped()
    if only in (None, "finetune"):
        train(recipe.finetune()).raise_if_stopped()


def curate(recipe: Recipe) -> None:
    """Score the captions and cut the scores into levels.

    Raises UserError if started in several processes, or if some of the data could not be read.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("curation runs in one process; run --only curate without torchrun first.")
    images = SourceOptions(image_root=str(recipe.caption_images))
    # LLaVA's captions are the answers in its conversations, which are what `score` uses by default.
    scored = aligncurate.score(recipe.captions, recipe.out / "scored", source=images, **recipe.encoder)
    if scored.dataset is None:
        raise UserError(f"{len(scored.failures)} shards could not be read; rerun the same command to try them again.")
    aligncurate.bucket(scored.dataset, recipe.levelled, levels=recipe.levels, method=recipe.method)


# ---- the dry run -----------------------------------------------------------------------------------


def dry_run(recipe: Recipe, gpus: int, gigabytes: float, tflops: float) -> None:
    """Check the data, plan both stages and print the time and memory they need; reads all texts and a few images.

    Args:
        recipe: the run to plan.
        gpus: number of GPUs.
        gigabytes: memory of each GPU.
        tflops: bf16 TFLOP/s of each GPU, from its data sheet.

    Raises UserError if a file or folder is missing.
    """
    console.print(_data_table(recipe))
    stages = list(_stages(recipe, gpus))
    console.print(_schedule_table(stages, gpus, tflops))
    console.print(_memory_table(stages, gigabytes))
    console.print("Commands:")
    launch = (
        f"torchrun --nproc-per-node {gpus} -m pipelines.aligngpt_7b" if gpus > 1 else "python -m pipelines.aligngpt_7b"
    )
    for step in STEPS:
        first = "python -m pipelines.aligngpt_7b" if step == "curate" else launch
        console.print(f"  {first} … --only {step}", style="cyan", markup=False, soft_wrap=True)


def _data_table(recipe: Recipe) -> Table:
    data = Table("data", "rows", "expected", f"images among {CHECKED_ROWS}", box=box.SIMPLE_HEAD)
    for column in data.columns[1:]:
        column.justify = "right"
    for file, images, expected in (
        (recipe.captions, recipe.caption_images, PAIRS),
        (recipe.instructions, recipe.instruction_images, INSTRUCTIONS),
    ):
        if not Path(images).is_dir():
            raise UserError(f"{images}: no such folder; it should contain the images of {file}.")
        source = open_source([str(file)], SourceOptions(image_root=str(images)))
        rows = sum(source.count(shard) for shard in source.shards)
        with_image = readable = 0
        for pair, _ in zip(source.read(source.shards[0]), range(CHECKED_ROWS), strict=False):
            with_image += pair.load is not None or pair.status is Status.MISSING_IMAGE
            readable += pair.load is not None and _is_there(pair)
        mark = "" if rows == expected else "[yellow]"
        data.add_row(str(file), f"{mark}{rows:,}", f"{expected:,}", f"{readable} of {with_image}")
        if with_image and not readable:
            raise UserError(f"{file}: none of its first {with_image} images is in {images}.")
    return data


def _is_there(pair: Pair) -> bool:
    try:
        return bool(pair.load is not None and pair.load())
    except OSError:
        return False


def _stages(recipe: Recipe, gpus: int) -> Iterator[tuple[StageConfig, Preview]]:
    """The settings and the plan of both stages, also before the steps they depend on have run."""
    first, second = recipe.pretrain(), recipe.finetune()
    if not recipe.levelled.is_dir():
        # Without levels yet, plan on the captions: only the alignment vector, one token per sample, is missing.
        first = first.replace(data=(recipe.captions,), image_root=recipe.caption_images, align_mode="none")
    if not (recipe.out / "pretrained" / "config.json").is_file():
        second = second.replace(init=None, llm=recipe.llm, vision=recipe.vision, num_levels=recipe.levels)
    for stage in (first, second):
        yield stage, preview(stage, gpus)


def _schedule_table(stages: list[tuple[StageConfig, Preview]], gpus: int, tflops: float) -> Table:
    table = _stage_table("schedule", stages)
    rows: dict[str, list[str]] = {}
    for stage, plan in stages:
        facts = plan.facts
        values = {
            "samples": f"{facts.rows:,}",
            "left out": f"{sum(facts.skipped.values()):,}",
            "steps": f"{plan.steps:,} of {stage.batch_size}",
            "tokens": f"{plan.tokens:,}",
            "images": f"{plan.images:,}",
            "cut at max_length": f"{facts.truncated:,}",
            "packing efficiency": f"{plan.efficiency:.1%}",
            "learning rate": f"{stage.learning_rate:g}, then a cosine",
            "warm-up": f"{math.ceil(plan.steps * stage.warmup_ratio):,} steps",
            f"time on {gpus} GPUs of {tflops:g} TFLOP/s at {ASSUMED_UTILISATION:.0%}": duration(
                plan.flops / (gpus * tflops * 1e12 * ASSUMED_UTILISATION)
            ),
        }
        for name, value in values.items():
            rows.setdefault(name, []).append(value)
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def _stage_table(title: str, stages: list[tuple[StageConfig, Preview]]) -> Table:
    table = Table("", *(stage.stage for stage, _ in stages), title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _memory_table(stages: list[tuple[StageConfig, Preview]], gigabytes: float) -> Table:
    estimates = [plan.memory for _, plan in stages]
    table = _stage_table("memory per GPU, GB", stages)
    for name in ("weights", "gradients", "optimizer", "activations", "logits"):
        table.add_row(name, *(f"{getattr(memory, name) / 1e9:.1f}" for memory in estimates))
    totals = [memory.total / 1e9 for memory in estimates]
    cells = [f"[{'green' if total <= gigabytes else 'red'}]{total:.1f} of {gigabytes:g}[/]" for total in totals]
    table.add_row("[bold]total[/]", *cells)
    return table


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, text in {
        "captions": "JSON file of LLaVA-Pretrain",
        "caption-images": "folder with its images",
        "instructions": "JSON file of LLaVA-Instruct's 665K mix",
        "instruction-images": "folder with its images",
        "out": "folder of the run",
    }.items():
        parser.add_argument(f"--{name}", type=Path, required=True, help=text)
    parser.add_argument("--llm", default=Recipe.llm, help="LLM: a folder, or a name on the Hugging Face hub")
    parser.add_argument("--vision", default=Recipe.vision, help="vision tower: a folder, or a name on the hub")
    parser.add_argument("--method", choices=("uniform", "quantile"), default=Recipe.method, help="how levels are cut")
    parser.add_argument("--only", choices=STEPS, help="run only this step")
    parser.add_argument("--dry-run", action="store_true", help="check the data and plan both stages, run nothing")
    parser.add_argument("--gpus", type=int, default=8, help="dry run: number of GPUs")
    parser.add_argument("--gigabytes", type=float, default=80, help="dry run: memory of each GPU")
    parser.add_argument("--tflops", type=float, default=989, help="dry run: bf16 TFLOP/s of each GPU (989: H100)")
    given = vars(parser.parse_args(arguments))
    only, dry = given.pop("only"), given.pop("dry_run")
    gpus = {name: given.pop(name) for name in ("gpus", "gigabytes", "tflops")}
    recipe = Recipe(**given)
    try:
        dry_run(recipe, **gpus) if dry else run(recipe, only)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
