"""Load LLaVA-1.5 checkpoint folders of Hugging Face.

transformers 4.x | 5.x                                  here
language_model.model... | model.language_model...       language_model.model...
language_model.lm_head | lm_head                        language_model.lm_head
[model.]multi_modal_projector.linear_{1,2}              projector.{0,2}
[model.]vision_tower....                                vision_tower....
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from aligncurate.errors import UserError
from aligntrain.model.configuration import AlignGPTConfig
from aligntrain.model.modeling import AlignGPTForConditionalGeneration
from aligntrain.tools.convert.tensors import build_from_tensors, read_tensors, rename

_NAMES = [
    (r"^(?:model\.)?multi_modal_projector\.linear_1\.", "projector.0."),
    (r"^(?:model\.)?multi_modal_projector\.linear_2\.", "projector.2."),
    (r"^(?:model\.)?vision_tower\.(?:vision_model\.)?", "vision_tower."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
]


def load_llava_hf(folder: Path, config: dict[str, Any]) -> AlignGPTForConditionalGeneration:
    """Load the model in a folder whose ``config.json`` is ``config``.

    Raises:
        UserError: it is not LLaVA-1.5, or its tensors do not fit its configuration.
    """
    if config.get("model_type") != "llava":
        raise UserError(f"{folder}: a {config.get('model_type')!r} checkpoint is neither AlignGPT nor LLaVA-1.5.")
    if config.get("projector_hidden_act", "gelu") != "gelu" or not config.get("multimodal_projector_bias", True):
        raise UserError(f"{folder}: only LLaVA-1.5's own projector (GELU, with biases) can be converted.")
    # LlavaConfig fills in what the file leaves out of its two halves.
    full = AutoConfig.for_model(**config)
    ours = AlignGPTConfig(
        text_config=full.text_config.to_dict(),
        vision_config=full.vision_config.to_dict(),
        image_token_id=full.image_token_index,
        align_mode="none",
        vision_layer=full.vision_feature_layer,
        vision_select="patch" if full.vision_feature_select_strategy == "default" else "cls_patch",
    )
    return build_from_tensors(ours, rename(read_tensors(folder), _NAMES), folder)
