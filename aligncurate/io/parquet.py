"""Reading Parquet files, local or remote, in small memory, and telling a damaged file from a failed disk or network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from aligncurate.errors import UserError
from aligncurate.io import storage

PARQUET_ERRORS = (pa.ArrowException, OSError, UnicodeDecodeError)
"""What pyarrow raises for a damaged file; `is_damage` tells its OSErrors from those of the disk or network."""

_PAGE_BUFFER = 1 << 20  # bytes of a column to read at once, where a row group may hold more than memory
_WHOLE = 32 << 20  # bytes of a row group whose columns are read whole
_BATCH = 256  # rows read at a time
_BATCH_BYTES = 32 << 20  # of a batch, if its rows are of average size


def is_damage(error: Exception) -> bool:
    """Whether one of PARQUET_ERRORS is about the file's bytes: an OSError of pyarrow's own has no errno."""
    return not isinstance(error, OSError) or error.errno is None


def first_line(error: Exception) -> str:
    """What pyarrow says is wrong, without its details."""
    return str(error).partition("\n")[0]


def page_buffer(size: int) -> int:
    """The `buffer_size` to read row groups of up to `size` bytes with; 0 reads a column whole.

    Small ones are read whole, because of a damaged page Arrow believes the size, up to 2 GiB, and in a buffered column
    takes that memory and fills it with zeros before it finds the column's end.
    """
    return _PAGE_BUFFER if size > _WHOLE else 0


@contextmanager
def open_parquet(uri: str, *, buffer_size: int = 0) -> Iterator[pq.ParquetFile]:
    """Open the Parquet file at `uri` for reading.

    Args:
        buffer_size: bytes of a column that are read at once; 0 reads a column of a row group whole.

    Raises:
        UserError: the file is damaged or not Parquet, whether opening it or reading it inside the block shows that.
        OSError: the file is not there, or its disk or network failed.
    """
    with storage.open_file(uri) as file:
        try:
            yield pq.ParquetFile(file, buffer_size=buffer_size, pre_buffer=False)
        except PARQUET_ERRORS as error:
            if not is_damage(error):
                raise
            if "decryption" in str(error):
                raise UserError(f"{uri}: the file is encrypted; write it again without encryption.") from None
            raise UserError(f"{uri}: damaged, or not a Parquet file ({first_line(error)}).") from None


def batches(
    file: pq.ParquetFile, group: int, begin: int, columns: Sequence[str] | None = None
) -> Iterator[tuple[int, pa.RecordBatch | str]]:
    """(number of the first row, batch) of a row group, in order, in batches of few bytes.

    Where the file is damaged, the last batch is what is wrong, and stands for all rows from there to the group's end.

    Args:
        file: opened with `open_parquet`.
        group: number of the row group.
        begin: number of its first row in the file.
        columns: names of the columns to read; all by default.

    Raises OSError if the disk or network fails.
    """
    facts = file.metadata.row_group(group)
    end = begin + facts.num_rows
    done, cause = begin, "it holds fewer rows than it says"
    size = max(1, min(_BATCH, _BATCH_BYTES // (int(facts.total_byte_size) // max(int(facts.num_rows), 1) + 1)))
    # After a failure again row by row: rows before the damage are read, and a batch may be too large for Arrow.
    for rows in (size, 1) if size > 1 else (1,):
        number = begin
        try:
            for batch in file.iter_batches(batch_size=rows, row_groups=[group], columns=columns, use_threads=False):
                last = min(number + batch.num_rows, end)
                if done < last:
                    first, done = done, last
                    yield first, batch.slice(first - number, last - first)
                number = last
            break
        except PARQUET_ERRORS as error:
            if not is_damage(error):
                raise
            cause = first_line(error)
    if done < end:
        yield done, f"the Parquet file is damaged here ({cause})"
