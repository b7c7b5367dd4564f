"""AlignGPT-7B (arXiv 2405.14129) from its parts: score and level 558K pairs, pretrain on them, finetune on 665K
instructions.

python -m pipelines.aligngpt_7b --captions blip_laion_cc_sbu_558k.json --caption-images images \\
    --instructions llava_v1_5_mix665k.json --instruction-images data --out aligngpt-7b --gpus 8 --dry-run

The data is LLaVA-1.5's: LLaVA-Pretrain (captions with their images) and LLaVA-Instruct's mix of 665K (its images are
those of COCO, GQA, OCR-VQA, TextVQA and Visual Genome). `--dry-run` looks at both, plans both stages, estimates time
and memory and prints the commands; without it the stages are run, and a second run goes on where the first stopped.
Curation is for one process; each stage may run under torchrun (`--only pretrain`, `--only finetune`).
"""

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
from aligncurate.dataset.record import Pair
from aligncurate.errors import UserError
from aligncurate.progress import duration
from aligncurate.sources.detect import open_source
from aligncurate.sources.options import SourceOptions
from aligncurate.verbs.bucket import Method
from aligntrain import StageConfig
from aligntrain.tools.preview import ASSUMED_UTILISATION, Preview, preview
from pipelines.stage import run_stage

PAIRS, INSTRUCTIONS = 558_128, 665_298  # rows of LLaVA's two files
LOOKED_AT = 200  # rows of each file whose images a dry run opens
STEPS = ("curate", "pretrain", "finetune")

console = Console(highlight=False)


@dataclass(frozen=True)
class Recipe:
    """What the paper's run is made of. Settings that are not here are StageConfig's, which are the paper's.

    Attributes:
        captions, instructions: LLaVA's JSON files; caption_images, instruction_images: what their paths begin at.
        out: folder of the whole run.
        llm, vision: folders, or names on the Hugging Face hub.
        levels, method: of the alignment levels; "equally spaced intervals" is what the paper says (section 3.2).
        encoder: options of `score`; by default OpenAI's ViT-L/14, for the paper does not name its own.
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
        """Stage 1: projector and level embeddings learn from the levelled captions."""
        return StageConfig.pretrain(
            data=[self.levelled], out=self.out / "pretrained", llm=self.llm, vision=self.vision,
            num_levels=self.levels, **self.settings,
        )  # fmt: skip

    def finetune(self) -> StageConfig:
        """Stage 2: projector, gate and LLM learn from the instructions."""
        return StageConfig.finetune(
            data=[self.instructions], image_root=self.instruction_images, out=self.out / "finetuned",
            init=self.out / "pretrained", **{"checkpointing": True, **self.settings},
        )  # fmt: skip


def run(recipe: Recipe, only: str | None = None) -> None:
    """The whole recipe, or one of its STEPS. What is done already is not done again."""
    if only in (None, "curate"):
        curate(recipe)
    if only in (None, "pretrain"):
        run_stage(recipe.pretrain())
    if only in (None, "finetune"):
        run_stage(recipe.finetune())


def curate(recipe: Recipe) -> None:
    """Score the captioned pictures and cut the scores into levels.

    Raises UserError in one of many processes, and when a part of the data could not be read.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("curation is for one process; run it with --only curate, and then the stages under torchrun.")
    images = SourceOptions(image_root=str(recipe.caption_images))
    # The captions are the answers of LLaVA's conversations, which is what `score` compares by default.
    scored = aligncurate.score(recipe.captions, recipe.out / "scored", source=images, **recipe.encoder)
    if scored.dataset is None:
        raise UserError(f"{len(scored.failures)} shards could not be read; run the same command again.")
    aligncurate.bucket(scored.dataset, recipe.levelled, levels=recipe.levels, method=recipe.method)


# ---- the dry run -----------------------------------------------------------------------------------


def dry_run(recipe: Recipe, gpus: int, gigabytes: float, tflops: float) -> None:
    """Look at the data, plan both stages and print what they would take; reads texts, and a few images.

    Args:
        recipe: what would be run.
        gpus: how many there would be.
        gigabytes: memory of each.
        tflops: bf16 TFLOP/s of each by its data sheet.

    Raises UserError when something that is needed is not there.
    """
    console.print(_data_table(recipe))
    stages = list(_stages(recipe, gpus))
    console.print(_schedule_table(stages, gpus, tflops))
    console.print(_memory_table(stages, gigabytes))
    console.print("to run it:")
    launch = (
        f"torchrun --nproc-per-node {gpus} -m pipelines.aligngpt_7b" if gpus > 1 else "python -m pipelines.aligngpt_7b"
    )
    for step in STEPS:
        first = "python -m pipelines.aligngpt_7b" if step == "curate" else launch
        console.print(f"  {first} … --only {step}", style="cyan", markup=False, soft_wrap=True)


