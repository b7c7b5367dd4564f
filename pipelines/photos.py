"""The whole job on photographs: score and level Flickr8k, pretrain on it, finetune on DAQUAR, ask about its test set.

python -m pipelines.photos --data FOLDER --out RUN

Small on purpose: two CPU cores do it in a quarter of an hour. FOLDER holds `flickr8k/` (webdataset tars and
`captions.csv`), `daquar/` (LLaVA-format JSON) and `flickr-clip/` (an open_clip config and its weights). The LLM is a
Llama of a few layers that is first taught English, if that is the word, by the captions and questions of the training
sets; its eyes are those of the encoder that scored the data.
"""

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
from aligntrain import StageConfig
from aligntrain.model.build import build_model, build_processor
from aligntrain.tools.convert.open_clip_tower import vision_tower_from_open_clip
from aligntrain.tools.evaluate import Accuracy, HeldOutLoss, answer_accuracy, held_out_loss, questions_of
from aligntrain.tools.generate import load
from pipelines.language_model import Text, fit, make_llama, make_tokenizer, pad, save
from pipelines.stage import run_stage

INSTRUCTION = "Answer the question using a single word or phrase."
FILES = ("flickr8k/captions.csv", "daquar/llava_train.json", "daquar/llava_test.json", "flickr-clip/flickr-clip.json")

console = Console(highlight=False)


@dataclass(frozen=True)
class Size:
    """How much is done. The defaults are for a quarter of an hour on two cores."""

    pairs: int | None = None  # of Flickr8k's training pairs that are scored; None: all
    held_out: int | None = None  # of its development pairs
    conversations: int | None = None  # of DAQUAR's training conversations
    questions: int | None = None  # of DAQUAR's test questions
    width: int = 192
    layers: int = 4
    vocabulary: int = 4_000
    language_steps: int = 500
    epochs: tuple[int, int] = (1, 3)  # of pretraining and of finetuning
    batch_sizes: tuple[int, int] = (64, 16)


SMALL = Size(
    pairs=256, held_out=64, conversations=24, questions=40, width=64, layers=2, vocabulary=800, language_steps=60,
    epochs=(2, 4), batch_sizes=(16, 4),
)  # fmt: skip


@dataclass(frozen=True)
class Report:
    """What came of it: held-out losses before and after each stage, and the answers to the test questions."""

    pretrain: tuple[HeldOutLoss, HeldOutLoss]
    finetune: tuple[HeldOutLoss, HeldOutLoss]
    answers: Accuracy
    seconds: dict[str, float]


def run(data: Path, out: Path, size: Size | None = None, *, quiet: bool = False) -> Report:
    """Do it all below `out`; `report.json` there says what came of it.

    Raises UserError where the data is not what the module's text says.
    """
    size = size or Size()
    for name in FILES:
        if not (data / name).is_file():
            raise UserError(f"{data / name}: there is no such file; --data needs flickr8k/, daquar/ and flickr-clip/.")
    console.quiet = quiet
    clock = _Clock()
    llm, vision = str(out / "llm"), str(out / "vision")
    clip = {"model_config": data / "flickr-clip/flickr-clip.json", "pretrained": data / "flickr-clip/flickr-clip.safetensors"}  # fmt: skip  # noqa: E501

    clock.step("Score Flickr8k's training and development pairs, and cut the scores into eight levels")
    tars = {"train": sorted((data / "flickr8k").glob("train-*.tar")), "dev": [data / "flickr8k/dev-00000.tar"]}
    limits = {"train": size.pairs, "dev": size.held_out}
    for split, files in tars.items():
        aligncurate.score(files, out / f"scored-{split}", limit=limits[split], quiet=quiet, **_named(clip))
    levelled = aligncurate.bucket(out / "scored-train", out / "levelled-train", levels=8, quiet=quiet)
    aligncurate.bucket(out / "scored-dev", out / "levelled-dev", thresholds=out / "levelled-train", quiet=quiet)
    console.print(render(aligncurate.inspect(levelled, examples=1)))

    clock.step("Teach a small LLM the language of the captions and questions")
    _language_model(data, Path(llm), size)
    eyes = encoders.load(**_named(clip))
    vision_tower_from_open_clip(eyes.towers.model.visual, eyes.preprocess.mean, eyes.preprocess.std, Path(vision))

    clock.step("Pretrain: projector and level embeddings")
    first = StageConfig.pretrain(
        data=[out / "levelled-train"], out=out / "pretrained", llm=llm, vision=vision, epochs=size.epochs[0],
        batch_size=size.batch_sizes[0], dtype="fp32", max_length=256, token_budget=2048, learning_rate=2e-3,
        log_every=20,
    )  # fmt: skip
    held = first.replace(data=(str(out / "levelled-dev"),))
    before = _loss_at_start(held)
    run_stage(first)
    pretrain = before, held_out_loss(*load(out / "pretrained"), held)

    clock.step("Finetune: projector, gate and LLM")
    tuning = _conversations(data / "daquar/llava_train.json", out / "daquar-train.json", size.conversations)
    second = StageConfig.finetune(
        data=[tuning], image_root=data / "daquar", out=out / "finetuned", init=out / "pretrained", template="chat",
        epochs=size.epochs[1], batch_size=size.batch_sizes[1], dtype="fp32", max_length=1024, token_budget=2048,
        learning_rate=1e-3, log_every=20,
    )  # fmt: skip
    asked = None if size.conversations is None else 2 * size.conversations
    testing = _conversations(data / "daquar/llava_test.json", out / "daquar-test.json", asked)
    held = second.replace(data=(str(testing),))
    before = _loss_at_start(held)
    run_stage(second)
    model, processor = load(out / "finetuned")
    finetune = before, held_out_loss(model, processor, held)

    clock.step("Ask DAQUAR's test questions")
    options = aligncurate.SourceOptions(image_root=str(data / "daquar"))
    known = [turn["value"] for row in json.loads(tuning.read_text()) for turn in row["conversations"][1::2]]
    answers = answer_accuracy(
        model, processor, questions_of([testing], options), known, instruction=INSTRUCTION, limit=size.questions,
        quiet=quiet,
    )  # fmt: skip
    report = Report(pretrain, finetune, answers, clock.seconds())
    (out / "report.json").write_text(json.dumps(_told(report), indent=1))
    console.print(table(report))
    return report


