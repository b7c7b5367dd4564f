"""The verb `bucket`: levels, thresholds from a file, resuming, errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

import aligncurate
from aligncurate.demo.scenes import draw, make_scene, write_tars
from aligncurate.errors import UserError
from aligncurate.sources.options import SourceOptions
from aligncurate.verbs import bucket as bucketing


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("image") / "scene.jpg"
    draw(make_scene(0, 0)).save(path)
    return path.read_bytes()


def dataset_of(folder, image: bytes, scores: list[float | None], per_part: int = 100) -> aligncurate.Dataset:
    """A dataset with the given scores; rows without one have a broken image."""
    pl.DataFrame(
        {
            "image": [image if s is not None else b"" for s in scores],
            "caption": [f"caption {i}" for i in range(len(scores))],
            "score": pl.Series(scores, dtype=pl.Float32),
        }
    ).write_parquet(folder / "rows.parquet")
    options = SourceOptions(rows_per_shard=per_part)
    return aligncurate.ingest(folder / "rows.parquet", folder / "in", source=options, quiet=True).dataset


def levels(dataset: aligncurate.Dataset) -> list[int | None]:
    return dataset.scan().select("level").collect()["level"].to_list()


@pytest.mark.parametrize("method", ["quantile", "uniform"])
@pytest.mark.parametrize("count", [2, 5, 8])
def test_labels_follow_the_definition(tmp_path, image, method, count) -> None:
    rng = np.random.default_rng(count)
    numbers = np.round(rng.normal(0.2, 0.1, 350), 2).astype(np.float32)
    scores = [None if i % 10 == 3 else float(s) for i, s in enumerate(numbers)]
    labelled = aligncurate.bucket(
        dataset_of(tmp_path, image, scores), tmp_path / "out", levels=count, method=method, quiet=True
    )
    valid = np.array([s for s in scores if s is not None], np.float32)
    if method == "quantile":
        edges = [np.sort(valid)[int(np.ceil(k * len(valid) / count))] for k in range(1, count)]
    else:
        edges = list(np.linspace(float(valid.min()), float(valid.max()), count + 1)[1:-1])
    expected = [None if s is None else 1 + sum(np.float32(s) >= t for t in edges) for s in scores]
    assert levels(labelled) == expected
    saved = json.loads((labelled.path / "thresholds.json").read_text())
    assert saved == labelled.manifest["thresholds"]
    assert (saved["levels"], saved["method"], saved["count"]) == (count, method, len(valid))


def test_nothing_else_changes(tmp_path, image) -> None:
    before = dataset_of(tmp_path, image, [0.1, None, 0.3, 0.2])
    after = aligncurate.bucket(before, tmp_path / "out", quiet=True)
    assert after.scan().drop("level").collect().equals(before.scan().drop("level").collect())
    assert after.statuses == before.statuses


def test_frozen_thresholds_label_other_data(tmp_path, image) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    rng = np.random.default_rng(1)
    first = dataset_of(tmp_path / "a", image, rng.normal(0.2, 0.1, 200).tolist())
    aligncurate.bucket(first, tmp_path / "first", levels=4, quiet=True)
    other = rng.normal(0.3, 0.1, 50).astype(np.float32)
    second = dataset_of(tmp_path / "b", image, other.tolist())
    for name in ("first/thresholds.json", "first"):
        out = tmp_path / name.replace("/", "-")
        frozen = aligncurate.bucket(second, out.with_suffix(".out"), thresholds=tmp_path / name, quiet=True)
        edges = json.loads((tmp_path / "first/thresholds.json").read_text())["values"]
        assert levels(frozen) == [1 + sum(s >= np.float32(t) for t in edges) for s in other]
        assert frozen.manifest["thresholds"]["count"] == 200


def test_a_rerun_keeps_what_is_committed_and_refuses_other_options(tmp_path, image) -> None:
    dataset = dataset_of(tmp_path, image, np.linspace(0, 1, 250).tolist())
    out = tmp_path / "out"
    before = aligncurate.bucket(dataset, out, quiet=True)
    inodes = [f.stat().st_ino for f in before.files]
    before.files[1].unlink()
    after = aligncurate.bucket(dataset, out, quiet=True)
    assert [f.stat().st_ino for f in after.files][::2] == inodes[::2]
    assert after.manifest == before.manifest
    with pytest.raises(UserError, match=r"\(made with --levels 8, now 4\)"):
        aligncurate.bucket(dataset, out, levels=4, quiet=True)


def test_a_changed_input_is_refused(tmp_path, image) -> None:
    (tmp_path / "b").mkdir()
    first = dataset_of(tmp_path, image, [0.1, 0.2])
    aligncurate.bucket(first, tmp_path / "out", quiet=True)
    second = dataset_of(tmp_path / "b", image, [0.1, 0.25])
    with pytest.raises(
        UserError, match=r"b/in has been added.*; .*; \d of 7 thresholds changed because the scores differ\)"
    ):
        aligncurate.bucket(second, tmp_path / "out", quiet=True)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"levels": 1}, "--levels 1"),
        ({"levels": 128}, "--levels 128"),
        ({"method": "equal"}, "--method equal"),
        ({"score_column": "caption"}, "there is no score column caption; the dataset has score"),
        ({"thresholds": "nowhere.json"}, "no such file"),
    ],
)
def test_mistakes_are_named(tmp_path, image, options, sentence) -> None:
    dataset = dataset_of(tmp_path, image, [0.1, 0.2])
    with pytest.raises(UserError, match=sentence):
        aligncurate.bucket(dataset, tmp_path / "out", quiet=True, **options)
    assert not (tmp_path / "out").exists()


def test_threshold_files_that_cannot_be_used(tmp_path, image) -> None:
    dataset = dataset_of(tmp_path, image, [0.1, 0.2, 0.3, 0.4])
    file = aligncurate.bucket(dataset, tmp_path / "four", levels=4, quiet=True).path / "thresholds.json"
    with pytest.raises(UserError, match="4 levels, not 8"):
        aligncurate.bucket(dataset, tmp_path / "out", thresholds=file, levels=8, quiet=True)
    with pytest.raises(UserError, match="--method uniform: the --thresholds file has its own method"):
        aligncurate.bucket(dataset, tmp_path / "out", thresholds=file, method="uniform", quiet=True)
    (tmp_path / "no.json").write_text("{")
    with pytest.raises(UserError, match="not a JSON file"):
        aligncurate.bucket(dataset, tmp_path / "out", thresholds=tmp_path / "no.json", quiet=True)
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(UserError, match="not thresholds"):
        aligncurate.bucket(dataset, tmp_path / "out", thresholds=tmp_path / "other.json", quiet=True)


def test_thresholds_of_another_encoder_give_a_notice(tmp_path, scored, capsys) -> None:
    aligncurate.bucket(scored, tmp_path / "a", quiet=True)
    thresholds = json.loads((tmp_path / "a/thresholds.json").read_text())
    aligncurate.bucket(scored, tmp_path / "b", thresholds=tmp_path / "a")
    assert "expect levels of different sizes" not in capsys.readouterr().err
    thresholds["encoder"].update(model="ViT-B-32", pretrained="openai")
    (tmp_path / "other.json").write_text(json.dumps(thresholds))
    aligncurate.bucket(scored, tmp_path / "c", thresholds=tmp_path / "other.json")
    assert "scores of ViT-B-32 (openai), but these are from tiny (" in " ".join(capsys.readouterr().err.split())


def test_without_scores_there_is_nothing_to_bucket(tmp_path, image) -> None:
    dataset = dataset_of(tmp_path, image, [None, None])
    with pytest.raises(UserError, match="aligncurate score"):
        aligncurate.bucket(dataset, tmp_path / "out", quiet=True)


def test_never_in_place(tmp_path, image) -> None:
    dataset = dataset_of(tmp_path, image, [0.1, 0.2])
    with pytest.raises(UserError, match="nothing is changed in place"):
        aligncurate.bucket(dataset, dataset.path, quiet=True)


# Score counts that `score` saves


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> aligncurate.Dataset:
    folder = tmp_path_factory.mktemp("scored")
    write_tars(folder / "tars", 90, seed=5, shard_size=40)
    return aligncurate.score(folder / "tars", folder / "out", model="tiny", quiet=True).dataset


@pytest.fixture
def passes(monkeypatch) -> list[str]:
    """One entry for each pass over a dataset's scores."""
    columns: list[str] = []
    before = bucketing.iter_scores
    monkeypatch.setattr(bucketing, "iter_scores", lambda d, column: columns.append(column) or before(d, column))
    return columns


