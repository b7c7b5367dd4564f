"""StageConfig: the paper's defaults, TOML, overrides, and what it says of mistakes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from aligncurate.errors import UserError
from aligntrain import StageConfig
from aligntrain.stage import parse_setting


def test_the_papers_settings() -> None:
    first, second = StageConfig.pretrain(), StageConfig.finetune()
    assert (first.learning_rate, first.batch_size, first.image_mode) == (1e-3, 256, "crop")
    assert (second.learning_rate, second.batch_size, second.image_mode) == (2e-5, 128, "pad")
    for config in (first, second):
        assert (config.epochs, config.warmup_ratio, config.weight_decay) == (1, 0.03, 0.0)
        assert (config.dtype, config.max_length) == ("bf16", 2048)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.epochs = 2  # type: ignore[misc]


def test_toml_and_overrides(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        'epochs = 3\ndata = ["a", "b"]\n[finetune]\nlearning_rate = 1\nlevel_weights = {1 = 0, 2 = 0.5}\n[pretrain]\n'
    )
    second = StageConfig.from_toml(file, "finetune", epochs=4)
    assert (second.epochs, second.data, second.learning_rate) == (4, ("a", "b"), 1.0)
    assert second.level_weights == {1: 0.0, 2: 0.5}
    assert StageConfig.from_toml(file, "pretrain").learning_rate == 1e-3
    assert second.replace(seed=7).seed == 7
    assert "workers" not in second.to_json(altering=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lerning_rate": 1}, "there is no setting 'lerning_rate'; did you mean learning_rate"),
        ({"xyz": 1}, "there is no setting 'xyz'"),
        ({"epochs": "two"}, "epochs is 'two'; it takes a whole number"),
        ({"epochs": True}, "epochs is True; it takes a whole number"),
        ({"epochs": 0}, "epochs is 0; it must be at least 1"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"compile": 1}, "compile is 1; it takes true or false"),
        ({"dtype": "fp16"}, "dtype is 'fp16'; choose one of bf16, fp32"),
        ({"token_budget": 1024}, "token_budget is 1024, but a sample may have max_length 2048"),
        ({"token_budget": 2049}, "token_budget is 2049; it must be a multiple of 8"),
        ({"level_weights": {0: 1}}, "levels start at 1"),
        ({"level_weights": 3}, "level_weights is 3; it takes weights by level"),
        ({"s2_scales": ["a"]}, r"s2_scales is \['a'\]; it takes a list of whole numbers"),
        ({"log_to": ["tensorbord"]}, "log_to names 'tensorbord'; choose from tensorboard"),
        ({"warmup_ratio": 1.5}, "warmup_ratio is 1.5; it must lie between 0 and 1"),
        ({"lora_rank": 8}, "LoRA is for finetune"),
        ({"learning_rate": float("inf")}, "learning_rate is inf; it must be at least 0, and finite"),
        ({"beta2": 1.0}, "beta2 1.0; they must be less than 1"),
        ({"epsilon": -1.0}, "epsilon is -1.0; it must be at least 0"),
        ({"seed": 2**63}, "must be less than"),
    ],
)
def test_mistakes(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        StageConfig.pretrain(**settings)


def test_mistakes_in_a_file_name_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("epoch = 3\n")
    with pytest.raises(UserError, match=r"run\.toml: there is no setting 'epoch'; did you mean epochs"):
        StageConfig.from_toml(file, "pretrain", epochs=1)
    file.write_text("epochs = \n")
    with pytest.raises(UserError, match="not a TOML file"):
        StageConfig.from_toml(file, "pretrain")
    with pytest.raises(UserError, match="no such file"):
        StageConfig.from_toml(tmp_path / "none.toml", "pretrain")
    file.write_text("pretrain = 3\n")
    with pytest.raises(UserError, match="must be a table"):
        StageConfig.from_toml(file, "pretrain")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("epochs", "3", 3), ("learning_rate", "1e-4", 1e-4), ("compile", "yes", True), ("max_steps", "none", None),
        ("align_mode", "none", "none"), ("log_to", "wandb, trackio", ("wandb", "trackio")),
        ("s2_scales", "8,16", (8, 16)),
        ("level_weights", "1:0,2:0.5", {1: 0.0, 2: 0.5}),
    ],
)  # fmt: skip
def test_settings_as_written_on_the_command_line(name: str, text: str, value: Any) -> None:
    assert parse_setting(name, text) == value


def test_unreadable_settings() -> None:
    for name, text in (("epochs", "3.5"), ("compile", "perhaps"), ("level_weights", "1=0"), ("s2_scales", "x")):
        with pytest.raises(UserError, match=f"{name} is '{text}'; it takes"):
            parse_setting(name, text)
