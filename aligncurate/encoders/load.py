"""Loads image-text encoders: any open_clip model, and the small one that ships with the package."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from socket import gaierror
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError, URLError

from aligncurate.encoders.device import Precision, choose_precision, find_device, has_bf16_units
from aligncurate.encoders.model_choice import HUB, TINY, check_model, check_weights, resolve_names
from aligncurate.encoders.tokenizer import Tokenize, fast_tokenizer
from aligncurate.encoders.towers import Towers
from aligncurate.errors import UserError
from aligncurate.images.preprocess import Preprocess
from aligncurate.progress import notice

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Encoder:
    """A loaded image-text model, ready to embed.

    Attributes:
        tokenize: texts to int64 ids [B, context], cut at the context as open_clip cuts them.
        preprocess: how to preprocess its images.
        towers: the model on its device.
        identity: what the manifest records of the encoder; equal identities give equal scores.
    """

    tokenize: Tokenize
    preprocess: Preprocess
    towers: Towers
    identity: dict[str, Any]

    @property
    def device(self) -> torch.device:
        return self.towers.device

    def embed(self, pixels: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
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
    quiet: bool = True,
) -> Encoder:
    """Load an encoder.

    Args:
        model: `tiny`, an open_clip architecture, or `hf-hub:organization/name`.
        pretrained: an open_clip tag, or a file of weights.
        model_config: an open_clip JSON config; its file name is the model's name.
        device: `auto`, `cpu`, `cuda` or `cuda:i`.
        precision: `auto` is bf16 on a GPU that has it, fp32 elsewhere.
        compiled: use torch.compile, and CUDA graphs on a GPU.
        random_weights: load no weights (for benchmarks).
        quiet: do not say that weights are loaded or downloaded, which takes a while.

    Raises UserError for names, files and devices that do not exist, and weights that cannot be loaded.
    """
    place = find_device(device)
    kind = choose_precision(precision, place)
    at_choice = precision == "auto" and place.type == "cpu"
    assumed = model is None and model_config is None
    model, pretrained, config = resolve_names(model, pretrained, model_config)
    import open_clip
    import torch

    if config is not None:
        open_clip.add_model_config(str(config))
    check_model(model)
    if not random_weights:
        check_weights(model, pretrained)
        doing = "loading" if _is_here(model, pretrained) else "downloading the weights of"
        notice(f"{doing} {model}{f' ({_public_name(pretrained)})' if pretrained else ''}.", quiet=quiet)
    if at_choice and model != TINY and has_bf16_units():
        notice(
            "this processor computes in bf16 itself: --precision bf16 is faster, and changes scores by up to 0.01.",
            quiet=quiet,
        )
    try:
        # open_clip logs every step of loading, and warns of choices that are deliberate here.
        with warnings.catch_warnings(), _no_logging():
            warnings.simplefilter("ignore")
            net, _, transform = open_clip.create_model_and_transforms(
                model, pretrained=pretrained, precision=kind, device=place
            )
            tokenizer = open_clip.get_tokenizer(model)
    except Exception as error:  # broken configs and weights make open_clip, torch and safetensors raise anything
        raise UserError(_why_not_loaded(error, model, pretrained, assumed=assumed)) from None
    net.eval()
    settings = open_clip.get_model_preprocess_cfg(net)
    weights = None if random_weights and pretrained is None else _weights_file(model, pretrained)
    identity = {
        "model": model,
        "pretrained": _public_name(pretrained),
        "weights_sha256": _sha256(weights) if weights else None,
        "config": open_clip.get_model_config(model) if not model.startswith(HUB) else None,
        "tokenizer": type(tokenizer).__name__,
        "context_length": int(tokenizer.context_length),
        "preprocess": {k: settings[k] for k in ("size", "mean", "std", "interpolation", "resize_mode")},
        "precision": kind,
        "compiled": compiled,
    }
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    preprocess = Preprocess.of(transform, settings)
    towers = Towers(net, preprocess.normalize, place, dtype, compiled=compiled)
    return Encoder(fast_tokenizer(tokenizer), preprocess, towers, identity)


def load_all(
    models: str | None,
    pretrained: str | None,
    model_configs: Sequence[str],
    device: str,
    precision: Precision,
    *,
    compiled: bool = False,
    quiet: bool = True,
) -> dict[str, Encoder]:
    """Encoders by the column for their scores; the arguments and errors of `requested` and `load`."""
    return {
        column: load(*request, device, precision, compiled=compiled, quiet=quiet)
        for column, request in requested(models, pretrained, model_configs).items()
    }


Request = tuple[str | None, str | None, Path | None]
"""A model, its weights and its config, as `load` takes them."""


def requested(models: str | None, pretrained: str | None, model_configs: Sequence[str]) -> dict[str, Request]:
    """What to load, by the column for its scores: `score` for the first, `score_<model>` for the others.

    Args:
        models: names separated by commas.
        pretrained: a tag or file for each, separated by commas; empty for a model's default.
        model_configs: configs of some of the models.

    Raises UserError for lists that do not fit together.
    """
    configs = [Path(config) for config in model_configs]
    names = [name.strip() for name in models.split(",")] if models else [config.stem for config in configs]
    if len(names) < 2:
        return {"score": (models, pretrained, configs[0] if configs else None)}
    weights = [tag.strip() for tag in pretrained.split(",")] if pretrained else [""] * len(names)
    if len(weights) != len(names):
        raise UserError(
            f"--pretrained {pretrained}: {len(weights)} for {len(names)} models; give one for each, "
            "separated by commas (leave it empty for the default)."
        )
    by_name = {config.stem: config for config in configs}
    if unknown := [str(config) for name, config in by_name.items() if name not in names]:
        raise UserError(f"--model-config {unknown[0]}: --model does not name {Path(unknown[0]).stem}.")
    found: dict[str, Request] = {}
    for name, tag in zip(names, weights, strict=True):
        column = f"score_{name.rpartition('/')[2]}" if found else "score"
        if column in found and tag:
            column = f"{column}_{Path(tag).stem}"
        if column in found:
            raise UserError(f"--model {models}: {name} is named twice with the same weights.")
        found[column] = (name, tag or None, by_name.get(name))
    return found


def expected_identity(
    request: Request, precision: Precision, compiled: bool, earlier: Mapping[str, Any]
) -> dict[str, Any]:
    """The identity that `load` would give, as far as that shows without loading; the rest as in an `earlier` one.

    Hashes a weights file.
    """
    model, pretrained, config = resolve_names(*request)
    found = {**earlier, "model": model, "pretrained": _public_name(pretrained), "compiled": compiled}
    if precision != "auto":
        found["precision"] = precision
    if config is not None:
        found["config"] = json.loads(config.read_text("utf-8"))
    if pretrained is not None and Path(pretrained).is_file():
        found["weights_sha256"] = _sha256(Path(pretrained))
    return found


def _why_not_loaded(error: Exception, model: str, pretrained: str | None, *, assumed: bool) -> str:
    """A sentence on weights that could not be loaded; `assumed` if the user named no architecture."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    if pretrained is not None and Path(pretrained).is_file():
        which = f"the default model, {model}" if assumed else f"model {model}"
        return (
            f"--pretrained {pretrained}: could not be loaded into {which} ({first}); "
            "name the architecture of these weights with --model or --model-config."
        )
    weights = f"--model {model}" + (f" --pretrained {pretrained}" if pretrained else "")
    if _is_network_error(error):
        return f"{weights}: no network and no cached weights; use --pretrained FILE."
    return f"{weights}: the weights could not be loaded ({first}); check the names, or use --pretrained FILE."


