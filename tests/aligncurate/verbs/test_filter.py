"""Filtering compared with polars and numpy on the whole dataset."""

from __future__ import annotations

import tarfile
from itertools import pairwise

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import aligncurate
from aligncurate.demo.scenes import write_tars
from aligncurate.errors import UserError
from aligncurate.levels import Counts
from aligncurate.sources.options import SourceOptions
from aligncurate.verbs.filter import compact
from aligncurate.verbs.filter.compact import regroup
from aligncurate.verbs.filter.images import OnePerImage
from aligncurate.verbs.filter.sample import row_hashes, smallest
from aligncurate.verbs.filter.selection import parse_levels
from aligncurate.verbs.filter.where import Where
from tests.support.inputs import cli, complaint, jpeg


@pytest.fixture(scope="module")
def levelled(tmp_path_factory) -> aligncurate.Dataset:
    """Parts of different sizes with many equal scores, without a model: the scores come with the table."""
    folder = tmp_path_factory.mktemp("selection")
    rng = np.random.default_rng(7)
    frame = pl.DataFrame(
        {
            "key": [f"k{i}" for i in range(1_000)],
            "image": ["no.jpg"] * 1_000,
            "caption": [f"caption {i}" for i in range(1_000)],
            "score": np.round(rng.normal(0.2, 0.1, 1_000), 2).astype(np.float32),
            "licence": rng.choice(["cc-by", "cc0", "none"], 1_000),
        }
    )
    write_tars(folder / "tars", 1, seed=1)
    with tarfile.open(folder / "tars/00000.tar") as tar:
        image = next(tar.extractfile(m).read() for m in tar if m.name.endswith(".jpg"))
    frame = frame.with_columns(pl.Series("image", [image if i % 50 else b"broken" for i in range(1_000)]))
    frame.write_parquet(folder / "rows.parquet")
    options = SourceOptions(rows_per_shard=130)
    dataset = aligncurate.ingest(folder / "rows.parquet", folder / "in", source=options, quiet=True).dataset
    assert dataset.statuses == {"ok": 980, "decode_error": 20}
    return aligncurate.bucket(dataset, folder / "levelled", levels=8, quiet=True)


def rows(dataset: aligncurate.Dataset) -> pl.DataFrame:
    return dataset.scan().collect()


def test_where_is_polars_sql(tmp_path, levelled) -> None:
    where = "score > 0.25 AND licence IN ('cc0', 'cc-by') AND caption LIKE '%7%'"
    kept = aligncurate.filter(levelled, tmp_path / "out", where=where, quiet=True)
    expected = pl.SQLContext(t=rows(levelled)).execute(f"SELECT * FROM t WHERE {where}", eager=True)
    assert 0 < kept.rows == expected.height
    assert rows(kept).equals(expected)
    assert len(kept.parts) == len(levelled.parts)


def test_where_sees_the_rows_that_failed(tmp_path, levelled) -> None:
    kept = aligncurate.filter(levelled, tmp_path / "out", where="status <> 'ok'", quiet=True)
    assert kept.statuses == {"decode_error": 20}


def test_a_condition_that_fails_on_the_rows(tmp_path, levelled) -> None:
    with pytest.raises(UserError, match=r"fails on rows of part \d .*; TRY_CAST gives null instead"):
        aligncurate.filter(levelled, tmp_path / "out", where="CAST(caption AS INT) > 3", quiet=True)
    kept = aligncurate.filter(levelled, tmp_path / "try", where="TRY_CAST(caption AS INT) > 3", quiet=True)
    assert kept.rows == 0


