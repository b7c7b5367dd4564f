"""The samples of a stage, tokenised once: a file that says of each its tokens, its level and where its image lies.

One Arrow file, read through a memory map, so that ranks share it and hold no text; beside it a JSON file, written
last, which says what was left out and of what the index was made.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from aligncurate import __version__
from aligncurate.dataset.pointers import read_image
from aligncurate.dataset.record import FINE, Pair, Status
from aligncurate.errors import ShardError, UserError
from aligncurate.io import storage
from aligncurate.progress import meter
from aligncurate.sources.base import Source
from aligncurate.sources.curated import row_of
from aligncurate.sources.detect import open_source
from aligncurate.sources.options import SourceOptions
from aligntrain.inputs.processor import AlignGPTProcessor, Encoded
from aligntrain.model.loss import IGNORE
from aligntrain.stage import StageConfig

_SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "source": pa.string(),
        "image_path": pa.string(),  # null: a sample of text alone
        "image_offset": pa.int64(),
        "image_length": pa.int64(),
        "row": pa.int64(),
        "sha256": pa.binary(32),  # of the image, where the dataset knows it: it is compared when the image is read
        "level": pa.int8(),  # 0: none
        "length": pa.int32(),
        "tokens": pa.list_(pa.int32()),  # the image's placeholders as one
        "answers": pa.list_(pa.int32()),  # start, end, start, end, … of what is learned, placeholders as one
    }
)
_ROWS = 2_000  # of a record batch
_NAMING = ("key", "image_offset", "image_length", "row", "sha256", "level", "tokens", "answers")


@dataclass
class Facts:
    """What became of the rows of the data.

    Attributes:
        rows: samples in the index.
        images: of them with an image.
        tokens: in all of them.
        supervised: tokens that are learned.
        truncated: samples that were cut at max_length.
        levels: samples by level, 0 for none.
        skipped: rows left out, by cause.
        examples: the first key of each cause.
    """

    rows: int = 0
    images: int = 0
    tokens: int = 0
    supervised: int = 0
    truncated: int = 0
    levels: Counter[int] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def skip(self, cause: str, key: str) -> None:
        self.skipped[cause] += 1
        self.examples.setdefault(cause, key)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "levels": {str(k): n for k, n in sorted(self.levels.items())}}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Facts:
        counts = Counter({int(k): n for k, n in found["levels"].items()})
        return cls(**{**found, "levels": counts, "skipped": Counter(found["skipped"])})


class Index:
    """Random access to the samples of one stage.

    Attributes:
        facts: what became of the data's rows.
        digest: of the samples' keys, texts, levels and images, in order; names the data in checkpoints.
        lengths, levels, images: int64 [samples]; level 0 for none, images 0 or 1.
    """

    def __init__(self, file: Path, processor: AlignGPTProcessor) -> None:
        notes = json.loads(_notes(file).read_text("utf-8"))
        self.facts, self.digest = Facts.from_json(notes["facts"]), str(notes["digest"])
        self._table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        self._image_id, self._patches = processor.image_token_id, processor.num_patches
        self.lengths: NDArray[np.int64] = self._table["length"].to_numpy().astype(np.int64)
        self.levels: NDArray[np.int64] = self._table["level"].to_numpy().astype(np.int64)
        self.images: NDArray[np.int64] = self._table["image_path"].is_valid().to_numpy().astype(np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def key(self, number: int) -> str:
        """The sample's key in the data."""
        return str(self._table["key"][number].as_py())

    def encoded(self, number: int) -> Encoded:
        """The sample as token ids and labels."""
        row = self._table.slice(number, 1)
        ids = row["tokens"][0].as_py()
        ends = row["answers"][0].as_py()
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
        """The original bytes of the sample's image, None where it has none. Raises OSError when they are gone."""
        row = self._table.slice(number, 1).drop_columns(["tokens", "answers"]).to_pylist()[0]
        return read_image(row) if row["image_path"] is not None else None


def build_index(config: StageConfig, processor: AlignGPTProcessor, num_levels: int, file: Path) -> Index:
    """The index of the stage's data, made unless ``file`` is one already, of the same data and the same settings.

    Images are not read.

    Args:
        config: names the data and says how it is read.
        processor: tokenises.
        num_levels: N; 0 for a model without an alignment vector, whose pretraining needs no levels.
        file: where the index is kept, ``*.arrow``.

    Raises UserError: the data is empty, has no levels where they are needed or levels beyond N, or no usable row.
    """
    if not config.data:
        raise UserError("no data was given; name dataset folders, tars or another source.")
    names = ("format", "caption_column", "image_column", "image_root")
    options = SourceOptions(**{name: getattr(config, name) for name in names})
    source = open_source(list(config.data), options)
    made_of = _fingerprint(source, config, processor, num_levels)
    notes = _notes(file)
    if notes.is_file() and file.is_file() and json.loads(notes.read_text("utf-8"))["made_of"] == made_of:
        return Index(file, processor)
    notes.unlink(missing_ok=True)
    facts, digest = Facts(), hashlib.sha256()
    temporary = file.with_suffix(".arrow.tmp")
    try:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
            rows: list[dict[str, Any]] = []
            for row in _rows(source, config, processor, num_levels, facts):
                rows.append(row)
                digest.update(repr([row[name] for name in _NAMING]).encode())
                if len(rows) == _ROWS:
                    writer.write_table(pa.Table.from_pylist(rows, _SCHEMA))
                    rows = []
            writer.write_table(pa.Table.from_pylist(rows, _SCHEMA))
        _check(config, facts, num_levels)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    scratch = notes.with_suffix(".tmp")
    scratch.write_text(
        json.dumps({"made_of": made_of, "digest": digest.hexdigest()[:16], "facts": facts.to_json()}), "utf-8"
    )
    scratch.replace(notes)
    return Index(file, processor)


