"""Tars of webdataset and img2dataset: a tar is a shard, each of its samples a pair."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, BinaryIO

import pyarrow as pa

from aligncurate.dataset.record import Status
from aligncurate.errors import ShardError, UserError
from aligncurate.io import storage
from aligncurate.io.content import image_format
from aligncurate.io.files import readable
from aligncurate.io.storage import MAX_IMAGE_BYTES
from aligncurate.io.tar import tar_members
from aligncurate.sources.base import Shard, merge_extras
from aligncurate.sources.coerce import infer_extras
from aligncurate.sources.img2dataset import beside, extras_beside, not_downloaded, rows_beside
from aligncurate.sources.options import Several
from aligncurate.sources.samples import (
    MAX_TEXT_BYTES,
    Contents,
    Endings,
    Image,
    Sample,
    SampleSource,
    split_at_dots,
    wanted_bytes,
)

_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)  # webdataset's own rule: key, then all extensions
_METADATA = re.compile(r"^__[^/]*__$")  # webdataset's rule for members that belong to no sample
_FIRST_TARS = 20  # of these, the first that can be read decides on the extra columns
_PEEK = 200  # samples that decide the types of the extra columns
_KEPT = 1 << 26  # bytes of a remote sample's images that are kept when they are passed, to save requests


class WebDatasetSource(SampleSource):
    """The samples of tars, in the order of the tars and of their members.

    Args:
        uris: the tars.
        endings: the endings of images and captions, where they are not the usual ones.
        captions: what becomes of several captions in one sample.

    Raises:
        ShardError: the first tar cannot be read; without it, the extra columns would depend on chance.
        UserError: it is damaged, and the only one.
    """

    kind = "webdataset"

    def __init__(self, uris: Sequence[str], endings: Endings | None = None, captions: Several = "all") -> None:
        super().__init__(endings or Endings(), captions)
        self.shards = [Shard(i, uri) for i, uri in enumerate(uris)]
        self.extras = self._peek()
        self.notices = not_downloaded(uris)

    @property
    def alone(self) -> bool:
        return not any(storage.exists(beside(shard.uri)) for shard in self.shards)

    def _peek(self) -> dict[str, pa.DataType]:
        """Types of the extra columns, from the first samples, the same for all shards."""
        if not self.shards:
            return {}
        for first in [shard.uri for shard in self.shards[:_FIRST_TARS]]:
            try:
                columns = self.look(islice(self._samples(first, "texts"), _PEEK))
            except ShardError as error:  # damaged, or not a tar; reported when the shard is read
                if len(self.shards) == 1:
                    raise UserError(f"{error}.") from None
                continue
            except OSError as error:
                raise ShardError(f"{first}: cannot be read: {error.strerror or error}") from None
            return merge_extras([columns, extras_beside(first)])
        return infer_extras([])

    def samples(self, shard: Shard, contents: Contents) -> Iterator[tuple[Sample, Mapping[str, Any]]]:
        rows = {} if contents == "nothing" else rows_beside(shard.uri)
        seen: set[str] = set()
        for sample in self._samples(shard.uri, contents):
            if sample.key in seen:
                sample.fail(
                    Status.DUPLICATE_KEY,
                    f"duplicate key {sample.key} in this tar; the files of a sample must be next to each other",
                )
            seen.add(sample.key)
            key = sample.key.removeprefix("./")
            yield sample, rows.get(key) or rows.get(storage.basename(key), {})

    def _samples(self, uri: str, contents: Contents) -> Iterator[Sample]:
        """The samples of a tar. If it is damaged, the last one says how.

        Raises ShardError if it has nothing before the damage.
        """
        with storage.open_file(uri) as file:
            for sample in _Tar(file, uri, self._endings, contents).samples():
                yield from split_at_dots(sample, self._endings)


class _Tar:
    """An open tar, read from its start to its end."""

    def __init__(self, file: BinaryIO, uri: str, endings: Endings, contents: Contents) -> None:
        self._file, self._uri, self._endings = file, uri, endings
        self._texts = contents != "nothing"
        self._kept = _KEPT if contents == "all" and storage.is_remote(uri) else 0
        self._end = storage.size(uri)

    def samples(self) -> Iterator[Sample]:
        """Neighbours with one key, grouped by webdataset's rule."""
        sample: Sample | None = None
        unnamed = 0
        for member in tar_members(self._file, self._uri):
            if isinstance(member, str):
                if sample is None:
                    raise ShardError(f"{self._uri}: {member}")
                if not (sample.images and sample.texts):  # its other files may be behind the damage
                    sample.fail(Status.READ_ERROR, member)
                yield sample
                sample = Sample(storage.basename(self._uri), fault=(Status.READ_ERROR, member))
                break
            match = _NAME.match(member.name)
            if match is None or match[1].endswith("/") or member.isdir() or _METADATA.match(member.name):
                unnamed += member.isfile()
                continue
            key, ending = readable(match[1]), readable(match[2]).lower()
            if sample is None or sample.key != key or ending in sample.files:
                if sample is not None:
                    yield sample
                sample = Sample(key)
            self._add(sample, ending, member)
        if sample is not None:
            yield sample
        elif unnamed:
            raise ShardError(f"{self._uri}: no file in the tar has a name with an ending, such as 0.jpg and 0.txt")

    def _add(self, sample: Sample, ending: str, member: tarfile.TarInfo) -> None:
        name, offset, size = readable(member.name), member.offset_data, member.size
        sample.files[ending] = storage.basename(name)
        is_image = self._endings.is_image(ending)
        readable_text = not is_image and wanted_bytes(ending, size, self._endings)
        if not member.isfile():
            sample.fail(
                Status.READ_ERROR,
                f"{name} is a link or a device, not a file; repack the tar with --dereference --hard-dereference",
            )
        elif member.issparse():
            sample.fail(Status.READ_ERROR, f"{name} is stored as a sparse file; repack the tar without --sparse")
        elif offset + size > self._end:
            sample.fail(Status.READ_ERROR, f"the tar ends in the middle of {name}; copy it again")
        elif is_image:
            kept = size <= self._kept - sum(image.length or 0 for image in sample.images.values())
            load = partial(storage.read_range, self._uri, offset, size)
            if size > MAX_IMAGE_BYTES:
                sample.fail(Status.TOO_LARGE, f"{name} has {size:,} bytes, more than the limit of {MAX_IMAGE_BYTES:,}")
            elif kept:
                load = partial(bytes, self._read(offset, size))
            sample.images[ending] = Image(name, load, offset, size)
        elif self._is_unnamed_image(ending, offset):
            sample.unnamed[ending] = Image(name, partial(storage.read_range, self._uri, offset, size), offset, size)
        elif readable_text is None:
            sample.fail(Status.TOO_LARGE, f"{name} has {size:,} bytes, more than the limit of {MAX_TEXT_BYTES:,}")
        elif readable_text and self._texts:
            sample.texts[ending] = self._read(offset, size)

    def _is_unnamed_image(self, ending: str, offset: int) -> bool:
        """Whether a member with an unusual ending, such as `.jpg_large`, is an image by its content."""
        if self._endings.image is not None or self._endings.is_text(ending):
            return False
        return image_format(self._read(offset, 32)) is not None

    def _read(self, offset: int, size: int) -> bytes:
        self._file.seek(offset)
        return self._file.read(size)
