"""A sample: the files with one key, in a tar or in a folder, and the pair that they make."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from aligncurate.dataset.record import COLUMNS, OWN_EMBEDDINGS, Pair, Status
from aligncurate.images.formats import EXTENSIONS
from aligncurate.io.files import readable
from aligncurate.sources.base import Shard, Source
from aligncurate.sources.captions import CAPTIONS, captions_in, clean, several_remark, text_of
from aligncurate.sources.coerce import as_level, as_score, infer_extras
from aligncurate.sources.options import Several
from aligncurate.sources.texts import with_texts, without_image

MAX_TEXT_BYTES = 1 << 24
"""Largest text file of a sample that is read; others give its row the status `too_large`."""

Contents = Literal["all", "texts", "nothing"]
"""What of a sample is read: also its images, where they would take a request later; its texts; or only names."""

CAPTION_ENDINGS = ("txt", "caption", "text")
OWN = frozenset(COLUMNS) | {"messages", *OWN_EMBEDDINGS}
"""Fields of a sample that are not kept as extra columns."""

_NOTE_BYTES = 1 << 12  # a file with another ending that is this small and is text is kept as an extra column
_LISTED = 6  # files of a sample that a message names


@dataclass(frozen=True)
class Endings:
    """The endings of images and captions, where the user names them; None means the usual ones.

    The caption may also be a field of the JSON.
    """

    image: str | None = None
    caption: str | None = None

    @property
    def captions(self) -> tuple[str, ...]:
        """Endings of files with captions, the most likely first."""
        return CAPTION_ENDINGS if self.caption is None else (self.caption.lower().lstrip("."),)

    def is_image(self, ending: str) -> bool:
        last = ending.rpartition(".")[2]
        return last in EXTENSIONS if self.image is None else self.image.lower().lstrip(".") in (ending, last)

    def is_text(self, ending: str) -> bool:
        """Whether the file is a caption or JSON, and is read whole."""
        return bool({ending, ending.rpartition(".")[2]} & {*CAPTION_ENDINGS, *self.captions, "json"})


class Image(NamedTuple):
    """Where the bytes of a sample's image are; `load` reads them and raises OSError."""

    path: str
    load: Callable[[], bytes]
    offset: int | None = None
    length: int | None = None


@dataclass(slots=True)
class Sample:
    """The files with one key, by their endings: images, texts that were read, and the names of all.

    Attributes:
        unnamed: images by their content, with unusual endings; taken if there is no other.
        fault: what makes the sample unusable: a status and a sentence.
    """

    key: str
    images: dict[str, Image] = field(default_factory=dict)
    unnamed: dict[str, Image] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    fault: tuple[Status, str] | None = None

    def fail(self, status: Status, error: str) -> None:
        self.fault = self.fault or (status, error)

    def __str__(self) -> str:
        names = list(self.files.values())
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        return f"{', '.join(names[:_LISTED])}{more}"


def is_wanted(size: int, *, text: bool) -> bool | None:
    """Whether a file that is no image is read; None if its ending says that it is text, but it is too large."""
    if text:
        return True if size <= MAX_TEXT_BYTES else None
    return size <= _NOTE_BYTES


def split_at_dots(sample: Sample, endings: Endings) -> list[Sample]:
    """A sample as it is, or the pairs that it is made of because their names have dots.

    webdataset takes the key up to the first dot, so `22.05.jpg`, `22.05.txt`, `22.07.jpg` and `22.07.txt` have one key.
    They are two pairs if the last dot is taken, which is done only where the first makes no pair.
    """
    sample.images = sample.images or sample.unnamed
    if sample.fault or not any("." in ending for ending in sample.files):
        return [sample]
    captions = {*endings.captions, "json"}
    if len(sample.images) == 1 and captions & sample.files.keys():
        return [sample]
    parts: dict[str, Sample] = {}
    for ending, name in sample.files.items():
        prefix, _, last = ending.rpartition(".")
        part = parts.setdefault(prefix, Sample(f"{sample.key}.{prefix}" if prefix else sample.key))
        part.files[last] = name
        if ending in sample.images:
            part.images[last] = sample.images[ending]
        if ending in sample.texts:
            part.texts[last] = sample.texts[ending]
    full = [len(part.images) == 1 and bool(captions & part.files.keys()) for part in parts.values()]
    if all(full) or ("" not in parts and any(full)):
        return list(parts.values())
    if len(sample.images) > 1:
        sample.fail(
            Status.MULTI_IMAGE,
            f"{len(sample.images)} images in one sample, because the key ends at the first dot: {sample}; rename them",
        )
    return [sample]


