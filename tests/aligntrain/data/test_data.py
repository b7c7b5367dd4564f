"""From data to batches: which rows are indexed, which are skipped and why, and what a batch contains."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import tarfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from aligncurate.errors import UserError
from aligncurate.images.decode import load_rgb
from aligncurate.verbs.ingest import ingest
from aligntrain import AlignGPTProcessor, StageConfig
from aligntrain.data.index import Facts, Index
from aligntrain.data.indexing import build_index, open_data
from aligntrain.data.reader import BatchReader, read_ahead
from aligntrain.inputs import pixels
from aligntrain.training.build import build_processor
from aligntrain.training.distributed import World
from aligntrain.training.prepare import prepare_data
from tests.support.stage_data import (
    captions,
    finetuning,
    make_models,
    picture,
    pretraining,
    questions,
    tokenizer,
    write_tar,
)

LEVELS = 8


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_models(tmp_path_factory.mktemp("models"))


def index_of(config: StageConfig, levels: int = LEVELS) -> tuple[Index, AlignGPTProcessor]:
    processor = build_processor(config)
    Path(config.out).mkdir(exist_ok=True)
    return build_index(open_data(config), config, processor, levels, Path(config.out) / "index.arrow"), processor


def turns(*texts: str) -> dict[str, Any]:
    return {"conversations": [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]}


def test_index_returns_what_was_encoded(models: dict[str, str], tmp_path: Path) -> None:
    samples = {
        "first": (picture(0), turns("<image>\nwhat is it", "a thing", "sure?", "yes")),
        "last": (picture(1), turns("what is it\n<image>", "a bird")),
        "text": (None, turns("hello", "hi", "how", "so")),
    }
    config = finetuning(models, write_tar(tmp_path / "q.tar", samples), tmp_path / "out")
    index, processor = index_of(config)
    for number, (key, (image, meta)) in enumerate(samples.items()):
        expected = processor.encode(meta["conversations"], has_image=image is not None)
        assert index.key(number) == key
        assert index.encoded(number) == expected
        assert index.lengths[number] == len(expected.input_ids)
        assert index.image(number) == image
    assert index.images.tolist() == [1, 1, 0]
    assert index.facts.images == 2
    assert index.facts.supervised == sum(label != -100 for n in range(3) for label in index.encoded(n).labels)


@pytest.mark.parametrize("embed", [False, True])
def test_a_dataset_gives_the_same_index_as_its_tar(models: dict[str, str], tmp_path: Path, embed: bool) -> None:
    tar = captions(tmp_path / "c.tar", 6)
    ingest([tar], tmp_path / "set", embed_images=embed, quiet=True)
    ours, _ = index_of(pretraining(models, str(tmp_path / "set"), tmp_path / "a"))
    theirs, _ = index_of(pretraining(models, tar, tmp_path / "b"))
    if embed:
        shutil.move(tar, tmp_path / "gone.tar")
        assert [ours.image(n) for n in range(6)] == [picture(n) for n in range(6)]
    else:
        assert [ours.image(n) for n in range(6)] == [theirs.image(n) for n in range(6)]
    assert [ours.encoded(n) for n in range(6)] == [theirs.encoded(n) for n in range(6)]
    assert ours.levels.tolist() == [1, 2, 3, 4, 5, 6]


def test_skipped_rows_are_counted_by_cause(models: dict[str, str], tmp_path: Path) -> None:
    answer = {"from": "gpt", "value": "x"}
    samples = {
        "good": (picture(0), turns("what", "a thing")),
        "answer_first": (picture(0), {"conversations": [answer, *turns("q", "a")["conversations"]]}),
        "only_answer": (picture(0), {"conversations": [answer]}),
        "no_answer": (picture(0), turns("what")),
        "two": (picture(0), turns("<image><image> what", "a thing")),
        "long": (picture(0), turns("what", "word " * 100)),
        "no_picture": (None, {"caption": "a thing"}),
    }  # fmt: skip
    tar = write_tar(tmp_path / "q.tar", samples)
    index, _ = index_of(finetuning(models, tar, tmp_path / "out"))
    facts = index.facts
    keys = [index.key(n) for n in range(len(index))]
    assert keys == ["good", "answer_first", "long"]  # an answer before the first question is dropped, not the row
    assert facts.truncated == 1
    assert index.lengths[2] == 96
    assert sorted(facts.examples.values()) == sorted(["only_answer", "no_answer", "two", "no_picture"])
    assert sum(facts.skipped.values()) == 4


def rows_with_faults(folder: Path) -> tuple[Path, dict[str, int]]:
    """LLaVA JSON in which rows cannot be trained on for many reasons, and how many for each."""
    (folder / "0.jpg").write_bytes(picture(0))
    ask, answer = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
    faults: dict[str, list[list[dict[str, Any]]]] = {
        "": [[ask, answer], [{"from": "USER", "value": "q"}, {"from": " Bot", "value": "a"}]],
        "must alternate": [[ask, answer, answer], [ask, answer, ask, ask], [ask, ask, answer]],
        "role 'tool'": [[ask, {"from": "tool", "value": "t"}, answer]] * 2,
        "role 'observation'": [[ask, {"from": "observation", "value": "t"}, answer]],
        "has no answer$": [[ask]],
        "no question": [[answer]],
        "… times": [[{"from": "human", "value": "<image>" * n}, answer, ask, answer] for n in (2, 3)],
        "in a turn of the assistant": [[ask, {"from": "gpt", "value": "<image>"}]],
        "no answer to learn": [[ask, {"from": "gpt", "value": ""}]],
        "invalid_row": [[{"from": "human"}]],
    }
    rows = [{"image": "0.jpg", "conversations": some} for kind in faults.values() for some in kind]
    rows += [{"image": "gone.jpg", "conversations": [ask, answer]}, {"conversations": [{**ask, "value": "<image>"}]}]
    (folder / "a.json").write_text(json.dumps(rows))
    return folder / "a.json", {cause: len(some) for cause, some in faults.items()} | {"missing_image": 2}


def test_every_cause_of_a_skipped_row_is_counted_and_printed(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, expected = rows_with_faults(tmp_path)
    config = finetuning(models, str(file), tmp_path / "out")
    index, _ = index_of(config)
    assert len(index) == expected.pop("")
    skipped = index.facts.skipped
    assert sum(skipped.values()) == sum(expected.values())
    with ExitStack() as claims:
        prepare_data(config, World(0, 1, torch.device("cpu")), claims)
    printed = " ".join(capsys.readouterr().err.split())
    for cause, rows in expected.items():
        counts = {"must alternate": [1, 2]}.get(cause, [rows])  # one cause for each role
        assert sorted(n for text, n in skipped.items() if re.search(cause, text)) == counts, (cause, skipped)
    for cause, rows in skipped.items():
        assert f"{rows} row{'' if rows == 1 else 's'} skipped: {cause}" in printed, cause


def test_causes_are_counted_apart_up_to_a_number() -> None:
    facts = Facts()
    for n in range(1_000):
        facts.skip(f"role {n}", f"k{n}")
    assert len(facts.skipped) == 51 and sum(facts.skipped.values()) == 1_000


def test_images_inside_texts_are_refused(models: dict[str, str], tmp_path: Path) -> None:
    image = f"data:image/jpeg;base64,{base64.b64encode(picture(0)).decode()}"
    (tmp_path / "a.json").write_text(json.dumps([{"image": image, **turns("q", "a")}]))
    with pytest.raises(UserError, match=r"base64.*aligncurate ingest"):
        index_of(finetuning(models, str(tmp_path / "a.json"), tmp_path / "out"))
    ingest([str(tmp_path / "a.json")], tmp_path / "set", quiet=True)
    index, _ = index_of(finetuning(models, str(tmp_path / "set"), tmp_path / "again"))
    assert index.image(0) == picture(0)


def test_levels_of_aligngpts_own_annotations(models: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(picture(0))
    rows = [{"image": "0.jpg", "similarity": s, **turns("<image>", "a thing")} for s in (0, 3, 7)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    index, _ = index_of(pretraining(models, str(tmp_path / "a.json"), tmp_path / "out"))
    assert index.levels.tolist() == [1, 4, 8]


def test_images_are_never_truncated(models: dict[str, str], tmp_path: Path) -> None:
    long = turns("word " * 30, "a thing", "<image> and this", "a thing")
    tar = write_tar(tmp_path / "q.tar", {"a": (picture(0), long), "b": (picture(0), turns("q", "a"))})
    index, _ = index_of(finetuning(models, tar, tmp_path / "out"))
    assert len(index) == 1
    assert "would cut the image" in next(iter(index.facts.skipped))


def test_pretraining_needs_levels(models: dict[str, str], tmp_path: Path) -> None:
    tar = captions(tmp_path / "c.tar", 4, levels=None)
    with pytest.raises(UserError, match=r"pretraining needs levels.*`aligncurate bucket .*--levels 8"):
        index_of(pretraining(models, tar, tmp_path / "out"))
    index, _ = index_of(pretraining(models, tar, tmp_path / "none", align_mode="none"), levels=0)
    assert len(index) == 4
    mixed = {
        "a": (picture(0), {"caption": "x", "level": 3}),
        "b": (picture(0), {"caption": "y"}),
        "c": (None, turns("q", "a")),
    }
    index, _ = index_of(pretraining(models, write_tar(tmp_path / "m.tar", mixed), tmp_path / "mixed"))
    assert index.facts.skipped == {"no level": 1, "no image, which pretraining needs": 1}


def test_levels_above_the_models(models: dict[str, str], tmp_path: Path) -> None:
    tar = captions(tmp_path / "c.tar", 9, levels=9)
    with pytest.raises(UserError, match="c008 has level 9, but the model has 8 levels; pass --num-levels"):
        index_of(pretraining(models, tar, tmp_path / "out"))


def test_no_data(models: dict[str, str], tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "e.tar", "w"):
        pass
    with pytest.raises(UserError, match="the data has no rows"):
        index_of(pretraining(models, str(tmp_path / "e.tar"), tmp_path / "out"))
    with pytest.raises(UserError, match="no such file"):
        index_of(pretraining(models, str(tmp_path / "none.tar"), tmp_path / "out"))
    with pytest.raises(UserError, match="no data given"):
        index_of(StageConfig.pretrain(out=tmp_path / "out", **models))
    bad = write_tar(tmp_path / "b.tar", {"a": (picture(0), turns("q"))})
    with pytest.raises(UserError, match=r"no usable rows; 1 failed with: .*no answer \(such as a\)"):
        index_of(finetuning(models, bad, tmp_path / "out"))


def test_the_index_is_rebuilt_only_when_something_changed(models: dict[str, str], tmp_path: Path) -> None:
    config = pretraining(models, captions(tmp_path / "c.tar", 4), tmp_path / "out")
    index_of(config)
    file = tmp_path / "out" / "index.arrow"
    before = file.stat().st_mtime_ns
    index_of(config)
    assert file.stat().st_mtime_ns == before
    index_of(config.replace(max_length=88))
    assert file.stat().st_mtime_ns != before
    captions(tmp_path / "c.tar", 5)
    assert len(index_of(config)[0]) == 5
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["index.arrow", "index.json"]


def test_packed_batch(models: dict[str, str], tmp_path: Path) -> None:
    index, processor = index_of(finetuning(models, questions(tmp_path / "q.tar", 8), tmp_path / "out"))
    batch = BatchReader(index, processor, packed=True, with_levels=False)((0, 3, 1))
    lengths = [int(index.lengths[i]) for i in (0, 3, 1)]
    ids = [token for i in (0, 3, 1) for token in index.encoded(i).input_ids]
    assert batch.inputs["input_ids"][0, : len(ids)].tolist() == ids
    assert batch.inputs["input_ids"].shape[1] % 8 == 0
    assert (
        batch.inputs["sequence_ids"][0].tolist()[: sum(lengths)]
        == [1] * lengths[0] + [2] * lengths[1] + [3] * lengths[2]
    )
    assert not batch.inputs["sequence_ids"][0, sum(lengths) :].any()
    assert batch.inputs["pixel_values"].shape == (2, 3, 24, 24)
    supervised = [sum(label != -100 for label in index.encoded(i).labels) for i in (0, 3, 1)]
    assert torch.bincount(batch.token_samples).tolist() == supervised
    assert (batch.tokens, batch.images, batch.unreadable) == (sum(lengths), 2, ())


def test_an_unreadable_image_is_a_masked_dummy(models: dict[str, str], tmp_path: Path) -> None:
    samples = {f"s{n}": (picture(n), {"caption": f"a thing {n}", "level": n + 1}) for n in range(3)}
    samples["s1"] = (b"\x89PNG\r\n\x1a\n nothing more", samples["s1"][1])
    index, processor = index_of(pretraining(models, write_tar(tmp_path / "c.tar", samples), tmp_path / "out"))
    for packed in (True, False):
        batch = BatchReader(index, processor, packed=packed, with_levels=True)((0, 1, 2))
        assert batch.unreadable == (1,)
        assert batch.images == 2
        assert batch.inputs["levels"].tolist() == [1, 2, 3]
        assert not batch.inputs["pixel_values"][1].any()
        assert set(batch.token_samples.tolist()) == {0, 2}
        assert set(batch.token_levels.tolist()) == {1, 3}


def test_order_does_not_depend_on_threads(models: dict[str, str], tmp_path: Path) -> None:
    index, processor = index_of(pretraining(models, captions(tmp_path / "c.tar", 12), tmp_path / "out"))
    reader = BatchReader(index, processor, packed=True, with_levels=True)
    steps = [[(n, n + 1), (n + 2,)] for n in range(0, 12, 3)]
    for workers, ahead in ((1, 1), (4, 3)):
        read = list(read_ahead(steps, reader, workers=workers, ahead=ahead))
        assert [[micro.samples for micro in step] for step in read] == steps
        for step, packs in zip(read, steps, strict=True):
            for micro, pack in zip(step, packs, strict=True):
                assert torch.equal(micro.inputs["pixel_values"], reader(pack).inputs["pixel_values"])


def test_images_that_scoring_could_not_read_are_skipped(models: dict[str, str], tmp_path: Path) -> None:
    """A dataset records unreadable images; in a tar they are only noticed when they are read."""
    samples = {f"q{n}": (picture(n), turns("what", "a thing")) for n in range(4)}
    samples["q1"] = (b"no picture", samples["q1"][1])
    samples["q2"] = (picture(2)[:60], samples["q2"][1])
    tar = write_tar(tmp_path / "q.tar", samples)
    ingest([tar], tmp_path / "set", quiet=True)
    index, _ = index_of(finetuning(models, str(tmp_path / "set"), tmp_path / "a"))
    keys = [index.key(n) for n in range(len(index))]
    assert "q1" not in keys
    assert index.facts.skipped["decode_error"] == 4 - len(keys)
    assert index.facts.examples["decode_error"] == "q1"
    assert len(index_of(finetuning(models, tar, tmp_path / "b"))[0]) == 4


def test_images_are_those_that_were_scored(models: dict[str, str], tmp_path: Path) -> None:
    """If the tar was replaced by one with other images at the same offsets, they are treated as unreadable."""
    tar = captions(tmp_path / "c.tar", 3)
    ingest([tar], tmp_path / "set", quiet=True)
    index, processor = index_of(pretraining(models, str(tmp_path / "set"), tmp_path / "out"))
    data = Path(tar).read_bytes()
    Path(tar).write_bytes(data.replace(picture(1), picture(1)[:-1] + b"x"))
    reader = BatchReader(index, processor, packed=True, with_levels=True)
    batch = reader((0, 1, 2))
    assert batch.unreadable == (1,)
    assert reader.reasons([batch]) == [
        f"c001: the image cannot be read ({tar}: the image c001.png is not the one that was scored)"
    ]
    assert reader.reasons([batch]) == []


def test_the_digest_identifies_the_data(models: dict[str, str], tmp_path: Path) -> None:
    digests = []
    for number, (count, levels) in enumerate(((8, 8), (8, 8), (8, 4), (7, 8))):
        tar = captions(tmp_path / f"{number}.tar", count, levels)
        digests.append(index_of(pretraining(models, tar, tmp_path / "out"))[0].digest)
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


@pytest.mark.parametrize("mode", ["pad", "crop"])
@pytest.mark.parametrize("size", [(900, 30), (30, 901), (400, 100), (400, 1), (1, 1), (64, 48)])
def test_long_strips_need_little_memory(
    models: dict[str, str], mode: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No intermediate image is large, and the pixels are those of the direct computation."""
    processor = build_processor(pretraining(models, "x", Path("y"), image_mode=mode))
    y, x = np.mgrid[: size[1], : size[0]]
    image = Image.fromarray(np.stack([60 + 40 * np.sin(x / 90), 80 + 40 * np.cos(y / 90), 0 * x], 2).astype(np.uint8))
    expected = processor.process_images([image])
    monkeypatch.setattr(pixels, "MAX_PIXELS", limit := 10_000)
    areas: list[int] = []
    for name in ("resize", "crop"):
        real = getattr(Image.Image, name)

        def spy(self: Image.Image, *given: Any, real: Any = real, **named: Any) -> Image.Image:
            made = real(self, *given, **named)
            areas.append(made.width * made.height)
            return made

        monkeypatch.setattr(Image.Image, name, spy)
    ours = processor.process_images([image])
    assert max(areas) <= limit
    if mode == "crop" or 10 * min(size) > max(size):  # others are thinner than a pixel
        assert (ours - expected).abs().mean() < 0.03


