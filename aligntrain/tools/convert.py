"""Checkpoints of the official AlignGPT code and of LLaVA-1.5, in and out.

    official (AlignGPT, LLaVA)                  here
    model.layers.0...                           language_model.model.layers.0...
    lm_head.weight                              language_model.lm_head.weight
    [model.]mm_projector.{0,2}                  projector.{0,2}
    [model.]vision_tower.vision_tower....       vision_tower....
    align_indicators.indicator_embs             level_embeddings.weight
    gated_weight_layer.mlp.{0,2}                gate.mlp.{0,2}

    Hugging Face's LLaVA, as 4.x | 5.x call it
    language_model.model... | model.language_model...       language_model.model...
    language_model.lm_head | lm_head                        language_model.lm_head
    [model.]multi_modal_projector.linear_{1,2}              projector.{0,2}
    [model.]vision_tower....                                vision_tower....

Levels count from 1 here and from 0 there (``similarity`` in the official JSON): level k is row k-1 of either table.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from aligntrain.inputs.processor import AlignGPTProcessor
from aligntrain.model.configuration import AlignGPTConfig
from aligntrain.model.modeling import AlignGPTForConditionalGeneration

# Buffers that older transformers saved and newer ones compute.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$|\.position_ids$")
_FROM_OFFICIAL = [
    (r"^(?:model\.)?mm_projector\.", "projector."),
    (r"^(?:model\.)?vision_tower\.vision_tower\.(?:vision_model\.)?", "vision_tower."),
    (r"^(?:model\.)?align_indicators\.indicator_embs$", "level_embeddings.weight"),
    (r"^(?:model\.)?gated_weight_layer\.", "gate."),
    (r"^(model|lm_head)\.", r"language_model.\1."),
]
_FROM_LLAVA_HF = [
    (r"^(?:model\.)?multi_modal_projector\.linear_1\.", "projector.0."),
    (r"^(?:model\.)?multi_modal_projector\.linear_2\.", "projector.2."),
    (r"^(?:model\.)?vision_tower\.(?:vision_model\.)?", "vision_tower."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
]
_TO_OFFICIAL = [
    (r"^projector\.", "mm_projector."),
    (r"^vision_tower\.", "vision_tower.vision_tower.vision_model."),
    (r"^level_embeddings\.weight$", "align_indicators.indicator_embs"),
    (r"^gate\.", "gated_weight_layer."),
    (r"^language_model\.", ""),
]


def convert(
    source: str | Path, target: str | Path, *, llm: str | Path | None = None, vision: str | Path | None = None
) -> str:
    """One checkpoint to another: foreign ones to this package's layout, its own to the official one.

    Args:
        source: what ``load_any`` takes, or an official ``mm_projector_align.bin``.
        target: a folder; a name that ends in ``.bin`` asks for projector and table alone.
        llm: the LLM that a projector's file belongs to.
        vision: the tower, for a projector's file and where a folder does not lead to it.

    Returns:
        What was done, in a few words.

    Raises:
        ValueError: as ``load_any``, ``load_projector`` and ``save_official``.
    """
    source, target = Path(source), Path(target)
    if source.is_file():
        if llm is None or vision is None:
            raise ValueError(f"{source} holds no LLM and no tower; say which they are (llm=..., vision=...).")
        model = load_projector(source, llm=llm, vision=vision)
        _save_ours(model, target, tokenizer=Path(llm), tower=str(vision))
        return "official projector and levels, with an LLM and a tower, to a model"
    config = _read_config(source)
    model = load_any(source, vision=vision)
    if target.suffix == ".bin":
        save_projector(model, target)
        return "a model to the official projector and levels"
    if _is_ours(config):
        save_official(model, target)
        return "a model to the official layout"
    hugging_face = "text_config" in config
    tower = str(source) if hugging_face else _find_tower(source, vision or config.get("mm_vision_tower"))
    _save_ours(model, target, tokenizer=source, tower=tower, image_mode=_image_mode(config))
    return f"{'LLaVA' if model.config.align_mode == 'none' else 'official AlignGPT'} to a model"


def load_any(source: str | Path, *, vision: str | Path | None = None) -> AlignGPTForConditionalGeneration:
    """A model from whatever kind of checkpoint ``source`` is.

    Args:
        source: a folder of this package, of the official AlignGPT or LLaVA code, or of Hugging Face's LLaVA; weights
            as ``.bin`` or safetensors, in one file or in shards.
        vision: the tower's folder or name, where an official folder's ``mm_vision_tower`` does not lead to it.

    Returns:
        The model in the checkpoint's own dtype; ``align_mode`` is ``none`` for LLaVA.

    Raises:
        ValueError: not such a folder, or tensors that do not fit its configuration (each named, with its shapes).
    """
    folder = Path(source)
    config = _read_config(folder)
    if _is_ours(config):
        model: AlignGPTForConditionalGeneration = AlignGPTForConditionalGeneration.from_pretrained(folder, dtype="auto")
        return model
    if "text_config" in config:
        ours = _config_from_llava_hf(config)
        return _build(ours, _rename(read_tensors(folder), _FROM_LLAVA_HF), folder)
    tensors = _rename(read_tensors(folder), _FROM_OFFICIAL)
    tower = _find_tower(folder, vision or config.get("mm_vision_tower"))
    if not any(name.startswith("vision_tower.") for name in tensors):
        tensors |= {f"vision_tower.{name}": tensor for name, tensor in _load_tower(tower).state_dict().items()}
    return _build(_config_from_official(config, _tower_config(tower), tensors), tensors, folder)


def load_projector(
    file: str | Path, *, llm: str | Path, vision: str | Path, **settings: Any
) -> AlignGPTForConditionalGeneration:
    """A model ready for finetuning from what the official code keeps of pretraining (``mm_projector_align.bin``).

    Args:
        file: projector and table of level embeddings; there is no gate yet, so a new one is made.
        llm: the causal LLM's folder or name.
        vision: the vision tower's folder or name.
        settings: fields of AlignGPTConfig; N and the projector's type are read from the file.

    Raises:
        ValueError: the file holds something else, or does not fit the LLM and the tower.
    """
    tensors = _rename(_load_bin(Path(file)), _FROM_OFFICIAL)
    depth = len({name for name in tensors if re.fullmatch(r"projector\.(\d+\.)?weight", name)})
    if depth == 0:
        raise ValueError(f"{file} holds no mm_projector; is it an official mm_projector_align.bin?")
    settings.setdefault("projector_type", "linear" if depth == 1 else f"mlp{depth}x_gelu")
    if "level_embeddings.weight" in tensors:
        settings.setdefault("num_levels", tensors["level_embeddings.weight"].shape[0])
    else:
        settings.setdefault("align_mode", "none")
    model = AlignGPTForConditionalGeneration.from_components(
        AutoModelForCausalLM.from_pretrained(llm, dtype="auto"), _load_tower(vision), **settings
    )
    _check_tensors(tensors, model, Path(file), partial=True)
    model.load_state_dict(tensors, strict=False)
    return model


def save_official(model: AlignGPTForConditionalGeneration, folder: str | Path) -> None:
    """Write a model as the official code reads it: ``config.json`` and safetensors; for ``none`` LLaVA's layout.

    Raises:
        ValueError: the LLM is no Llama, the only kind that the official code has.
    """
    config = model.config
    if config.text_config.model_type != "llama":
        raise ValueError(f"the official layout holds a Llama only, not a {config.text_config.model_type}.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _rename({k: v.contiguous() for k, v in model.state_dict().items()}, _TO_OFFICIAL)
    if config.align_mode == "none":
        prefixes = ("mm_projector.", "vision_tower.")
        tensors = {f"model.{k}" if k.startswith(prefixes) else k: v for k, v in tensors.items()}
    for layer in range(config.text_config.num_hidden_layers):
        # Computed everywhere, but transformers 4.31 expects to find them.
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = _inverse_frequencies(config.text_config)
    save_torch_state_dict(tensors, folder, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_official_config(config), indent=2) + "\n")


def save_projector(model: AlignGPTForConditionalGeneration, file: str | Path) -> None:
    """Write projector and table in bfloat16, as the official code keeps them after pretraining."""
    kept = {k: v.bfloat16() for k, v in model.state_dict().items() if re.match(r"projector\.|level_embeddings\.", k)}
    torch.save(_rename(kept, _TO_OFFICIAL), file)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder: safetensors before ``.bin``, an index before a single file.

    Raises:
        ValueError: the folder has no weights.
    """
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if index.is_file():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        elif (folder / single).is_file():
            names = [single]
        else:
            continue
        tensors: dict[str, Tensor] = {}
        for name in names:
            file = folder / name
            tensors |= load_file(file) if file.suffix == ".safetensors" else _load_bin(file)
        return tensors
    raise ValueError(f"{folder} has neither model.safetensors nor pytorch_model.bin (nor an index of shards).")


