"""Trains the built-in LLM `tiny`, which answers questions about drawn scenes: `python -m pipelines.tiny_models llm`."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, embedding_bag
from transformers import PreTrainedTokenizerFast

from aligncurate.demo.scenes import PLACES, Scene, describe, make_scene, questions
from pipelines.language_model import IGNORE, Text, make_llama, make_tokenizer, optimize, pad, save

WIDTH, LAYERS, VOCABULARY = 128, 4, 640
BATCH_SIZE = 64
PLAIN_SHARE = 0.3  # share of texts that are captions; the others are questions and answers
QUESTIONS = 6  # per conversation
TRAINING_SCENES, HELD_OUT_SCENES = 3, 9_002  # seeds of `make_scene`
HELD_OUT = 500  # scenes in the evaluation


def train_tiny_llm(folder: Path, seed: int, steps: int = 2_500) -> dict[str, Any]:
    """Train the LLM; write a Hugging Face folder and `metrics.json`.

    A scene is given as nine input vectors, one per place: the sum of the embeddings of the words for the object and
    for the place ("circle", "red", "striped", "large", "top", "left"). A projector can learn to make such vectors of a
    vision tower's patches, so training on images need not teach the LLM any language.

    Args:
        folder: where to write.
        seed: for the weights and the choice of texts.
        steps: optimizer steps, of 64 scenes each; each scene is seen once.

    Returns the content of `metrics.json`, with the accuracy on held-out questions with a short answer.
    """
    torch.manual_seed(seed)
    scenes = [make_scene(TRAINING_SCENES, index) for index in range(3_000)]
    tokenizer = make_tokenizer((text for scene in scenes for text in _texts(scene)), VOCABULARY)
    model = make_llama(tokenizer, WIDTH, LAYERS)
    rng = random.Random(f"texts {seed}")

    def loss_of_step(step: int) -> Tensor:
        chosen = [make_scene(TRAINING_SCENES, step * BATCH_SIZE + k) for k in range(BATCH_SIZE)]
        return _loss(model, [training_text(scene, tokenizer, rng) for scene in chosen], chosen, tokenizer)

    started = time.perf_counter()
    loss = optimize([model], loss_of_step, steps=steps, learning_rate=3e-3)
    save(model, tokenizer, folder)
    model.float().eval()
    metrics = {
        "seed": seed,
        "steps": steps,
        "batch_size": BATCH_SIZE,
        "seconds": round(time.perf_counter() - started),
        "loss": round(loss, 4),
        "held_out_scenes": HELD_OUT,
        "answered_rightly": round(_accuracy(model, tokenizer), 4),
    }
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


def _texts(scene: Scene) -> Iterator[str]:
    """Captions, questions and answers about a scene, to train the tokenizer on."""
    yield from (describe(scene, kind) for kind in ("right", "unrelated"))
    for question, answer in questions(scene):
        yield f"USER: {question} ASSISTANT: {answer}"


def training_text(scene: Scene, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> Text:
    """A training text: the scene and a caption (plain template), or the scene and some questions (chat template)."""
    if rng.random() < PLAIN_SHARE:
        return tokenize(tokenizer, [("", False), (describe(scene, variant=rng.randrange(4)) + "\n", True)])
    asked = [pair for pair in questions(scene) if _is_short(pair[1])]
    chosen = rng.sample(asked, k=min(QUESTIONS, len(asked)))
    parts = [("USER: ", False)]
    for number, (question, answer) in enumerate(chosen):
        parts += [(f"{'USER: ' if number else chr(10)}{question} ASSISTANT:", False), (f" {answer}</s>", True)]
    return tokenize(tokenizer, parts)


def _is_short(answer: str) -> bool:
    """Whether an answer has only one wording; descriptions have many."""
    return len(answer.split()) <= 4


def tokenize(tokenizer: PreTrainedTokenizerFast, parts: list[tuple[str, bool]]) -> Text:
    """Tokenize the parts of a text, each learned or not; the scene's places follow the first part."""
    ids, learned = [tokenizer.bos_token_id], [False]
    for number, (part, learn) in enumerate(parts):
        tokens = tokenizer(part, add_special_tokens=False).input_ids
        ids += tokens
        learned += [learn] * len(tokens)
        if number == 0:
            ids += [tokenizer.unk_token_id] * len(PLACES)
            learned += [False] * len(PLACES)
    return Text(ids, learned)


def _loss(model: Any, texts: list[Text], scenes: list[Scene], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    batch = pad(texts, tokenizer.eos_token_id)
    hidden_BLD = model.model(
        inputs_embeds=embed_scenes(model, batch["input_ids"], scenes, tokenizer), attention_mask=batch["attention_mask"]
    ).last_hidden_state
    labels = batch["labels"][:, 1:]
    learned = labels != IGNORE
    return cross_entropy(model.lm_head(hidden_BLD[:, :-1][learned]), labels[learned])


def embed_scenes(model: Any, ids_BL: Tensor, scenes: list[Scene], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Input embeddings [B, L, D]; the unknown tokens are replaced by the scenes' nine vectors."""
    table = model.get_input_embeddings()
    embeds_BLD = table(ids_BL)
    places = [place for scene in scenes for place in _words(scene)]
    words = torch.tensor([_word(tokenizer, word) for place in places for word in place])
    starts = torch.tensor([0, *map(len, places[:-1])]).cumsum(0)
    vectors = embedding_bag(words, table.weight, starts, mode="sum")
    return embeds_BLD.masked_scatter((ids_BL == tokenizer.unk_token_id)[..., None], vectors)


def _words(scene: Scene) -> list[list[str]]:
    """The words for each place and the object there."""
    words_at = {cell: ["background", scene.background] for cell in PLACES}
    for group in scene.groups:
        for cell in group.cells:
            words_at[cell] = [group.shape, group.colour, group.texture, group.size]
    return [[f" {word}" for word in [*words, *PLACES[cell].split()]] for cell, words in words_at.items()]


@cache
def _word(tokenizer: PreTrainedTokenizerFast, word: str) -> int:
    ids = tokenizer(word, add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise ValueError(f"{word!r} is {len(ids)} tokens; the vocabulary is too small.")
    return int(ids[0])


@torch.inference_mode()
def _accuracy(model: Any, tokenizer: PreTrainedTokenizerFast) -> float:
    right = total = 0
    for index in range(HELD_OUT):
        scene = make_scene(HELD_OUT_SCENES, index)
        asked = [(q, a) for q, a in questions(scene) if _is_short(a)]
        texts = [tokenize(tokenizer, [("USER: ", False), (f"\n{q} ASSISTANT:", False)]) for q, _ in asked]
        for text, (_, answer) in zip(texts, asked, strict=True):
            ids = torch.tensor([text.ids])
            prompt = embed_scenes(model, ids, [scene], tokenizer)
            answered = model.generate(
                inputs_embeds=prompt, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.eos_token_id
            )
            right += tokenizer.decode(answered[0], skip_special_tokens=True).strip() == answer
            total += 1
    return right / total
