"""`verify` finds every kind of damage, names the file, and `--repair` gives back the bytes."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import aligncurate
from aligncurate.sources.options import SourceOptions
from tests.support.inputs import cli, complaint, jpeg, write_tar

PARTS, ROWS = 3, 6


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tars, a dataset `scored` from them, and one of each verb made from that."""
    folder = tmp_path_factory.mktemp("verify")
    for part in range(PARTS):
        samples = {
            f"{part}{n}": {"jpg": jpeg(10 * part + n), "txt": f"text {n} of {part}".encode()} for n in range(ROWS)
        }
        samples[f"{part}x"] = {"jpg": b"no image", "txt": b"broken"}
        write_tar(folder / f"{part}.tar", samples)
    tars = [folder / f"{part}.tar" for part in range(PARTS)]
    aligncurate.score(tars, folder / "scored", model="tiny", quiet=True)
    aligncurate.ingest(tars, folder / "ingested", quiet=True)
    aligncurate.bucket(folder / "scored", folder / "levelled", levels=4, quiet=True)
    aligncurate.bucket(folder / "scored", folder / "frozen", thresholds=folder / "levelled", quiet=True)
    aligncurate.filter(folder / "levelled", folder / "kept", min_score=-1.0, where="key <> '00'", quiet=True)
    aligncurate.filter(folder / "levelled", folder / "compact", sample=14, seed=3, rows_per_part=5, quiet=True)
    aligncurate.score(tars[:1], folder / "other", model="tiny", quiet=True)
    aligncurate.merge([folder / "scored", folder / "other"], folder / "merged", quiet=True)
    table = folder / "licences.csv"
    table.write_text("key,licence\n" + "".join(f"{p}{n},cc{n}\n" for p in range(PARTS) for n in range(ROWS)))
    aligncurate.join(folder / "levelled", table, folder / "joined", quiet=True)
    return folder


DATASETS = ["scored", "ingested", "levelled", "frozen", "kept", "compact", "merged", "joined"]


