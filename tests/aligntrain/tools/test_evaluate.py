"""Held-out loss against a plain loop, accuracy against counting by hand."""

from __future__ import annotations

import copy
import io
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

from aligncurate.errors import UserError
from aligntrain import train
from aligntrain.tools.evaluate import Question, answer_accuracy, held_out_loss, questions_of
from aligntrain.tools.generate import answer, load
from aligntrain.training.build import build_model, build_processor
from tests.support.stage_data import captions, finetuning, make_models, picture, pretraining, questions


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_models(tmp_path_factory.mktemp("models"))


def naive_losses(model: Any, processor: Any, samples: list[tuple[list[dict[str, str]], bytes | None, int]]) -> Any:
    """The loss of each supervised token by level, one sample at a time."""
    losses: dict[int, list[float]] = defaultdict(list)
    model.eval()
    for turns, image, level in samples:
        encoded = processor.encode(turns, has_image=image is not None)
        inputs: dict[str, Any] = {"input_ids": torch.tensor([encoded.input_ids])}
        if image is not None:
            inputs["pixel_values"] = processor.process_images([Image.open(io.BytesIO(image))])
            if level:
                inputs["levels"] = torch.tensor([level])
        if not level:
            gate = torch.zeros(1, len(encoded.input_ids), dtype=torch.bool)
            gate[:, : encoded.gate_length] = True
            inputs["gate_mask"] = gate
        with torch.inference_mode():
            logits = model(**inputs).logits[0]
        labels = torch.tensor(encoded.labels)
        labelled = labels[1:] != -100
        losses[level] += cross_entropy(logits[:-1][labelled], labels[1:][labelled], reduction="none").tolist()
    return losses


def test_loss_of_levelled_captions_is_that_of_a_plain_loop(models: dict[str, str], tmp_path: Path) -> None:
    config = pretraining(models, captions(tmp_path / "c.tar"), tmp_path / "out")
    processor = build_processor(config)
    model, _ = build_model(config, processor)
    weighted = config.replace(level_weights={1: 0.0})  # only matters in training
    result = held_out_loss(model, processor, weighted)
    assert model.training and not model.vision_tower.training  # modes are restored
    samples = []
    for n in range(24):
        text = f"a thing number {n} " + "very " * (n % 4) + "small"
        turns = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": text}]
        samples.append((turns, picture(n), n % 8 + 1))
    expected = naive_losses(model, processor, samples)
    assert result.by_level.keys() == expected.keys()
    for level, losses in expected.items():
        assert result.by_level[level] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    everything = [loss for losses in expected.values() for loss in losses]
    assert result.tokens == len(everything)
    assert result.loss == pytest.approx(sum(everything) / len(everything), abs=1e-5)


@pytest.mark.parametrize("packing", ["auto", "off"])
def test_loss_of_conversations_is_that_of_a_plain_loop(models: dict[str, str], tmp_path: Path, packing: str) -> None:
    config = finetuning(models, questions(tmp_path / "q.tar"), tmp_path / "out", packing=packing)
    processor = build_processor(config)
    model, _ = build_model(config, processor)
    result = held_out_loss(model, processor, config)
    samples: list[Any] = []
    for n in range(24):
        turns = [
            {"role": "user", "content": "what is it" + "?" * (n % 5)},
            {"role": "assistant", "content": f"thing {n}"},
            {"role": "user", "content": "sure"},
            {"role": "assistant", "content": "yes"},
        ][: 2 + 2 * (n % 2)]
        samples.append((turns, None if n % 4 == 3 else picture(n), 0))
    losses = naive_losses(model, processor, samples)[0]
    assert result.by_level == {} and result.tokens == len(losses)
    assert result.loss == pytest.approx(sum(losses) / len(losses), abs=1e-5)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_loss_in_bfloat16(models: dict[str, str], tmp_path: Path, stage: str) -> None:
    """The default type, with the model in training's mixture of types, and as it is saved."""
    make, data = (pretraining, captions) if stage == "pretrain" else (finetuning, questions)
    config = make(models, data(tmp_path / "c.tar"), tmp_path / "out", dtype="bf16", max_steps=1)
    processor = build_processor(config)
    plain = config.replace(dtype="fp32")
    exact = held_out_loss(build_model(plain, processor)[0], processor, plain)
    mixed = build_model(config, processor)[0]
    assert {p.dtype for p in mixed.parameters()} == {torch.float32, torch.bfloat16}
    for model in (mixed, copy.deepcopy(mixed).to(torch.bfloat16)):
        result = held_out_loss(model, processor, config)
        assert result.loss == pytest.approx(exact.loss, rel=1e-2)
        assert result.tokens == exact.tokens
        assert result.by_level.keys() == exact.by_level.keys()
    train(config)
    assert held_out_loss(*load(tmp_path / "out"), config).loss > 0


def test_questions_come_one_by_one(tmp_path: Path) -> None:
    rows = []
    for n in range(3):
        (tmp_path / f"{n}.png").write_bytes(picture(n))
        turns = [("human", f"<image>\nfirst {n}?"), ("gpt", "a"), ("human", "then?"), ("gpt", "b"), ("human", "open?")]
        rows.append({"id": f"r{n}", "image": f"{n}.png", "conversations": [{"from": f, "value": v} for f, v in turns]})
    (tmp_path / "1.png").write_bytes(b"no image")
    rows.append({"id": "text", "conversations": [{"from": "human", "value": "hm?"}, {"from": "gpt", "value": "c"}]})
    (tmp_path / "data.json").write_text(json.dumps(rows))
    read = list(questions_of([tmp_path / "data.json"]))
    assert [(q.key, q.text, q.answer) for q in read] == [
        (key, text, said)
        for key, number in (("r0", 0), ("r2", 2))
        for text, said in ((f"first {number}?", "a"), ("then?", "b"))
    ]
    assert read[0].image.size == (26, 20)
    with pytest.raises(UserError, match="nowhere"):
        list(questions_of([tmp_path / "nowhere.json"]))


def test_accuracy_counts_equal_answers(models: dict[str, str], tmp_path: Path) -> None:
    config = finetuning(models, questions(tmp_path / "q.tar"), tmp_path / "out")
    processor = build_processor(config)
    model, _ = build_model(config, processor)
    images = [Image.open(io.BytesIO(picture(n))).convert("RGB") for n in range(5)]
    texts = [f"what{'?' * n}" for n in range(5)]
    single = [
        answer(model.eval(), processor, [{"role": "user", "content": f"{text}\nsay it"}], image, max_new_tokens=6)
        for text, image in zip(texts, images, strict=True)
    ]
    # Two of five references equal the model's answer, ignoring case and full stop; the others are "Yes".
    said = [single[0].upper() + ".", "Yes", "yes", single[3], "yes."]
    asked = [Question("", image, text, s) for image, text, s in zip(images, texts, said, strict=True)]
    known = ["no", "Yes.", "yes"]
    accuracy = answer_accuracy(
        model, processor, asked, known, instruction="say it", batch_size=2, max_new_tokens=6, quiet=True
    )
    assert [reply for _, reply, _ in accuracy.examples] == single
    assert (accuracy.questions, accuracy.right, accuracy.usual, accuracy.usual_right) == (5, 2, "yes", 3)
    assert (accuracy.accuracy, accuracy.baseline) == (0.4, 0.6)
    assert answer_accuracy(model, processor, asked, known, limit=3, quiet=True).questions == 3
