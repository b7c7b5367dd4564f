"""Tars of webdataset and img2dataset: a tar is a shard, each of its samples a pair."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from itertools import islice
from typing import Any, BinaryIO

import pyarrow as pa

from aligncurate.dataset.record import Status
from aligncurate.errors import ShardError, UserError
from aligncurate.io import storage
from aligncurate.io.content import image_format
from aligncurate.io.files import readable
from aligncurate.io.storage import MAX_IMAGE_BYTES
from aligncurate.io.tar import HEADERS, Member, tar_members
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
    is_wanted,
    split_at_dots,
)

_METADATA = re.compile(r"^__[^/]*__$")  # webdataset's rule for members that belong to no sample
_FIRST_TARS = 20  # of these, the first that can be read decides on the extra columns
_PEEK = 200  # samples that decide the types of the extra columns
_AHEAD = 1 << 20  # bytes of a tar that are read at once where its images are wanted
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
            yield sample, rows and (rows.get(key) or rows.get(storage.basename(key), {}))

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
        self._contents = contents
        self._kept = _KEPT if contents == "all" and storage.is_remote(uri) else 0
        self._end = storage.size(uri)
        self._is_image, self._is_text = (lru_cache(1024)(test) for test in (endings.is_image, endings.is_text))

    def samples(self) -> Iterator[Sample]:
        """Neighbours with one key, grouped by webdataset's rule: a key ends at the first dot of the file's name."""
        sample: Sample | None = None
        unnamed = 0
        ahead = _AHEAD if self._contents == "all" else HEADERS
        for member in tar_members(self._file, self._uri, ahead):
            if isinstance(member, str):
                if sample is None:
                    raise ShardError(f"{self._uri}: {member}")
                if not (sample.images and sample.texts):  # its other files may be behind the damage
                    sample.fail(Status.READ_ERROR, member)
                yield sample
                sample = Sample(storage.basename(self._uri), fault=(Status.READ_ERROR, member))
                break
            path = readable(member.name)
            folder, slash, name = path.rpartition("/")
            stem, dot, ending = name.partition(".")
            if not stem or not dot or member.kind == "folder" or (path.startswith("__") and _METADATA.match(path)):
                unnamed += member.kind in ("file", "sparse")
                continue
            key, ending = f"{folder}{slash}{stem}", ending.lower()
            if sample is None or sample.key != key or ending in sample.files:
                if sample is not None:
                    yield sample
                sample = Sample(key)
            sample.files[ending] = name
            self._add(sample, ending, path, member)
        if sample is not None:
            yield sample
        elif unnamed:
            raise ShardError(f"{self._uri}: no file in the tar has a name with an ending, such as 0.jpg and 0.txt")

    def _add(self, sample: Sample, ending: str, path: str, member: Member) -> None:
        _, offset, size, kind, data = member
        if kind == "sparse":
            sample.fail(Status.READ_ERROR, f"{path} is stored as a sparse file; repack the tar without --sparse")
        elif kind != "file":
            sample.fail(
                Status.READ_ERROR,
                f"{path} is a link or a device, not a file; repack the tar with --dereference --hard-dereference",
            )
        elif offset + size > self._end:
            sample.fail(Status.READ_ERROR, f"the tar ends in the middle of {path}; copy it again")
        elif self._is_image(ending):
            if size > MAX_IMAGE_BYTES:
                sample.fail(Status.TOO_LARGE, f"{path} has {size:,} bytes, more than the limit of {MAX_IMAGE_BYTES:,}")
            elif data is None and size <= self._kept - sum(image.length or 0 for image in sample.images.values()):
                data = memoryview(self._read(member))
            sample.images[ending] = self._image(path, member, data)
        elif self._is_unnamed_image(ending, member):
            sample.unnamed[ending] = self._image(path, member, data)
        elif (wanted := is_wanted(size, text=self._is_text(ending))) is None:
            sample.fail(Status.TOO_LARGE, f"{path} has {size:,} bytes, more than the limit of {MAX_TEXT_BYTES:,}")
        elif wanted and self._contents != "nothing":
            sample.texts[ending] = self._read(member)

    def _is_unnamed_image(self, ending: str, member: Member) -> bool:
        """Whether a member with an unusual ending, such as `.jpg_large`, is an image by its content."""
        if self._endings.image is not None or self._is_text(ending):
            return False
        return image_format(self._read(member, 32)) is not None

    def _image(self, path: str, member: Member, data: memoryview | None) -> Image:
        _, offset, size, _, _ = member
        if data is None or self._contents != "all":
            return Image(path, partial(storage.read_range, self._uri, offset, size), offset, size)
        return Image(path, partial(bytes, data), offset, size)

    def _read(self, member: Member, most: int | None = None) -> bytes:
        if member.data is not None:
            return bytes(member.data[:most])
        self._file.seek(member.offset)
        return self._file.read(member.size if most is None else most)
