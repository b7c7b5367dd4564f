"""CSV and TSV tables: dialects, encodings, headers, bad lines. Oracle: the csv module that wrote them."""

from __future__ import annotations

import csv
import io
import json
import re

import pytest

import aligncurate
from aligncurate.errors import UserError
from aligncurate.sources.detect import open_source
from aligncurate.sources.options import SourceOptions
from tests.support.inputs import cli, complaint, ingested, jpeg, read_all, statuses

TEXTS = [
    "plain",
    "commas, semicolons; tabs\tand | pipes",
    'a "quoted" word',
    '"quoted"',
    "two\nlines",
    "ünï 图片",
    "back\\slash",
    "it's",
    "0010",
]


@pytest.fixture
def folder(tmp_path):
    for seed in range(3):
        (tmp_path / f"{seed}.jpg").write_bytes(jpeg(seed))
    return tmp_path


def table(rows, **dialect) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, **dialect).writerows(rows)
    return buffer.getvalue()


def captions(path, **options):
    """(caption, status) of the rows of a table, in order."""
    return [(pair.caption, pair.status) for pair in read_all(path, **options)]


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("separator", ["\t", ",", ";", "|"])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_dialects_are_detected(folder, name, separator, quoting, end, header) -> None:
    rows = [(i, f"{i % 3}.jpg", text) for i, text in enumerate(TEXTS)]
    text = table([("n", "filepath", "title"), *rows] if header else rows,
                 delimiter=separator, quoting=quoting, lineterminator=end)  # fmt: skip
    (folder / name).write_bytes(text.encode())
    assert captions(folder / name) == [(t, "ok") for t in TEXTS]


def test_escapes_with_a_backslash(folder) -> None:
    rows = [("image", "caption"), ("0.jpg", 'a "quoted" word, and more'), ("1.jpg", "plain"), ("2.jpg", '"')]
    text = table(rows, doublequote=False, escapechar="\\", quoting=csv.QUOTE_ALL)
    (folder / "a.csv").write_text(text)
    assert captions(folder / "a.csv") == [(caption, "ok") for _, caption in rows[1:]]


def test_spaces_after_separators(folder) -> None:
    (folder / "a.csv").write_text('image, caption\n0.jpg, "one, two"\n1.jpg, three\n')
    assert captions(folder / "a.csv") == [("one, two", "ok"), ("three", "ok")]
    (folder / "b.csv").write_text("image_name| comment_number| comment\n0.jpg| 0| A dog .\n1.jpg| 4   A cat .\n")
    frame = ingested(folder / "b.csv", folder / "out", image_column="image_name", caption_column="comment")
    assert statuses(frame) == ["ok", "missing_caption"]
    assert frame["comment_number"].str.strip_chars().to_list() == ["0", "4   A cat ."]  # no text is lost


@pytest.mark.parametrize("separator", [";", "\\t", "tab", "|", "#"])
def test_the_separator_can_be_given(folder, separator) -> None:
    character = {"\\t": "\t", "tab": "\t"}.get(separator, separator)
    (folder / "a.csv").write_text(table([("image", "caption"), ("0.jpg", "one, two")], delimiter=character))
    assert captions(folder / "a.csv", separator=separator) == [("one, two", "ok")]


def test_options_that_cannot_be_used(folder) -> None:
    (folder / "a.csv").write_text("0.jpg,one,2\n")
    for options, sentence in (
        (["--separator", ";;"], "--separator ;;: use one character"),
        (["--encoding", "klingon"], "--encoding klingon: unknown"),
        (["--columns", "image,caption"], "--columns has 2 names, the first line has 3 cells"),
    ):
        assert sentence in complaint(cli("ingest", folder / "a.csv", "--out", folder / "out", *options))


def test_tables_without_a_header(folder) -> None:
    """CC3M's form; web addresses name no image, so the rows are only metadata."""
    lines = "a red box, on the floor\thttps://example.org/a.jpg\na disc\thttps://example.org/b?x=1\n"
    (folder / "cc3m.tsv").write_text(lines)
    frame = ingested(folder / "cc3m.tsv", folder / "out")
    assert frame["caption"].to_list() == ["a red box, on the floor", "a disc"]
    assert frame["url"].to_list() == ["https://example.org/a.jpg", "https://example.org/b?x=1"]
    (folder / "ids.csv").write_text("0,one\n1,two\n")
    named = captions(folder / "ids.csv", columns=("image", "caption"))
    assert [caption for caption, _ in named] == ["one", "two"]
    (folder / "header.csv").write_text("image,caption\n0.jpg,one\n")
    assert captions(folder / "header.csv", columns=("image", "caption")) == [("one", "ok")]


ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252", "latin-1"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_encodings_are_detected(folder, encoding) -> None:
    rows = [("image", "caption", "place"), ("0.jpg", "a café at night", "Zürich"), ("1.jpg", "plain", "here")]
    (folder / "a.csv").write_bytes(table(rows, delimiter=";").encode(encoding))
    frame = ingested(folder / "a.csv", folder / "out", rows_per_shard=1)
    assert frame.select("caption", "place", "status").rows() == [
        ("a café at night", "Zürich", "ok"), ("plain", "here", "ok"),
    ]  # fmt: skip
    notices = open_source(str(folder / "a.csv")).notices
    assert ("cp1252" in " ".join(notices)) == (encoding in ("cp1252", "latin-1"))