def _load_bin(file: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    return tensors


def _rename(tensors: dict[str, Tensor], rules: list[tuple[str, str]]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        if _COMPUTED.search(name):
            continue
        for pattern, replacement in rules:
            new, hits = re.subn(pattern, replacement, name)
            if hits:
                break
        renamed[new] = tensor
    return renamed


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} is not a checkpoint folder: it has no config.json.")
    config: dict[str, Any] = json.loads(file.read_text())
    return config


def _is_ours(config: dict[str, Any]) -> bool:
    # The official code calls its models "aligngpt" too, but keeps the LLM's settings at the top.
    return "text_config" in config and config.get("model_type") == AlignGPTConfig.model_type


def _image_mode(config: dict[str, Any]) -> str:
    return "pad" if config.get("image_aspect_ratio") == "pad" else "crop"


def _save_ours(
    model: AlignGPTForConditionalGeneration, target: Path, *, tokenizer: Path, tower: str, image_mode: str = "pad"
) -> None:
    """Model and, where there is a tokenizer, processor."""
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


def _find_tower(folder: Path, vision: str | Path | None) -> str:
    """The tower's folder: as given, beside the checkpoint, or inside it; otherwise taken as a name on the Hub."""
    if vision is None:
        raise ValueError(f"{folder}/config.json names no mm_vision_tower; say which tower (vision=...).")
    for candidate in (
        Path(vision),
        folder.parent / vision,
        folder / vision,
        folder.parent / Path(vision).name,
    ):
        if (candidate / "config.json").is_file():
            return str(candidate)
    return str(vision)


def _tower_config(tower: str) -> PreTrainedConfig:
    config = AutoConfig.from_pretrained(tower)
    return getattr(config, "vision_config", config)


def _load_tower(tower: str | Path) -> Any:
    model = AutoModel.from_pretrained(tower, dtype="auto")
    return getattr(model, "vision_model", model)


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


# Of the whole model, not of its LLM.
_OUTER = {"architectures", "model_type", "transformers_version", "torch_dtype", "dtype"}


def _config_from_llava_hf(config: dict[str, Any]) -> AlignGPTConfig:
    if config.get("model_type") != "llava":
        raise ValueError(f"a {config.get('model_type')!r} checkpoint is neither AlignGPT nor LLaVA-1.5.")
    if config.get("projector_hidden_act", "gelu") != "gelu" or not config.get("multimodal_projector_bias", True):
        raise ValueError("only LLaVA's own projector (GELU, with biases) can be converted.")
    # LlavaConfig fills in what the file leaves out of its two halves.
    full = AutoConfig.for_model(**config)
    return AlignGPTConfig(
        text_config=full.text_config.to_dict(),
        vision_config=full.vision_config.to_dict(),
        image_token_id=full.image_token_index,
        align_mode="none",
        vision_layer=full.vision_feature_layer,
        vision_select="patch" if full.vision_feature_select_strategy == "default" else "cls_patch",
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


def _build(config: AlignGPTConfig, tensors: dict[str, Tensor], folder: Path) -> AlignGPTForConditionalGeneration:
    with torch.device("meta"):
        blueprint = AlignGPTForConditionalGeneration(config)
    # An official model that was saved after pretraining has a table and no gate yet; a new one is made.
    has_gate = any(name.startswith("gate.") for name in tensors)
    _check_tensors(tensors, blueprint, folder, missing_ok=() if has_gate else ("gate.",))
    dtype = tensors["language_model.model.embed_tokens.weight"].dtype
    model: AlignGPTForConditionalGeneration = AlignGPTForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype
    )
    return model


def _check_tensors(
    tensors: dict[str, Tensor],
    model: AlignGPTForConditionalGeneration,
    source: Path,
    *,
    partial: bool = False,
    missing_ok: tuple[str, ...] = (),
) -> None:
    """Raise ValueError unless the tensors are, in name and shape, what the model has."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = [
        f"{name} is {tuple(tensor.shape)}, the model's is {expected[name]}"
        for name, tensor in tensors.items()
        if name in expected and tuple(tensor.shape) != expected[name]
    ]
    unknown = tensors.keys() - expected.keys()
    problems += [f"{name} {tuple(tensors[name].shape)} is not in the model" for name in unknown]
    if not partial:
        missing = expected.keys() - tensors.keys() - set(model.all_tied_weights_keys)
        missing = {name for name in missing if not name.startswith(missing_ok)}
        problems += [f"{name} {expected[name]} is missing" for name in missing]
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise ValueError(f"{source} does not fit its configuration: {'; '.join(sorted(problems)[:5])}{more}.")
