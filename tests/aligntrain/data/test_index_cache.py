"""Indexes kept by content: shared by plan and every output folder, never used when anything differs or is damaged."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aligncurate import ingest
from aligntrain import train
from aligntrain.data import index_cache, indexing
from aligntrain.tools.preview import preview
from tests.support.stage_data import captions, finetuning, make_models, picture, pretraining


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "aligncurate" / "indexes"


@pytest.fixture
def tokenized(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every pass over the data."""
    passes: list[int] = []
    real = indexing._rows
    monkeypatch.setattr(indexing, "_rows", lambda *given: (passes.append(1), real(*given))[1])
    return passes


def test_plan_and_all_runs_share_an_index(
    models: dict[str, str], tmp_path: Path, cache: Path, tokenized: list[int]
) -> None:
    ingest([captions(tmp_path / "c.tar", 9)], tmp_path / "set", quiet=True)
    config = pretraining(models, str(tmp_path / "set"), tmp_path / "a", max_steps=1)
    planned = preview(config).facts
    digests = set()
    for name in ("a", "b"):
        result = train(config.replace(out=str(tmp_path / name), learning_rate=0.5, batch_size=4))
        assert result.facts == planned
        digests.add(json.loads((tmp_path / name / "index.json").read_text())["digest"])
    assert len(tokenized) == len(digests) == len(list(cache.iterdir())) == 1
    others = [
        config.replace(max_length=88),
        config.replace(num_levels=9),
        config.replace(template="v1", max_length=400, token_budget=400),
    ]
    for number, other in enumerate(others, 2):
        preview(other)
        assert len(tokenized) == number
    ingest([captions(tmp_path / "d.tar", 9, levels=4)], tmp_path / "other", quiet=True)
    assert preview(config.replace(data=[str(tmp_path / "other")])).facts.levels.keys() == {1, 2, 3, 4}
    assert len(tokenized) == 5


@pytest.mark.parametrize("name", ["index.arrow", "index.json"])
@pytest.mark.parametrize("content", [b"", b"{}", None])
def test_a_damaged_one_is_made_again(
    models: dict[str, str], tmp_path: Path, cache: Path, tokenized: list[int], name: str, content: bytes | None
) -> None:
    config = pretraining(models, captions(tmp_path / "c.tar", 9), tmp_path / "out")
    facts = preview(config).facts
    (kept,) = cache.iterdir()
    (kept / name).unlink()
    if content is not None:
        (kept / name).write_bytes(content)
    for _ in range(2):
        assert preview(config).facts == facts
    assert len(tokenized) == 2


def test_a_cache_that_cannot_be_used_is_done_without(
    models: dict[str, str], tmp_path: Path, cache: Path, tokenized: list[int]
) -> None:
    cache.parent.parent.mkdir()
    cache.parent.write_text("a file in the place of the folder")
    config = pretraining(models, captions(tmp_path / "c.tar", 9), tmp_path / "out")
    for _ in range(2):
        assert preview(config).facts.rows == 9
    assert len(tokenized) == 2


def test_the_oldest_are_deleted(
    models: dict[str, str], tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = pretraining(models, captions(tmp_path / "c.tar", 9), tmp_path / "out")
    preview(config)
    (first,) = cache.iterdir()
    os.utime(first, (1, 1))
    size = sum(file.stat().st_size for file in first.iterdir())
    monkeypatch.setattr(index_cache, "_MOST_BYTES", int(2.5 * size))
    for length in (88, 80):
        preview(config.replace(max_length=length))
    assert len(list(cache.iterdir())) == 2 and not first.exists()


@pytest.mark.parametrize("kind", ["json", "csv", "parquet", "imagefolder", "beside", "beside, later"])
def test_what_depends_on_other_files_is_read_again(
    models: dict[str, str], tmp_path: Path, cache: Path, kind: str
) -> None:
    """Half of the images arrive, or the levels do, after a plan and a finished run: a new plan and run use them."""
    folder = tmp_path / "in"
    folder.mkdir()
    names = [f"{n}.png" for n in range(8)]
    texts = [f"a thing {n}" for n in range(8)]
    table = pa.table({"image": names, "caption": texts})
    data = folder / f"data.{kind}"

    def levels(count: int) -> None:
        pq.write_table(
            pa.table({"key": [f"c{n:03d}" for n in range(count)], "level": [1] * count}), folder / "c.parquet"
        )

    def arrive(names: list[str]) -> None:
        for name in names:
            (folder / name).write_bytes(picture(int(name[0])))

    if kind == "json":
        data.write_text(json.dumps(table.to_pylist()))
    elif kind == "csv":
        data.write_text("".join(f"{a},{b}\n" for a, b in [("image", "caption"), *zip(names, texts, strict=True)]))
    elif kind == "parquet":
        pq.write_table(table, data)
    elif kind == "imagefolder":
        data = folder
        for name, text in zip(names, texts, strict=True):
            (folder / name).with_suffix(".txt").write_text(text)
    else:
        data = Path(captions(folder / "c.tar", 8, levels=None))
        if kind == "beside":
            levels(4)
    arrive(names[:4])
    needs = {"num_levels": 2} if "beside" in kind else {"align_mode": "none"}
    config = pretraining(models, str(data), tmp_path / "out", max_steps=1, **needs)
    if kind != "beside, later":
        assert preview(config).facts.rows == 4
        assert train(config).facts.rows == 4
    else:
        finetune = finetuning(models, str(data), tmp_path / "out", max_steps=1)
        assert preview(finetune).facts.levels == {0: 8}
    arrive(names[4:])
    if "beside" in kind:
        levels(8)
    assert preview(config).facts.rows == 8
    if kind == "beside, later":
        assert preview(finetune).facts.levels == {1: 8}
    assert train(config.replace(out=str(tmp_path / "new"))).facts.rows == 8
    assert train(config.replace(resume=False)).facts.rows == 8
    assert not cache.exists() or kind == "beside, later"


def test_images_inside_parquet_share_an_index_however_the_image_root_is_typed(
    models: dict[str, str], tmp_path: Path, cache: Path, tokenized: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {"image": [picture(n) for n in range(4)], "caption": [f"a thing {n}" for n in range(4)], "level": [1] * 4}
    pq.write_table(pa.table(rows), tmp_path / "data.parquet")
    (tmp_path / "pictures" / "pictures").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    config = pretraining(models, str(tmp_path / "data.parquet"), tmp_path / "out", num_levels=2)
    for root in ("pictures", str(tmp_path / "pictures"), "./pictures/"):
        assert preview(config.replace(image_root=root)).facts.rows == 4
    assert len(tokenized) == 1
    monkeypatch.chdir("pictures")
    preview(config.replace(image_root="pictures"))
    assert len(tokenized) == 2
