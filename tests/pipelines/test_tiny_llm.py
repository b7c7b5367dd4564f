"""The LLM and the tower that come with the package, and what they were made with."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionModel

import aligntrain
from aligncurate.demo.scenes import PLACES, make_scene, questions
from pipelines import tiny_llm
from pipelines.language_model import CHAT_TEMPLATE, Text, make_llama, make_tokenizer, optimize, pad
from pipelines.tiny_vision import ATTRIBUTES, objects_of

MODELS = Path(aligntrain.__file__).parent / "builtin"


def test_what_ships() -> None:
    sizes = [file.stat().st_size for folder in ("tiny-llm", "tiny-vision") for file in (MODELS / folder).iterdir()]
    assert sum(sizes) < 10_000_000
    llm = AutoModelForCausalLM.from_pretrained(MODELS / "tiny-llm")
    tower = CLIPVisionModel.from_pretrained(MODELS / "tiny-vision")
    for model in (llm, tower):
        assert all(weight.dtype == torch.float16 and bool(weight.isfinite().all()) for weight in model.parameters())
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "tiny-llm")
    assert tokenizer.chat_template == CHAT_TEMPLATE
    for text in ("two red circles", "Où est le cœur? ♥\n\tx"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_the_llm_answers_as_its_figures_say() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "tiny-llm")
    model = AutoModelForCausalLM.from_pretrained(MODELS / "tiny-llm", dtype=torch.float32).eval()
    said = json.loads((MODELS / "tiny-llm" / "metrics.json").read_text())["answered_rightly"]
    right = total = 0
    with torch.inference_mode():
        for number in range(25):
            scene = make_scene(tiny_llm.HELD_OUT_SCENES, number)
            for question, answer in questions(scene):
                if len(answer.split()) > 4:
                    continue
                text = tiny_llm.tokenize(tokenizer, [("USER: ", False), (f"\n{question} ASSISTANT:", False)])
                prompt = tiny_llm.embed_scenes(model, torch.tensor([text.ids]), [scene], tokenizer)
                answered = model.generate(inputs_embeds=prompt, max_new_tokens=8, do_sample=False, pad_token_id=2)
                right += tokenizer.decode(answered[0], skip_special_tokens=True).strip() == answer
                total += 1
    # 25 of the 500 scenes: within three standard deviations of a share of some 250 questions.
    assert right / total == pytest.approx(said, abs=3 * (said * (1 - said) / total) ** 0.5)


def test_a_place_is_the_sum_of_its_words() -> None:
    scene = make_scene(0, 0)
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "tiny-llm")
    model = AutoModelForCausalLM.from_pretrained(MODELS / "tiny-llm", dtype=torch.float32)
    table = model.get_input_embeddings().weight
    ids = torch.tensor([[1, *[tokenizer.unk_token_id] * len(PLACES), 5]])
    embeds = tiny_llm.embed_scenes(model, ids, [scene], tokenizer)[0]
    assert torch.equal(embeds[[0, -1]], table[[1, 5]])
    objects = objects_of(scene)
    for number, (cell, words) in enumerate(PLACES.items()):
        group = next((g for g in scene.groups if cell in g.cells), None)
        named = (
            ["background", scene.background]
            if group is None
            else [group.shape, group.colour, group.texture, group.size]
        )
        expected_vector = sum(
            table[tokenizer(f" {w}", add_special_tokens=False).input_ids].sum(0) for w in [*named, *words.split()]
        )
        torch.testing.assert_close(embeds[1 + number], expected_vector)
        expected = [0] * 4 if group is None else [1 + a.index(n) for a, n in zip(ATTRIBUTES, named, strict=True)]
        assert objects[number].tolist() == expected


def test_a_text_learns_answers_and_captions_only() -> None:
    scene = make_scene(0, 1)
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "tiny-llm")
    rng, kinds = random.Random(0), set()
    for _ in range(20):
        text = tiny_llm.training_text(scene, tokenizer, rng)
        learned = tokenizer.decode([i for i, learn in zip(text.ids, text.learned, strict=True) if learn])
        kinds.add(learned.endswith("\n"))
        assert "?" not in learned and "USER" not in learned and (learned.endswith("\n") or learned.endswith("</s>"))
        assert text.ids.count(tokenizer.unk_token_id) == len(PLACES)
    assert kinds == {True, False}


def test_optimize_learns_a_text_by_heart() -> None:
    torch.manual_seed(0)
    tokenizer = make_tokenizer(["the cat sat on the mat"] * 3, 280)
    model = make_llama(tokenizer, 32, 1)
    ids = tokenizer("the cat sat on the mat").input_ids
    batch = pad([Text(ids, [False] + [True] * (len(ids) - 1)), Text(ids[:3], [False, True, False])], filler=2)
    assert batch["labels"][1].tolist() == [-100, ids[1], *[-100] * (len(ids) - 2)]
    assert batch["attention_mask"].sum(1).tolist() == [len(ids), 3]
    logits = model(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits
    naive = cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    assert model(**batch).loss.item() == pytest.approx(naive.item(), rel=1e-5)
    last = optimize([model], lambda _: model(**batch).loss, steps=60, learning_rate=1e-2)
    assert last < naive and model(**batch).loss.item() < 0.1