def test_images_of_every_mode(models: dict[str, str]) -> None:
    """Alpha, palettes, CMYK, one bit and floats become 8-bit RGB, without a warning."""
    kinds = {
        "RGBA": ((200, 10, 10, 0), "PNG", {}, (200, 10, 10)), "CMYK": ((0, 255, 255, 0), "JPEG", {}, (255, 0, 0)),
        "P": (0, "PNG", {"transparency": b"\x00\x10"}, (0, 0, 0)), "L": (100, "PNG", {}, (100, 100, 100)),
        "1": (1, "PNG", {}, (255, 255, 255)), "LA": ((9, 0), "PNG", {}, (9, 9, 9)), "F": (7.0, "TIFF", {}, (7, 7, 7)),
    }  # fmt: skip
    for mode, (colour, kind, options, expected) in kinds.items():
        buffer = io.BytesIO()
        Image.new(mode, (20, 16), colour).save(buffer, kind, **options)
        image = load_rgb(buffer.getvalue())
        assert image.mode == "RGB"
        assert image.getpixel((3, 3)) == pytest.approx(expected, abs=3), mode


def test_sixteen_bits_are_not_all_white() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), 100 << 8, np.uint16)).save(buffer, "PNG")
    assert load_rgb(buffer.getvalue()).getpixel((1, 1)) == (100, 100, 100)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_windows_line_endings(models: dict[str, str], tmp_path: Path, newline: str) -> None:
    """In JSON Lines and in TOML settings."""
    lines = [json.dumps({"id": f"q{n}", **turns("what", "a thing")}) for n in range(3)]
    (tmp_path / "q.jsonl").write_bytes(newline.join(lines).encode())
    index, processor = index_of(finetuning(models, str(tmp_path / "q.jsonl"), tmp_path / "out"))
    assert len(index) == 3
    assert index.encoded(1) == processor.encode(turns("what", "a thing")["conversations"], has_image=False)
    (tmp_path / "run.toml").write_bytes(newline.join(["epochs = 2", 'template = "v1"', ""]).encode())
    assert StageConfig.from_toml(tmp_path / "run.toml", "finetune").epochs == 2


def test_a_tokenizer_without_padding_token(models: dict[str, str]) -> None:
    assert tokenizer().pad_token is None
    assert build_processor(pretraining(models, "x", Path("y"))).tokenizer.pad_token == "<unk>"
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer().backend_tokenizer)
    with pytest.raises(ValueError, match="no padding, unknown or end token"):
        AlignGPTProcessor(build_processor(pretraining(models, "x", Path("y"))).image_processor, bare)