def test_levels(tmp_path, levelled) -> None:
    kept = aligncurate.filter(levelled, tmp_path / "out", levels="1,6-7", quiet=True)
    assert rows(kept).equals(rows(levelled).filter(pl.col("level").is_in([1, 6, 7])))


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.3, 0.5, 1.0])
def test_top_fraction_is_exact_and_takes_the_first_of_equal_scores(tmp_path, levelled, fraction) -> None:
    kept = rows(aligncurate.filter(levelled, tmp_path / "out", top_fraction=fraction, quiet=True))
    everything = rows(levelled)
    scores = np.nan_to_num(everything["score"].to_numpy(), nan=-np.inf)
    best = np.argsort(-scores, kind="stable")[: int(np.ceil(round(fraction * 980, 6)))]
    assert kept["key"].to_list() == everything["key"].gather(np.sort(best)).to_list()


def test_options_combine_in_order(tmp_path, levelled) -> None:
    kept = rows(
        aligncurate.filter(
            levelled, tmp_path / "out", where="licence = 'cc0'", levels="3-8", top_fraction=0.25, sample=20, quiet=True
        )
    )
    chosen = rows(levelled).filter((pl.col("licence") == "cc0") & pl.col("level").is_between(3, 8))
    order = np.argsort(-chosen["score"].to_numpy(), kind="stable")[: -(-chosen.height // 4)]
    top = set(chosen["key"].gather(order).to_list())
    assert kept.height == 20
    assert set(kept["key"]) <= top


def test_a_seed_gives_the_same_sample_and_another_seed_another(tmp_path, levelled) -> None:
    one, same, other = (
        rows(aligncurate.filter(levelled, tmp_path / name, sample=100, seed=seed, quiet=True))["key"].to_list()
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert len(one) == 100
    assert one == same
    assert 2 <= len(set(one) & set(other)) <= 30  # ten in the mean
    everything = aligncurate.filter(levelled, tmp_path / "d", sample=5_000, quiet=True)
    assert everything.rows == 1_000


def test_every_row_is_equally_likely(tmp_path, levelled) -> None:
    hits = np.zeros(1_000)
    for seed in range(30):
        kept = rows(aligncurate.filter(levelled, tmp_path / str(seed), sample=200, seed=seed, quiet=True))
        hits[[int(k[1:]) for k in kept["key"]]] += 1
    # Binomial(30, 0.2): chi-squared over the 1,000 rows has mean 1,000 and deviation 45.
    statistic = ((hits - 6) ** 2 / (30 * 0.2 * 0.8)).sum()
    assert 800 < statistic < 1_200


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "nothing to filter by"),
        ({"where": "scor > 0.3"}, "did you mean score"),
        ({"where": "score >"}, "--where score >: it ends too early; an expression is missing"),
        ({"where": " "}, "--where: the condition is empty"),
        ({"where": "(score > 0.3"}, "it ends too early; \\) is missing"),
        ({"where": "score IS"}, "it ends too early"),
        ({"where": "CAST(score AS"}, "it ends too early; a data type name is missing"),
        ({"where": "score > 0.3)"}, "it has a \\) too many"),
        ({"where": "score > 0.3\n or = 2"}, "= at character 5 of line 2 does not belong there"),
        ({"where": "score > 0.3; DROP TABLE self"}, "; at character 12 does not belong there"),
        ({"where": "caption LIKE 'abc"}, "the quote at character 14 is never closed"),
        ({"where": "/* caption"}, "the comment .* is never closed"),
        ({"where": 'caption = "red"'}, "text is written in single quotes: 'red'"),
        ({"where": "score, score"}, "polars has no such SQL expression"),
        ({"where": "caption ~ '['"}, "a pattern that is not a regular expression"),
        ({"where": "conversations = 1"}, "types that cannot be compared"),
        ({"where": "score"}, "not true or false"),
        ({"where": "score > AVG(score)"}, "conditions work on one row at a time"),
        ({"where": "AVG(score) > 0"}, "conditions work on one row at a time"),
        ({"where": "RANK() OVER (ORDER BY score) < 5"}, "conditions work on one row at a time"),
        ({"where": "caption > 3"}, "--where caption > 3"),
        ({"levels": "5-"}, "--levels 5-"),
        ({"levels": "8-5"}, "--levels 8-5"),
        ({"levels": "0"}, "--levels 0"),
        ({"levels": "best"}, "--levels best"),
        ({"top_fraction": 0.0}, "--top-fraction 0"),
        ({"top_fraction": 30.0}, "--top-fraction 30"),
        ({"sample": 0}, "--sample 0"),
        ({"sample": 5, "seed": -1}, r"--seed -1: use a number from 0 to 2\^64 - 1"),
        ({"sample": 5, "seed": 2**64}, r"--seed 18446744073709551616: use a number from 0 to 2\^64 - 1"),
        ({"levels": "9"}, "--levels 9: the levels of .* are 1 to 8"),
        ({"levels": "12-99999999999999999999999"}, "are 1 to 8"),
        ({"levels": "²"}, "write levels like 5-8"),
        ({"min_score": 0.5, "max_score": 0.4}, "--min-score 0.5 is above --max-score 0.4"),
        ({"min_score": float("nan")}, "--min-score nan: use a finite number"),
        ({"max_score": 0.4, "score_column": "caption"}, "no score column caption"),
        ({"one_per_image": "worst"}, "--one-per-image worst: use one of best, first"),
        ({"one_per_image": "best", "where": "status <> 'ok'"}, "--one-per-image best: no row .* has a score"),
        ({"top_fraction": 0.5, "where": "status <> 'ok'"}, "no row that matches the other options has a score"),
        ({"top_fraction": 0.5, "score_column": "caption"}, "no score column caption"),
    ],
)
def test_mistakes_are_named(tmp_path, levelled, options, sentence) -> None:
    with pytest.raises(UserError, match=sentence):
        aligncurate.filter(levelled, tmp_path / "out", quiet=True, **options)
    assert not (tmp_path / "out").exists()


