"""How good a model is on data that it did not learn from: its loss, and how often it answers as people did."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import torch
from PIL import Image

from aligncurate.dataset.record import FINE
from aligncurate.errors import ImageError
from aligncurate.images.decode import load_rgb
from aligncurate.progress import meter
from aligncurate.sources import SourceOptions, open_source
from aligncurate.sources.conversations import IMAGE
from aligntrain.data.index import build_index
from aligntrain.data.reader import Reader, read_ahead
from aligntrain.inputs.processor import AlignGPTProcessor
from aligntrain.model.modeling import AlignGPTForConditionalGeneration
from aligntrain.model.packing import can_pack
from aligntrain.stage import StageConfig
from aligntrain.training.loop import plan_epoch


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean cross-entropy of the supervised tokens of some data.

    Attributes:
        loss: over all tokens.
        by_level: over those of samples of each level, where the data has levels.
        tokens: how many were supervised.
    """

    loss: float
    by_level: dict[int, float]
    tokens: int


@torch.inference_mode()
def held_out_loss(
    model: AlignGPTForConditionalGeneration, processor: AlignGPTProcessor, config: StageConfig
) -> HeldOutLoss:
    """The loss that training on ``config.data`` would begin with; nothing is learned.

    Args:
        model, processor: as training or ``generate.load`` gives them.
        config: the stage's settings, its ``data`` the held-out data.

    Raises UserError as ``train``.
    """
    levels = model.config.num_levels if model.config.align_mode != "none" else 0
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with tempfile.TemporaryDirectory() as folder:
        index = build_index(config, processor, levels, Path(folder) / "index.arrow")
        packed = config.packing == "on" or (config.packing == "auto" and can_pack(model.language_model))
        everything = config.replace(level_weights=None, stratified=False)
        epoch = plan_epoch(everything, index, 0, packed=packed, world_size=1)
        reader = Reader(index, processor, packed=packed, with_levels=config.stage == "pretrain" and levels > 0)
        sums = torch.zeros(int(index.levels.max()) + 1, 2, dtype=torch.float64)
        steps = (epoch[number].ranks[0] for number in range(len(epoch)))
        for step in read_ahead(steps, reader, workers=config.workers, ahead=config.prefetch):
            for micro in step:
                losses_M = model(**micro.to(model.device).inputs).token_losses.double().cpu()
                sums.index_add_(0, micro.token_levels, torch.stack([losses_M, torch.ones_like(losses_M)], 1))
    for module, was_training in modes:
        module.training = was_training
    by_level = {level: float(total / count) for level, (total, count) in enumerate(sums) if level and count}
    total, count = sums.sum(0).tolist()
    return HeldOutLoss(total / max(count, 1), by_level, int(count))


@dataclass(frozen=True)
class Question:
    """One question about a picture, and what people answered."""

    key: str
    image: Image.Image
    text: str
    answer: str


def questions_of(data: Sequence[str | Path], options: SourceOptions | None = None) -> Iterator[Question]:
    """Every question of conversations about pictures, each alone; rows without a usable picture are passed over.

    Raises UserError when the data cannot be read.
    """
    source = open_source([str(item) for item in data], options)
    for shard in source.shards:
        for pair in source.read(shard):
            if pair.load is None or pair.conversations is None or pair.status not in FINE:
                continue
            try:
                image = load_rgb(pair.load())
            except (OSError, ImageError):
                continue
            turns = [(turn["role"], turn["text"].replace(IMAGE, "").strip()) for turn in pair.conversations]
            for (role, text), (other, answer) in pairwise(turns):
                if role == "user" and other == "assistant":
                    yield Question(pair.key, image, text, answer)


@dataclass(frozen=True)
class Accuracy:
    """How many questions were answered just as people did, but for case and a full stop.

    Attributes:
        questions: that were asked.
        right: answered rightly.
        usual: the answer that is the most frequent one in other data, and ``usual_right`` how often it is right.
        examples: question, the model's answer and people's.
    """

    questions: int
    right: int
    usual: str
    usual_right: int
    examples: list[tuple[str, str, str]]

    @property
    def accuracy(self) -> float:
        return self.right / max(1, self.questions)

    @property
    def baseline(self) -> float:
        """Accuracy of always giving the usual answer."""
        return self.usual_right / max(1, self.questions)


@torch.inference_mode()
def answer_accuracy(
    model: AlignGPTForConditionalGeneration,
    processor: AlignGPTProcessor,
    questions: Iterable[Question],
    known: Iterable[str],
    *,
    instruction: str = "",
    batch_size: int = 64,
    max_new_tokens: int = 12,
    limit: int | None = None,
    quiet: bool = False,
) -> Accuracy:
    """Ask every question on its own, greedily, and compare with people's answers.

    Args:
        model, processor: as from ``generate.load``.
        questions: what to ask.
        known: answers in the training data; the most frequent is the baseline.
        instruction: put behind a question that does not end with it, such as "Answer with one word."
        batch_size: questions asked at once.
        max_new_tokens: after which an answer is cut.
        limit: only the first so many questions.
        quiet: show no progress.
    """
    usual = Counter(map(_plain, known)).most_common(1)[0][0]
    right = usual_right = asked = 0
    examples: list[tuple[str, str, str]] = []
    with meter("asking", None, unit="questions", quiet=quiet) as shown:
        waiting = islice(questions, limit)
        while batch := list(islice(waiting, batch_size)):
            texts = [_with(question.text, instruction) for question in batch]
            told = _answers(model, processor, texts, [question.image for question in batch], max_new_tokens)
            for question, text in zip(batch, told, strict=True):
                right += _plain(text) == _plain(question.answer)
                usual_right += usual == _plain(question.answer)
                examples.append((question.text, text, question.answer))
            asked += len(batch)
            shown.add(len(batch), len(batch), 0)
    return Accuracy(asked, right, usual, usual_right, examples)


def _answers(
    model: AlignGPTForConditionalGeneration,
    processor: AlignGPTProcessor,
    texts: Sequence[str],
    images: Sequence[Image.Image],
    max_new_tokens: int,
) -> list[str]:
    conversations = [[{"role": "user", "content": f"{IMAGE}\n{text}"}] for text in texts]
    inputs = processor.apply_chat_template(
        conversations, add_generation_prompt=True, tokenize=True, return_dict=True, images=list(images)
    )
    ids = model.generate(
        **{name: value.to(model.device) for name, value in inputs.items()},
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    new = ids[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.tokenizer.batch_decode(new, skip_special_tokens=True)]


def _with(text: str, instruction: str) -> str:
    return text if not instruction or text.endswith(instruction) else f"{text}\n{instruction}"


def _plain(answer: str) -> str:
    return answer.strip().lower().rstrip(".")