@pytest.mark.parametrize("encoding", ["gb18030", "big5", "utf-7"])
def test_other_encodings_are_named_by_the_user(folder, encoding) -> None:
    text = "山東的海上有一個小島"
    (folder / "a.csv").write_bytes(table([("image", "caption"), ("0.jpg", text), ("1.jpg", "ok")]).encode(encoding))
    assert captions(folder / "a.csv", encoding=encoding) == [(text, "ok"), ("ok", "ok")]
    found = read_all(folder / "a.csv")  # not guessed: the row says what is wrong, the others are used
    assert [p.status for p in found] == ["ok" if encoding == "utf-7" else "invalid_caption", "ok"]


LANGUAGES = {
    "gbk": ["一只狗在草地上奔跑", "两个人骑着自行车穿过城市", "红色的汽车停在房子前面", "一个女孩在海边微笑"],
    "cp1251": ["Собака бежит по траве", "Красная машина стоит перед домом", "Девочка улыбается у моря"],
    "koi8-r": ["Собака бежит по траве", "Красная машина стоит перед домом", "Девочка улыбается у моря"],
    "shift_jis": ["犬が草の上を走っている", "赤い車が家の前に止まっている", "海辺で微笑む女の子"],
    "euc_kr": ["개가 풀밭에서 달리고 있다", "빨간 자동차가 집 앞에 서 있다", "바닷가에서 웃는 소녀"],
    "big5": ["一隻狗在草地上奔跑", "紅色的汽車停在房子前面", "一個女孩在海邊微笑"],
    "cp1253": ["Ένας σκύλος τρέχει στο γρασίδι", "Κόκκινο αυτοκίνητο μπροστά στο σπίτι"],
    "cp1256": ["كلب يركض على العشب", "سيارة حمراء أمام المنزل"],
}


@pytest.mark.parametrize("encoding", LANGUAGES)
def test_likely_encodings_are_named_and_not_taken(folder, encoding) -> None:
    texts = LANGUAGES[encoding]
    file = folder / "a.csv"
    file.write_bytes(table([("image", "caption"), *(("0.jpg", text) for text in texts)]).encode(encoding))
    (notice,) = open_source(str(file)).notices
    named = re.fullmatch(rf"{file}: {len(texts)} lines are not UTF-8; the file is likely --encoding (\S+).*\.", notice)
    assert named, notice
    assert {pair.status for pair in read_all(file)} == {"invalid_caption"}
    assert [caption for caption, _ in captions(file, encoding=named[1])] == texts
    assert open_source(str(file), SourceOptions(encoding=named[1])).notices == []


def test_an_encoding_that_is_taken_for_western_is_named(folder) -> None:
    texts = ["Pes běží po trávě přes žlutý les", "Červené auto stojí před domem", "Příliš žluťoučký kůň"]
    (folder / "a.csv").write_bytes(table([("image", "caption"), *(("0.jpg", t) for t in texts)]).encode("cp1250"))
    (notice,) = open_source(str(folder / "a.csv")).notices
    assert "read as cp1252" in notice and "Set --encoding, for example to cp1250 if accents are wrong" in notice


def test_a_few_damaged_lines_among_many_get_no_advice(folder) -> None:
    lines = [b"image,caption", *(f"0.jpg,café {n}".encode() for n in range(5)), b"0.jpg,caf\xe9\xff\xfe"]
    (folder / "a.csv").write_bytes(b"\n".join(lines) + b"\n")
    assert open_source(str(folder / "a.csv")).notices == []


def test_line_endings_of_old_macs(folder) -> None:
    (folder / "a.csv").write_bytes(b"image,caption\r0.jpg,one\r1.jpg,two\r")
    assert captions(folder / "a.csv") == [("one", "ok"), ("two", "ok")]


