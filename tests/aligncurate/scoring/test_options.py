"""The options of score and ingest: checked once, recorded under the names that earlier datasets have."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

import aligncurate
from aligncurate.errors import UserError
from aligncurate.scoring.options import IngestOptions, ScoreOptions
from aligncurate.settings import recorded
from tests.support.inputs import pairs, write_tar


def test_what_the_manifest_records(tmp_path) -> None:
    assert recorded(ScoreOptions(batch_size=8)) == {
        "batch_size": 8, "decode": "exact", "embeddings": "none", "score_text": "assistant", "embed_images": False,
        "limit": None,
    }  # fmt: skip
    tar = write_tar(tmp_path / "a.tar", pairs(2))
    run = aligncurate.ingest(tar, tmp_path / "out", limit=1, workers=1, quiet=True)
    assert run.dataset.manifest["options"] == {
        "embed_images": False, "limit": 1, "format": None, "caption_column": None, "image_column": None,
        "image_root": None, "captions": "all", "rows_per_shard": 10_000,
        "separator": None, "encoding": None, "columns": None,
    }  # fmt: skip


def test_one_config_may_be_given_as_a_path() -> None:
    assert ScoreOptions(model_config=Path("a/b.json")).model_config == ("a/b.json",)
    assert ScoreOptions(model_config=["a.json", Path("b.json")]).model_config == ("a.json", "b.json")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"batchsize": 3}, "unknown setting 'batchsize'; did you mean batch_size"),
        ({"embeddings": True}, "--embeddings True: use one of none, fp16"),
        ({"workers": 0}, "--workers 0: use a number of at least 1"),
        ({"decode": "quick"}, "--decode quick: use one of exact, fast, gpu"),
    ],
)
def test_wrong_settings_are_named(tmp_path, settings, sentence) -> None:
    with pytest.raises(UserError, match=sentence):
        aligncurate.score(tmp_path / "a.tar", tmp_path / "out", **settings)


def test_help_lists_the_settings() -> None:
    for function, options in ((aligncurate.score, ScoreOptions), (aligncurate.ingest, IngestOptions)):
        assert {"sources", "out", "source", "quiet", *options.__dataclass_fields__} == set(
            inspect.signature(function).parameters
        )
