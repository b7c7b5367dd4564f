"""Writing a dataset: parts are committed one by one, over as many runs as it takes, then the manifest.

A part is committed by its receipt, which is written after it. The manifest is written twice: when a run starts
(`complete: false`; it records the options that later runs must share) and, from the receipts, when all parts exist.
Nothing in the folder depends on time or on which run wrote it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any, Self

import pyarrow as pa

from aligncurate.dataset.differences import differences, has_grown, with_corrections
from aligncurate.dataset.manifest import (
    IMAGE_ROOT,
    MANIFEST,
    SEAL,
    SHARDS,
    THRESHOLDS,
    arrow_schema,
    manifest_head,
    options_digest,
    read_manifest,
    seal,
)
from aligncurate.dataset.part import PartWriter, commit, write_receipt
from aligncurate.dataset.reader import Dataset
from aligncurate.dataset.receipt import (
    DATA,
    RECEIPTS,
    SCORE_COUNTS,
    UNKNOWN_SHARD,
    PartInfo,
    Receipt,
    part_name,
    read_receipt,
    receipt_name,
)
from aligncurate.errors import UserError
from aligncurate.io import storage
from aligncurate.io.files import absolute, as_path, claim, duplicate, read_json, sync, write_json
from aligncurate.io.paths import AnyPath, names, sizes
from aligncurate.levels import Counts
from aligncurate.progress import notice

_READERS = 16  # receipts read at once: on a network disk each one waits


class DatasetWriter:
    """Commits the parts of one dataset, over as many runs as it takes.

    Args:
        path: the output folder.
        head: the manifest without its parts: verb, options, inputs, encoder, …
        schema: of every part. A resumed run takes that of its dataset, if it has all these columns.
        shards: what each part is made from; a part that was made from something else is made again.
        retry_errors: accept that input files and the image root have changed since the parts were made; opening
            the writer then sets `image_root_changed`, and `left_out` to the columns that the dataset has no place for.
        mixed_devices: accept scores that were computed on another kind of device.
    """

    def __init__(
        self,
        path: str | AnyPath,
        head: Mapping[str, Any],
        schema: pa.Schema,
        shards: Sequence[Mapping[str, Any]] = (),
        *,
        retry_errors: bool = False,
        mixed_devices: bool = False,
    ) -> None:
        self._retry_errors, self._mixed_devices = retry_errors, mixed_devices
        self._shards = shards
        self.image_root_changed = False
        self.left_out: list[str] = []
        self._before: dict[str, Any] | None = None  # the manifest of an earlier run
        self.path = absolute(as_path(path))
        self._use(head, schema)

    def _use(self, head: Mapping[str, Any], schema: pa.Schema) -> None:
        self.schema = schema
        self.head = manifest_head(head, schema)
        self._digest = options_digest(self.head)

    def finished(self) -> Dataset | None:
        """The dataset, if an earlier run finished it and this one has nothing to add. Writes nothing.

        Raises:
            UserError: as `open`.
        """
        before = self._before = self._read_manifest()
        if before is None:
            return None
        self._check(before)
        if (
            not before["complete"]
            or before["inputs"] != with_corrections(before, self.head)["inputs"]
            or self.image_root_changed
        ):
            return None
        if has_grown(before["inputs"], self.head["inputs"]):
            return None
        dataset = Dataset(self.path)
        to_retry = self._retry_errors and any(part.failed for part in dataset.parts)
        return dataset if dataset.is_whole() and not to_retry else None

    @contextmanager
    def open(self, *, shared: bool = False) -> Iterator[Self]:
        """Claim the folder for this run, or for several, and check that its parts were made with the same options.

        Raises:
            UserError: the folder is in use, holds other files, or parts made from other inputs or options.
        """
        # A lost manifest is written again over the parts that are there.
        with claim(self.path, [MANIFEST, RECEIPTS], shared=shared):
            self._before = self._read_manifest()  # again: another run may have ended since
            if self._before is not None:
                self._check(self._before)
            else:
                self._write_manifest(complete=False, parts=[], **self._shard_count())
            for name in (DATA, RECEIPTS):
                (self.path / name).mkdir(exist_ok=True)
            yield self

    def _read_manifest(self) -> dict[str, Any] | None:
        """The manifest as it is when this run starts; None if no earlier run has begun the dataset."""
        try:
            return read_manifest(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _check(self, before: Mapping[str, Any]) -> None:
        self._adopt(before)
        corrected = with_corrections(before, self.head)
        if self._retry_errors:
            self.image_root_changed = before["options"].get(IMAGE_ROOT) != self.head["options"].get(IMAGE_ROOT)
            before = corrected
        if self._mixed_devices and len({str(e["versions"]) for e in self.head.get("computed_with", [])}) < 2:
            before = {**before, "computed_with": self.head.get("computed_with")}
        differing = differences(before, self.head)
        if differing:
            advice = "choose another --out, or delete the folder to start over."
            schema = self._kept_schema(before, retry_errors=True)
            if schema is not None and not differences(corrected, manifest_head(self.head, schema)):
                advice = "add --retry-errors to redo only what failed or changed, or choose another --out."
            raise UserError(f"{self.path}: this folder holds a different dataset ({'; '.join(differing)}); {advice}")

    def _adopt(self, before: Mapping[str, Any]) -> None:
        """Take the schema of the dataset that is resumed, and with `mixed_devices` the devices it names."""
        head = dict(self.head)
        schema = self._kept_schema(before, retry_errors=self._retry_errors) or self.schema  # a difference is named
        self.left_out = self.left_out or [name for name in self.schema.names if name not in schema.names]
        if self._mixed_devices:
            others, own = before.get("computed_with", []), head.get("computed_with", [])
            head["computed_with"] = [*others, *(environment for environment in own if environment not in others)]
        self._use(head, schema)

    def _kept_schema(self, before: Mapping[str, Any], *, retry_errors: bool) -> pa.Schema | None:
        """The schema of the dataset that is resumed, if this run's columns are among its; new ones may be left out."""
        schema = arrow_schema(before)
        if schema is None:
            return None
        same = all(schema.field(f.name) == f if f.name in schema.names else retry_errors for f in self.schema)
        return schema if same else None

    def committed(self, count: int) -> dict[int, PartInfo]:
        """The parts of the first `count` shards that earlier runs committed, by number."""
        receipts = set(names(self.path / RECEIPTS))
        indices = [index for index in range(count) if PurePosixPath(receipt_name(index)).name in receipts]
        there = sizes(self.path / DATA) if indices else {}
        with ThreadPoolExecutor(_READERS, thread_name_prefix="receipts") as pool:
            infos = zip(indices, pool.map(lambda index: self._committed(index, there), indices), strict=True)
            return {index: info for index, info in infos if info is not None}

    def _committed(self, index: int, there: Mapping[str, int]) -> PartInfo | None:
        receipt = self._receipt(index, there)
        if receipt is not None and receipt.shard == UNKNOWN_SHARD:
            receipt = replace(receipt, shard=self._shard(index))
            write_receipt(self.path, index, receipt)
        if receipt is None or receipt.shard != self._shard(index):
            return None
        return receipt.part.without_counts()

    def earlier(self, index: int) -> PartInfo | None:
        """The part that an earlier run with the same options committed as number `index`, even of another shard."""
        try:
            size = storage.size(str(self.path / part_name(index)))
        except FileNotFoundError:
            return None
        receipt = self._receipt(index, {PurePosixPath(part_name(index)).name: size})
        return receipt.part.without_counts() if receipt is not None else None

    def _receipt(self, index: int, there: Mapping[str, int]) -> Receipt | None:
        """The receipt of part `index`, if it belongs to this dataset and to the part that is there."""
        try:
            receipt = read_receipt(self.path, index)
        except UserError as error:
            notice(f"{str(error).rpartition(';')[0]}; its part is made again.")
            return None
        if receipt is None or receipt.options != self._digest:
            return None
        name = PurePosixPath(receipt.part.name).name
        return receipt if there.get(name) == receipt.part.bytes else None

    def _shard(self, index: int) -> dict[str, Any]:
        return dict(self._shards[index]) if index < len(self._shards) else {}

    def part(self, index: int) -> PartWriter:
        """A writer for the part of shard `index`; it commits when its `with` block ends without an error."""
        return PartWriter(self.path, index, self.schema, self._shard(index), self._digest)

    def take_over(self, index: int, file: AnyPath, info: PartInfo) -> None:
        """Commit the part of another dataset as part `index`: a hard link, a copy that its store makes, or a copy.

        Args:
            file: the part; it has this dataset's schema.
            info: what it holds, from its own receipt or manifest.
        """
        name = part_name(index)
        with duplicate(file, self.path / name, self.path) as whole:
            sync(whole)
            commit(self.path, index, whole, Receipt(replace(info, name=name), self._shard(index), self._digest))

    def reopen(self) -> None:
        """Mark the dataset as unfinished before its parts change, so that a killed run leaves no wrong manifest."""
        # With the earlier image root: until every part is done, a rerun must see that it has changed.
        options = (self._before or self.head)["options"]
        self._write_manifest(complete=False, parts=[], options=options, **self._shard_count())

    def _shard_count(self) -> dict[str, int]:
        """For `finish` of a run that many processes share: how many parts there will be."""
        return {SHARDS: len(self._shards)} if self._shards else {}

    def has_all(self, count: int) -> bool:
        """Whether every one of `count` parts has a receipt."""
        found = set(names(self.path / RECEIPTS))
        return all(PurePosixPath(receipt_name(index)).name in found for index in range(count))

    def finish(self, count: int, **facts: Any) -> Dataset:
        """Write the final manifest of `count` parts from their receipts, and open the dataset.

        `facts` are recorded as well; of score counts, the sum of those in the receipts if they all have some.
        """
        self._delete_surplus(count)
        for name in (DATA, RECEIPTS):
            sync(self.path / name)
        lines, total = [], None
        for receipt in self._receipts(count):  # until these are synced, a power cut can only lose whole parts
            lines.append(receipt.part)
            total = _include_counts(total, receipt.part)
        if total:
            facts[SCORE_COUNTS] = {column: counts.to_json() for column, counts in total.items()}
        facts = {name: fact for name, fact in facts.items() if fact != {}}
        if self.head.get("thresholds"):
            write_json(self.path / THRESHOLDS, self.head["thresholds"])
        self._write_manifest(complete=True, parts=lines, **facts)
        return Dataset(self.path)

    def _receipts(self, count: int) -> Iterator[Receipt]:
        """The receipts of all parts, now on disk: several at once, which costs a fraction of one by one."""
        there = sizes(self.path / DATA)
        with ThreadPoolExecutor(_READERS, thread_name_prefix="receipts") as pool:
            for index, receipt in enumerate(pool.map(lambda index: self._synced_receipt(index, there), range(count))):
                if receipt is None:
                    raise UserError(f"{self.path / part_name(index)}: something else has changed it; run again.")
                yield receipt

    def _synced_receipt(self, index: int, there: Mapping[str, int]) -> Receipt | None:
        receipt = self._receipt(index, there)
        if receipt is not None:
            sync(self.path / receipt_name(index))
        return receipt

    def _delete_surplus(self, count: int) -> None:
        """Delete parts beyond the last shard: the input was longer in an earlier run."""
        kept = {PurePosixPath(part_name(index)).stem for index in range(count)}
        there = [(folder, name) for folder in (RECEIPTS, DATA) for name in names(self.path / folder)]
        files = [
            self.path / folder / name
            for folder, name in there
            if name.startswith("part-") and PurePosixPath(name).stem not in kept
        ]
        if files:
            self.reopen()
        for file in files:  # receipts first
            file.unlink()

    def _write_manifest(self, *, complete: bool, parts: Sequence[PartInfo], **facts: Any) -> None:
        file = self.path / MANIFEST
        manifest = {**self.head, "complete": complete, **facts, "parts": [p.to_json() for p in parts]}
        manifest[SEAL] = seal(manifest)
        # Datasets made from this one know it by the checksum of the file, so what says the same keeps its bytes.
        try:
            unchanged = read_json(file) == json.loads(json.dumps(manifest))
        except FileNotFoundError:
            unchanged = False
        if not unchanged:
            write_json(file, manifest)


def _include_counts(total: dict[str, Counts] | None, part: PartInfo) -> dict[str, Counts]:
    """Sums of score counts so far, for the columns in which every part counted all its ok rows."""
    stored = part.facts.get(SCORE_COUNTS, {})
    if total is None:
        total = {column: Counts.of([]) for column in stored}
    return {c: counts for c, counts in total.items() if c in stored and counts.include(stored[c]) == part.ok}
