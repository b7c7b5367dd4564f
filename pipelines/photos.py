"""A complete run on photos: score and level Flickr8k, pretrain on it, finetune on DAQUAR, evaluate on its test set.

    python -m pipelines.photos --help
    python -m pipelines.photos --data FOLDER --out RUN

It is small: a quarter of an hour on two CPU cores. FOLDER contains `flickr8k/` (webdataset tars and `captions.csv`),
`daquar/` (LLaVA-format JSON) and `flickr-clip/` (an open_clip config and its weights). The LLM is a Llama of a few
layers, first trained from scratch on the captions and questions of the training sets; the vision tower is that of the
encoder that scored the data.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import aligncurate
from aligncurate.cli.render import render
from aligncurate.encoders import load as encoders
from aligncurate.errors import UserError
from aligncurate.progress import duration
from aligntrain import StageConfig, train
from aligntrain.tools.convert.open_clip_tower import vision_tower_from_open_clip
from aligntrain.tools.evaluate import Accuracy, HeldOutLoss, answer_accuracy, held_out_loss, questions_of
from aligntrain.tools.generate import load
from aligntrain.training.build import build_model, build_processor
from pipelines.language_model import Text, make_llama, make_tokenizer, optimize, pad, save

INSTRUCTION = "Answer the question using a single word or phrase."
FILES = ("flickr8k/captions.csv", "daquar/llava_train.json", "daquar/llava_test.json", "flickr-clip/flickr-clip.json")

console = Console(highlight=False)


@dataclass(frozen=True)
class Size:
    """Size of the run. The defaults take a quarter of an hour on two CPU cores."""

    pairs: int | None = None  # training pairs of Flickr8k; None for all
    held_out: int | None = None  # development pairs of Flickr8k
    conversations: int | None = None  # training conversations of DAQUAR
    questions: int | None = None  # test questions of DAQUAR
    width: int = 192
    layers: int = 4
    vocabulary: int = 4_000
    language_steps: int = 500
    epochs: tuple[int, int] = (1, 3)  # pretraining, finetuning
    batch_sizes: tuple[int, int] = (64, 16)


SMALL = Size(
    pairs=256, held_out=64, conversations=24, questions=40, width=64, layers=2, vocabulary=800, language_steps=60,
    epochs=(2, 4), batch_sizes=(16, 4),
)  # fmt: skip


@dataclass(frozen=True)
class Results:
    """Held-out losses before and after each stage, and the accuracy on the test questions."""

    pretrain: tuple[HeldOutLoss, HeldOutLoss]
    finetune: tuple[HeldOutLoss, HeldOutLoss]
    answers: Accuracy
    seconds: dict[str, float]


def run(data: Path, out: Path, size: Size | None = None, *, quiet: bool = False) -> Results:
    """Run everything in folder `out`; the results are written to `report.json` there.

    Raises UserError if a file is missing in `data`.
    """
    size = size or Size()
    for name in FILES:
        if not (data / name).is_file():
            raise UserError(f"{data / name}: no such file; --data must contain flickr8k/, daquar/ and flickr-clip/.")
    console.quiet = quiet
    steps = _Steps()
    llm, vision = str(out / "llm"), str(out / "vision")
    clip = {"model_config": data / "flickr-clip/flickr-clip.json", "pretrained": data / "flickr-clip/flickr-clip.safetensors"}  # fmt: skip  # noqa: E501

    steps.step("Score Flickr8k's training and development pairs, and cut the scores into eight levels")
    tars = {"train": sorted((data / "flickr8k").glob("train-*.tar")), "dev": [data / "flickr8k/dev-00000.tar"]}
    limits = {"train": size.pairs, "dev": size.held_out}
    for split, files in tars.items():
        aligncurate.score(files, out / f"scored-{split}", limit=limits[split], quiet=quiet, **_as_strings(clip))
    levelled = aligncurate.bucket(out / "scored-train", out / "levelled-train", levels=8, quiet=quiet)
    aligncurate.bucket(out / "scored-dev", out / "levelled-dev", thresholds=out / "levelled-train", quiet=quiet)
    console.print(render(aligncurate.inspect(levelled, examples=1)))

    steps.step("Train a small LLM on the captions and questions")
    _language_model(data, Path(llm), size)
    encoder = encoders.load(**_as_strings(clip))
    vision_tower_from_open_clip(
        encoder.towers.model.visual, encoder.preprocess.mean, encoder.preprocess.std, Path(vision)
    )

    steps.step("Pretrain: projector and level embeddings")
    first = StageConfig.pretrain(
        data=[out / "levelled-train"], out=out / "pretrained", llm=llm, vision=vision, epochs=size.epochs[0],
        batch_size=size.batch_sizes[0], dtype="fp32", max_length=256, token_budget=2048, learning_rate=2e-3,
        log_every=20,
    )  # fmt: skip
    held = first.replace(data=(str(out / "levelled-dev"),))
    before = _loss_at_start(held)
    train(first).raise_if_stopped()
    pretrain = before, held_out_loss(*load(out / "pretrained"), held)

    steps.step("Finetune: projector, gate and LLM")
    tuning = _conversations(data / "daquar/llava_train.json", out / "daquar-train.json", size.conversations)
    second = StageConfig.finetune(
        data=[tuning], image_root=data / "daquar", out=out / "finetuned", init=out / "pretrained", template="chat",
        epochs=size.epochs[1], batch_size=size.batch_sizes[1], dtype="fp32", max_length=1024, token_budget=2048,
        learning_rate=1e-3, log_every=20,
    )  # fmt: skip
    limit = None if size.conversations is None else 2 * size.conversations
    testing = _conversations(data / "daquar/llava_test.json", out / "daquar-test.json", limit)
    held = second.replace(data=(str(testing),))
    before = _loss_at_start(held)
    train(second).raise_if_stopped()
    model, processor = load(out / "finetuned")
    finetune = before, held_out_loss(model, processor, held)

    steps.step("Ask DAQUAR's test questions")
    options = aligncurate.SourceOptions(image_root=str(data / "daquar"))
    known = [turn["value"] for row in json.loads(tuning.read_text()) for turn in row["conversations"][1::2]]
    answers = answer_accuracy(
        model, processor, questions_of([testing], options), known, instruction=INSTRUCTION, limit=size.questions,
        quiet=quiet,
    )  # fmt: skip
    results = Results(pretrain, finetune, answers, steps.seconds())
    (out / "report.json").write_text(json.dumps(_as_json(results), indent=1))
    console.print(table(results))
    return results


def table(results: Results) -> Table:
    """The results as a table to print."""
    rows = Table(title="Results", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for head in ("held-out", "before", "after"):
        rows.add_column(head, justify="left" if head == "held-out" else "right")
    for stage, (before, after) in (("pretrain", results.pretrain), ("finetune", results.finetune)):
        rows.add_row(f"{stage} loss", f"{before.loss:.3f}", f"[bold]{after.loss:.3f}[/]")
        for level in (min(after.by_level), max(after.by_level)) if after.by_level else ():
            rows.add_row(f"  level {level}", f"{before.by_level[level]:.3f}", f"{after.by_level[level]:.3f}")
    answers = results.answers
    rows.add_row(f"always “{answers.usual}”", "", f"{answers.baseline:.1%}")
    rows.add_row(f"correct of {answers.questions:,} answers", "", f"[bold]{answers.accuracy:.1%}[/]")
    rows.add_row("time", "", duration(sum(results.seconds.values())))
    return rows


def _as_json(results: Results) -> dict[str, Any]:
    record = asdict(results)
    record["answers"]["examples"] = results.answers.examples[:200]
    return {**record, "accuracy": results.answers.accuracy, "baseline": results.answers.baseline}


def _as_strings(clip: dict[str, Path]) -> dict[str, Any]:
    return {name: str(path) for name, path in clip.items()}


def _loss_at_start(config: StageConfig) -> HeldOutLoss:
    processor = build_processor(config)
    model, _ = build_model(config, processor)
    return held_out_loss(model, processor, config)


def _conversations(file: Path, copy: Path, count: int | None) -> Path:
    """Copy the first `count` conversations to `copy`, a file of the run."""
    copy.write_text(json.dumps(json.loads(file.read_text())[:count]))
    return copy


def _language_model(data: Path, folder: Path, size: Size) -> None:
    torch.manual_seed(0)
    captions, dialogues = list(_captions(data / "flickr8k")), list(_dialogues(data / "daquar/llava_train.json"))
    tokenizer = make_tokenizer([*captions, *dialogues], size.vocabulary)
    model = make_llama(tokenizer, size.width, size.layers)
    texts = captions + dialogues
    rng = random.Random(0)

    def loss_of_step(_: int) -> Tensor:
        ids = [tokenizer(text).input_ids for text in rng.choices(texts, k=64)]
        batch = pad([Text(i, [False] + [True] * (len(i) - 1)) for i in ids], tokenizer.eos_token_id)
        return model(**batch).loss

    optimize([model], loss_of_step, steps=size.language_steps, learning_rate=2e-3)
    save(model, tokenizer, folder)


def _captions(folder: Path) -> Iterator[str]:
    """All five captions of every training photo, one per line."""
    training = {line.strip() for line in (folder / "Flickr_8k.trainImages.txt").read_text().splitlines()}
    with (folder / "captions.csv").open(newline="") as lines:
        yield from (row["caption"] + "\n" for row in csv.DictReader(lines) if row["image"] in training)


def _dialogues(file: Path) -> Iterator[str]:
    """The questions and answers of the training conversations, a text each."""
    for row in json.loads(file.read_text()):
        turns = [turn["value"].replace("<image>\n", "") for turn in row["conversations"]]
        yield from (f"USER: {q} ASSISTANT: {a}</s>" for q, a in zip(turns[::2], turns[1::2], strict=False))


class _Steps:
    """Prints a heading for each step and measures how long it takes."""

    def __init__(self) -> None:
        self._started: list[tuple[str, float]] = []

    def step(self, text: str) -> None:
        self._started.append((text, time.perf_counter()))
        console.print(f"\n[bold cyan]{len(self._started)}[/] [bold]{text}[/]")

    def seconds(self) -> dict[str, float]:
        ends = [start for _, start in self._started[1:]] + [time.perf_counter()]
        return {text: round(end - start, 1) for (text, start), end in zip(self._started, ends, strict=True)}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with flickr8k/, daquar/ and flickr-clip/")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--small", action="store_true", help="a run of about a minute, to check that everything works")
    arguments = parser.parse_args()
    try:
        run(arguments.data, arguments.out, SMALL if arguments.small else None)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
