"""Every setting of a training stage: one frozen record, used for pretraining and for finetuning."""

from __future__ import annotations

import dataclasses
import json
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from math import inf
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar

from aligncurate.errors import UserError

_CHOICES: dict[str, tuple[str, ...]] = {
    "stage": ("pretrain", "finetune"),
    "template": ("plain", "v1", "chat"),
    "image_mode": ("crop", "pad"),
    "gate_text": ("instruction", "all"),
    "vision_select": ("patch", "cls_patch"),
    "dtype": ("bf16", "fp32"),
    "packing": ("auto", "on", "off"),
    "parallel": ("auto", "ddp", "fsdp"),
}
_AT_LEAST: dict[str, float] = {
    "batch_size": 1, "epochs": 1, "max_steps": 1, "max_length": 8, "token_budget": 8, "learning_rate": 0,
    "warmup_ratio": 0, "weight_decay": 0, "max_grad_norm": 0, "num_levels": 2, "workers": 1, "prefetch": 1,
    "save_every": 1, "keep": 1, "log_every": 1, "lora_rank": 1, "lora_alpha": 0, "lora_dropout": 0, "seed": 0,
    "epsilon": 0,
}  # fmt: skip
_PAPER: dict[str, dict[str, Any]] = {
    "pretrain": {"learning_rate": 1e-3, "batch_size": 256, "template": "plain", "image_mode": "crop"},
    "finetune": {"learning_rate": 2e-5, "batch_size": 128, "template": "v1", "image_mode": "pad"},
}


