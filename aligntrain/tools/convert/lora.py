"""Read LoRA checkpoints of the official code: adapters of the LLM (peft), and beside them what was trained whole."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from aligncurate.errors import UserError
from aligntrain.tools.convert.tensors import read_bin

_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
_TRAINED_WHOLE = "non_lora_trainables.bin"


def is_lora(folder: Path) -> bool:
    """Whether the folder holds LoRA adapters instead of a whole model."""
    return (folder / "adapter_config.json").is_file()


def read_lora(folder: Path, llm: str | Path | None) -> dict[str, Tensor]:
    """All tensors but the vision tower's, by their official names: adapters merged, and what was trained whole.

    Args:
        folder: with ``adapter_config.json``, the adapters and ``non_lora_trainables.bin``.
        llm: the LLM's folder or name.

    Raises:
        UserError: no LLM is given, a file is missing, adapters belong to another LLM, or peft is not installed.
    """
    if llm is None:
        raise UserError(f"{folder} contains only LoRA adapters; pass --llm, the LLM that they were trained on.")
    try:
        from peft import PeftModel
    except ImportError:
        raise UserError("LoRA adapters need peft; install it with `pip install peft`.") from None
    if not (folder / _TRAINED_WHOLE).is_file():
        raise UserError(f"{folder} has no {_TRAINED_WHOLE}, which holds the projector; copy it there.")
    whole = {name.removeprefix("base_model.model."): t for name, t in read_bin(folder / _TRAINED_WHOLE).items()}
    base = AutoModelForCausalLM.from_pretrained(llm, dtype="auto")
    adapted = PeftModel.from_pretrained(base, folder)
    # peft loads what it can and says nothing of the rest.
    known = {name.replace(".default.", ".") for name in adapted.state_dict()}
    unknown = sorted(name for name in _adapter_names(folder) if name not in known)
    if unknown:
        raise UserError(f"{folder}: the adapters do not fit {llm}; it has no {unknown[0]} (of {len(unknown)}).")
    merged: dict[str, Tensor] = adapted.merge_and_unload().state_dict()
    return merged | whole


def _adapter_names(folder: Path) -> list[str]:
    file = next((folder / name for name in _ADAPTERS if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"{folder} has neither {' nor '.join(_ADAPTERS)}.")
    if file.suffix == ".bin":
        return list(read_bin(file))
    with safe_open(file, "pt") as tensors:
        return list(tensors.keys())
