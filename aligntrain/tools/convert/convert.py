"""Convert a checkpoint of any known format; the format is detected from its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aligncurate.errors import UserError
from aligntrain.inputs.processor import AlignGPTProcessor
from aligntrain.model.configuration import AlignGPTConfig
from aligntrain.model.loading import model_errors
from aligntrain.model.modeling import AlignGPTForConditionalGeneration
from aligntrain.tools.convert.llava_hf import load_llava_hf
from aligntrain.tools.convert.official import find_tower, load_official, save_official
from aligntrain.tools.convert.projector import load_projector, save_projector
from aligntrain.tools.convert.tensors import read_config


def convert(
    source: str | Path, target: str | Path, *, llm: str | Path | None = None, vision: str | Path | None = None
) -> str:
    """Convert a foreign checkpoint to this package's layout, or one of its own to the official layout.

    Args:
        source: any checkpoint that ``load_any`` reads, or an official ``mm_projector_align.bin``.
        target: a folder; a name ending in ``.bin`` writes only the projector and the level embeddings.
        llm: the LLM that belongs to a projector file.
        vision: the vision tower, for a projector file or where an official folder's own path to it is wrong.

    Returns:
        What was converted, in a few words.

    Raises:
        UserError: the checkpoint is not of a known format, is incomplete, or cannot be written as asked.
    """
    source, target = Path(source), Path(target)
    with model_errors(source):
        if source.is_file():
            if llm is None or vision is None:
                raise UserError(f"{source} contains only a projector; pass --llm and --vision too.")
            model = load_projector(source, llm=llm, vision=vision)
            _save_ours(model, target, tokenizer=Path(llm), tower=str(vision))
            return "official projector and level embeddings, with an LLM and a vision tower, to a model"
        config = read_config(source)
        model = load_any(source, vision=vision)
        if target.suffix == ".bin":
            save_projector(model, target)
            return "a model to the official projector and level embeddings"
        if _is_ours(config):
            save_official(model, target)
            return "a model to the official layout"
        tower = str(source) if "text_config" in config else find_tower(source, config, vision)
        image_mode = "pad" if config.get("image_aspect_ratio") == "pad" else "crop"
        _save_ours(model, target, tokenizer=source, tower=tower, image_mode=image_mode)
        return f"{'LLaVA' if model.config.align_mode == 'none' else 'official AlignGPT'} to a model"


def load_any(source: str | Path, *, vision: str | Path | None = None) -> AlignGPTForConditionalGeneration:
    """Load a checkpoint folder of any known format.

    Args:
        source: a folder of this package, of the official AlignGPT or LLaVA code, or of Hugging Face's LLaVA; weights
            as ``.bin`` or safetensors, in one file or in shards.
        vision: the vision tower's folder or name, where an official folder's ``mm_vision_tower`` does not lead to it.

    Returns:
        The model in the checkpoint's own dtype; ``align_mode`` is ``none`` for LLaVA.

    Raises:
        UserError: not such a folder, or tensors that do not fit its configuration (each named, with its shapes).
    """
    folder = Path(source)
    config = read_config(folder)
    if _is_ours(config):
        model: AlignGPTForConditionalGeneration = AlignGPTForConditionalGeneration.from_pretrained(folder, dtype="auto")
        return model
    return load_llava_hf(folder, config) if "text_config" in config else load_official(folder, config, vision)


def _is_ours(config: dict[str, Any]) -> bool:
    # The official code calls its models "aligngpt" too, but keeps the LLM's settings at the top level.
    return "text_config" in config and config.get("model_type") == AlignGPTConfig.model_type


def _save_ours(
    model: AlignGPTForConditionalGeneration, target: Path, *, tokenizer: Path, tower: str, image_mode: str = "pad"
) -> None:
    """Save the model and, if ``tokenizer`` is a folder with a tokenizer, its processor."""
    if any((tokenizer / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        config = model.config
        processor = AlignGPTProcessor.from_components(
            tokenizer,
            tower,
            num_patches=config.num_patches,
            pixel_size=config.pixel_size,
            image_mode=image_mode,
            align=config.align_mode != "none",
            gate_text=config.gate_text,
        )
        config.image_token_id, config.align_token_id = processor.image_token_id, processor.align_token_id
        processor.save_pretrained(target)
    model.save_pretrained(target)