BAD = {
    "text behind a quotation mark": ('0.jpg,"Love" and peace', "line 3", '"Love" and peace'),
    "never closed": ('0.jpg,"and so on', "line 3", '"and so on'),
    "closed by a later line": ('0.jpg,"and so', "line 3", '"and so'),
    "too many cells": ("0.jpg,one, two, three", "line 3 has 4 cells, the first line has 2", None),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_line_is_a_row_and_costs_no_other(folder, kind) -> None:
    line, sentence, caption = BAD[kind]
    lines = ["image,caption", '1.jpg,"good, too"', line, "1.jpg,b", '2.jpg,"c"', "2.jpg,d"]
    if kind == "closed by a later line":
        lines[4] = '2.jpg,c"'
    (folder / "a.csv").write_text("\n".join(lines) + "\n")
    frame = ingested(folder / "a.csv", folder / "out")
    assert statuses(frame) == ["ok", "invalid_row", "ok", "ok", "ok"]
    assert frame["row"].to_list() == list(range(5)) and sentence in frame["error"][1]
    assert frame["caption"][1] == caption and json.loads(frame["extra"][1]) == {"line": line}
    assert ingested(folder / "out", folder / "again").equals(frame)


def test_a_stray_quote_far_from_the_next_one(folder) -> None:
    """The record may not swallow thousands of lines until a mark closes it."""
    many = "".join(f"{i % 3}.jpg,c{i}\n" for i in range(3_000))
    (folder / "a.csv").write_text('image,caption\n0.jpg,"good, x"\n0.jpg,"open\n' + many + '1.jpg,"closed, here"\n')
    found = captions(folder / "a.csv")
    assert len(found) == 3_003 and [s for _, s in found].count("invalid_row") == 1
    assert found[-1] == ("closed, here", "ok")


def test_a_table_that_never_quotes(folder) -> None:
    texts = ['"Love" and peace', 'a 5" disk', '"open', "plain", '"Hi" he said']
    (folder / "a.csv").write_text("image,caption\n" + "".join(f"0.jpg,{t}\n" for t in texts))
    assert captions(folder / "a.csv") == [(t, "ok") for t in texts]


def test_tables_are_read_from_disk_shard_by_shard(folder) -> None:
    rows = [(f"{i % 3}.jpg", f"c{i}" if i % 7 else f"line\n{i}", i, i / 4) for i in range(100)]
    (folder / "a.csv").write_text("\n\n" + table([("image", "caption", "n", "x"), *rows]))
    whole = ingested(folder / "a.csv", folder / "whole")
    cut = ingested(folder / "a.csv", folder / "cut", rows_per_shard=9)
    assert cut.equals(whole) and cut["caption"].to_list() == [r[1] for r in rows]
    assert cut["n"].to_list() == list(range(100)) and cut["x"].to_list() == [i / 4 for i in range(100)]
    source = open_source(str(folder / "a.csv"), SourceOptions(rows_per_shard=9))
    assert [p.row for p in source.read(source.shards[3])] == list(range(27, 36))


def test_odd_tables(folder) -> None:
    cases = {
        "columns of the same name": ("image,caption,caption\n0.jpg,one,more\n", [("one", "ok")]),
        "an index without a name": (",image,caption\n0,0.jpg,one\n", [("one", "ok")]),
        "cells behind the last column": ("image,caption\n0.jpg,one,,\n", [("one", "ok")]),
        "zero bytes": ("image,caption\n0.jpg,o\0ne\n", [("o\0ne", "ok")]),
        "no line end": ("image,caption\n0.jpg,one", [("one", "ok")]),
        "a name with a zero byte": ("image,caption\n0\0.jpg,one\n", [("one", "missing_image")]),
    }
    for kind, (text, expected) in cases.items():
        (folder / "a.csv").write_text(text)
        assert captions(folder / "a.csv") == expected, kind
    (folder / "a.csv").write_text("image,caption,a,a\n0.jpg,one,1,x\n")
    assert ingested(folder / "a.csv", folder / "out").select("a", "a_2").rows() == [(1, "x")]
    (folder / "a.csv").write_bytes(b"")
    with pytest.raises(UserError, match="no rows"):
        aligncurate.ingest(folder / "a.csv", folder / "none", quiet=True)


def test_names_of_columns_that_are_not_utf8(folder) -> None:
    """In a file from Windows they are read as the rest of it; otherwise what is no text is replaced."""
    text = "image,caption,Länge,größe\n0.jpg,café,1,a\n1.jpg,über,2,b\n"
    (folder / "a.csv").write_bytes(text.encode("cp1252"))
    frame = ingested(folder / "a.csv", folder / "out")
    assert frame.select("caption", "Länge", "größe").rows() == [("café", 1, "a"), ("über", 2, "b")]
    assert [pair.caption for pair in read_all(folder / "a.csv", caption_column="größe")] == ["a", "b"]
    (folder / "c.csv").write_bytes(text.partition("\n")[2].encode("cp1252"))
    named = read_all(folder / "c.csv", columns=("image", "caption", "é", "n"))  # the user's names are kept
    assert [pair.extra["é"] for pair in named] == [1, 2]
    (folder / "b.csv").write_bytes(b"image,caption,n\xff,n\xfe\n0.jpg,caf\xc3\xa9,1,2\n")
    frame = ingested(folder / "b.csv", folder / "out-b")
    assert frame.select("caption", "n?", "n?_2").rows() == [("café", 1, 2)]
