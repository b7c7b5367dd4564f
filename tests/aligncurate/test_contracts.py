"""What a dataset promises when a run is repeated, a source has changed, or columns are unusual."""

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import aligncurate
from aligncurate.errors import UserError
from aligncurate.io import storage
from aligncurate.sources.options import SourceOptions
from tests.support.inputs import cli, complaint, jpeg, pairs, write_tar


def table_of(folder: Path, rows: dict[str, str]) -> Path:
    file = folder / "rows.csv"
    file.write_text("image,caption\n" + "".join(f"{image},{caption}\n" for image, caption in rows.items()))
    return file


def frame_of(dataset: aligncurate.Dataset | None) -> pl.DataFrame:
    assert dataset is not None
    return dataset.scan().collect()


def test_a_retry_scores_a_row_again_if_its_caption_has_changed(tmp_path, mini) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    file = table_of(tmp_path, {"a.jpg": "a red square", "b.jpg": "x"})
    aligncurate.score(file, tmp_path / "out", **mini, quiet=True)
    (tmp_path / "b.jpg").write_bytes(jpeg(2))
    table_of(tmp_path, {"a.jpg": "two blue circles", "b.jpg": "x"})
    retried = aligncurate.score(file, tmp_path / "out", **mini, retry_errors=True, quiet=True)
    fresh = aligncurate.score(file, tmp_path / "fresh", **mini, quiet=True)
    assert frame_of(retried.dataset).equals(frame_of(fresh.dataset))


def test_a_retry_scores_a_row_again_if_it_points_at_another_image(tmp_path, mini) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        (tmp_path / f"{name}.jpg").write_bytes(jpeg(seed))
    file = tmp_path / "rows.csv"
    file.write_text("id,image,caption\n1,a.jpg,a square\n2,c.jpg,x\n")
    aligncurate.score(file, tmp_path / "out", **mini, quiet=True)
    (tmp_path / "c.jpg").write_bytes(jpeg(3))
    file.write_text("id,image,caption\n1,b.jpg,a square\n2,c.jpg,x\n")  # of the same size
    retried = aligncurate.score(file, tmp_path / "out", **mini, retry_errors=True, quiet=True)
    fresh = aligncurate.score(file, tmp_path / "fresh", **mini, quiet=True)
    assert frame_of(retried.dataset).equals(frame_of(fresh.dataset))


def test_parts_of_a_changed_tar_are_made_again_though_the_retry_is_interrupted(tmp_path, monkeypatch) -> None:
    tars = [tmp_path / "0.tar", tmp_path / "1.tar"]
    for tar in tars:
        write_tar(tar, {"a": {"jpg": jpeg(1), "txt": b"before"}})
    aligncurate.ingest(tars, tmp_path / "out", quiet=True)
    for tar in tars:
        write_tar(tar, {"a": {"jpg": jpeg(1), "txt": b"after"}, "b": {"jpg": jpeg(2), "txt": b"after"}})
        with tar.open("ab") as file:
            file.write(bytes(10240))  # another size, whatever the tar's own padding
    real = storage.open_file
    with monkeypatch.context() as patch:
        patch.setattr(storage, "open_file", lambda uri: _refuse() if uri.endswith("1.tar") else real(uri))
        assert aligncurate.ingest(tars, tmp_path / "out", retry_errors=True, quiet=True).dataset is None
    finished = aligncurate.ingest(tars, tmp_path / "out", quiet=True).dataset
    assert frame_of(finished).equals(frame_of(aligncurate.ingest(tars, tmp_path / "fresh", quiet=True).dataset))
    assert set(frame_of(finished)["caption"]) == {"after"}


def test_a_retry_keeps_no_rows_of_a_changed_parquet_file(tmp_path, mini) -> None:
    file = tmp_path / "rows.parquet"
    pl.DataFrame({"image": [jpeg(1), jpeg(2)], "caption": ["a", "b"]}).write_parquet(file)
    aligncurate.score(file, tmp_path / "out", **mini, quiet=True)
    pl.DataFrame({"image": [jpeg(3), jpeg(2), jpeg(4)], "caption": ["a", "b", "c"]}).write_parquet(file)
    retried = aligncurate.score(file, tmp_path / "out", **mini, retry_errors=True, quiet=True).dataset
    assert frame_of(retried).equals(frame_of(aligncurate.score(file, tmp_path / "fresh", **mini, quiet=True).dataset))


