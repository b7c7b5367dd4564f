"""Builds the index of a stage: tokenizes the rows of the data and notes their levels and image locations."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import transformers

from aligncurate import __version__
from aligncurate.dataset.record import FINE, Pair, Status
from aligncurate.errors import ShardError, UserError
from aligncurate.io import storage
from aligncurate.io.files import atomic_file
from aligncurate.progress import meter, notice
from aligncurate.sources.base import Source
from aligncurate.sources.detect import open_source
from aligncurate.sources.options import SourceOptions
from aligntrain.data import index_cache
from aligntrain.data.index import SCHEMA, Facts, Index, facts_file
from aligntrain.data.levels import check_levels
from aligntrain.data.sealed import DamagedError, list_files, read_sealed, read_unsealed, write_sealed
from aligntrain.inputs.processor import AlignGPTProcessor, Encoded
from aligntrain.inputs.templates import caption_turns
from aligntrain.model.loss import IGNORE
from aligntrain.stage import StageConfig

_ROWS = 2_000  # per record batch
_AT_ONCE = 256  # rows tokenized together
_FORMAT = 3  # to be raised when the same data gives another index
_OF_ONE_ROW = re.compile(r"(?<=\bturn )\d+|\b\d+(?= times)")  # numbers in a cause, left out to count rows by cause
_NAMING = ("key", "image_offset", "image_length", "row", "sha256", "level", "tokens", "answers")


def open_data(config: StageConfig) -> Source:
    """The data of a stage as one source. Raises UserError when there is none, or when it cannot be read."""
    if not config.data:
        raise UserError("no data given; pass dataset folders, tars or another source.")
    options = SourceOptions(config.format, config.caption_column, config.image_column, config.image_root)
    return open_source(list(config.data), options)


def build_index(
    source: Source, config: StageConfig, processor: AlignGPTProcessor, num_levels: int, file: Path
) -> Index:
    """Tokenize the data of a stage, unless `file` is already the index of the same data and settings, or one is kept.

    Rows that depend on other files than the shards (images by name, a table beside a tar) are always tokenized again.

    Images are not read. Raises no error for a kept index that is damaged, but makes it again.

    Args:
        source: the data, from `open_data`.
        config: what it is used for.
        processor: tokenizes.
        num_levels: N of the model; 0 without alignment, so pretraining needs no levels.
        file: the index, `*.arrow`.

    Raises UserError when the data is empty, has no usable row, lacks levels that pretraining needs, or has other levels
    than the model.
    """
    check_levels(source, config, num_levels)
    made_of = _fingerprint(source, config, processor, num_levels)
    notes = facts_file(file)
    if notes.is_file():
        try:
            kept = read_sealed(notes)
            if kept["made_of"] == made_of and kept["alone"] and source.alone:
                return Index(file, processor, check=True)
        except DamagedError as error:
            if read_unsealed(notes) is None:
                notice(f"{file}: the index is damaged ({error}); it is made again")
    for text in source.notices:
        notice(text)
    notes.unlink(missing_ok=True)
    # Of a folder or a remote file the fingerprint may miss a change; such an index is not shared between runs.
    local = all(Path(shard.uri).is_file() for shard in source.shards)
    if local and source.alone:
        index_cache.fetch(made_of, file)
    if notes.is_file():
        return Index(file, processor)
    facts, digest = Facts(), hashlib.sha256()
    with atomic_file(file) as temporary:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            rows: list[dict[str, Any]] = []
            for row in _rows(source, config, processor, num_levels, facts):
                rows.append(row)
                digest.update(repr([row[name] for name in _NAMING]).encode())
                if len(rows) == _ROWS:
                    writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
                    rows = []
            writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
        _check(config, facts, num_levels)
    made = {"made_of": made_of, "alone": source.alone, "digest": digest.hexdigest()[:16], "facts": facts.to_json()}
    write_sealed(notes, {**made, "files": list_files([file])})
    if local and source.alone:  # now that all is read, it is known whether images are elsewhere
        index_cache.store(made_of, file)
    return Index(file, processor)


def _fingerprint(source: Source, config: StageConfig, processor: AlignGPTProcessor, num_levels: int) -> str:
    """Digest of everything that the index depends on."""
    made_of: list[Any] = [
        __version__,
        _FORMAT,
        transformers.__version__,
        config.stage,
        num_levels,
        source.describe(),
        config.caption_column,
        config.image_column,
    ]
    made_of += [processor.tokenizer.backend_tokenizer.to_str(), processor.chat_template, processor.max_length]
    root = config.image_root and storage.absolute(config.image_root)
    made_of += [processor.num_patches, processor.align, root, processor.template]
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
    if source.inline:
        raise UserError(
            f"{', '.join(config.data)}: images are written inside the data (base64); run `aligncurate ingest` first, "
            "which makes a dataset of it."
        )
    with meter("reading", None, unit="rows") as progress:
        for shard in source.shards:
            pairs = enumerate(source.read(shard))
            try:
                while batch := list(islice(pairs, _AT_ONCE)):
                    progress.add(len(batch), len(batch), 0)
                    usable = [(number, pair) for number, pair in batch if _is_usable(pair, config, needs_level, facts)]
                    samples = processor.encode_all([_conversation(pair) for _, pair in usable])
                    for (number, pair), sample in zip(usable, samples, strict=True):
                        if isinstance(sample, ValueError):
                            facts.skip(_OF_ONE_ROW.sub("…", str(sample).rstrip(".")), pair.key)
                            continue
                        if (pair.level or 0) > num_levels > 0:
                            raise UserError(
                                f"{pair.source}: {pair.key} has level {pair.level}, but the model has {num_levels} "
                                "levels; pass --num-levels for a new model, or bucket the data with --levels "
                                f"{num_levels}."
                            )
                        row = _row(pair, sample, processor, facts)
                        if pair.image is not None:  # embedded in the dataset's part
                            row |= {"source": shard.uri, "image_path": "image", "row": number}
                            row |= {"image_offset": None, "image_length": None}
                        yield row
            except (ShardError, OSError) as error:
                raise UserError(f"{shard}: cannot be read ({error}).") from None


def _is_usable(pair: Pair, config: StageConfig, needs_level: bool, facts: Facts) -> bool:
    """Whether the stage can use the pair; if not, counts the cause."""
    has_image = pair.load is not None
    scored = (pair.stored or {}) if has_image else {}
    status = Status(scored.get("status", pair.status))  # images that scoring could not read are not used
    if status in FINE and pair.status not in FINE:
        status = pair.status
    cause = None
    if status not in FINE or (status is Status.OK and not has_image):
        cause = str(status if status not in FINE else Status.MISSING_IMAGE)
    elif config.stage == "pretrain" and not has_image:
        cause = "no image, which pretraining needs"
    elif needs_level and pair.level is None:
        cause = "no level"
    if cause is not None:
        facts.skip(cause, pair.key)
    return cause is None


def _conversation(pair: Pair) -> tuple[list[dict[str, Any]], bool]:
    """The pair's conversation, that of a caption being an image and its answer; and whether there is an image."""
    if pair.conversations is not None:
        return pair.conversations, pair.load is not None
    return caption_turns(pair.caption or ""), True


