"""A dataset's folder: other tools open it, earlier versions' folders stay readable, damage is one sentence."""

from __future__ import annotations

import base64
import importlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

import aligncurate
from aligncurate.errors import UserError
from aligncurate.verbs.merge import merge
from tests.support.inputs import cli, jpeg, write_tar


@pytest.fixture(scope="module")
def levelled(tmp_path_factory, mini) -> aligncurate.Dataset:
    """Two parts of six rows, with scores and levels."""
    folder = tmp_path_factory.mktemp("folder")
    for part in range(2):
        samples = {f"{part}{n}": {"jpg": jpeg(6 * part + n), "txt": f"text {n}".encode()} for n in range(6)}
        write_tar(folder / f"{part}.tar", samples)
    aligncurate.score([folder / "0.tar", folder / "1.tar"], folder / "scored", **mini, quiet=True)
    return aligncurate.bucket(folder / "scored", folder / "out", levels=2, quiet=True)


def test_other_tools_open_the_folder(levelled, tmp_path) -> None:
    data, expected = levelled.path / "data", levelled.scan().collect()
    assert sorted(p.name for p in levelled.path.iterdir()) == [".receipts", "data", "manifest.json", "thresholds.json"]
    assert pl.read_parquet(data).equals(expected)
    assert pl.DataFrame(pq.read_table(data)).equals(expected)
    assert pl.DataFrame(ds.dataset(data).to_table()).equals(expected)


@pytest.mark.parametrize("tool", ["duckdb", "datasets"])
def test_tools_that_may_not_be_installed_open_it(levelled, tmp_path, tool) -> None:
    if importlib.util.find_spec(tool) is None:
        pytest.skip(f"{tool} is not installed")
    module: Any = importlib.import_module(tool)
    if tool == "duckdb":
        assert module.sql(f"SELECT key FROM '{levelled.path}/data/*.parquet'").fetchall() == [
            (key,) for key in levelled.scan().collect()["key"]
        ]
    else:
        for folder in (levelled.path, levelled.path / "data"):
            loaded = module.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))["train"]
            assert loaded["key"] == levelled.scan().collect()["key"].to_list()


def earlier_version(dataset: aligncurate.Dataset, target: Path) -> Path:
    """The dataset as versions before this one wrote it: parts on top, no receipts, schema version 1."""
    target.mkdir()
    manifest = json.loads((dataset.path / "manifest.json").read_text())
    for part, file in zip(manifest["parts"], dataset.files, strict=True):
        part["name"] = file.name
        del part["failed"]
        shutil.copy(file, target / file.name)
    manifest |= {"schema_version": 1, "versions": manifest.pop("written_with")}
    for name in ("arrow_schema", "computed_with", "sha256"):
        manifest.pop(name, None)
    if manifest["encoder"]:
        manifest["encoder"]["device"] = "cpu"
    (target / "manifest.json").write_text(json.dumps(manifest))
    return target


def test_folders_of_earlier_versions_are_read_by_every_verb(levelled, tmp_path) -> None:
    old = earlier_version(levelled, tmp_path / "old")
    opened = aligncurate.open_dataset(old)
    assert opened.scan().collect().equals(levelled.scan().collect())
    assert aligncurate.inspect(opened).levels == aligncurate.inspect(levelled).levels
    assert aligncurate.bucket(old, tmp_path / "bucket", levels=3, quiet=True).rows == 12
    assert aligncurate.filter(old, tmp_path / "filter", levels="2", quiet=True).rows == 6
    assert aligncurate.export(old, tmp_path / "export", quiet=True).rows == 12
    assert aligncurate.ingest(old, tmp_path / "ingest", quiet=True).dataset.rows == 12
    assert merge([old, levelled.path], tmp_path / "merge", quiet=True).rows == 24
    source = old.parent / "scored"
    earlier_version(aligncurate.open_dataset(levelled.path.parent / "scored"), source)
    with pytest.raises(UserError, match="made with schema version 1, now 2"):
        aligncurate.ingest(levelled.path.parent / "0.tar", source, quiet=True)


@pytest.mark.parametrize("seed", range(40))
def test_a_flipped_bit_is_found_or_changes_nothing(levelled, tmp_path, seed) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(levelled.path, folder)
    part = folder / "data/part-00001.parquet"
    data = bytearray(part.read_bytes())
    footer = int.from_bytes(data[-8:-4], "little") + 8
    rng = random.Random(seed)
    data[rng.randrange(4, len(data) - footer)] ^= 1 << rng.randrange(8)
    part.write_bytes(data)
    dataset, expected = aligncurate.open_dataset(folder), levelled.scan().collect()
    for read in (
        lambda: pl.DataFrame(dataset.read(1)),
        lambda: dataset.scan(1).collect(),
        lambda: aligncurate.bucket(folder, tmp_path / "out", levels=2, quiet=True).scan(1).collect(),
        lambda: aligncurate.filter(folder, tmp_path / "kept", where="score < 2", quiet=True).scan(1).collect(),
    ):
        try:
            found = read()
        except UserError as error:
            assert str(part) in str(error)
        else:
            assert found.equals(expected[6:])


