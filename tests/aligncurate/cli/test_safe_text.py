"""Hostile text, in any field of a dataset or name of a file, does not reach the terminal as it is."""

from __future__ import annotations

import io
import json
import unicodedata

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.testing import CliRunner

from aligncurate import progress
from aligncurate.cli.app import app
from aligncurate.progress import make_console, notice, safe_text
from tests.support.inputs import jpeg

EVIL = "[red]a[/] [/] [link=x]:bug: \x1b[31m\x1b]0;owned\x07 \x9b2J \u202egpj \u2066 \u200b \ufeff \u2028 \x00 \x08 \r"
EVIL += "\nforged: line"
NAME = EVIL.replace("\x00", "").replace("/", "_")  # what a file may be called


def unsafe(text: str) -> list[str]:
    """Control and format characters other than newlines: the naive twin of `safe_text`, by Unicode's categories."""
    return [c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]


@pytest.mark.parametrize("text", ["a dog", "é 犬 كلب 🐕 ️", "a\u3000b\u00a0c", "[red] :bug: back\\slash"])
def test_ordinary_text_stays(text) -> None:
    assert safe_text(text) == text


def test_every_character_is_safe_or_escaped() -> None:
    for code in [*range(0x3100), *range(0xD800, 0xE000), *range(0xFE00, 0x10000), *range(0xE0000, 0xE0080)]:
        made = safe_text(chr(code))
        assert not unsafe(made) and "\n" not in made
        assert made == chr(code) or made.encode().decode("unicode_escape") == chr(code) or 0xD800 <= code < 0xE000


def test_whatever_a_console_prints_is_safe(monkeypatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    table = Table(EVIL, title=EVIL)
    table.add_row(EVIL)
    for each in (EVIL, Text(EVIL), table):
        make_console().print(each)
    assert not unsafe(out.getvalue())
    assert "[red]a[/]" in out.getvalue() and "\\x1b[31m" in out.getvalue() and ":bug:" in out.getvalue()


def test_styles_still_reach_a_terminal_and_a_notice_is_one_line(monkeypatch) -> None:
    out = io.StringIO()
    terminal = make_console()
    monkeypatch.setattr(terminal, "file", out)
    monkeypatch.setattr(terminal, "_force_terminal", True)
    monkeypatch.setattr(terminal, "_color_system", Console(force_terminal=True, color_system="standard")._color_system)
    monkeypatch.setattr(progress, "console", terminal)
    notice(EVIL)
    shown = out.getvalue()
    assert shown.startswith("\x1b[33mnote: \x1b[0m") and shown.count("\n") == 1
    assert not unsafe(shown.removeprefix("\x1b[33mnote: \x1b[0m"))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """JSON lines whose every text is hostile, beside images with hostile names, in a folder with a hostile name."""
    folder = tmp_path_factory.mktemp("hostile") / NAME
    folder.mkdir()
    rows = []
    for number in range(12):
        name = f"{number}{NAME}.jpg"
        (folder / name).write_bytes(jpeg(number) if number < 9 else b"%PDF " + EVIL.encode())
        key = f"{number}{EVIL}"
        rows.append({"key": key, "image": name, "caption": f"{number} {EVIL}", f"col{EVIL}": EVIL})
    rows.append({"key": f"gone {EVIL}", "image": f"gone {NAME}.jpg", "caption": EVIL})
    source = folder / "list.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder


def test_a_hostile_dataset_goes_through_every_verb_that_prints(hostile) -> None:
    scored, levelled, thresholds = hostile / "scored", hostile / "levelled", hostile / "thresholds.json"
    thresholds.write_text(json.dumps({"method": EVIL, "levels": 2, "values": [EVIL], EVIL: EVIL}))
    commands = [
        ("ingest", hostile / "list.jsonl", "--out", hostile / "ingested"),
        ("score", hostile / "list.jsonl", "--out", scored, "--model", "tiny"),
        ("score", hostile / "list.jsonl", "--out", scored, "--model", "tiny"),
        ("score", hostile / f"none{NAME}.tar", "--out", hostile / "none"),
        ("bucket", scored, "--out", levelled, "--levels", 2),
        ("bucket", scored, "--out", hostile / "other", "--thresholds", thresholds),
        ("bucket", scored, "--out", hostile / "third", "--score-column", NAME),
        ("inspect", levelled, "--examples", 3),
        ("inspect", levelled, "--examples", 3, "--json"),
        ("inspect", hostile),
        ("filter", levelled, "--out", hostile / "kept", "--levels", "2"),
        ("filter", levelled, "--out", hostile / "wrong", "--where", f"nothing = '{NAME}"),
        ("export", levelled, "--out", hostile / "exported"),
        ("export", levelled, "--out", hostile / "llava", "--format", "llava-json"),
        ("train", "plan", levelled, "--stage", NAME),
        ("train", "pretrain", hostile / "nothing", "--llm", NAME, "--out", hostile / "trained"),
        ("chat", hostile / "nothing", "--image", hostile / f"none{NAME}.jpg"),
        ("generate", hostile / "nothing", "--prompt", NAME),
        ("convert", hostile / "nothing", hostile / "converted"),
    ]
    for command in commands:
        result = CliRunner().invoke(app, [str(argument) for argument in command])
        assert result.exception is None or isinstance(result.exception, SystemExit), (command[0], result.exception)
        assert not unsafe(result.output), (command[0], result.output)
        assert "\nforged" not in result.output, (command[0], result.output)
        if "--json" in command:
            assert EVIL[:9] in json.dumps(json.loads(result.stdout), ensure_ascii=False)
