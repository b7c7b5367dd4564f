"""Load and save checkpoint folders of the official AlignGPT code and of LLaVA-1.5.

    official (AlignGPT, LLaVA)                  here
    model.layers.0...                           language_model.model.layers.0...
    lm_head.weight                              language_model.lm_head.weight
    [model.]mm_projector.{0,2}                  projector.{0,2}
    [model.]vision_tower.vision_tower....       vision_tower....
    align_indicators.indicator_embs             level_embeddings.weight
    gated_weight_layer.mlp.{0,2}                gate.mlp.{0,2}

Levels count from 1 here and from 0 there (``similarity`` in the official JSON): level k is row k-1 of either table.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig

from aligncurate.errors import UserError
from aligntrain.model.configuration import AlignGPTConfig
from aligntrain.model.modeling import AlignGPTForConditionalGeneration
from aligntrain.tools.convert.tensors import build_from_tensors, load_tower, read_tensors, rename

FROM_OFFICIAL = [
    (r"^(?:model\.)?mm_projector\.", "projector."),
    (r"^(?:model\.)?vision_tower\.vision_tower\.(?:vision_model\.)?", "vision_tower."),
    (r"^(?:model\.)?align_indicators\.indicator_embs$", "level_embeddings.weight"),
    (r"^(?:model\.)?gated_weight_layer\.", "gate."),
    (r"^(model|lm_head)\.", r"language_model.\1."),
]
TO_OFFICIAL = [
    (r"^projector\.", "mm_projector."),
    (r"^vision_tower\.", "vision_tower.vision_tower.vision_model."),
    (r"^level_embeddings\.weight$", "align_indicators.indicator_embs"),
    (r"^gate\.", "gated_weight_layer."),
    (r"^language_model\.", ""),
]
# Settings in the official config.json that belong to the whole model, not to its LLM.
_OUTER = {"architectures", "model_type", "transformers_version", "torch_dtype", "dtype"}


def load_official(
    folder: Path, config: dict[str, Any], vision: str | Path | None = None
) -> AlignGPTForConditionalGeneration:
    """Load the model in a folder whose ``config.json`` is ``config``.

    Args:
        folder: with the weights; the vision tower's may be missing, as in LLaVA's own folders.
        config: its configuration.
        vision: the vision tower's folder or name, where ``mm_vision_tower`` does not lead to it.

    Raises:
        UserError: no vision tower is named, or the tensors do not fit the configuration.
    """
    tensors = rename(read_tensors(folder), FROM_OFFICIAL)
    tower = find_tower(folder, config, vision)
    if not any(name.startswith("vision_tower.") for name in tensors):
        tensors |= {f"vision_tower.{name}": tensor for name, tensor in load_tower(tower).state_dict().items()}
    tower_config = AutoConfig.from_pretrained(tower)
    tower_config = getattr(tower_config, "vision_config", tower_config)
    return build_from_tensors(_config_from_official(config, tower_config, tensors), tensors, folder)


def save_official(model: AlignGPTForConditionalGeneration, folder: str | Path) -> None:
    """Save a model as the official code reads it: ``config.json`` and safetensors; LLaVA's layout for ``none``.

    Raises:
        UserError: the LLM is not a Llama, the only kind that the official code has.
    """
    config = model.config
    if config.text_config.model_type != "llama":
        raise UserError(f"the official layout supports Llama only, not {config.text_config.model_type}.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = rename({k: v.contiguous() for k, v in model.state_dict().items()}, TO_OFFICIAL)
    if config.align_mode == "none":
        prefixes = ("mm_projector.", "vision_tower.")
        tensors = {f"model.{k}" if k.startswith(prefixes) else k: v for k, v in tensors.items()}
    for layer in range(config.text_config.num_hidden_layers):
        # Computed everywhere, but transformers 4.31 expects to find them.
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = _inverse_frequencies(config.text_config)
    save_torch_state_dict(tensors, folder, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_official_config(config), indent=2) + "\n")


def find_tower(folder: Path, config: dict[str, Any], vision: str | Path | None) -> str:
    """The vision tower of a checkpoint: ``vision``, or what its ``mm_vision_tower`` names.

    A relative path is looked up beside the checkpoint and inside it; anything else is a name on the Hugging Face Hub.
    """
    vision = vision or config.get("mm_vision_tower")
    if vision is None:
        raise UserError(f"{folder}/config.json has no mm_vision_tower; pass --vision.")
    for candidate in (Path(vision), folder.parent / vision, folder / vision, folder.parent / Path(vision).name):
        if (candidate / "config.json").is_file():
            return str(candidate)
    return str(vision)


def _config_from_official(
    config: dict[str, Any], vision: PreTrainedConfig, tensors: dict[str, Tensor]
) -> AlignGPTConfig:
    known = set(LlamaConfig().to_dict()) | {"rope_theta", "rope_scaling"}
    text = {key: value for key, value in config.items() if key in known and key not in _OUTER}
    table = tensors.get("level_embeddings.weight")
    scales = config.get("s2_scales")
    return AlignGPTConfig(
        text_config={**text, "model_type": "llama"},
        vision_config=vision.to_dict(),
        projector_type=config.get("mm_projector_type", "linear"),
        vision_layer=config["mm_vision_select_layer"],
        vision_select=config.get("mm_vision_select_feature", "patch"),
        align_mode="none" if table is None else "gated",
        num_levels=8 if table is None else table.shape[0],
        gate_text="all",
        gate_hidden_size=tensors["gate.mlp.0.weight"].shape[0] if "gate.mlp.0.weight" in tensors else 256,
        s2_scales=[int(scale) for scale in str(scales).split(",")] if config.get("s2") and scales else None,
    )


def _official_config(config: AlignGPTConfig) -> dict[str, Any]:
    text = config.text_config.to_dict()
    rope = text.pop("rope_parameters", None) or {}
    scaled = rope.get("rope_type", "default") != "default"
    llava = config.align_mode == "none"
    official = {
        **text,
        "architectures": ["LlavaLlamaForCausalLM" if llava else "AlignGPTForCausalLM"],
        "model_type": "llava" if llava else "aligngpt",
        "torch_dtype": str(config.dtype or torch.float32).removeprefix("torch."),
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"} if scaled else None,
        "mm_hidden_size": config.vision_feature_size,
        "mm_projector_type": config.projector_type,
        "mm_vision_select_feature": config.vision_select,
        "mm_vision_select_layer": config.vision_layer,
        "mm_vision_tower": config.vision_config.name_or_path or "vision_tower",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "use_mm_proj": True,
    }
    if config.s2_scales:
        official |= {"s2": True, "s2_scales": ",".join(map(str, config.s2_scales))}
    return official


def _inverse_frequencies(text: PreTrainedConfig) -> Tensor:
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    theta = (text.rope_parameters or {}).get("rope_theta", 10000.0)
    frequencies: Tensor = 1.0 / (theta ** (torch.arange(0, size, 2).float() / size))
    return frequencies