def _setting(meaning: str, default: Any = dataclasses.MISSING, *, alters: bool = True) -> Any:
    """A field: what it means, its default, and whether it alters the result (if not, a resumed run may change it)."""
    return field(default=default, metadata={"help": meaning, "alters": alters})


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Settings of one stage. ``StageConfig.pretrain(...)`` and ``.finetune(...)`` fill in the AlignGPT paper's
    (arXiv 2405.14129); every field can be given there, in a TOML file and on the command line.

    Raises UserError for a value of the wrong type, out of range, or in contradiction to another.
    """

    stage: str = _setting("pretrain or finetune.")
    data: tuple[str, ...] = _setting("Dataset folders, tars, or any source.", ())
    out: str = _setting("Folder to write; made if needed.", "", alters=False)

    llm: str | None = _setting("Folder of the LLM, for a new model; tiny: the built-in one.", None)
    vision: str | None = _setting(
        "Folder of the vision tower (CLIP, SigLIP), for a new model; tiny: the built-in one.", None
    )
    init: str | None = _setting("Folder of the model to start from, such as what pretraining wrote.", None)

    num_levels: int | None = _setting("Alignment levels N; a new model has 8.", None)
    align_mode: str | None = _setting("gated (default), global, local, average, fixed:k or none.", None)
    gate_text: str | None = _setting("Text in the gate's mean: instruction (default) or all.", None)
    projector_type: str | None = _setting("linear or mlp{k}x_gelu; a new model has mlp2x_gelu.", None)
    vision_layer: int | None = _setting("Hidden layer of the tower; a new model takes -2.", None)
    vision_select: str | None = _setting("patch (default) or cls_patch.", None)
    s2_scales: tuple[int, ...] | None = _setting("Multi-scale input, such as 336,672,1008.", None)
    template: str = _setting("plain (pretrain's), v1 (finetune's) or chat (the LLM's own).")
    image_mode: str = _setting("crop (centre square, pretrain's) or pad (to a square, finetune's).")

    learning_rate: float = _setting("Peak learning rate; 1e-3 in pretrain, 2e-5 in finetune.")
    batch_size: int = _setting("Samples per optimizer step, over all ranks; 256 in pretrain, 128 in finetune.")
    epochs: int = _setting("Passes over the data.", 1)
    max_steps: int | None = _setting("End, and the learning rate's, after so many steps.", None)
    warmup_ratio: float = _setting("Share of the steps in which the learning rate rises.", 0.03)
    weight_decay: float = _setting("AdamW's, on matrices only.", 0.0)
    beta1: float = _setting("AdamW's.", 0.9)
    beta2: float = _setting("AdamW's.", 0.999)
    epsilon: float = _setting("AdamW's.", 1e-8)
    max_grad_norm: float = _setting("Gradients are scaled down to this norm; 0: never.", 1.0)
    dtype: str = _setting("bf16 (with float32 master weights) or fp32.", "bf16")
    seed: int = _setting("Of the order, of new weights and of dropout.", 0)

    max_length: int = _setting("Tokens after which a sample is cut.", 2048)
    token_budget: int = _setting("Most tokens of a micro-batch, padding included.", 4096)
    packing: str = _setting("Several samples in a row: auto (if the LLM can), on or off.", "auto")
    level_weights: dict[int, float] | None = _setting(  # noqa: RUF009, it is a field
        "How often a level is seen per epoch, such as 1:0,2:0.5.", None
    )
    stratified: bool = _setting("Every step has the levels in the shares of the whole.", False)

    lora_rank: int | None = _setting("Train the LLM through LoRA adapters of this rank.", None)
    lora_alpha: float = _setting("LoRA's scale times its rank.", 256.0)
    lora_dropout: float = _setting("Dropout before the adapters.", 0.05)

    parallel: str = _setting("Ranks: auto (ddp in pretrain, fsdp in finetune), ddp or fsdp.", "auto", alters=False)
    attention: str = _setting("Attention of the LLM: sdpa, eager, flash_attention_2, flex_attention.", "sdpa")
    checkpointing: bool = _setting("Recompute activations in the backward pass.", False, alters=False)
    compile: bool = _setting("torch.compile, layer by layer.", False, alters=False)
    fused: bool = _setting("AdamW in one kernel, on GPUs.", True, alters=False)

    format: str | None = _setting("What the data is, where it cannot be told by looking.", None)
    caption_column: str | None = _setting("Column or field with the caption.", None)
    image_column: str | None = _setting("Column or field with the image.", None)
    image_root: str | None = _setting("Folder that image paths are relative to.", None)
    workers: int = _setting("Threads that read and decode images.", 4, alters=False)
    prefetch: int = _setting("Steps that are read ahead.", 2, alters=False)

    save_every: int = _setting("Steps between checkpoints.", 500, alters=False)
    keep: int = _setting("Checkpoints to keep.", 2, alters=False)
    resume: bool = _setting(
        "Go on from the last checkpoint in --out; without, those there are deleted.", True, alters=False
    )
    log_every: int = _setting("Steps between log lines.", 10, alters=False)
    log_to: tuple[str, ...] = _setting("Also log to tensorboard, wandb or trackio.", (), alters=False)

    LOGGERS: ClassVar[tuple[str, ...]] = ("tensorboard", "wandb", "trackio")

    @classmethod
    def pretrain(cls, **settings: Any) -> StageConfig:
        """Stage 1, projector and level embeddings: lr 1e-3, 256 samples a step, centre crop, plain captions."""
        return cls.of("pretrain", settings)

    @classmethod
    def finetune(cls, **settings: Any) -> StageConfig:
        """Stage 2, projector, gate and LLM: lr 2e-5, 128 samples a step, padded squares, conversations."""
        return cls.of("finetune", settings)

    @classmethod
    def of(cls, stage: str, settings: Mapping[str, Any], where: str = "") -> StageConfig:
        """The paper's settings of a stage, and over them these.

        Args:
            stage: pretrain or finetune.
            settings: by field name.
            where: what the settings were read from, for the errors.

        Raises UserError for an unknown name, with the one that was probably meant.
        """
        if stage not in _PAPER:
            raise UserError(f"{where}stage is {stage!r}; choose pretrain or finetune.")
        names = [name for name in field_types() if name != "stage"]
        for name in settings:
            if name not in names:
                close = get_close_matches(name.replace("-", "_"), names, n=1)
                hint = f"did you mean {close[0]}" if close else "`aligncurate train " + stage + " --help` lists them"
                raise UserError(f"{where}there is no setting {name!r}; {hint}.")
        try:
            return cls(**{"stage": stage, **_PAPER[stage], **settings})
        except UserError as error:
            raise UserError(f"{where}{error}") from None

    @classmethod
    def from_toml(cls, file: str | Path, stage: str, **settings: Any) -> StageConfig:
        """Settings from a TOML file: plain keys for both stages, tables [pretrain] and [finetune] for one.

        ``settings`` go over the file's. Raises UserError when the file cannot be read or has an unknown key.
        """
        try:
            found = tomllib.loads(Path(file).read_text("utf-8"))
        except FileNotFoundError:
            raise UserError(f"{file}: there is no such file; --config takes a TOML file.") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: not a TOML file that can be read ({error}).") from None
        tables = {name: found.pop(name) for name in _PAPER if name in found}
        own = tables.get(stage, {})
        if not isinstance(own, dict):
            raise UserError(f"{file}: {stage} must be a table, [{stage}].")
        cls.of(stage, {**found, **own}, f"{file}: ")  # a mistake in the file is the file's, whatever goes over it
        return cls.of(stage, {**found, **own, **settings})

    def replace(self, **settings: Any) -> StageConfig:
        """The same with other settings."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "stage"}
        return self.of(self.stage, {**given, **settings})

    def to_json(self, *, altering: bool = False) -> dict[str, Any]:
        """As a JSON object; with ``altering`` only what alters the result."""
        chosen = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata["alters"] or not altering
        }
        plain: dict[str, Any] = json.loads(json.dumps(chosen))
        return plain

    def __post_init__(self) -> None:
        for name, kind in field_types().items():
            object.__setattr__(self, name, _typed(name, kind, getattr(self, name)))
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise UserError(f"{name} is {value!r}; choose one of {', '.join(choices)}.")
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and not least <= value < inf:  # so put that NaN is refused
                raise UserError(f"{name} is {value}; it must be at least {least:g}, and finite.")
        for name in ("beta1", "beta2", "warmup_ratio", "lora_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1.")
        if 1 in (self.beta1, self.beta2):
            raise UserError(f"beta1 is {self.beta1} and beta2 {self.beta2}; they must be less than 1.")
        if self.seed >= 2**63:
            raise UserError(f"seed is {self.seed}; it must be less than 2**63.")
        for name in self.log_to:
            if name not in self.LOGGERS:
                raise UserError(f"log_to names {name!r}; choose from {', '.join(self.LOGGERS)}.")
        if self.token_budget < self.max_length:
            raise UserError(
                f"token_budget is {self.token_budget}, but a sample may have max_length {self.max_length} tokens; "
                "raise the one or lower the other."
            )
        if self.token_budget % 8:
            raise UserError(f"token_budget is {self.token_budget}; it must be a multiple of 8.")
        if any(level < 1 or not 0 <= weight < 1000 for level, weight in (self.level_weights or {}).items()):
            raise UserError(f"level_weights is {self.level_weights}; levels start at 1, weights lie in 0..1000.")
        if self.stage == "pretrain" and self.lora_rank is not None:
            raise UserError("lora_rank: in pretrain the LLM does not learn; LoRA is for finetune.")