def parse_json(sample: Sample) -> dict[str, Any]:
    """The fields of a sample's JSON; none if it has no JSON. Raises ValueError."""
    text = sample.texts.get("json")
    if not text:
        return {}
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except ValueError as error:
        raise error if isinstance(error, json.JSONDecodeError) else ValueError("a number has too many digits") from None
    if not isinstance(value, dict):
        raise ValueError(f"it is a {type(value).__name__}, not an object")
    return value


def extra_fields(sample: Sample, meta: Mapping[str, Any], endings: Endings) -> dict[str, Any]:
    """Fields for extra columns: those of the JSON, and small texts with other endings."""
    extra: dict[str, Any] = {}
    for ending, data in sample.texts.items():
        if ending not in (*endings.captions, "json") and b"\0" not in data:
            try:
                extra[ending] = data.decode().strip()
            except UnicodeDecodeError:
                continue
    return {column: value for name, value in (extra | dict(meta)).items() if (column := _column(name)) is not None}


@lru_cache(4096)
def _column(name: str) -> str | None:
    """The extra column that keeps a field; None for those of our own."""
    return None if name in OWN else readable(name) or "unnamed"


@dataclass
class SampleReader:
    """Turns samples into pairs: one each, or one for each of several captions.

    Attributes:
        endings: how images and captions are called.
        captions: what becomes of several captions.
        counts: samples with `several` captions so far.
    """

    endings: Endings
    captions: Several
    counts: Counter[str] = field(default_factory=Counter)

    def pairs(self, sample: Sample, source: str, beside: Mapping[str, Any]) -> list[Pair]:
        """The pairs of a sample; whatever is wrong with it becomes their status.

        Args:
            sample: its files.
            source: URI of the tar or folder.
            beside: what a table beside the tar says of the sample; its JSON goes before.
        """
        try:
            return self._pairs(sample, source, beside)
        except Exception as error:  # whatever a file holds, it is the fault of its row only
            pair = Pair(sample.key, source)
            pair.fail(Status.INVALID_ROW, f"{sample.key}: the sample cannot be used ({type(error).__name__}: {error})")
            return [pair]

    def _pairs(self, sample: Sample, source: str, beside: Mapping[str, Any]) -> list[Pair]:
        pair = Pair(sample.key, source)
        if sample.fault:
            pair.fail(*sample.fault)
        if len(sample.images) > 1:
            pair.fail(Status.MULTI_IMAGE, f"{len(sample.images)} images in one sample ({sample}); split it into pairs")
        try:
            meta = dict(beside) | parse_json(sample)
        except ValueError as error:
            meta = dict(beside)
            pair.fail(Status.INVALID_ROW, f"the JSON cannot be used: {error}")
        pair.score, pair.level = as_score(meta.get("score")), as_level(meta.get("level"))
        pair.extra = extra_fields(sample, meta, self.endings)
        if others := self._other_captions(sample, meta):
            pair.extra["other_captions"] = others
        key = text_of(meta.get("key")) or sample.key
        pair.key = ""
        turns, caption = meta.get("conversations") or meta.get("messages"), self._caption(sample, meta)
        if not turns and sample.files:
            self._check_files(pair, sample, caption)
        pairs, _ = with_texts(pair, turns, caption, self.captions, meta.get("similarity"))
        if not turns:
            self.counts["several"] += len(pairs) > 1 or (self.captions == "first" and len(captions_in(caption)) > 1)
        for one in pairs:
            one.key = f"{key}{one.key}"
            self._attach(one, sample, meta)
        return pairs

    def _check_files(self, pair: Pair, sample: Sample, caption: Any) -> None:
        if not sample.images:
            pair.fail(Status.MISSING_IMAGE, _no_image(sample))
        elif caption is None:
            has = f"only {sample}" if len(sample.files) == 1 else f"{sample} (--caption-column)"
            pair.fail(Status.MISSING_CAPTION, f"there is no caption; the sample has {has}")

    def _caption(self, sample: Sample, meta: Mapping[str, Any]) -> Any:
        for name in self.endings.captions:
            if name in sample.texts:
                return text_of(sample.texts[name])
        if self.endings.caption is not None:
            return meta.get(self.endings.caption)
        return next((meta[name] for name in CAPTIONS if name in meta), None)

    def _other_captions(self, sample: Sample, meta: Mapping[str, Any]) -> list[str]:
        """The captions in files with further endings and in the JSON, where they differ from the one that is taken."""
        texts = [text_of(sample.texts[name]) for name in self.endings.captions if name in sample.texts]
        texts += [meta["caption"]] if texts and isinstance(meta.get("caption"), str) else []
        different = dict.fromkeys(texts)
        cleaned = dict.fromkeys(clean(text) for text in different if text) if len(different) > 1 else ()
        return [text for text in cleaned if text][1:]

    def _attach(self, pair: Pair, sample: Sample, meta: Mapping[str, Any]) -> None:
        for image in list(sample.images.values())[:1]:
            pair.image_path, pair.image_offset, pair.image_length = image.path, image.offset, image.length
            pair.load = image.load if len(sample.images) == 1 and not sample.fault else None
        if not sample.images and sample.files:
            missing = (
                f"the sample has no image; it has {sample}; name the image's ending with --image-column if it is one"
            )
            without_image(pair, meta, missing)


