"""Evaluate a model on held-out data: its loss, and the accuracy of its answers."""

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
from aligncurate.progress import meter, notice
from aligncurate.sources.detect import open_source
from aligncurate.sources.marks import IMAGE
from aligncurate.sources.options import SourceOptions
from aligntrain.data.indexing import build_index, open_data
from aligntrain.data.reader import BatchReader, read_ahead
from aligntrain.data.schedule import plan_epoch
from aligntrain.inputs.processor import AlignGPTProcessor
from aligntrain.model.modeling import AlignGPTForConditionalGeneration
from aligntrain.model.packing import can_pack
from aligntrain.stage import StageConfig


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean cross-entropy of supervised tokens.

    Attributes:
        loss: over all samples.
        by_level: over the samples of each level, if the data has levels.
        tokens: number of supervised tokens.
    """

    loss: float
    by_level: dict[int, float]
    tokens: int


@torch.inference_mode()
def held_out_loss(
    model: AlignGPTForConditionalGeneration, processor: AlignGPTProcessor, config: StageConfig
) -> HeldOutLoss:
    """Compute the loss on ``config.data``, as training on it would at its first step.

    Args:
        model, processor: from training or ``generate.load``.
        config: the stage's settings, with the held-out data as ``data``.

    Raises:
        UserError: the data cannot be used, as in ``train``.
    """
    levels = model.config.num_levels if model.config.align_mode != "none" else 0
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with tempfile.TemporaryDirectory() as folder:
        index = build_index(open_data(config), config, processor, levels, Path(folder) / "index.arrow")
        packed = config.packing == "on" or (config.packing == "auto" and can_pack(model.language_model))
        everything = config.replace(level_weights=None, stratified=False)
        epoch = plan_epoch(everything, index, 0, packed=packed, world_size=1)
        reader = BatchReader(index, processor, packed=packed, with_levels=config.stage == "pretrain" and levels > 0)
        sums = torch.zeros(int(index.levels.max()) + 1, 2, dtype=torch.float64)
        steps = (epoch[number].ranks[0] for number in range(len(epoch)))
        half = torch.autocast(model.device.type, torch.bfloat16, enabled=config.dtype == "bf16")  # as in training
        for step in read_ahead(steps, reader, workers=config.workers, ahead=config.prefetch):
            for micro in step:
                with half:
                    output = model(**micro.to(model.device).inputs)
                losses_M = output.token_losses.double().cpu()
                sums.index_add_(0, micro.token_levels, torch.stack([losses_M, torch.ones_like(losses_M)], 1))
    for module, was_training in modes:
        module.training = was_training
    by_level = {level: float(total / count) for level, (total, count) in enumerate(sums) if level and count}
    total, count = sums.sum(0).tolist()
    return HeldOutLoss(total / max(count, 1), by_level, int(count))


@dataclass(frozen=True)
class Question:
    """A question about an image, with the reference answer."""

    key: str
    image: Image.Image
    text: str
    answer: str


def questions_of(data: Sequence[str | Path], options: SourceOptions | None = None) -> Iterator[Question]:
    """Iterate over the questions in conversations about images; rows without a usable image are skipped.

    Raises:
        UserError: the data cannot be read.
    """
    source = open_source([str(item) for item in data], options)
    for text in source.notices:
        notice(text)
    for shard in source.shards:
        for pair in source.read(shard):
            if pair.load is None or pair.conversations is None or pair.status not in FINE:
                continue
            try:
                image = load_rgb(pair.load())
            except (OSError, ImageError):
                continue
            turns = [(turn["role"], turn["text"].replace(IMAGE, "").strip()) for turn in pair.conversations]
            for (role, text), (next_role, answer) in pairwise(turns):
                if role == "user" and next_role == "assistant":
                    yield Question(pair.key, image, text, answer)


@dataclass(frozen=True)
class Accuracy:
    """How many answers equal the reference, ignoring case and a final full stop.

    Attributes:
        questions: number of questions asked.
        right: number of correct answers.
        usual: the most frequent answer in other data, for the baseline.
        usual_right: number of questions to which it is the correct answer.
        examples: (question, the model's answer, reference) of each question.
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
        """Accuracy of always giving the most frequent answer."""
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
    """Ask each question on its own, decode greedily, and compare with the reference answers.

    Args:
        model, processor: from ``generate.load``.
        questions: the questions to ask.
        known: answers in the training data; the most frequent one is the baseline.
        instruction: appended to questions that do not end with it, such as "Answer with one word."
        batch_size: questions per batch.
        max_new_tokens: length limit of an answer.
        limit: ask at most N questions.
        quiet: show no progress.
    """
    usual = Counter(map(_plain, known)).most_common(1)[0][0]
    right = usual_right = asked = 0
    examples: list[tuple[str, str, str]] = []
    with meter("asking", None, unit="questions", quiet=quiet) as progress:
        remaining = islice(questions, limit)
        while batch := list(islice(remaining, batch_size)):
            texts = [_with(question.text, instruction) for question in batch]
            answers = _answers(model, processor, texts, [question.image for question in batch], max_new_tokens)
            for question, text in zip(batch, answers, strict=True):
                right += _plain(text) == _plain(question.answer)
                usual_right += usual == _plain(question.answer)
                examples.append((question.text, text, question.answer))
            asked += len(batch)
            progress.add(len(batch), len(batch), 0)
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