def _notes(file: Path) -> Path:
    return file.with_suffix(".json")


def _fingerprint(source: Source, config: StageConfig, processor: AlignGPTProcessor, num_levels: int) -> str:
    """Of everything that the index depends on."""
    made_of: list[Any] = [
        __version__,
        config.stage,
        num_levels,
        source.describe(),
        config.caption_column,
        config.image_column,
    ]
    made_of += [processor.tokenizer.backend_tokenizer.to_str(), processor.chat_template, processor.max_length]
    made_of += [processor.num_patches, processor.align, config.image_root, processor.template]
    made_of.append({name: str(token) for name, token in processor.tokenizer.special_tokens_map.items()})
    for uri in dict.fromkeys(shard.uri for shard in source.shards):
        made_of.append(storage.size(uri))
        if not storage.is_remote(uri):
            made_of.append(Path(uri).stat().st_mtime_ns)
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


def _rows(
    source: Source, config: StageConfig, processor: AlignGPTProcessor, num_levels: int, facts: Facts
) -> Iterator[dict[str, Any]]:
    needs_level = config.stage == "pretrain" and num_levels > 0
    with meter("reading", None, unit="rows") as shown:
        for shard in source.shards:
            pairs = source.read(shard)
            try:
                for number, pair in enumerate(pairs):
                    shown.add(1, 1, 0)
                    row = _row(pair, config, processor, needs_level, facts)
                    if row is None:
                        continue
                    if row["level"] > num_levels > 0:
                        raise UserError(
                            f"{pair.source}: {pair.key} has level {pair.level}, but the model has {num_levels} levels; "
                            f"say --num-levels for a new model, or bucket the data with --levels {num_levels}."
                        )
                    if pair.image is not None:  # embedded: in the part itself
                        row |= {"source": shard.uri, "image_path": "image", "row": number}
                        row |= {"image_offset": None, "image_length": None}
                    yield row
            except (ShardError, OSError) as error:
                raise UserError(f"{shard}: cannot be read ({error}).") from None


def _row(
    pair: Pair, config: StageConfig, processor: AlignGPTProcessor, needs_level: bool, facts: Facts
) -> dict[str, Any] | None:
    """The pair as a row of the index, or None with the cause counted."""
    has_image = pair.load is not None
    found = row_of(pair) or {}
    status = Status(found.get("status", pair.status))  # of an image that scoring could not read, nothing is learned
    if status in FINE and pair.status not in FINE:
        status = pair.status
    if status not in FINE or (status is Status.OK and not has_image):
        facts.skip(str(status if status not in FINE else Status.MISSING_IMAGE), pair.key)
        return None
    if config.stage == "pretrain" and not has_image:
        facts.skip("no image, which pretraining needs", pair.key)
        return None
    if needs_level and pair.level is None:
        facts.skip("no level", pair.key)
        return None
    try:
        if pair.conversations is not None:
            sample = processor.encode(pair.conversations, has_image=has_image)
        else:
            sample = processor.encode_caption(pair.caption or "")
    except ValueError as error:
        facts.skip(str(error).rstrip("."), pair.key)
        return None
    facts.rows += 1
    facts.images += has_image
    facts.tokens += len(sample.input_ids)
    facts.supervised += sum(label != IGNORE for label in sample.labels)
    facts.truncated += sample.truncated > 0
    facts.levels[pair.level or 0] += 1
    row = {name: getattr(pair, name) for name in ("key", "source", "image_offset", "image_length", "row")}
    row |= {"image_path": pair.image_path if has_image else None, "level": pair.level or 0}
    row["sha256"] = found.get("sha256")
    return row | {"length": len(sample.input_ids), **_folded(sample, processor)}


def _folded(sample: Encoded, processor: AlignGPTProcessor) -> dict[str, list[int]]:
    """Tokens and answers with the image's placeholders as one."""
    ids, labels = list(sample.input_ids), list(sample.labels)
    if processor.image_token_id in ids:
        at = ids.index(processor.image_token_id)
        del ids[at + 1 : at + processor.num_patches], labels[at + 1 : at + processor.num_patches]
    learned = [False, *(label != IGNORE for label in labels), False]
    return {"tokens": ids, "answers": [i for i in range(len(learned) - 1) if learned[i] != learned[i + 1]]}


def _check(config: StageConfig, facts: Facts, num_levels: int) -> None:
    where = ", ".join(config.data)
    if facts.rows:
        return
    if not facts.skipped:
        raise UserError(f"{where}: the data has no rows.")
    cause, count = facts.skipped.most_common(1)[0]
    if set(facts.skipped) <= {"no level", "no image, which pretraining needs"} and "no level" in facts.skipped:
        raise UserError(
            f"{where}: the data has no levels, from which pretraining learns; score it and then run "
            f"`aligncurate bucket {config.data[0]} --levels {num_levels} --out LEVELLED`."
        )
    raise UserError(
        f"{where}: no row can be trained on; of {count:,} the reason is: {cause} ({facts.examples[cause]})."
    )
