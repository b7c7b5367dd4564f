"""Convert a checkpoint of any known format; the format is detected from its files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from aligncurate.errors import UserError
from aligncurate.io.files import TEMPORARY, atomic_file, claim, sync, use_umask
from aligncurate.progress import notice
from aligntrain import auto  # noqa: F401, transformers must know the model's type to load its tokenizer
from aligntrain.inputs.generation import complete_generation_config
from aligntrain.inputs.processor import AlignGPTProcessor
from aligntrain.model.configuration import AlignGPTConfig
from aligntrain.model.loading import check_model_exists, model_errors, quiet_transformers
from aligntrain.model.modeling import AlignGPTForConditionalGeneration
from aligntrain.tools.convert.llava_hf import load_llava_hf
from aligntrain.tools.convert.official import find_tower, load_official, save_official
from aligntrain.tools.convert.processor import copy_sentencepiece, has_tokenizer, save_official_processor
from aligntrain.tools.convert.projector import load_projector, save_projector
from aligntrain.tools.convert.tensors import read_config
from aligntrain.training.build import TINY


def convert(
    source: str | Path, target: str | Path, *, llm: str | Path | None = None, vision: str | Path | None = None
) -> str:
    """Convert a foreign checkpoint to this package's layout, or one of its own to the official layout.

    Args:
        source: any checkpoint that ``load_any`` reads, or an official ``mm_projector_align.bin``.
        target: a new or empty folder; a name ending in ``.bin`` writes only the projector and the level embeddings.
        llm: the LLM of a projector file or of LoRA adapters; also where the tokenizer is, if ``source`` has none.
        vision: the vision tower, for a projector file or where an official folder's own path to it is wrong.

    Returns:
        What was converted, in a few words.

    Raises:
        UserError: the checkpoint is not of a known format, is incomplete, or cannot be written as asked.
    """
    source, target = Path(source), Path(target)
    if not source.exists():
        raise UserError(f"{source}: no such file or folder.")
    for option, name in (("--llm", llm), ("--vision", vision)):
        if name is not None:
            if str(name) == TINY and not Path(TINY).is_dir():
                raise UserError(
                    f"{option} {TINY}: the built-in models are for new training only; "
                    "pass the folder or the Hub name of the one that the checkpoint was trained with."
                )
            check_model_exists(str(name))
    with model_errors(source), quiet_transformers():
        if target.suffix == ".bin":
            return _to_projector(source, target, llm=llm, vision=vision)
        if source.is_file():
            if llm is None or vision is None:
                raise UserError(f"{source} contains only a projector; pass --llm and --vision too.")
            model = load_projector(source, llm=llm, vision=vision)
            with _publish(target) as folder:
                _save_ours(model, folder, tokenizer=str(llm), tower=str(vision))
            return "official projector and level embeddings, with an LLM and a vision tower, to a model"
        config = read_config(source)
        model = load_any(source, llm=llm, vision=vision)
        with _publish(target) as folder:
            if _is_ours(config):
                save_official(model, folder)
                save_official_processor(source, folder, model.config)
                return "a model to the official layout"
            _save_ours(
                model,
                folder,
                tokenizer=str(source if llm is None or has_tokenizer(source) else llm),
                tower=str(source) if "text_config" in config else find_tower(source, config, vision),
                image_mode="pad" if config.get("image_aspect_ratio") == "pad" else "crop",
                template=config.get("conversation_template", "v1"),
            )
    return f"{'LLaVA' if model.config.align_mode == 'none' else 'official AlignGPT'} to a model"


def load_any(
    source: str | Path, *, llm: str | Path | None = None, vision: str | Path | None = None
) -> AlignGPTForConditionalGeneration:
    """Load a checkpoint folder of any known format.

    Args:
        source: a folder of this package, of the official AlignGPT or LLaVA code (whole models, or LoRA adapters), or of
            Hugging Face's LLaVA; weights as ``.bin`` or safetensors, in one file or in shards.
        llm: the LLM's folder or name, for LoRA adapters.
        vision: the vision tower's folder or name, where an official folder's ``mm_vision_tower`` does not lead to it.

    Returns:
        The model in the checkpoint's own dtype; ``align_mode`` is ``none`` for LLaVA.

    Raises:
        UserError: not such a folder, or tensors that do not fit its configuration (each named, with its shapes).
    """
    folder = Path(source)
    config = read_config(folder)
    model: AlignGPTForConditionalGeneration
    if _is_ours(config):
        model = AlignGPTForConditionalGeneration.from_pretrained(folder, dtype="auto")
        return model
    if "text_config" in config:
        model = load_llava_hf(folder, config)
    else:
        model = load_official(folder, config, llm=llm, vision=vision)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _is_ours(config: dict[str, Any]) -> bool:
    # The official code calls its models "aligngpt" too, but keeps the LLM's settings at the top level.
    return "text_config" in config and config.get("model_type") == AlignGPTConfig.model_type


def _to_projector(source: Path, target: Path, *, llm: str | Path | None, vision: str | Path | None) -> str:
    if target.exists():
        raise UserError(f"{target}: this file exists already; choose a new name.")
    if source.is_file():
        raise UserError(f"{source} is a projector already; give the folder of a model, or a folder to write to.")
    model = load_any(source, llm=llm, vision=vision)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(target) as temporary:
        save_projector(model, temporary)
    return "a model to the official projector and level embeddings"


@contextmanager
def _publish(target: Path) -> Iterator[Path]:
    """A temporary folder whose files move to ``target`` when the block ends without an error, config.json last."""
    with claim(target, own=()):
        temporary = target / f"{TEMPORARY}model"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            use_umask(temporary.rglob("*.safetensors"))
            for path in sorted(temporary.iterdir(), key=lambda path: path.name == "config.json"):
                path.replace(target / path.name)
            sync(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _save_ours(
    model: AlignGPTForConditionalGeneration,
    folder: Path,
    *,
    tokenizer: str,
    tower: str,
    image_mode: str = "pad",
    template: str = "v1",
) -> None:
    """Save the model and, if there is a tokenizer, its processor."""
    ends: list[int] = []
    if Path(tokenizer).is_dir() and not has_tokenizer(Path(tokenizer)):
        notice(
            f"{tokenizer} has no tokenizer, so the model gets no processor and cannot be used with `generate`; "
            "pass --llm, the LLM that it was trained from."
        )
    else:
        config = model.config
        processor = AlignGPTProcessor.from_components(
            tokenizer,
            tower,
            template=template,
            num_patches=config.num_patches,
            pixel_size=config.pixel_size,
            image_mode=image_mode,
            align=config.align_mode != "none",
            gate_text=config.gate_text,
        )
        config.image_token_id, config.align_token_id = processor.image_token_id, processor.align_token_id
        processor.save_pretrained(folder)
        copy_sentencepiece(Path(tokenizer), folder)
        with suppress(ValueError):  # of a template in which no answer is found, the tokenizer's end token is left
            ends = processor.end_token_ids
    complete_generation_config(model.generation_config, ends)
    model.save_pretrained(folder)
