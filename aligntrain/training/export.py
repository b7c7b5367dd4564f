"""The trained model as a Hugging Face folder: model, processor and merged LoRA adapters."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from aligncurate.io.files import TEMPORARY, sync, use_umask
from aligntrain.inputs.generation import complete_generation_config
from aligntrain.inputs.processor import AlignGPTProcessor
from aligntrain.model.loading import quiet_transformers
from aligntrain.stage import StageConfig
from aligntrain.training.build import build_model, save_processor
from aligntrain.training.checkpoint import load_weights
from aligntrain.training.lora import merge_lora


def export(checkpoint: Path, config: StageConfig, processor: AlignGPTProcessor) -> list[str]:
    """Write model and processor to `config.out` as a Hugging Face folder, with a checkpoint's weights.

    The model is rebuilt from the checkpoint, which needs no other rank; LoRA adapters are merged. Returns the names of
    its files. Raises UserError when the checkpoint does not fit the model.
    """
    model, _ = build_model(config.replace(checkpointing=False), processor)
    load_weights(checkpoint, model)
    if config.lora_rank is not None:
        merge_lora(model)
    model.to(torch.bfloat16 if config.dtype == "bf16" else torch.float32)
    complete_generation_config(model.generation_config, processor.end_token_ids)
    out = Path(config.out)
    temporary = out / f"{TEMPORARY}model"
    shutil.rmtree(temporary, ignore_errors=True)
    with quiet_transformers():
        model.save_pretrained(temporary)
    save_processor(processor, temporary)
    # config.json is deleted first and written last: a folder that has one is complete.
    for stale in (out / "config.json", *out.glob("*.safetensors*")):
        stale.unlink(missing_ok=True)
    use_umask(temporary.glob("*.safetensors"))
    written = sorted(temporary.iterdir(), key=lambda path: path.name == "config.json")
    for path in written:
        sync(path)
        path.replace(out / path.name)
    temporary.rmdir()
    sync(out)
    return [path.name for path in written if path.suffix != ".md"]  # the model card is there to be edited
