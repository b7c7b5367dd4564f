"""Joined columns against polars' own join."""

from __future__ import annotations

import datetime
import hashlib

import numpy as np
import polars as pl
import pytest

import aligncurate
from aligncurate.errors import UserError
from aligncurate.sources.options import SourceOptions
from aligncurate.verbs.join import table as tables
from aligncurate.verbs.join.options import JoinOptions
from tests.support.inputs import cli, complaint, jpeg


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> aligncurate.Dataset:
    """200 rows in four parts, with repeated urls and some without one."""
    folder = tmp_path_factory.mktemp("join")
    frame = pl.DataFrame(
        {
            "key": [f"{i:03}" for i in range(200)],
            "image": [jpeg(i % 20, width=16, height=16) for i in range(200)],
            "caption": [f"caption {i}" for i in range(200)],
            "url": [f"http://a/{i % 150}" if i % 11 else None for i in range(200)],
        }
    )
    frame.write_parquet(folder / "rows.parquet")
    options = SourceOptions(rows_per_shard=60)
    return aligncurate.ingest(folder / "rows.parquet", folder / "in", source=options, quiet=True).dataset


def other(count: int = 170) -> pl.DataFrame:
    """Columns of many types for rows 10, 11, … of the dataset, in another order."""
    rng = np.random.default_rng(3)
    numbers = rng.permutation(np.arange(10, 10 + count))
    return pl.DataFrame(
        {
            "key": [f"{i:03}" for i in numbers],
            "url": [f"http://a/{i}" for i in numbers],
            "aesthetic": rng.normal(size=count).astype(np.float32),
            "licence": rng.choice(["cc0", "cc-by", None], count).tolist(),
            "tags": [[f"t{i}", "x"] for i in numbers],
            "when": [datetime.datetime(2024, 1, 1) + datetime.timedelta(hours=int(i)) for i in numbers],
            "on": numbers,
        }
    )


@pytest.mark.parametrize("on", ["key", "url"])
def test_joined_as_polars_joins(tmp_path, dataset, on) -> None:
    table = other().drop("url" if on == "key" else "key").with_columns(kind=pl.col("licence").cast(pl.Categorical))
    table.write_parquet(tmp_path / "t.parquet")
    joined = aligncurate.join(dataset, tmp_path / "t.parquet", tmp_path / "out", on=on, quiet=True)
    before = dataset.scan().collect()
    expected = before.join(table.with_columns(pl.col("kind").cast(pl.String)), on=on, how="left", maintain_order="left")
    found = joined.dataset.scan().collect()
    assert found.equals(expected.select(found.columns))
    assert joined.columns == [name for name in table.columns if name != on]
    assert joined.unmatched == expected["on"].null_count() > 0
    assert joined.matched + joined.unmatched == 200
    assert [part.statuses for part in joined.dataset.parts] == [part.statuses for part in dataset.parts]
    again = aligncurate.join(dataset, tmp_path / "t.parquet", tmp_path / "out", on=on, quiet=True)
    assert (again.matched, again.dataset.manifest) == (joined.matched, joined.dataset.manifest)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_csv_keeps_its_keys_as_text(tmp_path, dataset, separator) -> None:
    table = other().select("key", "aesthetic", "licence")
    table.write_csv(tmp_path / "t.csv", separator=separator)
    joined = aligncurate.join(dataset, tmp_path / "t.csv", tmp_path / "out", columns=["licence"], quiet=True)
    expected = dataset.scan().collect().join(table, on="key", how="left", maintain_order="left")
    assert joined.dataset.scan().collect()["licence"].to_list() == expected["licence"].to_list()
    assert "aesthetic" not in joined.dataset.schema.names


def test_rows_without_a_uid_have_the_one_of_an_export(tmp_path, dataset) -> None:
    frame = dataset.scan().collect()
    uids = [hashlib.sha256(r["sha256"] + r["caption"].encode()).hexdigest()[:32] for r in frame.to_dicts()]
    pl.DataFrame({"uid": uids[::-1], "n": np.arange(200)[::-1]}).write_parquet(tmp_path / "t.parquet")
    joined = aligncurate.join(dataset, tmp_path / "t.parquet", tmp_path / "out", on="uid", quiet=True)
    assert joined.dataset.scan().collect()["n"].to_list() == list(range(200))


def test_duplicates_are_refused_or_the_first_is_taken(tmp_path, dataset) -> None:
    table = pl.concat([other(), other().with_columns(aesthetic=pl.lit(9.0, pl.Float32))]).select("key", "aesthetic")
    table.write_parquet(tmp_path / "t.parquet")
    words = ("join", dataset.path, tmp_path / "t.parquet", "--out", tmp_path / "out")
    assert "170 rows repeat a value of key (such as " in complaint(cli(*words))
    told = cli(*words, "--duplicates", "first").stdout
    assert "170 rows of the table left out as duplicates" in told and "30 rows not found in the table" in told
    expected = dataset.scan().collect().join(other(), on="key", how="left", maintain_order="left")
    found = aligncurate.open_dataset(tmp_path / "out").scan().collect()
    assert found["aesthetic"].to_list() == expected["aesthetic"].to_list()


