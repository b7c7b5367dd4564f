"""Datasets: schema, manifest, atomic parts, resuming, one writer at a time."""

import hashlib
import json
import multiprocessing
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import aligncurate
from aligncurate.dataset.receipt import PartInfo
from aligncurate.dataset.record import COLUMNS, Pair, Status, schema, to_table
from aligncurate.dataset.writer import DatasetWriter
from aligncurate.demo.scenes import write_tars
from aligncurate.errors import UserError

HEAD = {"verb": "test", "options": {"a": 1}, "inputs": []}
SCHEMA = schema({"url": pa.string()})


def table(keys: str) -> pa.Table:
    return to_table([Pair(k, "somewhere", caption=k, extra={"url": f"http://{k}"}) for k in keys], SCHEMA)


def write(path: Path, parts: list[str], **changes) -> aligncurate.Dataset:
    writer = DatasetWriter(path, {**HEAD, **changes}, SCHEMA)
    with writer.open():
        for number, keys in enumerate(parts):
            with writer.part(number) as part:
                part.write(table(keys))
        return writer.finish(len(parts))


@pytest.fixture(scope="module")
def ingested(tmp_path_factory) -> aligncurate.Dataset:
    folder = tmp_path_factory.mktemp("dataset")
    write_tars(folder / "tars", 50, seed=9, shard_size=20)
    return aligncurate.ingest(folder / "tars", folder / "out", quiet=True).dataset


def test_parts_have_the_contract_columns(ingested) -> None:
    found = pq.read_schema(ingested.files[0])
    expected = {n: t for n, t in COLUMNS.items() if n != "image"}
    assert {f.name: f.type for f in found if f.name in COLUMNS} == expected
    assert found.names[: len(expected)] == list(expected)
    assert [f.name for f in ingested.files] == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]


def test_the_manifest_describes_every_part(ingested) -> None:
    manifest = json.loads((ingested.path / "manifest.json").read_text())
    assert (manifest["schema_version"], manifest["verb"], manifest["complete"]) == (2, "ingest", True)
    assert manifest["columns"]["correctness"] == "string"
    assert {"pyarrow", "polars", "aligncurate"} == set(manifest["written_with"])
    for line, file in zip(manifest["parts"], ingested.files, strict=True):
        assert line["bytes"] == file.stat().st_size
        assert line["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
        assert line["rows"] == pq.read_metadata(file).num_rows == line["ok"]
    assert [line["rows"] for line in manifest["parts"]] == [20, 20, 10]


def test_pointers_lead_to_the_image_bytes(ingested) -> None:
    for row in ingested.scan().collect().to_dicts():
        with Path(row["source"]).open("rb") as file:
            file.seek(row["image_offset"])
            assert hashlib.sha256(file.read(row["image_length"])).digest() == row["sha256"]


def test_an_error_leaves_no_part(tmp_path) -> None:
    writer = DatasetWriter(tmp_path / "out", HEAD, SCHEMA)
    with writer.open():
        with pytest.raises(ZeroDivisionError), writer.part(0) as part:
            part.write(table("ab"))
            raise ZeroDivisionError
        assert not writer.committed(1)
        assert [p.name for p in writer.path.rglob("*") if p.is_file() and p.name != ".lock"] == ["manifest.json"]


def test_leftovers_of_a_killed_run_are_cleared(tmp_path) -> None:
    write(tmp_path / "out", ["ab"])
    (tmp_path / "out/.tmp-part-00001.parquet").write_bytes(b"half")
    write(tmp_path / "out", ["ab"])
    assert sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()) == [
        ".receipts/part-00000.json", "data/part-00000.parquet", "manifest.json",
    ]  # fmt: skip


def test_other_options_are_refused_by_name(tmp_path) -> None:
    write(tmp_path / "out", ["ab"])
    with pytest.raises(UserError, match=r"\(made with --a 1, now 2\); choose another --out, or delete the folder"):
        write(tmp_path / "out", ["ab"], options={"a": 2})
    with pytest.raises(UserError, match="made by `aligncurate test`, now `aligncurate other`"):
        write(tmp_path / "out", ["ab"], verb="other")