def test_level_lists() -> None:
    assert parse_levels("5-8") == [5, 6, 7, 8]
    assert parse_levels("3, 1,7-8") == [1, 3, 7, 8]


def test_levels_need_a_bucketed_dataset(tmp_path, levelled) -> None:
    with pytest.raises(UserError, match="aligncurate bucket"):
        aligncurate.filter(levelled.path.parent / "in", tmp_path / "out", levels="5-8", quiet=True)


@pytest.mark.parametrize("count", [1, 7, 400, 979])
def test_a_sample_is_the_smallest_hashes(tmp_path, levelled, count) -> None:
    kept = rows(aligncurate.filter(levelled, tmp_path / "out", where="status = 'ok'", sample=count, seed=3, quiet=True))
    good = np.flatnonzero(rows(levelled)["status"].to_numpy() == "ok")
    hashes = row_hashes(np.arange(1_000, dtype=np.uint64), 3)
    chosen = np.sort(good[np.argsort(hashes[good])[:count]])
    assert kept["key"].to_list() == [f"k{i}" for i in chosen]


@pytest.mark.parametrize("collected", [0, 1, 100, 1 << 22])
def test_the_smallest_keys_are_numpys(collected) -> None:
    rng = np.random.default_rng(5)
    close = np.uint64(1 << 40) + np.arange(500, dtype=np.uint64)  # they differ in their last bits only
    keys = rng.permutation(np.unique(np.concatenate([rng.integers(0, 2**64, 3_000, np.uint64), close])))
    passes = []

    def scan():
        passes.append(1)
        return iter(np.array_split(keys, 7))

    ordered = np.sort(keys)
    for count in (1, 2, 250, 500, 501, len(keys) - 1):
        passes.clear()
        assert smallest(scan, count, collected=collected) == (ordered[count - 1], len(keys))
        assert len(passes) <= 5
    for count in (len(keys), 10**9):
        assert smallest(scan, count, collected=collected)[0] >= ordered[-1]


def test_a_sample_larger_than_the_rows_is_told(tmp_path, levelled, capsys) -> None:
    kept = aligncurate.filter(levelled, tmp_path / "out", where="status = 'ok'", sample=5_000, seed=2**64 - 1)
    assert kept.rows == 980
    assert "--sample 5,000: there are only 980 rows, all are kept" in " ".join(capsys.readouterr().err.split())