def test_different_values_with_the_same_hash(tmp_path, dataset, monkeypatch) -> None:
    other().select("key", "on").write_parquet(tmp_path / "t.parquet")
    expected = aligncurate.join(dataset, tmp_path / "t.parquet", tmp_path / "a", quiet=True)
    monkeypatch.setattr(tables, "_hashes", lambda values: values.hash().to_numpy() % np.uint64(7))
    found = aligncurate.join(dataset, tmp_path / "t.parquet", tmp_path / "b", quiet=True)
    assert found.dataset.scan().collect().equals(expected.dataset.scan().collect())


def test_mistakes_are_named(tmp_path, dataset) -> None:
    table = other()
    table.write_parquet(tmp_path / "t.parquet")
    table.select("key", pl.lit("x").alias("caption"), pl.lit(1).alias("n")).write_parquet(tmp_path / "clash.parquet")
    table.select(pl.concat_str(pl.lit("no"), "key").alias("key"), "on").write_parquet(tmp_path / "none.parquet")
    table.select("key").write_parquet(tmp_path / "bare.parquet")
    (tmp_path / "damaged.parquet").write_bytes((tmp_path / "t.parquet").read_bytes()[:300])
    (tmp_path / "uneven.csv").write_text("key,n\n000,1\n001,2,3\n")
    (tmp_path / "empty.csv").touch()
    (tmp_path / "t.json").write_text("{}")
    for name, options, sentence in (
        ("no.parquet", (), "there is no such file"),
        ("t.json", (), "neither a Parquet nor a CSV"),
        ("", (), "this is a folder"),
        ("t.parquet", ("--on", "kye"), "no such column"),
        ("t.parquet", ("--on", "score"), "a column of float cannot tell rows apart"),
        ("t.parquet", ("--on", "caption"), "there is no column caption"),
        ("t.parquet", ("--columns", "licenze"), "there is no column licenze; did you mean licence?"),
        (
            "t.parquet",
            (),
            "this name already; choose others with --columns aesthetic,licence,tags,when,on.",
        ),
        ("clash.parquet", (), "caption: datasets have columns of this name already; choose others with --columns n"),
        ("clash.parquet", ("--columns", "caption"), "rename them in the table"),
        ("none.parquet", (), "none of the 200 rows of"),
        ("bare.parquet", (), "no column to add besides key"),
        ("damaged.parquet", (), "damaged.parquet: cannot be read as a table"),
        ("uneven.csv", (), "cannot be read as a table"),
        ("empty.csv", (), "cannot be read as a table"),
    ):
        words = ("join", dataset.path, tmp_path / name, *options, "--out", tmp_path / "out")
        assert sentence in complaint(cli(*words)), name
        assert not (tmp_path / "out").exists()


def test_integers_beyond_64_bits_are_added_as_text(tmp_path, dataset) -> None:
    keys = dataset.scan().collect()["key"].unique().to_list()[:2]
    big = dict(zip(keys, (str(10**26 - 1), "7"), strict=True))
    (tmp_path / "t.csv").write_text("key,big\n" + "".join(f"{key},{number}\n" for key, number in big.items()))
    joined = aligncurate.join(dataset, tmp_path / "t.csv", tmp_path / "out", quiet=True)
    assert dict(joined.dataset.scan().drop_nulls("big").select("key", "big").collect().rows()) == big


def test_a_damaged_parquet_file_is_one_sentence_without_a_panic(tmp_path, dataset, capfd) -> None:
    """Of such files polars prints a panic, or ends the process."""
    table = pl.DataFrame({"key": [f"{n:03}" for n in range(60)], "text": ["ö", "two", None] * 20, "tags": [["x"]] * 60})
    file = tmp_path / "t.parquet"
    table.write_parquet(file)
    good = file.read_bytes()
    randomness = np.random.default_rng(5)
    refused = 0
    for place, value in zip(
        randomness.integers(4, len(good), 1_500), randomness.integers(256, size=1_500), strict=True
    ):
        file.write_bytes(good[:place] + bytes([value]) + good[place + 1 :])
        try:
            tables.Table(file, JoinOptions(), taken=["caption"])
        except UserError as error:
            assert str(error).startswith(f"{file}: ") and "\n" not in str(error)
            refused += 1
    assert refused > 100
    file.write_bytes(good[:-100] + b"x" * 50 + good[-50:])
    complaint(cli("join", dataset.path, file, "--out", tmp_path / "out"))
    assert "panicked" not in capfd.readouterr().err
