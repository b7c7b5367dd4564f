"""LoRA adapters (peft) in the LLM's decoder: added before training, merged into the weights for export."""

from __future__ import annotations

from typing import Any

from torch import nn

from aligncurate.errors import UserError
from aligntrain.model.modeling import AlignGPTForConditionalGeneration
from aligntrain.stage import StageConfig


def add_lora(model: AlignGPTForConditionalGeneration, config: StageConfig, learning: set[str]) -> set[str]:
    """Add LoRA adapters to all linear layers of the LLM's decoder; they are trained instead of the LLM.

    Args:
        model: without adapters.
        config: the adapters' rank, alpha and dropout.
        learning: names of the parameters that would be trained without LoRA.

    Returns:
        The names of the parameters to train.

    Raises:
        UserError: peft is not installed.
    """
    lora_config, inject, _ = _peft()
    adapters = lora_config(
        r=config.lora_rank,
        lora_alpha=2 * (config.lora_rank or 0) if config.lora_alpha is None else config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=_linear_names(model.language_model),
    )
    inject(adapters, model.language_model)
    outside = {name for name in learning if not name.startswith("language_model.")}
    return outside | {name for name, _ in model.named_parameters() if "lora_" in name}


def merge_lora(model: AlignGPTForConditionalGeneration) -> None:
    """Merge the adapters into the weights that they adapt, and remove them."""
    _, _, layer_class = _peft()
    for name, module in list(model.named_modules()):
        if isinstance(module, layer_class):
            merged: Any = module
            merged.merge()
            path, _, child = name.rpartition(".")
            setattr(model.get_submodule(path), child, merged.get_base_layer())


def _linear_names(language_model: Any) -> list[str]:
    """Names of the decoder's linear layers; the head is not one of them."""
    head = language_model.get_output_embeddings()
    names = {
        name.rpartition(".")[2]
        for name, module in language_model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    return sorted(names)


def _peft() -> tuple[Any, Any, Any]:
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer
    except ImportError:
        raise UserError("lora_rank needs peft; install it with `pip install peft`.") from None
    return LoraConfig, inject_adapter_in_model, LoraLayer
