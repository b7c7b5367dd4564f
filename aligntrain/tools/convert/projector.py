"""Load and save the official ``mm_projector_align.bin``: the projector and level embeddings after pretraining."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from aligncurate.errors import UserError
from aligntrain.model.modeling import AlignGPTForConditionalGeneration
from aligntrain.tools.convert.official import FROM_OFFICIAL, from_scaled_inputs, to_official, to_scaled_inputs
from aligntrain.tools.convert.tensors import check_tensors, load_tower, read_bin, rename


def load_projector(
    file: str | Path, *, llm: str | Path, vision: str | Path, **settings: Any
) -> AlignGPTForConditionalGeneration:
    """Load a pretrained projector into a model that is ready for finetuning.

    Args:
        file: projector and level embeddings; the gate is not in it and starts with new weights.
        llm: the causal LLM's folder or name.
        vision: the vision tower's folder or name.
        settings: fields of AlignGPTConfig; the number of levels and the projector's type are read from the file.

    Raises:
        UserError: the file contains something else, or does not fit the LLM and the vision tower.
    """
    tensors = rename(read_bin(Path(file)), FROM_OFFICIAL)
    depth = len({name for name in tensors if re.fullmatch(r"projector\.\d+\.weight", name)})
    if depth == 0:
        raise UserError(f"{file} contains no mm_projector; give an official mm_projector_align.bin.")
    settings.setdefault("projector_type", "linear" if depth == 1 else f"mlp{depth}x_gelu")
    if "level_embeddings.weight" in tensors:
        settings.setdefault("num_levels", tensors["level_embeddings.weight"].shape[0])
    else:
        settings.setdefault("align_mode", "none")
    model = AlignGPTForConditionalGeneration.from_components(
        AutoModelForCausalLM.from_pretrained(llm, dtype="auto"), load_tower(vision), **settings
    )
    check_tensors(tensors, model, Path(file), partial=True)
    model.load_state_dict(from_scaled_inputs(tensors, model.config.text_config), strict=False)
    return model


def save_projector(model: AlignGPTForConditionalGeneration, file: str | Path) -> None:
    """Save projector and level embeddings in bfloat16, as the official code does after pretraining."""
    tensors = {k: v for k, v in model.state_dict().items() if re.match(r"projector\.|level_embeddings\.", k)}
    tensors = {k: v.bfloat16() for k, v in to_scaled_inputs(tensors, model.config.text_config).items()}
    torch.save(rename(tensors, to_official(model.config.projector_type)), file)
