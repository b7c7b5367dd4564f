"""A dataset: a folder of Parquet parts with a manifest; how it is committed, resumed and scanned.

A part is written under a temporary name, synced and renamed, so a part that is there is whole. The manifest
is written twice: when a run begins (`complete: false`, which pins the options that later runs must share) and
when all parts are there. Nothing in the folder depends on time or on which run wrote it.
"""

import fcntl
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from aligncurate import __version__
from aligncurate.errors import UserError
from aligncurate.levels import Counts
from aligncurate.pairs import FINE, Status

if TYPE_CHECKING:
    import polars as pl

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
THRESHOLDS = "thresholds.json"
_TEMPORARY = ".tmp-"
_LOCK = ".lock"
_FACTS = b"aligncurate.facts"
SCORE_COUNTS = "score_counts"
_BATCH = 10_000  # values that Arrow encodes at once; its 1,024 make more work
_RANDOM = ("score", "sha256")
_MEASURED = ("row", "width", "height", "score", "level", "status")  # columns whose range is worth knowing when scanning
_LIST_OF_NUMBERS = re.compile(r"\[\n\s*((?:[-+.\de]+,\n\s*)*[-+.\de]+)\n\s*\]")  # strings have no line breaks


@dataclass(frozen=True)
class PartInfo:
    """What the manifest says of one part."""

    name: str
    rows: int
    bytes: int
    sha256: str
    statuses: dict[str, int]
    facts: dict[str, Any] = field(default_factory=dict)
    """What the verb noted. The counts of scores (`score_counts`) are in the part itself; the manifest has their sum."""

    @property
    def ok(self) -> int:
        return self.statuses.get(Status.OK, 0)

    @property
    def failed(self) -> int:
        return self.rows - sum(self.statuses.get(s, 0) for s in FINE)

    def to_json(self) -> dict[str, Any]:
        line = {"name": self.name, "rows": self.rows, "ok": self.ok, "bytes": self.bytes}
        line |= {"sha256": self.sha256, "statuses": self.statuses}
        return line | {name: fact for name, fact in self.facts.items() if name != SCORE_COUNTS}

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> Self:
        known = ("name", "rows", "bytes", "sha256", "statuses")
        facts = {k: v for k, v in line.items() if k not in (*known, "ok")}
        return cls(**{k: line[k] for k in known}, facts=facts)


def part_name(index: int) -> str:
    """File name of the part that input shard `index` becomes."""
    return f"part-{index:05d}.parquet"


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
            hint = "a dataset is a folder that `aligncurate score` or `ingest` made"
            what = "has no manifest.json" if self.path.is_dir() else "is not there"
            raise UserError(f"{self.path}: this is not a dataset, it {what}; {hint}.")
        self.manifest = _read_json(file)
        found = self.manifest.get("schema_version")
        if found != SCHEMA_VERSION:
            raise UserError(
                f"{file}: schema version {found}, but this aligncurate reads version {SCHEMA_VERSION}; "
                "make the dataset again, or install the version that made it."
            )
        if not self.manifest["complete"]:
            raise UserError(
                f"{self.path}: this dataset is not finished; run its `aligncurate {self.manifest['verb']}` "
                "command again, and it goes on where it stopped."
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
        with _readable(self.files[index], encoded) as part:
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
            "thresholds": self.manifest.get("thresholds"),
            "history": [*self.manifest.get("history", []), step],
        }
        return head | changes


def row_groups(file: Path, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """The row groups of a part, one at a time. Raises UserError when the file is damaged."""
    with _readable(file) as part:
        for group in range(part.num_row_groups):
            yield part.read_row_group(group, columns=columns, use_threads=False)


@contextmanager
def _readable(file: Path, encoded: Sequence[str] = ()) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(file, read_dictionary=list(encoded), pre_buffer=False) as part:
            yield part
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file}: the part cannot be read ({error}); make the dataset again.") from None


def open_dataset(path: str | Path) -> Dataset:
    """The dataset in folder `path`. Raises UserError when there is none, or it is unfinished."""
    return Dataset(path)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not a JSON file ({error}); make the dataset again.") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: it holds no object; make the dataset again.")
    return found


