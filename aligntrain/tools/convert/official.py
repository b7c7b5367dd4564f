"""Load and save checkpoint folders of the official AlignGPT code, of its family, and of LLaVA-1.5.

    official (AlignGPT, LLaVA)                  here
    model.layers.0...                           language_model.model.layers.0...
    lm_head.weight                              language_model.lm_head.weight
    [model.]mm_projector.{0,2}                  projector.{0,2}
    [model.]mm_projector (linear)               projector.0
    [model.]vision_tower.vision_tower....       vision_tower....
    align_indicators.indicator_embs             level_embeddings.weight
    gated_weight_layer.mlp.{0,2}                gate.mlp.{0,2}

Levels count from 1 here and from 0 there (``similarity`` in the official JSON): level k is row k-1 of either table.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from aligncurate.errors import UserError
from aligncurate.progress import notice
from aligntrain.inputs.generation import complete_generation_config
from aligntrain.model.configuration import CLASS_TOKEN_TOWERS, AlignGPTConfig
from aligntrain.model.modeling import AlignGPTForConditionalGeneration
from aligntrain.tools.convert.lora import is_lora, read_lora
from aligntrain.tools.convert.tensors import build_from_tensors, load_tower, read_tensors, rename

FROM_OFFICIAL = [
    (r"^(?:model\.)?mm_projector\.(weight|bias)$", r"projector.0.\1"),
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
_TO_LINEAR = [(r"^projector\.0\.", "mm_projector.")]

# https://github.com/AlignGPT-VL/AlignGPT_family and https://github.com/haotian-liu/LLaVA
_LLM_OF = {
    "aligngpt": "llama",
    "aligngpt_gemma": "gemma",
    "aligngpt_mistral": "mistral",
    "aligngpt_phi": "phi",
    "aligngpt_qwen2": "qwen2",
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
}
"""The LLM's kind by the ``model_type`` of an official ``config.json``."""

_ARCHITECTURES = {
    "aligngpt": "AlignGPTForCausalLM",
    "aligngpt_gemma": "AlignGPTGemmaForCausalLM",
    "aligngpt_mistral": "AlignGPTMistralForCausalLM",
    "aligngpt_phi": "AlignGPTPhiForCausalLM",
    "aligngpt_qwen2": "AlignGPTQwen2ForCausalLM",
    "llava": "LlavaLlamaForCausalLM",
    "llava_mistral": "LlavaMistralForCausalLM",
}

# Settings in the official config.json that belong to the whole model, not to its LLM.
_OUTER = {"architectures", "model_type", "transformers_version", "torch_dtype", "dtype"}
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
# Settings of LLMs that transformers 5 keeps elsewhere than in config.json's top level.
_ROPE = {"rope_theta", "rope_scaling", "partial_rotary_factor"}


def load_official(
    folder: Path, config: dict[str, Any], *, llm: str | Path | None = None, vision: str | Path | None = None
) -> AlignGPTForConditionalGeneration:
    """Load the model in a folder whose ``config.json`` is ``config``.

    Args:
        folder: with the weights, or with LoRA adapters; the vision tower's weights may be missing, as in LLaVA's own.
        config: its configuration.
        llm: the LLM's folder or name, for a folder with LoRA adapters.
        vision: the vision tower's folder or name, where ``mm_vision_tower`` does not lead to it.

    Raises:
        UserError: a model of another kind, no vision tower is named, or the tensors do not fit the configuration.
    """
    _check_supported(folder, config)
    tensors = read_lora(folder, llm) if is_lora(folder) else read_tensors(folder)
    tensors = rename(tensors, FROM_OFFICIAL)
    tower = find_tower(folder, config, vision)
    if not any(name.startswith("vision_tower.") for name in tensors):
        tensors |= {f"vision_tower.{name}": tensor for name, tensor in load_tower(tower).state_dict().items()}
    tower_config = AutoConfig.from_pretrained(tower)
    tower_config = getattr(tower_config, "vision_config", tower_config)
    ours = _config_from_official(config, tower_config, tensors)
    return build_from_tensors(ours, from_scaled_inputs(tensors, ours.text_config), folder)


