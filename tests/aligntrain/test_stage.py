"""StageConfig: the paper's defaults, TOML, overrides, and user errors."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from aligncurate.errors import UserError
from aligncurate.settings import field_types, option_name, parse, recorded
from aligntrain import StageConfig
from aligntrain.cli import train_app


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
    assert "workers" not in recorded(second)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lerning_rate": 1}, "unknown setting 'lerning_rate'; did you mean learning_rate"),
        ({"xyz": 1}, "unknown setting 'xyz'"),
        ({"epochs": "two"}, "--epochs two: use an integer"),
        ({"epochs": True}, "--epochs True: use an integer"),
        ({"epochs": 0}, "--epochs 0: use a number of at least 1"),
        ({"learning_rate": float("nan")}, "--learning-rate nan"),
        ({"compile": 1}, "--compile 1: use true or false"),
        ({"dtype": "fp16"}, "--dtype fp16: use one of bf16, fp32"),
        ({"token_budget": 1024}, "--token-budget 1024 is below --max-length 2048"),
        ({"token_budget": 2049}, "--token-budget 2049: use a multiple of 8"),
        ({"level_weights": {0: 1}}, "--level-weights 0:1: levels lie between 1 and 127, weights between 0"),
        ({"level_weights": {10**30: 1}}, "levels lie between 1 and 127"),
        ({"level_weights": {1: 1, 2: float("nan")}}, "--level-weights 2:nan: .* weights between 0 and 1000"),
        ({"num_levels": 128}, "--num-levels 128: use a number from 2 to 127"),
        ({"prefetch": 10**30}, "--prefetch 1000000000000000000000000000000: use a number from 1 to 1,000"),
        (
            {"epochs": 10**30},
            "--epochs 1000000000000000000000000000000: use a number from 1 to 2\\^63 - 1",
        ),
        ({"learning_rate": 1e300}, r"--learning-rate 1e\+300: use a number from 0 to 1,000"),
        ({"projector_lr": -1.0}, "--projector-lr -1.0: use a number from 0 to 1,000"),
        ({"level_weights": 3}, "--level-weights 3: use weights by level"),
        ({"s2_scales": ["a"]}, r"--s2-scales \['a'\]: use a list of integers"),
        ({"log_to": ["tensorbord"]}, "--log-to tensorbord: use one of tensorboard"),
        ({"warmup_ratio": 1.5}, "--warmup-ratio 1.5: use a number from 0 to 1"),
        ({"lora_rank": 8}, "use LoRA with finetune"),
        ({"learning_rate": float("inf")}, "--learning-rate inf: use a number from 0 to 1,000"),
        ({"beta2": 1.0}, "--beta2 1: use a number below 1"),
        ({"epsilon": -1.0}, "--epsilon -1.0: use a number from 0 to 1,000"),
        ({"seed": 2**63}, "--seed 9223372036854775808: use a number from 0 to"),
        ({"stage": "finetune"}, "unknown setting 'stage'"),
    ],
)
def test_user_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        StageConfig.pretrain(**settings)


def test_errors_in_a_file_name_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("epoch = 3\n")
    with pytest.raises(UserError, match=r"run\.toml: unknown setting 'epoch'; did you mean epochs"):
        StageConfig.from_toml(file, "pretrain", epochs=1)
    file.write_text("epochs = \n")
    with pytest.raises(UserError, match="not a readable TOML file"):
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
    assert parse(StageConfig, name, text) == value


def test_unreadable_settings() -> None:
    for name, text in (("epochs", "3.5"), ("compile", "perhaps"), ("level_weights", "1=0"), ("s2_scales", "x")):
        with pytest.raises(UserError, match=f"{option_name(name)} {text}: use"):
            parse(StageConfig, name, text)


def test_every_switch_can_be_turned_off_over_a_file() -> None:
    """On the command line each boolean setting has both forms, and what is given goes over the TOML file."""
    switches = [name for name, kind in field_types(StageConfig).items() if kind is bool]
    assert {"stratified", "checkpointing", "compile", "resume"} <= set(switches)
    options = {o for p in get_command(train_app).commands["pretrain"].params for o in (*p.opts, *p.secondary_opts)}
    for name in switches:
        flag = name.replace("_", "-")
        assert {f"--{flag}", f"--no-{flag}"} <= options


@pytest.mark.parametrize(("name", "value"), [("init", None), ("max_steps", None), ("align_mode", "none")])
def test_none_clears_a_setting_unless_it_is_a_value(name: str, value: str | None) -> None:
    assert parse(StageConfig, name, "none") == value


def test_none_can_be_the_name_of_a_column() -> None:
    assert parse(StageConfig, "caption_column", "none", clears=False) == "none"
