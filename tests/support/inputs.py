"""Small inputs for tests: pictures as bytes, tars, and a run of the command line."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from typer.testing import CliRunner, Result

import aligncurate
from aligncurate.cli.app import app
from aligncurate.dataset.pointers import Pointer
from aligncurate.io.tar import TarWriter
from aligncurate.sources.detect import open_source
from aligncurate.sources.options import SourceOptions


def picture(seed: int = 0, width: int = 48, height: int = 40, mode: str = "RGB") -> Image.Image:
    """A smooth coloured picture that differs for every seed."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    rng = np.random.default_rng(seed)
    waves = [np.sin(a * x + b * y + c) for a, b, c in rng.uniform(1, 5, (3, 3))]
    pixels = np.stack([(wave * 0.5 + 0.5) * 255 for wave in waves], -1).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    """The picture as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(seed: int = 0, **size: int) -> bytes:
    return encoded(picture(seed, **size), quality=95)


def tar_bytes(members: Iterable[tuple[str, bytes]]) -> bytes:
    """A tar of (name, content) members in the given order; names may repeat."""
    buffer = io.BytesIO()
    tar = TarWriter(buffer)
    for name, data in members:
        tar.add(name, data)
    tar.end()
    return buffer.getvalue()


def write_tar(path: Path, samples: Mapping[str, Mapping[str, bytes]]) -> Path:
    """A webdataset tar: `{key: {extension: content}}`."""
    path.write_bytes(tar_bytes((f"{k}.{e}", data) for k, files in samples.items() for e, data in files.items()))
    return path


def pairs(count: int, first: int = 0) -> dict[str, dict[str, bytes]]:
    """Samples `s0`, `s1`, … with a JPEG and the caption `caption <n>`."""
    return {f"s{i}": {"jpg": jpeg(i), "txt": f"caption {i}".encode()} for i in range(first, first + count)}


def read_all(source: Any, **options: Any) -> list[Any]:
    """All pairs of a source; checks that `count` agrees."""
    opened = open_source(source if isinstance(source, list) else str(source), SourceOptions(**options))
    all_rows = []
    for shard in opened.shards:
        rows = list(opened.read(shard))
        assert opened.count(shard) == len(rows)
        all_rows += rows
    return all_rows


def ingested(source: Any, out: Path, **options: Any) -> pl.DataFrame:
    """The rows of `aligncurate.ingest`; checks that the image of every ok row can be read back."""
    run = aligncurate.ingest(source, out, source=SourceOptions(**options), quiet=True)
    assert run.dataset is not None, run.failures
    frame = run.dataset.scan().collect()
    for row in frame.iter_rows(named=True):
        if row["status"] == "ok":
            Pointer.of(row).read()  # raises if the sha256 differs
    return frame


def statuses(frame: pl.DataFrame) -> list[str]:
    return frame["status"].to_list()


def parquet_bytes(**columns: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def cli(*arguments: object) -> Result:
    """Run a command; an exception other than SystemExit fails the test."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise AssertionError(f"a traceback instead of a sentence: {result.exception!r}") from result.exception
    return result


def complaint(result: Result, code: int = 2) -> str:
    """The error message of a run that ended with exit code `code`; it must be one line, a sentence or a question.

    Notices may come before it.
    """
    assert result.exit_code == code, (result.exit_code, result.output)
    notices, _, error = ("\n" + result.stderr.strip()).rpartition("\nerror: ")
    assert not notices or notices.startswith("\nnote: "), result.stderr
    lines = f"error: {error}".splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert lines[0].endswith((".", "?")) and "Traceback" not in result.output
    return lines[0].removeprefix("error: ")