def table(report: Report) -> Table:
    """The report for people."""
    shown = Table(title="What came of it", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for head in ("held-out", "before", "after"):
        shown.add_column(head, justify="left" if head == "held-out" else "right")
    for stage, (before, after) in (("pretrain", report.pretrain), ("finetune", report.finetune)):
        shown.add_row(f"{stage} loss", f"{before.loss:.3f}", f"[bold]{after.loss:.3f}[/]")
        for level in (min(after.by_level), max(after.by_level)) if after.by_level else ():
            shown.add_row(f"  level {level}", f"{before.by_level[level]:.3f}", f"{after.by_level[level]:.3f}")
    answers = report.answers
    shown.add_row(f"always “{answers.usual}”", "", f"{answers.baseline:.1%}")
    shown.add_row(f"right of {answers.questions:,} answers", "", f"[bold]{answers.accuracy:.1%}[/]")
    shown.add_row("time", "", duration(sum(report.seconds.values())))
    return shown


def _told(report: Report) -> dict[str, Any]:
    found = asdict(report)
    found["answers"]["examples"] = report.answers.examples[:200]
    return {**found, "accuracy": report.answers.accuracy, "baseline": report.answers.baseline}


def _named(clip: dict[str, Path]) -> dict[str, Any]:
    return {name: str(path) for name, path in clip.items()}


def _loss_at_start(config: StageConfig) -> HeldOutLoss:
    processor = build_processor(config)
    model, _ = build_model(config, processor)
    return held_out_loss(model, processor, config)


def _conversations(file: Path, copy: Path, count: int | None) -> Path:
    """The first so many of them, in a file of the run."""
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

    fit([model], loss_of_step, steps=size.language_steps, learning_rate=2e-3)
    save(model, tokenizer, folder)


def _captions(folder: Path) -> Iterator[str]:
    """All five captions of every training photo, each a line."""
    training = {line.strip() for line in (folder / "Flickr_8k.trainImages.txt").read_text().splitlines()}
    with (folder / "captions.csv").open(newline="") as lines:
        yield from (row["caption"] + "\n" for row in csv.DictReader(lines) if row["image"] in training)


def _dialogues(file: Path) -> Iterator[str]:
    """Questions and answers of the training conversations, one at a time."""
    for row in json.loads(file.read_text()):
        turns = [turn["value"].replace("<image>\n", "") for turn in row["conversations"]]
        yield from (f"USER: {q} ASSISTANT: {a}</s>" for q, a in zip(turns[::2], turns[1::2], strict=False))


class _Clock:
    """Announces the steps and knows how long each took."""

    def __init__(self) -> None:
        self._begun: list[tuple[str, float]] = []

    def step(self, text: str) -> None:
        self._begun.append((text, time.perf_counter()))
        console.print(f"\n[bold cyan]{len(self._begun)}[/] [bold]{text}[/]")

    def seconds(self) -> dict[str, float]:
        ends = [begun for _, begun in self._begun[1:]] + [time.perf_counter()]
        return {text: round(end - begun, 1) for (text, begun), end in zip(self._begun, ends, strict=True)}


def main() -> None:
    """From the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--small", action="store_true", help="a minute's worth, to see that everything runs")
    arguments = parser.parse_args()
    try:
        run(arguments.data, arguments.out, SMALL if arguments.small else None)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
