"""Draws the built-in data: small scenes with captions whose correctness is known."""

from __future__ import annotations

import io
import json
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal, get_args

from PIL import Image, ImageDraw

from aligncurate.io.tar import TarWriter

Kind = Literal["right", "one_detail_wrong", "one_object_wrong", "unrelated"]
KINDS: tuple[Kind, ...] = get_args(Kind)

COLOURS = {
    "red": (215, 30, 35),
    "orange": (250, 140, 20),
    "yellow": (245, 220, 30),
    "green": (30, 150, 55),
    "blue": (35, 80, 220),
    "purple": (125, 45, 165),
    "pink": (250, 130, 185),
    "brown": (120, 70, 30),
}
BACKGROUNDS = {"white": (250, 250, 250), "grey": (165, 168, 172), "black": (18, 18, 20)}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "moon", "arrow", "diamond")
TEXTURES = {
    "solid": ("solid", "plain"),
    "striped": ("striped", "with stripes"),
    "dotted": ("dotted", "with dots"),
}
SIZES = {"small": ("small", "little"), "large": ("large", "big")}
RADIUS = {"small": 0.095, "large": 0.155}  # in image widths; a cell of the grid is a third of a width
# The nine cells of the grid, row by row, as (row, column) -> words.
PLACES = {
    (0, 0): "top left",
    (0, 1): "top",
    (0, 2): "top right",
    (1, 0): "left",
    (1, 1): "middle",
    (1, 2): "right",
    (2, 0): "bottom left",
    (2, 1): "bottom",
    (2, 2): "bottom right",
}
RELATIONS = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
COUNT_SHARES = (45, 25, 20, 10)  # how often a group has one, two, three and four objects, in percent
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

Cell = tuple[int, int]


@dataclass(frozen=True)
class Group:
    """Objects that look the same, and the cells they are in. No two groups of a scene have the same shape."""

    shape: str
    colour: str
    texture: str
    size: str
    cells: tuple[Cell, ...]

    @property
    def count(self) -> int:
        return len(self.cells)


@dataclass(frozen=True)
class Scene:
    """Everything that determines an image. `noise` is the seed for what no caption mentions: jitter, tilt, clutter."""

    background: str
    groups: tuple[Group, ...]
    noise: int


@dataclass(frozen=True)
class ScenePair:
    """An image (RGB), a caption, and the kind of error in the caption, if any."""

    key: str
    scene: Scene
    image: Image.Image
    caption: str
    kind: Kind


# ---- scenes ----------------------------------------------------------------------------------------


def make_scene(seed: int, index: int) -> Scene:
    """Scene `index` of the infinite sequence of `seed`."""
    rng = random.Random(f"scene {seed} {index}")
    return _random_scene(rng, list(SHAPES), list(COLOURS), list(BACKGROUNDS))


def _random_scene(rng: random.Random, shapes: list[str], colours: list[str], backgrounds: list[str]) -> Scene:
    group_count = rng.choices((1, 2, 3), (25, 45, 30))[0]
    most = 4 if group_count < 3 else 3  # so that nine cells are always enough
    counts = rng.choices(range(1, most + 1), COUNT_SHARES[:most], k=group_count)
    cells = rng.sample(list(PLACES), k=sum(counts))
    groups = []
    for shape, count in zip(rng.sample(shapes, k=group_count), counts, strict=True):
        looks = (rng.choice(colours), rng.choice(list(TEXTURES)), rng.choice(list(SIZES)))
        groups.append(Group(shape, *looks, cells=tuple(sorted(cells[:count]))))
        cells = cells[count:]
    return Scene(rng.choice(backgrounds), tuple(groups), noise=rng.getrandbits(32))


# ---- drawing ---------------------------------------------------------------------------------------


def draw(scene: Scene, size: int = 128) -> Image.Image:
    """The scene as an RGB image of `size` x `size` pixels; the same bytes for the same scene and size."""
    rng = random.Random(scene.noise)
    fine = size * 3  # drawn larger and reduced, because Pillow does not antialias
    backdrop = BACKGROUNDS[scene.background]
    image = Image.new("RGB", (fine, fine), backdrop)
    pen = ImageDraw.Draw(image)
    ink = _blend(backdrop, (250, 250, 250) if scene.background == "grey" else (128, 128, 128), 0.3)
    for _ in range(rng.randint(0, 8)):
        _draw_clutter(pen, rng, fine, ink)
    for group in scene.groups:
        for row, column in group.cells:
            x, y = ((k + 0.5) / 3 + rng.uniform(-0.015, 0.015) for k in (column, row))
            _draw_object(image, rng, group, (x, y))
    return image.reduce(3)


