"""The towers against open_clip's own encode_image and encode_text: cut, grouped, compiled, short of memory."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import open_clip
import pytest
import torch

from aligncurate.encoders.towers import Towers, batch_that_fits, causal_text_tower
from aligncurate.errors import UserError

# torch warns on Python 3.13.0 alone, whose bug makes compiled code check its guards more slowly.
pytestmark = pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49_408, "width": 32, "heads": 2, "layers": 2},
}
TEXTS = ["a dog", "!", "", "two cats sleep on a red sofa beside an open window", "woof " * 200, "a bird"]


def build(custom: bool = False, **text) -> torch.nn.Module:
    torch.manual_seed(0)
    kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    net = kind(**{**CONFIG, "text_cfg": CONFIG["text_cfg"] | text}).eval()
    for parameter in net.parameters():  # open_clip starts positions so small that a mistake with them would not show
        torch.nn.init.normal_(parameter, std=0.1)
    return net


MODELS = {
    "CLIP": (build(), True),
    "CLIP, pooled at the end token": (build(pool_type="eos", eos_id=49_407), True),
    "custom text": (build(custom=True), True),
    "custom text, pooled at the end token": (build(custom=True, pool_type="eos", eos_id=49_407), True),
    "custom text with a linear projection": (build(custom=True, proj_bias=True), True),
    "not causal": (build(custom=True, no_causal_mask=True), False),
    "pooled at the last token": (build(custom=True, pool_type="last"), False),
    "pooled at a class token": (build(custom=True, embed_cls=True), False),
}


def towers(net: torch.nn.Module, **options) -> Towers:
    return Towers(net, lambda pixels: pixels, torch.device("cpu"), torch.float32, **options)


@torch.no_grad()
def plain(net: torch.nn.Module, pixels: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    images, texts = net.encode_image(pixels), net.encode_text(tokens)
    return images / images.norm(dim=-1, keepdim=True), texts / texts.norm(dim=-1, keepdim=True)


def inputs(count: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    texts = (TEXTS * count)[:count]
    pixels = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return pixels, open_clip.get_tokenizer("ViT-B-32")(texts)


@pytest.mark.parametrize("batch", [1, 3, 64])
@pytest.mark.parametrize("name", MODELS)
def test_embeddings_are_open_clips(name, batch) -> None:
    net, cut = MODELS[name]
    assert (causal_text_tower(net) is not None) is cut
    for found, expected in zip(towers(net, batch=batch).embed(*inputs()), plain(net, *inputs()), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_texts_are_grouped_by_length_and_cut_at_the_longest(monkeypatch) -> None:
    net, _ = MODELS["CLIP"]
    seen = []
    real = net.transformer.forward
    monkeypatch.setattr(net.transformer, "forward", lambda x, **o: (seen.append(tuple(x.shape[:2])), real(x, **o))[1])
    pixels, tokens = inputs(6)
    towers(net, batch=2).embed(pixels, tokens)
    # 2 images, so 32 tokens of text at once: "", "!", "a bird" and "a dog" together, the long ones alone.
    assert seen == [(4, 4), (1, 13), (1, 77)]


def test_compiled_towers_see_few_shapes(monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    net, _ = MODELS["CLIP"]
    compiled = towers(net, batch=4, compiled=True)
    shapes = {"image": set(), "text": set()}
    for name in shapes:
        real = getattr(compiled, f"_{name}")
        monkeypatch.setattr(
            compiled, f"_{name}", lambda x, n=name, real=real: (shapes[n].add(tuple(x.shape)), real(x))[1]
        )
    for found, expected in zip(compiled.embed(*inputs()), plain(net, *inputs()), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert shapes == {"image": {(4, 3, 32, 32)}, "text": {(4, 16), (1, 77)}}  # at most 64 tokens of text


def test_a_batch_that_does_not_fit_is_done_in_smaller_ones(monkeypatch, capsys) -> None:
    net = build()
    room, tried = 3, []
    real = net.encode_image

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        tried.append(len(pixels))
        if len(pixels) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(pixels)

    monkeypatch.setattr(net, "encode_image", encode)
    small = towers(net, batch=8)
    for found, expected in zip(small.embed(*inputs(7)), plain(build(), *inputs(7)), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert tried == [7, 3, 3, 1] and small.batch == 3
    room = 0
    with pytest.raises(UserError, match="not enough memory for even one pair"):
        small.embed(*inputs(7))


@pytest.mark.parametrize(
    ("free", "few", "many", "expected"),
    [
        (1_000_000, (8, 8_000), (24, 24_000), 512),  # 600 rows of 1,000 bytes fit
        (1_000_000, (8, 108_000), (24, 124_000), 256),  # 500 do beside what is always there
        (10**12, (8, 8_000), (24, 24_000), 512),
        (1_000, (8, 8_000), (24, 24_000), 1),
        (10**9, (8, 8_000), (24, 8_000), 512),
    ],
)
def test_the_batch_that_fits(free, few, many, expected) -> None:
    assert batch_that_fits(free, few, many) == expected


@pytest.mark.parametrize("compiled", [False, True])
def test_memory_is_measured_with_full_texts_and_no_padding(monkeypatch, compiled) -> None:
    net = build()
    seen: dict[str, list[tuple[int, ...]]] = {"image": [], "text": []}
    image, text = net.encode_image, net.transformer.forward
    monkeypatch.setattr(net, "encode_image", lambda x: (seen["image"].append(tuple(x.shape)), image(x))[1])
    monkeypatch.setattr(
        net.transformer, "forward", lambda x, **o: (seen["text"].append(tuple(x.shape[:2])), text(x, **o))[1]
    )
    small = towers(net, batch=32, compiled=compiled)
    peaks = iter([9_000, 8_000, 24_000])
    for name, fake in {
        "reset_peak_memory_stats": lambda device: None,
        "memory_allocated": lambda device: 0,
        "max_memory_allocated": lambda device: next(peaks),
        "mem_get_info": lambda device: (1_000_000, 2_000_000),
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    assert small.fitting_batch(32, 77) == 512
    assert seen["image"] == [(rows, 3, 32, 32) for rows in (8, 8, 24)]
    assert seen["text"] == [(1, 77)] * 16 + [(4, 77)] * 6  # 16 tokens of text for each image
    assert small.batch == 32


def test_a_compiled_batch_that_does_not_fit_is_halved_though_it_has_one_pair(monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    net = build()
    real = net.encode_image

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        if len(pixels) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(pixels)

    monkeypatch.setattr(net, "encode_image", encode)
    small = towers(net, batch=16, compiled=True)
    for found, expected in zip(small.embed(*inputs(1)), plain(build(), *inputs(1)), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert small.batch == 4


def test_an_upload_is_waited_for_by_the_thread_that_asked(monkeypatch) -> None:
    calls = []

    class Stream:
        def __init__(self, device: torch.device) -> None:
            assert device.type == "cuda"

        def synchronize(self) -> None:
            calls.append("synchronize")

    @contextmanager
    def stream(stream: Stream) -> Iterator[None]:
        calls.append("enter stream")
        yield
        calls.append("leave stream")

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        calls.append("pin")
        return tensor

    def to(tensor: torch.Tensor, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
        calls.append(f"copy to {device.type}, non_blocking={non_blocking}")
        return tensor

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", to)
    on_gpu = Towers(build(), lambda p: p, torch.device("cuda"), torch.float32)
    pixels = torch.rand(3, 3, 2, 2)
    assert torch.equal(on_gpu.upload(pixels), pixels)
    assert calls == ["enter stream", "pin", "copy to cuda, non_blocking=True", "leave stream", "synchronize"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_gives_the_same_embeddings(compiled) -> None:
    device = torch.device("cuda")
    net, _ = MODELS["CLIP"]
    found = Towers(build().to(device), lambda p: p, device, torch.float32, batch=4, compiled=compiled)
    pixels, tokens = inputs()
    for ours, expected in zip(found.embed(found.upload(pixels), tokens), plain(net, pixels, tokens), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
    assert found.fitting_batch(32, 77) == 512  # a tiny tower: more is of no use
