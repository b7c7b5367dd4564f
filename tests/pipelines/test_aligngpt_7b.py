"""The paper's recipe on tiny models and a handful of drawn scenes: what the dry run says, and that it really runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aligncurate import open_dataset
from aligncurate.demo.scenes import describe, draw, make_scene, questions
from aligncurate.errors import UserError
from aligntrain.tools.generate import load
from pipelines import aligngpt_7b
from pipelines.aligngpt_7b import Recipe, curate, dry_run, main, run


@pytest.fixture
def llava(tmp_path: Path) -> dict[str, Any]:
    """LLaVA's two files with their images: 24 captions, and 12 conversations, one of them without a picture."""
    captions, instructions = [], []
    for folder in ("pictures", "photos/coco"):
        (tmp_path / folder).mkdir(parents=True)
    for n in range(24):
        scene = make_scene(11, n)
        draw(scene, 64).save(tmp_path / f"pictures/{n:05d}.jpg")
        turns = [("human", "Describe it.\n<image>"), ("gpt", describe(scene))]
        captions.append(_row(f"{n}", f"{n:05d}.jpg", turns))
    for n in range(12):
        scene = make_scene(12, n)
        draw(scene, 64).save(tmp_path / f"photos/coco/{n}.jpg")
        turns = [("human", f"<image>\n{questions(scene)[0][0]}"), ("gpt", questions(scene)[0][1])]
        instructions.append(_row(f"i{n}", f"coco/{n}.jpg", turns))
    instructions[3] = _row("i3", None, [("human", "Say yes."), ("gpt", "yes")])
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    (tmp_path / "instructions.json").write_text(json.dumps(instructions))
    return {
        "captions": tmp_path / "captions.json",
        "caption_images": tmp_path / "pictures",
        "instructions": tmp_path / "instructions.json",
        "instruction_images": tmp_path / "photos",
        "out": tmp_path / "run",
        "llm": "tiny",
        "vision": "tiny",
    }


def _row(key: str, image: str | None, turns: list[tuple[str, str]]) -> dict[str, Any]:
    row: dict[str, Any] = {"id": key, "conversations": [{"from": who, "value": text} for who, text in turns]}
    return row if image is None else {**row, "image": image}


SMALL = {"dtype": "fp32", "max_length": 256, "token_budget": 512, "log_every": 1}


def test_it_runs_from_captions_to_a_model(llava: dict[str, Any]) -> None:
    recipe = Recipe(**llava, encoder={"model": "tiny", "quiet": True}, settings=SMALL)
    run(recipe, "curate")
    levelled = open_dataset(recipe.levelled)
    assert levelled.rows == 24 and levelled.manifest["thresholds"]["method"] == "uniform"
    run(recipe)  # curation is done already, and both stages follow
    model, processor = load(recipe.out / "finetuned")
    assert model.config.num_levels == 8 and processor.template == "v1"
    told = [json.loads(line) for line in (recipe.out / "pretrained" / "log.jsonl").read_text().splitlines()]
    assert told[-1]["step"] == 1 and told[-1]["loss_by_level"]


def test_the_dry_run_tells_and_does_nothing(llava: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Recipe(**llava, settings=SMALL)
    with aligngpt_7b.console.capture() as shown:
        dry_run(recipe, gpus=2, gigabytes=80, tflops=989)
    words = shown.get().split()
    text = " ".join(words)
    assert "558,128" in text and "665,298" in text  # what is expected, beside the 24 and 12 that there are
    assert "24 of 24" in text and "11 of 11" in text
    assert "samples 24 12" in text and "images 24 11" in text
    assert "1 of 256 1 of 128" in text
    assert "of 80" in text and "--only finetune" in text
    assert not llava["out"].exists()


def test_the_dry_run_uses_what_is_there_already(llava: dict[str, Any]) -> None:
    recipe = Recipe(**llava, encoder={"model": "tiny", "quiet": True}, settings=SMALL)
    curate(recipe)
    with aligngpt_7b.console.capture() as shown:
        dry_run(recipe, gpus=1, gigabytes=1e-6, tflops=989)
    assert "samples 24 12" in " ".join(shown.get().split())
    assert "python -m pipelines.aligngpt_7b … --only pretrain" in shown.get()


def test_mistakes_are_one_sentence(
    llava: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in llava.items()]
    with pytest.raises(SystemExit, match=r"error: .*nowhere: no such folder; it should contain the images of"):
        main([*options, "--caption-images=nowhere", "--dry-run"])
    (llava["instruction_images"] / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"none of its first \d+ images is in .*empty"):
        main([*options, f"--instruction-images={llava['instruction_images'] / 'empty'}", "--dry-run"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="curation runs in one process"):
        curate(Recipe(**llava))
