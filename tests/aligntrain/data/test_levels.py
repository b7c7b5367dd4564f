"""The number of levels of the model is that of its data, and contradictions are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import aligncurate
from aligncurate import bucket, ingest
from aligncurate.errors import UserError
from aligntrain import StageConfig, train
from aligntrain.tools.preview import preview
from tests.support.stage_data import captions, finetuning, make_models, picture, pretraining, questions, write_tar


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets by number of levels: `four`, `eight`, and `other`, which has four by other thresholds."""
    path = tmp_path_factory.mktemp("levels")
    make_models(path)
    for name, scale in (("scored", 1.0), ("rescored", 0.5)):
        samples = {f"s{n:02d}": (picture(n), {"caption": f"thing {n}", "score": scale * n / 40}) for n in range(24)}
        ingest([write_tar(path / f"{name}.tar", samples)], path / name, quiet=True)
    bucket(path / "scored", path / "four", levels=4, quiet=True)
    bucket(path / "scored", path / "eight", levels=8, quiet=True)
    bucket(path / "rescored", path / "other", levels=4, quiet=True)
    bucket(path / "rescored", path / "frozen", thresholds=path / "four", quiet=True)
    return path


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[str, str]:
    return {"llm": str(folder / "llm"), "vision": str(folder / "vision")}


@pytest.fixture(scope="module")
def model_of_four(folder: Path, models: dict[str, str]) -> Path:
    train(pretraining(models, str(folder / "four"), folder / "model", learning_rate=1e-2))
    return folder / "model"


def test_a_new_model_has_the_levels_of_its_data(model_of_four: Path, models: dict[str, str]) -> None:
    """And all of them are trained: with four levels and a table of eight, half of it would stay random."""
    assert json.loads((model_of_four / "config.json").read_text())["num_levels"] == 4
    table = load_file(model_of_four / "model.safetensors")["level_embeddings.weight"]
    from aligntrain.training.build import build_model, build_processor

    config = pretraining(models, "x", model_of_four, num_levels=4)
    before = build_model(config, build_processor(config))[0].level_embeddings.weight
    assert table.shape == before.shape == (4, 32)
    assert bool((table != before).any(1).all())


def test_the_next_stage_takes_the_levels_of_its_start_model(folder: Path, model_of_four: Path, tmp_path: Path) -> None:
    start = {"init": str(model_of_four)}
    assert train(finetuning(start, questions(tmp_path / "q.tar"), tmp_path / "out", max_steps=1)).steps == 1
    for make in (pretraining, finetuning):
        with pytest.raises(UserError, match=r"eight: the data has 8 levels, but the model has 4; run .*--levels 4"):
            train(make(start, str(folder / "eight"), tmp_path / "no"))


def test_a_contradicting_number_is_refused(folder: Path, models: dict[str, str], tmp_path: Path) -> None:
    config = pretraining(models, str(folder / "four"), tmp_path / "out", num_levels=8)
    sentence = r"four: the data has 4 levels, but --num-levels is 8; leave it out"
    with pytest.raises(UserError, match=sentence):
        train(config)
    with pytest.raises(UserError, match=sentence):
        preview(config)
    assert train(config.replace(num_levels=4)).steps == 3


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (("four", "eight"), r"four and \S+eight: levelled with different thresholds, one has 4 levels, the other 8"),
        (("four", "other"), r"different thresholds, so the same level means different scores; run `aligncurate bucket"),
        (("four", "frozen"), None),
        (("scored.tar", "four"), None),
    ],
)
def test_datasets_are_levelled_alike(
    folder: Path, models: dict[str, str], tmp_path: Path, names: tuple[str, ...], sentence: str | None
) -> None:
    config = pretraining(models, "x", tmp_path / "out").replace(data=[str(folder / name) for name in names])
    if sentence is None:
        assert preview(config).facts.levels.keys() == {1, 2, 3, 4}
        return
    for ask in (preview, train):
        with pytest.raises(UserError, match=sentence):
            ask(config)


def test_levels_that_finetuning_does_not_use_may_differ(folder: Path, models: dict[str, str], tmp_path: Path) -> None:
    config = finetuning(models, "x", tmp_path / "out", num_levels=4).replace(
        data=[str(folder / "four"), str(folder / "other"), questions(tmp_path / "q.tar")]
    )
    assert preview(config).steps > 0
    with pytest.raises(UserError, match="different thresholds"):
        preview(config.replace(level_weights={1: 0.5}))


@pytest.mark.parametrize("levels", [4, 9])
def test_levels_that_came_with_the_source(
    models: dict[str, str], tmp_path: Path, levels: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """They do not tell N, so it is the given one or 8; rows of the table that are not trained are named."""
    tar = captions(tmp_path / "c.tar", 18, levels=levels)
    ingest([tar], tmp_path / "set", quiet=True)
    for number, data in enumerate((tar, str(tmp_path / "set"))):
        config = pretraining(models, data, tmp_path / str(number))
        if levels > 8:
            with pytest.raises(UserError, match="has level 9, but the model has 8 levels; pass --num-levels"):
                train(config)
            continue
        train(config)
        assert json.loads((tmp_path / str(number) / "config.json").read_text())["num_levels"] == 8
        printed = " ".join(capsys.readouterr().err.split())
        assert "no sample of levels 5, 6, 7, 8 is used, so their embeddings are not trained; if" in printed
        train(config.replace(num_levels=levels, out=f"{config.out}-given"))
        assert "embedding" not in capsys.readouterr().err


def test_a_filtered_dataset_keeps_its_number_of_levels(folder: Path, models: dict[str, str], tmp_path: Path,
                                                       capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    aligncurate.filter(folder / "eight", tmp_path / "best", where="level >= 7", quiet=True)
    train(pretraining(models, str(tmp_path / "best"), tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_levels"] == 8
    printed = " ".join(capsys.readouterr().err.split())
    assert "no sample of levels 1, 2, 3, 4, 5, 6 is used, so their embeddings are not trained" in printed
    assert "if the data has fewer" not in printed


def test_without_alignment_the_levels_do_not_matter(folder: Path, models: dict[str, str], tmp_path: Path) -> None:
    config = pretraining(models, str(folder / "four"), tmp_path / "out", align_mode="none", max_steps=1)
    assert train(config.replace(num_levels=8)).steps == 1
    assert torch.is_tensor(load_file(tmp_path / "out" / "model.safetensors")["projector.0.weight"])


def test_resuming_takes_the_same_number(folder: Path, models: dict[str, str], tmp_path: Path) -> None:
    config: StageConfig = pretraining(models, str(folder / "four"), tmp_path / "out", max_steps=1)
    train(config)
    assert train(config).already_done
