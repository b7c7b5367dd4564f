"""JSON files in every usual form, whatever they are called; damage costs only the rows that are damaged."""

from __future__ import annotations

import json
import subprocess
import sys
from random import Random

import pytest

from aligncurate.errors import UserError
from aligncurate.sources.detect import open_source
from aligncurate.sources.json_rows import Broken, JsonRows
from aligncurate.sources.options import SourceOptions
from tests.support.inputs import ingested, jpeg, read_all, statuses

ROWS = [
    {"id": f"k{i}", "image": f"{i % 3}.jpg", "caption": text, "n": i, "deep": {"a": [{"id": i}]}}
    for i, text in enumerate(["plain", 'quoted "text", {braces} [lists]', "ünï 图🐕", "two\nlines", "\\", "", "x"])
]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
FORMS = {
    "array": json.dumps(ROWS),
    "array with indents": json.dumps(ROWS, indent=2, ensure_ascii=False),
    "array, a row per line": "[\n" + LINES.replace("\n", ",\n") + "\n]\n",
    "lines": LINES + "\n",
    "lines with commas": LINES.replace("\n", ",\n"),
    "lines with blank ones": "\n\n" + LINES.replace("\n", "\r\n\r\n"),
    "objects over several lines": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "objects without anything between": "".join(json.dumps(row) for row in ROWS),
    "text sequences": "".join(f"\x1e{json.dumps(row)}\n" for row in ROWS),
    "wrapped": json.dumps({"version": {"a": 1}, "data": ROWS, "more": "]"}, indent=1),
    "wrapped, the list first": json.dumps({"data": ROWS, "n": 7}),
    "arrays one after another": json.dumps(ROWS[:3]) + "\n" + json.dumps(ROWS[3:]),
    "by keys": json.dumps({row["id"]: {k: v for k, v in row.items() if k != "id"} for row in ROWS}),
    "columns": json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}),
}


@pytest.fixture
def folder(tmp_path):
    for seed in range(3):
        (tmp_path / f"{seed}.jpg").write_bytes(jpeg(seed))
    return tmp_path


@pytest.mark.parametrize("rows_per_shard", [2, 10_000])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("form", FORMS)
def test_forms_are_read_by_content(folder, form, name, encoding, rows_per_shard) -> None:
    (folder / name).write_bytes(FORMS[form].encode(encoding))
    found = read_all(folder / name, rows_per_shard=rows_per_shard)
    assert [(p.key, p.caption) for p in found] == [(row["id"], row["caption"].strip()) for row in ROWS]
    assert [p.status for p in found] == ["ok"] * 5 + ["missing_caption", "ok"]
    assert [(p.row, p.extra["n"], p.extra["deep"]) for p in found] == [
        (i, row["n"], row["deep"]) for i, row in enumerate(ROWS)
    ]


GOOD = [{"id": f"k{i}", "image": "0.jpg", "caption": f"c{i}", "deep": [{"a": 1}]} for i in range(6)]
DAMAGE = {
    "a name without quotes": '{"id": "bad", "image": "0.jpg", caption: "x"}',
    "a quotation mark too many": '{"id": "bad", "image": "0.jpg", "caption": "5" disk"}',
    "a text that is not closed": '{"id": "bad", "image": "0.jpg", "caption": "open}',
    "a brace too few": '{"id": "bad", "image": "0.jpg", "caption": "x", "deep": [{"a": 1}]',
    "a brace too many": '{"id": "bad", "image": "0.jpg", "caption": "x"}}',
    "cut": '{"id": "bad", "ima',
    "Python": "{'id': 'bad', 'image': '0.jpg', 'caption': None}",
    "a number with too many digits": '{"id": ' + "9" * 5_000 + ', "image": "0.jpg", "caption": "x"}',
    "nested too deeply": '{"id": "bad", "x": ' + "[" * 2_000 + "]" * 2_000 + "}",
    "nested much too deeply": '{"id": "bad", "x": ' + "[" * 200_000 + "]" * 200_000 + "}",
    "not an object": "[1, 2]",
    "null": "null",
}