def _draw_clutter(pen: ImageDraw.ImageDraw, rng: random.Random, fine: int, ink: tuple[int, int, int]) -> None:
    x, y, angle, length = rng.random(), rng.random(), rng.uniform(0, math.pi), rng.uniform(0.01, 0.12)
    end = (x + length * math.cos(angle), y + length * math.sin(angle))
    pen.line([(x * fine, y * fine), (end[0] * fine, end[1] * fine)], fill=ink, width=max(1, fine // 130))


def _draw_object(image: Image.Image, rng: random.Random, group: Group, centre: tuple[float, float]) -> None:
    width = image.width
    radius = RADIUS[group.size] * rng.uniform(0.95, 1.05) * width
    side = math.ceil(radius * 2) + 4
    tilt = rng.uniform(-0.15, 0.15)

    def place(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        cos, sin = math.cos(tilt) * radius, math.sin(tilt) * radius
        return [(side / 2 + x * cos - y * sin, side / 2 + x * sin + y * cos) for x, y in points]

    outline, hole = _outline(group.shape)
    mask = Image.new("L", (side, side), 0)
    ImageDraw.Draw(mask).polygon(place(outline), fill=255)
    if hole:
        ImageDraw.Draw(mask).polygon(place(hole), fill=0)
    colour = tuple(min(255, max(0, channel + rng.randint(-8, 8))) for channel in COLOURS[group.colour])
    corner = (round(centre[0] * width - side / 2), round(centre[1] * width - side / 2))
    image.paste(_fill(group.texture, colour, side, width), corner, mask)


def _fill(texture: str, colour: tuple[int, ...], side: int, width: int) -> Image.Image:
    light = sum(colour) > 380
    mark = _blend(colour, (0, 0, 0) if light else (255, 255, 255), 0.55)
    fill = Image.new("RGB", (side, side), tuple(colour))
    pen = ImageDraw.Draw(fill)
    period = 0.075 * width  # relative to the image, not the object, so that small objects have the same texture
    steps = [(k + 0.25) * period for k in range(math.ceil(side / period))]
    if texture == "striped":
        for y in steps:
            pen.rectangle([(0, y), (side, y + period / 2)], fill=mark)
    elif texture == "dotted":
        for k, y in enumerate(steps):
            for x in steps:
                _draw_dot(pen, x + (period / 2 if k % 2 else 0), y, period * 0.28, mark)
    return fill


def _draw_dot(pen: ImageDraw.ImageDraw, x: float, y: float, radius: float, ink: tuple[int, int, int]) -> None:
    pen.ellipse([(x - radius, y - radius), (x + radius, y + radius)], fill=ink)


def _blend(a: tuple[int, ...], b: tuple[int, ...], share: float) -> tuple[int, int, int]:
    red, green, blue = (round(p + (q - p) * share) for p, q in zip(a, b, strict=True))
    return red, green, blue


def _outline(shape: str) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Outline and hole (often empty) of a shape of radius 1 around the origin, y pointing down."""

    def circle(radius: float, x: float = 0.0, y: float = 0.0) -> list[tuple[float, float]]:
        angles = [2 * math.pi * k / 48 for k in range(48)]
        return [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]

    match shape:
        case "circle":
            return circle(0.92), []
        case "ring":
            return circle(1.0), circle(0.5)
        case "moon":
            return circle(1.0), circle(0.85, x=0.55)
        case "square":
            return [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)], []
        case "diamond":
            return [(0, -1), (0.62, 0), (0, 1), (-0.62, 0)], []
        case "triangle":
            return [(0, -0.95), (0.98, 0.8), (-0.98, 0.8)], []
        case "cross":
            a, b = 0.32, 0.95
            corners = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a)]
            return corners + [(-x, -y) for x, y in corners], []
        case "star":
            spikes = [(1.05 if k % 2 == 0 else 0.45, math.pi * k / 5 - math.pi / 2) for k in range(10)]
            return [(r * math.cos(a), r * math.sin(a)) for r, a in spikes], []
        case "arrow":
            return [(-1, -0.3), (0.1, -0.3), (0.1, -0.85), (1, 0), (0.1, 0.85), (0.1, 0.3), (-1, 0.3)], []
        case "heart":
            turns = [2 * math.pi * k / 48 for k in range(48)]
            harmonics = ((1, 13), (2, -5), (3, -2), (4, -1))
            ys = [sum(share * math.cos(k * t) for k, share in harmonics) / 16 for t in turns]
            return [(math.sin(t) ** 3, -y - 0.1) for t, y in zip(turns, ys, strict=True)], []
    raise ValueError(f"no such shape: {shape!r}")


# ---- what a caption says ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Phrase:
    """What a caption says about one group; None for what it does not mention."""

    shape: str
    count: int
    counted: bool = False  # "one circle" instead of "a circle", which would be true of two circles too
    colour: str | None = None
    texture: str | None = None
    size: str | None = None
    cell: Cell | None = None


@dataclass(frozen=True)
class Statement:
    """The content of a caption. `relation` is the position of the first phrase relative to the second."""

    phrases: tuple[Phrase, ...]
    relation: str | None = None
    background: str | None = None


def _relations(first: Cell, second: Cell) -> list[str]:
    """Relations of the first cell to the second; none if they are the same."""
    found = []
    if first[1] != second[1]:
        found.append("left" if first[1] < second[1] else "right")
    if first[0] != second[0]:
        found.append("above" if first[0] < second[0] else "below")
    return found


def _right_statement(scene: Scene, rng: random.Random) -> Statement:
    """A correct statement: most groups of the scene, with some attributes of each."""
    groups = rng.sample(scene.groups, k=len(scene.groups))
    if len(groups) == 3 and rng.random() < 0.5:
        groups = groups[:2]
    phrases = []
    for group in groups:
        colour = group.colour if rng.random() < 0.85 else None
        phrase = Phrase(group.shape, group.count, counted=rng.random() < 0.4, colour=colour)
        # Three long phrases would exceed the encoder's context length.
        if len(groups) == 3:
            extra = rng.choice(("texture", "size", "nothing"))
        else:
            extra = rng.choice(("texture", "size", "both", "nothing"))
        if extra in ("texture", "both"):
            phrase = replace(phrase, texture=group.texture)
        if extra in ("size", "both"):
            phrase = replace(phrase, size=group.size)
        phrases.append(phrase)
    relation = None
    if len(groups) == 2 and all(group.count == 1 for group in groups) and rng.random() < 0.5:
        relation = rng.choice(_relations(groups[0].cells[0], groups[1].cells[0]))
    elif len(groups) < 3:
        phrases = [
            replace(phrase, cell=group.cells[0]) if group.count == 1 and rng.random() < 0.5 else phrase
            for phrase, group in zip(phrases, groups, strict=True)
        ]
    return Statement(tuple(phrases), relation, background=scene.background if rng.random() < 0.3 else None)


def _with_wrong_detail(right: Statement, scene: Scene, rng: random.Random) -> Statement:
    """The statement with one colour, count, size, texture or position replaced by a wrong one."""
    choices: list[tuple[int, str]] = [
        (k, name)
        for k, phrase in enumerate(right.phrases)
        for name in ("count", "colour", "texture", "size", "cell")
        if getattr(phrase, name) is not None
    ]
    if right.relation is not None:
        choices.append((0, "relation"))
    if right.background is not None:
        choices.append((0, "background"))
    # Choose the kind of detail first, then the phrase: otherwise counts, which every phrase has, would dominate.
    name = rng.choice(sorted({name for _, name in choices}))
    k = rng.choice([k for k, other in choices if other == name])
    if name == "relation":
        assert right.relation is not None
        return replace(right, relation=OPPOSITE[right.relation])
    if name == "background":
        return replace(right, background=_other(rng, list(BACKGROUNDS), {scene.background}))
    phrase = right.phrases[k]
    match name:
        case "count":
            # Sampled as in scenes, so that the count alone does not give the wrong caption away.
            shares = {n: share for n, share in enumerate(COUNT_SHARES, 1) if n != phrase.count}
            count = rng.choices(list(shares), list(shares.values()))[0]
            wrong = replace(phrase, count=count, counted=True)
        case "colour":
            wrong = replace(phrase, colour=_other(rng, list(COLOURS), _colours(scene)))
        case "texture":
            wrong = replace(phrase, texture=_other(rng, list(TEXTURES), {phrase.texture or ""}))
        case "size":
            wrong = replace(phrase, size=_other(rng, list(SIZES), {phrase.size or ""}))
        case _:
            assert phrase.cell is not None
            wrong = replace(phrase, cell=rng.choice([cell for cell in PLACES if _far(cell, phrase.cell)]))
    return _with_phrase(right, k, wrong)


def _far(cell: Cell, other: Cell) -> bool:
    """Whether two places are clearly apart: opposite, or one of them the middle. Neighbouring ones are ambiguous."""
    if cell == other:
        return False
    return (1, 1) in (cell, other) or max(abs(cell[0] - other[0]), abs(cell[1] - other[1])) == 2


def _with_wrong_object(right: Statement, scene: Scene, rng: random.Random) -> Statement:
    """The statement with one object replaced by one of a shape and colour that the scene does not have."""
    k = rng.randrange(len(right.phrases))
    wrong = replace(right.phrases[k], shape=_other(rng, list(SHAPES), _shapes(scene)))
    if wrong.colour is not None:
        wrong = replace(wrong, colour=_other(rng, list(COLOURS), _colours(scene)))
    return _with_phrase(right, k, wrong)


def _with_phrase(statement: Statement, k: int, phrase: Phrase) -> Statement:
    return replace(statement, phrases=(*statement.phrases[:k], phrase, *statement.phrases[k + 1 :]))


def _unrelated_scene(scene: Scene, rng: random.Random) -> Scene:
    """A scene with no shape, object colour or background in common."""
    return _random_scene(
        rng,
        [shape for shape in SHAPES if shape not in _shapes(scene)],
        [colour for colour in COLOURS if colour not in _colours(scene)],
        [name for name in BACKGROUNDS if name != scene.background],
    )


def _shapes(scene: Scene) -> set[str]:
    return {group.shape for group in scene.groups}


def _colours(scene: Scene) -> set[str]:
    return {group.colour for group in scene.groups}


def _other(rng: random.Random, names: list[str], taken: set[str]) -> str:
    return rng.choice([name for name in names if name not in taken])


# ---- captions --------------------------------------------------------------------------------------


def describe(scene: Scene, kind: Kind = "right", variant: int = 0) -> str:
    """A caption of the scene that is right or wrong in the way `kind` says.

    `variant` numbers the captions of one scene. Captions of one scene and variant that differ in `kind`
    speak of the same things in the same words as far as they can, so they are hard negatives of each other.
    """
    rng = random.Random(f"caption {scene.noise} {variant}")
    if kind == "unrelated":
        other = _unrelated_scene(scene, rng)
        return _words(_right_statement(other, rng), rng)
    statement = _right_statement(scene, rng)
    wording = random.Random(rng.getrandbits(64))
    if kind == "one_detail_wrong":
        statement = _with_wrong_detail(statement, scene, rng)
    elif kind == "one_object_wrong":
        statement = _with_wrong_object(statement, scene, rng)
    return _words(statement, wording)


def _words(statement: Statement, rng: random.Random) -> str:
    parts = [_phrase_words(phrase, rng) for phrase in statement.phrases]
    if statement.relation is not None:
        parts = [f"{parts[0]} {RELATIONS[statement.relation]} {parts[1]}"]
    listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    be = "is" if statement.phrases[0].count == 1 else "are"
    frames = [
        "{listed}",
        "a picture of {listed}",
        "a drawing of {listed}",
        "an image showing {listed}",
        "we see {listed}",
        "there {be} {listed}",
        "the picture shows {listed}",
    ]
    text = rng.choice(frames).format(listed=listed, be=be)
    if statement.background is not None:
        on = rng.choice(("on a {} background", "against a {} background", "on {}"))
        where = on.format(statement.background)
        text = f"{where}, {text}" if rng.random() < 0.3 else f"{text}, {where}"
    return text[0].upper() + text[1:] + "." if rng.random() < 0.5 else text


def _phrase_words(phrase: Phrase, rng: random.Random) -> str:
    words = [phrase.shape if phrase.count == 1 else _plural(phrase.shape)]
    after = ""
    if phrase.colour is not None:
        words.insert(0, phrase.colour)
    if phrase.texture is not None:
        texture = rng.choice(TEXTURES[phrase.texture])
        if texture.startswith("with "):
            after = f" {texture}"
        else:
            words.insert(0, texture)
    if phrase.size is not None:
        words.insert(0, rng.choice(SIZES[phrase.size]))
    if phrase.count > 1 or phrase.counted:
        words.insert(0, NUMBERS[phrase.count])
    else:
        words.insert(0, _article(words[0]))
    if phrase.cell is not None:
        after += f" {_place_words(phrase.cell)}"
    return " ".join(words) + after


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _plural(shape: str) -> str:
    return f"{shape}es" if shape == "cross" else f"{shape}s"


def _place_words(cell: Cell) -> str:
    preposition = {(0, 1): "at", (2, 1): "at", (1, 0): "on", (1, 2): "on"}.get(cell, "in")
    return f"{preposition} the {PLACES[cell]}"


# ---- questions -------------------------------------------------------------------------------------


def questions(scene: Scene) -> list[tuple[str, str]]:
    """Questions and their correct answers, about colours, counts, shapes, textures, sizes and places.

    Some are about the whole scene, others about each group. The same scene always gives the same questions.
    """
    rng = random.Random(f"questions {scene.noise}")
    ask = rng.choice
    absent = _other(rng, list(SHAPES), _shapes(scene))
    total = sum(group.count for group in scene.groups)
    pairs = [
        (ask(("What colour is the background?", "Which colour is behind the objects?")), scene.background),
        (ask(("How many objects are there?", "How many shapes do you see?")), NUMBERS[total]),
        (ask((f"Is there {_article(absent)} {absent}?", f"Do you see {_article(absent)} {absent}?")), "no"),
        (ask(("Describe the picture.", "What does the picture show?")), describe(scene, variant=1)),
    ]
    colours = [group.colour for group in scene.groups]
    for group in scene.groups:
        one = group.count == 1
        name = group.shape if one else _plural(group.shape)
        be = "is" if one else "are"
        looks = [
            (ask((f"What colour {be} the {name}?", f"Name the colour of the {name}.")), group.colour),
            (f"{be.capitalize()} the {name} solid, striped or dotted?", group.texture),
            (f"{be.capitalize()} the {name} small or large?", group.size),
            (f"Is there {_article(group.shape)} {group.shape}?", "yes"),
        ]
        if colours.count(group.colour) == 1:
            looks.append((f"What shape {be} the {group.colour} object{'' if one else 's'}?", group.shape))
        pairs += rng.sample(looks, k=2)
        several = _plural(group.shape)
        pairs.append((ask((f"How many {several} are there?", f"Count the {several}.")), NUMBERS[group.count]))
        if one:
            pairs.append((f"Where is the {name}?", _place_words(group.cells[0])))
    return pairs


# ---- pairs -----------------------------------------------------------------------------------------


def pairs(count: int, seed: int, size: int = 128) -> Iterator[ScenePair]:
    """The first `count` pairs of a seed, each of a new scene of `size` x `size` pixels; the four kinds take turns."""
    for index in range(count):
        scene = make_scene(seed, index)
        kind = KINDS[index % len(KINDS)]
        yield ScenePair(f"{seed}-{index:07d}", scene, draw(scene, size), describe(scene, kind), kind)


def write_tars(folder: Path, count: int, seed: int, shard_size: int = 1000) -> list[Path]:
    """Write pairs as webdataset shards of `shard_size` samples and return the shards in order.

    A sample is `<key>.jpg`, `<key>.txt` (the caption) and `<key>.json` (its correctness).
    The same arguments and version of Pillow give the same bytes.
    """
    samples = (
        {
            f"{pair.key}.jpg": _jpeg(pair.image),
            f"{pair.key}.txt": pair.caption.encode(),
            f"{pair.key}.json": json.dumps({"correctness": pair.kind, "key": pair.key}).encode(),
        }
        for pair in pairs(count, seed)
    )
    return _write(folder, samples, shard_size)


def write_conversations(folder: Path, count: int, seed: int, shard_size: int = 1000) -> list[Path]:
    """Write scenes with all their `questions`, shuffled, as webdataset shards, and return the shards in order.

    A sample is `<key>.jpg` and `<key>.json` with `conversations` in LLaVA's format; the image is in the first question.
    """
    return _write(folder, map(_conversation, (make_scene(seed, k) for k in range(count)), range(count)), shard_size)


def _conversation(scene: Scene, number: int) -> dict[str, bytes]:
    asked = questions(scene)
    random.Random(f"order {scene.noise}").shuffle(asked)  # a model must not learn which question comes first
    turns = [{"from": who, "value": text} for pair in asked for who, text in zip(("human", "gpt"), pair, strict=True)]
    turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    key = f"scene-{number:07d}"
    return {f"{key}.jpg": _jpeg(draw(scene)), f"{key}.json": json.dumps({"conversations": turns}).encode()}


def _jpeg(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=92)
    return data.getvalue()


def _write(folder: Path, samples: Iterable[dict[str, bytes]], shard_size: int) -> list[Path]:
    """Write samples, given as {member name: content}, as numbered tars."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[Path] = []
    everything = iter(samples)
    while some := list(islice(everything, shard_size)):
        path = folder / f"{len(shards):05d}.tar"
        with path.open("wb") as file:
            tar = TarWriter(file)
            for sample in some:
                for name, data in sample.items():
                    tar.add(name, data)
            tar.end()
        shards.append(path)
    return shards
