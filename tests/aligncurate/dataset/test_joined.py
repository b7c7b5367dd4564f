"""Several datasets opened as one: the rows of all, in order, and provenance that does not contradict itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest

import aligncurate
from aligncurate.dataset.joined import open_datasets
from aligncurate.errors import UserError
from tests.support.inputs import jpeg, write_tar


def tar(folder: Path, name: str, seeds: range, **extra: str) -> Path:
    samples = {f"{name}{n}": {"jpg": jpeg(n), "txt": f"caption {n}".encode()} for n in seeds}
    if extra:
        samples = {key: {**files, "json": json.dumps(extra).encode()} for key, files in samples.items()}
    return write_tar(folder / f"{name}.tar", samples)


@pytest.fixture(scope="module")
def scored(tmp_path_factory, mini) -> dict[str, Path]:
    """`a` and `b` have the same columns, `c` has one more."""
    folder = tmp_path_factory.mktemp("joined")
    for name, seeds, extra in (("a", range(5), {}), ("b", range(5, 8), {}), ("c", range(8, 10), {"url": "http://c"})):
        aligncurate.score(tar(folder, name, seeds, **extra), folder / name, **mini, quiet=True)
    return {name: folder / name for name in "abc"}


def test_one_dataset_stays_itself(scored) -> None:
    assert type(open_datasets(scored["a"])) is type(open_datasets([scored["a"]])) is aligncurate.Dataset


def test_all_rows_in_order(scored) -> None:
    joined, single = open_datasets(list(scored.values())), [aligncurate.open_dataset(f) for f in scored.values()]
    expected = pl.concat([pl.read_parquet(d.files) for d in single], how="diagonal")
    assert joined.scan().collect().equals(expected.select(joined.schema.names))
    assert joined.rows == 10 and len(joined.parts) == len(joined.files) == 3
    assert joined.read(0, ["url", "key"]).to_pydict() == {"url": [None] * 5, "key": [f"a{n}" for n in range(5)]}
    tables = [table for index in range(3) for table in joined.groups(index)]
    assert pl.DataFrame(pa.concat_tables(tables)).equals(joined.scan().collect())
    assert joined.scan(2).collect()["url"].to_list() == ["http://c"] * 2
    assert joined.score_counts("score").total == 10
    assert joined.encoder_of("score") == single[0].encoder_of("score")
    with pytest.raises(IndexError):
        joined.read(3)


def test_verbs_keep_the_provenance_of_all(scored, tmp_path) -> None:
    joined = open_datasets([scored["a"], scored["b"]])
    levelled = aligncurate.bucket(joined, tmp_path / "levelled", levels=2, quiet=True)
    assert levelled.rows == 8 and levelled.levels == 2
    assert [Path(line["uri"]).name for line in levelled.manifest["inputs"]] == ["a", "b"]
    assert [Path(step["inputs"][0]["files"][0]["uri"]).name for step in levelled.manifest["history"]] == [
        "a.tar", "b.tar",
    ]  # fmt: skip
    assert levelled.manifest["encoder"] == joined.manifest["encoder"]


def test_contradictions_are_refused(scored, tmp_path) -> None:
    a, b, c = scored.values()
    with pytest.raises(UserError, match="no dataset given"):
        open_datasets([])
    with pytest.raises(UserError, match="given twice"):
        open_datasets([a, b, f"{a}/../a"])
    aligncurate.ingest(a.with_suffix(".tar"), tmp_path / "unscored", quiet=True)
    with pytest.raises(UserError, match=r"unscored: scored by no encoder, but .*/a by mini-clip"):
        open_datasets([a, tmp_path / "unscored"])
    for folder in (a, b):
        aligncurate.bucket(folder, tmp_path / folder.name, levels=2, quiet=True)
    with pytest.raises(UserError, match="cut by other thresholds"):
        open_datasets([tmp_path / "a", tmp_path / "b"])
    again = open_datasets([tmp_path / "a", tmp_path / "b"], new_levels=True)
    assert aligncurate.bucket(again, tmp_path / "again", levels=2, quiet=True).levels == 2
    aligncurate.bucket(b, tmp_path / "frozen", thresholds=tmp_path / "a", quiet=True)
    assert open_datasets([tmp_path / "a", tmp_path / "frozen"]).levels == 2
    numbers = tar(tmp_path, "n", range(2))
    samples = {f"n{n}": {"jpg": jpeg(n), "txt": b"x", "json": b'{"url": 3}'} for n in range(2)}
    write_tar(numbers, samples)
    aligncurate.ingest(numbers, tmp_path / "numbers", quiet=True)
    shutil.copytree(c, tmp_path / "texts")
    manifest = json.loads((tmp_path / "texts/manifest.json").read_text())
    (tmp_path / "texts/manifest.json").write_text(json.dumps(manifest | {"encoder": None}))
    with pytest.raises(UserError, match=r"column url is int64, but string in .*texts; these datasets cannot"):
        _ = open_datasets([tmp_path / "texts", tmp_path / "numbers"]).schema
