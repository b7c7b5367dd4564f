"""Claiming an output folder; atomic files."""

from __future__ import annotations

import pytest

from aligncurate.errors import UserError
from aligncurate.io.files import claim, read_json, write_json


def test_claim_makes_the_folder_and_deletes_leftovers(tmp_path) -> None:
    folder = tmp_path / "a/out"
    with claim(folder, ["record.json"]):
        write_json(folder / "record.json", {"a": 1})
        (folder / "level-1").mkdir()
        (folder / ".tmp-b").touch()
        (folder / "level-1/.tmp-c").touch()  # of a run that writes to a folder inside this one
    with claim(folder, ["record.json"]), pytest.raises(UserError, match="another run"), claim(folder, ["record.json"]):
        pass
    assert sorted(p.name for p in folder.rglob("*")) == [".tmp-c", "level-1", "record.json"]
    assert read_json(folder / "record.json") == {"a": 1}


def test_claim_refuses_what_is_not_its_own(tmp_path) -> None:
    (tmp_path / "notes.txt").touch()
    (tmp_path / ".tmp-of-somebody").touch()
    with pytest.raises(UserError, match=r"holds other files \(notes.txt\)"), claim(tmp_path, ["record.json"]):
        pass
    with pytest.raises(UserError, match="this is a file"), claim(tmp_path / "notes.txt", ["record.json"]):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == [".tmp-of-somebody", "notes.txt"]


@pytest.mark.parametrize("name", [".env", ".git/config"])
def test_hidden_files_are_somebody_elses_too(tmp_path, name) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(UserError, match="holds other files"), claim(tmp_path, ["record.json"]):
        pass
    assert (tmp_path / name).exists()


@pytest.mark.parametrize("content", ["{", "[1]", "[" * 100_000])
def test_damaged_json_is_named(tmp_path, content) -> None:
    (tmp_path / "record.json").write_text(content)
    with pytest.raises(UserError, match=r"record\.json: damaged, not a JSON"):
        read_json(tmp_path / "record.json")
