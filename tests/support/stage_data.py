"""A tiny LLM, a tiny vision tower and tiny data in folders, for the tests of training."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, CLIPImageProcessor, CLIPVisionModel, PreTrainedTokenizerFast

from aligntrain import StageConfig
from tests.support import inputs
from tests.support.small_models import CLIP, LLAMA

SPECIALS = ["<unk>", "<s>", "</s>"]
FAST: dict[str, Any] = {
    "dtype": "fp32", "max_length": 96, "token_budget": 128, "batch_size": 8, "workers": 2, "log_every": 1,
    "attention": "eager",
}  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, with Llama's special tokens and no padding token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(SPECIALS + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


CHAT = "{% for m in messages %}{{ m['content'] + (eos_token if m['role'] == 'assistant' else '?') }}{% endfor %}"


def make_models(folder: Path) -> dict[str, str]:
    """`llm` and `vision` folders with random weights."""
    torch.manual_seed(0)
    tok = tokenizer()
    tok.chat_template = CHAT
    text = AutoConfig.for_model(**{**LLAMA, "vocab_size": len(tok), "pad_token_id": None})
    lm = AutoModelForCausalLM.from_config(text)
    with torch.no_grad():  # larger than the usual initial weights, which leave every logit near zero
        for parameter in lm.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    lm.save_pretrained(folder / "llm")
    tok.save_pretrained(folder / "llm")
    CLIPVisionModel(AutoConfig.for_model(**CLIP)).save_pretrained(folder / "vision")
    size = CLIP["image_size"]
    CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(
        folder / "vision"
    )
    return {"llm": str(folder / "llm"), "vision": str(folder / "vision")}


def picture(number: int) -> bytes:
    """A small PNG in one colour per number."""
    pixels = np.full((20 + number % 3, 26, 3), [(37 * number) % 256, (91 * number) % 256, 80], np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, samples: dict[str, tuple[bytes | None, dict[str, Any]]]) -> str:
    """A tar as `aligncurate export` writes it: key -> image and content of its .json."""
    members = {
        key: {"json": json.dumps(meta).encode(), **({} if image is None else {"png": image})}
        for key, (image, meta) in samples.items()
    }
    return str(inputs.write_tar(path, members))


def captions(path: Path, count: int = 24, levels: int | None = 8) -> str:
    """Images with captions of different lengths and levels 1, 2, …, N, 1, …"""
    samples = {}
    for n in range(count):
        meta: dict[str, Any] = {"caption": f"a thing number {n} " + "very " * (n % 4) + "small"}
        if levels is not None:
            meta["level"] = n % levels + 1
        samples[f"c{n:03d}"] = (picture(n), meta)
    return write_tar(path, samples)


def questions(path: Path, count: int = 24) -> str:
    """Questions and answers; every fourth has no image."""
    samples = {}
    for n in range(count):
        turns = [
            {"from": "human", "value": "what is it" + "?" * (n % 5)},
            {"from": "gpt", "value": f"thing {n}"},
            {"from": "human", "value": "sure"},
            {"from": "gpt", "value": "yes"},
        ][: 2 + 2 * (n % 2)]
        samples[f"q{n:03d}"] = (None if n % 4 == 3 else picture(n), {"conversations": turns})
    return write_tar(path, samples)


def pretraining(models: dict[str, str], data: str, out: Path, **settings: Any) -> StageConfig:
    return StageConfig.pretrain(data=[data], out=out, **models, **{**FAST, **settings})


def finetuning(start: dict[str, str], data: str, out: Path, **settings: Any) -> StageConfig:
    return StageConfig.finetune(data=[data], out=out, **start, **{**FAST, "template": "chat", **settings})
