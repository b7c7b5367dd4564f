"""A dataset: a folder of Parquet parts with a manifest; how it is committed, resumed and scanned.

A part is written under a temporary name, synced and renamed, so a part that is there is whole. The manifest
is written twice: when a run begins (`complete: false`, which pins the options that later runs must share) and
when all parts are there. Nothing in the folder depends on time or on which run wrote it.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from aligncurate import __version__
from aligncurate.dataset.part import (
    SCORE_COUNTS,
    PartInfo,
    PartWriter,
    part_name,
    read_note,
    read_part_info,
    readable,
    row_groups,
)
from aligncurate.errors import UserError
from aligncurate.io.files import claim, read_json, sync, write_json
from aligncurate.levels import Counts

if TYPE_CHECKING:
    import polars as pl

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
THRESHOLDS = "thresholds.json"
_ROOT = "image_root"  # the one option that a run with --retry-errors may correct


def library_versions() -> dict[str, str]:
    """Versions of the libraries that scores and parts depend on."""
    names = ("torch", "torchvision", "open_clip_torch", "pillow", "simplejpeg", "numpy", "pyarrow", "polars")
    found = {"aligncurate": __version__}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


class Dataset:
    """A finished dataset, opened for reading.

    Attributes:
        path: the folder.
        manifest: the parsed `manifest.json`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        file = self.path / MANIFEST
        if not file.is_file():
            if self.path.is_file():
                raise UserError(
                    f"{self.path}: this is a file, not a dataset folder; make a dataset from it with "
                    f"`aligncurate score {self.path} --out DIR`."
                )
            what = "has no manifest.json" if self.path.is_dir() else "is not there"
            raise UserError(
                f"{self.path}: not a dataset: it {what}; give a folder made by `aligncurate score` or `ingest`."
            )
        self.manifest = read_json(file)
        found = self.manifest.get("schema_version")
        if found != SCHEMA_VERSION:
            raise UserError(
                f"{file}: schema version {found}, but this aligncurate reads version {SCHEMA_VERSION}; "
                "make the dataset again, or install the version that made it."
            )
        if not self.manifest["complete"]:
            raise UserError(
                f"{self.path}: this dataset is not finished; run its `aligncurate {self.manifest['verb']}` "
                "command again to resume."
            )
        self.parts = [PartInfo.from_json(line) for line in self.manifest["parts"]]

    @cached_property
    def schema(self) -> pa.Schema:
        """Arrow schema, the same for all parts."""
        return pq.read_schema(self.files[0]) if self.files else pa.schema([])

    @cached_property
    def files(self) -> list[Path]:
        return [self.path / part.name for part in self.parts]

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)

    @cached_property
    def levels(self) -> int:
        """N of its levels; 0 when no row has one. Levels that came with the source count too."""
        thresholds = self.manifest.get("thresholds")
        if thresholds:
            return int(thresholds["levels"])
        highest = 0
        for file in self.files:
            metadata = pq.read_metadata(file)
            # Parquet counts the leaves of nested columns, so the place is not that of the Arrow schema.
            column = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path == "level")
            for group in range(metadata.num_row_groups):
                found = metadata.row_group(group).column(column).statistics
                if found is not None and found.has_min_max:
                    highest = max(highest, int(found.max))
        return highest

    @property
    def statuses(self) -> dict[str, int]:
        """Rows by status, most frequent first."""
        total: Counter[str] = Counter()
        for part in self.parts:
            total.update(part.statuses)
        return dict(total.most_common())

    def encoder_of(self, column: str) -> dict[str, Any] | None:
        """What the manifest says of the encoder that made a column of scores; None where they came with the data."""
        encoders: dict[str, Any] = self.manifest.get("encoders") or {"score": self.manifest.get("encoder")}
        return encoders.get(column)

    def score_counts(self, column: str) -> Counts | None:
        """Counts of a column's usable scores that `score` left in the manifest; None where there are none that fit."""
        try:
            counts = Counts.from_json(self.manifest[SCORE_COUNTS][column])
        except (KeyError, TypeError, ValueError):
            return None
        return counts if counts.total == sum(part.ok for part in self.parts) else None

    def scan(self) -> "pl.LazyFrame":
        """All rows as a polars LazyFrame; nothing is read yet."""
        import polars as pl

        if not self.files:
            raise UserError(f"{self.path}: the dataset has no parts.")
        return pl.scan_parquet(self.files, glob=False)  # a folder's name may hold brackets

    def read(self, index: int, columns: Sequence[str] | None = None, encoded: Sequence[str] = ()) -> pa.Table:
        """Part number `index` as a table; columns in `encoded` as dictionaries. Raises UserError for a damaged file."""
        with readable(self.files[index], encoded) as part:
            return part.read(columns=columns, use_threads=False)

    def groups(self, index: int, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The row groups of part `index`, one at a time, so that embedded images need not all fit in memory."""
        return row_groups(self.files[index], columns)

    def fingerprint(self) -> dict[str, str]:
        """Names this very dataset: its folder and the checksum of its manifest."""
        data = (self.path / MANIFEST).read_bytes()
        return {
            "kind": "dataset",
            "uri": os.path.abspath(self.path),
            "manifest_sha256": hashlib.sha256(data).hexdigest(),
        }

    def derived(self, verb: str, options: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
        """Manifest head of a dataset that `verb` makes from this one: encoder and history ride along."""
        step = {key: self.manifest[key] for key in ("verb", "options", "inputs")}
        head = {
            "verb": verb,
            "options": dict(options),
            "inputs": [self.fingerprint()],
            "encoder": self.manifest.get("encoder"),
            **({"encoders": self.manifest["encoders"]} if "encoders" in self.manifest else {}),
            "thresholds": self.manifest.get("thresholds"),
            "history": [*self.manifest.get("history", []), step],
        }
        return head | changes


def open_dataset(path: str | Path) -> Dataset:
    """The dataset in folder `path`. Raises UserError when there is none, or it is unfinished."""
    return Dataset(path)


class DatasetWriter:
    """Commits the parts of one dataset, over as many runs as it takes.

    Args:
        path: the output folder.
        head: the manifest without its parts: verb, options, inputs, encoder, …
        schema: of every part.
        mended: input files and the image root may have changed since the parts were made; `changed` then names
            the files, and `image_root_changed` is set.

    Raises UserError when the folder holds something else, or parts that other options made.
    """

    def __init__(self, path: str | Path, head: Mapping[str, Any], schema: pa.Schema, *, mended: bool = False) -> None:
        self._mended = mended
        self.changed: set[str] = set()
        self.image_root_changed = False
        self.path = Path(os.path.abspath(path))
        self.schema = schema
        columns = {f.name: str(f.type) for f in schema}
        self.head = json.loads(
            json.dumps({"schema_version": SCHEMA_VERSION, **head, "versions": library_versions(), "columns": columns})
        )

    @contextmanager
    def open(self) -> Iterator[Self]:
        """Claim the folder for this run and check that the parts in it were made with the same options.

        Raises:
            UserError: the folder is in use, or holds something else.
        """
        with claim(self.path, [MANIFEST]):
            if (self.path / MANIFEST).is_file():
                self._check()
            else:
                self._write_manifest(complete=False, parts=[])
            yield self

    def _check(self) -> None:
        before = read_json(self.path / MANIFEST)
        if self._mended:
            self.changed = changed_files(before.get("inputs", []), self.head["inputs"])
            now = {f["uri"]: f for line in self.head["inputs"] for f in line.get("files", [])}
            for line in before.get("inputs", []):
                if "files" in line:
                    line["files"] = [now[f["uri"]] if f["uri"] in self.changed else f for f in line["files"]]
            options = before.get("options", {})
            image_root = self.head["options"].get(_ROOT)
            self.image_root_changed = options.get(_ROOT) != image_root
            if self.image_root_changed:
                options[_ROOT] = image_root
        differing = _differences(before, self.head)
        if differing:
            advice = "name another --out, or delete the folder to make it again."
            if all(difference.startswith(f"{_ROOT}:") for difference in differing):
                advice = "to correct --image-root, add --retry-errors, which redoes only the rows that failed."
            raise UserError(f"{self.path}: its parts were made with other options ({'; '.join(differing)}); {advice}")

    def committed(self, index: int) -> PartInfo | None:
        """The part of shard `index`, when an earlier run committed it."""
        return read_part_info(self.path / part_name(index), self._lines)

    @cached_property
    def _before(self) -> dict[str, Any]:
        """The manifest as this run found it."""
        return read_json(self.path / MANIFEST)

    @cached_property
    def _lines(self) -> dict[str, PartInfo]:
        """Parts that the manifest lists; only a complete one does."""
        return {line["name"]: PartInfo.from_json(line) for line in self._before["parts"]}

    @property
    def _counted(self) -> bool:
        """Whether the parts that the manifest lists have counts of scores inside."""
        return SCORE_COUNTS in self._before

    def part(self, index: int) -> "PartWriter":
        """A writer for the part of shard `index`; it commits when its `with` block ends without an error."""
        return PartWriter(self.path / part_name(index), self.schema)

    def discard(self, index: int) -> None:
        """Delete the part of shard `index`, so that no later run takes it for one of the shard as it is now."""
        (self.path / part_name(index)).unlink(missing_ok=True)

    def reopen(self) -> None:
        """Say that parts are about to change, before any does: a run that dies now leaves no manifest that lies."""
        _ = self._lines  # what the finished manifest knew of the parts that stay
        # With the image root of before: until every part is done, a rerun must know that it has changed.
        self._write_manifest(complete=False, parts=[], options=self._before["options"])

    def finish(self, parts: Sequence[PartInfo], **facts: Any) -> Dataset:
        """Write the final manifest with all parts, in order, and open the dataset."""
        names = {part.name for part in parts}
        for stranger in self.path.glob("part-*.parquet"):
            if stranger.name not in names:  # of an input that was longer when an earlier run began
                stranger.unlink()
        if self.head.get("thresholds"):
            write_json(self.path / THRESHOLDS, self.head["thresholds"])
        if counts := self._score_counts(parts):
            facts[SCORE_COUNTS] = counts
        sync(self.path)  # the parts' names; until now a power cut could only take whole parts back
        self._write_manifest(complete=True, parts=parts, **facts)
        return Dataset(self.path)

    def _score_counts(self, parts: Sequence[PartInfo]) -> dict[str, Any]:
        """Sums of the counts of scores that all parts have; what does not count each row that is ok is left out."""
        total: dict[str, Counts] | None = None
        for part in parts:
            noted = part.facts.get(SCORE_COUNTS)
            if noted is None and self._counted and part.name in self._lines:
                noted = read_note(self.path / part.name)["facts"].get(SCORE_COUNTS)
            found = {column: Counts.from_json(counts) for column, counts in (noted or {}).items()}
            found = {column: counts for column, counts in found.items() if counts.total == part.ok}
            total = found if total is None else {c: total[c] + found[c] for c in total if c in found}
            if not total:
                return {}
        return {column: counts.to_json() for column, counts in (total or {}).items()}

    def _write_manifest(self, *, complete: bool, parts: Sequence[PartInfo], **facts: Any) -> None:
        write_json(
            self.path / MANIFEST,
            {**self.head, "complete": complete, **facts, "parts": [p.to_json() for p in parts]},
        )


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    found = []
    for name in now:
        old, new = before.get(name), now[name]
        if old == new:
            continue
        if name == "inputs" and (changed := changed_files(old or [], new)):
            found += [f"{uri} has changed since" for uri in sorted(changed)[:3]]
        elif isinstance(old, dict) and isinstance(new, dict):
            keys = [k for k in {**old, **new} if old.get(k) != new.get(k)]
            found += [f"{k}: {_short(old.get(k))} before, {_short(new.get(k))} now" for k in keys]
        else:
            found.append(f"{name}: {_short(old)} before, {_short(new)} now")
    return list(dict.fromkeys(found))


def changed_files(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> set[str]:
    """Input files that are the same by name and differ in size; empty when the inputs differ in other ways."""
    old = {f["uri"]: f["bytes"] for line in before for f in line.get("files", [])}
    new = {f["uri"]: f["bytes"] for line in now for f in line.get("files", [])}
    return {uri for uri in new if old[uri] != new[uri]} if old.keys() == new.keys() else set()


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}…"
