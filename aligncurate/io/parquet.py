"""Parquet files at any address, opened for reading."""

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from aligncurate.errors import UserError
from aligncurate.io import storage


@contextmanager
def open_parquet(uri: str) -> Iterator[pq.ParquetFile]:
    """The Parquet file at `uri`. Raises UserError when it is none, OSError when it cannot be read."""
    with storage.open_file(uri) as file:
        try:
            parquet = pq.ParquetFile(file)
        except pa.ArrowInvalid as error:
            raise UserError(f"{uri}: this is not a Parquet file ({str(error).splitlines()[0]}).") from None
        yield parquet