def test_folders_with_other_files_are_left_alone(tmp_path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="holds other files"):
        write(tmp_path, ["ab"])
    with pytest.raises(UserError, match="this is a file"):
        write(tmp_path / "notes.txt", ["ab"])
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_unfinished_and_foreign_folders_are_not_opened(tmp_path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        aligncurate.open_dataset(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no manifest.json"):
        aligncurate.open_dataset(tmp_path)
    (tmp_path / "a.tar").touch()
    with pytest.raises(UserError, match=r"this is a file, not a dataset.*score .*a\.tar --out DIR"):
        aligncurate.open_dataset(tmp_path / "a.tar")
    with DatasetWriter(tmp_path / "out", HEAD, SCHEMA).open():
        pass
    with pytest.raises(UserError, match="not finished"):
        aligncurate.open_dataset(tmp_path / "out")
    manifest = tmp_path / "out/manifest.json"
    manifest.write_text(manifest.read_text().replace('"schema_version": 2', '"schema_version": 99'))
    with pytest.raises(UserError, match="schema version 99"):
        aligncurate.open_dataset(tmp_path / "out")
    manifest.write_text("{")
    with pytest.raises(UserError, match="not a JSON file"):
        aligncurate.open_dataset(tmp_path / "out")


def test_a_damaged_part_is_named(tmp_path) -> None:
    dataset = write(tmp_path / "out", ["ab", "cd"])
    dataset.files[1].write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(UserError, match=r"part-00001.parquet"):
        dataset.read(1)
    run = aligncurate.ingest(dataset.path, tmp_path / "again", quiet=True)
    assert run.rows == 2 and len(run.failures) == 1
    mend = f"mend it with `aligncurate verify {re.escape(str(dataset.path))} --repair`"
    assert re.fullmatch(rf"\S+/part-00001.parquet: the part is damaged \(.*\); {mend}", run.failures[0].error)


@pytest.mark.parametrize("content", [b"", b"PAR1 nothing PAR1", b"PAR1" + bytes(range(64)) + b"\x20\0\0\0PAR1"])
def test_a_damaged_first_part_is_named_wherever_it_is_opened(tmp_path, content) -> None:
    write(tmp_path / "out", ["ab", "cd"]).files[0].write_bytes(content)
    dataset = aligncurate.open_dataset(tmp_path / "out")
    for look in (lambda: dataset.schema, lambda: dataset.levels, lambda: aligncurate.inspect(dataset)):
        with pytest.raises(UserError, match=r"part-00000\.parquet: the part is damaged"):
            look()


def _try_to_write(path: Path, answer) -> None:
    try:
        write(path, ["ab"])
        answer.put("written")
    except UserError as error:
        answer.put(str(error))


def test_two_runs_do_not_write_at_once(tmp_path) -> None:
    spawn = multiprocessing.get_context("spawn")
    answer = spawn.Queue()
    with DatasetWriter(tmp_path / "out", HEAD, SCHEMA).open():
        other = spawn.Process(target=_try_to_write, args=(tmp_path / "out", answer))
        other.start()
        assert "another run is writing" in answer.get(timeout=120)
        other.join()


def test_the_same_run_gives_the_same_bytes(tmp_path) -> None:
    one, two = write(tmp_path / "one", ["ab", "c"]), write(tmp_path / "two", ["ab", "c"])
    assert one.manifest == two.manifest
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one.files, two.files, strict=True))


def test_input_values_that_no_column_can_hold_are_kept(tmp_path) -> None:
    pairs = [
        Pair("a", "s", extra={"n": 3, "odd": {"deep": [1]}}),
        Pair("b", "s", extra={"n": "three"}),
        Pair("c", "s", extra={"n": None, "extra": '{"older": 1}'}),
    ]
    found = to_table(pairs, schema({"n": pa.int64(), "extra": pa.string()})).to_pylist()
    assert [row["n"] for row in found] == [3, None, None]
    assert [json.loads(row["extra"] or "{}") for row in found] == [{"odd": {"deep": [1]}}, {"n": "three"}, {"older": 1}]


def test_the_first_failure_stays() -> None:
    pair = Pair("a", "s")
    pair.fail(Status.MISSING_CAPTION, "first")
    pair.fail(Status.DECODE_ERROR, "second")
    assert (pair.status, pair.error) == ("missing_caption", "first")


def test_part_info_counts() -> None:
    info = PartInfo("data/part-00000.parquet", 10, 1, "0" * 64, {"ok": 6, "text_only": 1, "decode_error": 3})
    assert (info.ok, info.failed) == (6, 3)
    assert PartInfo.from_json(info.to_json()) == info


