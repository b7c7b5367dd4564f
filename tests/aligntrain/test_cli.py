"""The command line: both stages, the plan, generate, chat and convert, and user errors."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from aligncurate.cli.app import app
from aligntrain.training.checkpoint import checkpoints
from tests.support.stage_data import captions, make_models, picture, questions

SMALL = ["--max-length", "96", "--token-budget", "128", "--batch-size", "8", "--dtype", "fp32", "--log-every", "1"]
PRETRAIN = ["train", "pretrain", "c.tar", "--llm", "llm", "--vision", "vision", "--out", "x", *SMALL]
Run = Callable[..., Result]


@pytest.fixture(scope="module")
def run() -> Run:
    def invoke(*arguments: object, typed: str | None = None) -> Result:
        return CliRunner().invoke(app, [str(a) for a in arguments], input=typed, env={"COLUMNS": "200"})

    return invoke


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, run: Run) -> Path:
    """Both stages, run from the command line."""
    path = tmp_path_factory.mktemp("cli")
    make_models(path)
    captions(path / "c.tar")
    questions(path / "q.tar")
    (path / "p.png").write_bytes(picture(1))
    (path / "run.toml").write_text('seed = 3\n[finetune]\ntemplate = "chat"\nlearning_rate = 1e-2\nepochs = 9\n')
    new = ["--llm", path / "llm", "--vision", path / "vision", "--config", path / "run.toml"]
    result = run("train", "pretrain", path / "c.tar", *new, "--out", path / "first", *SMALL)
    assert result.exit_code == 0, result.output
    assert "pretrained in 3 steps" in result.output
    start = ["--init", path / "first", "--config", path / "run.toml", "--set", "epochs=2"]
    result = run("train", "finetune", path / "q.tar", *start, "--out", path / "second", *SMALL)
    assert result.exit_code == 0, result.output
    assert "finetuned in 6 steps" in result.output
    (path / "second" / "printed.txt").write_text(result.output)
    return path


def test_the_loss_at_the_start_and_at_the_end_is_printed(folder: Path) -> None:
    losses = [json.loads(line)["loss"] for line in (folder / "second" / "log.jsonl").read_text().splitlines()]
    assert losses[0] != losses[-1]
    printed = (folder / "second" / "printed.txt").read_text()
    assert f"loss {losses[0]:.4f} -> {losses[-1]:.4f}; the model is in {folder / 'second'}" in printed


def test_settings_come_from_the_file_and_the_options(folder: Path) -> None:
    settings = json.loads((folder / "second" / "stage.json").read_text())
    assert (settings["seed"], settings["template"], settings["epochs"]) == (3, "chat", 2)
    assert (settings["learning_rate"], settings["batch_size"]) == (1e-2, 8)
    assert len(checkpoints(folder / "second")) == 1


def test_plan(folder: Path, run: Run, tmp_path: Path) -> None:
    new = ["--llm", folder / "llm", "--vision", folder / "vision"]
    result = run(
        "train", "plan", folder / "c.tar", folder / "q.tar", *new, *SMALL, "--level-weights", "1:0", "--ranks", 2
    )
    assert result.exit_code == 0, result.output
    words = " ".join(result.output.split())
    for part in ("samples 24", "steps 3 of 8 samples", "images 21 per epoch", "2 ranks", "packing efficiency", "FLOPs",
                 "if the LLM supports it",
                 "8 │ 3" if "│" in words else "8 3", "18 no level", "6 no image, which pretraining needs"):  # fmt: skip
        assert part in words, (part, words)
    rows = [line.replace("│", " ").split() for line in result.output.splitlines()]
    assert [row for row in rows if row and row[0].isdecimal() and len(row) == 3 and int(row[0]) < 9] == [
        [str(level), "3", "0" if level == 1 else "3"] for level in range(1, 9)
    ]
    assert " MB per device: weights " in words
    result = run("train", "plan", folder / "q.tar", "--init", folder / "first", *SMALL, "--template", "chat")
    assert "finetune" in result.output
    assert sorted(path.name for path in folder.iterdir()) == [
        "c.tar", "first", "llm", "p.png", "q.tar", "run.toml", "second", "vision",
    ]  # fmt: skip


def test_fewer_steps_than_max_steps_are_said_in_plan_and_result(folder: Path, run: Run, tmp_path: Path) -> None:
    new = ["--llm", folder / "llm", "--vision", folder / "vision", *SMALL, "--max-steps", "30"]
    sentence = "1 epoch of the data has 3 steps, fewer than --max-steps 30; pass --epochs 10 to reach it"
    assert sentence in " ".join(run("train", "plan", folder / "c.tar", *new).stdout.split())
    for first in (True, False):
        result = run("train", "pretrain", folder / "c.tar", *new, "--out", tmp_path / "out")
        assert ("pretrained in 3 steps" if first else "all 3 steps are done") in result.stdout
        assert sentence in " ".join(result.stdout.split())


def test_a_finished_run_says_so(folder: Path, run: Run) -> None:
    again = ["--init", folder / "first", "--config", folder / "run.toml", "--set", "epochs=2", *SMALL]
    result = run("train", "finetune", folder / "q.tar", *again, "--out", folder / "second")
    assert result.exit_code == 0, result.output
    assert "nothing to do: all 6 steps are done and the model is in" in " ".join(result.output.split())


def test_the_hub_is_asked_once(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is not a folder may be on the Hub; if that is unreachable, one short error, without retries."""
    asked: list[str] = []

    def unreachable(self: object, name: str, **_: object) -> None:
        asked.append(name)
        raise OSError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    for verb in (["plan"], ["pretrain", "--out", folder / "none"]):
        new = ["--llm", "someone/model", "--vision", folder / "vision"]
        result = run("train", verb[0], folder / "c.tar", *new, *verb[1:])
        assert result.exit_code == 2
        message = "someone/model: no such folder, and not found on the Hugging Face Hub (Name or service not known)"
        assert message in " ".join(result.output.split())
    assert asked == ["someone/model"] * 2
    assert not (folder / "none").exists()
    result = run("train", "plan", folder / "c.tar", "--llm", "some where/else", "--vision", folder / "vision")
    assert "some where/else: no such folder" in result.output
    assert len(asked) == 2


