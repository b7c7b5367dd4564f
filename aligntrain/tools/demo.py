"""The second half of the demonstration: train AlignGPT in both stages on the curated scenes, and ask it questions.

The first half, from drawing scenes to exporting the best, is `aligncurate.demo.curation`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from aligncurate.demo import scenes
from aligncurate.demo.curation import SEED, announce, console
from aligncurate.errors import UserError
from aligntrain.stage import StageConfig
from aligntrain.tools.evaluate import Question, answer_accuracy
from aligntrain.tools.generate import load
from aligntrain.training.loop import train

FRESH = "fresh.png"
_FRESH_SCENES = 40
# Padded batches: a packed row costs attention over all of it, most of the work for models this small on a CPU.
_SMALL: dict[str, Any] = {
    "dtype": "fp32", "packing": "off", "batch_size": 64, "max_length": 512, "log_every": 30,
}  # fmt: skip


def train_and_ask(out: Path, *, count: int = 4_000, quiet: bool = False) -> None:
    """Train both stages on the datasets that `aligncurate.demo.curation.curate` wrote, then ask about fresh scenes.

    Raises UserError when training was interrupted; the demo starts over when run again.
    """
    announce(6, "Pretrain AlignGPT on all levels (aligncurate train pretrain … --llm tiny --vision tiny)")
    _train(pretraining(out))
    announce(7, f"Draw {count // 2:,} more scenes with questions, and finetune (aligncurate train finetune)")
    scenes.write_conversations(out / "questions", count // 2, SEED + 1)
    _train(finetuning(out))
    announce(8, "Ask about scenes that were not used in training (aligncurate generate, aligncurate chat)")
    _ask(out, quiet=quiet)


def _train(config: StageConfig) -> None:
    if train(config).stopped:
        raise UserError("interrupted; the demo starts over when it is run again.")


def pretraining(out: Path) -> StageConfig:
    """Stage 1 of the demo: trains the projector and level embeddings; the built-in LLM and tower stay frozen."""
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
    """Stage 2 of the demo: trains the LLM, the projector and the gate to answer questions."""
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
    """Ask about fresh scenes: print the answers for one of them, and the accuracy over all."""
    asked = []
    for number in range(_FRESH_SCENES):
        scene = scenes.make_scene(SEED + 2, number)
        image = scenes.draw(scene)
        short = [pair for pair in scenes.questions(scene) if len(pair[1].split()) <= 4]  # descriptions have many words
        asked += [Question(str(number), image, question, answer) for question, answer in short]
    known = (answer for number in range(500) for _, answer in scenes.questions(scenes.make_scene(SEED + 1, number)))
    result = answer_accuracy(*load(out / "finetuned"), asked, known, quiet=quiet)
    fresh = scenes.make_scene(SEED + 2, 0)
    scenes.draw(fresh, size=384).save(out / FRESH)
    table = Table("question", "answer", "", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    first = sum(question.key == "0" for question in asked)
    for question, reply, reference in result.examples[:first]:
        right = Text("right", "green") if reply == reference else Text(f"wrong: {reference}", "red")
        table.add_row(question, reply, right)
    console.print(f"{out / FRESH} shows: {scenes.describe(fresh)}", soft_wrap=True)
    console.print(table)
    console.print(
        f"Of {result.questions:,} questions about {_FRESH_SCENES} fresh scenes [bold]{result.accuracy:.0%}[/] "
        f"are answered correctly; always answering “{result.usual}” would get {result.baseline:.0%}.",
        markup=True,
        soft_wrap=True,
    )
