"""Datasets as sources: what is kept of them, and what is told."""

from __future__ import annotations

from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import aligncurate
from tests.support.inputs import jpeg, write_tar


@pytest.fixture
def scored(tmp_path, mini) -> aligncurate.Dataset:
    """A dataset with embeddings; one row has none."""
    samples = {name: {"jpg": jpeg(n), "txt": b"a square"} for n, name in enumerate("abc")}
    tar = write_tar(tmp_path / "a.tar", samples | {"d": {"jpg": b"no image", "txt": b"x"}})
    return aligncurate.score(tar, tmp_path / "scored", **mini, embeddings="fp16", quiet=True).dataset


def test_ingest_keeps_embeddings(scored, tmp_path) -> None:
    kept = aligncurate.ingest(scored.path, tmp_path / "in", quiet=True).dataset
    assert kept.scan().collect().equals(scored.scan().collect())
    assert kept.schema.field("image_embedding") == scored.schema.field("image_embedding")
    assert kept.scan().collect()["image_embedding"].null_count() == 1


def test_ingest_keeps_embeddings_beside_a_tar_without(scored, tmp_path) -> None:
    tar = write_tar(tmp_path / "b.tar", {"z": {"jpg": jpeg(9), "txt": b"z"}})
    both = aligncurate.ingest([scored.path, tar], tmp_path / "in", quiet=True).dataset.scan().collect()
    before = scored.scan().collect()
    assert both.head(4)["text_embedding"].equals(before["text_embedding"]) and both["text_embedding"][4] is None


@pytest.mark.parametrize("embeddings", ["none", "fp16"])
def test_scoring_again_replaces_embeddings_and_says_when_there_are_none(
    scored, tmp_path, mini, capsys, embeddings
) -> None:
    again = aligncurate.score(scored.path, tmp_path / "again", **mini, embeddings=embeddings).dataset
    told = "image_embedding and text_embedding are not kept" in " ".join(capsys.readouterr().err.split())
    assert told == (embeddings == "none") == ("image_embedding" not in again.schema.names)
    if embeddings == "fp16":
        found = again.scan().collect()["image_embedding"]
        assert found.null_count() == 1 and found.dtype == pl.Array(pl.Float16, 16)


@pytest.mark.parametrize(
    "values", [["x", "y"], [[1.5, None], None], pa.array([[1.5, 2.5], None], pa.list_(pa.float32(), 2))]
)
def test_columns_of_the_same_name_are_kept_as_they_are(tmp_path, values: Any) -> None:
    table = pa.table({"image": [jpeg(0), jpeg(1)], "caption": ["a", "b"], "image_embedding": values})
    pq.write_table(table, tmp_path / "a.parquet")
    first = aligncurate.ingest(tmp_path / "a.parquet", tmp_path / "one", quiet=True).dataset
    second = aligncurate.ingest(first.path, tmp_path / "two", quiet=True).dataset
    assert second.scan().collect().equals(first.scan().collect())
    assert second.scan().collect()["image_embedding"].to_list() == table["image_embedding"].to_pylist()