def test_show_alignment_without_an_image(folder: Path, run: Run) -> None:
    result = run("generate", folder / "second", "--prompt", "hello", "--show-alignment", "--max-new-tokens", 1)
    assert "without an image there is no alignment vector" in result.output
    assert run("generate", folder / "second", "--prompt", "hello", "--temperature", -1).exit_code == 2


def test_generate_and_chat(folder: Path, run: Run) -> None:
    result = run("generate", folder / "second", "--image", folder / "p.png", "--prompt", "what", "--show-alignment",
                 "--max-new-tokens", 8)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert [line.split()[:2] for line in result.output.splitlines()[:7]] == [["level", str(n)] for n in range(1, 8)]
    assert result.output.splitlines()[7].startswith("level 8  always on")
    text = run("generate", folder / "second", "--prompt", "hello", "--max-new-tokens", 8)
    assert text.exit_code == 0, text.output
    talk = run("chat", folder / "second", "--image", folder / "p.png", "--max-new-tokens", 8, typed="what\nsure\n\n")
    assert talk.exit_code == 0, talk.output
    answer = result.output.splitlines()[-1]
    assert talk.output.count("model") == 2
    assert answer in talk.output  # streaming changes nothing


def test_convert(folder: Path, run: Run, tmp_path: Path) -> None:
    result = run("convert", folder / "second", tmp_path / "official")
    assert result.exit_code == 0, result.output
    assert "to the official layout" in result.output
    assert (tmp_path / "official" / "config.json").is_file()
    assert run("convert", tmp_path, tmp_path / "x").exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "pretrain", "c.tar", "--set", "lerning_rate=3"], "did you mean learning_rate"),
        (["train", "pretrain", "c.tar", "--set", "epochs"], "write it as key=value"),
        (["train", "pretrain", "c.tar", "--level-weights", "1=0"], "--level-weights 1=0: use weights by level"),
        (["train", "pretrain", "c.tar", "--out", "x"], "pass --llm and --vision"),
        (["train", "finetune", "q.tar", "--out", "x"], "pass --init, the pretrained model"),
        (["train", "finetune", "q.tar", "--init", "first"], "no output folder; pass --out"),
        (["train", "finetune", "gone.tar", "--init", "first", "--out", "x"], "there is no such file or folder"),
        (["train", "pretrain", "q.tar", "--llm", "llm", "--vision", "vision", "--out", "x"], "`aligncurate bucket"),
        (
            [*PRETRAIN, "--vision-layer", "-99"],
            "--vision-layer -99: the vision tower has 2 layers; use a number from -3",
        ),
        (
            [*PRETRAIN, "--vision-layer", "3"],
            "--vision-layer 3: the vision tower has 2 layers; use a number from -3 to 2",
        ),
        ([*PRETRAIN, "--vision-layer", "9" * 30], "the vision tower has 2 layers"),
        ([*PRETRAIN, "--level-weights", "9:1"], "--level-weights: there is no level 9; the model has levels 1 to 8"),
        ([*PRETRAIN, "--level-weights", "1:0,5:1", "--num-levels", "4"], "no level 5; the model has levels 1 to 4"),
        ([*PRETRAIN, "--seed", "9" * 30], f"--seed {'9' * 30}: use a number from 0 to 2^63 - 1"),
        ([*PRETRAIN, "--projector-type", "mlp99999999x_gelu"], "--projector-type mlp99999999x_gelu: use at most 64"),
        (["train", "plan", "q.tar", "--ranks", "0"], "--ranks 0: use a number of at least 1"),
        (["generate", "llm", "--prompt", "x", "--image", "none.png"], "none.png: the image cannot be read"),
        (["generate", "llm", "--prompt", "x", "--image", "run.toml"], "run.toml: this is text, not an image"),
        (["generate", "gone", "--prompt", "x"], "no model here"),
    ],
)
def test_user_errors(
    folder: Path, run: Run, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_import_is_light() -> None:
    code = "import sys, aligntrain.cli; print([m for m in ('torch', 'transformers', 'pyarrow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
