"""Scenes: the same whenever they are made, drawn as they say, and captions as right or wrong as they claim.

The oracle reads a caption as text, knows nothing of how it was written, and compares it with the objects.
"""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from webdataset import tariterators

from aligncurate.demo import scenes
from aligncurate.demo.scenes import (
    KINDS,
    Scene,
    describe,
    draw,
    make_scene,
    pairs,
    questions,
    write_conversations,
    write_tars,
)

SEED = 5
COUNT = 600

SHAPES = ["circle", "square", "triangle", "star", "ring", "cross", "heart", "moon", "arrow", "diamond"]
COLOURS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown"]
NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4}
NUMBER_WORDS = ["one", "two", "three", "four"]
TEXTURES = {
    "solid": "solid",
    "plain": "solid",
    "striped": "striped",
    "dotted": "dotted",
    "stripes": "striped",
    "dots": "dotted",
}
SIZES = {"small": "small", "little": "small", "large": "large", "big": "large"}
PLACES = ["top left", "top right", "bottom left", "bottom right", "top", "bottom", "left", "right", "middle"]
RELATIONS = ["to the left of", "to the right of", "above", "below"]

PHRASE = re.compile(
    rf"\b(?P<number>{'|'.join(NUMBERS)})"
    rf"(?: (?P<size>{'|'.join(SIZES)}))?"
    r"(?: (?P<texture>solid|plain|striped|dotted))?"
    rf"(?: (?P<colour>{'|'.join(COLOURS)}))?"
    rf" (?P<shape>{'|'.join(SHAPES)})(?:e?s)?\b"
    r"(?: with (?P<texture_after>stripes|dots))?"
    rf"(?: (?:in|at|on) the (?P<place>{'|'.join(PLACES)})\b(?! of))?"
)
BACKGROUND = re.compile(r"\b(?:on|against)(?: a)? (?P<name>white|grey|black)(?: background)?\b")
GLUE = re.compile(r"\b(a picture of|a drawing of|an image showing|we see|there is|there are|the picture shows|and)\b")


@dataclass(frozen=True)
class Said:
    """A caption read back: an attribute of a phrase that is not mentioned is missing from its dict."""

    phrases: tuple[dict[str, str], ...]
    relation: str | None
    background: str | None


def read(caption: str) -> Said:
    text = caption.lower().removesuffix(".")
    phrases = tuple(
        {name: value for name, value in match.groupdict().items() if value} for match in PHRASE.finditer(text)
    )
    for phrase in phrases:
        if "texture_after" in phrase:
            phrase["texture"] = phrase.pop("texture_after")
    relation = next((words for words in RELATIONS if words in text), None)
    background = BACKGROUND.search(text)
    rest = BACKGROUND.sub(" ", GLUE.sub(" ", PHRASE.sub(" ", text)))
    for words in RELATIONS:
        rest = rest.replace(words, " ")
    assert not rest.replace(",", " ").strip(), f"the oracle did not understand {rest!r} in {caption!r}"
    return Said(phrases, relation, background["name"] if background else None)


def objects(scene: Scene) -> list[dict[str, object]]:
    return [
        {"shape": g.shape, "colour": g.colour, "texture": g.texture, "size": g.size, "row": row, "column": column}
        for g in scene.groups
        for row, column in g.cells
    ]


def matching(phrase: dict[str, str], scene: Scene) -> list[dict[str, object]]:
    wanted = {
        "shape": phrase["shape"],
        "colour": phrase.get("colour"),
        "texture": TEXTURES.get(phrase.get("texture", "")),
        "size": SIZES.get(phrase.get("size", "")),
    }
    rows, columns = {"top": 0, "bottom": 2}, {"left": 0, "right": 2}
    found = []
    for thing in objects(scene):
        place = phrase.get("place", "")
        in_place = all(
            (word not in rows or thing["row"] == rows[word])
            and (word not in columns or thing["column"] == columns[word])
            and (word != "middle" or thing["row"] == thing["column"] == 1)
            for word in place.split()
        )
        if in_place and all(value is None or thing[name] == value for name, value in wanted.items()):
            found.append(thing)
    return found


def phrase_is_true(phrase: dict[str, str], scene: Scene) -> bool:
    found = len(matching(phrase, scene))
    if phrase["number"] in ("a", "an"):
        return found >= 1  # "a star" is not wrong of two stars; a caption meant to be wrong may not rest on it
    return found == NUMBERS[phrase["number"]]


def relation_is_true(said: Said, scene: Scene) -> bool:
    ((first, *_), (second, *_)) = (matching(phrase, scene) for phrase in said.phrases[:2])
    row, column = (int(str(second[name])) - int(str(first[name])) for name in ("row", "column"))
    return {
        "to the left of": column > 0,
        "to the right of": column < 0,
        "above": row > 0,
        "below": row < 0,
    }[str(said.relation)]


