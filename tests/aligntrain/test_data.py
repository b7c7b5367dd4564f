"""From data to batches: what is indexed, what is left out and why, and what a batch holds."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_data import captions, finetuning, make_models, picture, pretraining, questions, tokenizer, write_tar

from aligncurate.errors import UserError
from aligncurate.scoring import ingest
from aligntrain import AlignGPTProcessor, StageConfig
from aligntrain.build import build_processor
from aligntrain.data import Reader, read_ahead
from aligntrain.index import Index, build_index

LEVELS = 8


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_models(tmp_path_factory.mktemp("models"))


def index_of(config: StageConfig, levels: int = LEVELS) -> tuple[Index, AlignGPTProcessor]:
    processor = build_processor(config)
    Path(config.out).mkdir(exist_ok=True)
    return build_index(config, processor, levels, Path(config.out) / "index.arrow"), processor


def turns(*texts: str) -> dict[str, Any]:
    return {"conversations": [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]}


def test_index_gives_back_what_was_encoded(models: dict[str, str], tmp_path: Path) -> None:
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
def test_datasets_are_like_the_tars_they_came_from(models: dict[str, str], tmp_path: Path, embed: bool) -> None:
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


def test_rows_are_left_out_by_cause(models: dict[str, str], tmp_path: Path) -> None:
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
    kept = [index.key(n) for n in range(len(index))]
    assert kept == ["good", "answer_first", "long"]  # an answer before the first question is dropped, not the row
    assert facts.truncated == 1
    assert index.lengths[2] == 96
    assert sorted(facts.examples.values()) == sorted(["only_answer", "no_answer", "two", "no_picture"])
    assert sum(facts.skipped.values()) == 4


def test_never_cut_through_the_image(models: dict[str, str], tmp_path: Path) -> None:
    long = turns("word " * 30, "a thing", "<image> and this", "a thing")
    tar = write_tar(tmp_path / "q.tar", {"a": (picture(0), long), "b": (picture(0), turns("q", "a"))})
    index, _ = index_of(finetuning(models, tar, tmp_path / "out"))
    assert len(index) == 1
    assert "through the image" in next(iter(index.facts.skipped))


def test_pretraining_needs_levels(models: dict[str, str], tmp_path: Path) -> None:
    tar = captions(tmp_path / "c.tar", 4, levels=None)
    with pytest.raises(UserError, match=r"the data has no levels.*`aligncurate bucket .*--levels 8"):
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


def test_levels_beyond_the_models(models: dict[str, str], tmp_path: Path) -> None:
    tar = captions(tmp_path / "c.tar", 9, levels=9)
    with pytest.raises(UserError, match="c008 has level 9, but the model has 8 levels; say --num-levels"):
        index_of(pretraining(models, tar, tmp_path / "out"))


def test_no_data(models: dict[str, str], tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "e.tar", "w"):
        pass
    with pytest.raises(UserError, match="the data has no rows"):
        index_of(pretraining(models, str(tmp_path / "e.tar"), tmp_path / "out"))
    with pytest.raises(UserError, match="no such file"):
        index_of(pretraining(models, str(tmp_path / "none.tar"), tmp_path / "out"))
    with pytest.raises(UserError, match="no data was given"):
        index_of(StageConfig.pretrain(out=tmp_path / "out", **models))
    bad = write_tar(tmp_path / "b.tar", {"a": (picture(0), turns("q"))})
    with pytest.raises(UserError, match=r"no row can be trained on; of 1 the reason is: .*no answer \(a\)"):
        index_of(finetuning(models, bad, tmp_path / "out"))


def test_the_index_is_made_again_only_when_something_changed(models: dict[str, str], tmp_path: Path) -> None:
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
    batch = Reader(index, processor, packed=True, with_levels=False)((0, 3, 1))
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
        batch = Reader(index, processor, packed=packed, with_levels=True)((0, 1, 2))
        assert batch.unreadable == (1,)
        assert batch.images == 2
        assert batch.inputs["levels"].tolist() == [1, 2, 3]
        assert not batch.inputs["pixel_values"][1].any()
        assert set(batch.token_samples.tolist()) == {0, 2}
        assert set(batch.token_levels.tolist()) == {1, 3}


def test_order_does_not_depend_on_threads(models: dict[str, str], tmp_path: Path) -> None:
    index, processor = index_of(pretraining(models, captions(tmp_path / "c.tar", 12), tmp_path / "out"))
    reader = Reader(index, processor, packed=True, with_levels=True)
    steps = [[(n, n + 1), (n + 2,)] for n in range(0, 12, 3)]
    for workers, ahead in ((1, 1), (4, 3)):
        read = list(read_ahead(steps, reader, workers=workers, ahead=ahead))
        assert [[micro.samples for micro in step] for step in read] == steps
        for step, packs in zip(read, steps, strict=True):
            for micro, pack in zip(step, packs, strict=True):
                assert torch.equal(micro.inputs["pixel_values"], reader(pack).inputs["pixel_values"])


def test_a_tokenizer_without_padding_token(models: dict[str, str]) -> None:
    assert tokenizer().pad_token is None
    assert build_processor(pretraining(models, "x", Path("y"))).tokenizer.pad_token == "<unk>"
