"""Opening Parquet files, local or remote, and telling a damaged file from a failed disk or network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from aligncurate.errors import UserError
from aligncurate.io import storage

PARQUET_ERRORS = (pa.ArrowException, OSError, UnicodeDecodeError)
"""What pyarrow raises for a damaged file; `is_damage` tells its OSErrors from those of the disk or network."""


PAGE_BUFFER = 1 << 20
"""Bytes of a column to read at once, where a row group may hold more than memory."""


def is_damage(error: Exception) -> bool:
    """Whether one of PARQUET_ERRORS is about the file's bytes: an OSError of pyarrow's own has no errno."""
    return not isinstance(error, OSError) or error.errno is None


def first_line(error: Exception) -> str:
    """What pyarrow says is wrong, without its details."""
    return str(error).partition("\n")[0]


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