def errors(said: Said, scene: Scene) -> list[str]:
    """The facts of a caption that are not so: a phrase by its number, else `relation` or `background`."""
    wrong = [str(k) for k, phrase in enumerate(said.phrases) if not phrase_is_true(phrase, scene)]
    if said.relation and not wrong and not relation_is_true(said, scene):
        wrong.append("relation")
    if said.background not in (None, scene.background):
        wrong.append("background")
    return wrong


def blame(phrase: dict[str, str], scene: Scene) -> list[str]:
    """The details of a wrong phrase that, had they not been mentioned, would have left it right."""
    details = [name for name in ("colour", "texture", "size", "place") if name in phrase]
    found = [d for d in details if phrase_is_true({k: v for k, v in phrase.items() if k != d}, scene)]
    counted = len(matching(phrase, scene))
    return found + (["number"] if counted and counted != NUMBERS[phrase["number"]] else [])


SCENES = [make_scene(SEED, index) for index in range(COUNT)]


def test_right_captions_are_right() -> None:
    for scene in SCENES:
        for variant in range(3):
            caption = describe(scene, variant=variant)
            assert read(caption).phrases
            assert errors(read(caption), scene) == [], caption


def test_one_detail_wrong_is_wrong_in_one_detail() -> None:
    seen: Counter[str] = Counter()
    for scene in SCENES:
        caption = describe(scene, "one_detail_wrong")
        said = read(caption)
        wrong = errors(said, scene)
        assert len(wrong) == 1, (caption, wrong)
        if wrong[0].isdigit():
            phrase = said.phrases[int(wrong[0])]
            (detail,) = blame(phrase, scene)
            seen[detail] += 1
            if detail == "colour":
                assert phrase["colour"] not in {thing["colour"] for thing in objects(scene)}, caption
        else:
            seen[wrong[0]] += 1
    assert set(seen) == {"number", "colour", "texture", "size", "place", "relation", "background"}


def test_one_object_wrong_names_one_object_that_is_not_there() -> None:
    for scene in SCENES:
        caption = describe(scene, "one_object_wrong")
        said = read(caption)
        wrong = errors(said, scene)
        assert len(wrong) == 1, (caption, wrong)
        assert said.phrases[int(wrong[0])]["shape"] not in {thing["shape"] for thing in objects(scene)}


def test_unrelated_captions_share_nothing() -> None:
    for scene in SCENES:
        caption = describe(scene, "unrelated")
        said = read(caption)
        assert not {phrase["shape"] for phrase in said.phrases} & {thing["shape"] for thing in objects(scene)}
        assert not {phrase.get("colour") for phrase in said.phrases} & {thing["colour"] for thing in objects(scene)}
        assert said.background != scene.background


def test_captions_vary() -> None:
    captions = [describe(scene, variant=variant) for scene in SCENES for variant in range(2)]
    assert len(set(captions)) > 0.95 * len(captions)


def test_the_picture_shows_the_scene() -> None:
    for scene in SCENES[:150]:
        pixels = np.asarray(draw(scene, 96)).astype(int)
        backdrop = np.array(scenes.BACKGROUNDS[scene.background])
        groups = {cell: group for group in scene.groups for cell in group.cells}
        for row in range(3):
            for column in range(3):
                cell = pixels[row * 32 : row * 32 + 32, column * 32 : column * 32 + 32].reshape(-1, 3)
                inked = cell[np.abs(cell - backdrop).max(axis=1) > 50]
                group = groups.get((row, column))
                # A solid small cross, the thinnest, covers 60 of the 1024 pixels; clutter is too faint to count.
                assert (len(inked) > 40) == (group is not None), (scene, row, column, len(inked))
                if group is not None and group.texture == "solid":
                    middle = np.median(inked, axis=0)
                    nearest = min(COLOURS, key=lambda name: np.abs(middle - scenes.COLOURS[name]).sum())
                    assert nearest == group.colour, scene


def test_textures_and_sizes_show() -> None:
    def inked(texture: str = "solid", size: str = "small") -> int:
        group = scenes.Group("circle", "blue", texture, size, ((1, 1),))
        scene = Scene("white", (group,), noise=3)
        return int((np.asarray(draw(scene)).astype(int).min(axis=2) < 120).sum())

    assert inked(size="large") > 2 * inked()
    assert inked(size="large", texture="striped") < 0.7 * inked(size="large")
    assert inked(size="large", texture="dotted") < 0.9 * inked(size="large")