def test_levels_beyond_the_last_are_told(tmp_path, levelled, capsys) -> None:
    kept = aligncurate.filter(levelled, tmp_path / "out", levels="7-9")
    assert rows(kept).equals(rows(levelled).filter(pl.col("level") >= 7))
    assert "are 1 to 8" in " ".join(capsys.readouterr().err.split())


def test_scores_between_bounds_as_float32(tmp_path, levelled) -> None:
    kept = aligncurate.filter(levelled, tmp_path / "out", min_score=0.1, max_score=0.3, quiet=True)
    scores = rows(levelled)["score"].to_numpy()
    inside = (scores >= np.float32(0.1)) & (scores <= np.float32(0.3))
    good = inside & (rows(levelled)["status"].to_numpy() == "ok")
    assert {0.1, 0.3} <= set(np.round(scores[good].astype(float), 2))
    assert rows(kept)["key"].to_list() == [f"k{i}" for i in np.flatnonzero(good)]


@pytest.fixture(scope="module")
def repeated(tmp_path_factory) -> aligncurate.Dataset:
    """Rows that share 40 images over all parts, some of them broken or missing, with many equal scores."""
    folder = tmp_path_factory.mktemp("repeated")
    rng = np.random.default_rng(11)
    images = [jpeg(i, width=16, height=16) for i in range(40)]
    number = rng.integers(0, 42, 300)
    frame = pl.DataFrame(
        {
            "key": [f"k{i}" for i in range(300)],
            "image": [images[n] if n < 40 else (None if n == 40 else b"broken") for n in number],
            "caption": [f"caption {i}" if i % 7 else "" for i in range(300)],
            "score": np.round(rng.normal(0.2, 0.1, 300), 1).astype(np.float32),
        }
    )
    frame.write_parquet(folder / "rows.parquet")
    options = SourceOptions(rows_per_shard=37)
    return aligncurate.ingest(folder / "rows.parquet", folder / "in", source=options, quiet=True).dataset


@pytest.mark.parametrize("prefer", ["best", "first"])
def test_one_row_of_each_image(tmp_path, repeated, prefer) -> None:
    kept = rows(aligncurate.filter(repeated, tmp_path / "out", one_per_image=prefer, quiet=True))
    table = rows(repeated).with_row_index("n")
    value = pl.when(pl.col("status") == "ok").then(pl.col("score") if prefer == "best" else 0.0)
    named = table.filter(pl.col("sha256").is_not_null() | pl.col("image_path").is_not_null())
    identity = pl.col("sha256").fill_null(pl.concat_str(pl.col("source"), pl.col("row")).cast(pl.Binary))
    best = (
        named.sort(value.fill_null(-9), -pl.col("n").cast(pl.Int64), descending=True)
        .group_by(identity)
        .agg(pl.col("n").first())
    )
    unnamed = table.filter(pl.col("sha256").is_null() & pl.col("image_path").is_null())
    expected = sorted([*best["n"], *unnamed["n"]])
    assert kept["key"].to_list() == [f"k{i}" for i in expected]
    assert kept.filter(pl.col("status") == "ok")["sha256"].n_unique() == kept.filter(pl.col("status") == "ok").height


def test_one_row_per_image_in_several_passes(repeated) -> None:
    class All:
        def mask(self, index: int) -> np.ndarray:
            return np.ones(repeated.parts[index].rows, bool)

    whole, many = (OnePerImage(repeated, All(), "best", "score", rows_per_pass=n) for n in (1_000, 13))
    masks = [[chosen.mask(i).tolist() for i in range(len(repeated.parts))] for chosen in (whole, many)]
    assert masks[0] == masks[1]


def test_a_fraction_of_the_images(tmp_path, repeated) -> None:
    one = aligncurate.filter(repeated, tmp_path / "one", one_per_image="best", quiet=True)
    half = aligncurate.filter(one, tmp_path / "half", top_fraction=0.5, quiet=True)
    both = aligncurate.filter(repeated, tmp_path / "both", one_per_image="best", top_fraction=0.5, quiet=True)
    assert rows(both).equals(rows(half))


