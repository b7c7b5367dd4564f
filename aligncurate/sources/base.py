"""The interface of a source: an ordered list of shards, and the pairs in each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import pyarrow as pa

from aligncurate.dataset.record import EXTRA, Pair
from aligncurate.errors import ShardError
from aligncurate.io import storage


@dataclass(frozen=True)
class Shard:
    """A unit of work; shard i becomes part i of the output.

    Attributes:
        index: its number among all shards of the run, from 0.
        uri: the file it is in.
        start, stop: its rows in the file; `stop` None means to the end.
        limit: read at most this many pairs (`--limit`).
        origin: index of its source, where there are several.
    """

    index: int
    uri: str
    start: int = 0
    stop: int | None = None
    limit: int | None = None
    origin: int = 0

    def __str__(self) -> str:
        return self.uri if self.stop is None else f"{self.uri} (rows {self.start:,} to {self.stop - 1:,})"


class Source(ABC):
    """Image-text data in one format.

    Attributes:
        kind: name of the format, as `--format` takes it.
        shards: its shards, always in the same order.
        extras: extra input columns that are kept, with their types.
        notices: messages to show the user before the run.
        remarks: messages to show the user after it, about what was read.
        inline: whether images are inside texts (base64), so that they can't be pointed at.
    """

    kind: str
    shards: list[Shard]
    extras: dict[str, pa.DataType]
    notices: Sequence[str] = ()
    inline: bool = False
    _pins: Mapping[str, dict[str, Any] | None] = MappingProxyType({})

    def __init__(self) -> None:
        self._counts: list[Counter[str]] = []  # of each shard that was read, for the remarks

    @property
    def remarks(self) -> Sequence[str]:
        return ()

    def take_counts(self) -> list[Counter[str]]:
        """What reading has counted for the remarks, one counter per source; they begin again at 0."""
        taken, self._counts = self._counts, []
        return [sum(taken, Counter())]

    def add_counts(self, taken: Sequence[Counter[str]]) -> None:
        """Add what `take_counts` gave in another process."""
        self._counts += taken

    @property
    def alone(self) -> bool:
        """Whether what was read so far depends on no files but those of the shards."""
        return False

    @abstractmethod
    def read(self, shard: Shard) -> Iterator[Pair]:
        """The pairs in `shard`, in order. Raises OSError or ShardError if its file cannot be read."""

    @abstractmethod
    def count(self, shard: Shard, most: int | None = None) -> int:
        """Number of pairs in `shard`, without reading images; counting stops at `most`, and without it may estimate."""

    def describe(self) -> list[dict[str, Any]]:
        """The inputs as the manifest records them: files and what tells that one has changed, see `storage.pins`."""
        uris = list(dict.fromkeys(shard.uri for shard in self.shards))
        self._pins = storage.pins(uris)
        files = [{"uri": uri, **(self._pins[uri] or {"bytes": None})} for uri in uris]
        return [{"kind": self.kind, "files": files}]

    def check_unchanged(self, shard: Shard) -> None:
        """Raises ShardError unless the file of `shard` is the one that `describe` found."""
        if shard.uri not in self._pins:
            return
        if (began := self._pins[shard.uri]) is None:
            raise ShardError(f"{shard.uri}: it could not be looked at when the run began, so nothing of it is kept")
        try:
            now = storage.pin(shard.uri)
        except OSError as error:
            raise ShardError(f"{shard}: cannot be read: {error.strerror or error}") from None
        if now != began:
            raise ShardError(f"{shard.uri}: it has changed since the run began, so nothing of it is kept")


class Sources(Source):
    """Several sources read as one, in the given order."""

    kind = "several"

    def __init__(self, sources: Sequence[Source]) -> None:
        super().__init__()
        self._sources = sources
        pairs = [(i, shard) for i, source in enumerate(sources) for shard in source.shards]
        self.shards = [replace(shard, index=n, origin=i) for n, (i, shard) in enumerate(pairs)]
        self.extras = merge_extras([source.extras for source in sources])
        self.notices = [notice for source in sources for notice in source.notices]
        self.inline = any(source.inline for source in sources)

    @property
    def remarks(self) -> Sequence[str]:
        return [remark for source in self._sources for remark in source.remarks]

    def take_counts(self) -> list[Counter[str]]:
        return [counts for source in self._sources for counts in source.take_counts()]

    def add_counts(self, taken: Sequence[Counter[str]]) -> None:
        for source, counts in zip(self._sources, taken, strict=True):
            source.add_counts([counts])

    @property
    def alone(self) -> bool:
        return all(source.alone for source in self._sources)

    def read(self, shard: Shard) -> Iterator[Pair]:
        return self._sources[shard.origin].read(shard)

    def count(self, shard: Shard, most: int | None = None) -> int:
        return self._sources[shard.origin].count(shard, most)

    def describe(self) -> list[dict[str, Any]]:
        return [line for source in self._sources for line in source.describe()]

    def check_unchanged(self, shard: Shard) -> None:
        self._sources[shard.origin].check_unchanged(shard)


def merge_extras(schemas: Sequence[Mapping[str, pa.DataType]]) -> dict[str, pa.DataType]:
    """Merge the extra columns of several inputs; a column whose types differ goes into `extra`."""
    merged: dict[str, pa.DataType] = {}
    clashing = set()
    for extras in schemas:
        for name, kind in extras.items():
            if merged.setdefault(name, kind) != kind:
                clashing.add(name)
    merged = {n: t for n, t in merged.items() if n not in clashing and n != EXTRA}
    if clashing or any(EXTRA in extras for extras in schemas):
        merged[EXTRA] = pa.string()
    return merged


def limit_shards(source: Source, limit: int | None) -> list[Shard]:
    """The shards that hold the first `limit` pairs of `source`."""
    if limit is None:
        return source.shards
    kept = []
    for shard in source.shards:
        if limit <= 0:
            break
        try:
            rows = source.count(shard, limit)
        except (OSError, ShardError):
            kept.append(replace(shard, limit=limit))  # the run reports what is wrong with it
            continue
        kept.append(replace(shard, limit=limit) if rows >= limit else shard)
        limit -= rows
    return kept


def cut(uri: str, rows: int, per_shard: int, first: int = 0) -> list[Shard]:
    """Cut a file of `rows` rows into shards of `per_shard` rows, numbered from `first`."""
    starts = range(0, rows, per_shard)
    return [Shard(first + i, uri, start, min(start + per_shard, rows)) for i, start in enumerate(starts)]
