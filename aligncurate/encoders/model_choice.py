"""Which model, weights and config the options name, checked before anything heavy is loaded."""

from __future__ import annotations

import json
from difflib import get_close_matches
from pathlib import Path

from aligncurate.errors import UserError

DEFAULT_MODEL, DEFAULT_PRETRAINED = "ViT-L-14-quickgelu", "openai"
"""The AlignGPT paper does not name its scorer; this is the one of its nearest ancestor, NoC."""

TINY = "tiny"
TINY_FOLDER = Path(__file__).parent / "builtin"

HUB = "hf-hub:"
"""Begins the names of models on the Hugging Face Hub."""


def resolve_names(
    model: str | None, pretrained: str | None, config: str | Path | None
) -> tuple[str, str | None, Path | None]:
    """Model name, weights and config file, with the defaults filled in.

    Raises UserError for a config that is not there, or not one of open_clip's.
    """
    if config is not None:
        file = Path(config)
        if not file.is_file():
            raise UserError(f"--model-config {file}: there is no such file.")
        if model is not None and model != file.stem:
            raise UserError(
                f"--model {model}: with --model-config the model is named after the file, {file.stem}; "
                "leave out --model."
            )
        _check_config(file)
        return file.stem, pretrained, file
    if model in (None, DEFAULT_MODEL):
        return DEFAULT_MODEL, pretrained or DEFAULT_PRETRAINED, None
    if model == TINY:
        return TINY, pretrained or str(TINY_FOLDER / "tiny.safetensors"), TINY_FOLDER / "tiny.json"
    return model, pretrained, None


def _check_config(file: Path) -> None:
    """open_clip accepts a config that it cannot read, and then fails for every model."""
    try:
        config = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"--model-config {file}: not a JSON file ({error}).") from None
    needed = ("embed_dim", "vision_cfg", "text_cfg")
    if not isinstance(config, dict) or any(name not in config for name in needed):
        raise UserError(f"--model-config {file}: not an open_clip config; it needs {', '.join(needed)}.")


def check_model(model: str) -> None:
    """Raises UserError for a model that open_clip does not have, with the closest name."""
    import open_clip

    if model.startswith(HUB) or model in open_clip.list_models():
        return
    close = get_close_matches(model, [*open_clip.list_models(), TINY], n=1)
    hint = f"; did you mean {close[0]}?" if close else "."
    raise UserError(f"--model {model}: there is no such model{hint} `aligncurate models` lists them.")


def check_weights(model: str, pretrained: str | None) -> None:
    """Raises UserError for weights that are neither a file nor one of the model's tags."""
    if model.startswith(HUB) or (pretrained and Path(pretrained).is_file()):
        return
    if pretrained and ("/" in pretrained or pretrained.endswith((".bin", ".pt", ".pth", ".safetensors"))):
        raise UserError(f"--pretrained {pretrained}: there is no such weights file.")
    from open_clip.pretrained import list_pretrained_tags_by_model

    tags = list_pretrained_tags_by_model(model)
    if pretrained and pretrained.lower().replace("-", "_") in {t.lower().replace("-", "_") for t in tags}:
        return
    offer = f"it has {', '.join(tags)}" if tags else "give a local weights file"
    if pretrained:
        raise UserError(f"--pretrained {pretrained}: model {model} has no such weights; {offer}.")
    raise UserError(f"--model {model}: choose its weights with --pretrained; {offer}.")