def edges(scores, count: int) -> list[float]:
    ordered = np.sort(np.asarray(scores, np.float32))
    return [float(ordered[-(-k * len(ordered) // count)]) for k in range(1, count)]


def test_counts_saved_by_score_save_the_first_pass(tmp_path, scored, passes) -> None:
    labelled = aligncurate.bucket(scored, tmp_path / "out", levels=5, quiet=True)
    assert passes == ["score"]
    assert labelled.manifest["thresholds"]["values"] == edges(scored.scan().collect()["score"], 5)


def test_counts_are_those_of_the_scores_and_no_part_line_repeats_them(scored) -> None:
    scores = np.sort(scored.scan().collect()["score"].to_numpy())
    assert scored.score_counts("score").total == len(scores) == 90
    assert scored.score_counts("score_other") is None
    assert all("score_counts" not in line for line in scored.manifest["parts"])


def test_a_rerun_finds_the_counts_in_the_parts(tmp_path, scored) -> None:
    source = Path(scored.scan().collect()["source"][0]).parent
    first = aligncurate.score(source, tmp_path / "out", model="tiny", quiet=True).dataset
    for lost in first.files[:2]:
        lost.unlink()
        again = aligncurate.score(source, tmp_path / "out", model="tiny", quiet=True).dataset
        assert again.manifest == first.manifest
    assert first.manifest["score_counts"] == scored.manifest["score_counts"]


def test_fewer_rows_have_counts_of_their_own(tmp_path, scored, passes) -> None:
    fewer = aligncurate.filter(scored, tmp_path / "fewer", top_fraction=0.5, quiet=True)
    assert fewer.score_counts("score").total == 45
    levelled = aligncurate.bucket(fewer, tmp_path / "out", levels=3, quiet=True)
    assert passes == ["score"]
    assert levelled.manifest["thresholds"]["values"] == edges(fewer.scan().collect()["score"], 3)
    assert levelled.manifest["score_counts"] == fewer.manifest["score_counts"]


@pytest.mark.parametrize("wrong", ["total", "shifted", "broken"])
def test_wrong_counts_are_not_used(tmp_path, scored, passes, wrong) -> None:
    dataset = aligncurate.Dataset(scored.path)
    noted = dataset.manifest["score_counts"]["score"]
    if wrong == "total":
        noted["counts"][0] += 1
    elif wrong == "shifted":
        noted["bins"] = [b - 100 for b in noted["bins"]]
    else:
        noted["bins"].reverse()
    labelled = aligncurate.bucket(dataset, tmp_path / "out", levels=4, quiet=True)
    assert len(passes) == (3 if wrong == "shifted" else 2)
    assert labelled.manifest["thresholds"]["values"] == edges(scored.scan().collect()["score"], 4)


def test_rows_that_are_not_ok_and_empty_parts_do_not_count(tmp_path, image) -> None:
    dataset = dataset_of(tmp_path, image, [None, None, 0.5, 0.25, None, 0.75], per_part=2)
    empty = aligncurate.filter(dataset, tmp_path / "some", where="score > 0.3", quiet=True)
    found = [part.tolist() for part in bucketing.iter_scores(empty, "score")]
    assert found == [[], [0.5], [0.75]]


def test_images_and_embeddings_stay_as_they_were(tmp_path) -> None:
    write_tars(tmp_path / "tars", 50, seed=6, shard_size=30)
    options = {"embed_images": True, "embeddings": "fp16"}
    dataset = aligncurate.score(tmp_path / "tars", tmp_path / "in", model="tiny", quiet=True, **options).dataset
    labelled = aligncurate.bucket(dataset, tmp_path / "out", levels=3, quiet=True)
    assert labelled.schema == dataset.schema
    assert [p.statuses for p in labelled.parts] == [p.statuses for p in dataset.parts]
    for before, after in zip(dataset.files, labelled.files, strict=True):
        assert pq.read_table(before).drop_columns("level").equals(pq.read_table(after).drop_columns("level"))
        assert pq.read_metadata(before).num_row_groups == pq.read_metadata(after).num_row_groups


def test_a_damaged_part_is_named_in_the_error(tmp_path, scored) -> None:
    dataset = aligncurate.filter(scored, tmp_path / "copy", top_fraction=1.0, quiet=True)
    dataset.files[1].write_bytes(dataset.files[1].read_bytes()[:-100])
    frozen = aligncurate.bucket(scored, tmp_path / "first", quiet=True).path
    with pytest.raises(UserError, match=r"part-00001\.parquet: the part is damaged"):
        aligncurate.bucket(dataset, tmp_path / "out", thresholds=frozen, quiet=True)
    assert not list((tmp_path / "out").glob(".tmp-*"))