@cache
def field_types() -> dict[str, Any]:
    """The type of every setting, by name, in order."""
    hints = typing.get_type_hints(StageConfig)
    return {f.name: hints[f.name] for f in dataclasses.fields(StageConfig)}


def parse_setting(name: str, text: str) -> Any:
    """A setting's value as it is written on the command line: ``3``, ``1e-4``, ``true``, ``a,b``, ``1:0,2:0.5``.

    Raises UserError when the text is no value of the setting's type.
    """
    kind = field_types().get(name)
    if kind is None:
        return text  # StageConfig.of says what is wrong with the name
    if text.lower() in ("none", "null") and NoneType in typing.get_args(kind) and name != "align_mode":
        return None
    kind = _without_none(kind)
    try:
        if kind is bool:
            return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[text.lower()]
        if kind in (int, float, str):
            return kind(text)
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if typing.get_origin(kind) is dict:
            return {int(key): float(value) for key, value in (part.split(":") for part in parts)}
        return tuple(typing.get_args(kind)[0](part) for part in parts)
    except (ValueError, KeyError):
        raise UserError(f"{name} is {text!r}; it takes {_describe(kind)}.") from None


def _without_none(kind: Any) -> Any:
    if isinstance(kind, UnionType):
        return next(k for k in typing.get_args(kind) if k is not NoneType)
    return kind


def _describe(kind: Any) -> str:
    origin = typing.get_origin(kind)
    if origin is tuple:
        return "a list of whole numbers" if typing.get_args(kind)[0] is int else "a list of texts"
    if origin is dict:
        return "weights by level, such as 1:0,2:0.5"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[kind]


def _typed(name: str, kind: Any, value: Any) -> Any:
    """The value in the field's type, or a UserError; lists are taken for tuples, whole numbers for numbers."""
    if value is None and NoneType in typing.get_args(kind):
        return None
    kind = _without_none(kind)
    origin = typing.get_origin(kind)
    try:
        if origin is dict and isinstance(value, Mapping):
            return {int(k): float(v) for k, v in value.items()}
        if origin is tuple and isinstance(value, list | tuple):
            inner = typing.get_args(kind)[0]
            return tuple(_typed(name, inner, str(item) if isinstance(item, Path) else item) for item in value)
    except (TypeError, ValueError):
        pass
    else:
        if kind is str and isinstance(value, Path):
            return str(value)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if origin is None and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
            return value
    raise UserError(f"{name} is {value!r}; it takes {_describe(kind)}.")
