"""Exports read back by ourselves, by webdataset, by numpy, and as the official annotation format."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

import aligncurate
from aligncurate.demo.scenes import write_tars
from aligncurate.errors import UserError
from aligncurate.scoring import rows as row_groups
from aligncurate.sources.options import SourceOptions
from tests.support.inputs import cli, complaint, encoded, jpeg, picture


@pytest.fixture(scope="module")
def levelled(tmp_path_factory) -> aligncurate.Dataset:
    folder = tmp_path_factory.mktemp("export")
    write_tars(folder / "tars", 90, seed=3, shard_size=40)
    aligncurate.score(folder / "tars", folder / "scored", model="tiny", quiet=True)
    return aligncurate.bucket(folder / "scored", folder / "levelled", levels=4, quiet=True)


def members(tar: Path) -> dict[str, bytes]:
    with tarfile.open(tar) as file:
        return {m.name: file.extractfile(m).read() for m in file}


def test_score_export_score_again_gives_the_same(tmp_path, levelled) -> None:
    done = aligncurate.export(levelled, tmp_path / "shards", shard_size=40, quiet=True)
    assert done.files == ["00000.tar", "00001.tar", "00002.tar"]
    assert (done.rows, done.skipped, done.failed) == (90, 0, [])
    again = aligncurate.score(tmp_path / "shards", tmp_path / "again", model="tiny", quiet=True).dataset
    same = ["key", "sha256", "caption", "width", "height", "status", "score", "correctness"]
    assert again.scan().select(same).collect().equals(levelled.scan().select(same).collect())
    kept = aligncurate.ingest(tmp_path / "shards", tmp_path / "kept", quiet=True).dataset
    same += ["level"]
    assert kept.scan().select(same).collect().equals(levelled.scan().select(same).collect())


# webdataset leaves closing its files to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_tars_hold_the_original_bytes_for_other_readers(tmp_path, levelled) -> None:
    aligncurate.export(levelled, tmp_path / "shards", quiet=True)
    rows = levelled.scan().collect().to_dicts()
    original = {}
    for tar in sorted({row["source"] for row in rows}):
        original |= members(Path(tar))
    samples = list(webdataset.WebDataset(str(tmp_path / "shards/00000.tar"), shardshuffle=False))
    assert [s["__key__"] for s in samples] == [row["key"] for row in rows]
    for sample, row in zip(samples, rows, strict=True):
        assert sample["jpg"] == original[f"{row['key']}.jpg"]
        assert sample["txt"].decode() == row["caption"]
        meta = json.loads(sample["json"])
        assert meta["score"] == pytest.approx(row["score"])
        assert (meta["level"], meta["correctness"]) == (row["level"], row["correctness"])
        assert meta["sha256"] == hashlib.sha256(sample["jpg"]).hexdigest()
    beside = pq.read_table(tmp_path / "shards/00000.parquet")
    assert beside["key"].to_pylist() == [row["key"] for row in rows]
    assert beside["level"].to_pylist() == [row["level"] for row in rows]


def test_a_folder_per_level(tmp_path, levelled) -> None:
    done = aligncurate.export(levelled, tmp_path / "shards", per_level=True, shard_size=10, quiet=True)
    levels = Counter(levelled.scan().collect()["level"].to_list())
    found: Counter[int] = Counter()
    for name in done.files:
        folder, _ = name.split("/")
        texts = [json.loads(d) for n, d in members(tmp_path / "shards" / name).items() if n.endswith(".json")]
        assert {f"level-{t['level']}" for t in texts} == {folder}
        assert len(texts) <= 10
        found.update(t["level"] for t in texts)
    assert found == levels


def test_an_interrupted_export_is_finished_with_the_same_bytes(tmp_path, levelled) -> None:
    aligncurate.export(levelled, tmp_path / "whole", shard_size=40, quiet=True)
    aligncurate.export(levelled, tmp_path / "cut", shard_size=40, quiet=True)
    (tmp_path / "cut/00001.parquet").unlink()
    (tmp_path / "cut/00001.tar").write_bytes(b"half a tar")
    (tmp_path / "cut/.tmp-00002.tar").write_bytes(b"left behind")
    aligncurate.export(levelled, tmp_path / "cut", shard_size=40, quiet=True)
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "cut" / file.name).read_bytes()
    assert {p.name for p in (tmp_path / "cut").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}


def test_llava_json_is_the_official_format_and_is_read_back(tmp_path, levelled) -> None:
    aligncurate.export(levelled, tmp_path / "llava", format="llava-json", quiet=True)
    entries = json.loads((tmp_path / "llava/annotations.json").read_text())
    rows = levelled.scan().collect().to_dicts()
    assert [e["id"] for e in entries] == [row["key"] for row in rows]
    for entry, row in zip(entries, rows, strict=True):
        assert entry["similarity"] == row["level"] - 1
        human, gpt = entry["conversations"]
        assert (human["from"], gpt["from"]) == ("human", "gpt")
        assert "<image>" in human["value"] and gpt["value"] == row["caption"]
        assert hashlib.sha256((tmp_path / "llava" / entry["image"]).read_bytes()).digest() == row["sha256"]
    again = aligncurate.score(tmp_path / "llava/annotations.json", tmp_path / "again", model="tiny", quiet=True)
    found, before = again.dataset.scan().collect(), levelled.scan().collect()
    assert found.select("key", "caption", "sha256").equals(before.select("key", "caption", "sha256"))
    # Other batches than those of the tars, so the last bits may differ.
    np.testing.assert_allclose(found["score"], before["score"], atol=1e-6)


def test_conversations_and_text_only_rows_keep_their_turns(tmp_path) -> None:
    turns = [
        {"from": "human", "value": "Who wrote Faust?"},
        {"from": "gpt", "value": "Goethe."},
        {"from": "human", "value": "When?"},
        {"from": "gpt", "value": "Part one in 1808."},
    ]
    (tmp_path / "rows.json").write_text(json.dumps([{"id": "a", "conversations": turns}]))
    dataset = aligncurate.ingest(tmp_path / "rows.json", tmp_path / "in", quiet=True).dataset
    assert dataset.statuses == {"text_only": 1}
    aligncurate.export(dataset, tmp_path / "llava", format="llava-json", quiet=True)
    assert json.loads((tmp_path / "llava/annotations.json").read_text()) == [{"id": "a", "conversations": turns}]
    aligncurate.export(dataset, tmp_path / "shards", quiet=True)
    back = aligncurate.ingest(tmp_path / "shards", tmp_path / "back", quiet=True).dataset
    same = ["key", "conversations", "status"]
    assert back.scan().select(same).collect().equals(dataset.scan().select(same).collect())


def test_datacomp_uids_are_sorted_halves(tmp_path, levelled) -> None:
    aligncurate.export(levelled, tmp_path / "uids", format="datacomp-uids", quiet=True)
    found = np.load(tmp_path / "uids/uids.npy")
    expected = sorted(
        hashlib.sha256(row["sha256"] + row["caption"].encode()).hexdigest()[:32]
        for row in levelled.scan().collect().to_dicts()
    )
    assert found.dtype == np.dtype("u8,u8")
    assert [f"{int(a):016x}{int(b):016x}" for a, b in found] == expected


@pytest.mark.parametrize("own", [True, False])
def test_uids_go_out_and_back_through_a_filter(tmp_path, own) -> None:
    columns = {"key": [f"k{i}" for i in range(60)], "caption": [f"caption {i % 50}" for i in range(60)]}
    columns["image"] = [jpeg(i % 40, width=16, height=16) for i in range(60)]
    if own:  # some rows have a uid of their own, one of them in capitals, one of them a wrong one
        columns["uid"] = [f"{i:032x}" if i % 3 else None for i in range(60)]
        columns["uid"][1:3] = ["0123456789abcdef0123456789ABCDEF", "7"]
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    options = SourceOptions(rows_per_shard=25)
    dataset = aligncurate.ingest(tmp_path / "rows.parquet", tmp_path / "in", source=options, quiet=True).dataset
    frame = dataset.scan().collect()
    expected = {}
    for row in frame.iter_rows(named=True):
        mine = row.get("uid")
        made = hashlib.sha256(row["sha256"] + row["caption"].encode()).hexdigest()[:32]
        expected[row["key"]] = mine.lower() if mine and len(mine) == 32 else made
    aligncurate.export(dataset, tmp_path / "uids", format="datacomp-uids", quiet=True)
    listed = np.load(tmp_path / "uids/uids.npy")
    assert [f"{a:016x}{b:016x}" for a, b in listed.tolist()] == sorted(expected.values())
    some = np.random.default_rng(2).permutation(listed)[:20]
    np.save(tmp_path / "some.npy", some)
    for name, array in (("all", listed), ("some", some), ("sorted", np.sort(some)), ("none", listed[:0])):
        np.save(tmp_path / f"{name}.npy", array)
        kept = aligncurate.filter(dataset, tmp_path / name, uids=str(tmp_path / f"{name}.npy"), quiet=True)
        wanted = {f"{a:016x}{b:016x}" for a, b in array.tolist()}
        keys = kept.scan().collect()["key"].to_list()
        assert keys == [key for key in frame["key"] if expected[key] in wanted]


def test_files_that_are_no_uids(tmp_path) -> None:
    write_tars(tmp_path / "tars", 2, seed=4)
    dataset = aligncurate.ingest(tmp_path / "tars", tmp_path / "in", quiet=True).dataset
    np.save(tmp_path / "floats.npy", np.zeros(3))
    np.save(tmp_path / "objects.npy", np.array([{}], object))
    np.savez(tmp_path / "several.npz", a=np.zeros(1))
    (tmp_path / "text.npy").write_text("0123456789abcdef0123456789abcdef")
    (tmp_path / "empty.npy").touch()
    for name in ("nothing.npy", "floats.npy", "objects.npy", "several.npz", "text.npy", "empty.npy", "tars"):
        found = complaint(cli("filter", tmp_path / "in", "--uids", tmp_path / name, "--out", tmp_path / "out"))
        assert found.startswith(f"--uids {tmp_path / name}: ")
    assert not (tmp_path / "out").exists()
    assert dataset.rows == 2


def test_images_that_are_gone_are_listed(tmp_path) -> None:
    write_tars(tmp_path / "tars", 6, seed=4, shard_size=3)
    dataset = aligncurate.ingest(tmp_path / "tars", tmp_path / "in", quiet=True).dataset
    (tmp_path / "tars/00001.tar").unlink()
    first = (tmp_path / "tars/00000.tar").read_bytes()
    row = dataset.read(0).to_pylist()[0]
    changed = first[: row["image_offset"] + 300] + b"\0" + first[row["image_offset"] + 301 :]
    (tmp_path / "tars/00000.tar").write_bytes(changed)
    for form in ("webdataset", "llava-json"):
        done = aligncurate.export(dataset, tmp_path / form, format=form, quiet=True)
        assert (done.rows, len(done.failed)) == (2, 4)
        listed = [json.loads(line) for line in (tmp_path / form / "failed.jsonl").read_text().splitlines()]
        assert listed == done.failed
        assert "not the one that was scored" in listed[0]["error"]


@pytest.mark.parametrize("embed", [True, False])
def test_embedded_images_need_no_source(tmp_path, embed) -> None:
    write_tars(tmp_path / "tars", 4, seed=4)
    dataset = aligncurate.ingest(tmp_path / "tars", tmp_path / "in", embed_images=embed, quiet=True).dataset
    (tmp_path / "tars/00000.tar").unlink()
    assert aligncurate.export(dataset, tmp_path / "out", quiet=True).rows == (4 if embed else 0)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"format": "zip"}, "--format zip"),
        ({"shard_size": 0}, "--shard-size 0"),
        ({"format": "llava-json", "per_level": True}, "--per-level works only with"),
    ],
)
def test_mistakes_are_named(tmp_path, levelled, options, sentence) -> None:
    with pytest.raises(UserError, match=sentence):
        aligncurate.export(levelled, tmp_path / "out", quiet=True, **options)


def test_an_export_does_not_mix_with_another(tmp_path, levelled) -> None:
    aligncurate.export(levelled, tmp_path / "out", quiet=True)
    with pytest.raises(UserError, match="different export"):
        aligncurate.export(levelled, tmp_path / "out", shard_size=7, quiet=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").touch()
    with pytest.raises(UserError, match="other files"):
        aligncurate.export(levelled, tmp_path / "full", quiet=True)


def test_per_level_needs_levels(tmp_path) -> None:
    write_tars(tmp_path / "tars", 4, seed=4)
    dataset = aligncurate.ingest(tmp_path / "tars", tmp_path / "in", quiet=True).dataset
    with pytest.raises(UserError, match="bucket"):
        aligncurate.export(dataset, tmp_path / "out", per_level=True, quiet=True)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_processes_write_the_same_bytes(tmp_path, levelled) -> None:
    options = {"shard_size": 7, "per_level": True, "quiet": True}
    alone = aligncurate.export(levelled, tmp_path / "alone", workers=1, **options)
    several = aligncurate.export(levelled, tmp_path / "several", workers=3, **options)
    assert files_of(tmp_path / "alone") == files_of(tmp_path / "several")
    assert (alone.rows, alone.bytes, alone.files) == (several.rows, several.bytes, several.files)
    tar = next(tmp_path.glob("several/level-1/*.tar"))
    before = tar.stat().st_ino
    tar.with_suffix(".parquet").unlink()
    aligncurate.export(levelled, tmp_path / "several", workers=2, **options)  # finishes what was interrupted
    assert files_of(tmp_path / "alone") == files_of(tmp_path / "several")
    assert tar.stat().st_ino != before


def test_worker_processes_report_rows_that_cannot_be_read(tmp_path) -> None:
    write_tars(tmp_path / "tars", 40, seed=8, shard_size=20)
    dataset = aligncurate.ingest(tmp_path / "tars", tmp_path / "in", quiet=True).dataset
    victim = dataset.scan().collect().row(25, named=True)
    with Path(victim["source"]).open("r+b") as file:
        file.seek(victim["image_offset"])
        file.write(b"other")
    done = aligncurate.export(dataset, tmp_path / "out", shard_size=10, workers=2, quiet=True)
    assert [row["key"] for row in done.failed] == [victim["key"]]
    assert done.rows == 39
    with pytest.raises(UserError, match="--workers 0"):
        aligncurate.export(dataset, tmp_path / "none", workers=0, quiet=True)


@pytest.mark.parametrize("per_level", [False, True])
def test_only_row_groups_with_rows_of_the_tar_are_read_whole(tmp_path, monkeypatch, per_level) -> None:
    monkeypatch.setattr(row_groups, "ROWS_PER_GROUP_WITH_IMAGES", 10)
    write_tars(tmp_path / "tars", 60, seed=5, shard_size=60)
    aligncurate.score(tmp_path / "tars", tmp_path / "scored", model="tiny", embed_images=True, quiet=True)
    dataset = aligncurate.bucket(tmp_path / "scored", tmp_path / "levelled", levels=4, quiet=True)
    levels = [row["level"] for row in dataset.read(0, ["level"]).to_pylist()]
    tar_rows = []  # rows of each tar
    for level in sorted(set(levels)) if per_level else [None]:
        rows = [i for i, row_level in enumerate(levels) if level in (None, row_level)]
        tar_rows += [rows[i : i + 4] for i in range(0, len(rows), 4)]
    all_columns, two_columns = [], []  # row groups that are read
    read = pq.ParquetFile.read_row_group

    def spy(self, group, columns=None, **options):
        (all_columns if columns is None or "image" in columns else two_columns).append(group)
        return read(self, group, columns, **options)

    batches = pq.ParquetFile.iter_batches

    def batch_spy(self, size, groups, columns, **options):
        all_columns.extend(groups)
        return batches(self, size, groups, columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", spy)
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", batch_spy)
    options = {"shard_size": 4, "per_level": per_level, "workers": 1, "quiet": True}
    done = aligncurate.export(dataset, tmp_path / "out", **options)
    assert all_columns == [group for rows in tar_rows for group in sorted({i // 10 for i in rows})]
    # Planning reads status and level of each group once, a tar those of the groups up to its last row.
    assert len(two_columns) <= 6 + sum(max(rows) // 10 + 1 for rows in tar_rows)
    keys = dataset.scan().collect()["key"].to_list()
    for name, rows in zip(done.files, tar_rows, strict=True):
        beside = pq.read_table((tmp_path / "out" / name).with_suffix(".parquet"))
        assert beside["key"].to_pylist() == [keys[i] for i in rows]


def test_an_image_file_of_an_earlier_run_is_replaced_if_it_is_another_image(tmp_path) -> None:
    for number in range(2):  # of one key, each unique in its file, and as bitmaps of one size
        (tmp_path / f"{number}.bmp").write_bytes(encoded(picture(number), "BMP"))
        row = {"id": "same", "image": f"{number}.bmp", "caption": f"caption {number}"}
        (tmp_path / f"{number}.json").write_text(json.dumps([row]))
    dataset = aligncurate.ingest(str(tmp_path / "{0..1}.json"), tmp_path / "in", quiet=True).dataset
    (tmp_path / "0.bmp").rename(tmp_path / "away")
    first = aligncurate.export(dataset, tmp_path / "out", format="llava-json", quiet=True)
    assert (first.rows, len(first.failed)) == (1, 1)
    (tmp_path / "away").rename(tmp_path / "0.bmp")
    assert aligncurate.export(dataset, tmp_path / "out", format="llava-json", quiet=True).rows == 2
    for number, entry in enumerate(json.loads((tmp_path / "out/annotations.json").read_text())):
        assert (tmp_path / "out" / entry["image"]).read_bytes() == (tmp_path / f"{number}.bmp").read_bytes()


def test_a_tar_that_was_deleted_is_made_again(tmp_path, levelled) -> None:
    aligncurate.export(levelled, tmp_path / "out", shard_size=40, quiet=True)
    before = files_of(tmp_path / "out")
    (tmp_path / "out/00001.tar").unlink()
    aligncurate.export(levelled, tmp_path / "out", shard_size=40, quiet=True)
    assert files_of(tmp_path / "out") == before


def test_values_that_are_not_finite_become_null(tmp_path) -> None:
    nan, inf = float("nan"), float("inf")
    columns = {
        "image": [jpeg(0), jpeg(1)],
        "caption": ["a", "b"],
        "quality": [nan, 0.5],
        "boxes": [[1.0, -inf], [2.0]],
        "clip": [{"mean": inf, "texts": ["NaN"]}, {"mean": 1.5, "texts": []}],
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    dataset = aligncurate.ingest(tmp_path / "a.parquet", tmp_path / "in", quiet=True).dataset
    aligncurate.export(dataset, tmp_path / "out", quiet=True)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not strict JSON")

    texts = [data for name, data in members(tmp_path / "out/00000.tar").items() if name.endswith(".json")]
    bad, good = (json.loads(text, parse_constant=refuse) for text in texts)
    extras = ("quality", "boxes", "clip")
    assert [bad[name] for name in extras] == [None, [1.0, None], {"mean": None, "texts": ["NaN"]}]
    assert [good[name] for name in extras] == [columns[name][1] for name in extras]


def test_a_column_named_png_is_not_taken_for_a_file_name(tmp_path) -> None:
    pq.write_table(pa.table({"png": [jpeg(0)], "caption": ["a"]}), tmp_path / "a.parquet")
    dataset = aligncurate.ingest(tmp_path / "a.parquet", tmp_path / "in", quiet=True).dataset
    assert dataset.read(0)["image_path"].to_pylist() == ["png"]
    aligncurate.export(dataset, tmp_path / "out", quiet=True)
    found = {name.rpartition(".")[2]: data for name, data in members(tmp_path / "out/00000.tar").items()}
    assert sorted(found) == ["jpg", "json", "txt"] and found["jpg"] == jpeg(0)


@pytest.mark.parametrize("damaged", [b"", b"{", b"[1]", b"\xff\xfe"])
def test_a_damaged_record_is_named_in_the_error(tmp_path, levelled, damaged) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/export.json").write_bytes(damaged)
    with pytest.raises(UserError, match=r"export\.json: damaged, not a JSON"):
        aligncurate.export(levelled, tmp_path / "out", quiet=True)


def test_llava_export_without_levels_prints_a_notice(tmp_path, capsys) -> None:
    write_tars(tmp_path / "tars", 5, seed=9)
    dataset = aligncurate.ingest(tmp_path / "tars", tmp_path / "in", quiet=True).dataset
    aligncurate.export(dataset, tmp_path / "out", format="llava-json")
    assert "the annotations get no `similarity`" in " ".join(capsys.readouterr().err.split())
    assert all("similarity" not in entry for entry in json.loads((tmp_path / "out/annotations.json").read_text()))
