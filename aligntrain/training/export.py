"""The trained model as a Hugging Face folder: model, processor and merged LoRA adapters."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import GenerationConfig

from aligncurate.io.files import TEMPORARY, sync
from aligntrain.data.sealed import use_umask
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
    _complete_generation_config(model.generation_config, processor)
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


def _complete_generation_config(generation: GenerationConfig, processor: AlignGPTProcessor) -> None:
    """Let generation stop at every token that ends an answer, and make the LLM's settings ones that can be saved."""
    known = generation.eos_token_id
    ends = {*(known if isinstance(known, list) else [known]), *processor.end_token_ids}
    generation.eos_token_id = sorted(ends - {None})
    try:
        generation.validate(strict=True)
    except ValueError:  # Vicuna's has a temperature without sampling, which transformers loads but does not save
        generation.do_sample = True
