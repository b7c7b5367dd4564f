"""Scores of mismatched pairs, images with another row's caption: what a caption scores by chance."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from aligncurate.dataset.pointers import POINTER_COLUMNS, read_images
from aligncurate.dataset.reader import Dataset
from aligncurate.dataset.record import IMAGE_EMBEDDING, TEXT_EMBEDDING, Status
from aligncurate.errors import ImageError, UserError
from aligncurate.levels import Floats

if TYPE_CHECKING:
    from aligncurate.encoders.load import Encoder

_PARTS = 8
_STORED, _ENCODED = 20_000, 2_000  # most rows used, where embeddings are stored and where they must be computed
_BATCH = 256
_SAME_SCORE = 0.01  # embeddings that miss the rows' own scores by more come from another encoder
_NONE = np.empty(0, np.float32)


def from_embeddings(dataset: Dataset, column: str) -> Floats:
    """Mismatched scores from stored embeddings; empty where there are none, or `column` does not come from them.

    Takes up to 20,000 rows from up to 8 parts, the same ones every time. The other row is half of those read away,
    since neighbours often show the same image or come from the same page. Pairs of rows with the same image or the
    same text are left out.
    """
    for name in (IMAGE_EMBEDDING, TEXT_EMBEDDING):
        if name not in dataset.schema.names or not pa.types.is_fixed_size_list(dataset.schema.field(name).type):
            return _NONE
    found, missed = [], []
    for table in _sample(dataset, [column, IMAGE_EMBEDDING, TEXT_EMBEDDING], [], _STORED):
        images, texts = _unit(table[IMAGE_EMBEDDING]), _unit(table[TEXT_EMBEDDING])
        missed.append(np.abs((images * texts).sum(1) - table[column].to_numpy()))
        found.append(_shifted(images, texts, table))
    return np.concatenate(found) if missed and np.median(np.concatenate(missed)) <= _SAME_SCORE else _NONE


def from_encoder(dataset: Dataset, column: str, pretrained: str | Path | None = None) -> Floats:
    """Mismatched scores of up to 2,000 rows with captions, whose images are read and encoded again.

    Rows are paired as `from_embeddings` does. Rows whose image can no longer be read are left out.

    Args:
        dataset: the dataset.
        column: its scores.
        pretrained: file of the encoder's weights, where the name in the manifest is not enough.

    Raises UserError when the encoder that made `column` cannot be loaded, or no longer gives the same scores.
    """
    named = dataset.encoder_of(column)
    if named is None:
        raise UserError(f"--mismatched: {dataset.name} does not say which encoder made {column}.")
    encoder = _load(named, pretrained)
    found, missed = [], []
    images = ["image"] if "image" in dataset.schema.names else []
    for sampled in _sample(dataset, [column, "caption"], [*POINTER_COLUMNS, *images], _ENCODED):
        table, image_units, text_units = _encode(encoder, sampled)
        if table.num_rows:
            missed.append(np.abs((image_units * text_units).sum(1) - table[column].to_numpy()))
            found.append(_shifted(image_units, text_units, table))
    if not missed:
        raise UserError(f"--mismatched: {dataset.name} has no scored rows with captions and readable images.")
    if np.median(np.concatenate(missed)) > _SAME_SCORE:
        raise UserError(f"--mismatched: {named['model']} no longer gives the scores in {column}.")
    return np.concatenate(found)


def _load(named: Mapping[str, Any], pretrained: str | Path | None) -> Encoder:
    """The encoder that a manifest names; its config is in the manifest, so only its weights may have to be given."""
    import open_clip

    from aligncurate.encoders.load import load
    from aligncurate.encoders.model_choice import TINY

    model, weights = named["model"], str(pretrained) if pretrained else named["pretrained"]
    with TemporaryDirectory() as folder:
        config = None
        if named.get("config") and model != TINY and model not in open_clip.list_models():
            config = Path(folder, f"{model}.json")
            config.write_text(json.dumps(named["config"]), "utf-8")
        try:
            encoder = load(
                None if config else model,
                None if model == TINY and not pretrained else weights,
                config,
                precision=named["precision"],
                quiet=False,
            )
        except UserError as error:
            if pretrained:
                raise
            raise UserError(
                f"--mismatched: the encoder {model} ({weights}) cannot be loaded by its name "
                f"({str(error).rstrip('.')}); give its weights with --pretrained FILE, or score with "
                "--embeddings fp16, then no encoder is needed."
            ) from None
    if encoder.identity["weights_sha256"] != named["weights_sha256"]:
        raise UserError(f"--pretrained {weights}: these are not the weights of {model} that made the scores.")
    return encoder


def _sample(dataset: Dataset, needed: Sequence[str], others: Sequence[str], limit: int) -> Iterator[pa.Table]:
    """At most `limit` rows, a table per chosen part, of rows that are ok and have a value in each of `needed`."""
    columns = list(dict.fromkeys([*needed, *others, "status", "sha256", "caption", "conversations"]))
    chosen = range(0, len(dataset.parts), max(1, -(-len(dataset.parts) // _PARTS)))
    for index in chosen:
        tables, rows, most = [], 0, limit // len(chosen)
        for table in dataset.groups(index, columns):
            usable = pc.equal(table["status"], Status.OK.value)
            for name in needed:
                usable = pc.and_(usable, pc.is_valid(table[name]))
            tables.append(table.filter(usable))
            rows += tables[-1].num_rows
            if rows >= most:
                break
        if rows:
            yield pa.concat_tables(tables).slice(0, most)


def _shifted(images: Floats, texts: Floats, table: pa.Table) -> Floats:
    """Cosines of each image with the text of the row half a table away."""
    other = np.roll(np.arange(len(images)), -(len(images) // 2))
    differs = np.ones(len(images), bool)
    for name in ("sha256", "caption", "conversations"):
        values = np.asarray([str(value) for value in table[name].to_pylist()])
        differs &= (values != values[other]) | (values == "None")
    differs &= other != np.arange(len(images))
    return np.asarray((images * texts[other]).sum(1)[differs], np.float32)


def _unit(column: pa.ChunkedArray) -> Floats:
    """Embeddings, float32 [rows, D] of length 1."""
    width = column.type.list_size
    vectors = column.combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(-1, width)
    lengths = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-12))
    return np.asarray(vectors / lengths, np.float32)


def _encode(encoder: Any, table: pa.Table) -> tuple[pa.Table, Floats, Floats]:
    """The rows whose image can be read, and their unit embeddings of images and captions, float32 [rows, D]."""
    import torch

    from aligncurate.images.decode import decode, no_decoder_warnings, open_image

    kept: list[int] = []
    embedded: list[tuple[Any, Any]] = []
    rows = table.to_pylist()
    for start in range(0, len(rows), _BATCH):
        pixels, texts = [], []
        batch = rows[start : start + _BATCH]
        for number, (row, data) in enumerate(zip(batch, read_images(batch), strict=True), start):
            if data is None or isinstance(data, OSError):
                continue
            try:
                with no_decoder_warnings():
                    pixels += decode(bytes(data), open_image(bytes(data))[0], [encoder.preprocess], "exact")
            except ImageError:
                continue
            kept.append(number)
            texts.append(row["caption"])
        if pixels:
            embedded.append(encoder.embed(torch.stack(pixels), encoder.tokenize(texts)))
    if not embedded:
        return table.slice(0, 0), np.empty((0, 1), np.float32), np.empty((0, 1), np.float32)
    images, texts_ = (torch.cat(each).numpy() for each in zip(*embedded, strict=True))
    return table.take(kept), images, texts_