def test_a_changed_file_does_not_excuse_a_changed_dataset_beside_it(tmp_path) -> None:
    write_tar(tmp_path / "0.tar", {"a": {"jpg": jpeg(1), "txt": b"a"}})
    write_tar(tmp_path / "1.tar", {"b": {"jpg": jpeg(2), "txt": b"b"}})
    aligncurate.ingest(tmp_path / "1.tar", tmp_path / "in", quiet=True)
    sources = [tmp_path / "0.tar", tmp_path / "in"]
    aligncurate.ingest(sources, tmp_path / "out", quiet=True)
    write_tar(tmp_path / "0.tar", {k: {"jpg": jpeg(1), "txt": b"a"} for k in "abcdefghijkl"})
    shutil.rmtree(tmp_path / "in")
    write_tar(tmp_path / "1.tar", {"c": {"jpg": jpeg(2), "txt": b"c"}})
    aligncurate.ingest(tmp_path / "1.tar", tmp_path / "in", quiet=True)
    with pytest.raises(UserError, match="in has changed since"):
        aligncurate.ingest(sources, tmp_path / "out", retry_errors=True, quiet=True)


def test_retry_counts_only_what_it_did(tmp_path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    file = table_of(tmp_path, {"a.jpg": "a", "b.jpg": "b"})
    aligncurate.ingest(file, tmp_path / "out", quiet=True)
    (tmp_path / "b.jpg").write_bytes(jpeg(2))
    assert aligncurate.ingest(file, tmp_path / "out", retry_errors=True, quiet=True).rows == 1


def test_a_retry_of_ingest_takes_scores_from_the_input(tmp_path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    (tmp_path / "b.jpg").write_bytes(b"no image")
    file, lines = (
        tmp_path / "rows.csv",
        "image,caption,score,level,quality\n{},a,{},{},{}\n,text,{},{},{}\nb.jpg,b,0.5,1,7\n",
    )
    file.write_text(lines.format("a.jpg", 0.1, 1, 3, 0.1, 1, 3))
    aligncurate.ingest(file, tmp_path / "out", quiet=True)
    file.write_text(lines.format("a.jpg", 0.9, 4, 8, 0.9, 4, 8))
    (tmp_path / "b.jpg").write_bytes(jpeg(2))
    retried = frame_of(aligncurate.ingest(file, tmp_path / "out", retry_errors=True, quiet=True).dataset)
    assert retried["score"][0] == pytest.approx(0.9) and retried["level"][0] == 4
    assert retried.equals(frame_of(aligncurate.ingest(file, tmp_path / "fresh", quiet=True).dataset))


@pytest.mark.parametrize("rows", [1, 3])
def test_a_source_that_grew_or_shrank_is_noticed(tmp_path, rows) -> None:
    for name in "abc":
        (tmp_path / f"{name}.jpg").write_bytes(jpeg())
    options = SourceOptions(rows_per_shard=1)
    file = table_of(tmp_path, {"a.jpg": "a", "b.jpg": "b"})
    aligncurate.ingest(file, tmp_path / "out", source=options, quiet=True)
    table_of(tmp_path, {f"{name}.jpg": "caption" for name in "abc"[:rows]})
    with pytest.raises(UserError, match=r"rows\.csv has changed since\); add --retry-errors"):
        aligncurate.ingest(file, tmp_path / "out", source=options, quiet=True)
    retried = aligncurate.ingest(file, tmp_path / "out", source=options, retry_errors=True, quiet=True).dataset
    assert frame_of(retried)["caption"].to_list() == ["caption"] * rows
    assert len(list((tmp_path / "out/data").iterdir())) == rows


def test_a_retry_of_a_file_that_gained_a_column_leaves_it_out_and_says_so(tmp_path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jpg").write_bytes(jpeg())
    file = tmp_path / "rows.csv"
    file.write_text("image,caption,old\na.jpg,a,1\nb.jpg,b,2\nc.jpg,c,3\n")
    assert cli("ingest", file, "--out", tmp_path / "out").exit_code == 0
    (tmp_path / "c.jpg").write_bytes(jpeg())
    file.write_text("image,caption,old,new\na.jpg,a,1,x\nb.jpg,b,2,y\nc.jpg,c,3,z\n")
    assert "add --retry-errors" in complaint(cli("ingest", file, "--out", tmp_path / "out"))
    run = cli("ingest", file, "--out", tmp_path / "out", "--retry-errors")
    assert run.exit_code == 0 and run.stderr.count("new: the dataset has no such column, so it is left out") == 1
    assert "this run: ingested 1 row" in run.stdout and "all 3 rows: ok 3" in run.stdout
    frame = frame_of(aligncurate.open_dataset(tmp_path / "out"))
    fresh = frame_of(aligncurate.ingest(file, tmp_path / "fresh", quiet=True).dataset)
    assert frame.equals(fresh.drop("new"))
    again = cli("ingest", file, "--out", tmp_path / "out", "--retry-errors")
    assert "nothing to do" in again.stdout
    file.write_text("image,caption,old\na.jpg,a,1\nb.jpg,b,2\nc.jpg,c,three\n")  # another type is no new column
    found = complaint(cli("ingest", file, "--out", tmp_path / "out", "--retry-errors"))
    assert "column old: int64, now string" in found


def test_a_retry_that_fails_leaves_the_dataset_unfinished(tmp_path, monkeypatch) -> None:
    for number in range(2):
        write_tar(tmp_path / f"{number}.tar", {f"{number}": {"jpg": b"", "txt": b"x"}})
    tars = [tmp_path / "0.tar", tmp_path / "1.tar"]
    aligncurate.ingest(tars, tmp_path / "out", quiet=True)
    real = storage.open_file
    with monkeypatch.context() as patch:
        patch.setattr(storage, "open_file", lambda uri: _refuse() if uri.endswith("1.tar") else real(uri))
        assert aligncurate.ingest(tars, tmp_path / "out", retry_errors=True, quiet=True).dataset is None
    with pytest.raises(UserError, match="not finished"):
        aligncurate.open_dataset(tmp_path / "out")
    assert aligncurate.ingest(tars, tmp_path / "out", quiet=True).dataset.rows == 2


def _refuse() -> None:
    raise OSError(5, "Input/output error")


def test_an_image_url_is_not_opened_by_a_later_verb(tmp_path, mini) -> None:
    (tmp_path / "secret.jpg").write_bytes(jpeg())
    rows = [{"image": f"file://{tmp_path}/secret.jpg", "caption": "c"}]
    (tmp_path / "in").mkdir()
    (tmp_path / "in/rows.json").write_text(json.dumps(rows))
    ingested = aligncurate.ingest(tmp_path / "in", tmp_path / "ingested", quiet=True).dataset
    scored = aligncurate.score(ingested.path, tmp_path / "scored", **mini, quiet=True).dataset
    assert scored.statuses == {"unsafe_path": 1}


def test_brackets_in_a_folder_name_are_not_wildcards(tmp_path) -> None:
    for folder, count in (("s[1]", 3), ("s1", 1)):
        write_tar(tmp_path / "in.tar", pairs(count))
        aligncurate.ingest(tmp_path / "in.tar", tmp_path / folder, quiet=True)
    assert frame_of(aligncurate.open_dataset(tmp_path / "s[1]")).height == 3
    kept = aligncurate.filter(tmp_path / "s[1]", tmp_path / "k[2]", where="width > 0", quiet=True)
    assert kept.rows == 3


def test_own_uids_reach_the_datacomp_list(tmp_path) -> None:
    uids = ["f" * 31 + "5", "0" * 31 + "6"]
    pq.write_table(pa.table({"uid": uids, "image": [jpeg(0), jpeg(1)], "caption": ["a", "b"]}), tmp_path / "a.parquet")
    dataset = aligncurate.ingest(tmp_path / "a.parquet", tmp_path / "in", quiet=True).dataset
    aligncurate.export(dataset, tmp_path / "out", format="datacomp-uids", quiet=True)
    found = [f"{int(a):016x}{int(b):016x}" for a, b in np.load(tmp_path / "out/uids.npy")]
    assert found == sorted(uids)


def test_columns_keep_their_types_beside_untyped_sources(tmp_path) -> None:
    typed = {
        "sim": pa.array([0.5], pa.float32()),
        "n": pa.array([1], pa.int32()),
        "big": pa.array(["x"], pa.large_string()),
        "text_embedding": pa.array([[0.1, 0.2]], pa.list_(pa.float64())),
    }
    pq.write_table(pa.table({"image": [jpeg()], "caption": ["c"], **typed}), tmp_path / "a.parquet")
    write_tar(tmp_path / "b.tar", pairs(1))
    dataset = aligncurate.ingest([tmp_path / "a.parquet", tmp_path / "b.tar"], tmp_path / "in", quiet=True).dataset
    for name, values in typed.items():
        assert dataset.schema.field(name).type == (pa.string() if name == "big" else values.type)
        assert dataset.read(0, [name])[name].to_pylist() == values.to_pylist()
        assert dataset.read(1, [name])[name].to_pylist() == [None]


def test_only_good_rows_with_finite_scores_get_levels(tmp_path) -> None:
    scores = [0.1, float("nan"), 0.2, 0.3, float("inf"), 0.9]
    images = [jpeg()] * 5 + [b"broken"]
    for kind in (pa.float32(), pa.float64()):
        table = pa.table({"image": images, "caption": ["c"] * 6, "sim": pa.array(scores, kind)})
        pq.write_table(table, tmp_path / f"{kind}.parquet")
        dataset = aligncurate.ingest(tmp_path / f"{kind}.parquet", tmp_path / f"in-{kind}", quiet=True).dataset
        labelled = aligncurate.bucket(dataset, tmp_path / f"out-{kind}", levels=3, score_column="sim", quiet=True)
        assert frame_of(labelled)["level"].to_list() == [1, None, 2, 3, None, None]
        saved = json.loads((labelled.path / "thresholds.json").read_text())
        assert (saved["count"], saved["maximum"]) == (3, pytest.approx(0.3))
        best = aligncurate.filter(labelled, tmp_path / f"top-{kind}", top_fraction=0.3, score_column="sim", quiet=True)
        assert frame_of(best)["sim"].to_list() == pytest.approx([0.3])


def test_levels_that_came_with_the_source_can_be_used(tmp_path) -> None:
    samples = {
        f"{i}": {"jpg": jpeg(i), "txt": b"c", "json": b'{"score": 0.%d, "level": %d}' % (i, i + 1)} for i in range(4)
    }
    write_tar(tmp_path / "in.tar", samples)
    dataset = aligncurate.ingest(tmp_path / "in.tar", tmp_path / "in", quiet=True).dataset
    assert dataset.levels == 4
    assert [level.count for level in aligncurate.inspect(dataset).levels] == [1, 1, 1, 1]
    assert aligncurate.filter(dataset, tmp_path / "best", levels="3-4", quiet=True).rows == 2
    assert len(aligncurate.export(dataset, tmp_path / "out", per_level=True, quiet=True).files) == 4


def test_conversations_say_where_the_image_goes(tmp_path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg())
    parts = [{"type": "image_url", "image_url": {"url": "a.jpg"}}, {"type": "text", "text": "what?"}]
    rows = [
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "that"}]},
        {"image": "a.jpg", "conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "that"}]},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    dataset = aligncurate.ingest(tmp_path / "rows.json", tmp_path / "in", quiet=True).dataset
    aligncurate.export(dataset, tmp_path / "out", format="llava-json", quiet=True)
    for entry in json.loads((tmp_path / "out/annotations.json").read_text()):
        assert entry["conversations"][0] == {"from": "human", "value": "<image>\nwhat?"}


def test_an_export_tries_failed_images_again(tmp_path) -> None:
    write_tar(tmp_path / "in.tar", pairs(3))
    dataset = aligncurate.ingest(tmp_path / "in.tar", tmp_path / "in", quiet=True).dataset
    (tmp_path / "in.tar").rename(tmp_path / "away.tar")
    assert len(aligncurate.export(dataset, tmp_path / "out", quiet=True).failed) == 3
    (tmp_path / "away.tar").rename(tmp_path / "in.tar")
    done = aligncurate.export(dataset, tmp_path / "out", quiet=True)
    assert (done.rows, done.failed) == (3, [])
    assert not (tmp_path / "out/failed.jsonl").exists()


@pytest.mark.parametrize("change", ["junk", "column", "rows", "gone"])
def test_a_parquet_source_that_was_replaced_is_a_failed_row(tmp_path, change, mini) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [jpeg(0), jpeg(1)], "caption": ["a", "b"]}), file)
    dataset = aligncurate.ingest(file, tmp_path / "in", quiet=True).dataset
    if change == "junk":
        file.write_bytes(b"junk")
    elif change == "column":
        pq.write_table(pa.table({"picture": [jpeg(0)], "caption": ["a"]}), file)
    elif change == "rows":
        pq.write_table(pa.table({"image": [jpeg(5)], "caption": ["a"]}), file)
    else:
        file.unlink()
    assert len(aligncurate.export(dataset, tmp_path / "out", quiet=True).failed) == 2
    run = aligncurate.score(dataset.path, tmp_path / "scored", **mini, quiet=True)
    if change == "gone":  # perhaps for a moment only
        assert run.dataset is None and "No such file" in run.failures[0].error
    else:
        assert set(run.dataset.statuses) <= {"read_error", "missing_image"}


