"""Shared by all formats: read a checkpoint folder's tensors, rename and check them, build a model from them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel

from aligncurate.errors import UserError
from aligntrain.model.configuration import AlignGPTConfig
from aligntrain.model.modeling import AlignGPTForConditionalGeneration

# Buffers that older versions of transformers saved and newer ones compute.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$|\.position_ids$")


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's ``config.json``. Raises UserError when there is none."""
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder} is not a checkpoint folder: it has no config.json.")
    config = json.loads(file.read_text())
    if not isinstance(config, dict):
        raise UserError(f"{file}: not a configuration; it is a {type(config).__name__}, not an object.")
    return config


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder. safetensors are preferred to ``.bin``, an index of shards to a single file.

    Raises:
        UserError: the folder has no weights.
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
            if Path(name).name != name:
                raise UserError(f"{index}: {name} is not the name of a file beside it.")
            file = folder / name
            tensors |= load_file(file) if file.suffix == ".safetensors" else read_bin(file)
        return tensors
    raise UserError(f"{folder} has neither model.safetensors nor pytorch_model.bin (nor an index of shards).")


def read_bin(file: Path) -> dict[str, Tensor]:
    """The tensors of a ``.bin`` file. Raises UserError when it is damaged or has other objects than tensors."""
    try:
        tensors: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, UnpicklingError):  # torch's advice here is to load it unsafely
        raise UserError(f"{file} is damaged or contains more than tensors; give a file of tensors only.") from None
    return tensors


def rename(tensors: dict[str, Tensor], rules: list[tuple[str, str]]) -> dict[str, Tensor]:
    """Rename tensors by the first rule (pattern, replacement) that matches each; drop buffers that are computed."""
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


def build_from_tensors(
    config: AlignGPTConfig, tensors: dict[str, Tensor], folder: Path
) -> AlignGPTForConditionalGeneration:
    """The model with these weights, in their own dtype. Raises UserError when they do not fit ``config``."""
    with torch.device("meta"):
        blueprint = AlignGPTForConditionalGeneration(config)
    # An official model saved after pretraining has level embeddings but no gate yet; the gate starts with new weights.
    has_gate = any(name.startswith("gate.") for name in tensors)
    check_tensors(tensors, blueprint, folder, missing_ok=() if has_gate else ("gate.",))
    dtype = tensors["language_model.model.embed_tokens.weight"].dtype
    model: AlignGPTForConditionalGeneration = AlignGPTForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype
    )
    return model


def check_tensors(
    tensors: dict[str, Tensor],
    model: AlignGPTForConditionalGeneration,
    source: Path,
    *,
    partial: bool = False,
    missing_ok: tuple[str, ...] = (),
) -> None:
    """Raise UserError unless the tensors have the names and shapes that the model expects (``partial``: or some)."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = [
        f"{name} has shape {tuple(tensor.shape)}, the model expects {expected[name]}"
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
        raise UserError(f"{source} does not fit its configuration: {'; '.join(sorted(problems)[:5])}{more}.")


def load_tower(tower: str | Path) -> Any:
    """A vision tower from its folder or name; of a CLIP or SigLIP model the vision half."""
    model = AutoModel.from_pretrained(tower, dtype="auto")
    return getattr(model, "vision_model", model)
