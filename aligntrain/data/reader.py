"""Turns the packs of a plan into micro-batches; threads read and decode images ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from aligncurate.dataset.pointers import keep_row_groups
from aligncurate.errors import ImageError
from aligncurate.images.decode import load_rgb
from aligntrain.data.index import Index
from aligntrain.data.plan import Pack, row_length
from aligntrain.inputs.processor import AlignGPTProcessor, Encoded
from aligntrain.model.loss import IGNORE, supervised
from aligntrain.model.packing import sequence_ids_of

_KEPT_BYTES = 2 << 30  # of images in Parquet, which is read by row groups, however few of its images are needed


@dataclass(frozen=True)
class MicroBatch:
    """The input of one forward pass on one rank.

    Attributes:
        inputs: arguments of the model's forward.
        samples: their numbers in the index.
        token_samples: int64 [M], position in `samples` of every supervised token's sample.
        token_levels: int64 [M], level of every supervised token's sample, 0 without level.
        tokens: tokens of the samples, without padding.
        images: number of images that were read.
        unreadable: samples whose image could not be read; they get a blank image and no labels.
    """

    inputs: dict[str, Tensor]
    samples: Pack
    token_samples: Tensor
    token_levels: Tensor
    tokens: int = 0
    images: int = 0
    unreadable: tuple[int, ...] = ()

    def to(self, device: torch.device) -> MicroBatch:
        """The batch on another device; copies from pinned memory overlap with computation."""
        moved: dict[str, Any] = {name: value.to(device, non_blocking=True) for name, value in self.inputs.items()}
        levels, samples = (t.to(device, non_blocking=True) for t in (self.token_levels, self.token_samples))
        return MicroBatch(moved, self.samples, samples, levels, self.tokens, self.images, self.unreadable)


class BatchReader:
    """Turns a pack into a micro-batch: reads images, and pads or packs tokens.

    Args:
        index: the samples.
        processor: turns images into pixels, and pads.
        packed: put all samples into one row; otherwise each has its own.
        with_levels: include each image's level (pretraining).
        pin: use pinned memory, for fast copies to a GPU.
    """

    def __init__(
        self, index: Index, processor: AlignGPTProcessor, *, packed: bool, with_levels: bool, pin: bool = False
    ) -> None:
        self._index, self._processor = index, processor
        self._packed, self._with_levels, self._pin = packed, with_levels, pin
        self._reasons: dict[int, str] = {}
        keep_row_groups(_KEPT_BYTES)

    def __call__(self, pack: Pack) -> MicroBatch:
        """The pack as a micro-batch; an empty pack becomes one row of padding, which the model can compute."""
        if not pack:
            row = torch.full((1, row_length(1)), self._processor.tokenizer.pad_token_id)
            inputs = {"input_ids": row, "labels": torch.full_like(row, IGNORE)}
            inputs["sequence_ids" if self._packed else "attention_mask"] = torch.ones_like(row)
            nothing = torch.zeros(0, dtype=torch.long)
            return MicroBatch(inputs, (), nothing, nothing)
        encoded, pixels, unreadable = [], [], []
        for number in pack:
            sample = self._index.encoded(number)
            if self._index.images[number]:
                image = self._pixels(number)
                if image is None:
                    unreadable.append(number)
                    sample = Encoded(sample.input_ids, [IGNORE] * len(sample.labels), sample.gate_length)
                    image = torch.zeros(3, self._processor.pixel_size, self._processor.pixel_size)
                pixels.append(image)
            encoded.append(sample)
        inputs = self._rows(encoded)
        mask = supervised(inputs["labels"], inputs.get("sequence_ids"))
        owners = self._owners(encoded, inputs["labels"])
        if pixels:
            inputs["pixel_values"] = torch.stack(pixels)
            if self._with_levels:
                inputs["levels"] = torch.tensor([self._index.levels[i] for i in pack if self._index.images[i]])
        if self._pin:
            inputs = {name: value.pin_memory() for name, value in inputs.items()}
        token_samples = owners[:, 1:][mask]
        token_levels = torch.from_numpy(self._index.levels[list(pack)])[token_samples]
        tokens = sum(len(sample.input_ids) for sample in encoded)
        return MicroBatch(
            inputs, pack, token_samples, token_levels, tokens, len(pixels) - len(unreadable), tuple(unreadable)
        )

    def _rows(self, samples: Sequence[Encoded]) -> dict[str, Tensor]:
        if not self._packed:
            padded = self._processor.pad(samples)
            return {name: padded[name] for name in ("input_ids", "attention_mask", "labels")}
        lengths = [len(sample.input_ids) for sample in samples]
        length = row_length(sum(lengths))
        filler = [0] * (length - sum(lengths))
        pad_id = self._processor.tokenizer.pad_token_id
        ids = [i for sample in samples for i in sample.input_ids] + [pad_id for _ in filler]
        labels = [i for sample in samples for i in sample.labels] + [IGNORE for _ in filler]
        rows = {"input_ids": ids, "labels": labels, "sequence_ids": sequence_ids_of(lengths, length)}
        return {name: torch.tensor([row]) for name, row in rows.items()}

    def _owners(self, samples: Sequence[Encoded], labels: Tensor) -> Tensor:
        """int64, shaped like `labels`: the sample that every position belongs to."""
        if not self._packed:
            return torch.arange(len(samples))[:, None].expand_as(labels)
        owners = [n for n, sample in enumerate(samples) for _ in sample.input_ids]
        return torch.tensor([owners + [0] * (labels.shape[1] - len(owners))])

    def _pixels(self, number: int) -> Tensor | None:
        try:
            data = self._index.image(number)
            assert data is not None
            return self._processor.process_images([load_rgb(data)])[0]
        except (OSError, ImageError) as error:
            self._reasons[number] = f"{self._index.key(number)}: the image cannot be read ({error})"
            return None

    def reasons(self, step: Sequence[MicroBatch]) -> list[str]:
        """A sentence for every unreadable image of the step; each is returned once."""
        unreadable = (number for micro in step for number in micro.unreadable)
        return [self._reasons.pop(number) for number in unreadable if number in self._reasons]


def read_ahead(
    steps: Iterable[Sequence[Pack]], read: BatchReader, *, workers: int, ahead: int
) -> Generator[list[MicroBatch]]:
    """The micro-batches of each step, read by threads up to `ahead` steps in advance.

    The result does not depend on the number of threads.
    """
    waiting = iter(steps)
    due: deque[list[Future[MicroBatch]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="read")
    try:
        for packs in islice(waiting, ahead):
            due.append([pool.submit(read, pack) for pack in packs])
        while due:
            step = [future.result() for future in due.popleft()]
            for packs in islice(waiting, 1):
                due.append([pool.submit(read, pack) for pack in packs])
            yield step
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
