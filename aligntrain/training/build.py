"""Builds the model and the processor that a stage trains, from its StageConfig."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig

from aligncurate.errors import UserError
from aligntrain import auto  # noqa: F401, transformers must know the model's type to load its processor
from aligntrain.inputs.processor import AlignGPTProcessor
from aligntrain.model.configuration import AlignGPTConfig, projector_depth
from aligntrain.model.loading import check_model_exists, model_errors, quiet_transformers
from aligntrain.model.modeling import AlignGPTForConditionalGeneration
from aligntrain.stage import StageConfig
from aligntrain.training.lora import add_lora

_SHAPE = ("num_levels", "projector_type", "vision_layer", "vision_select", "s2_scales")  # fixed once a model is made
_MODES = ("align_mode", "gate_text")
_MAX_DEPTH = 64  # linear layers of a projector
LLM_TEMPLATE = "llm_chat_template.jinja"

TINY = "tiny"
"""Name of the built-in LLM and vision tower, trained on drawn scenes; for demos and tests."""
_MODELS = Path(__file__).parents[1] / "builtin"


def llm_of(config: StageConfig) -> str | None:
    """The folder, or the name on the Hugging Face Hub, of the LLM in the settings."""
    return str(_MODELS / "tiny-llm") if config.llm == TINY else config.llm


def vision_of(config: StageConfig) -> str | None:
    """The folder, or the name on the Hugging Face Hub, of the vision tower in the settings."""
    return str(_MODELS / "tiny-vision") if config.vision == TINY else config.vision


def build_processor(config: StageConfig) -> AlignGPTProcessor:
    """Build the stage's processor; tokenizer and image settings come from ``init``, or from ``llm`` and ``vision``.

    Raises:
        UserError: one of these cannot be loaded, or does not fit the settings.
    """
    own: dict[str, Any] = {
        "template": config.template,
        "image_mode": config.image_mode,
        "max_length": config.max_length,
    }
    with _load_errors(config):
        if config.init is None:
            shape = _given(config, "vision_select", "s2_scales")
            align, gate_text = config.align_mode != "none", config.gate_text or "instruction"
            return AlignGPTProcessor.from_components(
                llm_of(config), str(vision_of(config)), align=align, gate_text=gate_text, **shape, **own
            )
        before = AlignGPTProcessor.from_pretrained(config.init)
        model = AlignGPTConfig.from_pretrained(config.init)
        mode = config.align_mode or model.align_mode
        before.tokenizer.chat_template = _own_template(config, before)
        return AlignGPTProcessor(
            before.image_processor,
            before.tokenizer,
            num_patches=model.num_patches,
            pixel_size=model.pixel_size,
            align=mode != "none",
            gate_text=config.gate_text or model.gate_text,
            **own,
        )


def save_processor(processor: AlignGPTProcessor, folder: Path) -> None:
    """Save the processor, and beside it the LLM's own chat template.

    ``save_pretrained`` keeps only the template in use. After pretraining that is the plain one, but finetuning may need
    the LLM's.
    """
    processor.save_pretrained(folder)
    if processor.tokenizer.chat_template is not None:
        (folder / LLM_TEMPLATE).write_text(processor.tokenizer.chat_template, "utf-8")


def build_model(
    config: StageConfig, processor: AlignGPTProcessor
) -> tuple[AlignGPTForConditionalGeneration, list[str]]:
    """Build the model, with trained weights in float32 and the rest in the compute dtype.

    New weights depend only on the seed, so that all ranks have the same.

    Returns:
        The model and the names of its trained parameters.

    Raises:
        UserError: a folder is missing, has weights of other shapes, or contradicts the settings.
    """
    torch.manual_seed(config.seed)
    with _load_errors(config), quiet_transformers():
        if config.init is None:
            settings = _given(config, *_SHAPE, *_MODES)
            model = AlignGPTForConditionalGeneration.from_components(
                Path(str(llm_of(config))),
                str(vision_of(config)),
                dtype=_load_dtype(config),
                attn_implementation=config.attention,
                image_token_id=processor.image_token_id,
                align_token_id=processor.align_token_id,
                **settings,
            )
        else:
            model = _load(config)
    learning = set(model.set_stage(config.stage))
    if config.lora_rank is not None:
        learning = add_lora(model, config, learning)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in learning)
        dtype = torch.float32 if name in learning or config.dtype == "fp32" else torch.bfloat16
        parameter.data = parameter.data.to(dtype)
    model.train()
    model.vision_tower.eval()
    if config.checkpointing:
        for layer in layers_of(model.language_model):
            # Wraps the layer's own forward, so that FSDP2's all-gather and torch.compile stay outside.
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    return model, [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def build_config(config: StageConfig) -> AlignGPTConfig:
    """Build only the configuration of the model; reads no weights.

    Raises:
        UserError: as ``build_model``.
    """
    with _load_errors(config):
        if config.init is not None:
            return _config_of_init(config)
        text, vision = (AutoConfig.from_pretrained(folder) for folder in (llm_of(config), vision_of(config)))
        vision = getattr(vision, "vision_config", vision)
        made = AlignGPTConfig(
            text_config=text.to_dict(), vision_config=vision.to_dict(), **_given(config, *_SHAPE, *_MODES)
        )
    layers = made.vision_config.num_hidden_layers  # hidden state 0 is the embedding
    if not -layers - 1 <= made.vision_layer <= layers:
        raise UserError(
            f"--vision-layer {made.vision_layer}: the vision tower has {layers} layers; use a number from "
            f"{-layers - 1} to {layers}."
        )
    if projector_depth(made.projector_type) > _MAX_DEPTH:
        raise UserError(f"--projector-type {made.projector_type}: use at most {_MAX_DEPTH} layers.")
    return made


def layers_of(part: nn.Module) -> list[nn.Module]:
    """The transformer layers of an LLM or tower: the units of FSDP2, torch.compile and activation checkpointing."""
    lists: list[nn.Module] = [module for module in part.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters())).children()) if lists else []


def _load_dtype(config: StageConfig) -> torch.dtype:
    # Trained weights are loaded in float32; a frozen LLM would only take twice the memory.
    return torch.bfloat16 if config.dtype == "bf16" and config.stage == "pretrain" else torch.float32


def _own_template(config: StageConfig, before: AlignGPTProcessor) -> str | None:
    """The chat template of the LLM that ``init`` was made with; None if it had none or it was not saved."""
    file = Path(str(config.init)) / LLM_TEMPLATE
    if file.is_file():
        return file.read_text("utf-8")
    if before.template == "chat":
        return str(before.chat_template)
    if config.template == "chat":
        raise UserError(f"{config.init}: does not have its LLM's chat template; use --template v1.")
    return None


def _given(config: StageConfig, *names: str) -> dict[str, Any]:
    """Those settings in ``names`` that are not None, as arguments of AlignGPTConfig."""
    values = {name: getattr(config, name) for name in names}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items() if v is not None}


def _config_of_init(config: StageConfig) -> AlignGPTConfig:
    """The configuration in ``init`` with the settings' modes. Raises UserError if the settings change its shape."""
    model: AlignGPTConfig = AlignGPTConfig.from_pretrained(config.init)
    for name, value in _given(config, *_SHAPE).items():
        if value != (fixed := getattr(model, name)):
            raise UserError(f"{name} is {value}, but the model in {config.init} was made with {fixed}; leave it out.")
    for name, value in _given(config, *_MODES).items():
        before = getattr(model, name)
        if (value == "none") != (before == "none"):
            raise UserError(
                f"{name} is {value!r}, but the model in {config.init} has {before!r}; an alignment vector cannot be "
                "added or removed later."
            )
        setattr(model, name, value)
    return model


def _load(config: StageConfig) -> AlignGPTForConditionalGeneration:
    model: AlignGPTForConditionalGeneration
    model, report = AlignGPTForConditionalGeneration.from_pretrained(
        config.init,
        config=_config_of_init(config),
        dtype=_load_dtype(config),
        attn_implementation=config.attention,
        output_loading_info=True,
    )
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("gate."))
    if missing or report["mismatched_keys"]:
        wrong = ", ".join([*missing, *map(str, report["mismatched_keys"])][:3])
        raise UserError(f"{config.init}: its weights do not fit its configuration ({wrong}); use an intact model.")
    return model


@contextmanager
def _load_errors(config: StageConfig) -> Iterator[None]:
    """Raise a UserError if the models that the stage starts from are missing or cannot be loaded."""
    if config.init is None and (config.llm is None or config.vision is None):
        missing = "--init, the pretrained model" if config.stage == "finetune" else "--llm and --vision"
        raise UserError(f"no model to start from; pass {missing}.")
    sources = [str(config.init)] if config.init is not None else [str(llm_of(config)), str(vision_of(config))]
    for source in sources:
        check_model_exists(source)
    with model_errors(*sources):
        yield