@pytest.mark.parametrize("form", ["array", "indents", "wrapped", "lines"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_row_costs_no_other(folder, kind, form) -> None:
    rows = [json.dumps(row, indent=2 if form == "indents" else None) for row in GOOD]
    rows[3:3] = [DAMAGE[kind]]
    text = {
        "array": "[" + ", ".join(rows) + "]",
        "indents": "[\n  " + ",\n  ".join(rows) + "\n]",
        "wrapped": '{"data": [' + ",".join(rows) + "]}",
        "lines": "\n".join(rows),
    }[form]
    (folder / "a.json").write_text(text)
    found = read_all(folder / "a.json", rows_per_shard=2)
    good = [p.caption for p in found if p.status == "ok"]
    # A row with a brace behind it is a row, if it is not a line of its own.
    assert [c for c in good if kind != "a brace too many" or c != "x"] == [f"c{i}" for i in range(6)]
    bad = [p for p in found if p.status != "ok"]
    assert bad and all(p.status == "invalid_row" and "not a JSON object" in p.error for p in bad)
    assert len(bad) == 1


@pytest.mark.parametrize("form", ["array", "wrapped", "indents"])
def test_rows_before_the_end_of_a_cut_file_are_kept(folder, form) -> None:
    text = json.dumps({"data": GOOD} if form == "wrapped" else GOOD, indent=1 if form == "indents" else None)
    place = text.index('"k4"')
    for cut in (
        place + 2,
        text.rindex(",", 0, place),
        text.rindex(",", 0, place) + 1,
        len(text) - 1 - (form == "wrapped"),
    ):
        (folder / "a.json").write_text(text[:cut])
        found = [p.status for p in read_all(folder / "a.json", rows_per_shard=2)]
        whole = 4 if cut <= place + 2 else 6
        assert found == ["ok"] * whole + ["invalid_row"], cut


def test_numbers_beyond_64_bits_and_names_that_are_not_text(folder) -> None:
    text = (
        '[{"image": "0.jpg", "caption": "a", "n": 1, "score": 0.5},'
        '{"image": "0.jpg", "caption": "b", "n": 123456789012345678901234567890, "x": 1e400, "score": 1e300},'
        '{"image": "0.jpg", "caption": "c", "n": NaN, "level": 99999999999999999999, "score": ' + "9" * 400 + "},"
        '{"image": "0.jpg", "caption": "d", "\\ud800": 1, "": 2, "\\u0000": 3, "id": {"a": 1}}]'
    )
    (folder / "a.json").write_text(text)
    frame = ingested(folder / "a.json", folder / "out")
    assert statuses(frame) == ["ok"] * 4 and frame["caption"].to_list() == ["a", "b", "c", "d"]
    assert frame["score"].to_list() == [0.5, None, None, None]
    assert json.loads(frame["extra"][1])["n"] == 123456789012345678901234567890
    assert ingested(folder / "out", folder / "again")["key"].equals(frame["key"])


_MEMORY = """
import resource, sys
from aligncurate.sources.detect import open_source
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
source = open_source(sys.argv[1])
rows = sum(1 for shard in source.shards for _ in source.read(shard))
print(rows, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_files_of_rows_are_not_held_in_memory(tmp_path, name) -> None:
    text = "x" * 40_000  # some rows are held: those that say what is in the file
    rows = [{"image": f"{i}.jpg", "caption": f"{i}", "notes": text} for i in range(3_000)]
    with (tmp_path / name).open("w") as file:
        if name == "a.json":
            json.dump(rows, file)
        elif name == "a.jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            file.write("image,caption,notes\n")
            file.writelines(",".join(row.values()) + "\n" for row in rows)
    command = [sys.executable, "-c", _MEMORY, str(tmp_path / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows, peak = map(int, done.stdout.split())
    assert rows == 3_000 and peak < 100  # MiB, of 115


def test_a_file_with_one_row(folder) -> None:
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a box"}]
    for row in ({"image": "0.jpg", "caption": "one"}, {"id": 1, "image": "0.jpg", "conversations": turns},
                {"image": "0.jpg", "caption": "one", "objects": [{"box": [1]}]}):  # fmt: skip
        for name in ("a.json", "a.jsonl"):
            (folder / name).write_text(json.dumps(row, indent=1 if name == "a.json" else None))
            assert [p.status for p in read_all(folder / name)] == ["ok"]


def test_rows_keep_their_numbers_in_every_shard(folder) -> None:
    (folder / "a.json").write_text(json.dumps(GOOD))
    source = open_source(str(folder / "a.json"), SourceOptions(rows_per_shard=4))
    assert [[p.row for p in source.read(shard)] for shard in source.shards] == [[0, 1, 2, 3], [4, 5]]


def test_what_is_no_file_of_rows(folder) -> None:
    for text, sentence in (("[1, 2]", "not objects"), ("7", "neither"), ('{"a": 1}', "neither"), ("[}", "not a JSON")):
        (folder / "a.json").write_text(text)
        with pytest.raises(UserError, match=sentence):
            open_source(str(folder / "a.json"))


def rows_of(file, per_shard: int) -> list:
    rows = JsonRows(str(file), per_shard)
    found = list(rows.read(0, rows.count))
    assert len(found) == rows.count
    return found


@pytest.mark.parametrize("per_shard", [1, 2, 3, 4, 1_000])
@pytest.mark.parametrize("form", ["[%s]", '{"info": {"year": 1}, "data": [%s]}', "[%s, {'']"])
def test_an_item_that_is_a_list_is_one_row_in_every_shard(tmp_path, form, per_shard) -> None:
    items = [[1, 2], {"n": "a"}, {"n": "b"}, [5, [6], 7], {"n": "c"}, [[]], [], {"n": "d"}]
    (tmp_path / "a.json").write_text(form % json.dumps(items)[1:-1])
    found = rows_of(tmp_path / "a.json", per_shard)
    assert [None if isinstance(row, Broken) else row for row in found[:8]] == [
        item if isinstance(item, dict) else None for item in items
    ]
    assert [json.loads(row.text) for row in found[:8] if isinstance(row, Broken)] == [[1, 2], [5, [6], 7], [[]], []]


def test_members_before_a_list_say_nothing_about_its_rows(tmp_path) -> None:
    rows = ['{"n": 1}', '{"n": oops}', '{"n": 2}', '{"n": 3}']
    (tmp_path / "a.json").write_text('{"info": {"year": 1}, "data": [' + ", ".join(rows) + "]}")
    found = rows_of(tmp_path / "a.json", 2)
    assert [row.text if isinstance(row, Broken) else row["n"] for row in found] == [1, '{"n": oops}', 2, 3]


_ITEMS = [
    '{"图": %d, "b": {"x": [1]}}', '{"图": %d, "b": "é, {\\"b\\": 2}"}', '{"b": %d, "图": 0}', "{}",  # good
    '{"图": %d, "b": oops, {"b": 1}, {"c": 2}]}', '{"图": %d, "b": "open, {"b": 1}', '{"c" %d}, {"b": 1}', "{'a': %d",
    '{"图": %d, "b": ' + "9" * 5_000 + "}", '{"图": %d, "b": ' + "[" * 200 + "]" * 200 + "}",
    "%d", "null", "[%d, [2]]", "[]", "]", "], [", "} ]", "\xa0", "\u3000{}", '"é"', "",
]  # fmt: skip


def test_rows_do_not_depend_on_shards(tmp_path) -> None:
    for seed in range(300):
        random = Random(seed)
        items = random.choices(_ITEMS, k=random.randint(1, 12))
        text = random.choice([", ", ",\n", "\n"]).join(item.replace("%d", str(i)) for i, item in enumerate(items))
        (tmp_path / "a.json").write_text(f'[{{"图": 0}}, {text}]' if seed % 2 else f'[{text}, {{"图": 0}}]')
        expected = rows_of(tmp_path / "a.json", 1_000)
        for per_shard in (1, 2, 3):
            assert rows_of(tmp_path / "a.json", per_shard) == expected, seed
