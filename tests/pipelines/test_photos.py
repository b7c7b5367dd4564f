"""The whole job on photographs, made small: what is learned must hold for photographs that nothing was learned from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from aligncurate.errors import UserError
from pipelines.photos import SMALL, run


def test_loss_falls_on_held_out_photographs_in_both_stages(data_root: Path, tmp_path: Path) -> None:
    size = replace(SMALL, pairs=192, held_out=32, conversations=16, questions=24, language_steps=25, epochs=(3, 4))
    report = run(data_root, tmp_path, size, quiet=True)
    for before, after in (report.pretrain, report.finetune):
        assert after.loss < before.loss and after.tokens == before.tokens > 0
    assert set(report.pretrain[1].by_level) <= set(range(1, 9)) and len(report.pretrain[1].by_level) > 1
    assert report.answers.questions == 24 and 0 <= report.answers.right <= 24
    told = json.loads((tmp_path / "report.json").read_text())
    assert told["pretrain"][1]["loss"] == report.pretrain[1].loss and told["accuracy"] == report.answers.accuracy


def test_missing_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"flickr8k/captions\.csv: no such file"):
        run(tmp_path, tmp_path / "out", SMALL, quiet=True)