@pytest.mark.parametrize("size", [1, 7, 90, 1_000])
def test_parts_are_filled(tmp_path, levelled, size) -> None:
    options = {"where": "licence = 'cc0'", "sample": 83, "quiet": True}
    plain = aligncurate.filter(levelled, tmp_path / "plain", **options)
    filled = aligncurate.filter(levelled, tmp_path / "filled", rows_per_part=size, **options)
    assert rows(filled).equals(rows(plain))
    full, rest = divmod(83, size)
    assert [part.rows for part in filled.parts] == [size] * full + ([rest] if rest else [])
    assert filled.manifest["score_counts"] == plain.manifest["score_counts"]
    assert filled.statuses == plain.statuses
    before = {file.name: (file.stat().st_ino, file.read_bytes()) for file in filled.files}
    filled.files[0].unlink()
    again = aligncurate.filter(levelled, tmp_path / "filled", rows_per_part=size, **options)
    after = {file.name: (file.stat().st_ino, file.read_bytes()) for file in again.files}
    assert [data for _, data in after.values()] == [data for _, data in before.values()]
    assert list(after.values())[1:] == list(before.values())[1:]
    assert again.manifest == filled.manifest


def test_a_single_empty_part_when_nothing_is_kept(tmp_path, levelled) -> None:
    kept = aligncurate.filter(levelled, tmp_path / "out", where="score > 9", rows_per_part=10, quiet=True)
    assert [part.rows for part in kept.parts] == [0]
    assert kept.schema == levelled.schema
    with pytest.raises(UserError, match="nothing to filter by"):
        aligncurate.filter(levelled, tmp_path / "all", rows_per_part=10, quiet=True)


def test_row_groups_of_filled_parts_are_full() -> None:
    table = pa.table({"n": list(range(100))})
    pieces = [table.slice(start, stop - start) for start, stop in pairwise([0, 1, 2, 30, 31, 31, 99, 100])]
    found = list(regroup(pieces, 12))
    assert [each.num_rows for each in found] == [12] * 8 + [4]
    assert pa.concat_tables(found).equals(table)


@pytest.mark.parametrize("options", [{"levels": "3-8"}, {"where": "status <> 'ok'"}, {"where": "score > 9"}])
def test_scores_are_counted_while_they_are_kept(tmp_path, levelled, options) -> None:
    kept = aligncurate.filter(levelled, tmp_path / "out", quiet=True, **options)
    frame = rows(kept).filter(pl.col("status") == "ok")
    counts = kept.score_counts("score")
    assert counts is not None
    assert (counts.bins == Counts.of([frame["score"].to_numpy()]).bins).all()


def test_damaged_lists_of_uids(tmp_path, levelled) -> None:
    """A header is Python source: whatever numpy's parser raises is one sentence."""
    np.save(tmp_path / "u.npy", np.zeros(2, "u8,u8"))
    good = (tmp_path / "u.npy").read_bytes()
    end = good.index(b"\n", 10)
    rest = b"'fortran_order': False, 'shape': "
    headers = [b"{'descr': (", b'"""', b"(" * 60, b"\\", b"{'descr': '|O', " + rest + b"(2,)}", b"1 +", b"\0"]
    headers.append(b"{'descr': '<u8', " + rest + b"(9999999999999999999999,)}")
    for header in headers:
        (tmp_path / "u.npy").write_bytes(good[:10] + header.ljust(end - 10) + good[end:])
        result = cli("filter", levelled.path, "--uids", tmp_path / "u.npy", "--out", tmp_path / "out")
        assert "not a .npy file of uids" in complaint(result), header


