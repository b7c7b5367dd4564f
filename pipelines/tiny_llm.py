"""Trains the small LLM that comes with the package: it reads what is where in a drawn scene, and answers about it."""

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
from pipelines.language_model import IGNORE, Text, fit, make_llama, make_tokenizer, pad, save

WIDTH, LAYERS, VOCABULARY = 128, 4, 640
BATCH_SIZE = 64
PLAIN_SHARE = 0.3  # of the texts are a caption; the others are questions and answers
QUESTIONS = 6  # of a conversation
TRAINING_SCENES, HELD_OUT_SCENES = 3, 9_002  # seeds of `make_scene`
HELD_OUT = 500  # scenes that are asked about in the end
_SCENE = "<scene>"  # where a prompt shows the scene


def train_tiny_llm(folder: Path, seed: int, steps: int = 2_500) -> dict[str, Any]:
    """Train the LLM; write a Hugging Face folder and `metrics.json`.

    A scene is shown to it as nine input vectors, one for each place: the sum of the embeddings of the words for what
    is there and for the place ("circle", "red", "striped", "large", "top", "left"). That is about what a projector can
    make of a vision tower's patches, so that training on pictures has to translate and not to teach language.

    Args:
        folder: where it goes.
        seed: of the weights and of the choice of texts.
        steps: optimizer steps of 64 scenes, each scene seen once.

    Returns what `metrics.json` says: the share of held-out questions with a short answer that are answered rightly.
    """
    torch.manual_seed(seed)
    scenes = [make_scene(TRAINING_SCENES, index) for index in range(3_000)]
    tokenizer = make_tokenizer((text for scene in scenes for text in _texts(scene)), VOCABULARY)
    model = make_llama(tokenizer, WIDTH, LAYERS)
    rng = random.Random(f"texts {seed}")

    def loss_of_step(step: int) -> Tensor:
        chosen = [make_scene(TRAINING_SCENES, step * BATCH_SIZE + k) for k in range(BATCH_SIZE)]
        return _loss(model, [_text(scene, tokenizer, rng) for scene in chosen], chosen, tokenizer)

    started = time.perf_counter()
    loss = fit([model], loss_of_step, steps=steps, learning_rate=3e-3)
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
    """Everything that is said of scenes, for the tokenizer to learn."""
    yield from (describe(scene, kind) for kind in ("right", "unrelated"))
    for question, answer in questions(scene):
        yield f"USER: {question} ASSISTANT: {answer}"


def _text(scene: Scene, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> Text:
    """The scene and a caption as the plain template has them, or the scene and some questions as the chat template."""
    if rng.random() < PLAIN_SHARE:
        return _tokens(tokenizer, [("", False), (describe(scene, variant=rng.randrange(4)) + "\n", True)])
    asked = [pair for pair in questions(scene) if _is_short(pair[1])]
    chosen = rng.sample(asked, k=min(QUESTIONS, len(asked)))
    parts = [("USER: ", False)]
    for number, (question, answer) in enumerate(chosen):
        parts += [(f"{'USER: ' if number else chr(10)}{question} ASSISTANT:", False), (f" {answer}</s>", True)]
    return _tokens(tokenizer, parts)


def _is_short(answer: str) -> bool:
    """Whether there is one way to say it; a description has many."""
    return len(answer.split()) <= 4


def _tokens(tokenizer: PreTrainedTokenizerFast, parts: list[tuple[str, bool]]) -> Text:
    """Parts of a text, each learned or not, with the begin token before and the scene's places after the first."""
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
        inputs_embeds=_embed(model, batch["input_ids"], scenes, tokenizer), attention_mask=batch["attention_mask"]
    ).last_hidden_state
    labels = batch["labels"][:, 1:]
    wanted = labels != IGNORE
    return cross_entropy(model.lm_head(hidden_BLD[:, :-1][wanted]), labels[wanted])


def _embed(model: Any, ids_BL: Tensor, scenes: list[Scene], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Input embeddings [B, L, D] with the scenes in place of the unknown tokens."""
    table = model.get_input_embeddings()
    embeds_BLD = table(ids_BL)
    places = [place for scene in scenes for place in _words(scene)]
    words = torch.tensor([_word(tokenizer, word) for place in places for word in place])
    starts = torch.tensor([0, *map(len, places[:-1])]).cumsum(0)
    shown = embedding_bag(words, table.weight, starts, mode="sum")
    return embeds_BLD.masked_scatter((ids_BL == tokenizer.unk_token_id)[..., None], shown)


def _words(scene: Scene) -> list[list[str]]:
    """The words for each place and for what is there."""
    found = {cell: ["background", scene.background] for cell in PLACES}
    for group in scene.groups:
        for cell in group.cells:
            found[cell] = [group.shape, group.colour, group.texture, group.size]
    return [[f" {word}" for word in [*words, *PLACES[cell].split()]] for cell, words in found.items()]


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
        texts = [_tokens(tokenizer, [("USER: ", False), (f"\n{q} ASSISTANT:", False)]) for q, _ in asked]
        for text, (_, answer) in zip(texts, asked, strict=True):
            ids = torch.tensor([text.ids])
            prompt = _embed(model, ids, [scene], tokenizer)
            told = model.generate(
                inputs_embeds=prompt, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.eos_token_id
            )
            right += tokenizer.decode(told[0], skip_special_tokens=True).strip() == answer
            total += 1
    return right / total