def test_scenes_do_not_depend_on_the_process() -> None:
    """Sets of strings are ordered by a per-process hash; none may decide what a scene is."""
    program = (
        "import hashlib; from aligncurate.demo.scenes import *\n"
        "digest = hashlib.sha256()\n"
        "for pair in pairs(40, 9): digest.update(pair.image.tobytes() + pair.caption.encode())\n"
        "digest.update(repr([questions(make_scene(9, i)) for i in range(40)]).encode())\n"
        "print(digest.hexdigest())"
    )
    digests = set()
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        run = subprocess.run(
            [sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True
        )
        digests.add(run.stdout)
    assert len(digests) == 1


def test_seeds_and_indices_differ() -> None:
    made = [make_scene(seed, index) for seed in range(4) for index in range(100)]
    assert len({scene.noise for scene in made}) == len(made)


@pytest.mark.parametrize("size", [32, 64, 224])
def test_any_size(size: int) -> None:
    assert draw(SCENES[0], size).size == (size, size)


def test_pairs_take_the_kinds_in_turn() -> None:
    made = list(pairs(8, SEED))
    assert [pair.kind for pair in made] == [*KINDS, *KINDS]
    assert len({pair.key for pair in made}) == 8
    for pair in made:
        assert pair.caption == describe(pair.scene, pair.kind)
        assert (errors(read(pair.caption), pair.scene) == []) == (pair.kind == "right")


def test_tars_read_back_and_repeat(tmp_path: Path) -> None:
    shards = write_tars(tmp_path / "a", 25, SEED, shard_size=10)
    assert [shard.name for shard in shards] == ["00000.tar", "00001.tar", "00002.tar"]
    samples = [sample for shard in shards for sample in read_back(shard)]
    assert len(samples) == 25
    for sample, pair in zip(samples, pairs(25, SEED), strict=True):
        assert sample["__key__"] == pair.key
        assert sample["txt"].decode() == pair.caption
        assert json.loads(sample["json"])["correctness"] == pair.kind
        pixels = np.asarray(Image.open(io.BytesIO(sample["jpg"]))).astype(int)
        assert np.abs(pixels - np.asarray(pair.image)).mean() < 6
    again = write_tars(tmp_path / "b", 25, SEED, shard_size=10)
    assert [digest(path) for path in again] == [digest(path) for path in shards]


def read_back(shard: Path) -> Iterator[dict[str, Any]]:
    """The samples of a tar as webdataset's own reader groups them, from a stream that is closed at the end."""
    with shard.open("rb") as stream:
        files = tariterators.tar_file_expander([{"url": str(shard), "stream": stream}])
        yield from tariterators.group_by_keys(files)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_answers_are_right() -> None:
    asked: Counter[str] = Counter()
    for scene in SCENES[:200]:
        by_shape = {group.shape: group for group in scene.groups}
        for question, answer in questions(scene):
            assert question[0].isupper() and question[-1] in "?."
            words = question.lower().rstrip("?.").replace(",", "").split()
            shape = next((s for word in words for s in SHAPES if word in (s, f"{s}s", f"{s}es")), None)
            group = by_shape.get(shape or "")
            if question.startswith(("Is there", "Do you see")):
                expected = "yes" if group else "no"
            elif question.startswith(("How many objects", "How many shapes")):
                total = sum(len(g.cells) for g in scene.groups)
                expected = [*NUMBER_WORDS, "five", "six", "seven", "eight", "nine"][total - 1]
            elif question.startswith(("Describe", "What does the picture")):
                assert errors(read(answer), scene) == []
                continue
            elif "background" in words or "behind" in words:
                expected = scene.background
            elif question.startswith("What shape"):
                expected = next(g.shape for g in scene.groups if g.colour in words)
            else:
                assert group is not None, question
                if question.startswith("Where"):
                    place = {"number": "a", "shape": group.shape, "place": re.sub(r"^\w+ the ", "", answer)}
                    assert phrase_is_true(place, scene)
                    continue
                attribute = next(
                    value
                    for key, value in {
                        "colour": group.colour,
                        "solid": group.texture,
                        "small": group.size,
                        "many": NUMBER_WORDS[len(group.cells) - 1],
                        "count": NUMBER_WORDS[len(group.cells) - 1],
                    }.items()
                    if key in words
                )
                expected = attribute
            assert answer == expected, (question, scene)
            asked[expected] += 1
    assert asked["yes"] and asked["no"] and asked["three"] and asked["striped"]
    assert json.dumps(questions(SCENES[0])) == json.dumps(questions(SCENES[0]))


def test_conversations_are_the_scenes_questions_in_llavas_form(tmp_path: Path) -> None:
    shards = write_conversations(tmp_path, 5, SEED, shard_size=3)
    assert [shard.name for shard in shards] == ["00000.tar", "00001.tar"]
    samples = []
    for shard in shards:
        with shard.open("rb") as stream:
            files = tariterators.tar_file_iterator(stream)
            samples += list(tariterators.group_by_keys({**f, "__url__": str(shard)} for f in files))
    assert len(samples) == 5
    for number, sample in enumerate(samples):
        scene = make_scene(SEED, number)
        turns = json.loads(sample["json"])["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        texts = [turn["value"] for turn in turns]
        assert texts[0].startswith("<image>\n") and not any("<image>" in text for text in texts[1:])
        texts[0] = texts[0].removeprefix("<image>\n")
        asked = list(zip(texts[::2], texts[1::2], strict=True))
        assert sorted(asked) == sorted(questions(scene)) and asked != questions(scene)
        shown = Image.open(io.BytesIO(sample["jpg"])).convert("RGB")
        assert np.abs(np.asarray(shown, float) - np.asarray(draw(scene), float)).mean() < 4  # JPEG's own change
