"""Processor: from conversations and images to the model's inputs (token ids, labels, pixels).

One sample with its labels (x: none) and the tokens that the gate averages (g), for ``gate_text`` "instruction":

    input_ids  BOS <align> A chat … USER: <image> … <image> What is it? ASSISTANT: A dog </s>
    labels      x     x    x  x   x   x      x    x    x     x   x  x       x      A dog </s>
    gate        -     -    g  g   g   g      -    -    -     g   g  g       g      -  -   -
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, BatchFeature, ProcessorMixin

from aligncurate.sources.conversations import parse_conversation
from aligncurate.sources.marks import IMAGE
from aligntrain.inputs.pictures import open_picture
from aligntrain.inputs.pixels import IMAGE_MODES, pixels_of
from aligntrain.inputs.templates import ALIGN, PLAIN, V1, ChatTemplate, Rendered, caption_turns, messages_of
from aligntrain.inputs.tokenizer import end_pattern, load_tokenizer, prepare_tokenizer
from aligntrain.model.configuration import AlignGPTConfig
from aligntrain.model.loss import IGNORE

TEMPLATES = ("plain", "v1", "chat")
_PROMPT_OPTIONS = ("padding", "padding_side", "truncation")


@dataclass(frozen=True)
class Encoded:
    """One sample as token ids.

    Attributes:
        input_ids: if there is an image, with P image placeholders and one align placeholder.
        labels: of the same length; -100 for tokens without a label.
        gate_length: number of tokens before the first answer (all of them, if there is none).
        truncated: number of tokens cut off at the end.
    """

    input_ids: list[int]
    labels: list[int]
    gate_length: int
    truncated: int = 0


class AlignGPTProcessor(ProcessorMixin):  # type: ignore[misc]
    """Tokenizer, image processor and template of an AlignGPT model.

    Args:
        image_processor: the vision tower's; its mean, standard deviation and resampling are used.
        tokenizer: the LLM's, a fast one; what it lacks is added to it (see ``prepare_tokenizer``).
        chat_template: Jinja; default: that of ``template``.
        template: ``v1`` (Vicuna), ``plain`` (captions, pretraining) or ``chat``, the tokenizer's own.
        num_patches: P, placeholders per image.
        pixel_size: side length of the model's input in pixels.
        image_mode: ``pad`` pads an image to a square in the mean colour (finetuning and inference in the official
            code), ``crop`` takes its centre square (pretraining).
        align: whether there is an alignment vector (``align_mode`` other than ``none``).
        gate_text: as in AlignGPTConfig; for "instruction", prompts come with a ``gate_mask`` that ends before the
            first answer.
        max_length: maximum number of tokens in a training sample; longer ones are cut.

    Raises:
        ValueError: an unknown option, a slow tokenizer, or ``chat`` for a tokenizer without a chat template.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        template: str = "v1",
        num_patches: int = 576,
        pixel_size: int = 336,
        image_mode: str = "pad",
        align: bool = True,
        gate_text: str = "instruction",
        max_length: int = 2048,
    ) -> None:
        if template not in TEMPLATES:
            raise ValueError(f"template is {template!r}; choose one of {', '.join(TEMPLATES)}.")
        if image_mode not in IMAGE_MODES:
            raise ValueError(f"image_mode is {image_mode!r}; choose one of {', '.join(IMAGE_MODES)}.")
        if chat_template is None:
            chat_template = {"plain": PLAIN, "v1": V1, "chat": tokenizer.chat_template}[template]
        if chat_template is None:
            raise ValueError("template is 'chat', but the tokenizer has no chat template; choose v1 or plain.")
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.template = template
        self.num_patches = num_patches
        self.pixel_size = pixel_size
        self.image_mode = image_mode
        self.align = align
        self.gate_text = gate_text
        self.max_length = max_length
        prepare_tokenizer(tokenizer)
        self.image_token = IMAGE
        self.image_token_id: int = tokenizer.convert_tokens_to_ids(IMAGE)
        self.align_token_id: int = tokenizer.convert_tokens_to_ids(ALIGN)
        self._starts_with_bos = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
        self._chat = self._template(chat_template)

    @classmethod
    def from_components(cls, llm: Any, vision: str | Path, **settings: Any) -> AlignGPTProcessor:
        """Build a processor for an LLM (folder, name or tokenizer) and a vision tower (folder or name).

        ``settings`` are this class's arguments, and ``vision_select`` and ``s2_scales`` of AlignGPTConfig, which
        determine the number of patches and pixels.
        """
        tokenizer = load_tokenizer(llm) if isinstance(llm, str | Path) else llm
        config = AutoConfig.from_pretrained(vision)
        shape = {name: settings.pop(name) for name in ("vision_select", "s2_scales") if name in settings}
        sizes = AlignGPTConfig(vision_config=getattr(config, "vision_config", config).to_dict(), **shape)
        settings = {"num_patches": sizes.num_patches, "pixel_size": sizes.pixel_size, **settings}
        return cls(AutoImageProcessor.from_pretrained(vision), tokenizer, **settings)

    def encode(
        self,
        conversation: Sequence[Mapping[str, Any]],
        *,
        has_image: bool,
        key: str = "",
        training: bool = True,
    ) -> Encoded:
        """Encode one conversation as token ids and labels.

        Args:
            conversation: turns with a role and a text (see ``templates.messages_of``).
            has_image: whether the sample has an image.
            key: name of the sample in error messages.
            training: require an answer to learn, and cut at ``max_length``. If False, a final question is followed by
                the cue for its answer.

        Raises:
            ValueError: an irregular conversation, one without an answer or without a label left, or an image that
                ``max_length`` would cut.
        """
        (encoded,) = self.encode_all([(conversation, has_image)], training=training)
        if isinstance(encoded, ValueError):
            raise ValueError(f"sample {key!r}: {encoded}" if key else str(encoded)) from encoded
        return encoded

    def encode_all(
        self, samples: Sequence[tuple[Sequence[Mapping[str, Any]], bool]], *, training: bool = True
    ) -> list[Encoded | ValueError]:
        """Encode many (conversation, has_image) at once, which the tokenizer does on all cores.

        Returns what ``encode`` would return or raise for each of them.
        """
        rendered = [self._render(conversation, has_image, training) for conversation, has_image in samples]
        tokens = self._tokens([text.text if isinstance(text, Rendered) else "" for text in rendered])
        results: list[Encoded | ValueError] = []
        for (_, has_image), text, pieces in zip(samples, rendered, tokens, strict=True):
            try:
                if isinstance(text, ValueError):
                    raise text
                encoded = self._join(text, pieces, has_image)
                results.append(self._cut(encoded) if training else encoded)
            except ValueError as error:
                results.append(error)
        return results

    def encode_caption(self, caption: str, *, key: str = "") -> Encoded:
        """Encode an image's caption as a pretraining sample. Raises ValueError as ``encode`` does."""
        return self.encode(caption_turns(caption), has_image=True, key=key)

    @property
    def moves_system(self) -> bool:
        """Whether a system turn becomes the start of the first question, because the template cannot take one."""
        return not self._chat.takes_system

    @property
    def end_token_ids(self) -> list[int]:
        """Ids of the tokens at which generation has to stop: the tokenizer's end token and that of the answers."""
        example = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
        sample = self._tokenize(self._chat.render(example, cue=False), False)
        ends = {self.tokenizer.eos_token_id} - {None}
        last = next(label for label in reversed(sample.labels) if label != IGNORE)
        ends |= {last} & self.tokenizer.added_tokens_decoder.keys()
        return sorted(ends)

    def process_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Images as normalised pixels, float32 [I, 3, H, H], H = pixel_size."""
        return pixels_of(images, self.image_processor, self.pixel_size, self.image_mode)

    def pad(self, samples: Sequence[Encoded], side: str = "right") -> dict[str, Tensor]:
        """Pad samples to a batch: ``input_ids``, ``attention_mask``, ``labels``, ``gate_mask`` (bool), all [B, L]."""
        length = max(len(sample.input_ids) for sample in samples)
        pad_id = self.tokenizer.pad_token_id

        def batch(rows: Iterable[list[int]], filler: int) -> Tensor:
            fills = ((row, [filler] * (length - len(row))) for row in rows)
            return torch.tensor([row + fill if side == "right" else fill + row for row, fill in fills])

        before = ([1] * s.gate_length + [0] * (len(s.input_ids) - s.gate_length) for s in samples)
        return {
            "input_ids": batch((s.input_ids for s in samples), pad_id),
            "attention_mask": batch(([1] * len(s.input_ids) for s in samples), 0),
            "labels": batch((s.labels for s in samples), IGNORE),
            "gate_mask": batch(before, 0).bool(),
        }

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        padding: bool | str = True,
        padding_side: str = "left",
        truncation: bool = False,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """Encode prompts, with ``<image>`` in the place of an image, for ``generate``.

        Args:
            images: one image (PIL, path or URL; see ``open_picture``), or a list in the order of the prompts that have
                ``<image>``.
            text: one prompt or several, complete: no template is applied (see ``apply_chat_template``).
            padding: pad to the longest prompt; False refuses prompts of different lengths.
            padding_side: side on which shorter prompts are padded.
            truncation: only False: a cut prompt could lose its image or its question.
            return_tensors: ``pt``, ``np``, or None for lists.

        Returns:
            ``input_ids``, ``attention_mask`` [B, L], ``gate_mask`` and, with images, ``pixel_values`` [I, 3, H, H].

        Raises:
            ValueError: the numbers of images and of ``<image>`` differ, a prompt has two, an image cannot be read, or
                an option is not supported.
        """
        how: dict[str, Any] = {"padding": padding, "padding_side": padding_side, "truncation": truncation}
        prompts = [text] if isinstance(text, str) else list(text or [])
        samples = [self._tokenize(Rendered(p, []), IMAGE in p) for p in prompts]
        return self._prompts(samples, images, return_tensors, **how)

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = "pt",
        images: Any = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        **variables: Any,
    ) -> Any:
        """Turn messages in transformers' form into text or (``tokenize``) inputs of ``generate``.

        Content is a string with ``<image>`` or a list of ``{"type": "text" | "image", ...}``; images are given there
        (``image``, ``url`` or ``path``) or as ``images``. With ``gate_text`` "instruction" the gate averages the text
        before the first answer of the conversation, as in training. ``processor_kwargs`` are options of ``__call__``;
        other arguments are variables of the template.

        Raises:
            ValueError: as ``__call__``.
        """
        if variables.pop("continue_final_message", False):
            raise ValueError("continue_final_message is not supported.")
        how = {name: variables.pop(name) for name in _PROMPT_OPTIONS if name in variables} | dict(
            processor_kwargs or {}
        )
        batched = not isinstance(conversation[0], Mapping)
        conversations = conversation if batched else [conversation]
        pictures = _as_list(images) or [image for turns in conversations for image in parse_conversation(turns)[1]]
        template = self._chat if chat_template is None else self._template(chat_template)
        encoded, texts = [], []
        for turns in conversations:
            messages = messages_of(turns, None)
            rendered = template.render(
                messages, cue=add_generation_prompt and messages[-1]["role"] == "user", **variables
            )
            texts.append(rendered.text)
            if tokenize:
                encoded.append(self._tokenize(rendered, IMAGE in rendered.text))
        if not tokenize:
            return texts if batched else texts[0]
        features = self._prompts(encoded, pictures or None, return_tensors, **how)
        return features if return_dict else features["input_ids"]

    def _prompts(
        self,
        samples: list[Encoded],
        images: Any,
        return_tensors: str | None,
        *,
        padding: bool | str = True,
        padding_side: str = "left",
        truncation: bool = False,
    ) -> BatchFeature:
        if not samples:
            raise ValueError("no prompt given; pass at least one as text.")
        if truncation:
            raise ValueError("truncation is not supported: it could cut the image or the question; shorten the text.")
        if padding not in (True, "longest", False, "do_not_pad"):
            raise ValueError(f"padding={padding!r} is not supported; use True or False.")
        if padding in (False, "do_not_pad") and len({len(sample.input_ids) for sample in samples}) > 1:
            raise ValueError("the prompts have different lengths; use padding=True.")
        batch = self.pad(samples, padding_side)
        del batch["labels"]
        if self.gate_text == "all":
            batch["gate_mask"] = batch["attention_mask"].bool()
        pictures = _as_list(images)
        marked = sum(self.image_token_id in sample.input_ids for sample in samples)
        if len(pictures) != marked:
            raise ValueError(f"{marked} prompts have {IMAGE}, but {len(pictures)} images were given.")
        if pictures:
            batch["pixel_values"] = self.process_images([open_picture(picture) for picture in pictures])
        if return_tensors in ("pt", "auto"):
            return BatchFeature(batch)
        if return_tensors not in ("np", None):
            raise ValueError(f"return_tensors={return_tensors!r} is not supported; use 'pt', 'np' or None.")
        as_lists = return_tensors is None
        return BatchFeature({name: t.tolist() if as_lists else t.numpy() for name, t in batch.items()})

    def _template(self, text: str) -> ChatTemplate:
        ends = re.compile("\n") if self.template == "plain" else end_pattern(self.tokenizer)
        return ChatTemplate(self.tokenizer, text, ends)

    def _render(
        self, conversation: Sequence[Mapping[str, Any]], has_image: bool, training: bool
    ) -> Rendered | ValueError:
        try:
            messages = messages_of(conversation, has_image)
            if self.template == "plain" and training and [m["role"] for m in messages] != ["user", "assistant"]:
                raise ValueError("the plain template needs exactly one question and one answer (the caption).")
            if training and messages[-1]["role"] == "user":
                messages = messages[:-1]
            if training and not any(m["role"] == "assistant" for m in messages):
                raise ValueError("the conversation has no answer.")
            return self._chat.render(messages, cue=messages[-1]["role"] == "user")
        except ValueError as error:
            return error

    def _tokenize(self, rendered: Rendered, has_image: bool) -> Encoded:
        return self._join(rendered, next(self._tokens([rendered.text])), has_image)

    def _tokens(self, texts: Sequence[str]) -> Iterator[list[tuple[list[int], list[tuple[int, int]]]]]:
        """Token ids and character offsets of each text's pieces before and after the image.

        These are tokenized separately, as in the official code.
        """
        pieces = [text.split(IMAGE) for text in texts]
        flat = [piece for of_text in pieces for piece in of_text]
        batch = self.tokenizer(flat, add_special_tokens=False, return_offsets_mapping=True) if flat else BatchFeature()
        tokens = zip(batch.get("input_ids", []), batch.get("offset_mapping", []), strict=True)
        return (list(islice(tokens, len(of_text))) for of_text in pieces)

    def _join(
        self, rendered: Rendered, tokens: list[tuple[list[int], list[tuple[int, int]]]], has_image: bool
    ) -> Encoded:
        """A sample from the tokens of its text's pieces, with placeholders between them."""
        pieces = rendered.text.split(IMAGE)
        if len(pieces) != 1 + has_image:
            raise ValueError(f"the text has {IMAGE} {len(pieces) - 1} times; the limit is one per sample.")
        ids: list[int] = []
        labels: list[int] = []
        start = 0
        for number, (piece, (own, spans)) in enumerate(zip(pieces, tokens, strict=True)):
            if number:
                ids += [self.image_token_id] * self.num_patches
                labels += [IGNORE] * self.num_patches
            if {self.image_token_id, self.align_token_id} & set(own):
                raise ValueError(f"the text contains {ALIGN}, which is a reserved token.")
            ids += own
            labels += _labels(own, [(start + a, start + b) for a, b in spans], rendered.answers)
            start += len(piece) + len(IMAGE)
        bos = self.tokenizer.bos_token_id
        if self._starts_with_bos and ids[:1] != [bos]:
            ids, labels = [bos, *ids], [IGNORE, *labels]
        if has_image and self.align:
            first = int(bos is not None and ids[0] == bos)
            ids.insert(first, self.align_token_id)
            labels.insert(first, IGNORE)
        gate_length = next((i for i, label in enumerate(labels) if label != IGNORE), len(ids))
        return Encoded(ids, labels, gate_length)

    def _cut(self, sample: Encoded) -> Encoded:
        length = self.max_length
        if self.image_token_id in sample.input_ids[length:]:
            raise ValueError(f"max_length {length} would cut the image; raise it, or put the image earlier.")
        cut = Encoded(
            sample.input_ids[:length],
            sample.labels[:length],
            min(sample.gate_length, length),
            max(0, len(sample.input_ids) - length),
        )
        if all(label == IGNORE for label in cut.labels):
            raise ValueError(f"the first {length} tokens (max_length) have no answer to learn.")
        return cut


def _labels(ids: list[int], offsets: list[tuple[int, int]], answers: list[tuple[int, int]]) -> list[int]:
    """Labels: the ids of tokens that overlap an answer; -100 for the others."""
    labels = [IGNORE] * len(ids)
    ahead = iter(answers)
    start, end = next(ahead, (0, 0))
    for i, (a, b) in enumerate(offsets):
        while end and a >= end:
            start, end = next(ahead, (0, 0))
        if end and (b > start or a == b >= start):
            labels[i] = ids[i]
    return labels


def _as_list(images: Any) -> list[Any]:
    return list(images) if isinstance(images, list | tuple) else [images] if images is not None else []
