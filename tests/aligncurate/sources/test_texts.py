"""Texts of rows as people have them: marks of images, roles, typed parts, several captions, odd characters."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import aligncurate
from aligncurate.sources.base import limit_shards
from aligncurate.sources.captions import clean
from aligncurate.sources.detect import open_source
from aligncurate.sources.options import SourceOptions
from tests.support.inputs import cli, ingested, jpeg, read_all, statuses, write_tar

ANSWER = {"role": "assistant", "content": "A box."}


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def rows_of(folder: Path, rows: list[dict[str, Any]], name: str = "a", **options: Any) -> list[dict[str, Any]]:
    (folder / f"{name}.json").write_text(json.dumps(rows))
    return ingested(folder / f"{name}.json", folder / f"out-{name}", **options).to_dicts()


@pytest.fixture
def images(tmp_path) -> Path:
    (tmp_path / "images").mkdir()
    for seed in range(3):
        (tmp_path / "images" / f"{seed}.jpg").write_bytes(jpeg(seed))
    return tmp_path


# --- a row whose image is named or marked is never text_only ----------------------------------------------------------

MARKS = [
    "<image>", "<Image>", "<IMG_CONTEXT>", "<ImageHere>", "<Img><ImageHere></Img>", "<image-placeholder>", "<|image|>",
    "<image_placeholder>", "<|image_1|>", "<image 1>", "<|vision_start|><|image_pad|><|vision_end|>",
    "<start_of_image>", "(<image>./</image>)", "<__dj__image>", "[IMG]", "<img><IMG_CONTEXT></img>",
]  # fmt: skip


@pytest.mark.parametrize("mark", MARKS)
def test_marks_become_one_and_are_not_text_only(images, mark) -> None:
    places = [talk(f"{mark}\nWhat?", "A box."), talk(f"Look at {mark}, please", "A box."), talk("Hi", f"{mark}Here.")]
    with_image = rows_of(images, [{"image": "0.jpg", "conversations": turns} for turns in places])
    without = rows_of(images, [{"conversations": turns} for turns in places], "without")
    assert [row["status"] for row in with_image] == ["ok"] * 3
    assert [row["conversations"][0]["text"] for row in with_image] == [
        "<image>\nWhat?",
        "Look at <image>, please",
        "Hi",
    ]
    assert [row["status"] for row in without] == ["missing_image"] * 3
    assert all("<image>" in row["error"] and "conversations" in row["error"] for row in without)
    caption = rows_of(images, [{"image": "0.jpg", "caption": f"{mark} a box"}], "caption")
    assert caption[0]["caption"] == "a box"


def test_texts_that_only_look_like_marks_stay(images) -> None:
    texts = ["How do I write <img src='a.jpg'> in HTML?", "What is [IMG]http://x/a.png[/IMG]?", "a <b> c [1]"]
    rows = rows_of(images, [{"conversations": talk(text, "So.")} for text in texts])
    assert [(row["status"], row["conversations"][0]["text"]) for row in rows] == [("text_only", text) for text in texts]


def test_an_image_named_in_a_mark_is_read(images) -> None:
    rows = rows_of(images, [{"conversations": talk("Picture 1: <img>1.jpg</img>\nWhat?", "A box.")}])
    assert rows[0]["status"] == "ok" and rows[0]["image_path"].endswith("images/1.jpg")
    assert rows[0]["conversations"][0]["text"] == "Picture 1: <image>\nWhat?"


@pytest.mark.parametrize(
    "row",
    [
        {"image": None, "conversations": talk("<image>\nWhat?", "A box.")},
        {"image": [], "conversations": talk("<image>\nWhat?", "A box.")},
        {"image": {"height": 3}, "conversations": talk("What?", "A box.")},
        {"image": "data:image/png;base64,@@", "conversations": talk("What?", "A box.")},
        {"image": "https://x/0.jpg", "conversations": talk("What?", "A box.")},
        {"video": "v.mp4", "conversations": talk("<video>\nWhat?", "A box.")},
        {"image_url": "https://x/0", "conversations": talk("What?", "A box.")},
        {"image_id": 391895, "question": "What?", "answer": "A box."},
        {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}, ANSWER]},
        {"messages": [{"role": "user", "content": [{"type": "video", "video": "v.mp4"}]}, ANSWER]},
    ],
)
def test_no_row_that_names_an_image_is_text_only(images, row) -> None:
    (found,) = rows_of(images, [row])
    assert found["status"] == ("url_only" if "image_url" in row else "missing_image") and found["error"]


def test_rows_about_nothing_are_text_only(images) -> None:
    rows = [{"image": nothing, "conversations": talk("Hi", "Hello.")} for nothing in (None, "", [], {}, [None])]
    assert {row["status"] for row in rows_of(images, rows)} == {"text_only"}


# --- roles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asks", "answers"),
    [("USER", "ASSISTANT"), ("Human", "GPT"), (" human", "bot "), ("prompter", "ChatGPT"), ("q", "a")],
)
def test_roles_in_any_case(images, asks, answers) -> None:
    turns = [{"from": asks, "value": "<image>\nWhat?"}, {"from": answers, "value": "A box."}]
    (row,) = rows_of(images, [{"image": "0.jpg", "conversations": turns}])
    known = asks != "q"
    assert [turn["role"] for turn in row["conversations"]] == (["user", "assistant"] if known else ["q", "a"])
    assert row["status"] == "ok"


def test_roles_of_tools_are_kept(images) -> None:
    turns = [{"role": role, "content": "x"} for role in ("system", "user", "tool", "function_call", "assistant")]
    (row,) = rows_of(images, [{"image": "0.jpg", "messages": turns}])
    assert [t["role"] for t in row["conversations"]] == ["system", "user", "tool", "function_call", "assistant"]


# --- forms of conversations -------------------------------------------------------------------------------------------

DATA = f"data:image/jpeg;base64,{base64.b64encode(jpeg(2)).decode()}"
TEXT = {"type": "text", "text": "What?"}

PARTS: dict[str, list[Any]] = {
    "image": [{"type": "image", "image": "2.jpg"}, TEXT],
    "after": [TEXT, {"type": "image", "image": "2.jpg"}],
    "object": [{"type": "image_url", "image_url": {"url": "2.jpg", "detail": "low"}}, TEXT],
    "responses": [{"type": "input_image", "image_url": "2.jpg"}, {"type": "input_text", "text": "What?"}],
    "file": [{"type": "image", "image": "file://{folder}/images/2.jpg"}, TEXT],
    "data": [{"type": "image_url", "image_url": {"url": DATA}}, TEXT],
    "anthropic": [{"type": "image", "source": {"type": "base64", "data": DATA.partition(",")[2]}}, TEXT],
    "anthropic url": [{"type": "image", "source": {"type": "url", "url": "2.jpg"}}, TEXT],
    "no type": [{"image": "2.jpg"}, {"text": "What?"}],
    "text": ["What?", {"type": "image", "path": "2.jpg"}],
    "value": [{"type": "image", "value": "2.jpg"}, {"type": "text", "value": "What?"}],
    "nulls": [{"type": "image", "image": "2.jpg", "text": None}, {"type": "text", "text": "What?", "image": None}],
}


@pytest.mark.parametrize("form", PARTS)
@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
def test_typed_parts(images, form, kind) -> None:
    messages = json.loads(
        json.dumps([{"role": "user", "content": PARTS[form]}, ANSWER]).replace("{folder}", str(images))
    )
    file = images / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"messages": [json.dumps(messages)], "id": ["k"]}), file)
    elif kind == "csv":
        file.write_text('id,messages\nk,"' + json.dumps(messages).replace('"', '""') + '"\n')
    else:
        row = json.dumps({"id": "k", "messages": messages})
        file.write_text(row if kind == "jsonl" else f"[{row}]")
    (row,) = ingested(file, images / "out").to_dicts()
    assert (row["key"], row["status"], row["error"]) == ("k", "ok", None)
    assert [t["text"] for t in row["conversations"]] == ["<image>\nWhat?", "A box."]


def test_images_inside_texts_go_through_filter_and_export(images) -> None:
    rows = [{"id": f"k{i}", "image": [DATA, DATA.partition(",")[2]][i], "caption": f"c{i}"} for i in range(2)]
    (images / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = cli("ingest", images / "a.jsonl", "--out", images / "set")
    assert "base64" in result.stderr + result.stdout
    done = aligncurate.export(images / "set", images / "tars", format="webdataset", quiet=True)
    assert (done.rows, done.failed) == (2, [])
    back = read_all(images / "tars")
    assert [(pair.key, pair.caption, pair.load()) for pair in back] == [(f"k{i}", f"c{i}", jpeg(2)) for i in range(2)]


FORMS: dict[str, dict[str, Any]] = {
    "cauldron": {"texts": [{"user": "What?", "assistant": "A box.", "source": "made"}]},
    "json text": {"conversations": json.dumps(talk("What?", "A box."))},
    "python text": {"conversations": str(talk("What?", "A box."))},
    "one letter less": {"conversation": talk("What?", "A box.")},
    "dialog": {"dialog": talk("What?", "A box.")},
    "columns": {"conversations": {"from": ["human", "gpt"], "value": ["What?", "A box."]}},
    "human and assistant": {"conversations": [{"human": "What?", "assistant": "A box."}]},
    "swift": {"query": "What?", "response": "A box."},
    "vqa": {"question": "What?", "answer": "A box."},
    "alpaca": {"instruction": "What?", "input": "", "output": "A box."},
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_conversations(images, form) -> None:
    (row,) = rows_of(images, [{"image": "0.jpg", **FORMS[form]}])
    assert row["status"] == "ok", row["error"]
    assert row["conversations"] == [{"role": "user", "text": "What?"}, {"role": "assistant", "text": "A box."}]
    assert form != "cauldron" or "made" in row["extra"]


def test_cauldron_in_parquet(images) -> None:
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    turn = pa.struct([("user", pa.string()), ("assistant", pa.string()), ("source", pa.string())])
    turns = [{"user": "a?", "assistant": "A.", "source": "s"}, {"user": "b?", "assistant": "B.", "source": None}]
    table = pa.table(
        {
            "images": pa.array([[{"bytes": jpeg(0), "path": None}], []], pa.list_(picture)),
            "texts": pa.array([turns, turns], pa.list_(turn)),
        }
    )
    pq.write_table(table, images / "a.parquet")
    rows = ingested(images / "a.parquet", images / "out").to_dicts()
    assert [row["status"] for row in rows] == ["ok", "text_only"]
    assert [t["text"] for t in rows[0]["conversations"]] == ["a?", "A.", "b?", "B."]
    assert json.loads(rows[0]["extra"]) == {"turn_fields": [{"source": "s"}, {}]}


def test_values_that_are_no_text_are_never_pythons_notation(images) -> None:
    values: list[Any] = [7, 0.5, True, None, {"a": 1}, [7], "None"]
    rows = rows_of(
        images,
        [{"image": "0.jpg", "conversations": [*talk("<image>\nQ?"), {"from": "gpt", "value": v}]} for v in values],
    )
    texts = [row["conversations"][1]["text"] if row["conversations"] else None for row in rows]
    assert texts == ["7", "0.5", "true", None, None, None, "None"]
    assert [row["status"] for row in rows] == ["ok"] * 3 + ["invalid_row"] * 3 + ["ok"]
    assert all("Q?" in row["extra"] for row in rows[3:6])  # a conversation that cannot be read is not lost


@pytest.mark.parametrize(
    "name",
    ["image_file", "image_name", "image_id", "imgs", "pic", "image_paths", "IMAGE", "image_url", "img_id", "file_path",
     "photo", "the_picture_i_took", "Bild"],
)  # fmt: skip
def test_other_names_of_the_image_field(images, name) -> None:
    for kind, texts in (("talk", {"conversations": talk("<image>\nWhat?", "A box.")}), ("pair", {"caption": "a box"})):
        rows = rows_of(images, [{"n": i, name: f"{i}.jpg", **texts} for i in range(3)], kind)
        assert [row["status"] for row in rows] == ["ok"] * 3, (kind, rows[0]["error"])


# --- captions ---------------------------------------------------------------------------------------------------------


def test_several_captions_make_several_rows(images) -> None:
    lists: list[Any] = [["a", "b", "c"], ["one"], [], "plain", ["x", None, " ", "y"], [{"raw": "r"}, {"raw": "s"}]]
    rows = [{"id": f"k{i}", "image": "0.jpg", "caption": value} for i, value in enumerate(lists)]
    found = rows_of(images, rows)
    assert [(row["key"], row["caption"]) for row in found] == [
        ("k0-0", "a"), ("k0-1", "b"), ("k0-2", "c"), ("k1", "one"), ("k2", None), ("k3", "plain"), ("k4-0", "x"),
        ("k4-1", "y"), ("k5-0", "r"), ("k5-1", "s"),
    ]  # fmt: skip
    assert [row["status"] for row in found] == ["ok"] * 4 + ["missing_caption"] + ["ok"] * 5
    assert [row["row"] for row in found] == [0, 0, 0, 1, 2, 3, 4, 4, 5, 5]
    first = rows_of(images, rows, "first", captions="first")
    assert [row["caption"] for row in first] == ["a", "one", None, "plain", "x", "r"]
    assert [row["key"] for row in first] == [f"k{i}" for i in range(6)]


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "jsonl"])
def test_several_captions_in_every_kind_of_file(images, kind) -> None:
    file, captions = images / f"a.{kind}", [[f"{i}{j}" for j in range(3)] for i in range(4)]
    if kind == "parquet":
        pq.write_table(pa.table({"image": [jpeg(i) for i in range(4)], "captions": captions}), file)
    elif kind == "jsonl":
        file.write_text("".join(json.dumps({"image": "0.jpg", "captions": c}) + "\n" for c in captions))
    else:
        tab = "\t" if kind == "tsv" else ","
        texts = ['"' + str(c).replace('"', '""') + '"' for c in captions]
        file.write_text(f"image{tab}captions\n" + "".join(f"0.jpg{tab}{text}\n" for text in texts))
    result = cli("ingest", file, "--out", images / "out", "--rows-per-shard", 3)
    assert "4 rows had several captions" in result.output
    frame = aligncurate.open_dataset(images / "out").scan().collect()
    assert frame["caption"].to_list() == [text for some in captions for text in some]
    assert frame["key"].n_unique() == 12 and statuses(frame) == ["ok"] * 12
    limited = aligncurate.ingest(file, images / "limited", limit=7, source=SourceOptions(rows_per_shard=2), quiet=True)
    assert limited.dataset.scan().collect()["caption"].to_list() == frame["caption"].to_list()[:7]
    assert len(read_all(file)) == 12


def test_captions_that_are_objects(images) -> None:
    values = [{"text": "a box", "lang": "en"}, {"only": "a box"}, {"en": "a box", "de": "eine Kiste"}, {"n": 1}, {}]
    rows = rows_of(images, [{"image": "0.jpg", "caption": value} for value in values])
    assert [row["status"] for row in rows] == ["ok", "ok", "invalid_caption", "invalid_caption", "missing_caption"]
    assert [row["caption"] for row in rows[:2]] == ["a box"] * 2
    assert json.loads(rows[2]["caption"]) == values[2] and "en, de" in rows[2]["error"]
    assert "lang" in rows[0]["extra"]


INVISIBLE = {
    "\ufeffa box": "a box", "a box\ufeff": "a box", "\u200b a box\u200b\r\n": "a box", "\u200e\u2060a box\0": "a box",
    "a\ufeff box": "a box", "\u200b\ufeff": None, "مربع أحمر": "مربع أحمر", "👩\u200d🚀 box": "👩\u200d🚀 box",
    "a\0b": "a\0b",
}  # fmt: skip


def test_marks_that_cannot_be_seen_are_stripped(images) -> None:
    rows = rows_of(images, [{"image": "0.jpg", "caption": text} for text in INVISIBLE])
    assert [row["caption"] or None for row in rows] == list(INVISIBLE.values())
    assert [row["status"] for row in rows] == ["ok" if text else "missing_caption" for text in INVISIBLE.values()]


# --- keys and levels --------------------------------------------------------------------------------------------------


def test_repeated_keys_are_told(images) -> None:
    (images / "a.json").write_text(json.dumps([{"id": k, "image": "0.jpg", "caption": "c"} for k in (1, 1, 2, 1)]))
    result = cli("ingest", images / "a.json", "--out", images / "out")
    assert "2 keys occurred before" in result.output
    assert aligncurate.open_dataset(images / "out").scan().collect()["key"].n_unique() == 4


def test_levels_in_aligngpts_form(images) -> None:
    similarity: list[Any] = [0, 7, None, 0.31, True, -1]
    rows = [{"image": "0.jpg", "similarity": s, "conversations": talk("<image>", "a box")} for s in similarity]
    assert [row["level"] for row in rows_of(images, rows)] == [1, 8, None, None, None, None]
    export = aligncurate.export(images / "out-a", images / "llava", format="llava-json", quiet=True)
    written = json.loads((images / "llava" / "annotations.json").read_text())
    assert [row.get("similarity") for row in written] == [0, 7, None, None, None, None] and export.rows == 6
    back = ingested(images / "llava" / "annotations.json", images / "back")
    assert back["level"].to_list() == [1, 8, None, None, None, None]


def test_base64_in_parquet_is_pointed_at(tmp_path) -> None:
    texts = [base64.b64encode(jpeg(i)).decode() for i in range(3)]
    pq.write_table(pa.table({"image_base64": texts, "text": ["a", "b", "c"]}), tmp_path / "a.parquet")
    frame = ingested(tmp_path / "a.parquet", tmp_path / "out")
    assert statuses(frame) == ["ok"] * 3 and "image" not in frame.columns
    assert frame["image_path"].to_list() == ["image_base64"] * 3


LISTS = ["['a dog' 'a cat']", "['a dog'\n 'a cat']", '["a dog", "a cat"]', "('a dog', 'a cat')"]


@pytest.mark.parametrize("text", LISTS)
def test_lists_as_numpy_and_python_print_them(images, text) -> None:
    (row, *more) = rows_of(images, [{"image": "0.jpg", "caption": text}])
    assert [r["caption"] for r in (row, *more)] == (["a dog", "a cat"] if text[0] == "[" else [text])


def test_gemini_and_history(images) -> None:
    parts = [{"text": "What?"}, {"inline_data": {"mime_type": "image/jpeg", "data": DATA.partition(",")[2]}}]
    contents = [{"role": "user", "parts": parts}, {"role": "model", "parts": [{"text": "A box."}]}]
    (row,) = rows_of(images, [{"contents": contents}])
    assert row["status"] == "ok" and row["conversations"][0]["text"] == "<image>\nWhat?"
    asked = {"query": "And?", "response": "Blue.", "history": [["What?", "A box."]], "images": ["0.jpg"]}
    (row,) = rows_of(images, [asked], "history")
    assert [turn["text"] for turn in row["conversations"]] == ["What?", "A box.", "And?", "Blue."]


def test_a_row_that_breaks_the_reader_is_invalid(images) -> None:
    rows = [{"image": "0.jpg", "caption": "c"}, {"query": "q", "response": "a", "history": [3], "image": "0.jpg"}]
    deep: Any = "x"
    for _ in range(500):
        deep = [deep]
    rows += [{"image": deep, "caption": "c"}, {"image": "0.jpg", "caption": deep}]
    found = rows_of(images, rows)
    assert [row["status"] for row in found] == ["ok", "missing_caption", "invalid_row", "invalid_row"]
    (row,) = rows_of(images, rows[1:2], "one")
    assert row["status"] == "invalid_row" and row["row"] == 0


def test_rows_that_name_their_images_in_different_fields(images) -> None:
    rows: list[dict[str, Any]] = [{"image": "0.jpg"}, {"images": ["1.jpg"]}, {"image": None, "img": "2.jpg"}, {}]
    found = rows_of(images, [{**row, "conversations": talk("Hi", "Hello.")} for row in rows])
    assert [row["status"] for row in found] == ["ok"] * 3 + ["text_only"]
    assert [row["image_path"] and row["image_path"][-5:] for row in found] == ["0.jpg", "1.jpg", "2.jpg", None]
    row = {"pic": None, "image": "0.jpg", "conversations": talk("Hi", "Hello.")}
    chosen = rows_of(images, [row], "chosen", image_column="pic")
    assert chosen[0]["status"] == "missing_image" and "0.jpg" in chosen[0]["error"]


def test_a_sample_of_a_tar_that_names_or_marks_an_image_is_not_text_only(tmp_path) -> None:
    metas = {
        "named": {"image": "x.jpg", "conversations": talk("Hi", "Hello.")},
        "marked": {"conversations": talk("<ImageHere> Hi", "Hello.")},
        "part": {"messages": [{"role": "USER", "content": [{"type": "input_image", "image_url": "x.jpg"}]}, ANSWER]},
        "text": {"conversations": talk("Hi", "Hello.")},
    }
    write_tar(tmp_path / "a.tar", {key: {"json": json.dumps(meta).encode()} for key, meta in metas.items()})
    frame = ingested(tmp_path / "a.tar", tmp_path / "out")
    assert statuses(frame) == ["missing_image"] * 3 + ["text_only"]
    assert all(frame["error"][:3])


def test_several_captions_in_a_tar(tmp_path) -> None:
    captions = [["a", "b"], "c", ["d"], [{"raw": "e"}, {"raw": "f"}]]
    write_tar(
        tmp_path / "a.tar",
        {f"k{i}": {"jpg": jpeg(i), "json": json.dumps({"caption": c}).encode()} for i, c in enumerate(captions)},
    )
    frame = ingested(tmp_path / "a.tar", tmp_path / "out")
    assert frame["key"].to_list() == ["k0-0", "k0-1", "k1", "k2", "k3-0", "k3-1"]
    assert frame["caption"].to_list() == list("abcdef") and statuses(frame) == ["ok"] * 6
    first = ingested(tmp_path / "a.tar", tmp_path / "first", captions="first")
    assert first["caption"].to_list() == list("acde")


@pytest.mark.parametrize("kind", ["json", "csv", "parquet", "tar"])
def test_no_text_of_a_row_is_dropped(images, kind) -> None:
    row = {"image": "0.jpg", "caption": "a caption", "conversations": json.dumps(talk("<image> q", "a")), "title": "t"}
    file = images / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({name: [value] for name, value in row.items()}), file)
    elif kind == "csv":
        cells = [value.replace('"', '""') for value in row.values()]
        file.write_text(",".join(row) + '\n"' + '","'.join(cells) + '"\n')
    elif kind == "tar":
        write_tar(file, {"k": {"jpg": jpeg(), "json": json.dumps(row).encode()}})
    else:
        file.write_text(json.dumps([row]))
    (found,) = ingested(file, images / "out").to_dicts()
    assert found["status"] == "ok" and len(found["conversations"]) == 2
    assert "a caption" in found["extra"] and found["title"] == "t"
    (two,) = rows_of(images, [{"image": ["0.jpg", "1.jpg"], "caption": "c"}], "two")
    assert two["status"] == "multi_image" and "1.jpg" in two["extra"]


def test_an_unanswered_question_is_not_lost(images) -> None:
    (images / "a.csv").write_text("image,question,answer\n0.jpg,What?,A box.\n1.jpg,Why?,\n")
    rows = ingested(images / "a.csv", images / "out").to_dicts()
    assert [row["status"] for row in rows] == ["ok", "invalid_row"] and "Why?" in rows[1]["extra"]


def test_limits_are_exact_where_only_later_samples_have_several_captions(tmp_path) -> None:
    """The first samples, which are looked at, say nothing of those behind them."""
    for number in range(2):
        meta = [{"caption": "one"} if i < 210 else {"caption": ["a", "b", "c"]} for i in range(260)]
        samples = {f"{number}-{i:03d}": {"jpg": b"x", "json": json.dumps(m).encode()} for i, m in enumerate(meta)}
        write_tar(tmp_path / f"{number}.tar", samples)
    rows = [{"image": "x.jpg", "caption": "one" if i < 2_000 else ["a", "b"]} for i in range(2_100)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for source in (
        open_source([str(tmp_path / f"{n}.tar") for n in range(2)]),
        open_source(str(tmp_path / "rows.jsonl")),
    ):
        for limit in (205, 300, 700):
            kept = limit_shards(source, limit)
            assert sum(len(list(source.read(shard))) for shard in kept) == limit


def test_limits_count_captions_and_not_rows(tmp_path) -> None:
    captions = [[str(j) for j in range(i % 4)] for i in range(100)]
    turns = [talk("q", "a") if i % 10 == 0 else None for i in range(100)]
    table = pa.table({"image": [b"x"] * 100, "caption": captions, "conversations": turns})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=17)
    expected = [max(len(c), 1) if t is None else 1 for c, t in zip(captions, turns, strict=True)]
    source = open_source(str(tmp_path / "a.parquet"), SourceOptions(rows_per_shard=23))
    for shard in source.shards:
        assert source.count(shard) == len(list(source.read(shard))) == sum(expected[shard.start : shard.stop])
    for limit in (1, 30, 77, 500):
        shards = limit_shards(source, limit)
        assert sum(len(list(source.read(shard))) for shard in shards) == min(limit, sum(expected))


UNSEEN = r"\s\u00ad\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff\ufffe\0"


@given(
    st.text(st.one_of(st.sampled_from(" \t\n\x1c\x85\xa0\u2003\u200b\ufeff\0\u202eab<"), st.characters()), max_size=20)
)
def test_blanks_and_invisible_characters_at_the_ends_are_cut(text) -> None:
    edges = re.compile(f"^[{UNSEEN}]+|[{UNSEEN}]+$")
    assert clean(text) == edges.sub("", text.replace("\ufeff", ""))