def _no_image(sample: Sample) -> str:
    return f"the sample has no image; it has {sample} (--image-column)"


class SampleSource(Source):
    """A source whose shards hold samples.

    Args:
        endings: the endings of images and captions, where they are not the usual ones.
        captions: what becomes of several captions in one sample.
    """

    def __init__(self, endings: Endings, captions: Several) -> None:
        super().__init__()
        self._endings, self._captions = endings, captions
        self._several = False

    @abstractmethod
    def samples(self, shard: Shard, contents: Contents) -> Iterator[tuple[Sample, Mapping[str, Any]]]:
        """The samples of a shard, each with what a table beside it says; `contents` says what of them is read."""

    def look(self, samples: Iterable[Sample]) -> dict[str, pa.DataType]:
        """The types of the extra columns of some samples; notes whether they have several captions."""
        reader, rows = SampleReader(self._endings, "all"), []
        for sample in samples:
            reader.pairs(sample, "", {})
            with suppress(ValueError):  # reported in the status of its row
                rows.append(extra_fields(sample, parse_json(sample), self._endings))
        self._several = reader.counts["several"] > 0
        return infer_extras(rows)

    def read(self, shard: Shard) -> Iterator[Pair]:
        reader = SampleReader(self._endings, self._captions)
        self._counts.append(reader.counts)
        return islice(self._pairs(shard, "all", reader), shard.limit)

    def count(self, shard: Shard, most: int | None = None) -> int:
        # Without `most` this is for a progress bar, so what the first samples have is taken for what all have.
        if self._captions == "all" and (self._several or most is not None):
            pairs: Iterator[object] = self._pairs(shard, "texts", SampleReader(self._endings, "all"))
        else:
            pairs = self.samples(shard, "nothing")
        return sum(1 for _ in islice(pairs, most))

    def _pairs(self, shard: Shard, contents: Contents, reader: SampleReader) -> Iterator[Pair]:
        for sample, beside in self.samples(shard, contents):
            yield from reader.pairs(sample, shard.uri, beside)

    @property
    def remarks(self) -> Sequence[str]:
        several = sum(counts["several"] for counts in self._counts)
        return [several_remark(several, self._captions)] if several else []