def _row(pair: Pair, sample: Encoded, processor: AlignGPTProcessor, facts: Facts) -> dict[str, Any]:
    """The pair as a row of the index, counted."""
    has_image = pair.load is not None
    facts.rows += 1
    facts.images += has_image
    facts.tokens += len(sample.input_ids)
    facts.supervised += sum(label != IGNORE for label in sample.labels)
    facts.truncated += sample.truncated > 0
    facts.moved_system += processor.moves_system and any(t["role"] == "system" for t in pair.conversations or [])
    facts.levels[pair.level or 0] += 1
    row = {name: getattr(pair, name) for name in ("key", "source", "image_offset", "image_length", "row")}
    row |= {"image_path": pair.image_path if has_image else None, "level": pair.level or 0}
    row["sha256"] = (pair.stored or {}).get("sha256") if has_image else None
    return row | {"length": len(sample.input_ids), **_folded(sample, processor)}


def _folded(sample: Encoded, processor: AlignGPTProcessor) -> dict[str, list[int]]:
    """Tokens and supervised ranges, with the image's placeholders folded into one."""
    ids, labels = list(sample.input_ids), list(sample.labels)
    if processor.image_token_id in ids:
        at = ids.index(processor.image_token_id)
        del ids[at + 1 : at + processor.num_patches], labels[at + 1 : at + processor.num_patches]
    supervised = [False, *(label != IGNORE for label in labels), False]
    return {"tokens": ids, "answers": [i for i in range(len(supervised) - 1) if supervised[i] != supervised[i + 1]]}


def _check(config: StageConfig, facts: Facts, num_levels: int) -> None:
    where = ", ".join(config.data)
    if facts.rows:
        return
    if not facts.skipped:
        raise UserError(f"{where}: the data has no rows.")
    cause, count = facts.skipped.most_common(1)[0]
    if set(facts.skipped) <= {"no level", "no image, which pretraining needs"} and "no level" in facts.skipped:
        raise UserError(
            f"{where}: pretraining needs levels, but the data has none; if it is scored, run "
            f"`aligncurate bucket {config.data[0]} --levels {num_levels} --out LEVELLED`."
        )
    raise UserError(f"{where}: no usable rows; {count:,} failed with: {cause} (such as {facts.examples[cause]}).")