def _is_network_error(error: BaseException) -> bool:
    """Whether an error, or one that led to it, is that a server could not be reached."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    unreachable = (ConnectionError, TimeoutError, gaierror, LocalEntryNotFoundError)
    if isinstance(error, unreachable) or (isinstance(error, URLError) and not isinstance(error, HTTPError)):
        return True
    before = error.__cause__ or error.__context__
    return before is not None and _is_network_error(before)


def _weights_file(model: str, pretrained: str | None) -> Path:
    from open_clip.pretrained import download_pretrained, download_pretrained_from_hf, get_pretrained_cfg

    if model.startswith(HUB):
        return Path(download_pretrained_from_hf(model.removeprefix(HUB)))
    if pretrained is not None and Path(pretrained).is_file():
        return Path(pretrained)
    return Path(download_pretrained(get_pretrained_cfg(model, pretrained)))  # in the cache by now


def _is_here(model: str, pretrained: str | None) -> bool:
    """Whether the weights are a local file, or were downloaded before."""
    if pretrained is not None and Path(pretrained).is_file():
        return True
    from huggingface_hub import try_to_load_from_cache
    from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
    from open_clip.pretrained import get_pretrained_cfg

    settings = {"hf_hub": model.removeprefix(HUB)} if model.startswith(HUB) else get_pretrained_cfg(model, pretrained)
    if not settings.get("hf_hub"):
        return (Path("~/.cache/clip").expanduser() / os.path.basename(settings.get("url", ""))).is_file()
    repository, name = re.fullmatch(r"([^/]+/[^/]+)/?(.*)", settings["hf_hub"]).groups()  # type: ignore[union-attr]
    names = [name] if name else [HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME]
    return any(isinstance(try_to_load_from_cache(repository, name), str) for name in names)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _public_name(pretrained: str | None) -> str | None:
    """A tag unchanged, a file without its folder: the same weights elsewhere are the same encoder."""
    if pretrained is not None and Path(pretrained).is_file():
        return os.path.basename(pretrained)
    return pretrained


@contextmanager
def _no_logging() -> Iterator[None]:
    logging.disable(logging.ERROR)  # errors are raised as well
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