def test_metadata_of_datacomp_is_filtered_to_uids(tmp_path) -> None:
    """Rows that are not downloaded: their scores come with them, and their uids are all that is exported."""
    rng = np.random.default_rng(4)
    frame = pl.DataFrame(
        {
            "uid": [f"{i:032x}" for i in rng.permutation(50)],
            "url": [f"http://a/{i}.jpg" for i in range(50)],
            "text": [f"caption {i}" for i in range(50)],
            "clip_score": rng.normal(0.2, 0.1, 50).astype(np.float32),
        }
    )
    frame.write_parquet(tmp_path / "meta.parquet")
    options = SourceOptions(rows_per_shard=20)
    dataset = aligncurate.ingest(tmp_path / "meta.parquet", tmp_path / "in", source=options, quiet=True).dataset
    assert dataset.statuses == {"url_only": 50}
    best = frame.sort("clip_score", descending=True).head(15)
    top = tmp_path / "top"
    told = cli("filter", tmp_path / "in", "--top-fraction", 0.3, "--score-column", "clip_score", "--out", top).stdout
    assert f"next: aligncurate export {top} --format datacomp-uids --out UIDS" in told
    done = aligncurate.export(tmp_path / "top", tmp_path / "uids", format="datacomp-uids", quiet=True)
    listed = [f"{a:016x}{b:016x}" for a, b in np.load(tmp_path / "uids/uids.npy").tolist()]
    assert (done.rows, done.skipped, listed) == (15, 0, sorted(best["uid"]))
    again = aligncurate.filter(dataset, tmp_path / "again", uids=str(tmp_path / "uids/uids.npy"), quiet=True)
    assert sorted(rows(again)["uid"]) == listed
    levelled = rows(aligncurate.bucket(dataset, tmp_path / "b", levels=5, score_column="clip_score", quiet=True))
    assert levelled.group_by("level").len()["len"].to_list() == [10] * 5
    assert aligncurate.inspect(dataset, score_column="clip_score").scored == 50
    kept = aligncurate.filter(dataset, tmp_path / "m", min_score=0.2, score_column="clip_score", quiet=True)
    assert kept.rows == int((frame["clip_score"].to_numpy() >= np.float32(0.2)).sum())


def test_parts_of_many_row_groups(tmp_path, levelled, monkeypatch) -> None:
    monkeypatch.setattr(compact, "ROWS_PER_GROUP", 30)
    grouped = aligncurate.filter(levelled, tmp_path / "grouped", levels="1-8", rows_per_part=400, quiet=True)
    assert [pq.read_metadata(file).num_row_groups for file in grouped.files] == [14, 14, 6]
    for size in (None, 1, 45, 399):
        kept = aligncurate.filter(
            grouped, tmp_path / f"{size}", where="licence = 'cc0'", rows_per_part=size, quiet=True
        )
        expected = rows(levelled).filter((pl.col("licence") == "cc0") & pl.col("level").is_not_null())
        assert rows(kept).equals(expected)
        counts = kept.score_counts("score")
        assert counts is not None
        assert (counts.bins == Counts.of([expected["score"].to_numpy()]).bins).all()


def test_small_parts_of_one_big_part_read_it_about_once(tmp_path, levelled, monkeypatch) -> None:
    monkeypatch.setattr(compact, "ROWS_PER_GROUP", 50)
    whole = aligncurate.filter(levelled, tmp_path / "whole", levels="1-8", rows_per_part=10_000, quiet=True)
    masks, groups = [], []
    mask, read = Where.mask, whole.groups
    monkeypatch.setattr(Where, "mask", lambda self, index: masks.append(index) or mask(self, index))

    def counted(index: int, *arguments, only=None, **options):
        groups.extend(only or [])
        return read(index, *arguments, only=only, **options)

    monkeypatch.setattr(whole, "groups", counted)
    kept = aligncurate.filter(whole, tmp_path / "out", where="score IS NOT NULL", rows_per_part=5, quiet=True)
    assert rows(kept).equals(rows(whole)) and len(kept.parts) == -(-whole.rows // 5) > 50
    assert len(masks) <= 3 and set(groups) == set(range(-(-whole.rows // 50)))
    assert len(groups) <= 2 * len(set(groups))
