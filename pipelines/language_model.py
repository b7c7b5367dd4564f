"""Trains small causal LLMs from scratch: a tokenizer, a Llama of a few layers and a simple training loop.

Used by `pipelines.photos` and `pipelines.tiny_models`, so that they run without downloading an LLM.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from aligntrain.model.loading import quiet_transformers

UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"
IGNORE = -100
# Vicuna's template without its system prompt, which would be half of the tokens of texts this short.
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
    "{% elif m['role'] == 'assistant' %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def make_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocabulary` tokens; it can encode any text."""
    backend = Tokenizer(models.BPE(unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[UNKNOWN, BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    begin = (BEGIN, backend.token_to_id(BEGIN))
    backend.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[begin])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token=UNKNOWN, bos_token=BEGIN, eos_token=END, chat_template=CHAT_TEMPLATE
    )


def make_llama(tokenizer: PreTrainedTokenizerFast, width: int, layers: int) -> LlamaForCausalLM:
    """A Llama with random weights, heads of 32 and an MLP of three times the width."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            max_position_embeddings=2048,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=None,
            tie_word_embeddings=False,
        )
    )


@dataclass(frozen=True)
class Text:
    """Token ids of a training text; tokens whose `learned` is false have no label."""

    ids: list[int]
    learned: list[bool]


def pad(texts: Sequence[Text], filler: int) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, each int64 [B, L], padded on the right with the token `filler`."""
    length = max(len(text.ids) for text in texts)
    ids = torch.full((len(texts), length), filler)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
    for row, text in enumerate(texts):
        size = len(text.ids)
        ids[row, :size] = torch.tensor(text.ids)
        mask[row, :size] = 1
        labels[row, :size] = torch.where(torch.tensor(text.learned), ids[row, :size], IGNORE)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def optimize(
    modules: Sequence[nn.Module], loss_of_step: Callable[[int], Tensor], *, steps: int, learning_rate: float
) -> float:
    """Train all parameters of `modules` with AdamW, warm-up and a cosine schedule.

    `loss_of_step(step)` makes the batch of a step and returns its loss. Returns the mean loss of the last 100 steps.
    """
    parameters: list[dict[str, Any]] = [{"params": [p for m in modules for p in m.parameters()]}]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min(1.0, (s + 1) / warm) * 0.5 * (1 + math.cos(math.pi * max(0, s - warm) / max(1, steps - warm))),
    )
    started, recent = time.perf_counter(), []
    for step in range(steps):
        loss = loss_of_step(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters[0]["params"], 1.0)
        optimizer.step()
        schedule.step()
        recent = [*recent[-99:], loss.item()]
        if (step + 1) % 100 == 0 or step + 1 == steps:
            mean = sum(recent) / len(recent)
            print(f"step {step + 1}/{steps} {time.perf_counter() - started:.0f} s loss {mean:.4f}", flush=True)
    return sum(recent) / len(recent)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write model and tokenizer as a Hugging Face folder, weights in half precision."""
    with quiet_transformers():
        model.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