def save_official(model: AlignGPTForConditionalGeneration, folder: str | Path) -> None:
    """Save a model as the official code reads it: ``config.json`` and safetensors; LLaVA's layout for ``none``.

    Raises:
        UserError: the official code does not support the LLM.
    """
    config = model.config
    official = _official_config(config)
    if config.align_mode not in ("none", "gated"):
        notice(f"the official code always mixes levels with the gate; this model has align_mode {config.align_mode!r}.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.contiguous() for k, v in model.state_dict().items()}
    tensors = rename(to_scaled_inputs(tensors, config.text_config), to_official(config.projector_type))
    if config.text_config.tie_word_embeddings:
        del tensors["lm_head.weight"]  # otherwise the word embeddings might be dropped as its copy
    if config.align_mode == "none":
        prefixes = ("mm_projector.", "vision_tower.")
        tensors = {f"model.{k}" if k.startswith(prefixes) else k: v for k, v in tensors.items()}
    if config.text_config.model_type == "llama":
        for layer in range(config.text_config.num_hidden_layers):
            # Computed everywhere, but transformers 4.31, which the Llama code uses, expects to find them.
            tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = _inverse_frequencies(config.text_config)
    save_torch_state_dict(tensors, folder, metadata={"format": "pt"})
    model.vision_tower.save_pretrained(folder / tower_name(config))
    (folder / "config.json").write_text(json.dumps(official, indent=2) + "\n")
    if model.generation_config is not None:
        complete_generation_config(model.generation_config)
        model.generation_config.save_pretrained(folder)


def to_official(projector_type: str) -> list[tuple[str, str]]:
    """The rules that rename our tensors to the official names."""
    return [*(_TO_LINEAR if projector_type == "linear" else []), *TO_OFFICIAL]


def from_scaled_inputs(tensors: dict[str, Tensor], text: PreTrainedConfig) -> dict[str, Tensor]:
    """Adapt the weights around Gemma to transformers 5.

    Gemma multiplies its inputs by s = sqrt(hidden size). In the official code (transformers 4) it multiplies all of
    them, also patches and alignment vectors; in transformers 5 only the word embeddings. So the projector's output
    and the level embeddings are multiplied here. The gate sees both a patch and the text times s, so the weights of
    its first layer are divided by s squared.
    """
    return _scale(tensors, text, 1)


def to_scaled_inputs(tensors: dict[str, Tensor], text: PreTrainedConfig) -> dict[str, Tensor]:
    """The reverse of ``from_scaled_inputs``."""
    return _scale(tensors, text, -1)


def _scale(tensors: dict[str, Tensor], text: PreTrainedConfig, power: int) -> dict[str, Tensor]:
    if text.model_type != "gemma":
        return tensors
    scale = text.hidden_size ** (power / 2)
    last = max((name for name in tensors if re.fullmatch(r"projector\.\d+\.weight", name)), default="")
    factors = {last: scale, last.replace("weight", "bias"): scale}
    factors |= {"level_embeddings.weight": scale, "gate.mlp.0.weight": scale**-2}
    return {
        name: (tensor.float() * factors[name]).to(tensor.dtype) if name in factors else tensor
        for name, tensor in tensors.items()
    }


def _check_supported(folder: Path, config: dict[str, Any]) -> None:
    """Raises UserError for what the official code can do and this package cannot."""
    kind = str(config.get("model_type"))
    if kind not in _LLM_OF:
        raise UserError(f"{folder}: model type {kind!r} is not supported; supported are {', '.join(_LLM_OF)}.")
    if not isinstance(config.get("mm_vision_select_layer"), int):
        raise UserError(f"{folder}/config.json: mm_vision_select_layer is not a whole number.")
    if config.get("mm_use_im_start_end"):
        raise UserError(
            f"{folder}: the model was trained with start and end tokens around the image (mm_use_im_start_end), "
            "which are not supported."
        )
    if str(config.get("image_aspect_ratio")).startswith("anyres"):
        raise UserError(
            f"{folder}: the model cuts an image into tiles (image_aspect_ratio {config['image_aspect_ratio']!r}), "
            "as LLaVA-NeXT does; only LLaVA-1.5 is supported."
        )


def tower_name(config: AlignGPTConfig) -> str:
    """Folder of the vision tower inside an official one; the official code tells SigLIP by its name."""
    return f"{'siglip' if 'siglip' in config.vision_config.model_type else 'clip'}_vision_tower"


def find_tower(folder: Path, config: dict[str, Any], vision: str | Path | None) -> str:
    """The vision tower of a checkpoint: ``vision``, or what its ``mm_vision_tower`` names.

    A relative path is looked up beside the checkpoint and inside it, where ``save_official`` writes it; anything else
    is a name on the Hugging Face Hub.
    """
    name = vision or config.get("mm_vision_tower")
    if name is None:
        raise UserError(f"{folder}/config.json has no mm_vision_tower; pass --vision.")
    inside = [] if vision else [folder / f"{kind}_vision_tower" for kind in ("clip", "siglip")]
    for candidate in (*inside, Path(name), folder.parent / name, folder / name, folder.parent / Path(name).name):
        if (candidate / "config.json").is_file():
            return str(candidate)
    return str(name)


def _config_from_official(
    config: dict[str, Any], vision: PreTrainedConfig, tensors: dict[str, Tensor]
) -> AlignGPTConfig:
    kind = _LLM_OF[config["model_type"]]
    known = set(AutoConfig.for_model(kind).to_dict()) | _ROPE
    text = {key: value for key, value in config.items() if key in known and key not in _OUTER}
    if "rope_type" in (text.get("rope_scaling") or {}):
        text["rope_scaling"].pop("type", None)  # its old name
    table = tensors.get("level_embeddings.weight")
    scales = config.get("s2_scales")
    has_s2 = config.get("s2") or config.get("use_s2")  # the first repository and the family's
    has_class_token = vision.model_type in CLASS_TOKEN_TOWERS
    return AlignGPTConfig(
        text_config={**text, "model_type": kind},
        vision_config=vision.to_dict(),
        projector_type=config.get("mm_projector_type", "linear"),
        vision_layer=config["mm_vision_select_layer"],
        # The official code ignores the setting for towers without a class token.
        vision_select=config.get("mm_vision_select_feature", "patch") if has_class_token else "patch",
        align_mode="none" if table is None else config.get("align_mode", "gated"),
        num_levels=8 if table is None else table.shape[0],
        gate_text=config.get("gate_text", "all"),
        gate_hidden_size=tensors["gate.mlp.0.weight"].shape[0] if "gate.mlp.0.weight" in tensors else 256,
        s2_scales=sorted(int(scale) for scale in str(scales).split(",")) if has_s2 and scales else None,
    )


def _official_config(config: AlignGPTConfig) -> dict[str, Any]:
    llm = config.text_config.model_type
    kinds = [kind for kind in _ARCHITECTURES if kind.startswith("llava") == (config.align_mode == "none")]
    kind = next((kind for kind in kinds if _LLM_OF[kind] == llm), None)
    if kind is None:
        supported = ", ".join(_LLM_OF[kind] for kind in kinds)
        raise UserError(f"the official layout supports {supported}, not {llm}.")
    text = config.text_config.to_dict()
    tower = config.vision_config.name_or_path or ""
    rope = text.pop("rope_parameters", None) or {}
    scaled = rope.get("rope_type", "default") != "default"
    official = {
        **text,
        **({"partial_rotary_factor": rope["partial_rotary_factor"]} if "partial_rotary_factor" in rope else {}),
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        "torch_dtype": str(config.dtype or torch.float32).removeprefix("torch."),
        "rope_theta": rope.get("rope_theta", 10000.0),
        **({"rope_scaling": _rope_scaling(rope)} if scaled else {}),
        "mm_hidden_size": config.vision_feature_size,
        "mm_projector_type": config.projector_type,
        "mm_vision_select_feature": config.vision_select,
        "mm_vision_select_layer": config.vision_layer,
        "mm_vision_tower": tower if _HUB_NAME.fullmatch(tower) else tower_name(config),
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "use_mm_proj": True,
    }
    if config.align_mode != "none":
        # The official code reads the first; the others are for converting back.
        official |= {"n_indicators": config.num_levels, "align_mode": config.align_mode, "gate_text": config.gate_text}
    if config.s2_scales:
        official |= {"s2": True, "use_s2": True, "s2_scales": ",".join(map(str, config.s2_scales))}
    return official


def _rope_scaling(rope: dict[str, Any]) -> dict[str, Any]:
    """As transformers 4 reads it: the kind is called ``type`` in its older versions."""
    return {"type": rope["rope_type"], **{k: v for k, v in rope.items() if k not in _ROPE}}


def _inverse_frequencies(text: PreTrainedConfig) -> Tensor:
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    theta = (text.rope_parameters or {}).get("rope_theta", 10000.0)
    frequencies: Tensor = 1.0 / (theta ** (torch.arange(0, size, 2).float() / size))
    return frequencies
