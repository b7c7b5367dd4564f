"""The index of a stage: tokens, level and image location of every sample.

An Arrow file, memory-mapped so that ranks share it, and a JSON file with statistics and a fingerprint of the inputs.
`aligntrain.data.indexing` writes both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from aligncurate.dataset.pointers import POINTER_COLUMNS, Pointer
from aligntrain.data.sealed import check_files, read_sealed
from aligntrain.inputs.processor import AlignGPTProcessor, Encoded
from aligntrain.model.loss import IGNORE

SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "source": pa.string(),
        "image_path": pa.string(),  # null for a sample without an image
        "image_offset": pa.int64(),
        "image_length": pa.int64(),
        "row": pa.int64(),
        "sha256": pa.binary(32),  # of the image, if known; checked when the image is read
        "level": pa.int8(),  # 0 without level
        "length": pa.int32(),
        "tokens": pa.list_(pa.int32()),  # the image's placeholders folded into one
        "answers": pa.list_(pa.int32()),  # start, end, start, end, … of the supervised tokens, in folded positions
    }
)


_CAUSES = 50  # that are counted apart; the names of roles could make any number of them


@dataclass
class Facts:
    """Statistics of the data: samples in the index, and rows that were skipped.

    Attributes:
        rows: samples in the index.
        images: samples with an image.
        tokens: tokens of all samples.
        supervised: tokens with a label.
        truncated: samples truncated at max_length.
        moved_system: samples whose system turn became the start of the first question, for lack of a place for it.
        levels: samples by level, 0 without level.
        skipped: number of skipped rows by cause.
        examples: key of the first skipped row by cause.
    """

    rows: int = 0
    images: int = 0
    tokens: int = 0
    supervised: int = 0
    truncated: int = 0
    moved_system: int = 0
    levels: Counter[int] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def skip(self, cause: str, key: str) -> None:
        cause = cause if cause in self.skipped or len(self.skipped) < _CAUSES else "other causes"
        self.skipped[cause] += 1
        self.examples.setdefault(cause, key)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "levels": {str(k): n for k, n in sorted(self.levels.items())}}

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> Facts:
        counts = Counter({int(k): n for k, n in facts["levels"].items()})
        return cls(**{**facts, "levels": counts, "skipped": Counter(facts["skipped"])})


class Index:
    """Random access to the samples of one stage.

    Attributes:
        facts: statistics of the data.
        digest: of keys, tokens, levels and images in order; identifies the data in checkpoints.
        lengths, levels, images: int64 [samples]; level 0 without level, images 0 or 1.

    Raises DamagedError if the file is damaged; `check` compares all of it with its sha256.
    """

    def __init__(self, file: Path, processor: AlignGPTProcessor, *, check: bool = False) -> None:
        stored = read_sealed(facts_file(file))
        if check:
            check_files(file.parent, stored["files"])
        self.facts, self.digest = Facts.from_json(stored["facts"]), str(stored["digest"])
        reader = pa.ipc.open_file(pa.memory_map(str(file)))
        self._batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        self._ends = np.cumsum([batch.num_rows for batch in self._batches])
        table = pa.Table.from_batches(self._batches, reader.schema)
        self._image_id, self._patches = processor.image_token_id, processor.num_patches
        self.lengths: NDArray[np.int64] = table["length"].to_numpy().astype(np.int64)
        self.levels: NDArray[np.int64] = table["level"].to_numpy().astype(np.int64)
        self.images: NDArray[np.int64] = table["image_path"].is_valid().to_numpy().astype(np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def key(self, number: int) -> str:
        """The sample's key in the data."""
        batch, row = self._at(number)
        return str(batch["key"][row].as_py())

    def encoded(self, number: int) -> Encoded:
        """The sample as token ids and labels, placeholders expanded."""
        batch, row = self._at(number)
        ids = batch["tokens"][row].values.to_pylist()
        ends = batch["answers"][row].values.to_pylist()
        labels = [IGNORE] * len(ids)
        for start, end in zip(ends[::2], ends[1::2], strict=True):
            labels[start:end] = ids[start:end]
        first = ends[0]
        if self._image_id in ids:
            at = ids.index(self._image_id)
            ids[at : at + 1] = [self._image_id] * self._patches
            labels[at : at + 1] = [IGNORE] * self._patches
            first += self._patches - 1 if first > at else 0
        return Encoded(ids, labels, first)

    def image(self, number: int) -> bytes | None:
        """The original bytes of the sample's image, None without image. Raises OSError when they cannot be read."""
        batch, row = self._at(number)
        pointer = Pointer.of({name: batch[name][row].as_py() for name in POINTER_COLUMNS})
        return pointer.read(needs_sha256=False) if pointer else None  # the index is ours

    def _at(self, number: int) -> tuple[pa.RecordBatch, int]:
        """The batch with a sample, and its row there; a slice of the table would look through all batches."""
        batch = int(np.searchsorted(self._ends, number, side="right"))
        return self._batches[batch], number - (int(self._ends[batch - 1]) if batch else 0)


def facts_file(file: Path) -> Path:
    """The JSON file beside an index, written last: the facts and what the index was made from."""
    return file.with_suffix(".json")
