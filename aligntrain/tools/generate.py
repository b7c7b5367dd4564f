"""Run a trained model: load it, answer questions about an image, show the gate's weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import TextStreamer

from aligncurate.errors import UserError
from aligncurate.sources.marks import IMAGE
from aligntrain import auto  # noqa: F401, transformers must know the model's type to load its processor
from aligntrain.inputs.processor import AlignGPTProcessor
from aligntrain.model.loading import model_errors, quiet_transformers
from aligntrain.model.modeling import AlignGPTForConditionalGeneration

Turns = Sequence[dict[str, str]]


def load(folder: str | Path) -> tuple[AlignGPTForConditionalGeneration, AlignGPTProcessor]:
    """Load model and processor from a folder that training or ``convert`` wrote, onto the GPU if there is one.

    Raises:
        UserError: the folder has no model, or one that cannot be loaded.
    """
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{folder}: no model here (no config.json); pass the --out folder of a finished training run.")
    if not (Path(folder) / "processor_config.json").is_file():
        raise UserError(f"{folder}: the model has no processor, so it cannot read text; convert it again with --llm.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with model_errors(folder), quiet_transformers():
        model = AlignGPTForConditionalGeneration.from_pretrained(folder, dtype="auto")
        processor = AlignGPTProcessor.from_pretrained(folder)
    return model.to(device).eval(), processor


@torch.inference_mode()
def answer(
    model: AlignGPTForConditionalGeneration,
    processor: AlignGPTProcessor,
    turns: Turns,
    image: Image.Image | None = None,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """The model's answer to the last question of a conversation.

    Args:
        model, processor: as from ``load``.
        turns: ``{"role": "user" | "assistant", "content": text}``, ending with a question.
        image: the image that the first question is about.
        max_new_tokens: length limit of the answer.
        temperature: 0 always takes the most likely token; above 0 samples.
        on_text: called with each piece of the answer as it is generated.

    Raises:
        UserError: the conversation cannot be encoded, for example because it mentions ``<image>`` twice.
    """
    inputs = _inputs(model, processor, turns, image)
    streamer = _Pieces(processor.tokenizer, on_text) if on_text is not None else None
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    ids = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        pad_token_id=processor.tokenizer.pad_token_id,
        streamer=streamer,
        **sampling,
    )
    text: str = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()


@torch.inference_mode()
def alignment(
    model: AlignGPTForConditionalGeneration, processor: AlignGPTProcessor, turns: Turns, image: Image.Image
) -> list[float] | None:
    """The gate's weights of levels 1..N-1 for a question about an image; None if the model has no gate.

    Raises:
        UserError: as ``answer``.
    """
    output = model(**_inputs(model, processor, turns, image), logits_to_keep=1)
    return None if output.gate_weights is None else [float(weight) for weight in output.gate_weights[0]]


def _inputs(
    model: AlignGPTForConditionalGeneration, processor: AlignGPTProcessor, turns: Turns, image: Image.Image | None
) -> dict[str, Any]:
    messages = [dict(turn) for turn in turns]
    if image is not None and not any(IMAGE in message["content"] for message in messages):
        messages[0]["content"] = f"{IMAGE}\n{messages[0]['content']}"
    try:
        features = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, images=image
        )
    except ValueError as error:
        raise UserError(f"the question cannot be encoded: {error}") from None
    return {name: value.to(model.device) for name, value in features.items()}


class _Pieces(TextStreamer):  # type: ignore[misc]
    """Passes each piece of text to a function instead of printing it."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._on_text(text)