ENCODER = {"model": "tiny", "pretrained": "x", "weights_sha256": "ab", "config": {"a": 1}, "precision": "fp32"}
FILES = [{"kind": "webdataset", "files": [{"uri": f"{name}.tar", "bytes": 1} for name in "ab"]}]
CUTS = {"method": "quantile", "values": [0.1, 0.2, 0.3], "score_column": "score", "count": 4, "minimum": 0.0}
CUTS |= {"levels": 4, "maximum": 1.0, "encoder": None}
BEFORE = {
    "verb": "test",
    "options": {"root": "/x" * 60 + "/one", "seed": 0, "keep": True, "thresholds": "fitted"},
    "inputs": FILES,
    "encoder": ENCODER,
    "encoders": {"score": ENCODER, "score_b": ENCODER},
    "thresholds": CUTS,
    "history": [],
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"options": BEFORE["options"] | {"seed": 7}}, "made with --seed 0, now 7"),
        ({"options": BEFORE["options"] | {"keep": False}}, "made with --keep, now without"),
        ({"options": BEFORE["options"] | {"thresholds": "frozen"}}, "made without --thresholds, now with frozen"),
        ({"options": BEFORE["options"] | {"root": "/y" * 60 + "/two"}}, r"made with --root …[/x]+/one, now …[/y]+/two"),
        ({"inputs": [FILES[0] | {"files": FILES[0]["files"][:1]}]}, "inputs: b.tar has been removed"),
        ({"inputs": [FILES[0] | {"files": FILES[0]["files"][::-1]}]}, "inputs: read in a different order or format"),
        ({"encoder": ENCODER | {"weights_sha256": "cd"}}, "the encoder's weights differ"),
        ({"encoder": ENCODER | {"config": {"a": 2}, "precision": "bf16"}},
         "the encoder's precision was fp32, now bf16; the encoder's config differs"),
        ({"encoders": {"score": ENCODER}}, "the score_b encoder has been removed"),
        ({"thresholds": CUTS | {"values": [0.1, 0.25, 0.35]}}, "2 of 3 thresholds changed because the scores differ"),
        ({"thresholds": CUTS | {"count": 5}}, "the scores differ"),
        ({"history": [{"verb": "ingest"}]}, "a different history"),
    ],
)  # fmt: skip
def test_each_difference_is_named(tmp_path, changes, expected) -> None:
    write(tmp_path / "out", ["ab"], **BEFORE)
    if expected is None:
        write(tmp_path / "out", ["ab"], **BEFORE, **changes)
    else:
        with pytest.raises(UserError, match=rf"this folder holds a different dataset \({expected}\); choose another"):
            write(tmp_path / "out", ["ab"], **BEFORE | changes)


def test_other_columns_and_versions_are_named(tmp_path) -> None:
    write(tmp_path / "out", ["ab"])
    another = DatasetWriter(tmp_path / "out", HEAD, schema({"url": pa.string(), "more": pa.int64()}))
    with pytest.raises(UserError, match=r"\(column more: absent, now int64\)"), another.open():
        pass
    file = tmp_path / "out/manifest.json"
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps(manifest | {"written_with": manifest["written_with"] | {"aligncurate": "0.0"}}))
    with pytest.raises(UserError, match=rf"\(made with aligncurate 0\.0, now {aligncurate.__version__}\)"):
        write(tmp_path / "out", ["ab"])


def test_a_resumed_run_takes_the_schema_of_its_dataset(tmp_path) -> None:
    """The first shard, which shows the extra columns, may not be readable this time."""
    writer = DatasetWriter(tmp_path / "out", HEAD, SCHEMA)
    with writer.open(), writer.part(0) as part:
        part.write(table("ab"))
    again = DatasetWriter(tmp_path / "out", HEAD, schema({}))
    with again.open():
        assert list(again.committed(2)) == [0]
        assert again.schema.equals(SCHEMA)
        with again.part(1) as part:
            part.write(table("c"))
        assert again.finish(2).read(1).equals(table("c"))


def test_a_rerun_keeps_the_bytes_of_a_manifest_that_says_the_same(tmp_path) -> None:
    """Datasets made from this one know it by the manifest's checksum; another version may order its keys otherwise."""
    dataset = write(tmp_path / "out", ["ab", "cd"])
    file = dataset.path / "manifest.json"
    shuffled = json.dumps(dict(reversed(json.loads(file.read_text()).items())))
    file.write_text(shuffled)
    write(tmp_path / "out", ["ab", "cd"])
    assert file.read_text() == shuffled