def contents(folder: Path) -> dict[str, str]:
    """The sha256 of every file of a folder."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def copy_of(made: Path, name: str, target: Path) -> Path:
    """A copy of a dataset, of whose parts none is a link."""
    shutil.copytree(made / name, target)
    return target


def part(folder: Path, number: int) -> Path:
    return folder / f"data/part-{number:05d}.parquet"


def receipt(folder: Path, number: int) -> Path:
    return folder / f".receipts/part-{number:05d}.json"


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1 << 3
    file.write_bytes(data)


def edit(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def flip_page(folder: Path) -> str:
    footer = int.from_bytes(part(folder, 1).read_bytes()[-8:-4], "little") + 8
    size = part(folder, 1).stat().st_size
    flip(part(folder, 1), random.Random(0).randrange(4, size - footer))
    return "data/part-00001.parquet"


def flip_footer(folder: Path) -> str:
    flip(part(folder, 1), part(folder, 1).stat().st_size - 40)
    return "data/part-00001.parquet"


def truncate(folder: Path) -> str:
    part(folder, 0).write_bytes(part(folder, 0).read_bytes()[:-100])
    return "data/part-00000.parquet"


def grow(folder: Path) -> str:
    with part(folder, 0).open("ab") as file:
        file.write(b"\0")
    return "data/part-00000.parquet"


def swap(folder: Path) -> str:
    first, second = part(folder, 0).read_bytes(), part(folder, 1).read_bytes()
    part(folder, 0).write_bytes(second)
    part(folder, 1).write_bytes(first)
    return "data/part-00000.parquet data/part-00001.parquet"


def other_receipt(folder: Path) -> str:
    shutil.copy(receipt(folder, 0), receipt(folder, 1))
    return ".receipts/part-00001.json"


def renamed_receipt(folder: Path) -> str:
    shutil.copy(receipt(folder, 0), receipt(folder, 1))
    edit(receipt(folder, 1), lambda r: r.update(name="data/part-00001.parquet"))
    return ".receipts/part-00001.json"


def delete_part(folder: Path) -> str:
    part(folder, 1).unlink()
    return "data/part-00001.parquet"


def delete_receipt(folder: Path) -> str:
    receipt(folder, 1).unlink()
    return ".receipts/part-00001.json"


def empty_receipt(folder: Path) -> str:
    receipt(folder, 1).write_bytes(b"")
    return ".receipts/part-00001.json"


def garbage_receipt(folder: Path) -> str:
    receipt(folder, 0).write_text("{")
    return ".receipts/part-00000.json"


def delete_receipts(folder: Path) -> str:
    shutil.rmtree(folder / ".receipts")
    return ".receipts"


def extra_part(folder: Path) -> str:
    shutil.copy(part(folder, 0), part(folder, 7))
    return "data/part-00007.parquet"


def edit_counts(folder: Path) -> str:
    def change(found: dict[str, Any]) -> None:
        found["rows"] += 1
        found["statuses"]["ok"] = found["statuses"].get("ok", 0) + 1

    edit(receipt(folder, 1), change)
    return ".receipts/part-00001.json"


def edit_manifest_line(folder: Path) -> str:
    edit(folder / "manifest.json", lambda m: m["parts"][1].update(sha256="0" * 64))
    return "manifest.json"


def drop_manifest_line(folder: Path) -> str:
    edit(folder / "manifest.json", lambda m: m["parts"].pop(1))
    return "manifest.json"


def unfinished(folder: Path) -> str:
    edit(folder / "manifest.json", lambda m: m.update(complete=False, parts=[]))
    return "manifest.json"


def edit_score_counts(folder: Path) -> str:
    edit(folder / "manifest.json", lambda m: m.get("score_counts", {}).clear() or m.update(score_counts={"score": {}}))
    return "manifest.json"


def both_bad(folder: Path) -> str:
    flip_page(folder)
    garbage_receipt(folder)
    delete_receipt(folder)
    return "data/part-00001.parquet .receipts/part-00000.json .receipts/part-00001.json"


DAMAGE = [
    flip_page, flip_footer, truncate, grow, swap, other_receipt, renamed_receipt, delete_part, delete_receipt,
    empty_receipt, garbage_receipt, delete_receipts, extra_part, edit_counts, edit_manifest_line, drop_manifest_line,
    unfinished, edit_score_counts, both_bad,
]  # fmt: skip


def files(result: Any, folder: Path) -> set[str]:
    return {str(Path(damage.file).relative_to(folder)) for damage in result.damages}


def in_place(made: Path, name: str) -> tuple[Path, Path]:
    """A dataset and an intact copy of it: its children know it by its place, so it is damaged there."""
    backup = made / f"backup-{name}"
    if not backup.exists():
        shutil.copytree(made / name, backup)
    shutil.rmtree(made / name)
    shutil.copytree(backup, made / name, copy_function=shutil.copy2)
    return made / name, backup


@pytest.mark.parametrize("name", DATASETS)
def test_whole_datasets_are_whole(made: Path, name: str) -> None:
    result = aligncurate.verify(made / name, deep=True, quiet=True)
    assert result.whole, (result.damages, result.bad_images)
    table = pq.read_table(made / name / "data")
    assert result.rows == table.num_rows and result.parts == len(list((made / name / "data").iterdir()))
    assert result.images == sum(sha256 is not None for sha256 in table["sha256"].to_pylist())
    assert result.bytes == sum(file.stat().st_size for file in (made / name / "data").iterdir())


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_damage_is_found_named_and_repaired(made: Path, damage: Callable[[Path], str]) -> None:
    folder, backup = in_place(made, "levelled")
    expected = set(damage(folder).split())
    result = aligncurate.verify(folder, quiet=True)
    assert files(result, folder) == expected and not result.whole
    ran = cli("verify", folder, "--quiet")
    assert ran.exit_code == 1
    for file in expected:
        assert f"{folder}/{file}: " in ran.stdout
    assert f"mend with: aligncurate verify {folder} --repair" in ran.stdout
    repaired = aligncurate.verify(folder, repair=True, quiet=True)
    assert repaired.whole, (repaired.damages, repaired.notes)
    assert contents(folder) == contents(backup)
    assert {str(Path(file).relative_to(folder)) for file in repaired.repaired} == expected


@pytest.mark.parametrize("damage", [flip_page, swap, delete_receipts, both_bad, extra_part], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", [name for name in DATASETS if name != "levelled"])
def test_every_verbs_dataset_is_repaired(made: Path, name: str, damage: Callable[[Path], str]) -> None:
    folder, backup = in_place(made, name)
    damage(folder)
    inputs = [made / "licences.csv"] if name == "joined" else []
    repaired = aligncurate.verify(folder, repair=True, inputs=inputs, quiet=True)
    assert repaired.whole, (repaired.damages, repaired.notes)
    assert contents(folder) == contents(backup)


def test_manifest_and_thresholds(made: Path) -> None:
    folder, backup = in_place(made, "levelled")
    for text in ('{"levels": 4}', "{", ""):
        (folder / "thresholds.json").write_text(text)
        assert files(aligncurate.verify(folder, quiet=True), folder) == {"thresholds.json"}
        assert aligncurate.verify(folder, repair=True, quiet=True).whole
        assert contents(folder) == contents(backup)
    (folder / "thresholds.json").unlink()
    assert files(aligncurate.verify(folder, quiet=True), folder) == {"thresholds.json"}
    assert aligncurate.verify(folder, repair=True, quiet=True).whole

    def lower(thresholds: dict[str, Any]) -> None:
        thresholds["values"][0] -= 0.01

    edit(folder / "thresholds.json", lower)
    edit(folder / "manifest.json", lambda m: lower(m["thresholds"]))
    result = aligncurate.verify(folder, repair=True, quiet=True)  # what is right can only be seen from the receipts
    assert files(result, folder) == {"manifest.json"} and not result.repairable
    assert "its options are not those that its parts were made with" in result.damages[0].problem


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["options"].update(levels=5),
        lambda m: m["encoder"].update(precision="bf16"),
        lambda m: m["inputs"][0].update(uri="/elsewhere"),
        lambda m: m["history"].clear(),
        lambda m: m["computed_with"].clear(),
        lambda m: m["columns"].update(score="double"),
        lambda m: m.update(schema_version=9),
        lambda m: m.update(parts=7),
    ],
    ids=["options", "encoder", "inputs", "history", "environment", "columns", "version", "parts"],
)
def test_an_edited_head_is_found_and_nothing_is_made_from_it(made: Path, change: Callable[[Any], Any]) -> None:
    folder, backup = in_place(made, "levelled")
    edit(folder / "manifest.json", change)
    before = contents(folder)
    result = aligncurate.verify(folder, repair=True, quiet=True)
    assert files(result, folder) == {"manifest.json"}
    assert contents(folder) == before
    said = " ".join([result.damages[0].problem, *result.notes])
    assert "delete it and run the command that made the dataset again" in said
    (folder / "manifest.json").unlink()
    aligncurate.bucket(made / "scored", folder, levels=4, quiet=True)
    assert contents(folder) == contents(backup)


def test_a_lost_manifest_costs_no_part(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, backup = in_place(made, "scored")
    (folder / "manifest.json").unlink()
    result = aligncurate.verify(folder, quiet=True)
    assert files(result, folder) == {"manifest.json"} and result.parts == PARTS
    from aligncurate.scoring.shard import ShardScorer

    monkeypatch.setattr(ShardScorer, "part", lambda *_: pytest.fail("a part was scored again"))
    aligncurate.score([made / f"{n}.tar" for n in range(PARTS)], folder, model="tiny", quiet=True)
    assert contents(folder) == contents(backup)


def test_receipts_that_were_not_copied_come_back_without_scoring(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from aligncurate.scoring.shard import ShardScorer

    folder, backup = in_place(made, "scored")
    delete_receipts(folder)
    result = aligncurate.verify(folder, quiet=True)
    assert len(result.damages) == 1 and "copy with `cp -r OLD/. NEW`" in result.damages[0].problem
    monkeypatch.setattr(ShardScorer, "part", lambda *_: pytest.fail("a part was scored again"))
    assert aligncurate.verify(folder, repair=True, quiet=True).whole
    assert contents(folder) == contents(backup)


def test_a_part_of_another_dataset(made: Path) -> None:
    folder, backup = in_place(made, "levelled")
    shutil.copy(part(made / "frozen", 1), part(folder, 1))  # the same rows and bytes: nothing is wrong
    assert aligncurate.verify(folder, quiet=True).whole
    shutil.copy(part(made / "scored", 1), part(folder, 1))
    shutil.copy(receipt(made / "scored", 1), receipt(folder, 1))
    assert files(aligncurate.verify(folder, quiet=True), folder) == {
        "data/part-00001.parquet",
        ".receipts/part-00001.json",
    }
    assert aligncurate.verify(folder, repair=True, quiet=True).whole
    assert contents(folder) == contents(backup)


def test_levels_that_the_thresholds_do_not_give(made: Path, tmp_path: Path) -> None:
    """A part that agrees with its receipt and the manifest, as another tool may write them."""
    folder = copy_of(made, "levelled", tmp_path / "edited")
    table = pq.read_table(part(folder, 0))
    levels = [None if level is None else 5 - level for level in table["level"].to_pylist()]
    place = table.schema.get_field_index("level")
    pq.write_table(table.set_column(place, table.schema.field(place), pa.array(levels, pa.int8())), part(folder, 0))
    data = part(folder, 0).read_bytes()
    facts = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit(receipt(folder, 0), lambda r: r.update(facts))
    edit(folder / "manifest.json", lambda m: m["parts"][0].update(facts))
    problems = [damage.problem for damage in aligncurate.verify(folder, quiet=True).damages]
    assert f"the level of {ROWS} rows is not what the thresholds say, first of 00" in problems


def test_images(made: Path, tmp_path: Path) -> None:
    for name in ("0.tar", "1.tar"):
        shutil.copy2(made / name, tmp_path / name)
    (tmp_path / "photos").mkdir()
    for number in range(3):
        (tmp_path / f"photos/{number}.jpg").write_bytes(jpeg(50 + number))
        (tmp_path / f"photos/{number}.txt").write_text("a photo")
    sources = [tmp_path / "0.tar", tmp_path / "1.tar", tmp_path / "photos"]
    aligncurate.ingest(sources, tmp_path / "out", quiet=True)
    assert aligncurate.verify(tmp_path / "out", deep=True, quiet=True).images == 2 * ROWS + 3 + 2
    (tmp_path / "0.tar").unlink()
    tar = (tmp_path / "1.tar").read_bytes()
    place = tar.index(jpeg(12))
    flip(tmp_path / "1.tar", place + 100)
    (tmp_path / "photos/1.jpg").write_bytes(jpeg(7))
    (tmp_path / "photos/2.jpg").unlink()
    (tmp_path / "photos/2.jpg").mkdir()
    assert aligncurate.verify(tmp_path / "out", quiet=True).whole
    result = aligncurate.verify(tmp_path / "out", deep=True, quiet=True)
    assert not result.whole and not result.damages
    by_file = {(Path(image.file).name, image.problem, image.key) for image in result.bad_images}
    assert by_file == {
        *(("0.tar", "missing", f"0{n}") for n in (*range(ROWS), "x")),
        ("1.tar", "changed", "12"),
        ("1.jpg", "changed", "1"),
        ("2.jpg", "unreadable", "2"),
    }
    ran = cli("verify", tmp_path / "out", "--deep", "--quiet")
    assert ran.exit_code == 1
    assert f"{tmp_path}/0.tar: 7 images not there (00, 01, 02, 03, 04, …)" in ran.stdout
    assert f"{tmp_path}/photos/1.jpg: 1 image not the one of the dataset (1)" in ran.stdout


def test_several_datasets_are_repaired_in_their_order(made: Path) -> None:
    child, before_child = in_place(made, "kept")
    parent, before_parent = in_place(made, "levelled")
    swap(parent)
    flip_page(child)
    alone = aligncurate.verify(child, repair=True, quiet=True)
    assert not alone.whole and f"first run `aligncurate verify {parent} --repair`" in alone.notes[0]
    assert contents(parent) != contents(before_parent)
    both = aligncurate.verify([child, parent], repair=True, quiet=True)
    assert both.whole and both.datasets == [str(child), str(parent)]
    assert contents(child) == contents(before_child) and contents(parent) == contents(before_parent)


def test_nothing_changes_where_a_repair_is_not_possible(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "levelled", tmp_path / "parent")
    write_tar(tmp_path / "a.tar", {"a": {"jpg": jpeg(1), "txt": b"a"}})
    aligncurate.ingest(tmp_path / "a.tar", tmp_path / "gone", quiet=True)
    aligncurate.filter(tmp_path / "parent", tmp_path / "orphan", min_score=0.0, quiet=True)
    shutil.rmtree(tmp_path / "parent")
    (tmp_path / "a.tar").unlink()
    aligncurate.join(made / "levelled", made / "licences.csv", tmp_path / "nameless", quiet=True)
    for name, reason in (
        ("gone", "a.tar: there is no such file"),
        ("orphan", "parent: not a dataset"),
        ("nameless", "--input licences.csv"),
    ):
        folder = tmp_path / name
        flip(part(folder, 0), 60)
        receipt(folder, 0).write_text("{")
        before = contents(folder)
        result = aligncurate.verify(folder, repair=True, quiet=True)
        assert files(result, folder) == {"data/part-00000.parquet", ".receipts/part-00000.json"}
        assert reason in result.notes[0], result.notes
        assert contents(folder) == before


def test_a_stopped_repair_leaves_the_folder_as_it_was(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from aligncurate.scoring.shard import ShardScorer

    folder, backup = in_place(made, "scored")
    flip_page(folder)
    before = contents(folder)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ShardScorer, "part", stop)
        with pytest.raises(KeyboardInterrupt):
            aligncurate.verify(folder, repair=True, quiet=True)
    assert contents(folder) == before
    assert aligncurate.verify(folder, repair=True, quiet=True).whole
    assert contents(folder) == contents(backup)


def test_linked_parts_of_a_merged_dataset(made: Path, tmp_path: Path) -> None:
    scored, backup = in_place(made, "scored")
    merged = aligncurate.merge([scored, made / "other"], tmp_path / "merged", quiet=True).path
    before = contents(merged)
    flip(part(scored, 1), 80)
    assert contents(merged) != before  # it is the same file
    assert aligncurate.verify([merged, scored], repair=True, quiet=True).whole
    assert contents(merged) == before and contents(scored) == contents(backup)


def test_weights_that_the_manifest_knows_by_name(made: Path, mini: dict[str, Path], tmp_path: Path) -> None:
    aligncurate.score(made / "0.tar", tmp_path / "out", **mini, quiet=True)
    before = contents(tmp_path / "out")
    flip(part(tmp_path / "out", 0), 100)
    refused = aligncurate.verify(tmp_path / "out", repair=True, quiet=True)
    assert "give that file with --input mini-clip.safetensors" in refused.notes[0]
    (tmp_path / "mini-clip.safetensors").write_bytes(b"other weights")
    wrong = [tmp_path / "mini-clip.safetensors"]
    assert not aligncurate.verify(tmp_path / "out", repair=True, inputs=wrong, quiet=True).whole
    assert aligncurate.verify(tmp_path / "out", repair=True, inputs=[*wrong, mini["pretrained"]], quiet=True).whole
    assert contents(tmp_path / "out") == before


def test_a_folder_of_an_earlier_version(made: Path, tmp_path: Path) -> None:
    from tests.aligncurate.dataset.test_folder import earlier_version

    old = earlier_version(aligncurate.open_dataset(made / "levelled"), tmp_path / "old")
    assert aligncurate.verify(old, deep=True, quiet=True).whole
    flip(old / "part-00001.parquet", 90)
    result = aligncurate.verify(old, repair=True, quiet=True)
    assert files(result, old) == {"part-00001.parquet"} and "of an earlier version" in result.notes[0]


def test_the_command_line(made: Path, tmp_path: Path) -> None:
    whole = cli("verify", made / "kept", made / "compact", "--deep", "--workers", 1)
    assert whole.exit_code == 0 and whole.stdout.startswith("whole: ")
    assert cli("verify", made / "kept", "--quiet").stdout == ""
    folder = copy_of(made, "kept", tmp_path / "a b")
    flip_page(folder)
    ran = cli("verify", folder, "--json")
    assert ran.exit_code == 1 and json.loads(ran.stdout)["damages"][0]["part"] == 1
    assert json.loads(ran.stdout)["whole"] is False
    assert f"mend with: aligncurate verify '{folder}' --repair" in cli("verify", folder).stdout
    found = complaint(cli("filter", folder, "--where", "score < 2", "--out", tmp_path / "out"))
    assert found.endswith(f"; mend it with `aligncurate verify '{folder}' --repair`.") and "part-00001" in found
    for arguments in ([tmp_path], [tmp_path / "no"], [folder, "--workers", 0], [folder, "--input", "x"]):
        assert complaint(cli("verify", *arguments)).endswith(".")


def photos(folder: Path) -> Path:
    for number in range(4):
        place = folder / "photos" / ("a", "b")[number % 2] / "c"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.jpg").write_bytes(jpeg(number))
        (place / f"{number}.txt").write_text(f"photo {number}")
    return folder / "photos"


def table(folder: Path) -> Path:
    photos(folder)
    rows = [f"{('a', 'b')[n % 2]}/c/{n}.jpg;photo {n}" for n in range(4)]
    (folder / "rows.csv").write_text("\n".join(["picture;words", *rows]), "utf-16")
    return folder / "rows.csv"


RUNS: list[tuple[Callable[[Path], Any], dict[str, Any], dict[str, Any]]] = [
    (photos, {}, {"embed_images": True, "embeddings": "fp16", "model": "tiny"}),
    (
        table,
        {"image_root": "photos", "encoding": "utf-16", "separator": ";", "image_column": "picture",
         "caption_column": "words", "rows_per_shard": 3},
        {"decode": "fast", "batch_size": 2, "limit": 4, "model": "tiny"},
    ),
    (lambda folder: [photos(folder) / "a", folder / "photos/b"], {}, {"model": "tiny,mini-clip"}),
]  # fmt: skip


@pytest.mark.parametrize(("inputs", "source", "options"), RUNS, ids=["photos", "table", "several"])
def test_every_option_of_a_run_is_used_again(
    tmp_path: Path, mini: dict[str, Path], monkeypatch: pytest.MonkeyPatch, inputs: Any, source: Any, options: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    if "mini-clip" in options["model"]:
        options = options | {"model_config": mini["model_config"], "pretrained": f",{mini['pretrained']}"}
    out = tmp_path / "out"
    aligncurate.score(inputs(tmp_path), out, source=SourceOptions(**source), **options, quiet=True)
    before = contents(out)
    last = max((out / "data").iterdir())
    last.write_bytes(last.read_bytes()[:-9])
    monkeypatch.chdir("/")
    repaired = aligncurate.verify(out, repair=True, inputs=[mini["pretrained"]], quiet=True)
    assert repaired.whole, repaired.notes
    assert contents(out) == before
