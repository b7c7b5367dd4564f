"""Random damage in any input gives rows or plain errors, never a traceback."""

from __future__ import annotations

import io
import json

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aligncurate.dataset.record import FINE
from aligncurate.errors import ShardError, UserError
from aligncurate.sources.detect import open_source
from tests.support.inputs import jpeg, parquet_bytes, tar_bytes


@pytest.mark.parametrize("kind", ["tar", "parquet", "json", "jsonl", "csv", "tsv", "sidecar"])
def test_random_damage_gives_only_plain_errors(tmp_path, kind) -> None:
    """Whatever bytes are wrong, reading ends with rows or with one of our own errors."""
    (tmp_path / "0.jpg").write_bytes(jpeg(width=8, height=8))
    rows = [{"id": i, "image": "0.jpg", "caption": f"c {i}", "n": i / 2, "tags": ["a", "b"]} for i in range(4)]
    flat = pl.DataFrame([{k: v for k, v in row.items() if k != "tags"} for row in rows])
    buffer = io.BytesIO()
    tar = tar_bytes(
        (f"{i}.{e}", d) for i in range(3) for e, d in (("jpg", b"image"), ("txt", b"c"), ("json", b'{"a":1}'))
    )
    pl.DataFrame([{"key": str(i), "url": "u"} for i in range(3)]).write_parquet(buffer)
    sidecar = buffer.getvalue()
    buffer = io.BytesIO()
    pl.DataFrame(rows).write_parquet(buffer)
    good = {
        "tar": tar,
        "parquet": buffer.getvalue(),
        "json": json.dumps(rows).encode(),
        "jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
        "csv": flat.write_csv().encode(),
        "tsv": flat.write_csv(separator="\t").encode(),
        "sidecar": sidecar,
    }[kind]
    path = tmp_path / ("a.parquet" if kind == "sidecar" else f"a.{kind}")
    source = tmp_path / "a.tar" if kind == "sidecar" else path
    if kind == "sidecar":
        source.write_bytes(tar)
    rng = np.random.default_rng(0)
    read = 0  # damaged files from which at least one pair was read
    for _ in range(120):
        data = np.frombuffer(good, np.uint8).copy()
        data[rng.integers(len(data), size=rng.integers(1, 6))] = rng.choice([0, 10, 34, 44, 93, 125, 255, *range(5)])
        path.write_bytes(data.tobytes()[: rng.choice([len(data), rng.integers(len(data))])])
        pairs_read = 0
        try:
            opened = open_source(str(source))
            for shard in opened.shards:
                for pair in opened.read(shard):
                    assert pair.key and pair.source
                    assert (pair.status in FINE) == (pair.error is None)
                    pairs_read += 1
        except (UserError, ShardError):
            pass
        read += pairs_read > 0
    least = {"tar": 100, "parquet": 4, "json": 1, "jsonl": 60, "csv": 30, "tsv": 30, "sidecar": 100}
    assert read >= least[kind]


def test_a_parquet_file_that_is_damaged_after_it_was_opened_fails_as_a_shard(tmp_path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet_bytes(image=[jpeg()], caption=["a"]))
    source = open_source(str(path))
    path.write_bytes(b"PAR1 no footer PAR1")
    with pytest.raises(ShardError, match=r"a\.parquet: damaged, or not a Parquet file \("):
        list(source.read(source.shards[0]))


def test_a_damaged_first_row_group_fails_only_its_rows(tmp_path) -> None:
    """Also where opening looks at the first image names, to find the images' folder."""
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
    path = tmp_path / "a.parquet"
    table = pa.table({"image": [f"{n}.jpg" for n in range(4)], "caption": ["a"] * 4})
    pq.write_table(table, path, row_group_size=2, use_dictionary=False)
    data = path.read_bytes()
    path.write_bytes(data[:4] + bytes(20) + data[24:])
    source = open_source(str(path))
    assert [p.status for p in source.read(source.shards[0])] == ["read_error"] * 2 + ["ok"] * 2
