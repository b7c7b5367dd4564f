"""A wrong --image-root is corrected with --retry-errors: failed rows are redone, good rows are kept."""

from __future__ import annotations

from pathlib import Path

import pytest

import aligncurate
from aligncurate.dataset.pointers import Pointer
from aligncurate.scoring.shard import ShardScorer
from aligncurate.sources.options import SourceOptions
from tests.support.inputs import cli, complaint, jpeg, pairs, write_tar


def image_folder(folder: Path, *seeds: int) -> Path:
    folder.mkdir()
    for seed in seeds:
        (folder / f"{seed}.jpg").write_bytes(jpeg(seed))
    return folder


@pytest.fixture
def table(tmp_path) -> Path:
    """Four rows, whose images are elsewhere."""
    (tmp_path / "a.csv").write_text("image,caption\n" + "".join(f"{n}.jpg,caption {n}\n" for n in range(4)))
    return tmp_path / "a.csv"


def ingest(table: Path, out: Path, root: Path | None, *more: object):
    options = ("--image-root", root) if root else ()
    return cli("ingest", table, "--out", out, "--rows-per-shard", 2, *options, *more)


def rows(out: Path) -> list[dict]:
    return aligncurate.open_dataset(out).scan().collect().to_dicts()


@pytest.mark.parametrize("wrong", [None, "wrong"])
def test_a_wrong_image_root_is_corrected(tmp_path, table, wrong) -> None:
    out, right = tmp_path / "out", image_folder(tmp_path / "right", 0, 1, 2, 3)
    assert ingest(table, out, wrong and image_folder(tmp_path / wrong)).exit_code == 0
    assert {row["status"] for row in rows(out)} == {"missing_image"}
    refused = complaint(ingest(table, out, right))
    assert "--image-root" in refused and refused.endswith(
        "add --retry-errors to redo only what failed or changed, or choose another --out."
    )
    assert ingest(table, out, right, "--retry-errors").exit_code == 0
    assert ingest(table, tmp_path / "fresh", right).exit_code == 0
    for part in ("data/part-00000.parquet", "data/part-00001.parquet"):
        assert (out / part).read_bytes() == (tmp_path / "fresh" / part).read_bytes()
    assert "earlier run" in ingest(table, out, right).stdout


def test_other_options_stay_refused(tmp_path, table) -> None:
    out, right = tmp_path / "out", image_folder(tmp_path / "right", 0)
    ingest(table, out, image_folder(tmp_path / "wrong"))
    refused = complaint(ingest(table, out, right, "--retry-errors", "--limit", 3))
    assert "(made without --limit, now with 3); choose another --out" in refused


def test_good_rows_keep_their_pointers_and_scores(tmp_path, table, mini) -> None:
    first, second = image_folder(tmp_path / "first", 0, 1), image_folder(tmp_path / "second", 2)
    write_tar(second / "more.tar", {"3": pairs(4)["s3"]})
    for root, retry in ((first, False), (second, True)):
        source = SourceOptions(image_root=str(root))
        aligncurate.score(table, tmp_path / "out", **mini, source=source, retry_errors=retry, quiet=True)
        found = rows(tmp_path / "out")
        if root is first:
            before = found
            assert [row["status"] for row in found] == ["ok", "ok", "missing_image", "missing_image"]
    assert found[:2] == before[:2]
    assert [row["status"] for row in found] == ["ok"] * 4
    assert found[3]["source"] == str(second / "more.tar")
    assert [Pointer.of(row).read() for row in found] == [jpeg(n) for n in range(4)]


def test_a_changed_text_is_done_again(tmp_path, table) -> None:
    first, second = image_folder(tmp_path / "first", 0, 2), image_folder(tmp_path / "second", 0, 1, 2, 3)
    ingest(table, tmp_path / "out", first)
    table.write_text(table.read_text().replace("caption 0", "CAPTION 0"))
    assert ingest(table, tmp_path / "out", second, "--retry-errors").exit_code == 0
    kept = [row["image_path"] for row in rows(tmp_path / "out")]
    assert kept == [str(folder / f"{n}.jpg") for n, folder in enumerate((second, second, first, second))]


def test_an_interrupted_correction_can_be_continued(tmp_path, table, monkeypatch) -> None:
    out = tmp_path / "out"
    first, second = image_folder(tmp_path / "first", 0, 2), image_folder(tmp_path / "second", 1, 3)
    ingest(table, out, first)
    part = ShardScorer.part

    def interrupted(scorer, shard, check):
        if shard.index == 1:
            raise RuntimeError("out of power")
        return part(scorer, shard, check)

    with monkeypatch.context() as patch:
        patch.setattr(ShardScorer, "part", interrupted)
        with pytest.raises(RuntimeError, match="out of power"):
            aligncurate.ingest(
                table, out, source=SourceOptions(image_root=str(second), rows_per_shard=2), retry_errors=True
            )
    assert "add --retry-errors" in complaint(ingest(table, out, second))
    assert ingest(table, out, second, "--retry-errors").exit_code == 0
    assert [row["status"] for row in rows(out)] == ["ok"] * 4
    assert "earlier run" in ingest(table, out, second).stdout