OTHER = base64.b64encode(pa.schema([("key", pa.int8())]).serialize().to_pybytes()).decode()
MANIFEST_DAMAGE: list[tuple[str, Any]] = [
    ("parts", None), ("parts", {}), ("parts", [7]), ("parts", [{}]), ("complete", None), ("complete", 1),
    ("schema_version", None), ("schema_version", []), ("schema_version", 10**400), ("verb", None), ("options", []),
    ("inputs", 3), ("inputs", [3]), ("inputs", [{"files": [1]}]), ("history", 7), ("history", [{}]),
    ("history", [{"verb": "bucket", "options": {}, "inputs": []}]), ("encoder", 5), ("encoder", {}),
    ("encoder", {"model": 3}), ("encoders", {"score": 3}), ("encoders", []), ("thresholds", 3), ("thresholds", {}),
    ("thresholds", {"method": "quantile", "levels": 2, "values": [10**400], "score_column": "score", "count": 1,
                    "minimum": 0, "maximum": 1, "encoder": None}),
    ("columns", 3), ("arrow_schema", 3), ("arrow_schema", "AAAA"), ("arrow_schema", "é"),
    ("arrow_schema", "/////" + "BAAA" * 90), ("arrow_schema", OTHER), ("columns", {"key": "int8"}),
    ("computed_with", [3]), ("score_counts", 3), ("written_with", []),
]  # fmt: skip
PART_DAMAGE: list[tuple[str, Any]] = [
    ("name", "../../etc/part-00000.parquet"), ("name", "/data/part-00000.parquet"), ("name", "data/part-0.parquet"),
    ("name", "data/../part-00000.parquet"), ("name", "part-00000.parquet\n"), ("name", "data/part-00001.parquet"),
    ("name", "manifest.json"), ("name", None), ("rows", -6), ("rows", 10**30), ("rows", 6.0), ("rows", "6"),
    ("rows", True), ("rows", 7), ("bytes", -1), ("bytes", None), ("sha256", "ab"), ("sha256", 3), ("statuses", []),
    ("statuses", {"ok": -6}), ("statuses", {"ok": "6"}),
]  # fmt: skip


def nested(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth):
        value = {"a": [value]}
    return value


@pytest.mark.parametrize(("name", "value"), [*MANIFEST_DAMAGE, ("options", nested(200)), ("extra", nested(40))])
def test_a_damaged_manifest_is_one_sentence(levelled, tmp_path, name, value) -> None:
    check_manifest(levelled, tmp_path, lambda manifest: manifest | {name: value})


@pytest.mark.parametrize(("name", "value"), PART_DAMAGE)
def test_a_damaged_line_of_a_part_is_one_sentence(levelled, tmp_path, name, value) -> None:
    def change(manifest: dict[str, Any]) -> dict[str, Any]:
        manifest["parts"][0][name] = value
        return manifest

    check_manifest(levelled, tmp_path, change)


def check_manifest(dataset: aligncurate.Dataset, folder: Path, change: Any) -> None:
    shutil.copytree(dataset.path, folder / "out")
    file = folder / "out/manifest.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    for act in (
        lambda: aligncurate.open_dataset(folder / "out"),
        lambda: aligncurate.bucket(dataset.path.parent / "scored", folder / "out", levels=2, quiet=True),
    ):
        with pytest.raises(UserError, match=r"manifest\.json: "):
            act()
    assert cli("inspect", folder / "out").exit_code == 2


def test_half_characters_in_a_manifest_are_kept(levelled, tmp_path) -> None:
    shutil.copytree(levelled.path, tmp_path / "in")
    file = tmp_path / "in/manifest.json"
    manifest = json.loads(file.read_text())
    manifest["options"]["half"] = chr(0xD800)
    file.write_text(json.dumps(manifest))
    made = aligncurate.filter(tmp_path / "in", tmp_path / "out", where="score < 2", quiet=True)
    assert manifest["options"] in [step["options"] for step in made.manifest["history"]]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"name": 3}', "[" * 10_000, "\0", '{"rows": 1e999}'])
def test_a_damaged_receipt_makes_its_part_again(levelled, tmp_path, text, capsys) -> None:
    scored = levelled.path.parent / "scored"
    folder = aligncurate.bucket(scored, tmp_path / "out", levels=2, quiet=True).path
    (folder / ".receipts/part-00001.json").write_text(text)
    (folder / "data/part-00000.parquet").unlink()  # so that there is something to do
    again = aligncurate.bucket(scored, folder, levels=2, quiet=True)
    assert again.scan().collect().equals(levelled.scan().collect())
    assert "part-00001.json: damaged" in " ".join(capsys.readouterr().err.split())


def test_a_receipt_of_other_counts_or_another_part_is_damaged(levelled, tmp_path, capsys) -> None:
    scored = levelled.path.parent / "scored"
    folder = aligncurate.bucket(scored, tmp_path / "out", levels=2, quiet=True).path
    receipts = [folder / f".receipts/part-0000{n}.json" for n in range(2)]
    first = json.loads(receipts[0].read_text())
    for content in (first, first | {"name": "data/part-00001.parquet", "score_counts": {"score": {"bins": [1]}}}):
        receipts[1].write_text(json.dumps(content))
        (folder / "data/part-00000.parquet").unlink()
        again = aligncurate.bucket(scored, folder, levels=2, quiet=True)
        assert again.scan().collect().equals(levelled.scan().collect())
        assert "part-00001.json: damaged" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("text", ["", "[", "[]", "{}", "[" * 100_000, '{"method": "quantile"}', "\xff"])
def test_damaged_thresholds_are_one_sentence(levelled, tmp_path, text) -> None:
    (tmp_path / "thresholds.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"thresholds\.json: "):
        aligncurate.bucket(levelled, tmp_path / "out", thresholds=tmp_path / "thresholds.json", quiet=True)