def test_a_missing_caption_is_checked_again_with_another_score_text(tmp_path, mini) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg())
    rows = [{"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\nwhat is this?"}]}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    first = aligncurate.score(tmp_path / "rows.json", tmp_path / "one", **mini, quiet=True).dataset
    assert first.statuses == {"missing_caption": 1}
    again = aligncurate.score(first.path, tmp_path / "two", **mini, score_text="user", quiet=True).dataset
    assert again.statuses == {"ok": 1}


def test_ranges_are_right_with_many_threads_and_files(tmp_path, monkeypatch) -> None:
    """There are more files than the descriptor cache holds, so it closes some while others are read."""
    for number in range(200):
        (tmp_path / str(number)).write_bytes(f"{number:08d}".encode())
    wrong: list[object] = []

    def read(seed: int) -> None:
        for number in np.random.default_rng(seed).integers(0, 200, 2_000):
            try:
                data = storage.read_range(str(tmp_path / str(number)), 0, 8)
            except OSError as error:
                wrong.append(error)
                continue
            if data != f"{number:08d}".encode():
                wrong.append((number, data))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_image_root_is_the_same_folder_from_anywhere(tmp_path, monkeypatch) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.jpg").write_bytes(jpeg())
    file = table_of(tmp_path, {"a.jpg": "a"})
    monkeypatch.chdir(tmp_path)
    aligncurate.ingest(file, "out", source=SourceOptions(image_root="images"), quiet=True)
    (tmp_path / "other/images").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "other")
    with pytest.raises(UserError, match="--image-root"):
        aligncurate.ingest(file, tmp_path / "out", source=SourceOptions(image_root="images"), quiet=True)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "not a JSON file"),
        ("[]", "not an open_clip config"),
        ('{"embed_dim": 1, "vision_cfg": 1, "text_cfg": 2}', "could not be loaded"),
    ],
)
def test_a_broken_model_config_is_named_and_does_not_affect_later_runs(tmp_path, mini, content, sentence) -> None:
    (tmp_path / "broken.json").write_text(content)
    write_tar(tmp_path / "in.tar", pairs(1))
    with pytest.raises(UserError, match=sentence):
        options = {"model_config": tmp_path / "broken.json", "pretrained": mini["pretrained"]}
        aligncurate.score(tmp_path / "in.tar", tmp_path / "no", **options, quiet=True)
    assert aligncurate.score(tmp_path / "in.tar", tmp_path / "out", **mini, quiet=True).rows == 1


@pytest.mark.parametrize("ending", ["safetensors", "pt", "bin"])
@pytest.mark.parametrize("content", [b"", b"junk" * 100])
def test_broken_weights_are_named(tmp_path, mini, ending, content) -> None:
    weights = tmp_path / f"weights.{ending}"
    weights.write_bytes(content)
    write_tar(tmp_path / "in.tar", pairs(1))
    with pytest.raises(UserError, match=f"weights.{ending}"):
        options = {"model_config": mini["model_config"], "pretrained": weights}
        aligncurate.score(tmp_path / "in.tar", tmp_path / "no", **options, quiet=True)
