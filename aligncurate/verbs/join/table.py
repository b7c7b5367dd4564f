"""The table whose columns are joined: held in memory, its rows found by a sorted list of hashes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from aligncurate.dataset.record import COLUMNS, EXTRA, OWN_EMBEDDINGS
from aligncurate.errors import UserError
from aligncurate.io.files import local_copy
from aligncurate.io.parquet import PARQUET_ERRORS
from aligncurate.io.paths import AnyPath
from aligncurate.sources.arrow_types import storable
from aligncurate.verbs.join.options import JoinOptions

_HEADER = 1 << 20  # bytes of a CSV's first line that are looked at


class Table:
    """Some columns of a Parquet, CSV or TSV file, whose rows are found by the values of another column.

    Attributes:
        schema: of the columns that are added.
        repeated: rows that are not used, because an earlier one has the same value.

    Raises UserError if the file cannot be read, or lacks a column, or has a column that is `taken` already.
    """

    def __init__(self, path: AnyPath, options: JoinOptions, *, taken: Sequence[str]) -> None:
        _check_file(path)
        try:
            with local_copy(path) as file:
                frame, wanted = _read(path, file, options, taken)
                whole = frame.select(pl.col(options.on).cast(pl.String).alias("on"), pl.struct(wanted).alias("rows"))
                collected = whole.filter(pl.col("on").is_not_null()).collect()
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException, *PARQUET_ERRORS) as error:
            raise UserError(f"{path}: cannot be read as a table ({str(error).strip().splitlines()[0]}).") from None
        wide = pl.selectors.by_dtype(pl.Int128, pl.UInt128)  # integers beyond 64 bits, which Arrow does not have
        self._on, self._rows = collected["on"], collected["rows"].struct.unnest().with_columns(wide.cast(pl.String))
        hashes = _hashes(self._on)
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]
        firsts = self._on.is_first_distinct()
        self.repeated = len(firsts) - int(firsts.sum())
        if self.repeated and options.duplicates == "refuse":
            example = self._on.filter(~firsts)[0]
            raise UserError(
                f"{path}: {self.repeated:,} rows repeat a value of {options.on} (such as {example}); "
                "--duplicates first takes the first of each."
            )
        kinds = {}
        for column in self._rows.head(0).to_arrow().schema:
            kind = storable(column.type)
            if kind is None:
                raise UserError(f"{path}: column {column.name} of {column.type} cannot be added; leave it out.")
            kinds[column.name] = kind
        self.schema = pa.schema(list(kinds.items()))

    def find(self, values: pa.Array) -> NDArray[np.int64]:
        """The row of the table for each value, the first of several; -1 where there is none or the value is null."""
        wanted = pl.Series(values).cast(pl.String)
        hashes = _hashes(wanted)
        places = np.searchsorted(self._hashes, hashes)
        found = np.full(len(wanted), -1, np.int64)
        open_ = np.flatnonzero(wanted.is_not_null().to_numpy())
        while True:  # once; again only for different values with the same hash
            open_ = open_[places[open_] < len(self._hashes)]
            open_ = open_[self._hashes[places[open_]] == hashes[open_]]
            if not len(open_):
                return found
            rows = self._order[places[open_]]
            same = (self._on.gather(rows) == wanted.gather(open_)).to_numpy()
            found[open_[same]] = rows[same]
            open_ = open_[~same]
            places[open_] += 1

    def take(self, rows: NDArray[np.int64]) -> list[pa.ChunkedArray]:
        """The columns of `schema` at these rows; null at -1."""
        places = pl.Series(rows).replace(-1, None)
        table = self._rows.select(pl.all().gather(places)).to_arrow()
        options = (pc.CastOptions(column.type, allow_time_truncate=True) for column in self.schema)
        return [table[name].cast(options=each) for name, each in zip(self.schema.names, options, strict=True)]


def _hashes(values: pl.Series) -> NDArray[np.uint64]:
    return values.hash().to_numpy()


def _check_file(path: AnyPath) -> None:
    if not path.exists():
        raise UserError(f"{path}: there is no such file.")
    if path.is_dir():
        raise UserError(f"{path}: this is a folder; give a Parquet, CSV or TSV file.")


def _read(path: AnyPath, file: Path, options: JoinOptions, taken: Sequence[str]) -> tuple[pl.LazyFrame, list[str]]:
    """The table in `file`, a local copy of `path`, and its columns to add."""
    with file.open("rb") as opened:
        first = opened.readline(_HEADER)
    if first.startswith(b"PAR1"):  # read by Arrow: of a damaged file, polars prints a panic
        with pq.ParquetFile(file) as parquet:
            wanted = _columns(path, parquet.schema_arrow.names, options, taken)
            table = parquet.read([options.on, *wanted])
            table.validate(full=True)
            _check_names(table.schema)
        without_metadata = pa.Table.from_arrays(table.columns, names=table.column_names)  # may not be UTF-8 either
        return pl.DataFrame(without_metadata).lazy(), wanted
    if path.suffix.lower() not in (".csv", ".tsv"):
        raise UserError(f"{path}: neither a Parquet nor a CSV or TSV file.")
    separator = max("\t,;|", key=lambda sign: first.count(sign.encode()))
    # All rows decide on the types; what is looked up stays text, since 007 is not 7.
    overrides = {options.on: pl.String}
    frame = pl.scan_csv(file, separator=separator, glob=False, infer_schema_length=None, schema_overrides=overrides)
    return frame, _columns(path, frame.collect_schema().names(), options, taken)


def _check_names(fields: Iterable[pa.Field]) -> None:
    """Raises UnicodeDecodeError if a name, also of a nested field, is not UTF-8: polars would print a panic."""
    for field in fields:
        field.name  # noqa: B018 (decoded here)
        _check_names(field.type.field(number) for number in range(field.type.num_fields))


def _columns(path: AnyPath, names: Sequence[str], options: JoinOptions, taken: Sequence[str]) -> list[str]:
    """The columns to add."""
    for name in (options.on, *(options.columns or ())):
        if name not in names:
            close = get_close_matches(name, names, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; it has {', '.join(names)}."
            raise UserError(f"{path}: there is no column {name}{hint}")
    wanted = [name for name in options.columns or names if name != options.on]
    if not wanted:
        raise UserError(f"{path}: there is no column to add besides {options.on}.")
    reserved = {name.lower() for name in (*taken, *COLUMNS, *OWN_EMBEDDINGS, EXTRA)}
    if clashes := [name for name in wanted if name.lower() in reserved]:
        rest = [name for name in wanted if name not in clashes]
        hint = f"choose others with --columns {','.join(rest)}" if rest else "rename them in the table"
        raise UserError(f"{path}: {', '.join(clashes)}: datasets have columns of this name already; {hint}.")
    return wanted
