"""Conversations and images to model inputs: ids, labels, pixels, prompts."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from aligncurate.errors import UserError
from aligntrain import AlignGPTProcessor
from aligntrain.inputs.tokenizer import load_tokenizer
from tests.support.small_models import CLIP, tiny
from tests.support.web import serving

PATCHES, SIDE = 9, 24
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + ('model' if m['role'] == 'assistant' else 'user') + '\n'"
    " + m['content'] | trim + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}"
    "{% endif %}"
)
# Shortens earlier answers, like templates of reasoning models, which drop earlier reasoning.
FORGETS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ (m['content'] if loop.last or m['role'] == 'user' else '...') + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TURNS = [
    {"role": "user", "text": "<image>\nWhat is in the room?"},
    {"role": "assistant", "text": "A red chair"},
    {"role": "user", "text": "And on it?"},
    {"role": "assistant", "text": "3 books"},
]


def tokenizer(bos: bool = False, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer, as most LLMs have, with ChatML's special tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<s>", "<|im_start|>", "<|im_end|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([turn["text"] for turn in TURNS] * 3, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>", "<|end|>"],
        chat_template=chat_template,
    )


def processor(tok: Any = None, **settings: Any) -> AlignGPTProcessor:
    tok = tokenizer(bos=True) if tok is None else tok
    settings = {"num_patches": PATCHES, "pixel_size": SIDE, **settings}
    return AlignGPTProcessor(CLIPImageProcessor(), tok, **settings)


def learned(proc: AlignGPTProcessor, labels: list[int]) -> list[str]:
    """Each run of labelled tokens, as text."""
    texts: list[list[int]] = []
    for before, label in zip([-100, *labels], labels, strict=False):
        if label != -100:
            if before == -100:
                texts.append([])
            texts[-1].append(label)
    return [proc.tokenizer.decode(ids) for ids in texts]


@pytest.fixture(scope="module")
def official(parity: Path) -> tuple[Path, list[dict[str, Any]]]:
    folder = parity / "templates"
    return folder / "tokenizer", json.loads((folder / "conversations.json").read_text())


@pytest.mark.parametrize("template", ["plain", "v1"])
@pytest.mark.parametrize("saved", [False, True])
def test_official_templates(
    template: str, saved: bool, official: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    folder, conversations = official
    # The official ids were made by a tokenizer that reads "</s>" as text.
    tok = load_tokenizer(folder, split_special_tokens=True)
    proc = processor(tok, template=template, num_patches=1)
    if saved:
        proc.save_pretrained(tmp_path)
        proc = AutoProcessor.from_pretrained(tmp_path)
    pieces = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    samples = [sample for sample in conversations if sample["template"] == template]
    assert len(samples) == 11
    for sample in samples:
        encoded = proc.encode(sample["conversations"], has_image=sample["has_image"])
        pairs = [p for p in zip(encoded.input_ids, encoded.labels, strict=True) if p[0] != proc.align_token_id]
        assert len(encoded.input_ids) - len(pairs) == sample["has_image"]
        assert [-200 if i == proc.image_token_id else i for i, _ in pairs] == sample["input_ids"]
        if template == "plain":
            assert [label for _, label in pairs] == sample["labels"]
            continue
        turns = sample["conversations"][sample["conversations"][0]["from"] == "gpt" :]
        answers = [pieces.encode(turn["value"] + "</s>") for turn in turns if turn["from"] == "gpt"]
        assert [label for _, label in pairs if label != -100] == [i for answer in answers for i in answer]
        assert all(label in (-100, i) for i, label in pairs)


def test_vicuna_ends_answers_with_one_token(official: tuple[Path, list[dict[str, Any]]]) -> None:
    proc = processor(load_tokenizer(official[0]))
    assert proc.tokenizer.pad_token == "<unk>"
    encoded = proc.encode(TURNS, has_image=True)
    assert encoded.input_ids[:2] == [1, proc.align_token_id]
    assert [i for i in encoded.labels if i != -100].count(2) == 2
    assert encoded.labels[-1] == 2
    assert learned(proc, encoded.labels) == ["A red chair</s>", "3 books</s>"]


@pytest.mark.parametrize(
    ("bos", "template", "starts"),
    [(False, CHATML, "<|im_start|>"), (True, CHATML, "<s>"), (True, GEMMA, "<s>"), (False, GEMMA, "<s>")],
)
def test_chat_templates_of_other_llms(bos: bool, template: str, starts: str) -> None:
    proc = processor(tokenizer(bos, template), template="chat")
    encoded = proc.encode(TURNS, has_image=True)
    assert learned(proc, encoded.labels) == ["A red chair<|im_end|>", "3 books<|im_end|>"]
    text = proc.tokenizer.decode([i for i in encoded.input_ids if i != proc.align_token_id])
    assert text.startswith(starts)
    assert text.count("<s>") == (starts == "<s>")
    assert encoded.input_ids.index(proc.align_token_id) == (starts == "<s>")
    assert encoded.input_ids.count(proc.image_token_id) == PATCHES
    assert encoded.labels[encoded.gate_length] != -100
    assert set(encoded.labels[: encoded.gate_length]) == {-100}


def test_a_template_that_changes_earlier_turns_is_refused() -> None:
    proc = processor(tokenizer(chat_template=FORGETS), template="chat")
    assert learned(proc, proc.encode(TURNS[:2], has_image=True).labels) == ["A red chair<|im_end|>"]
    with pytest.raises(ValueError, match="sample 'k7': the chat template changes earlier turns"):
        proc.encode(TURNS, has_image=True, key="k7")


def test_text_only_has_neither_image_nor_align() -> None:
    proc = processor()
    encoded = proc.encode([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}], has_image=False)
    assert not {proc.image_token_id, proc.align_token_id} & set(encoded.input_ids)
    assert learned(proc, encoded.labels) == [" Yes<|im_end|>"]
    assert processor(align=False).encode(TURNS, has_image=True).input_ids.count(proc.align_token_id) == 0


def test_image_goes_to_the_front_of_its_question() -> None:
    proc = processor()
    texts = (
        "<image>\nWhat is it?",
        "What is it?<image>",
        "What is it?",
        [{"type": "image"}, {"type": "text", "text": "What is it?"}],
    )
    ids = [
        proc.encode(
            [{"role": "user", "content": t}, {"role": "assistant", "content": "A chair"}], has_image=True
        ).input_ids
        for t in texts
    ]
    assert ids[0] == ids[1] == ids[2] == ids[3]


def test_many_at_once_are_encoded_as_one_by_one() -> None:
    proc = processor(max_length=230)
    talk = [({"role": "user", "text": f"What is {n}?"}, {"role": "assistant", "text": "red " * n}) for n in range(30)]
    samples: list[Any] = [(turns, n % 3 == 0) for n, turns in enumerate(talk)]
    samples += [([], False), (TURNS[:1], True), (TURNS, False), ([{"role": "user", "text": "<align>"}, TURNS[1]], True)]
    outcomes: set[type] = set()
    for (turns, has_image), result in zip(samples, proc.encode_all(samples), strict=True):
        outcomes.add(type(result))
        try:
            assert result == proc.encode(turns, has_image=has_image)
        except ValueError as error:
            assert str(result) == str(error)
    assert len(outcomes) == 2 and proc.encode_all([]) == []


def test_caption() -> None:
    proc = processor(template="plain")
    encoded = proc.encode_caption("A red chair")
    assert learned(proc, encoded.labels) == ["A red chair\n"]
    assert encoded.input_ids[: 2 + PATCHES] == [0, proc.align_token_id, *[proc.image_token_id] * PATCHES]
    with pytest.raises(ValueError, match="exactly one question and one answer"):
        proc.encode(TURNS, has_image=True)


def test_too_long_is_cut_at_the_end() -> None:
    whole = processor().encode(TURNS, has_image=True)
    length = len(whole.input_ids) - 3
    cut = processor(max_length=length).encode(TURNS, has_image=True)
    assert (cut.input_ids, cut.labels, cut.truncated) == (whole.input_ids[:length], whole.labels[:length], 3)
    first = whole.gate_length
    with pytest.raises(ValueError, match=r"sample 'k': the first \d+ tokens \(max_length\) have no answer"):
        processor(max_length=first).encode(TURNS, has_image=True, key="k")
    with pytest.raises(ValueError, match="would cut the image"):
        processor(max_length=PATCHES).encode(TURNS, has_image=True)
    prompt = processor(max_length=first).encode(TURNS[:1], has_image=True, training=False)
    assert prompt.input_ids == whole.input_ids[: len(prompt.input_ids)]


@pytest.mark.parametrize(
    ("turns", "has_image", "message"),
    [
        ([], False, "no question"),
        (TURNS[:1], True, "has no answer"),
        (TURNS[1:2], False, "no question"),
        ([TURNS[0], {"role": "assistant", "text": ""}], True, "have no answer to learn"),
        ([*TURNS[:2], TURNS[1]], True, "must alternate"),
        ([{"role": "user", "text": "<image><image> Two?"}, TURNS[1]], True, "2 times"),
        (TURNS, False, "but the sample has no image"),
        ([TURNS[2], {"role": "assistant", "text": "<image>"}], True, "in a turn of the assistant"),
        ([{"role": "tool", "text": "x"}], False, "role 'tool'"),
        ([{"role": "user", "text": "an <align> tag"}, TURNS[1]], False, "reserved"),
    ],
)
def test_irregular_conversations_are_errors(turns: Any, has_image: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        processor().encode(turns, has_image=has_image, key="shard-3/000017")
    assert "'shard-3/000017'" in str(error.value)


def test_an_opening_answer_is_dropped() -> None:
    proc = processor()
    opened = [{"from": "gpt", "value": "Welcome"}, *TURNS]
    assert proc.encode(opened, has_image=True) == proc.encode(TURNS, has_image=True)


def expand2square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """LLaVA's own padding."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    result = Image.new(image.mode, (side, side), colour)
    result.paste(image, (0, (width - height) // 2) if width > height else ((height - width) // 2, 0))
    return result


@pytest.mark.parametrize("size", [(50, 31), (31, 50), (24, 24), (17, 40), (640, 427)])
@pytest.mark.parametrize("mode", ["pad", "crop"])
def test_pixels_are_the_official_ones(size: tuple[int, int], mode: str) -> None:
    array = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(array)
    theirs = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    square = expand2square(image, tuple(int(x * 255) for x in theirs.image_mean)) if mode == "pad" else image
    expected = torch.as_tensor(np.stack(theirs(square)["pixel_values"]))
    pixels = processor(image_mode=mode).process_images([image])
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels, expected, rtol=1e-5, atol=1e-5)


def test_pictures_of_other_modes_and_towers() -> None:
    proc = AlignGPTProcessor(SiglipImageProcessor(), tokenizer(bos=True), num_patches=9, pixel_size=SIDE)
    grey, alpha, palette = (Image.new(m, (30, 20)) for m in ("L", "RGBA", "P"))
    assert proc.process_images([grey, alpha, palette]).shape == (3, 3, SIDE, SIDE)
    assert float(proc.process_images([Image.new("RGB", (8, 8), (255, 255, 255))]).mean()) == pytest.approx(1.0)


def test_prompts_equal_the_start_of_training_samples(tmp_path: Path) -> None:
    """A prompt is the start of its training sample; saved and reloaded, model and processor answer the same."""
    proc = processor()
    vocab = len(proc.tokenizer)
    model = tiny({"vocab_size": vocab}, image_token_id=proc.image_token_id, align_token_id=proc.align_token_id).eval()
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    question = [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]}
    ]
    text_only = [{"role": "user", "content": "Who are you?"}]
    inputs = proc.apply_chat_template(
        [question, text_only], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert inputs["pixel_values"].shape == (1, 3, SIDE, SIDE)
    answered = [*question, {"role": "assistant", "content": "A chair"}]
    sample = proc.encode(answered, has_image=True)
    start = inputs["input_ids"][0][inputs["attention_mask"][0].bool()].tolist()
    assert start == sample.input_ids[: len(start)]
    assert len(start) == sample.gate_length

    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    ids = model.generate(**inputs, **options)
    alone = proc.apply_chat_template(text_only, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert model.generate(**alone, **options)[0, -5:].tolist() == ids[1, -5:].tolist()
    text = proc.apply_chat_template([question, text_only], add_generation_prompt=True)
    called = proc(text=text, images=[picture])
    assert {k: v.tolist() for k, v in called.items()} == {k: v.tolist() for k, v in inputs.items()}

    model.save_pretrained(tmp_path)
    proc.save_pretrained(tmp_path)
    again, proc2 = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(proc2, AlignGPTProcessor)
    assert (proc2.num_patches, proc2.pixel_size, proc2.template) == (PATCHES, SIDE, "v1")
    inputs2 = proc2.apply_chat_template(
        [question, text_only], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert again.generate(**inputs2, **options).tolist() == ids.tolist()
    assert proc2.decode(ids[0], skip_special_tokens=True).startswith("A chat between")


@pytest.mark.parametrize("gate_text", ["instruction", "all"])
def test_gate_of_a_longer_chat(gate_text: str) -> None:
    proc = processor(gate_text=gate_text)
    picture = Image.new("RGB", (30, 30))
    inputs = proc.apply_chat_template(
        TURNS[:3], images=picture, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    sample = proc.encode(TURNS, has_image=True)
    length = inputs["input_ids"].shape[1]
    assert inputs["input_ids"][0].tolist() == sample.input_ids[:length]
    expected = sample.gate_length if gate_text == "instruction" else length
    assert inputs["gate_mask"][0].tolist() == [True] * expected + [False] * (length - expected)


def test_wrong_number_of_pictures() -> None:
    proc = processor()
    picture = Image.new("RGB", (30, 30))
    with pytest.raises(ValueError, match="1 prompts have <image>, but 0 images"):
        proc(text="<image> What?")
    with pytest.raises(ValueError, match="0 prompts have <image>, but 1 images"):
        proc(text="What?", images=picture)
    with pytest.raises(ValueError, match="2 times"):
        proc(text="<image> <image>", images=[picture, picture])


@pytest.fixture
def turned(tmp_path: Path) -> Path:
    """A photo that has to be turned upright."""
    image = Image.new("RGB", (40, 20))
    image.paste((255, 0, 0), (0, 0, 20, 20))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    return tmp_path / "a.jpg"


def test_pictures_are_the_same_however_they_are_given(turned: Path) -> None:
    data = turned.read_bytes()
    text = base64.b64encode(data).decode()
    with serving() as server:
        server.files["/a.jpg"] = data
        url = f"web://{server.address}/a.jpg"
        given = [turned, str(turned), turned.as_uri(), data, text, f"data:image/jpeg;base64,{text}", url]
        pixels = [processor()(images=image, text="<image>")["pixel_values"] for image in [Image.open(turned), *given]]
        assert all(torch.equal(pixels[0], other) for other in pixels[1:])
        with pytest.raises(UserError, match=r"none\.jpg: the image cannot be read \(No such file"):
            processor()(images=f"web://{server.address}/none.jpg", text="<image>")


def test_pictures_of_other_formats_and_sizes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow alone would open the EPS, by starting Ghostscript, and the bomb."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    (tmp_path / "a.txt").write_text("no image")
    os.mkfifo(tmp_path / "pipe.jpg")
    proc = processor()
    for name, reason in {
        "a.eps": "not an image", "bomb.png": "pixels", "a.txt": "not an image", "none.jpg": "No such file",
        "pipe.jpg": "pipe",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=reason) as refused:
            proc(images=str(tmp_path / name), text="<image>")
        assert str(tmp_path / name) in str(refused.value)
    with pytest.raises(UserError, match=r"nowhere://a\.jpg: .*nowhere"):
        proc(images="nowhere://a.jpg", text="<image>")
    with pytest.raises(UserError, match="an image is given as int"):
        proc(images=3, text="<image>")


def test_padding_batches() -> None:
    proc = processor()
    long, short = proc.encode(TURNS, has_image=True), proc.encode(TURNS[:2], has_image=True)
    gap = len(long.input_ids) - len(short.input_ids)
    for side, real in (("right", slice(0, -gap)), ("left", slice(gap, None))):
        rows = proc.pad([long, short], side)
        assert rows["input_ids"][1, real].tolist() == short.input_ids
        assert rows["labels"][1, real].tolist() == short.labels
        assert rows["attention_mask"].sum(1).tolist() == [len(long.input_ids), len(short.input_ids)]
        assert rows["gate_mask"].sum(1).tolist() == [long.gate_length, short.gate_length]


def test_from_components(parity: Path) -> None:
    proc = AlignGPTProcessor.from_components(
        parity / "templates" / "tokenizer", parity / "parity-a" / "clip-tiny-336", s2_scales=[336, 672]
    )
    assert (proc.num_patches, proc.pixel_size) == (576, 672)
    assert CLIP["patch_size"] == 8
    with pytest.raises(ValueError, match="has no chat template"):
        processor(template="chat")
    with pytest.raises(ValueError, match="template is 'v0'"):
        processor(template="v0")
    with pytest.raises(ValueError, match="image_mode is 'squash'"):
        processor(image_mode="squash")