class DatasetWriter:
    """Commits the parts of one dataset, over as many runs as it takes.

    Args:
        path: the output folder.
        head: the manifest without its parts: verb, options, inputs, encoder, …
        schema: of every part.
        mended: input files may have changed since the parts were made; `changed` then names them.

    Raises UserError when the folder holds something else, or parts that other options made.
    """

    def __init__(self, path: str | Path, head: Mapping[str, Any], schema: pa.Schema, *, mended: bool = False) -> None:
        self._mended = mended
        self.changed: set[str] = set()
        self.path = Path(os.path.abspath(path))
        self.schema = schema
        columns = {f.name: str(f.type) for f in schema}
        self.head = json.loads(
            json.dumps({"schema_version": SCHEMA_VERSION, **head, "versions": library_versions(), "columns": columns})
        )

    @contextmanager
    def open(self) -> Iterator[Self]:
        """Take the folder for this run: check, lock, and clear what a killed run left half-written."""
        make_folder(self.path)
        with lock(self.path):
            self._check()
            for leftover in self.path.glob(f"{_TEMPORARY}*"):
                leftover.unlink(missing_ok=True)
            if not (self.path / MANIFEST).is_file():
                self._write_manifest(complete=False, parts=[])
            yield self

    def _check(self) -> None:
        file = self.path / MANIFEST
        if not file.is_file():
            strangers = [p.name for p in self.path.iterdir()]
            strangers = [n for n in strangers if not n.startswith((_TEMPORARY, _LOCK))]
            if strangers:
                raise UserError(
                    f"{self.path}: the output folder holds other files ({strangers[0]}); name a new folder."
                )
            return
        before = _read_json(file)
        if self._mended:
            self.changed = changed_files(before.get("inputs", []), self.head["inputs"])
            if self.changed:
                before["inputs"] = self.head["inputs"]
        differing = _differences(before, self.head)
        if differing:
            raise UserError(
                f"{self.path}: its parts were made with other options ({'; '.join(differing)}); "
                "name another --out, or delete the folder to make it again."
            )

    def committed(self, index: int) -> PartInfo | None:
        """The part of shard `index`, when an earlier run committed it."""
        return read_part_info(self.path / part_name(index), self._lines)

    @cached_property
    def _before(self) -> dict[str, Any]:
        """The manifest as this run found it."""
        return _read_json(self.path / MANIFEST)

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

    def reopen(self) -> None:
        """Say that parts are about to change, before any does: a run that dies now leaves no manifest that lies."""
        _ = self._lines  # what the finished manifest knew of the parts that stay
        self._write_manifest(complete=False, parts=[])

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
        sync_folder(self.path)  # the parts' names; until now a power cut could only take whole parts back
        self._write_manifest(complete=True, parts=parts, **facts)
        return Dataset(self.path)

    def _score_counts(self, parts: Sequence[PartInfo]) -> dict[str, Any]:
        """Sums of the counts of scores that all parts have; what does not count each row that is ok is left out."""
        total: dict[str, Counts] | None = None
        for part in parts:
            noted = part.facts.get(SCORE_COUNTS)
            if noted is None and self._counted and part.name in self._lines:
                noted = _read_note(self.path / part.name)["facts"].get(SCORE_COUNTS)
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


def make_folder(path: Path) -> None:
    """Make an output folder, if it is not there. Raises UserError where a file is in the way."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: --out must be a folder, but this is a file.")
    path.mkdir(parents=True, exist_ok=True)


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold `folder` for one run; the kernel lets go of it however the run ends."""
    path = folder / _LOCK
    while True:
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{folder}: another run is writing to this folder; wait for it to end.") from None
            # Another run may have ended, and removed the file, between our opening and locking it.
            if not path.exists() or os.fstat(file.fileno()).st_ino != path.stat().st_ino:
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


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


