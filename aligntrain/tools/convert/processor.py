"""The tokenizer and the vision tower's files beside a model in the official layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from aligncurate.progress import notice
from aligncurate.sources.marks import IMAGE
from aligntrain.inputs.processor import AlignGPTProcessor
from aligntrain.inputs.templates import ALIGN
from aligntrain.model.configuration import AlignGPTConfig
from aligntrain.tools.convert.official import tower_name

_SENTENCEPIECE = "tokenizer.model"
_TOKENIZERS = ("tokenizer.json", _SENTENCEPIECE)


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder has a tokenizer's files."""
    return any((folder / name).is_file() for name in _TOKENIZERS)


def save_official_processor(source: Path, folder: Path, config: AlignGPTConfig) -> None:
    """Write what the official code needs beside the weights, if the model has a processor.

    That is the LLM's own tokenizer, without the placeholders that this package adds, and the image settings in the
    vision tower's folder.

    Args:
        source: a model of this package.
        folder: where ``save_official`` has written the weights.
        config: the model's.
    """
    if not has_tokenizer(source):
        notice(f"{source} has no tokenizer; copy that of its LLM into the new folder.")
        return
    processor = AlignGPTProcessor.from_pretrained(source)
    processor.tokenizer.save_pretrained(folder)
    _remove_placeholders(folder / "tokenizer.json", config.text_config.vocab_size)
    copy_sentencepiece(source, folder)
    _name_tokenizer_class(folder, config.text_config.model_type)
    tower = folder / tower_name(config)
    processor.image_processor.save_pretrained(tower)
    file = folder / "config.json"
    settings = json.loads(file.read_text("utf-8"))
    # The first is the official code's; the second this package's, so that a model can be converted back.
    settings |= {"image_aspect_ratio": "pad" if processor.image_mode == "pad" else "square"}
    settings |= {"conversation_template": processor.template, "tokenizer_model_max_length": processor.max_length}
    file.write_text(json.dumps(settings, indent=2) + "\n", "utf-8")


def copy_sentencepiece(source: Path, folder: Path) -> None:
    """Copy the original sentencepiece model, if there is one: the official code reads Llama's tokenizer from it."""
    if (source / _SENTENCEPIECE).is_file():
        shutil.copy(source / _SENTENCEPIECE, folder)


def _remove_placeholders(file: Path, vocab_size: int) -> None:
    """Remove the tokens that were added beyond the LLM's vocabulary from a ``tokenizer.json``."""
    saved = json.loads(file.read_text("utf-8"))
    tokens = saved["added_tokens"]
    saved["added_tokens"] = [t for t in tokens if t["content"] not in (IMAGE, ALIGN) or t["id"] < vocab_size]
    file.write_text(json.dumps(saved, ensure_ascii=False, indent=2), "utf-8")


def _name_tokenizer_class(folder: Path, llm: str) -> None:
    """Name a class that older versions of transformers have."""
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text("utf-8"))
    settings = {k: v for k, v in settings.items() if v is not None and k not in ("backend", "processor_class")}
    sentencepiece = llm == "llama" and (folder / _SENTENCEPIECE).is_file()
    settings["tokenizer_class"] = "LlamaTokenizer" if sentencepiece else "PreTrainedTokenizerFast"
    file.write_text(json.dumps(settings, ensure_ascii=False, indent=2), "utf-8")
