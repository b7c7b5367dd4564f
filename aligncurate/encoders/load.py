"""Image-text encoders: any open_clip model, and the small one that ships with the package."""

import hashlib
import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aligncurate.encoders.device import Precision, choose_precision, find_device
from aligncurate.encoders.tokenizer import Tokenize, quick
from aligncurate.encoders.towers import Towers
from aligncurate.errors import UserError
from aligncurate.images.preprocess import Preprocess

if TYPE_CHECKING:
    import torch

DEFAULT_MODEL, DEFAULT_PRETRAINED = "ViT-L-14-quickgelu", "openai"
"""The AlignGPT paper does not name its scorer; this is the one that its nearest ancestor, NoC, uses."""

TINY = "tiny"
TINY_FOLDER = Path(__file__).parent / "builtin"


@dataclass(frozen=True)
class Encoder:
    """A loaded image-text model, ready to embed.

    Attributes:
        tokenize: texts to int64 ids [B, context], cut at the context as open_clip cuts them.
        preprocess: what images must go through.
        towers: the model on its device.
        identity: what the manifest says of the encoder; equal identities give equal scores.
    """

    tokenize: Tokenize
    preprocess: Preprocess
    towers: Towers
    identity: dict[str, Any]

    @property
    def device(self) -> "torch.device":
        return self.towers.device

    def embed(self, pixels: "torch.Tensor", tokens: "torch.Tensor") -> tuple["torch.Tensor", "torch.Tensor"]:
        """Unit embeddings of images and texts, float32 [n, D] each on the CPU; see `Towers.embed`."""
        return self.towers.embed(pixels, tokens)


def load(
    model: str | None = None,
    pretrained: str | None = None,
    model_config: str | Path | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    *,
    compiled: bool = False,
    random_weights: bool = False,
) -> Encoder:
    """Load an encoder.

    Args:
        model: `tiny`, an open_clip architecture, or `hf-hub:organisation/name`.
        pretrained: an open_clip tag, or a file of weights.
        model_config: an open_clip JSON config; its file name is the model's name.
        device: `auto`, `cpu`, `cuda` or `cuda:i`.
        precision: `auto` is bf16 on a GPU that has it, fp32 elsewhere.
        compiled: run the towers through torch.compile, and as CUDA graphs on a GPU.
        random_weights: take an architecture without weights (for benchmarks).

    Raises UserError for names, files and devices that are not there.
    """
    place = find_device(device)
    kind = choose_precision(precision, place)
    model, pretrained, config = _names(model, pretrained, model_config)
    import open_clip
    import torch

    if config is not None:
        _check_config(config)
        open_clip.add_model_config(str(config))
    if not model.startswith("hf-hub:") and model not in open_clip.list_models():
        raise UserError(f"--model {model}: there is no such model{_closest(model)}; `aligncurate models` lists them.")
    if not random_weights:
        _check_weights(model, pretrained)
    try:
        # open_clip narrates every step of loading, and warns of choices that are deliberate here.
        with warnings.catch_warnings(), _quiet_logging():
            warnings.simplefilter("ignore")
            net, _, transform = open_clip.create_model_and_transforms(
                model, pretrained=pretrained, precision=kind, device=place
            )
            tokenizer = open_clip.get_tokenizer(model)
    except Exception as error:  # broken configs and weights make open_clip, torch and safetensors raise anything
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--model {model} --pretrained {pretrained}: the weights could not be loaded ({first}); "
            "check the name, the network, or give a local weights file."
        ) from None
    net.eval()
    settings = open_clip.get_model_preprocess_cfg(net)
    weights = None if random_weights and pretrained is None else _weights_file(model, pretrained)
    identity = {
        "model": model,
        "pretrained": _public_name(pretrained),
        "weights_sha256": _sha256(weights) if weights else None,
        "config": open_clip.get_model_config(model) if not model.startswith("hf-hub:") else None,
        "tokenizer": type(tokenizer).__name__,
        "context_length": int(tokenizer.context_length),
        "preprocess": {k: settings[k] for k in ("size", "mean", "std", "interpolation", "resize_mode")},
        "precision": kind,
        "device": place.type,
        "compiled": compiled,
    }
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    preprocess = Preprocess.of(transform, settings)
    towers = Towers(net, preprocess.normalize, place, dtype, compiled=compiled)
    return Encoder(quick(tokenizer), preprocess, towers, identity)