class PartWriter:
    """Writes one part under a temporary name and commits it atomically.

    Use as a context manager: leaving it normally commits and sets `info`; an exception leaves nothing behind.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path = path
        self.schema = schema
        self.facts: dict[str, Any] = {}
        self.info: PartInfo | None = None
        self._temporary = path.with_name(f"{_TEMPORARY}{path.name}")
        self._statuses: Counter[str] = Counter()
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> Self:
        self._file = _HashingFile(self._temporary)
        self._writer = pq.ParquetWriter(
            self._file,
            self.schema,
            # What is as good as random is stored as it is: compressing it costs time, and saves nothing.
            compression={leaf: "none" if leaf in _RANDOM else "zstd" for leaf in _leaves(self.schema)},
            # Keys, captions and the like do not repeat: a dictionary for them only costs time and space.
            use_dictionary=[n for n in ("source", "status", "error") if n in self.schema.names],
            # The least and greatest of captions, hashes and the like help no reader, and cost a third of writing.
            write_statistics=[n for n in _MEASURED if n in self.schema.names],
            write_batch_size=_BATCH,
        )
        return self

    def write(self, table: pa.Table) -> None:
        """Append rows as one row group."""
        assert self._writer is not None
        self._writer.write_table(table)
        for item in table["status"].value_counts().to_pylist():
            self._statuses[item["values"]] += item["counts"]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._writer is not None
        try:
            if error is None:
                # The facts travel in the part itself, so that a resumed run knows them without a second file.
                statuses = dict(sorted(self._statuses.items()))
                note = {"statuses": statuses, "facts": self.facts}
                self._writer.add_key_value_metadata({_FACTS: json.dumps(note).encode()})
                self._writer.close()
                self._file.commit(self.path)
                rows = sum(statuses.values())
                digest = self._file.digest.hexdigest()
                self.info = PartInfo(self.path.name, rows, self._file.count, digest, statuses, self.facts)
        finally:
            if self.info is None:
                self._file.abandon()
                with suppress(Exception):  # Arrow insists on writing a footer, which goes nowhere now
                    self._writer.close()


def _leaves(fields: Iterable[pa.Field], prefix: str = "") -> Iterator[str]:
    """Parquet's names of the columns that some fields are stored in."""
    for column in fields:
        name, kind = prefix + column.name, column.type
        while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            name, kind = f"{name}.list.element", kind.value_type
        if pa.types.is_struct(kind):
            yield from _leaves(kind, f"{name}.")
        else:
            yield name


class _HashingFile:
    """A file that hashes what is written to it, for Arrow to write into."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self.digest = hashlib.sha256()
        self.count = 0
        self.closed = False

    def write(self, data: Any) -> int:
        if self._file.closed:  # abandoned
            return len(memoryview(data))
        self.digest.update(data)
        self.count += len(memoryview(data))
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def tell(self) -> int:
        return self.count

    def close(self) -> None:
        """Arrow closes its sink; the file stays open until it is committed."""

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def commit(self, path: Path) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._path.replace(path)

    def abandon(self) -> None:
        if not self._file.closed:
            # A full disk fails again when the buffer is flushed; the first error is on its way up already.
            with suppress(OSError):
                self._file.close()
        self._path.unlink(missing_ok=True)


def read_part_info(path: Path, known: Mapping[str, PartInfo]) -> PartInfo | None:
    """What a committed part holds, or None when there is none. Reads the file only if `known` lacks it."""
    if not path.is_file():
        return None
    if path.name in known and known[path.name].bytes == path.stat().st_size:
        return known[path.name]
    note = _read_note(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    rows = sum(note["statuses"].values())
    return PartInfo(path.name, rows, path.stat().st_size, digest, note["statuses"], note["facts"])


def _read_note(path: Path) -> dict[str, Any]:
    """What a part says of itself: `statuses` and `facts`."""
    try:
        note: dict[str, Any] = json.loads((pq.read_metadata(path).metadata or {})[_FACTS])
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{path}: not a part that aligncurate wrote ({error!r}); delete it.") from None
    return note


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that becomes `path` when the block ends without an error."""
    temporary = path.with_name(f"{_TEMPORARY}{path.name}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, lists of numbers on one line, atomically."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    text = _LIST_OF_NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)
    with atomic_file(path) as temporary:
        temporary.write_text(text + "\n", "utf-8")