def _data_table(recipe: Recipe) -> Table:
    found = Table("data", "rows", "expected", f"images among {LOOKED_AT}", box=box.SIMPLE_HEAD)
    for column in found.columns[1:]:
        column.justify = "right"
    for file, images, expected in (
        (recipe.captions, recipe.caption_images, PAIRS),
        (recipe.instructions, recipe.instruction_images, INSTRUCTIONS),
    ):
        if not Path(images).is_dir():
            raise UserError(f"{images}: there is no such folder; it should hold the images of {file}.")
        source = open_source([str(file)], SourceOptions(image_root=str(images)))
        rows = sum(source.count(shard) for shard in source.shards)
        with_image = readable = 0
        for pair, _ in zip(source.read(source.shards[0]), range(LOOKED_AT), strict=False):
            if pair.load is not None:
                with_image += 1
                readable += _is_there(pair)
        mark = "" if rows == expected else "[yellow]"
        found.add_row(str(file), f"{mark}{rows:,}", f"{expected:,}", f"{readable} of {with_image}")
        if with_image and not readable:
            raise UserError(f"{file}: none of its first images is in {images}.")
    return found


def _is_there(pair: Pair) -> bool:
    try:
        return bool(pair.load is not None and pair.load())
    except OSError:
        return False


def _stages(recipe: Recipe, gpus: int) -> Iterator[tuple[StageConfig, Preview]]:
    """Both stages' settings, as far as they can be planned before anything is done."""
    first, second = recipe.pretrain(), recipe.finetune()
    if not recipe.levelled.is_dir():
        # There are no levels yet. They do not change the plan but for one token a sample, the alignment vector.
        first = first.replace(data=(recipe.captions,), image_root=recipe.caption_images, align_mode="none")
    if not (recipe.out / "pretrained" / "config.json").is_file():
        second = second.replace(init=None, llm=recipe.llm, vision=recipe.vision, num_levels=recipe.levels)
    for stage in (first, second):
        yield stage, preview(stage, gpus)


def _schedule_table(stages: list[tuple[StageConfig, Preview]], gpus: int, tflops: float) -> Table:
    shown = _stage_table("schedule", stages)
    rows: dict[str, list[str]] = {}
    for stage, found in stages:
        facts = found.facts
        told = {
            "samples": f"{facts.rows:,}",
            "left out": f"{sum(facts.skipped.values()):,}",
            "steps": f"{found.steps:,} of {stage.batch_size}",
            "tokens": f"{found.tokens:,}",
            "images": f"{found.images:,}",
            "cut at max_length": f"{facts.truncated:,}",
            "packing efficiency": f"{found.efficiency:.1%}",
            "learning rate": f"{stage.learning_rate:g}, then a cosine",
            "warm-up": f"{math.ceil(found.steps * stage.warmup_ratio):,} steps",
            f"time on {gpus} GPUs of {tflops:g} TFLOP/s at {ASSUMED_UTILISATION:.0%}": duration(
                found.flops / (gpus * tflops * 1e12 * ASSUMED_UTILISATION)
            ),
        }
        for name, value in told.items():
            rows.setdefault(name, []).append(value)
    for name, values in rows.items():
        shown.add_row(name, *values)
    return shown


def _stage_table(title: str, stages: list[tuple[StageConfig, Preview]]) -> Table:
    shown = Table("", *(stage.stage for stage, _ in stages), title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in shown.columns[1:]:
        column.justify = "right"
    return shown


def _memory_table(stages: list[tuple[StageConfig, Preview]], gigabytes: float) -> Table:
    parts = [found.memory for _, found in stages]
    shown = _stage_table("memory of one GPU, GB", stages)
    for name in ("weights", "gradients", "optimizer", "activations", "logits"):
        shown.add_row(name, *(f"{getattr(part, name) / 1e9:.1f}" for part in parts))
    fits = [part.total / 1e9 <= gigabytes for part in parts]
    verdicts = [
        f"[{'green' if fit else 'red'}]{part.total / 1e9:.1f} of {gigabytes:g}[/]"
        for part, fit in zip(parts, fits, strict=True)
    ]
    shown.add_row("[bold]in all[/]", *verdicts)
    return shown


def main(arguments: list[str] | None = None) -> None:
    """From the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("captions", "caption-images", "instructions", "instruction-images", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--llm", default=Recipe.llm)
    parser.add_argument("--vision", default=Recipe.vision)
    parser.add_argument("--method", choices=("uniform", "quantile"), default=Recipe.method)
    parser.add_argument("--only", choices=STEPS)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--gpus", type=int, default=8, help="that the dry run reckons with")
    parser.add_argument("--gigabytes", type=float, default=80, help="memory of each")
    parser.add_argument("--tflops", type=float, default=989, help="bf16 TFLOP/s of each; 989: H100, H200")
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