def load_all(
    models: str | None,
    pretrained: str | None,
    model_configs: Sequence[str],
    device: str,
    precision: Precision,
    *,
    compiled: bool = False,
) -> dict[str, Encoder]:
    """Encoders by the column for their scores: `score` for the first, `score_<model>` for the others.

    Args:
        models: names separated by commas.
        pretrained: as many tags or files, separated by commas; empty for a model's own default.
        model_configs: configs of some of the models.

    Other arguments and errors as for `load`.
    """
    configs = [Path(config) for config in model_configs]
    names = models.split(",") if models else [config.stem for config in configs]
    if len(names) < 2:
        config = configs[0] if configs else None
        return {"score": load(models, pretrained, config, device, precision, compiled=compiled)}
    weights = pretrained.split(",") if pretrained else [""] * len(names)
    if len(weights) != len(names):
        raise UserError(
            f"--pretrained {pretrained}: {len(weights)} for {len(names)} models; give one for each, "
            "separated by commas (nothing between two commas stands for the default)."
        )
    by_name = {config.stem: config for config in configs}
    if unknown := [str(config) for name, config in by_name.items() if name not in names]:
        raise UserError(f"--model-config {unknown[0]}: --model does not name {Path(unknown[0]).stem}.")
    found: dict[str, Encoder] = {}
    for name, tag in zip(names, weights, strict=True):
        column = f"score_{name.rpartition('/')[2]}" if found else "score"
        if column in found and tag:
            column = f"{column}_{Path(tag).stem}"
        if column in found:
            raise UserError(f"--model {models}: {name} is there twice with the same weights.")
        found[column] = load(name, tag or None, by_name.get(name), device, precision, compiled=compiled)
    return found


def _names(model: str | None, pretrained: str | None, config: str | Path | None) -> tuple[str, str | None, Path | None]:
    """Model name, weights and config file after the defaults."""
    if config is not None:
        file = Path(config)
        if not file.is_file():
            raise UserError(f"--model-config {file}: there is no such file.")
        if model is not None and model != file.stem:
            raise UserError(f"--model {model}: with --model-config the model is called {file.stem}; leave --model out.")
        return file.stem, pretrained, file
    if model is None:
        return DEFAULT_MODEL, pretrained or DEFAULT_PRETRAINED, None
    if model == TINY:
        return TINY, pretrained or str(TINY_FOLDER / "tiny.safetensors"), TINY_FOLDER / "tiny.json"
    return model, pretrained, None


def _check_config(file: Path) -> None:
    """open_clip keeps a config that it cannot read, and then fails for every model; so look at it first."""
    try:
        found = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"--model-config {file}: not a JSON file ({error}).") from None
    wanted = ("embed_dim", "vision_cfg", "text_cfg")
    if not isinstance(found, dict) or any(name not in found for name in wanted):
        raise UserError(f"--model-config {file}: not an open_clip config; it needs {', '.join(wanted)}.")


def _check_weights(model: str, pretrained: str | None) -> None:
    if model.startswith("hf-hub:") or (pretrained and Path(pretrained).is_file()):
        return
    if pretrained and ("/" in pretrained or pretrained.endswith((".bin", ".pt", ".pth", ".safetensors"))):
        raise UserError(f"--pretrained {pretrained}: there is no such weights file.")
    from open_clip.pretrained import list_pretrained_tags_by_model

    tags = list_pretrained_tags_by_model(model)
    if pretrained and pretrained.lower().replace("-", "_") in {t.lower().replace("-", "_") for t in tags}:
        return
    offer = f"it has {', '.join(tags)}" if tags else "give a local weights file"
    what = (
        f"--pretrained {pretrained}: model {model} has no such weights"
        if pretrained
        else (f"--model {model}: say which weights with --pretrained")
    )
    raise UserError(f"{what}; {offer}.")


def _closest(model: str) -> str:
    from difflib import get_close_matches

    import open_clip

    close = get_close_matches(model, [*open_clip.list_models(), TINY], n=1)
    return f"; did you mean {close[0]}" if close else ""


def _weights_file(model: str, pretrained: str | None) -> Path:
    from open_clip.pretrained import download_pretrained, download_pretrained_from_hf, get_pretrained_cfg

    if model.startswith("hf-hub:"):
        return Path(download_pretrained_from_hf(model.removeprefix("hf-hub:")))
    if pretrained is not None and Path(pretrained).is_file():
        return Path(pretrained)
    return Path(download_pretrained(get_pretrained_cfg(model, pretrained)))  # in the cache by now


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _public_name(pretrained: str | None) -> str | None:
    """A tag as it is, a file by its name: the same weights elsewhere are the same encoder."""
    if pretrained is not None and Path(pretrained).is_file():
        return os.path.basename(pretrained)
    return pretrained


@contextmanager
def _quiet_logging() -> Iterator[None]:
    logging.disable(logging.ERROR)  # errors too: they are raised as well
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
